"""Feature maps φ of one head on a tile of tokens in fast memory, [t, d] -> [t, f]: what kernels fuse with their sums.

Twins of `ops.feature_maps` on two dimensions. A map without a twin here is not fused: attention with it runs on XLA.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from hybrid_dit.array_typing import Array, PyTree
from hybrid_dit.ops import feature_maps
from hybrid_dit.ops.spec import FeatureMapSpec

LOG2E = math.log2(math.e)
GELU = math.sqrt(2 / math.pi)


def fits(spec: FeatureMapSpec) -> bool:
    """Whether φ has a twin: the maps of this package, as they are registered there."""
    return spec.kind in feature_maps.FEATURE_MAPS and feature_maps.FEATURE_MAPS[spec.kind].apply in _OF_APPLY


def width(spec: FeatureMapSpec, head_dim: int) -> int:
    """F, the number of features of a head."""
    return {"poly": spec.degree * head_dim, "elu": head_dim, "hedgehog": 2 * head_dim}[spec.kind]


def operands(params: PyTree, dtype) -> dict[str, Array]:
    """Parameters of one map as kernels read them: kernels [h, i, o] in `dtype`, biases [h, 1, o] in float32."""
    return {
        name: x.astype(dtype) if name.startswith("w") else x.astype(jnp.float32)[:, None]
        for name, x in sorted(params.items())
    }


def apply(params: dict[str, Array], x: Array, spec: FeatureMapSpec) -> Array:
    """φ(x) in float32 of a tile x [t, d], rounded to its dtype as `ops.feature_maps` rounds; [t, f].

    Args:
        params: of this head: kernels [i, o] and biases [1, o].
        x: the tile.
        spec: of the map; `fits` it.
    """
    return unrounded(params, x, spec).astype(x.dtype)


def unrounded(params: dict[str, Array], x: Array, spec: FeatureMapSpec) -> Array:
    """φ(x) as `apply`, before its last rounding; differentiable."""
    return _OF_APPLY[feature_maps.FEATURE_MAPS[spec.kind].apply](params, x, spec)


def dot(x: Array, y: Array, contract: tuple[int, int] = (1, 0)) -> Array:
    """Product of two matrices over the given axes, accumulated and returned in float32.

    float32 operands are multiplied as such: a TPU would round them to bfloat16 unless told.
    """
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    dims = ((contract[:1], contract[1:]), ((), ()))
    return jax.lax.dot_general(x, y, dims, precision=precision, preferred_element_type=jnp.float32)


@jax.custom_vjp
def dense(x: Array, kernel: Array, bias: Array) -> Array:
    """x times a kernel rounded to its dtype, plus a bias [1, o]; float32.

    The derivative rounds the cotangent of products to that dtype, as `feature_maps.product` does; what it returns for
    float32 parameters is not rounded again.
    """
    return dot(x, kernel.astype(x.dtype)) + bias


def _dense_backward(operands, cotangent):
    x, kernel = operands
    to_bias, cotangent = cotangent.sum(axis=0, keepdims=True), cotangent.astype(x.dtype)
    to_x = dot(cotangent, kernel.astype(x.dtype), contract=(1, 1)).astype(x.dtype)
    return to_x, dot(x.T, cotangent).astype(kernel.dtype), to_bias


dense.defvjp(lambda *args: (dense(*args), args[:2]), _dense_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def pointwise(both: Callable[[Array], tuple[Array, Array]], y: Array) -> Array:
    """An element-wise function that keeps its slope, and nothing else, for its derivative; `both` returns the two."""
    return both(y)[0]


pointwise.defvjp(lambda both, y: both(y), lambda both, slope, cotangent: (cotangent * slope,))


def _poly(params, x, spec):
    y = x
    for i in range(spec.layers):
        if i > 0:
            y = pointwise(_gelu, y).astype(x.dtype)
        y = dense(y, params[f"w{i}"], params[f"b{i}"])
    short = spec.activation == "softplus" and x.dtype != jnp.float32
    return pointwise(functools.partial(_powers, spec=spec, psi=_softplus if short else _exact(spec.activation)), y)


def _powers(y, spec, psi):
    """[ψ_1, ψ_2², ...] and their slopes, ψ(y) with its slope given by `psi`."""
    value, slope = psi(y)
    values, slopes = (jnp.split(z, spec.degree, axis=1) for z in (value, slope))  # whole columns of lanes: free
    for p in range(2, spec.degree + 1):
        lower = functools.reduce(jnp.multiply, [values[p - 1]] * (p - 1))
        values[p - 1], slopes[p - 1] = lower * values[p - 1], p * lower * slopes[p - 1]
    return jnp.concatenate(values, axis=1), jnp.concatenate(slopes, axis=1)


def _exact(activation):
    """An activation with its slope, from its definition."""
    return lambda y: jax.jvp(feature_maps.activation(activation), (y,), (jnp.ones_like(y),))


# The vector unit is what φ waits for, so its operations are counted: 7 and 8 where XLA's forms take 9 and about 16, and
# 8 and 3 more for the slopes.


def _gelu(y):
    """The tanh form, as `jax.nn.gelu`, and its slope."""
    half, square = 0.5 * y, y * y
    t = jnp.tanh(y * (GELU + 0.044715 * GELU * square))
    product = half * t
    return half + product, 0.5 + 0.5 * t + (half - product * t) * (GELU + 3 * 0.044715 * GELU * square)


def _softplus(y):
    """log(1 + exp(y)) to a relative error of 2^-11, a quarter of what rounding it to bfloat16 costs at most; its slope.

    It is max(y, 0) + log(1 + e) with e = exp(−|y|) <= 1. Below 2^-10 the logarithm is e (off by e / 2); above, rounding
    1 + e costs at most 2^-14. The slope exp(y) / (1 + exp(y)) is exp(y − value), as accurate: the exponent is off by
    2^-11 of a logarithm that is at most log 2.
    """
    e = jnp.exp2(-LOG2E * jnp.abs(y))
    value = jnp.maximum(y, 0.0) + jnp.where(e < 2.0**-10, e, jnp.log(1.0 + e))
    return value, jnp.exp2(LOG2E * (y - value))


def _elu(params, x, spec):
    del params, spec
    x = x.astype(jnp.float32)
    return jnp.where(x > 0, x + 1.0, jnp.exp(jnp.minimum(x, 0.0)))


def _hedgehog(params, x, spec):
    del spec
    y = dense(x, params["w0"], params["b0"])
    top = jnp.abs(y).max(axis=1, keepdims=True)
    e = jnp.concatenate([jnp.exp(y - top), jnp.exp(-y - top)], axis=1)
    return e / e.sum(axis=1, keepdims=True)


# By function, not by name: a map that a user registers under a known name is another map.
_TWINS = {"poly": _poly, "elu": _elu, "hedgehog": _hedgehog}
_OF_APPLY = {feature_maps.FEATURE_MAPS[name].apply: twin for name, twin in _TWINS.items()}
