"""Each GPU kernel alone, and tile sizes worth trying: what `attention_gpu.py` times and `triton_aot.py` compiles."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from hybrid_dit.ops.kernels import gpu_linear, gpu_linear_backward, gpu_softmax
from hybrid_dit.ops.kernels.gpu_tiles import LONGEST, Tile, Tiles
from hybrid_dit.ops.spec import FeatureMapSpec

HEADS, DIM, RATE = 12, 128, 8
PHI = FeatureMapSpec()
T, passes = Tile, partial(Tile, passes=True)

# Of those that fit shared memory by `triton_aot.py`; spills outside loops cost little.
CANDIDATES = {
    "state": [T(128, 64, 8, 2), T(128, 32, 8, 3), T(64, 64, 8, 2), T(64, 64, 8, 3), T(64, 32, 8, 3), T(128, 64, 16, 2)],
    "read": [
        *(T(128, 64, 8, 2), T(128, 32, 8, 3), T(64, 64, 8, 2), T(64, 64, 8, 3)),
        *(passes(128, 64, 8, 2), passes(128, 32, 8, 3), passes(64, 64, 4, 2)),
    ],
    "query": [T(64, 64, 8, 2), T(64, 32, 8, 3), T(64, 32, 8, 2), T(128, 64, 8, 2)],
    "key": [
        *(T(64, 64, 8, 2), T(64, 32, 8, 3), T(128, 64, 8, 2), T(64, 64, 4, 2)),
        *(passes(128, 64, 8, 2), passes(64, 64, 4, 2), passes(64, 64, 8, 2)),
    ],
    "weights": [T(64, 32, 8, 2), T(64, 32, 8, 3), T(128, 32, 8, 2), T(128, 32, 8, 1), T(64, 64, 8, 2), T(64, 32, 4, 2)],
    "inputs": [T(128, 32, 8, 2), T(128, 64, 8, 2), T(128, 32, 8, 3), T(64, 64, 8, 2), T(64, 64, 4, 2), T(64, 32, 4, 3)],
    "softmax": [
        *(T(128, 128, 8, 2), T(128, 64, 8, 2), T(128, 64, 8, 3)),
        *(T(64, 64, 4, 3), T(64, 64, 4, 2), T(64, 128, 4, 2)),
    ],
    "softmax_dq": [T(128, 64, 8, 2), T(128, 64, 8, 3), T(128, 32, 8, 3), T(64, 64, 4, 2), T(64, 64, 4, 3)],
    "softmax_dkv": [
        *(T(128, 32, 8, 2), T(128, 32, 8, 3), T(128, 64, 8, 2)),
        *(T(64, 64, 8, 2), T(64, 128, 8, 2), T(64, 64, 4, 2), T(64, 32, 4, 3)),
    ],
}
PROGRAMS = (132, 264, 396, 528, 1056)


def shapes(n: int) -> dict:
    """Shapes of what the kernels take, for one video of n tokens in bfloat16."""
    array, dtype = jax.ShapeDtypeStruct, jnp.bfloat16
    features, padded = PHI.degree * DIM, -(-n // LONGEST) * LONGEST
    return {
        "x": array((1, n, HEADS, DIM), dtype),
        "keys": array((1, -(-n // RATE), HEADS, DIM), dtype),
        "vector": array((1, HEADS, n), jnp.float32),
        "keep": array((n,), jnp.float32),
        "weights": (
            array((HEADS, DIM, features), dtype),
            array((HEADS, features), jnp.float32),
            array((HEADS, features, features), dtype),
            array((HEADS, features), jnp.float32),
        ),
        "dy": array((1, HEADS, padded, features), dtype),
        "sums": (array((1, HEADS, features, DIM), dtype), array((1, HEADS, features), jnp.float32)),
        "parts": (array((1, HEADS, 2, features, DIM), dtype), array((1, HEADS, features), jnp.float32)),
    }


def kernel(name: str, sizes: Tiles, values: bool = False):
    """(function, names of its arguments in `shapes`) that runs one kernel; `values`: with dv, where that's a choice."""
    rest = PHI, sizes, False
    backward, softmax = gpu_linear_backward, ("x", "keys", "keys", "x", "vector", "vector")
    return {
        "state": (lambda k, v, keep, w: gpu_linear.state(k, v, keep, w, *rest), ("x", "x", "keep", "weights")),
        "read": (
            lambda q, o, weight, w, sums: gpu_linear.read(q, (o, weight), w, sums, *rest),
            ("x", "x", "vector", "weights", "parts"),
        ),
        "query": (
            lambda q, dn, dl, w, sums: backward.query(q, dn, dl, w, sums, *rest),
            ("x", "x", "vector", "weights", "sums"),
        ),
        "key": (
            lambda k, v, keep, w, sums: backward.key(k, v, keep, w, sums, *rest, values=values),
            ("x", "x", "keep", "weights", "sums"),
        ),
        "weights": (lambda x, dy, w: backward.parameters(x, dy, w, *rest), ("x", "dy", "weights")),
        "inputs": (lambda x, dy, w: backward.inputs(x, dy, w, *rest), ("x", "dy", "weights")),
        "softmax": (lambda q, k, v: gpu_softmax.forward(q, k, v, *rest[1:]), ("x", "keys", "keys")),
        "softmax_dq": (lambda *args: gpu_softmax.backward_queries(*args, *rest[1:]), softmax),
        "softmax_dkv": (lambda *args: gpu_softmax.backward_keys(*args, *rest[1:]), softmax),
    }[name]


def replaced(name: str, tile: Tile) -> Tiles:
    """The default sizes but for one kernel."""
    return dataclasses.replace(Tiles(), **{name: tile})


def flops(name: str, n: int, values: bool = False) -> float:
    """Matrix products of a kernel: FLOPs that the method needs, without what a kernel does twice."""
    d, f, keys = DIM, PHI.degree * DIM, -(-n // RATE)
    phi, state = d * f + f * f, f * d
    per_token = {
        "state": phi + state,
        "read": phi + state,
        "query": phi + 2 * state,
        "key": phi + (2 if values else 1) * state,
        "weights": d * f + 2 * f * f + d * f,
        "inputs": d * f + f * f + d * f,
        "softmax": 2 * keys * d,
        "softmax_dq": 3 * keys * d,
        "softmax_dkv": 4 * keys * d,
    }[name]
    return 2.0 * n * HEADS * per_token
