"""Compiles the fused TPU kernels for TPUs that are not here; counts their bundles beside those of splash attention.

    python benchmarks/tpu_schedule.py --out docs/results/tpu      # needs hybrid_dit[tpu]; 20 minutes on two cores
    python benchmarks/tpu_schedule.py --direction backward --out docs/results/tpu          # 30 minutes
    python benchmarks/tpu_schedule.py --targets v5e --labels R8 --keys 1024       # a part, or other tile sizes

One video of Wan2.1 1.3B at 480x832x81: 32,760 tokens, 12 heads of 128, bfloat16, poly feature maps (P = 2, two layers).
Every program is compiled in a process of its own, which makes the compiler write down its schedules; its VLIW bundles
are counted in the text. A bundle takes a cycle unless it waits for memory or a unit, so this compares programs and
is no time. A core's bundles are those of the grid loop times its steps: everything in the loop is counted at every step
(also what is branched over in most of them, which is a bit too much), but for the stretch after the largest one, the
epilogue, counted once per tile of queries. Splash attention is counted by the same rule. In the backward kernel of
queries the two largest stretches are a step and the epilogue; of the others, short ones (under 64) are counted at every
step and long ones (the prologue, and what happens once a head) once per tile. What XLA does around a kernel (strided
slices, a change of layout) is not counted.

Bound of the matrix unit: a product [t, i] x [i, o] keeps a unit of U x U busy for t·⌈i/U⌉·⌈o/U⌉·U² multiply-adds, so
heads of 128 half fill a unit of 256. Forward, tokens are the rows t. Backward, each product is taken the way round that
is cheaper: five products of N x N/R for S (scores, their cotangents, dq, dk, dv), and for queries and for keys the two
layers of φ again, their four products back, and two with state or state's gradient (φ's cotangent, and what is summed
into the state's gradient, or dv). Rates per core from the published peak and clock: v5e 197 TFLOP/s at 1.5 GHz,
v5p 459 at 1.75 on two cores, v6e 918 at 1.75. The clock of tpu7x is not published: no bound.
"""

import argparse
import dataclasses
import functools
import json
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from hybrid_dit import targets
from hybrid_dit.atomic import write_json
from hybrid_dit.ops import feature_maps
from hybrid_dit.ops.kernels import tpu_hybrid
from hybrid_dit.ops.kernels.tpu_blocks import BLOCKS, LANES, Blocks, tiles
from hybrid_dit.ops.spec import AttentionSpec, from_label

GRID, HEADS, DIM = (21, 30, 52), 12, 128
N = math.prod(GRID)
CHIPS = {"v5e": "v5e:1x1", "v5p": "v5p:1x1x1", "v6e": "v6e:1x1", "tpu7x": "tpu7x:1x1x1"}
UNIT = {"v5e": (128, 2**17), "v5p": (128, 2**17), "v6e": (256, 2**19)}  # width U, FLOPs per cycle of a core
LABELS = ("R1", "R2", "R4", "R8", "linear")
# (queries, keys in memory, keys at a time) of splash attention; the best of them is what we are held against.
SPLASH = ((1024, 2048, 512), (1024, 2048, 1024), (2048, 2048, 512), (2048, 2048, 1024), (2048, 4096, 1024))
BRANCH = re.compile(r"sbr\.rel")
BUNDLE = re.compile(r"\s*(0x[0-9a-f]+|0)\s+(LH|LB|LE|PB|PF|CT)?\s*:((?: >)*)")


# In the child: compile


