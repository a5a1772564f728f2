"""Times fine-tuning steps of Wan 1.3B with random weights on GPUs: softmax, hybrids, and PyTorch with diffusers.

    python benchmarks/finetune_step.py --out=step.json                     # one GPU, about 8 minutes
    python benchmarks/finetune_step.py --out=scale.json --what=scale       # two GPUs, about 9 minutes (--only=15R8: 5)
    python benchmarks/finetune_step.py --tiny --out=/tmp/step.json         # a minute on a CPU, to see it run

A step is forward, backward and AdamW (clip by global norm, weight decay) on float32 master weights with bfloat16
activations, blocks recomputed in the backward pass, batch 1, 480x832x81 (32,760 tokens), 512 text tokens.

    steps   softmax, 15R8 and 15R4 in JAX; then the same softmax step in PyTorch: diffusers' WanTransformer3DModel under
            autocast, cuDNN attention, torch.compile (whole model, and block by block), gradient checkpointing, fused
            AdamW
    save    an asynchronous checkpoint of parameters and moments while steps go on: how long training pauses
    scale   two GPUs against one: a video each, weights split (FSDP) or copied; and one video of 720x1280x81 (75,600
            tokens) whose tokens are split. Rows of one GPU run two at a time, each on its own

Every row is measured in a process of its own, printed and written to --out at once. MFU counts model FLOPs (3 x
forward, nothing recomputed) against the maker's dense 16-bit peak.
"""

import argparse
import dataclasses
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SIZES = {"dim": 1536, "num_heads": 12, "ffn_dim": 8960, "num_layers": 30}
LATENTS = {32_760: (21, 60, 104, 16), 75_600: (21, 90, 160, 16)}
TEXT = 512
TINY = {"dim": 64, "num_heads": 2, "ffn_dim": 128, "num_layers": 2, "text_dim": 16, "freq_dim": 16}
TINY_LATENTS, TINY_TEXT = (3, 8, 16, 16), 8
STEPS = {"warm": 1, "timed": 4}
LIMIT = 560  # seconds for one row


@dataclasses.dataclass
class Case:
    """One row: what runs in a process of its own."""

    name: str
    backend: str = "jax"  # or torch
    label: str = "softmax"  # or 15R8: the first 15 blocks at R = 8
    tokens: int = 32_760
    batch: int = 1
    devices: int = 1
    replicas: int = 1
    seq: int = 1
    save: bool = False
    compile: str = "model"  # torch: model or blocks
    remat: str = "block"
    tiny: bool = False


def cases(what: str) -> list[Case]:
    """Returns the rows of a mode."""
    if what == "save":
        return [Case("save softmax", save=True)]
    if what == "steps":
        jax_cases = [Case(f"jax {label}", label=label) for label in ("softmax", "15R8", "15R4")]
        return [*jax_cases, *(Case(f"torch softmax, compiled {c}", "torch", compile=c) for c in ("model", "blocks"))]
    rows = []
    for label in ("softmax", "15R8"):
        rows += [
            Case(f"{label}, 1 GPU", label=label),
            Case(f"{label}, 75,600 tokens, 1 GPU", label=label, tokens=75_600),
            Case(f"{label}, 2 GPUs, FSDP", label=label, batch=2, devices=2),
            Case(f"{label}, 2 GPUs, copies", label=label, batch=2, devices=2, replicas=2),
            Case(f"{label}, 75,600 tokens, 2 GPUs, tokens split", label=label, tokens=75_600, devices=2, seq=2),
        ]
    return rows


