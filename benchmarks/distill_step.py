"""Times a distillation step of a full-size DiT with random weights against the teacher's own forward.

    python benchmarks/distill_step.py --out=distill_step.json              # Wan 1.3B, 480 x 832 x 81, bfloat16; one GPU
    python benchmarks/distill_step.py --tiny --out=/tmp/distill_step.json  # a few seconds on a CPU, to see it run

Every row is one denoising step with both branches of guidance:
    teacher          forward and sampler, nothing captured
    inside           the same, and a training step of every rate of all blocks, gradients inside the scan over blocks
    stacked          likewise with block inputs kept: softmax runs twice
and, for one block's attention alone (a row each): cuDNN or tiles over all keys; all rates from one pass over the keys;
the extra kernel for row maxima (16-bit inputs on a GPU); the linear part of one rate, forward and gradient.

The floor of a training row is its FLOPs over those of the teacher's row: a step can't cost less if both run at the same
speed. Its FLOPs: the teacher's (attention's keys once), φ and the linear sums forward, and backward everything but the
gradient in q and k (twice the forward, less the first layer's once); "stacked" adds q, k, v and attention once more.
"""

import argparse
import json
import math
import os
import platform
import subprocess
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from configs import common
from hybrid_dit import cost, distiller, sharding
from hybrid_dit.convert import tables
from hybrid_dit.convert.abstract import abstract_dit
from hybrid_dit.models.wan import WanConfig
from hybrid_dit.ops import feature_maps, row_max
from hybrid_dit.ops.hybrid import combine, linear_part
from hybrid_dit.ops.nested import nested_sums
from hybrid_dit.ops.softmax import fused_on_gpu, softmax_attention
from hybrid_dit.ops.spec import AttentionSpec

WAN = WanConfig(dim=1536, num_heads=12, ffn_dim=8960, num_layers=30)
SHAPE, TEXT = (21, 60, 104, 16), 512
TINY = WanConfig(dim=64, num_heads=2, ffn_dim=128, num_layers=3, in_channels=4, text_dim=16, freq_dim=16)
TINY_SHAPE, TINY_TEXT = (3, 8, 16, 4), 8


def random_params(wan: WanConfig, dtype) -> dict:
    """Kernels keep their input's scale, norms are 1, all else is small; made on the device, matrices in `dtype`."""
    key = jax.random.key(0)
    flat = {}
    for i, (path, leaf) in enumerate(tables.flatten(abstract_dit(wan)).items()):
        name, leaf_key = path.rsplit("/", 1)[-1], jax.random.fold_in(key, i)
        if name == "kernel":
            fan_in = leaf.shape[-2]
            make = jax.jit(partial(_normal, shape=leaf.shape, scale=fan_in**-0.5, dtype=dtype))
            flat[path] = make(leaf_key)
        else:
            flat[path] = jnp.ones(leaf.shape) if name == "scale" else jnp.zeros(leaf.shape)
    return tables.unflatten(flat)


def _normal(key, shape, scale, dtype):
    return (jax.random.normal(key, shape, jnp.bfloat16) * scale).astype(dtype)


def timed(call, repeats: int) -> tuple[list[float], int]:
    """Returns (seconds of each repeat after one more, peak bytes on the device so far, 0 if not known)."""
    times = []
    for n in range(repeats + 1):
        began = time.perf_counter()
        jax.block_until_ready(call())
        if n:
            times.append(time.perf_counter() - began)
    stats = jax.devices()[0].memory_stats() or {}
    return times, stats.get("peak_bytes_in_use", 0)


def step_flops(wan: WanConfig, tokens: int, text: int, specs, videos: int, mode: str) -> float:
    """FLOPs of one step with `videos` videos through the DiT (see the top)."""
    shape = cost.Shape(wan.dim, wan.num_heads, wan.ffn_dim, wan.num_layers, tokens, text)
    total = cost.block_flops(shape, cost.SOFTMAX)
    if mode != "teacher":
        for spec in specs.values():
            hidden = spec.feature_map.hidden or wan.head_dim * spec.feature_map.degree
            first = 2 * 2 * wan.num_heads * wan.head_dim * hidden  # of both maps, per token
            linear = cost.attention_flops(shape, AttentionSpec("linear", feature_map=spec.feature_map))
            total += 3 * linear - tokens * first  # no gradient in q and k
    if mode == "stacked":
        total += cost.attention_flops(shape, cost.SOFTMAX) + 6 * tokens * wan.dim**2
    return float(total * wan.num_layers * videos)


def measure_steps(args, wan, shape, text, config) -> list[dict]:
    """Rows for teacher and both training steps."""
    mesh = sharding.distill_mesh(devices=jax.devices()[:1])
    dit = random_params(wan, jnp.float32 if args.tiny else jnp.bfloat16)
    rng = np.random.default_rng(0)
    context = tuple(
        (jnp.asarray(rng.standard_normal((1, text, wan.text_dim)), jnp.float32), jnp.ones((1, text))) for _ in "cu"
    )
    key, tokens = jax.random.key(1), math.prod(wan.grid(shape))
    rows = []
    for mode in ("teacher", *args.modes):
        config.distill.activations = mode if mode != "teacher" else "inside"
        d = distiller.from_config(config, wan, 3.0, mesh)
        x = jax.random.normal(jax.random.key(2), (1, *shape))
        rest = dit, x, 1, context, key
        if mode == "teacher":
            call, compiled, compile_seconds = teacher_call(d, rest)
        else:
            call, compiled, compile_seconds = training_call(d, rest)
        memory = compiled.memory_analysis()
        times, peak = timed(call, args.repeats)
        flops = step_flops(wan, tokens, text, d.specs, 2, mode)
        rows.append(
            {
                "what": mode,
                "ms": 1e3 * float(np.median(times)),
                "fastest_ms": 1e3 * min(times),
                "tflop": flops / 1e12,
                "tflop_per_s": flops / 1e12 / float(np.median(times)),
                "compile_s": compile_seconds,
                "temporaries_gb": memory.temp_size_in_bytes / 1e9,
                "arguments_gb": memory.argument_size_in_bytes / 1e9,
                "kept_gb": 0.0 if mode == "teacher" else d.kept_bytes(shape, 1) / 1e9,
                "peak_gb": peak / 1e9,
            }
        )
        base = rows[0]
        rows[-1] |= {"ratio": rows[-1]["ms"] / base["ms"], "floor": flops / (base["tflop"] * 1e12)}
        rows[-1]["fraction_of_floor"] = rows[-1]["floor"] / rows[-1]["ratio"]
        report(rows[-1])
        del call, compiled  # and with them the state on the device
    return rows


