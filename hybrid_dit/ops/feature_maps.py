"""Feature maps φ of linear attention: non-negative features per head, learnable (`poly`, `hedgehog`) or fixed (`elu`).

To add one, write `init` and `apply` and enter them in `FEATURE_MAPS`; models, cost tables, conversion and the oracle
tests take it from there.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

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
    """Returns the parameters of one pair of maps: {"q": ..., "k": ...}; "k" is empty if keys share the queries' map."""
    entry = _entry(spec)
    key_q, key_k = jax.random.split(key)
    pair = {"q": entry.init(key_q, heads, head_dim, spec)}
    return {**pair, "k": {} if spec.shared else entry.init(key_k, heads, head_dim, spec)}


def apply(params: PyTree, x: Float[Array, "b n h d"], spec: FeatureMapSpec) -> Float[Array, "b n h f"]:
    """φ(x) >= 0 for every token and head, in the dtype of `x`; matrix products accumulate in float32."""
    return _entry(spec).apply(params, x, spec)


def apply_pair(
    phi: PyTree, q: Float[Array, "b n h d"], k: Float[Array, "b m h d"], spec: FeatureMapSpec
) -> tuple[Float[Array, "b n h f"], Float[Array, "b m h f"]]:
    """φ_q(q) and φ_k(k), from the parameters of both that `init` returns."""
    return apply(phi["q"], q, spec), apply(phi["q" if spec.shared else "k"], k, spec)


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def product(dims: str, x: Array, y: Array) -> Array:
    """einsum(dims, x, y) of two arrays of one dtype, accumulated and returned in float32.

    Its derivative rounds the cotangent to that dtype first: 16-bit products stay 16-bit ones in the backward pass, as
    they do where outputs are rounded, instead of becoming float32 products of twice the bytes and half the speed.
    """
    return jnp.einsum(dims, x, y, preferred_element_type=jnp.float32)


def _product_backward(dims, operands, cotangent):
    x, y = operands
    (in_x, in_y), out = dims.split("->")[0].split(","), dims.split("->")[1]
    cotangent = cotangent.astype(x.dtype)
    return (
        product(f"{out},{in_y}->{in_x}", cotangent, y).astype(x.dtype),
        product(f"{out},{in_x}->{in_y}", cotangent, x).astype(y.dtype),
    )


product.defvjp(lambda dims, x, y: (product(dims, x, y), (x, y)), _product_backward)


def _dense(x: Array, kernel: Array, bias: Array) -> Array:
    """x [h, b, n, i] times a kernel [h, i, o] per head, float32 out."""
    y = product("hbni,hio->hbno", x, kernel.astype(x.dtype))
    return checkpoint_name(y, "phi") + bias.astype(jnp.float32)[:, None, None]


def _poly_init(key, heads, head_dim, spec):
    """Small features at first: φ_q·φ_k is about 0.07, the weight of a key well below the row's maximum.

    With a zero bias in the last layer it would be D/2 or more against exp(s_ij − c_i) <= 1, and the linear part would
    drown the softmax part until training has shrunk it.
    """
    widths = [head_dim, *(spec.hidden or spec.degree * head_dim,) * (spec.layers - 1), spec.degree * head_dim]
    params = {}
    for i, layer_key in enumerate(jax.random.split(key, spec.layers)):
        shape = heads, widths[i], widths[i + 1]
        params[f"w{i}"] = jax.random.normal(layer_key, shape) * widths[i] ** -0.5
        params[f"b{i}"] = jnp.zeros((heads, widths[i + 1]))
    feature = (0.05 / head_dim) ** 0.5  # the powers above 1 add next to nothing at this size
    last, activation = spec.layers - 1, _ACTIVATIONS[spec.activation]
    bias = activation.inverse(feature)
    params[f"b{last}"] += bias
    if activation.scaled:
        params[f"w{last}"] *= bias
    return params


def _poly_apply(params, x, spec):
    """Paper: φ(x) = [ψ_1(x)^1, ..., ψ_P(x)^P], ψ = a per-head MLP with a non-negative activation at its end."""

    # The backward pass keeps matrix products and what goes into them; all else is element-wise and computed anew.
    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names("phi"))
    def features_of(params, x):
        y = head_first(x)
        for i in range(spec.layers):
            if i > 0:
                y = checkpoint_name(jax.nn.gelu(y).astype(x.dtype), "phi")
            y = _dense(y, params[f"w{i}"], params[f"b{i}"])
        psi = _ACTIVATIONS[spec.activation].function(y)
        # Powers by selection, not by splitting and concatenating: one element-wise pass, which compilers vectorise.
        slice_of = np.arange(psi.shape[-1]) // (psi.shape[-1] // spec.degree)
        features = psi
        for p in range(1, spec.degree):
            features = jnp.where(slice_of >= p, features * psi, features)
        return checkpoint_name(head_last(features.astype(x.dtype)), "phi")

    return features_of(params, x)


class _Activation(NamedTuple):
    """What makes features non-negative; `inverse` (of a small feature) and `scaled` are for `_poly_init`.

    With a steep start (softplus, exp, elu) unit-variance inputs around the bias give features of its size; relu and
    square need the last layer's weights as small as the bias for that.
    """

    function: Callable[[Array], Array]
    inverse: Callable[[float], float]
    scaled: bool


_ACTIVATIONS = {
    "softplus": _Activation(jax.nn.softplus, lambda f: math.log(math.expm1(f)), scaled=False),
    "relu": _Activation(jax.nn.relu, lambda f: f, scaled=True),
    # Bounded, so that its powers (up to the seventh) stay finite in float32 and bfloat16.
    "exp": _Activation(lambda y: jnp.exp(jnp.minimum(y, 12.0)), math.log, scaled=False),
    "elu": _Activation(lambda y: jax.nn.elu(y) + 1.0, math.log, scaled=False),
    "square": _Activation(jnp.square, math.sqrt, scaled=True),
}


def activation(name: str) -> Callable[[Array], Array]:
    """Returns the element-wise function that `FeatureMapSpec.activation` names."""
    return _ACTIVATIONS[name].function


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