def run_jax(case: Case) -> dict:
    """Measures one row in JAX."""
    import jax
    import numpy as np

    from configs import common
    from hybrid_dit import sharding, targets
    from hybrid_dit.checkpoint import Checkpoints
    from hybrid_dit.convert.abstract import abstract_dit
    from hybrid_dit.cost import parse_name
    from hybrid_dit.data.source import Batch, Text
    from hybrid_dit.models.wan import WanConfig
    from hybrid_dit.ops.spec import AttentionSpec, from_label
    from hybrid_dit.train_metrics import step_flops
    from hybrid_dit.trainer import Trainer

    wan = WanConfig(**(TINY if case.tiny else SIZES))
    shape, text = (TINY_LATENTS, TINY_TEXT) if case.tiny else (LATENTS[case.tokens], TEXT)
    attention = (AttentionSpec(),) * wan.num_layers
    if case.label != "softmax":
        count, rate = parse_name(case.label)
        count = min(count, wan.num_layers)
        attention = (from_label(rate),) * count + attention[count:]
    config = common.get_config("finetune", "wan_1_3b")
    config.finetune.update({"batch": case.batch, "remat": case.remat})
    rng = np.random.default_rng(0)

    def noise(*sizes):
        return rng.standard_normal(sizes, np.float32)

    batch = Batch(
        noise(case.batch, *shape), noise(case.batch, text, wan.text_dim), np.ones((case.batch, text), np.float32), ()
    )
    mesh = sharding.train_mesh(case.replicas, case.seq, jax.devices()[: case.devices])
    trainer = Trainer(config, wan, attention, 3.0, Text(batch.text[:1], batch.count[:1]), mesh)
    abstract = trainer.abstract(abstract_dit(wan, attention))
    state = random_state(trainer, abstract)
    began = time.perf_counter()
    step = trainer.compile(state, batch)
    compile_seconds = time.perf_counter() - began

    def one():
        nonlocal state
        began = time.perf_counter()
        state, metrics = step(state, batch)
        loss = float(metrics["loss"])  # as the training loop does; waits for the whole step
        return time.perf_counter() - began, loss

    for _ in range(STEPS["warm"]):
        one()
    times, losses = zip(*(one() for _ in range(STEPS["timed"])))
    seconds = statistics.median(times)
    flops = step_flops(wan, attention, (case.batch, *shape), text)
    peak = targets.peak(jax.devices()[0].device_kind)
    stats = jax.devices()[0].memory_stats() or {}
    row = {
        "device": jax.devices()[0].device_kind,
        "version": f"jax {jax.__version__}",
        "seconds": seconds,
        "times": times,
        "loss": losses[-1],
        "tflop": flops / 1e12,
        "mfu": flops / seconds / (peak * case.devices) if peak else None,
        "peak_gb": stats.get("peak_bytes_in_use", 0) / 1e9,
        "compile_seconds": compile_seconds,
        "parameters": sum(x.size for x in jax.tree.leaves(abstract.params)),
    }
    if not math.isfinite(losses[-1]):
        raise SystemExit(f"the loss is {losses[-1]}")
    if case.save:
        folder = Path(tempfile.mkdtemp(prefix="finetune_step_"))
        try:
            with Checkpoints(folder) as checkpoints:
                began = time.perf_counter()
                checkpoints.reserve(state)
                row["reserve_seconds"] = time.perf_counter() - began
            row["saves"] = [time_save(Checkpoints, folder, n, lambda: state, one, seconds) for n in (1, 2)]
        finally:
            shutil.rmtree(folder)
        row["state_gb"] = sum(x.nbytes for x in jax.tree.leaves(state)) / 1e9
    return row


def random_state(trainer, abstract):
    """Returns a state made on the devices: matrices keep their input's scale, norms are 1, all else is small."""
    import jax
    import jax.numpy as jnp

    from hybrid_dit.convert import tables
    from hybrid_dit.trainer import State

    flat = {}
    for i, (path, leaf) in enumerate(tables.flatten(abstract.params).items()):
        name = path.rsplit("/", 1)[-1]
        if name == "scale":
            make = lambda key, leaf=leaf: jnp.ones(leaf.shape)  # noqa: E731
        else:
            scale = leaf.shape[-2] ** -0.5 if name == "kernel" or name.startswith("w") else 0.02
            make = lambda key, leaf=leaf, scale=scale: scale * jax.random.normal(key, leaf.shape)  # noqa: E731
        flat[path] = jax.jit(make, out_shardings=leaf.sharding)(jax.random.fold_in(jax.random.key(0), i))
    params = tables.unflatten(flat)
    places = jax.tree.map(lambda x: x.sharding, abstract)
    moments = jax.jit(trainer.optimiser.init, out_shardings=places.opt_state)(params)
    return State(params, moments, {}, jax.device_put(jnp.int32(0), places.step))