def hybrid(spec: AttentionSpec, blocks: Blocks, place, direction: str) -> jax.stages.Lowered:
    """The whole op at full size, forward or backward."""
    x = jax.ShapeDtypeStruct((1, N, HEADS, DIM), jnp.bfloat16, sharding=place)
    phi = jax.eval_shape(lambda: feature_maps.init(jax.random.key(0), HEADS, DIM, spec.feature_map))
    settings = {"spec": spec, "grid": GRID, "blocks": blocks}
    if direction == "forward":
        f, args = tpu_hybrid.forward, (x, x, x, phi)
    else:
        kept = jax.eval_shape(functools.partial(tpu_hybrid.forward_and_residuals, **settings), x, x, x, phi)
        f, args = tpu_hybrid.backward, (x, x, x, phi, *kept, x)
    args = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), args)
    return jax.jit(functools.partial(f, **settings)).lower(*args)


def splash(rate: int, blocks: tuple[int, int, int], place) -> jax.stages.Lowered:
    """Splash attention of as many queries over N/R keys, both rounded up to whole tiles."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    queries, keys = (-(-rows // size) * size for rows, size in ((N, blocks[0]), (-(-N // rate), blocks[1])))
    mask = masks.MultiHeadMask([masks.FullMask((queries, keys))] * HEADS)
    sizes = kernel.BlockSizes(*blocks)
    attention = kernel.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1)
    q, k = (jax.ShapeDtypeStruct((HEADS, rows, DIM), jnp.bfloat16, sharding=place) for rows in (queries, keys))
    return jax.jit(attention).lower(q, k, k)


def child(request: dict) -> None:
    """Compiles one program and prints what the compiler says of it, as JSON on the last line."""
    place = SingleDeviceSharding(targets.parse(CHIPS[request["target"]]).devices[0])
    if request["what"] == "splash":
        lowered = splash(request["rate"], tuple(request["blocks"]), place)
    else:
        blocks = Blocks(**request["blocks"])
        lowered = hybrid(from_label(request["label"]), blocks, place, request["direction"])
    start = time.time()
    try:
        compiled = lowered.compile()
    except Exception as error:  # the compiler's own, by version
        print(json.dumps({"error": str(error)[:2000]}))
        return
    temp = compiled.memory_analysis().temp_size_in_bytes
    print(json.dumps({"compile_s": round(time.time() - start, 1), "temp_mib": round(temp / 2**20, 1)}))


# In the parent: read the schedules


def compile_in_child(request: dict) -> dict:
    """Returns what `child` prints and, of every kernel, the lengths of the stretches of its loop ("kernels")."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true",
        }
        command = [sys.executable, __file__, "--child", json.dumps(request)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr[-3000:])
        report = json.loads(done.stdout.splitlines()[-1])
        files = [f for f in Path(folder).glob("*-final_bundles.txt") if "schedule-analysis" not in f.name]
        # 1795623449803935839-hybrid_outputs.1-72-final_bundles.txt
        names = {f: re.match(r"\d+-((?:hybrid_|splash)\w+)(\.\d+)?", f.name) for f in files}
        found = [(match[1], stretches(f)) for f, match in names.items() if match]
        report["kernels"] = {name: kernel for name, kernel in found if "queries" not in name}
        if passes := [kernel for name, kernel in found if "queries" in name]:  # more than one if S's keys don't fit
            report["kernels"]["hybrid_back_queries"] = sorted(passes, key=sum, reverse=True)
    return report


def stretches(file: Path) -> list[int]:
    """Bundles between one branch (or target of one) and the next, of a kernel's grid loop, in order."""
    out, inside = [], False
    for line in file.open():
        match = BUNDLE.match(line)
        if not match:
            continue
        if match[3].count(">") > 1:
            raise RuntimeError(f"{file.name} has a loop inside the grid's, which the count does not know")
        if not match[3] and inside and match[2] != "PF":
            continue  # an empty bundle between regions, or what comes after the loop
        if match[2] == "LB":
            inside, out = True, [0]
        if not inside:
            continue
        if match[2] in ("PF", "CT"):
            out.append(0)
        out[-1] += 1
        if BRANCH.search(line):
            out.append(0)
    return [size for size in out if size]


