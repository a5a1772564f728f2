"""Hybrid attention (paper Eq. 5) on a TPU in fused Pallas kernels, differentiable: what `ops.hybrid` calls.

Products take operands of the inputs' dtype; everything else is float32, and roundings lie where `ops.hybrid` has them.
S's keys and values, N/R tokens, are copied out before (a strided slice, or a gather for the lattice). Any number of
tokens: tiles that reach past the end are masked, nothing is padded in memory.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from hybrid_dit.array_typing import Array, DTypeLike, Float, PyTree
from hybrid_dit.ops import softmax
from hybrid_dit.ops.kernels import tile_features, tpu_backward, tpu_forward
from hybrid_dit.ops.kernels.tile_features import LOG2E
from hybrid_dit.ops.kernels.tpu_blocks import LANES, Blocks, default_blocks, flat
from hybrid_dit.ops.residuals import marked
from hybrid_dit.ops.shards import Shard
from hybrid_dit.ops.spec import AttentionSpec
from hybrid_dit.ops.tokens import Grid, softmax_tokens

Interpret = bool | pltpu.InterpretParams


def aligned(head_dim: int) -> bool:
    """Whether a TPU takes heads of this width: one head is one column of lanes. Interpreted, up to 128 do."""
    return head_dim == LANES


def fits(spec: AttentionSpec, head_dim: int, dtype: DTypeLike) -> bool:
    """Whether the kernels, interpreted or not, compute this attention."""
    known = spec.kind == "softmax" or (spec.is_eq5 and tile_features.fits(spec.feature_map))
    return known and head_dim <= LANES and dtype in (jnp.bfloat16, jnp.float32)


def forward(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b n h d"],
    v: Float[Array, "b n h d"],
    phi: PyTree,
    *,
    spec: AttentionSpec,
    grid: Grid,
    blocks: Blocks | None = None,
    interpret: Interpret = False,
    shard: Shard | None = None,
) -> Float[Array, "b n h d"]:
    """Eq. 5 in the dtype of `q`; arguments and values as of `ops.hybrid.attention`. Not differentiable.

    Args:
        q: queries.
        k: keys.
        v: values.
        phi: parameters of the feature maps.
        spec: what to compute; where not interpreted, one that `fits`.
        grid: of the tokens.
        blocks: tile sizes; the table's for this TPU unless given.
        interpret: run on any platform, slowly.
        shard: inside `shard_map`, which part of a video's rows q, k and v are; `grid` is of the whole.
    """
    y, _ = _forward(q, k, v, phi, spec, grid, blocks or default_blocks(), interpret, shard, keep=False)
    return y


def forward_and_residuals(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b n h d"],
    v: Float[Array, "b n h d"],
    phi: PyTree,
    *,
    spec: AttentionSpec,
    grid: Grid,
    blocks: Blocks | None = None,
    interpret: Interpret = False,
    shard: Shard | None = None,
) -> tuple[Float[Array, "b n h d"], PyTree]:
    """As `forward`, with what `backward` needs beside y: two numbers per row, and the linear part's sums."""
    return _forward(q, k, v, phi, spec, grid, blocks or default_blocks(), interpret, shard, keep=True)


def _forward(q, k, v, phi, spec, grid, blocks, interpret, shard, keep):
    heads, sums, params = q.shape[2], (), {}
    if _has_linear(spec):
        keys_map = tile_features.operands(phi[_keys_side(spec)], k.dtype)
        rest = heads, spec, grid, blocks, interpret, _first(shard, k)
        sums = tpu_forward.state(flat(k), flat(v), keys_map, *rest)
        sums = tpu_forward.in_parts(sums if shard is None else shard.sum(sums), k.dtype)
        params = tile_features.operands(phi["q"], q.dtype)
    pair = _softmax_pair(k, v, spec, grid, shard)
    y, stats = tpu_forward.outputs(flat(q), pair, params, sums, heads, spec, blocks, interpret, keep)
    return y.reshape(q.shape), (stats, sums)


def backward(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b n h d"],
    v: Float[Array, "b n h d"],
    phi: PyTree,
    y: Float[Array, "b n h d"],
    residuals: PyTree,
    cotangent: Float[Array, "b n h d"],
    *,
    spec: AttentionSpec,
    grid: Grid,
    blocks: Blocks | None = None,
    interpret: Interpret = False,
    shard: Shard | None = None,
) -> tuple[Float[Array, "b n h d"], Float[Array, "b n h d"], Float[Array, "b n h d"], PyTree]:
    """The gradient of Eq. 5, c_i held fixed, with respect to q, k, v, φ, each in its dtype.

    Args:
        q: queries.
        k: keys.
        v: values.
        phi: parameters of the feature maps.
        y: what `forward_and_residuals` returned.
        residuals: what it returned beside y.
        cotangent: of y.
        spec: as there, like what follows.
        grid: of the tokens.
        blocks: tile sizes; the table's for this TPU unless given.
        interpret: run on any platform, slowly.
        shard: inside `shard_map`, which part of a video's rows q, k and v are; `grid` is of the whole.
    """
    blocks = blocks or default_blocks()
    stats, sums = residuals
    heads, linear, side = q.shape[2], _has_linear(spec), _keys_side(spec)
    params = {name: tile_features.operands(phi[name], jnp.float32) for name in ("q", side)} if linear else {"q": {}}
    rows = tuple(flat(x) for x in (q, cotangent, y))
    softmax = _softmax_pair(k, v, spec, grid, shard)
    dq, softmax_grads, state_grads, dphi_q = tpu_backward.queries(
        rows, stats, softmax, params["q"], sums, heads, spec, blocks, interpret, *([shard.sum] if shard else [])
    )
    if shard is not None and softmax:
        back = functools.partial(shard.softmax_keys_back, grid=grid, spec=spec, length=k.shape[1])
        sent, softmax_grads = [back(x[:, : y.shape[1]]) for x, y in zip(softmax_grads, softmax)], ()
        if not linear:
            softmax_grads = sent
    if not linear:
        dk, dv = (x[:, : k.shape[1]].astype(k.dtype) for x in softmax_grads)
        return dq.reshape(q.shape), dk.reshape(k.shape), dv.reshape(v.shape), jax.tree.map(jnp.zeros_like, phi)
    rest = heads, spec, grid, blocks, interpret, _first(shard, k)
    dk, dv, dphi_k = tpu_backward.keys(flat(k), flat(v), softmax_grads, params[side], state_grads, *rest)
    if shard is not None:  # each row has a gradient as a key of S or of L, or none
        dv = jnp.where(shard.linear_keys(grid, spec, k.shape[1])[:, None] > 0, dv, 0)
        if softmax:
            dk, dv = ((x.astype(jnp.float32) + y).astype(x.dtype) for x, y in zip((dk, dv), sent))
    grads = {"q": dphi_q, "k": {}}
    grads[side] = jax.tree.map(jnp.add, dphi_q, dphi_k) if side == "q" else dphi_k
    dphi = jax.tree.map(lambda g, p: g.reshape(p.shape).astype(p.dtype), grads, phi)
    return dq.reshape(q.shape), dk.reshape(k.shape), dv.reshape(v.shape), dphi


