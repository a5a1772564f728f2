"""Times the attention of 8 blocks on this machine's CPU against its FLOPs: forward, and the gradient in φ.

    JAX_PLATFORMS=cpu python benchmarks/attention_cpu.py [--repeats 9]          # about a minute on two cores

Sizes are the bundled tiny model's. Forward scans over the blocks as the model does. The gradient is distillation's
(softmax part given, q, k, v fixed), once with the blocks under `vmap` and once one after the other (`lax.map`).
Times are the process's CPU seconds over all its threads, the smallest of the repeats: unlike wall time they mean
something on a shared machine. GFLOP/s count matrix products alone and are per core, to be held against the first line.
"""

import argparse
import os
import platform
import time

import jax
import jax.numpy as jnp

from hybrid_dit.ops import feature_maps
from hybrid_dit.ops.hybrid import attention, combine, linear_part, softmax_part
from hybrid_dit.ops.spec import from_label

GRID, HEADS, DIM, BATCH, BLOCKS = (9, 8, 8), 8, 24, 2, 8
N = GRID[0] * GRID[1] * GRID[2]
LABELS = ("softmax", "R2", "R4", "R8", "linear")


def cpu_seconds(function, *args, repeats):
    """CPU seconds of one call of the jitted function, after one to compile."""
    function = jax.jit(function)
    jax.block_until_ready(function(*args))
    times = []
    for _ in range(repeats):
        start = time.process_time()
        jax.block_until_ready(function(*args))
        times.append(time.process_time() - start)
    return min(times)


def flops(spec):
    """FLOPs of the softmax part and of the linear part (φ_q, φ_k, state, read-out), all blocks and videos."""
    keys = {"softmax": N, "linear": 0}.get(spec.kind, N / spec.rate)
    width, layers = spec.feature_map.degree * DIM, spec.feature_map.layers
    per_token = 4 * (DIM * width + (layers - 1) * width**2) + 4 * width * DIM
    heads = BLOCKS * BATCH * N * HEADS
    return heads * 4 * keys * DIM, heads * per_token * spec.converted


def measure(spec, repeats):
    """CPU seconds of forward, of the gradient under vmap and of the gradient by blocks; the latter None for softmax."""
    q, k, v, y = (
        jax.random.normal(key, (BLOCKS, BATCH, N, HEADS, DIM)) for key in jax.random.split(jax.random.key(0), 4)
    )
    keys = jax.random.split(jax.random.key(1), BLOCKS)
    phi = jax.vmap(lambda key: feature_maps.init(key, HEADS, DIM, spec.feature_map))(keys)

    def forward(*blocks):
        step = lambda total, block: (total + attention(*block, spec=spec, grid=GRID), None)  # noqa: E731
        return jax.lax.scan(step, jnp.zeros(q.shape[1:]), blocks)[0]

    def gradient(phi, part, q, k, v, y):
        loss = lambda phi: jnp.abs(combine(part, linear_part(q, k, v, phi, spec, GRID)) - y).mean()  # noqa: E731
        return jax.grad(loss)(phi)

    seconds = cpu_seconds(forward, q, k, v, phi, repeats=repeats)
    if not spec.converted:
        return seconds, None, None
    part = jax.lax.map(lambda block: jax.tree.map(jnp.atleast_1d, softmax_part(*block, spec, GRID)), (q, k, v))
    blocks = phi, part, q, k, v, y
    one_by_one = cpu_seconds(
        lambda *blocks: jax.lax.map(lambda block: gradient(*block), blocks), *blocks, repeats=repeats
    )
    return seconds, cpu_seconds(jax.vmap(gradient), *blocks, repeats=repeats), one_by_one


def main():
    """Prints one line per rate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    repeats = parser.parse_args().repeats

    cpu = platform.processor() or platform.machine()
    print(f"{cpu}, {os.cpu_count()} cores, jax {jax.__version__} on {jax.default_backend()}")
    square = jnp.ones((1024, 1024))
    rate = 2 * 1024**3 / cpu_seconds(jnp.matmul, square, square, repeats=repeats)
    print(f"matrix product 1024³: {rate / 1e9:.0f} GFLOP/s per core")
    print(f"{BLOCKS} blocks, {BATCH} videos of {N} tokens, {HEADS} heads of {DIM}; CPU milliseconds")
    print("          forward GFLOP/s   faster (by FLOPs)   grad vmap   grad map  GFLOP/s")
    for label in LABELS:
        spec = from_label(label)
        seconds, vmapped, mapped = measure(spec, repeats)
        softmax, linear = flops(spec)
        if label == LABELS[0]:
            teacher = seconds, softmax
        faster, by_flops = teacher[0] / seconds, teacher[1] / (softmax + linear)
        line = (
            f"{label:8}{seconds * 1e3:9.1f}{(softmax + linear) / seconds / 1e9:8.0f}{faster:10.2f}x ({by_flops:.2f}x)"
        )
        if mapped:
            line += f"{vmapped * 1e3:16.1f}{mapped * 1e3:11.1f}{3 * linear / mapped / 1e9:9.0f}"
        print(line, flush=True)


if __name__ == "__main__":
    main()
