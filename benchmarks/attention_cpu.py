"""Times the attention of one block on this machine against its FLOPs: forward, and the gradient in φ over stacked blocks.

    python benchmarks/attention_cpu.py [--repeats 15]          # about a minute on two cores

Forward is one block at batch 2; the gradient is what distillation takes, 8 blocks under one vmap, q, k, v fixed. Each
time is the minimum and the median over the repeats (other work on the machine only ever adds). "GFLOP/s" counts matrix
products alone, so a rate below that of the plain product (printed first) is time spent on exponentials and memory.
"""

import argparse
import os
import platform
import statistics
import time

import jax
import jax.numpy as jnp

from hybrid_dit.ops import feature_maps
from hybrid_dit.ops.attention import attention, combine, linear_part, softmax_part
from hybrid_dit.ops.spec import from_label

GRID, HEADS, DIM, BATCH, BLOCKS = (9, 8, 8), 8, 24, 2, 8  # the bundled tiny model
LABELS = ("softmax", "R2", "R4", "R8", "linear")


def seconds(function, *args, repeats):
    """Minimum and median time of a jitted call, after one to compile."""
    jax.block_until_ready(function(*args))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function(*args))
        times.append(time.perf_counter() - start)
    return min(times), statistics.median(times)


def flops(spec, n):
    """Multiply-adds counted twice, one block, one video: softmax sums, both maps, state and read-out."""
    keys = {"softmax": n, "linear": 0}.get(spec.kind, n / spec.rate)
    total = 4 * n * keys * HEADS * DIM
    if spec.converted:
        f = spec.feature_map.degree * DIM
        total += 4 * n * HEADS * (DIM * f + (spec.feature_map.layers - 1) * f * f) + 4 * n * HEADS * f * DIM
    return total


def forward(spec):
    return jax.jit(lambda q, k, v, phi: attention(q, k, v, phi, spec=spec, grid=GRID))


def gradient(spec):
    """Value distillation of stacked blocks: the softmax part is given, φ alone is differentiated."""

    def loss(phi, part, q, k, v, y):
        return jnp.abs(combine(part, linear_part(q, k, v, phi, spec, GRID)) - y).mean()

    return jax.jit(jax.vmap(jax.grad(loss)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats

    n = GRID[0] * GRID[1] * GRID[2]
    shape = (BLOCKS, BATCH, n, HEADS, DIM)
    q, k, v, y = (jax.random.normal(key, shape) for key in jax.random.split(jax.random.key(0), 4))
    square = jnp.ones((1024, 1024))
    best, _ = seconds(jax.jit(jnp.matmul), square, square, repeats=repeats)
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, jax {jax.__version__} on {jax.default_backend()}")
    print(f"matrix product 1024³: {2 * 1024**3 / best / 1e9:.0f} GFLOP/s")
    print(f"{'':8} {'forward ms':>18} {'GFLOP/s':>8} {'vs softmax':>18} {'grad φ ms':>18} {'GFLOP/s':>8}")
    for label in LABELS:
        spec = from_label(label)
        keys = jax.random.split(jax.random.key(1), BLOCKS)
        phi = jax.vmap(lambda key: feature_maps.init(key, HEADS, DIM, spec.feature_map))(keys)
        low, median = seconds(forward(spec), q[0], k[0], v[0], jax.tree.map(lambda x: x[0], phi), repeats=repeats)
        count = BATCH * flops(spec, n)
        base = (low, count) if label == "softmax" else base  # noqa: F821 (the first label is softmax)
        line = f"{label:8} {low * 1e3:8.2f} /{median * 1e3:8.2f} {count / low / 1e9:8.1f}"
        line += f" {base[0] / low:6.2f}x of {base[1] / count:5.2f}x"
        if spec.converted:
            part = jax.vmap(lambda *x: softmax_part(*x, spec, GRID))(q, k, v) if spec.kind == "hybrid" else None
            part = part or (jnp.zeros(BLOCKS), jnp.zeros(BLOCKS))
            low, median = seconds(gradient(spec), phi, part, q, k, v, y, repeats=repeats)
            linear = BLOCKS * BATCH * (flops(spec, n) - (4 * n * n / spec.rate * HEADS * DIM if spec.kind == "hybrid" else 0))
            line += f" {low * 1e3:8.1f} /{median * 1e3:8.1f} {3 * linear / low / 1e9:8.1f}"
        print(line, flush=True)


if __name__ == "__main__":
    main()
