"""Feature maps φ of linear attention: non-negative features per head, learnable (`poly`, `hedgehog`) or fixed (`elu`).

To add one, write `init` and `apply` and enter them in `FEATURE_MAPS`; models, cost tables, conversion and the oracle
tests take it from there.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_dit.array_typing import Array, Float, PyTree
from hybrid_dit.errors import UserError
from hybrid_dit.ops.spec import FeatureMapSpec


class FeatureMap(NamedTuple):
    """One entry of `FEATURE_MAPS`.

    Attributes:
        init: (key, heads, head_dim, spec) -> parameters (a flat dict of float32 arrays with a leading head axis).
        apply: (params, x [b, n, h, d], spec) -> features [b, n, h, f], in the dtype of `x`.
    """

    init: Callable[[Array, int, int, FeatureMapSpec], dict]
    apply: Callable[[dict, Array, FeatureMapSpec], Array]


def init(key: Array, heads: int, head_dim: int, spec: FeatureMapSpec) -> dict:
    """Returns the parameters of one pair of maps: {"q": ..., "k": ...}."""
    entry = _entry(spec)
    key_q, key_k = jax.random.split(key)
    return {"q": entry.init(key_q, heads, head_dim, spec), "k": entry.init(key_k, heads, head_dim, spec)}


def apply(params: PyTree, x: Float[Array, "b n h d"], spec: FeatureMapSpec) -> Float[Array, "b n h f"]:
    """φ(x) >= 0 for every token and head, in the dtype of `x`; matrix products accumulate in float32."""
    return _entry(spec).apply(params, x, spec)


def _entry(spec: FeatureMapSpec) -> FeatureMap:
    if spec.kind not in FEATURE_MAPS:
        raise UserError(f"unknown feature map {spec.kind!r}; choose one of {', '.join(FEATURE_MAPS)}")
    return FEATURE_MAPS[spec.kind]


def head_first(x: Array) -> Array:
    """[b, n, h, ...] -> [h, b, n, ...], the layout in which products per head need no copies in between."""
    return jnp.moveaxis(x, 2, 0)


def head_last(x: Array) -> Array:
    """Inverse of `head_first`; XLA cancels one that follows the other."""
    return jnp.moveaxis(x, 0, 2)


def _dense(x: Array, kernel: Array, bias: Array) -> Array:
    """x [h, b, n, i] times a kernel [h, i, o] per head, float32 out."""
    y = jnp.einsum("hbni,hio->hbno", x, kernel.astype(x.dtype), preferred_element_type=jnp.float32)
    return y + bias.astype(jnp.float32)[:, None, None]


def _poly_init(key, heads, head_dim, spec):
    """Small features at first: φ_q·φ_k is about 0.05, the weight of a key well below the row's maximum.

    With a zero bias in the last layer it would be D/2 or more against exp(s_ij − c_i) <= 1, and the linear part would
    drown the softmax part until training has shrunk it.
    """
    width = spec.degree * head_dim
    params = {}
    for i, layer_key in enumerate(jax.random.split(key, spec.layers)):
        fan_in = head_dim if i == 0 else width
        params[f"w{i}"] = jax.random.normal(layer_key, (heads, fan_in, width)) * fan_in**-0.5
        params[f"b{i}"] = jnp.zeros((heads, width))
    feature = (0.05 / head_dim) ** 0.5  # the powers above 1 add next to nothing at this size
    params[f"b{spec.layers - 1}"] += jnp.log(jnp.expm1(feature))  # inverse of softplus
    return params


def _poly_apply(params, x, spec):
    """Paper: φ(x) = [ψ_1(x)^1, ..., ψ_P(x)^P], ψ = a per-head MLP with softplus at its end (our reading)."""
    y = head_first(x)
    for i in range(spec.layers):
        if i > 0:
            y = jax.nn.gelu(y).astype(x.dtype)
        y = _dense(y, params[f"w{i}"], params[f"b{i}"])
    psi = jax.nn.softplus(y)
    # Powers by selection, not by splitting and concatenating: one element-wise pass, which compilers vectorise.
    slice_of = np.arange(psi.shape[-1]) // (psi.shape[-1] // spec.degree)
    features = psi
    for p in range(1, spec.degree):
        features = jnp.where(slice_of >= p, features * psi, features)
    return head_last(features.astype(x.dtype))


def _elu_apply(params, x, spec):
    """elu(x) + 1 (Katharopoulos et al. 2020)."""
    del params, spec
    return (jax.nn.elu(x.astype(jnp.float32)) + 1.0).astype(x.dtype)


def _hedgehog_init(key, heads, head_dim, spec):
    del key, spec
    eye = jnp.broadcast_to(jnp.eye(head_dim), (heads, head_dim, head_dim))
    return {"w0": eye, "b0": jnp.zeros((heads, head_dim))}


def _hedgehog_apply(params, x, spec):
    """softmax over the features [y, -y] of y = W x + b, W starting as the identity (Zhang et al. 2024)."""
    del spec
    y = _dense(head_first(x), params["w0"], params["b0"])
    return head_last(jax.nn.softmax(jnp.concatenate([y, -y], axis=-1), axis=-1).astype(x.dtype))


FEATURE_MAPS: dict[str, FeatureMap] = {
    "poly": FeatureMap(_poly_init, _poly_apply),
    "elu": FeatureMap(lambda key, heads, head_dim, spec: {}, _elu_apply),
    "hedgehog": FeatureMap(_hedgehog_init, _hedgehog_apply),
}
