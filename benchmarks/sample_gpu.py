"""Times sampling with Wan 1.3B on one GPU against diffusers, random weights: 480 x 832 x 81, guidance, bfloat16.

    python benchmarks/sample_gpu.py --out=sample_gpu.json        # needs diffusers; under 5 minutes on an H100 or H200
    python benchmarks/sample_gpu.py --out=/tmp/x.json --tiny     # the same on a CPU, to see it run

Every library runs in processes of its own, one after the other. Rows:
    ours: softmax, 15R8, 30R8   one denoising step of UniPC with both branches of guidance, one after the other (as
                                diffusers has them), or `together` in one batch
    diffusers                   the same with cuDNN attention, eager and with `torch.compile` of the blocks
    VAE                         21 latent frames to 81 frames; `3 windows` as in hybrid_dit/models/vae_windows.py
A video is 50 steps and the VAE in float32 (both libraries' default for Wan). Peak memory includes the parameters.
Prompts have 120 of 512 tokens: ours packs those that are padding, diffusers doesn't; both compute the same.
"""

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # memory that is used, not reserved

PARTS = ("ours", "diffusers", "ours_vae", "diffusers_vae")
VARIANTS = {"softmax": 0, "15R8": 15, "30R8": 30}  # converted blocks
STEPS, PROMPT, NEGATIVE, TEXT = 50, 120, 126, 512  # of a video; tokens of the two prompts; with padding
SIZES = {"num_layers": 30, "num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960}
LATENTS = (21, 60, 104)
TINY_SIZES = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 64}
TINY_LATENTS = (3, 8, 12)


def row(**values) -> None:
    """Prints a result for the parent process (and for people)."""
    print(json.dumps(values), flush=True)


