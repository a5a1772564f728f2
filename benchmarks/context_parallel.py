"""Compiles attention with the tokens of a video split over a pod that is not here; counts the bytes that travel.

    python benchmarks/context_parallel.py --out docs/results/tpu      # needs hybrid_dit[tpu]; 3 minutes on two cores
    python benchmarks/context_parallel.py --targets v5e:2x4 --ways 8 --labels R8 linear --backends xla

Every group of chips has one video of Wan2.1 1.3B at 480x832x81: 32,760 tokens, 12 heads of 128, bfloat16, poly feature
maps (P = 2, two layers), rows padded to what the chips divide; forward, and forward + backward. Bytes are those of the
whole array of every collective in the compiled program (`hybrid_dit.hlo`), per chip. Beside them:

floor: what the method must send. Forward, keys and values of S in 16 bits, and state and normaliser in float32;
backward, the latter again, the gradients of the former in float32, and those of φ's parameters in float32. Of softmax
attention, all keys and values, and their gradients.
full_length: the bytes of all keys (or values). At R > 1 no all-gather may have as many (a sum may: it holds
the gradients of both in 32 bits).
"""

import argparse
import dataclasses
import functools
import itertools
import json
import math
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hybrid_dit import hlo, targets
from hybrid_dit.atomic import write_json
from hybrid_dit.ops import feature_maps
from hybrid_dit.ops.context_parallel import Split, attention
from hybrid_dit.ops.shards import padded_length
from hybrid_dit.ops.spec import AttentionSpec, from_label

GRID, HEADS, DIM = (21, 30, 52), 12, 128
LABELS = ("softmax", "R2", "R4", "R8", "linear")
DIRECTIONS = ("forward", "both")


def compiled(spec: AttentionSpec, direction: str, split: Split, backend: str) -> jax.stages.Compiled:
    """Attention, or its value and gradients, with rows where their chips are."""
    rows = NamedSharding(split.mesh, PartitionSpec(split.videos, split.tokens))
    whole = NamedSharding(split.mesh, PartitionSpec())
    length = padded_length(math.prod(GRID), split.parts, 8)
    x = jax.ShapeDtypeStruct((split.mesh.size // split.parts, length, HEADS, DIM), jnp.bfloat16, sharding=rows)
    phi = jax.eval_shape(lambda: feature_maps.init(jax.random.key(0), HEADS, DIM, spec.feature_map))
    phi = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole), phi)
    run = functools.partial(attention, spec=spec, grid=GRID, split=split, backend=backend)
    if direction == "forward":
        return jax.jit(run, out_shardings=rows).lower(x, x, x, phi).compile()

    def both(g, *inputs):
        y, pull = jax.vjp(run, *inputs)
        return y, pull(g)

    return jax.jit(both, out_shardings=(rows, (rows, rows, rows, whole))).lower(x, x, x, x, phi).compile()


def floor(spec: AttentionSpec, direction: str) -> int:
    """Bytes that must travel, see above."""
    n, width = math.prod(GRID), HEADS * DIM
    keys = {"softmax": n, "linear": 0}.get(spec.kind, -(-n // spec.rate)) * width * 2
    features = spec.feature_map.degree * DIM
    state = 4 * HEADS * features * (DIM + 1) if spec.converted else 0
    phi = jax.eval_shape(lambda: feature_maps.init(jax.random.key(0), HEADS, DIM, spec.feature_map))
    phi = 4 * sum(x.size for x in jax.tree.leaves(phi)) if spec.converted else 0
    forward = 2 * keys + state
    return forward if direction == "forward" else forward + state + 4 * keys + phi


def measure(target: targets.Target, ways: str, label: str, direction: str, backend: str) -> dict:
    """One row of the results; `ways` are sizes of the axes that tokens are split over, such as "16" or "4x4"."""
    sizes = [int(n) for n in ways.split("x")]
    axes = tuple(f"seq{i}" for i in range(len(sizes)))
    split = Split(Mesh(np.array(target.devices).reshape(-1, *sizes), ("data", *axes)), axes, ("data",))
    spec, began = from_label(label), time.monotonic()
    program = compiled(spec, direction, split, backend)
    parsed = hlo.parse(program.as_text())
    found, unknown = hlo.collectives(parsed)
    gathers = [t.bytes // t.count for (kind, _), t in hlo.collectives_by_origin(parsed).items() if kind == "all-gather"]
    memory = program.memory_analysis()
    row = {
        "target": target.name,
        "chips": split.mesh.size,
        "chips_per_video": ways,
        "attention": label,
        "direction": direction,
        "backend": backend,
        "collectives": {kind: dataclasses.asdict(t) for kind, t in found.items()},
        "in_loops_of_unknown_length": unknown,
        "bytes": sum(t.bytes for t in found.values()),
        "floor": floor(spec, direction),
        "largest_gather": max(gathers, default=0),
        "full_length": math.prod(GRID) * HEADS * DIM * 2,
        "memory": memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes,
        "compile_seconds": round(time.monotonic() - began, 1),
    }
    row["ok"] = label == "softmax" or row["largest_gather"] < row["full_length"]
    return row


def key(row: dict) -> tuple:
    """What is measured anew replaces the rows in the file that have this in common with it."""
    return tuple(row[name] for name in ("target", "chips_per_video", "attention", "direction", "backend"))


def main():
    """Compiles what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", default=["v5e:4x4"], help=f"such as {targets.EXAMPLES}")
    parser.add_argument("--labels", nargs="+", default=LABELS)
    parser.add_argument("--directions", nargs="+", default=DIRECTIONS, choices=DIRECTIONS)
    parser.add_argument("--ways", nargs="+", default=["16", "4x4"], help="chips that share a video, by mesh axes")
    parser.add_argument("--backends", nargs="+", default=["tpu"], help="xla takes longer to compile")
    parser.add_argument("--out", type=Path, help="folder of context_parallel.json, which rows are added to")
    args = parser.parse_args()
    machine = f"{platform.machine()}, {os.cpu_count()} cores; jax {jax.__version__}, libtpu {version('libtpu')}"
    path = args.out and args.out / "context_parallel.json"
    rows = {key(row): row for row in json.loads(path.read_text())["rows"]} if path and path.exists() else {}
    for name in args.targets:
        target = targets.parse(name)
        for case in itertools.product(args.ways, args.labels, args.directions, args.backends):
            row = measure(target, *case)
            rows[key(row)] = row
            print(json.dumps(row), flush=True)
            if path:
                args.out.mkdir(parents=True, exist_ok=True)
                write_json(path, {"machine": machine, "rows": list(rows.values())})
    if not all(row["ok"] for row in rows.values()):
        raise SystemExit("keys or values of full length travel at R > 1")


if __name__ == "__main__":
    main()
