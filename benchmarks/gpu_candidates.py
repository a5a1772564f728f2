"""Each GPU kernel alone, and tile sizes worth trying: what `attention_gpu.py` times and `triton_aot.py` compiles."""

import dataclasses

import jax
import jax.numpy as jnp

from hybrid_dit.ops.kernels import gpu_linear, gpu_linear_backward, gpu_products, gpu_softmax, gpu_tiles
from hybrid_dit.ops.kernels.gpu_tiles import LONGEST, Tile, Tiles
from hybrid_dit.ops.spec import FeatureMapSpec

HEADS, DIM, RATE = 12, 128, 8
PHI = FeatureMapSpec()
T = Tile

# Of those that fit shared memory by `triton_aot.py`; spills outside loops cost little.
CANDIDATES = {
    "features": [T(64, 64, 4, 2), T(128, 64, 8, 2), T(64, 32, 4, 2, 128), T(64, 64, 4, 1, 128), T(64, 32, 4, 3, 128)],
    "read": [T(64, 64, 4, 2), T(128, 64, 8, 2), T(64, 32, 4, 2, 128), T(64, 64, 4, 2, 128)],
    "read_given": [T(64, 64, 4, 2), T(64, 64, 8, 2), T(128, 64, 8, 2)],
    "products": [T(64, 64, 8, 3), T(64, 64, 8, 4), T(32, 64, 8, 4)],
    "pre_activations": [T(64, 64, 4, 2), T(64, 64, 8, 2), T(128, 64, 8, 2)],
    "hidden": [
        *(T(128, 128, 8, 1), T(128, 64, 8, 2), T(128, 64, 8, 1)),
        *(T(64, 64, 4, 1), T(64, 32, 4, 1), T(64, 32, 4, 2), T(128, 32, 4, 1)),
    ],
    "softmax": [T(128, 128, 8, 2), T(128, 128, 8, 3), T(64, 64, 4, 3)],
    "softmax_dq": [T(128, 64, 8, 3), T(64, 64, 4, 2)],
    "softmax_dkv": [T(64, 64, 4, 2), T(64, 32, 4, 3)],
}
BOTH = "pre_activations", "hidden"
PROGRAMS = (132, 264, 396)


def shapes(n: int) -> dict:
    """Shapes of what the kernels take, for one video of n tokens in bfloat16."""
    array, dtype = jax.ShapeDtypeStruct, jnp.bfloat16
    features, padded = PHI.degree * DIM, -(-n // LONGEST) * LONGEST
    return {
        "x": array((1, n, HEADS, DIM), dtype),
        "keys": array((1, -(-n // RATE), HEADS, DIM), dtype),
        "vector": array((1, HEADS, n), jnp.float32),
        "of_keys": array((1, HEADS, gpu_tiles.length(n, RATE), features), dtype),
        "weights": (
            array((HEADS, DIM, features), dtype),
            array((HEADS, features), jnp.float32),
            array((HEADS, features, features), dtype),
            array((HEADS, features), jnp.float32),
        ),
        "features": array((1, HEADS, padded, features), dtype),
        "sums": (array((1, HEADS, features, DIM), dtype), array((1, HEADS, features), jnp.float32)),
    }


def kernel(name: str, sizes: Tiles, training: bool = False):
    """(function, names of its arguments in `shapes`) that runs one kernel.

    Those of `BOTH` exist without and with the gradients in v, q and k, which training all parameters needs.
    """
    rest = PHI, sizes, False
    backward, softmax = gpu_linear_backward, ("x", "keys", "keys", "x", "vector", "vector")
    return {
        "features": (lambda k, w: gpu_linear.features(k, None, w, *rest, skip=RATE), ("x", "weights")),
        "read": (
            lambda q, o, weight, w, sums: gpu_linear.read(q, (o, weight), w, sums, *rest),
            ("x", "x", "vector", "weights", "sums"),
        ),
        "read_given": (
            lambda q, o, weight, w, sums, f: gpu_linear.read(q, (o, weight), w, sums, *rest, given=f),
            ("x", "x", "vector", "weights", "sums", "features"),
        ),
        "products": (
            lambda x, h, dy: [
                gpu_products.products(dy, b, DIM, *rest[1:], skip=skip) for b, skip in ((x, RATE), (h, 0))
            ],
            ("x", "of_keys", "of_keys"),
        ),
        "pre_activations": (
            lambda f, v, sums: backward.pre_activations(f, v, None, sums, *rest, values=training),
            ("features", "x", "sums"),
        ),
        "hidden": (lambda x, dy, w: backward.hidden(x, dy, w, *rest, inputs=training), ("x", "features", "weights")),
        "softmax": (lambda q, k, v: gpu_softmax.forward(q, k, v, *rest[1:]), ("x", "keys", "keys")),
        "softmax_dq": (lambda *args: gpu_softmax.backward_queries(*args, *rest[1:]), softmax),
        "softmax_dkv": (lambda *args: gpu_softmax.backward_keys(*args, *rest[1:]), softmax),
    }[name]


def replaced(name: str, tile: Tile) -> Tiles:
    """The default sizes but for one kernel."""
    return dataclasses.replace(Tiles(), **{name: tile})


def flops(name: str, n: int, training: bool = False) -> float:
    """Matrix products of a kernel: FLOPs that the method needs, without what a kernel does twice."""
    d, f, keys = DIM, PHI.degree * DIM, -(-n // RATE)
    phi, state = d * f + f * f, f * d
    per_token = {
        "features": phi * (1 - 1 / RATE),
        "read": phi + state,
        "read_given": state,
        "products": (d * f + f * f) * (1 - 1 / RATE),
        "pre_activations": (2 if training else 1) * state,
        "hidden": phi + (state if training else 0),
        "softmax": 2 * keys * d,
        "softmax_dq": 3 * keys * d,
        "softmax_dkv": 4 * keys * d,
    }[name]
    return 2.0 * n * HEADS * per_token