def ours(args) -> None:
    """Denoising steps of all variants."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from hybrid_dit import generation, sampling
    from hybrid_dit.convert import tables
    from hybrid_dit.convert.abstract import abstract_dit
    from hybrid_dit.models.wan import WanConfig, pack_text
    from hybrid_dit.ops.spec import AttentionSpec
    from hybrid_dit.sample_loading import kept_dtype

    @partial(jax.jit, static_argnums=(1, 3))  # compiled once per shape, whatever the variant
    def normal(key, shape, scale, dtype):
        return (jax.random.normal(key, shape) * scale).astype(dtype)

    sizes, latents = (TINY_SIZES, TINY_LATENTS) if args.tiny else (SIZES, LATENTS)
    heads, layers = sizes["num_attention_heads"], sizes["num_layers"]
    wan = WanConfig(heads * sizes["attention_head_dim"], heads, sizes["ffn_dim"], layers)
    x = jax.random.normal(jax.random.key(1), (1, *latents, wan.in_channels))
    sampler = sampling.make_sampler("unipc", STEPS, 3.0)
    contexts = [
        pack_text(jax.random.normal(jax.random.key(n), (1, 128, wan.text_dim)), np.int32([n]), TEXT)
        for n in (PROMPT, NEGATIVE)
    ]
    cases = [(name, True) for name in VARIANTS] + [("softmax", False)]
    for name, sequential in cases:
        count = min(VARIANTS[name], layers)
        spec = AttentionSpec("hybrid", rate=8, stabiliser=args.stabiliser)
        attention = (spec,) * count + (AttentionSpec(),) * (layers - count) if count else ()
        params = {}
        for i, (path, leaf) in enumerate(tables.flatten(abstract_dit(wan, attention)).items()):
            scale = leaf.shape[-2] ** -0.5 if leaf.ndim > 1 else 0.02
            key = jax.random.fold_in(jax.random.key(2), i)
            params[path] = normal(key, leaf.shape, scale, kept_dtype(path, args.dtype).name)
        params = tables.unflatten(params)
        velocity = generation.make_velocity(wan, attention, jnp.dtype(args.dtype), args.backend)
        step = sampling.one_step(sampling.guided(velocity, 6.0, sequential=sequential), sampler)
        carry = sampling.start(sampler, x)
        began = time.perf_counter()
        compiled = step.lower(carry, 0, params, tuple(contexts), None, None).compile()
        compile_s = time.perf_counter() - began
        times = []
        for i in range(args.repeats + 1):
            began = time.perf_counter()
            carry = jax.block_until_ready(compiled(carry, i, params, tuple(contexts), None, None))
            times.append(time.perf_counter() - began)
        assert bool(jnp.isfinite(carry[1]).all())
        where = name if sequential else f"{name}, together"
        peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
        what = {"compile_s": round(compile_s, 1), "peak_gb_so_far": round(peak / 1e9, 2)}
        row(what=f"ours, {where}", step_s=min(times[1:]), times=times[1:], **what)
        del params, compiled, carry


def diffusers(args) -> None:
    """The same step by diffusers."""
    import diffusers
    import torch

    sizes, latents = (TINY_SIZES, TINY_LATENTS) if args.tiny else (SIZES, LATENTS)
    device, dtype = "cpu" if args.tiny else "cuda", getattr(torch, args.dtype)
    torch.manual_seed(0)
    with torch.device(device):
        model = diffusers.WanTransformer3DModel(**sizes).eval().to(dtype)
        torch.nn.init.normal_(model.proj_out.weight, std=0.02)
    for name, module in model.named_modules():  # as `from_pretrained` keeps them
        if name.split(".")[-1] in ("time_embedder", "norm1", "norm2", "norm3"):
            module.float()
    for name, parameter in model.named_parameters():
        if "scale_shift_table" in name:
            parameter.data = parameter.data.float()
    modes = ["compiled"] if args.tiny else ["eager", "compiled"]
    if not args.tiny:
        model.set_attention_backend("_native_cudnn")
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
    )
    texts = torch.zeros((2, TEXT, 4096), device=device, dtype=dtype)
    for text, count in zip(texts, (PROMPT, NEGATIVE)):
        text[:count] = torch.randn((count, 4096), device=device)
    for mode in modes:
        if mode == "compiled":
            model.compile_repeated_blocks(fullgraph=True, dynamic=False)
        scheduler.set_timesteps(STEPS, device=device)
        x = torch.randn((1, 16, *latents), device=device)
        times = []
        with torch.no_grad():
            for t in scheduler.timesteps[: args.repeats + 2]:
                _wait(torch, device)
                began = time.perf_counter()
                cond, uncond = (
                    model(x.to(dtype), t.expand(1), text[None], return_dict=False)[0].float() for text in texts
                )
                x = scheduler.step(uncond + 6.0 * (cond - uncond), t, x, return_dict=False)[0]
                _wait(torch, device)
                times.append(time.perf_counter() - began)
        assert bool(torch.isfinite(x).all())
        peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
        what = {"compile_s": round(times[0] - times[-1], 1), "peak_gb_so_far": round(peak / 1e9, 2)}
        row(what=f"diffusers, {mode}", step_s=min(times[2:]), times=times[2:], **what)


def ours_vae(args) -> None:
    """Decoding, fewest bytes first: the peak is that of the process so far."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from hybrid_dit import generation
    from hybrid_dit.models import vae as vae_lib

    config = vae_lib.VAEConfig(base_dim=8) if args.tiny else vae_lib.VAEConfig()
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: jnp.asarray(rng.standard_normal(x.shape, np.float32) * max(math.prod(x.shape[:-1]), 9) ** -0.5),
        jax.eval_shape(partial(vae_lib.init, config), jax.random.key(0)),
    )
    latents = jax.random.normal(jax.random.key(1), (1, *(TINY_LATENTS if args.tiny else LATENTS), 16))
    for dtype, windows in (("bfloat16", 3), ("float32", 3), ("bfloat16", 1), ("float32", 1)):
        began = time.perf_counter()
        decode = (
            jax.jit(generation.decoder(config, 1, windows, dtype=jnp.dtype(dtype))).lower(params, latents).compile()
        )
        compile_s, times = time.perf_counter() - began, []
        for _ in range(3):
            began = time.perf_counter()
            jax.block_until_ready(decode(params, latents))
            times.append(time.perf_counter() - began)
        peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
        temporary = decode.memory_analysis().temp_size_in_bytes
        what = {"peak_gb_so_far": round(peak / 1e9, 2), "temporaries_gb": round(temporary / 1e9, 2)}
        label = f"ours, VAE, {dtype}{f', {windows} windows' if windows > 1 else ''}"
        row(what=label, decode_s=min(times), compile_s=round(compile_s, 1), **what)


