"""Times the VAE: encode and decode, whole and in chunks, a training step, and two formulations of its convolution.

    python benchmarks/vae.py                                  # the bundled tiny VAE, 33 x 128 x 128; a minute on a CPU
    python benchmarks/vae.py --batch=16 --dtype=bfloat16      # as trained, on a GPU
    python benchmarks/vae.py --base_dim=96 --blocks=2 --frames=81 --rows=480 --columns=832 --dtype=bfloat16 --skip=train

The floor of a row is its FLOPs (counted by XLA on the whole-video program) over the rate of a large matrix product.
"""

import argparse
import functools
import platform
import time

import jax
import jax.numpy as jnp
from jax import lax

from hybrid_dit.models import vae as vae_lib
from hybrid_dit.models.vae import VAEConfig, WanVAE
from hybrid_dit.models.vae_layers import conv_over_time


def native_conv(x, kernel, *, stride):
    """XLA's own 3-D convolution, the alternative to `conv_over_time`."""
    _, ky, kx, _, _ = kernel.shape
    padding = [(0, 0), (ky // 2, ky // 2), (kx // 2, kx // 2)]
    return lax.conv_general_dilated(x, kernel, (stride, 1, 1), padding, dimension_numbers=("NTHWC", "THWIO", "NTHWC"))


def measure(function, *args, repeats=3):
    """Returns (seconds of the best call, seconds to compile, FLOPs, bytes of temporaries)."""
    start = time.perf_counter()
    compiled = jax.jit(function).lower(*args).compile()
    compile_seconds = time.perf_counter() - start
    jax.block_until_ready(compiled(*args))
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*args))
        best = min(best, time.perf_counter() - start)
    flops = (compiled.cost_analysis() or {}).get("flops", 0.0)
    return best, compile_seconds, flops, compiled.memory_analysis().temp_size_in_bytes


def main():
    """Prints one line per measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base_dim", type=int, default=12)
    parser.add_argument("--blocks", type=int, default=1, help="residual blocks per level")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--frames", type=int, default=33)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--columns", type=int, default=128)
    parser.add_argument("--chunk", type=int, default=2, help="latent frames per chunk")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--skip", nargs="*", choices=["whole", "train", "conv"], default=[])
    args = parser.parse_args()

    config = VAEConfig(base_dim=args.base_dim, num_res_blocks=args.blocks)
    vae = WanVAE(config, jnp.dtype(args.dtype))
    params = jax.jit(functools.partial(vae_lib.init, config))(jax.random.key(0))
    shape = (args.batch, args.frames, args.rows, args.columns, 3)
    video = jax.random.uniform(jax.random.key(1), shape, minval=-1.0)
    latents = jax.eval_shape(functools.partial(vae_lib.encode, vae), params, video)[0]
    latents = jax.random.normal(jax.random.key(2), latents.shape)

    matrix = jnp.ones((4096, 4096), args.dtype)
    seconds, *_ = measure(jnp.matmul, matrix, matrix)
    rate = 2 * 4096**3 / seconds
    device = jax.devices()[0]
    print(f"{device.device_kind} ({platform.processor() or platform.machine()}), {args.dtype}, video {shape[:-1]},")
    print(f"{sum(p.size for p in jax.tree.leaves(params)):,} parameters; 4096^3 product: {rate / 1e9:,.0f} GFLOP/s")

    def report(name, result, flops):
        seconds, compile_seconds, _, temp = result
        floor = flops / rate
        ratio = f"floor {floor * 1e3:8.2f} ms, {seconds / floor:5.1f}x" if flops else "floor unknown"
        print(f"{name:22} {seconds * 1e3:9.2f} ms, {ratio}, compile {compile_seconds:5.1f} s, {temp / 2**20:8,.0f} MiB")

    for name, x in (("encode", video), ("decode", latents)):
        whole = functools.partial(getattr(vae_lib, name), vae)
        if "whole" in args.skip:
            flops = 0.0
        else:
            result = measure(whole, params, x)
            flops = result[2]
            report(name, result, flops)
        chunked = functools.partial(getattr(vae_lib, f"{name}_chunked"), vae, chunk=args.chunk)
        report(f"{name} in chunks", measure(chunked, params, x), flops)
    if "train" not in args.skip:

        def loss(params, video):
            return jnp.mean(jnp.abs(vae.apply({"params": params}, video).astype(jnp.float32) - video))

        result = measure(jax.value_and_grad(loss), params, video)
        report("loss and gradient", result, result[2])
    if "conv" not in args.skip:
        for level, frames, c in ((0, args.frames, args.base_dim), (2, (args.frames + 1) // 2, 4 * args.base_dim)):
            size = (args.batch, frames + 2, args.rows // 2**level, args.columns // 2**level, c)
            x, kernel = jnp.ones(size, args.dtype), jnp.ones((3, 3, 3, c, c), args.dtype)
            flops = 2 * 27 * c * c * x.size / c
            for label, conv in (("2-D", conv_over_time), ("3-D", native_conv)):
                report(f"conv {label}, level {level}", measure(functools.partial(conv, stride=1), x, kernel), flops)

                def gradient(x, kernel, conv=conv):
                    out, vjp = jax.vjp(functools.partial(conv, stride=1), x, kernel)
                    return vjp(out)

                report("  with gradient", measure(gradient, x, kernel), 3 * flops)


if __name__ == "__main__":
    main()
