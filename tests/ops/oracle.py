"""Attention by definition, in float64 NumPy: N×N weights, loops over tokens, nothing shared with the code under test.

Also derivatives of the whole, with c_i held fixed as the method defines it: a directional one, from values at a point
plus and minus a small step, and all of them, by JAX from the same definition. A feature map without a NumPy twin here
is evaluated (and differentiated) by its registered JAX function in float64, so that the harness covers maps it has
never heard of.
"""

import functools
import math
import types
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_dit.ops import feature_maps

# Central differences in float64: truncation about STEP² = 1e-10, cancellation about 1e-16 / STEP = 1e-11.
STEP = 1e-5


class Point(NamedTuple):
    """Inputs of attention, or a direction in their space; float64."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    phi: dict


def float64(tree):
    """Every leaf as a float64 NumPy array (exact for float32 and bfloat16)."""
    return jax.tree.map(lambda x: np.asarray(x).astype(np.float64), tree)


# Tokens


def is_softmax_token(frame, row, col, grid, rate, pattern):
    if pattern == "stride":
        return ((frame * grid[1] + row) * grid[2] + col) % rate == 0
    return (col + 3 * row + 5 * frame) % rate == 0


def softmax_rows(grid, rate, pattern):
    """One bool per token in (frame, row, column) order: is it in S?"""
    frames, rows, cols = grid
    cells = [(f, r, c) for f in range(frames) for r in range(rows) for c in range(cols)]
    return np.array([is_softmax_token(*cell, grid, rate, pattern) for cell in cells])


def softmax_keys(spec, grid, n):
    """One bool per key: does attention of this kind have it in S?"""
    if spec.kind == "hybrid":
        return softmax_rows(grid, spec.rate, spec.pattern)
    return np.full(n, spec.kind == "softmax")


# Feature maps: (params of one map, x [b, n, h, d], spec) -> [b, n, h, f]


def _per_head(x, kernel, bias):
    return np.stack([x[:, :, h] @ kernel[h] + bias[h] for h in range(x.shape[2])], axis=2)


def poly(params, x, spec):
    for i in range(spec.layers):
        if i > 0:  # the tanh form of gelu
            x = 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        x = _per_head(x, params[f"w{i}"], params[f"b{i}"])
    psi = {
        "softplus": lambda y: np.logaddexp(y, 0),
        "relu": lambda y: np.maximum(y, 0),
        "exp": lambda y: np.exp(np.minimum(y, 12)),
        "elu": lambda y: np.where(y > 0, y + 1, np.exp(np.minimum(y, 0))),
        "square": np.square,
    }[spec.activation](x)
    d = x.shape[-1] // spec.degree
    return np.concatenate([psi[..., p * d : (p + 1) * d] ** (p + 1) for p in range(spec.degree)], axis=-1)


def elu(params, x, spec):
    return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))


def hedgehog(params, x, spec):
    y = _per_head(x, params["w0"], params["b0"])
    y = np.concatenate([y, -y], axis=-1)
    e = np.exp(y - y.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


TWINS = {"poly": poly, "elu": elu, "hedgehog": hedgehog}


def features(params, x, spec):
    if spec.kind in TWINS:
        return TWINS[spec.kind](params, x, spec)
    with jax.enable_x64(True):
        return np.asarray(feature_maps.apply(params, x, spec), np.float64)


def features_tangent(params, x, params_dot, x_dot, spec):
    if spec.kind not in TWINS:
        with jax.enable_x64(True):
            _, out = jax.jvp(lambda p, x: feature_maps.apply(p, x, spec), (params, x), (params_dot, x_dot))
            return np.asarray(out, np.float64)

    def at(t):
        return features(jax.tree.map(lambda a, b: a + t * b, params, params_dot), x + t * x_dot, spec)

    return (at(STEP) - at(-STEP)) / (2 * STEP)


# Attention


def weights(q, k, phi_q, phi_k, spec, grid, c=None):
    """The N×N weight of every key for every query before normalisation (Eq. 5), [b, h, n, m], and c [b, h, n, 1].

    c is computed unless given: a derivative holds it at its value in the unperturbed point.
    """
    s = np.einsum("bnhd,bmhd->bhnm", q, k) / math.sqrt(q.shape[-1])
    in_s = softmax_keys(spec, grid, k.shape[1])
    w = np.zeros_like(s)
    if in_s.any():
        if c is None:
            c = s[..., in_s].max(-1, keepdims=True)
            if spec.stabiliser == "lse":
                c = c + np.log(np.exp(s[..., in_s] - c).sum(-1, keepdims=True))
        w = np.exp(np.where(in_s, s - c, -np.inf))
    if not in_s.all():
        w = w + np.einsum("bnhf,bmhf->bhnm", phi_q, phi_k) * ~in_s
    return w, c


def _output(w, v):
    return np.einsum("bhnm,bmhd->bnhd", w / w.sum(-1, keepdims=True), v)


def _maps(point, spec):
    if not spec.converted:
        return None, None
    return tuple(features(point.phi[_side(x, spec)], getattr(point, x), spec.feature_map) for x in "qk")


def _side(x, spec):
    """Whose feature map x (q or k) goes through."""
    return "q" if spec.feature_map.shared else x


def attention(point, spec, grid):
    """y of Eq. 5, [b, n, h, d]."""
    w, _ = weights(point.q, point.k, *_maps(point, spec), spec, grid)
    return _output(w, point.v)


def attention_tangent(point, direction, spec, grid):
    """d/dt of attention at point + t·direction, c_i held at its value in `point`."""
    maps = _maps(point, spec)
    _, c = weights(point.q, point.k, *maps, spec, grid)
    dots = (0.0, 0.0)
    if spec.converted:
        dots = tuple(
            features_tangent(point.phi[s], getattr(point, x), direction.phi[s], getattr(direction, x), spec.feature_map)
            for x, s in (("q", "q"), ("k", _side("k", spec)))
        )

    def at(t):
        moved = [m if m is None else m + t * dot for m, dot in zip(maps, dots)]
        w, _ = weights(point.q + t * direction.q, point.k + t * direction.k, *moved, spec, grid, c)
        return _output(w, point.v + t * direction.v)

    return (at(STEP) - at(-STEP)) / (2 * STEP)


@functools.cache
def _pull(spec, grid):
    """(point, c, cotangent) -> VJP of attention: this module once more, with jax.numpy."""
    twin = types.ModuleType("oracle_in_jax")
    exec(Path(__file__).read_text(), vars(twin))
    twin.np, twin.softmax_keys = jnp, softmax_keys

    def y(point, c):
        w, _ = twin.weights(point.q, point.k, *twin._maps(point, spec), spec, grid, c)
        return twin._output(w, point.v)

    pull = lambda point, c, cotangent: jax.vjp(lambda p: y(p, c), point)[1](cotangent)[0]  # noqa: E731
    return jax.jit(pull, compiler_options={"xla_backend_optimization_level": 0})


def gradient(point, cotangent, spec, grid):
    """The VJP of attention, a `Point`, c_i held at its value, by JAX in float64."""
    _, c = weights(point.q, point.k, *_maps(point, spec), spec, grid)
    with jax.enable_x64(True):
        return float64(_pull(spec, grid)(point, c, cotangent))


# RoPE


def rope(x, grid, theta=10000.0):
    """Wan's three-axis rotation with complex numbers, token by token; x [b, n, h, d]."""
    d = x.shape[-1]
    space = d // 6
    sizes = (d // 2 - 2 * space, space, space)
    z = x[..., 0::2] + 1j * x[..., 1::2]
    token = 0
    for frame in range(grid[0]):
        for row in range(grid[1]):
            for col in range(grid[2]):
                angles = [p * theta ** (-i / s) for p, s in zip((frame, row, col), sizes) for i in range(s)]
                z[:, token] = z[:, token] * np.exp(1j * np.array(angles))
                token += 1
    return np.stack([z.real, z.imag], axis=-1).reshape(x.shape)