def diffusers_vae(args) -> None:
    """Likewise by diffusers, eager (its frame-by-frame cache does not compile)."""
    import diffusers
    import torch

    device = "cpu" if args.tiny else "cuda"
    latents = torch.randn((1, 16, *(TINY_LATENTS if args.tiny else LATENTS)), device=device)
    for dtype in (torch.bfloat16, torch.float32):
        torch.manual_seed(0)
        with torch.device(device):
            vae = diffusers.AutoencoderKLWan(**({"base_dim": 8} if args.tiny else {})).eval().to(dtype)
        times = []
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with torch.no_grad():
            for _ in range(3):
                _wait(torch, device)
                began = time.perf_counter()
                video = vae.decode(latents.to(dtype), return_dict=False)[0]
                ((video.float() + 1) * 127.5).round().to(torch.uint8)
                _wait(torch, device)
                times.append(time.perf_counter() - began)
                del video
        peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
        name = str(dtype).removeprefix("torch.")
        row(what=f"diffusers, VAE, {name}", decode_s=min(times), peak_gb_so_far=round(peak / 1e9, 2))
        del vae


def _wait(torch, device):
    if device == "cuda":
        torch.cuda.synchronize()


def run_part(args, part: str, seconds: float) -> list[dict]:
    """Runs one part in a process of its own; returns the rows it printed before it ended, failed or ran out of time."""
    command = [sys.executable, __file__, *sys.argv[1:], f"--part={part}"]
    process = subprocess.Popen(["timeout", str(int(seconds)), *command], stdout=subprocess.PIPE, text=True)
    rows = []
    for line in process.stdout:
        print(line, end="", flush=True)
        if line.startswith("{"):
            rows.append(json.loads(line))
    code = process.wait()
    if code:
        rows.append({"what": part, "failed": "out of time" if code == 124 else f"exit code {code}"})
        print(rows[-1], flush=True)
    return rows


def summary(rows: list[dict], steps: int = STEPS) -> list[dict]:
    """Returns seconds per video (steps and float32 VAE) of everything, with the ratio to compiled diffusers."""
    decode = {r["what"].split(",")[0]: r["decode_s"] for r in rows if r["what"].endswith("VAE, float32")}
    videos = [
        {
            "what": r["what"],
            "step_s": r["step_s"],
            "denoise_s": steps * r["step_s"],
            **({"video_s": steps * r["step_s"] + d} if (d := decode.get(r["what"].split(",")[0])) else {}),
        }
        for r in rows
        if "step_s" in r
    ]
    base = next((v for v in videos if v["what"] == "diffusers, compiled"), None)
    for video in videos if base else ():
        both = [k for k in ("denoise_s", "video_s") if k in base and k in video]  # VAEs are timed last
        video |= {"times_diffusers": {k: round(base[k] / video[k], 3) for k in both}}
    return videos


def main() -> None:
    """Runs all parts and writes what there is after each of them to --out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--backend", default="auto", help="of ours attention, see hybrid_dit/ops/backends.py")
    parser.add_argument("--stabiliser", default="max", choices=["max", "lse"])
    parser.add_argument("--seconds", type=float, default=280, help="for everything; parts that don't fit are cut")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        globals()[args.part](args)
        return
    gpu = "none" if args.tiny else subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout.strip()
    about = {"gpu": gpu.split(" (")[0], "python": platform.python_version(), "steps": STEPS}
    about |= {name: getattr(args, name) for name in ("dtype", "backend", "stabiliser", "repeats")}
    began, rows = time.monotonic(), []
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for part in args.parts:
        left = args.seconds - (time.monotonic() - began)
        print(f"-- {part}, {left:.0f} s left", flush=True)
        rows += run_part(args, part, max(left, 1))
        result = {"about": about, "rows": rows, "videos": summary(rows)}
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    for video in summary(rows):
        print("  ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{v}" for k, v in video.items()))


if __name__ == "__main__":
    main()