def count(kernel: list[int], steps: int, rows: int) -> int:
    """Bundles of a whole kernel whose epilogue, if rows < steps, is entered once per tile of queries."""
    epilogue = kernel[kernel.index(max(kernel)) + 1] if rows < steps else 0
    return (sum(kernel) - epilogue) * steps + epilogue * rows


def backward_bundles(report: dict, label: str, blocks: dict) -> dict:
    """Bundles of both backward kernels; the pass with the linear part is the first and the longest."""
    queries = HEADS * tiles(N, blocks["back_queries"], LANES)[0]
    keys = 0 if label == "linear" else -(-N // int(label[1:]))
    linear = "hybrid_back_keys" in report["kernels"]
    out = {"queries": 0, "keys": 0}
    for i, kernel in enumerate(report["kernels"]["hybrid_back_queries"]):
        here = min(blocks["back_span"], keys - i * blocks["back_span"])
        steps = tiles(here, blocks["back_keys"], LANES)[0] if keys else 1
        largest = sorted(range(len(kernel)), key=kernel.__getitem__)[-2 if linear and keys and i == 0 else -1 :]
        step = kernel[min(largest)] + sum(size for size in kernel if size < 64)
        out["queries"] += queries * (step * steps + sum(kernel) - step)
    if linear:
        multiple = math.lcm(LANES, 8 * int(label[1:])) if keys else LANES
        out["keys"] = HEADS * tiles(N, blocks["back_linear"], multiple)[0] * sum(report["kernels"]["hybrid_back_keys"])
    return out


def bundles(report: dict, label: str, blocks: dict) -> dict:
    """Bundles of both forward kernels."""
    queries, _ = tiles(N, blocks["queries"], 16)
    out = {"outputs": 0, "state": 0}
    keys = 0 if label == "linear" else -(-N // int(label[1:]))
    steps = tiles(keys, blocks["keys"], LANES)[0] if keys else 1
    out["outputs"] = count(report["kernels"]["hybrid_outputs"], HEADS * queries * steps, HEADS * queries)
    if "hybrid_state" in report["kernels"]:
        steps = HEADS * tiles(N, blocks["state"], LANES)[0]
        out["state"] = count(report["kernels"]["hybrid_state"], steps, steps)
    return out


def matrix_bound(target: str, label: str, direction: str) -> dict[str, float] | None:
    """Bundles that the matrix unit needs for the softmax and for the linear part."""
    if target not in UNIT:
        return None
    width, rate = UNIT[target]

    def product(rows, inner, outer):
        return 2 * rows * math.ceil(inner / width) * math.ceil(outer / width) * width**2 / rate

    keys = 0 if label == "linear" else math.ceil(N / int(label[1:]))
    features = 2 * DIM
    if direction == "backward":
        either = lambda x, inner, y: min(product(x, inner, y), product(y, inner, x))  # noqa: E731
        softmax = 2 * either(N, DIM, keys) + either(N, keys, DIM) + 2 * either(keys, N, DIM)
        again = either(N, DIM, features) + either(N, features, features)
        back = either(N, features, features) + either(features, N, features)
        back += either(N, features, DIM) + either(DIM, N, features)
        state = 2 * either(N, DIM, features) + either(DIM, N, features) + either(N, features, DIM)
        linear = 2 * (again + back) + state
        return {"softmax": HEADS * softmax, "linear": 0.0 if label == "R1" else HEADS * linear}
    softmax = product(N, DIM, keys) + product(N, keys, DIM)
    maps = product(N, DIM, features) + product(N, features, features)
    linear = 2 * maps + product(DIM, N, features) + product(N, features, DIM)
    return {"softmax": HEADS * softmax, "linear": 0.0 if label == "R1" else HEADS * linear}


def best_splash(target: str, rate: int, cache: dict) -> tuple[int, tuple] | None:
    """(bundles, blocks) of the best of `SPLASH`; None if none compiles.

    A step's schedule does not depend on how many there are, so each is compiled once, at R = 8.
    """
    found = []
    for blocks in SPLASH:
        if (target, blocks) not in cache:
            request = {"what": "splash", "target": target, "rate": 8, "blocks": blocks}
            cache[target, blocks] = compile_in_child(request)
        report = cache[target, blocks]
        if "error" in report:
            continue
        (kernel,) = report["kernels"].values()
        rows = HEADS * math.ceil(N / blocks[0])
        found.append((count(kernel, rows * math.ceil(math.ceil(N / rate) / blocks[1]), rows), blocks))
    return min(found) if found else None


def measure(target: str, label: str, direction: str, changes: dict, cache: dict) -> dict:
    """One row of the table."""
    blocks = {**dataclasses.asdict(BLOCKS[target]), **changes}
    request = {"what": "hybrid", "target": target, "label": label, "blocks": blocks, "direction": direction}
    report = compile_in_child(request)
    row = {"target": target, "label": label, "blocks": blocks, **report}
    if "error" in report:
        return row
    row["bundles"] = (bundles if direction == "forward" else backward_bundles)(report, label, blocks)
    row["bound"] = matrix_bound(target, label, direction)
    total = sum(row["bundles"].values())
    if row["bound"]:
        row["over_bound"] = total / sum(row["bound"].values())
    if direction == "forward" and label != "linear" and (best := best_splash(target, int(label[1:]), cache)):
        row["splash"] = {"bundles": best[0], "blocks": best[1]}
        if row["bound"]:
            row["over_splash_and_linear_bound"] = total / (best[0] + row["bound"]["linear"])
    return row


def table(rows: list[dict], direction: str) -> str:
    """Markdown; millions of bundles."""
    forward = direction == "forward"
    kernels = ("state", "outputs") if forward else ("queries", "keys")
    titles = ["target", "attention", "compile, s", "temp HBM, MiB", *kernels, "total", "bound", "total / bound"]
    titles += ["splash", "total / (splash + linear bound)"] if forward else []
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for r in rows:
        if "error" in r:
            lines.append(f"| {r['target']} | {r['label']} | does not compile: {r['error'].splitlines()[0][:100]} |")
            continue
        million = lambda x: f"{x / 1e6:.2f}"  # noqa: E731
        cells = [r["target"], r["label"], r["compile_s"], r["temp_mib"]]
        cells += [million(x) for x in (*(r["bundles"][name] for name in kernels), sum(r["bundles"].values()))]
        cells += [million(sum(r["bound"].values())), f"{r['over_bound']:.2f}"] if r["bound"] else ["–", "–"]
        if forward:
            cells.append(million(r["splash"]["bundles"]) if "splash" in r else "–")
            ratio = r.get("over_splash_and_linear_bound")
            cells.append(f"{ratio:.2f}" if ratio else "–")
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main():
    """Compiles everything asked for, prints a table and writes it to OUT/DIRECTION.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=CHIPS, default=list(CHIPS))
    parser.add_argument("--labels", nargs="+", choices=LABELS, default=list(LABELS))
    parser.add_argument("--direction", choices=("forward", "backward"), default="forward")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    for field in dataclasses.fields(Blocks):
        parser.add_argument(f"--{field.name}", type=int, help="instead of the table's")
    args = parser.parse_args()
    if args.child:
        child(json.loads(args.child))
        return
    changes = {f.name: getattr(args, f.name) for f in dataclasses.fields(Blocks)}
    changes = {name: value for name, value in changes.items() if value}
    rows, cache = [], {}
    for target in args.targets:
        for label in args.labels:
            rows.append(measure(target, label, args.direction, changes, cache))
            print(table(rows[-1:], args.direction).splitlines()[-1], flush=True)
    print("\n" + table(rows, args.direction))
    if args.out:
        from importlib.metadata import version

        machine = f"{platform.machine()}, {os.cpu_count()} cores; jax {jax.__version__}, libtpu {version('libtpu')}"
        write_json(args.out / f"{args.direction}.json", {"machine": machine, "rows": rows})


if __name__ == "__main__":
    main()