def teacher_call(d, rest):
    """Returns (a call without arguments, the compiled program, seconds to compile)."""
    began = time.perf_counter()
    compiled = jax.jit(d.denoise).lower(*rest).compile()
    return partial(compiled, *rest), compiled, time.perf_counter() - began


def training_call(d, rest):
    """As `teacher_call`; the call trains on."""
    state = jax.jit(d.init)(jax.random.key(0))
    began = time.perf_counter()
    compiled = distiller.jit_step(d).lower(state, *rest).compile()
    seconds = time.perf_counter() - began
    held = [state]
    del state

    def call():
        held[0], _, metrics = compiled(held[0], *rest)
        return held[0], metrics

    return call, compiled, seconds


def measure_attention(args, wan, shape, config) -> list[dict]:
    """Rows for one block's attention, one video."""
    grid, dtype = wan.grid(shape), jnp.dtype(config.model.compute_dtype)
    n = math.prod(grid)
    q, k, v = (
        jax.random.normal(key, (1, n, wan.num_heads, wan.head_dim), dtype)
        for key in jax.random.split(jax.random.key(0), 3)
    )
    specs = distiller.from_config(config, wan, 3.0, sharding.distill_mesh(devices=jax.devices()[:1])).specs
    hybrid = {label: spec for label, spec in specs.items() if spec.kind == "hybrid"}
    linear = AttentionSpec("linear", feature_map=next(iter(specs.values())).feature_map)
    phi = feature_maps.init(jax.random.key(1), wan.num_heads, wan.head_dim, linear.feature_map)
    zero = jnp.zeros(())

    def student(phi, q, k, v):
        return combine((zero, zero), linear_part(q, k, v, phi, linear, grid, args.backend))

    def gradient(phi, q, k, v):
        return jax.grad(lambda phi: jnp.abs(student(phi, q, k, v) - v.astype(jnp.float32)).mean())(phi)

    cases = {
        "attention: all keys": (softmax_attention, (q, k, v)),
        "attention: all rates": (partial(nested_sums, specs=hybrid, grid=grid, backend=args.backend), (q, k, v)),
        "linear part, one rate": (student, (phi, q, k, v)),
        "linear part, one rate, gradient": (gradient, (phi, q, k, v)),
    }
    densest = min((spec.rate for spec in hybrid.values()), default=1)
    if fused_on_gpu(q) and row_max.fits(wan.head_dim):
        cases["row maxima over the densest rate's keys"] = (row_max.row_max, (q, k[:, ::densest]))
    rows = []
    for name, (function, arguments) in cases.items():
        compiled = jax.jit(function).lower(*arguments).compile()
        times, _ = timed(partial(compiled, *arguments), args.repeats)
        rows.append({"what": name, "ms": 1e3 * float(np.median(times))})
        report(rows[-1])
    return rows


def machine() -> dict:
    """What this ran on."""
    gpu = ""
    if jax.default_backend() == "gpu":
        gpu = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout.split(" (")[0]
    return {
        "device": gpu or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "jax": jax.__version__,
        "backend": jax.default_backend(),
    }


def report(row: dict) -> None:
    """Prints a row."""
    print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{v:40}" for k, v in row.items()), flush=True)


def main():
    """Prints one line per measurement and writes all of them to --out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--tiny", action="store_true", help="a tiny DiT in float32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--modes", nargs="*", default=["inside", "stacked"], choices=distiller.ACTIVATIONS)
    parser.add_argument("--rates", default="R2,R4,R8,linear")
    parser.add_argument("--stabiliser", default="max")
    parser.add_argument("--pattern", default="stride")
    parser.add_argument("--branches", default="both")
    parser.add_argument("--backend", default="auto", help="of attention: auto, xla or gpu")
    args = parser.parse_args()

    config = common.get_config("distill", "tiny" if args.tiny else "wan_1_3b")
    config.distill.rates = tuple(args.rates.split(","))
    for name in ("stabiliser", "pattern", "branches"):
        config.distill[name] = getattr(args, name)
    config.model.attention_backend = args.backend
    wan, shape, text = (TINY, TINY_SHAPE, TINY_TEXT) if args.tiny else (WAN, SHAPE, TEXT)
    about = {
        **machine(),
        "tokens": math.prod(wan.grid(shape)),
        "blocks": wan.num_layers,
        "dtype": config.model.compute_dtype,
        "repeats": args.repeats,
        **{name: getattr(args, name) for name in ("rates", "stabiliser", "pattern", "branches")},
        "attention_backend": args.backend,
    }
    print(json.dumps(about), flush=True)
    rows = measure_attention(args, wan, shape, config)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    try:
        rows += measure_steps(args, wan, shape, text, config)
    finally:  # what was measured before memory ran out
        args.out.write_text(json.dumps({"machine": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