def _has_linear(spec: AttentionSpec) -> bool:
    """Whether L has tokens; with R = 1 every token is a softmax token."""
    return spec.kind == "linear" or (spec.kind == "hybrid" and spec.rate > 1)


def _keys_side(spec: AttentionSpec) -> str:
    """Whose parameters φ_k has."""
    return "q" if spec.feature_map.shared else "k"


def _softmax_pair(k: Array, v: Array, spec: AttentionSpec, grid: Grid, shard: Shard | None) -> tuple[Array, ...]:
    """S's keys and values, [b, m, h·d] each; empty without S."""
    if spec.kind == "linear":
        return ()
    if shard is not None:
        return tuple(shard.softmax_keys(flat(x), grid, spec) for x in (k, v))
    return tuple(flat(_softmax_rows(x, spec, grid)) for x in (k, v))


def _first(shard: Shard | None, k: Array) -> Array | None:
    """The number of the first row's token, [1]."""
    return None if shard is None else shard.first(k.shape[1])[None]


def _softmax_rows(x: Array, spec: AttentionSpec, grid: Grid) -> Array:
    """Rows of S, [b, m, ...]."""
    if spec.kind == "softmax" or spec.rate == 1:
        return x
    if spec.pattern == "stride":
        return x[:, :: spec.rate]
    return jnp.take(x, softmax_tokens(grid, spec.rate, spec.pattern), axis=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 5, 6, 7))
def attention(
    xla, q: Array, k: Array, v: Array, phi: PyTree, spec: AttentionSpec, grid: Grid, shard: Shard | None = None
) -> Array:
    """Eq. 5, differentiable: fused where the program is for a TPU; elsewhere the same kernels interpreted, slowly.

    Args:
        xla: the same function (q, k, v, phi, spec, grid) of XLA operations, for heads that a TPU does not take.
        q, k, v, phi, spec, grid, shard: as in `forward`.
    """
    plain = functools.partial(xla, spec=spec, grid=grid)
    return _by_platform(functools.partial(forward, spec=spec, grid=grid, shard=shard), plain, q, k, v, phi)


def _attention_forward(xla, q, k, v, phi, spec, grid, shard):
    fused = functools.partial(forward_and_residuals, spec=spec, grid=grid, shard=shard)

    def plain(*args):
        residuals = jax.eval_shape(functools.partial(fused, interpret=True), *args)[1]
        return xla(*args, spec, grid), jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), residuals)

    y, residuals = marked(_by_platform(fused, plain, q, k, v, phi))
    return y, (q, k, v, phi, y, residuals)


def _attention_backward(xla, spec, grid, shard, kept, cotangent):
    def plain(q, k, v, phi, y, residuals, cotangent):
        del y, residuals
        return jax.vjp(lambda *args: xla(*args, spec, grid), q, k, v, phi)[1](cotangent)

    return _by_platform(functools.partial(backward, spec=spec, grid=grid, shard=shard), plain, *kept, cotangent)


attention.defvjp(_attention_forward, _attention_backward)


def softmax_sums(
    q: Float[Array, "b n h d"], k: Float[Array, "b m h d"], v: Float[Array, "b m h d"]
) -> tuple[Float[Array, "b n h d"], Float[Array, "b n h"], Float[Array, "b n h"]]:
    """As `ops.softmax.softmax_sums`, by the kernel of queries. Not differentiable.

    The numerators are multiples of outputs in the dtype of `q`.
    """

    def fused(q, k, v, interpret=False):
        how = q.shape[2], AttentionSpec(), default_blocks(), interpret
        y, stats = tpu_forward.outputs(flat(q), (flat(k), flat(v)), {}, (), *how, keep=True)
        c, weight = (jnp.moveaxis(x, 1, 2) for x in (stats[:, :, 0] / LOG2E, 1.0 / stats[:, :, 1]))
        return y.reshape(q.shape).astype(jnp.float32) * weight[..., None], weight, c

    return _by_platform(fused, softmax.softmax_sums, q, k, v)


def _by_platform(fused, plain, q, *args):
    """`fused` on a TPU that takes such heads and `plain` on one that does not; elsewhere `fused`, interpreted."""
    compiled = fused if aligned(q.shape[-1]) else plain
    return jax.lax.platform_dependent(q, *args, tpu=compiled, default=functools.partial(fused, interpret=True))