def time_save(checkpoints_class, folder: Path, number: int, state, one, usual: float) -> dict:
    """Saves, trains on until it is on disk, and tells the pauses."""
    with checkpoints_class(folder, keep=1) as checkpoints:
        began = time.perf_counter()
        checkpoints.save(number, state(), {"data": []})
        pause = time.perf_counter() - began
        during = [one()[0] for _ in range(3)]
        waited = time.perf_counter()
    ended = time.perf_counter()
    return {
        "pause_seconds": pause,
        "steps_during": during,
        "slowest_step_over_usual": max(during) / usual,
        "lost_seconds": pause + sum(during) - len(during) * usual,
        "wait_after_steps": ended - waited,
        "seconds_until_on_disk": ended - began,
    }


def run_torch(case: Case) -> dict:
    """Measures the same step in PyTorch."""
    import diffusers
    import torch
    import torch.nn.functional as F
    from diffusers import WanTransformer3DModel
    from torch.nn.attention import SDPBackend, sdpa_kernel

    sizes, shape, text = (TINY, TINY_LATENTS, TINY_TEXT) if case.tiny else (SIZES, LATENTS[case.tokens], TEXT)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    with device:
        model = WanTransformer3DModel(
            num_attention_heads=sizes["num_heads"],
            attention_head_dim=sizes["dim"] // sizes["num_heads"],
            in_channels=16,
            out_channels=16,
            text_dim=sizes.get("text_dim", 4096),
            freq_dim=sizes.get("freq_dim", 256),
            ffn_dim=sizes["ffn_dim"],
            num_layers=sizes["num_layers"],
        )
    model.train()
    model.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.01, fused=cuda)
    run = model
    if case.compile == "model":
        run = torch.compile(model)
    else:
        for i, block in enumerate(model.blocks):
            model.blocks[i] = torch.compile(block)
    latents = torch.randn(case.batch, shape[3], *shape[:3], device=device)
    context = torch.randn(case.batch, text, sizes.get("text_dim", 4096), device=device)

    def step():
        noise, level = torch.randn_like(latents), torch.rand(case.batch, device=device)
        s = level[:, None, None, None, None]
        x = (1 - s) * latents + s * noise
        with torch.autocast(device.type, torch.bfloat16):
            velocity = run(x.bfloat16(), level * 1000, context.bfloat16(), return_dict=False)[0]
        loss = F.mse_loss(velocity.float(), noise - latents)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    def timed():
        began = time.perf_counter()
        loss = step().item()
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - began, loss

    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION if cuda else SDPBackend.MATH):
        began = time.perf_counter()
        for _ in range(STEPS["warm"]):
            timed()
        compile_seconds = time.perf_counter() - began
        times, losses = zip(*(timed() for _ in range(STEPS["timed"])))
    from hybrid_dit import targets
    from hybrid_dit.models.wan import WanConfig
    from hybrid_dit.ops.spec import AttentionSpec
    from hybrid_dit.train_metrics import step_flops

    wan = WanConfig(**sizes)
    seconds = statistics.median(times)
    flops = step_flops(wan, (AttentionSpec(),) * wan.num_layers, (case.batch, *shape), text)
    kind = torch.cuda.get_device_name() if cuda else "cpu"
    peak = targets.peak(kind)
    return {
        "device": kind,
        "version": f"torch {torch.__version__}, diffusers {diffusers.__version__}",
        "seconds": seconds,
        "times": times,
        "loss": losses[-1],
        "tflop": flops / 1e12,
        "mfu": flops / seconds / peak if peak else None,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if cuda else 0.0,
        "compile_seconds": compile_seconds,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def measure(case: Case, gpu: int | None = None) -> dict:
    """Runs one row in a child, on one GPU if given; what goes wrong is part of the row."""
    root = Path(__file__).parents[1]
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.93"} | os.environ | {"PYTHONPATH": path}
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")[gpu]
    command = [sys.executable, __file__, "--case", json.dumps(dataclasses.asdict(case))]
    began = time.perf_counter()
    row = {}
    try:
        child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        row["failed"] = f"took more than {LIMIT} s"
    else:
        if child.returncode:
            row["failed"] = "\n".join((child.stderr or child.stdout).strip().splitlines()[-12:])[-1500:]
        else:
            row = json.loads(child.stdout.splitlines()[-1])
    return row | {"took": time.perf_counter() - began}


def told(row: dict, rows: list[dict]) -> str:
    """Returns a row as a line for people, with ratios to those before it."""
    if "failed" in row:
        return f"{row['name']:44} failed: {row['failed'].splitlines()[-1][:200]}"
    mfu = f"{row['mfu']:.1%}" if row["mfu"] else "-"
    line = f"{row['name']:44} {row['seconds']:7.3f} s/step, MFU {mfu}, {row['peak_gb']:.1f} GB"
    good = [r for r in rows if "failed" not in r and r["tokens"] == row["tokens"]]
    base = next((r for r in good if r["label"] == "softmax" and r["devices"] == 1 and r["backend"] == "jax"), None)
    if base and base is not row and row["devices"] == 1:
        bound = base["tflop"] / row["tflop"]
        line += f", {base['seconds'] / row['seconds']:.2f}x as fast as jax softmax (by FLOPs {bound:.2f}x)"
    one = next((r for r in good if r["label"] == row["label"] and r["devices"] == 1), None)
    if one and row["devices"] > 1:
        work = row["batch"] / one["batch"]
        speedup = one["seconds"] * work / row["seconds"]
        line += f", {speedup:.2f}x one device ({speedup / row['devices']:.0%})"
    if "saves" in row:
        line += f"\n    host memory reserved in {row['reserve_seconds']:.1f} s"
    for save in row.get("saves", []):
        line += f"\n    save: pause {save['pause_seconds']:.2f} s, lost in all {save['lost_seconds']:.2f} s, "
        line += f"on disk after {save['seconds_until_on_disk']:.1f} s"
    return line


def main() -> None:
    """Measures all rows of a mode, or one as its child."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--what", choices=("steps", "save", "scale"), nargs="*", default=["steps", "save"])
    parser.add_argument("--only", default="", help="rows whose name has this text in it")
    remats = "none", "block", "attention", "dots"
    parser.add_argument("--remat", default="block", choices=remats, help="of the rows in JAX")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--case", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        case = Case(**json.loads(args.case))
        row = run_torch(case) if case.backend == "torch" else run_jax(case)
        print(json.dumps(row))
        return
    if not args.out:
        parser.error("--out is missing")
    machine, rows = {"python": platform.python_version(), "machine": platform.machine()}, []
    for group in (group for what in args.what for group in together(what, args.only)):
        group = [dataclasses.replace(case, tiny=args.tiny, remat=args.remat) for case in group]
        with ThreadPoolExecutor(len(group)) as pool:
            measured = pool.map(measure, group, range(len(group)) if len(group) > 1 else [None])
            for case, found in zip(group, measured):
                row = dataclasses.asdict(case) | found
                rows.append(row)
                print(told(row, rows), flush=True)
                args.out.parent.mkdir(parents=True, exist_ok=True)
                args.out.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


def together(what: str, only: str) -> list[list[Case]]:
    """A mode's rows in groups to measure at once: two of one GPU where there are two GPUs, else each by itself."""
    groups = []
    for case in (case for case in cases(what) if only in case.name):
        last = groups[-1] if groups else []
        if what == "scale" and case.devices == 1 and len(last) == 1 and last[0].devices == 1:
            last.append(case)
        else:
            groups.append([case])
    return groups


if __name__ == "__main__":
    main()
