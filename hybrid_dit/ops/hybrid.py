"""Hybrid softmax/linear attention (paper Eq. 5) and the one dispatcher over attention kinds."""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from hybrid_dit.array_typing import Array, Float, PyTree
from hybrid_dit.errors import UserError
from hybrid_dit.ops import backends, feature_maps, residuals
from hybrid_dit.ops.kernels import gpu_hybrid, tpu_hybrid
from hybrid_dit.ops.softmax import fused_on_gpu, softmax_attention, softmax_sums
from hybrid_dit.ops.spec import AttentionSpec
from hybrid_dit.ops.tokens import Grid, linear_keys, softmax_tokens

# The linear part alone may have a vanishing denominator (features can all underflow). The gradient of the division
# takes TINY to the power -2, which must not overflow in float32.
TINY = 1e-18


def attention(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b n h d"],
    v: Float[Array, "b n h d"],
    phi: PyTree,
    *,
    spec: AttentionSpec,
    grid: Grid,
    backend: str = "auto",
) -> Float[Array, "b n h d"]:
    """Self-attention over one video's tokens as `spec` says, in the dtype of `q`.

    Args:
        q: queries after qk-norm and RoPE.
        k: keys, likewise.
        v: values.
        phi: parameters of the feature maps, {"q": ..., "k": ...}; ignored by softmax attention.
        spec: what to compute; static.
        grid: frames, rows, columns of the token grid; their product is n.
        backend: a name of `ops.backends.BACKENDS`: what computes it. Values differ by rounding alone.

    Raises:
        UserError: shapes that don't belong together, or a backend that doesn't exist.
    """
    _check_shapes(q.shape, k.shape, v.shape, phi if spec.converted else {}, grid)
    chosen = backends.choose(backend, spec, q.shape[-1], q.dtype)
    if chosen == "tpu":
        return tpu_hybrid.attention(ATTENTIONS[spec.kind], q, k, v, phi, spec, grid)
    if chosen == "gpu":
        return gpu_hybrid.attention(q, k, v, phi, spec=spec, grid=grid)
    run = partial(ATTENTIONS[spec.kind], spec=spec, grid=grid)
    if spec.kind == "softmax" and fused_on_gpu(q):
        return run(q, k, v, phi)
    return residuals.from_inputs(run)(q, k, v, phi)


def _check_shapes(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], phi: PyTree, grid: Grid) -> None:
    """Refuses what backends would fail on each in its own way, or compute something of."""
    if not (q == k == v and len(q) == 4 and min(q) > 0):
        raise UserError(f"attention takes q, k and v of one shape [b, n, h, d], none of them 0; got {q}, {k} and {v}")
    if q[1] != math.prod(grid):
        raise UserError(f"attention got {q[1]} tokens for a grid of {' x '.join(map(str, grid))} = {math.prod(grid)}")
    heads = {leaf.shape[0] for leaf in jax.tree.leaves(phi)} - {q[2]}
    if heads:
        raise UserError(f"attention got a feature map of {min(heads)} heads for q, k and v of {q[2]}")


def softmax_part(
    q: Float[Array, "b n h d"], k: Float[Array, "b m h d"], v: Float[Array, "b m h d"], spec: AttentionSpec, grid: Grid
) -> tuple[Array, Array]:
    """The sums of Eq. 5 over S: numerator [b, n, h, d] and denominator [b, n, h], float32; scalar zeros without S.

    Independent of φ. For many rates at once, and with a shard of the queries, see `ops.nested`.
    """
    if spec.kind == "linear":
        return jnp.zeros(()), jnp.zeros(())
    if spec.pattern == "stride":
        k, v = k[:, :: spec.rate], v[:, :: spec.rate]  # a strided slice: cheaper than a gather
    else:
        index = softmax_tokens(grid, spec.rate, spec.pattern)
        k, v = jnp.take(k, index, axis=1), jnp.take(v, index, axis=1)
    return stabilised_sums(q, k, v, spec)


def stabilised_sums(
    q: Float[Array, "b n h d"], k: Float[Array, "b m h d"], v: Float[Array, "b m h d"], spec: AttentionSpec
) -> tuple[Float[Array, "b n h d"], Float[Array, "b n h"]]:
    """`softmax_part` from S's keys and values alone."""
    numerator, denominator, _ = softmax_sums(q, k, v)
    if spec.stabiliser == "lse":
        # c_i = log Σ exp(s_ij) instead of the maximum; held fixed in the gradient, as the maximum is.
        scale = jax.lax.stop_gradient(denominator)
        return numerator / scale[..., None], denominator / scale
    return numerator, denominator


def linear_part(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b n h d"],
    v: Float[Array, "b n h d"],
    phi: PyTree,
    spec: AttentionSpec,
    grid: Grid,
    backend: str = "xla",
) -> tuple[Float[Array, "b n h d"], Float[Array, "b n h"]]:
    """The sums of Eq. 5 over L (every token if S is empty), φ_q(q_i)·Σ φ_k(k_j)ᵀ v_j and φ_q(q_i)·Σ φ_k(k_j)ᵀ; float32.

    The state Σ φ_k(k_j)ᵀ v_j is F×D per head; nothing here grows with N². Everything runs with the head axis first, as
    products per head want it: three transposes in, one out. Tokens beyond the grid's, which pad it, are not summed.
    There are fused kernels for the backend "gpu".
    """
    if backends.choose(backend, spec, q.shape[-1], q.dtype) == "gpu":
        return gpu_hybrid.linear_part(q, k, v, phi, spec, grid)
    return linear_sums(q, k, v, phi, jnp.asarray(linear_keys(grid, spec, k.shape[1])), spec)


def linear_sums(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b m h d"],
    v: Float[Array, "b m h d"],
    phi: PyTree,
    keep: Float[Array, "m"],
    spec: AttentionSpec,
    total: Callable[[PyTree], PyTree] = lambda sums: sums,
) -> tuple[Float[Array, "b n h d"], Float[Array, "b n h"]]:
    """`linear_part` for the keys that `keep` is 1 for, in XLA operations.

    Args:
        q: queries, all of them or a shard.
        k: keys, likewise.
        v: values.
        phi: parameters of the feature maps.
        keep: 1.0 for the keys of L, 0.0 for the others.
        spec: of the attention.
        total: makes (state, normaliser) of the keys at hand those of all keys; they are float32.
    """
    head_first, head_last, product = feature_maps.head_first, feature_maps.head_last, feature_maps.product
    phi_q, phi_k = (head_first(x) for x in feature_maps.apply_pair(phi, q, k, spec.feature_map))
    state = product("hbnf,hbnd->hbfd", phi_k, head_first(v) * keep.astype(v.dtype)[:, None])
    # Sums, not products with a vector: they are fused with what reads φ, which else is first written out in float32.
    normaliser = (phi_k.astype(jnp.float32) * keep[:, None]).sum(axis=2)
    state, normaliser = total((state, normaliser))
    numerator = sum(product("hbnf,hbfd->hbnd", phi_q, part) for part in _parts(state, phi_q.dtype))
    denominator = (phi_q.astype(jnp.float32) * normaliser[:, :, None]).sum(axis=3)
    return head_last(numerator), head_last(denominator)


def _parts(state: Array, dtype) -> list[Array]:
    """A float32 array as a sum of arrays of `dtype`: two of 16 bits, so that 16-bit products lose nothing of it."""
    if dtype == jnp.float32:
        return [state]
    high = state.astype(dtype)
    return [high, (state - high.astype(jnp.float32)).astype(dtype)]


def combine(softmax_sums_: tuple[Array, Array], linear_sums: tuple[Array, Array]) -> Float[Array, "b n h d"]:
    """Eq. 5 from its sums: (numerators added) / (denominators added), float32."""
    denominator = softmax_sums_[1] + linear_sums[1]
    return (softmax_sums_[0] + linear_sums[0]) / jnp.maximum(denominator, TINY)[..., None]


def _softmax(q, k, v, phi, spec, grid):
    del phi, spec, grid
    return softmax_attention(q, k, v)


def _mixed(q, k, v, phi, spec, grid):
    parts = softmax_part(q, k, v, spec, grid), linear_part(q, k, v, phi, spec, grid)
    return combine(*parts).astype(q.dtype)


ATTENTIONS: dict[str, Callable] = {"softmax": _softmax, "hybrid": _mixed, "linear": _mixed}
