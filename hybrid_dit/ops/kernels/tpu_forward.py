"""Hybrid attention (paper Eq. 5) forward on a TPU, as two Pallas kernels that fuse the feature maps.

Kernel A (`state`) goes over tiles of all keys and values and sums the linear part's state Σ φ_k(k_j)ᵀ v_j and
normaliser Σ φ_k(k_j) over L: φ_k exists only in VMEM. Kernel B (`outputs`) goes over tiles of queries; for each it runs
an online softmax over tiles of S's keys, then φ_q and the read-out of the state, and writes the quotient.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hybrid_dit.ops.kernels import tile_features
from hybrid_dit.ops.kernels.tile_features import LOG2E, dot
from hybrid_dit.ops.kernels.tpu_blocks import (
    LANES,
    ONES,
    TINY,
    compiler_params,
    first_spec,
    in_hbm,
    in_linear,
    per_head,
    per_video_and_head,
    read,
    tiles,
    zeros_past_end,
)

# Kernel A: state and normaliser of the linear part


def state(k, v, params, heads, spec, grid, blocks, interpret, first=None):
    """Σ v_j φ_k(k_j)ᵀ over L [b, h, d, f], and Σ φ_k(k_j) [b, h, 1, f]; float32.

    Transposed, since v is narrower than φ_k(k), the other candidate for a transpose on the way into the matrix unit.
    `first`, int32 [1], is the token of the first row, where rows are a part of a video; those past the grid's end pad.
    """
    b, n, d = k.shape[0], k.shape[1], k.shape[2] // heads
    f = tile_features.width(spec.feature_map, d)
    count, size = tiles(n, blocks.state, LANES)
    tile = pl.BlockSpec((None, size, d), lambda i, j, t: (i, t, j))
    shapes = jax.ShapeDtypeStruct((b, heads, d, f), jnp.float32), jax.ShapeDtypeStruct((b, heads, 1, f), jnp.float32)
    return pl.pallas_call(
        functools.partial(_state_kernel, spec=spec, grid=grid, n=n),
        grid=(b, heads, count),
        in_specs=[tile, tile, jax.tree.map(per_head, params), first_spec(first)],
        out_specs=tuple(per_video_and_head(x) for x in shapes),
        out_shape=shapes,
        compiler_params=compiler_params(blocks.vmem, "parallel", "parallel", "arbitrary"),
        interpret=interpret,
        name="hybrid_state",
    )(k, v, params, first)


def in_parts(sums, dtype):
    """The state as [b, h, parts, d, f], the sum of parts of `dtype`, for `outputs`; the normaliser as it is."""
    state, normaliser = sums
    if dtype == jnp.float32:
        return state[:, :, None], normaliser
    high = state.astype(dtype)
    return jnp.stack([high, (state - high.astype(jnp.float32)).astype(dtype)], axis=2), normaliser


def _state_kernel(k_ref, v_ref, params, first, state_ref, normaliser_ref, *, spec, grid, n):
    t = pl.program_id(2)

    @pl.when(t == 0)
    def _():
        state_ref[...] = jnp.zeros_like(state_ref)
        normaliser_ref[...] = jnp.zeros_like(normaliser_ref)

    size, d = k_ref.shape
    k = k_ref[...]
    if n % size:
        k = zeros_past_end(k, t * size, n, used=n % size // ONES * ONES)
    phi = tile_features.apply(read(params), k, spec.feature_map)
    # Tokens along lanes, where a mask is a few registers wide; a row of ones beside v makes the normaliser a product.
    token = t * size + jax.lax.broadcasted_iota(jnp.int32, (1, size), 1)
    keep = (token < n) & in_linear(token, spec, grid, first)
    ones = jnp.ones((ONES, size), phi.dtype)
    sums = dot(jnp.where(keep, jnp.concatenate([v_ref[...].T, ones]), 0.0), phi)
    state_ref[...] += sums[:d]
    normaliser_ref[...] += sums[d : d + 1]


# Kernel B: outputs


def outputs(q, softmax, params, sums, heads, spec, blocks, interpret, keep):
    """y, [b, n, h·d], and of every row what the backward pass needs, [b, h, 2, n] float32 (None unless `keep`).

    That is c in units of log 2, and one over the denominator: exp2(s log2(e) − c) times the latter is the weight of a
    softmax key, whatever the stabiliser.

    Args:
        q: queries [b, n, h·d].
        softmax: S's keys and values, [b, m, h·d] each; empty without S.
        params: of φ_q; empty without L.
        sums: state and normaliser, from `in_parts`; empty without L.
        heads: H.
        spec: what to compute.
        blocks: tile sizes.
        interpret: as in `tpu_hybrid.forward`.
        keep: whether the second result is wanted.
    """
    b, n, d = q.shape[0], q.shape[1], q.shape[2] // heads
    rows, size = tiles(n, blocks.queries, LANES if keep else 16)  # of what is kept, a token is a column
    m = softmax[0].shape[1] if softmax else 0
    steps, width = tiles(m, blocks.keys, LANES) if softmax else (1, 0)
    tile = pl.BlockSpec((None, size, d), lambda i, j, r, s: (i, r, j))
    keys = pl.BlockSpec((None, width, d), lambda i, j, r, s: (i, s, j))
    stats = pl.BlockSpec((None, None, 2, size), lambda i, j, r, s: (i, j, 0, r))
    shapes = jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((b, heads, 2, n), jnp.float32)
    out = pl.pallas_call(
        functools.partial(_outputs_kernel, spec=spec, m=m, chunk=blocks.chunk),
        grid=(b, heads, rows, steps),
        in_specs=[
            tile,
            jax.tree.map(lambda x: keys, softmax),
            jax.tree.map(per_head, params),
            jax.tree.map(per_video_and_head, sums),
        ],
        out_specs=(tile, stats)[: 1 + keep],
        out_shape=shapes[: 1 + keep],
        scratch_shapes=[tuple(pltpu.VMEM((size, x), jnp.float32) for x in (d, LANES, LANES) if softmax)],
        compiler_params=compiler_params(blocks.vmem, "parallel", "parallel", "parallel", "arbitrary"),
        interpret=interpret,
        name="hybrid_outputs",
    )(q, in_hbm(softmax, interpret), params, sums)
    return out if keep else (*out, None)


def _outputs_kernel(q_ref, keys, params, sums, out_ref, *rest, spec, m, chunk):
    *stats_ref, scratch = rest
    if m:
        _softmax_step(q_ref, *keys, *scratch, m=m, chunk=chunk)

    @pl.when(pl.program_id(3) == pl.num_programs(3) - 1)
    def _():
        numerator, denominator, c = 0.0, 0.0, 0.0
        if m:
            numerator, denominator = scratch[0][...], scratch[2][...].sum(axis=1, keepdims=True)
            c = scratch[1][...] * _scale(q_ref)
            if spec.stabiliser == "lse":  # c = log Σ exp s instead of the maximum
                c += jnp.log2(denominator)
                numerator, denominator = numerator / denominator, jnp.ones_like(denominator)
        if sums:
            state_ref, normaliser_ref = sums
            phi = tile_features.apply(read(params), q_ref[...], spec.feature_map)
            for part in range(state_ref.shape[0]):
                numerator += dot(phi, state_ref[part], contract=(1, 1))
            denominator += (phi.astype(jnp.float32) * normaliser_ref[...]).sum(axis=1, keepdims=True)
        denominator = jnp.maximum(denominator, TINY)
        out_ref[...] = (numerator / denominator).astype(out_ref.dtype)
        if stats_ref:  # columns become rows, of which the first two are written
            lane = jax.lax.broadcasted_iota(jnp.int32, (q_ref.shape[0], LANES), 1)
            stats_ref[0][...] = jnp.where(lane == 0, c, 1.0 / denominator).T[:2]


def _scale(q_ref) -> float:
    """What scores are multiplied by, so that their exponentials are powers of two."""
    return q_ref.shape[1] ** -0.5 * LOG2E


def _softmax_step(q_ref, k_ref, v_ref, sum_ref, top_ref, weight_ref, *, m, chunk):
    """Takes a tile of keys into Σ exp(s − c) v, the running c (equal in all lanes), Σ exp(s − c) (spread over lanes).

    The tile is taken chunk by chunk in straight-line code, so that the products of one chunk are scheduled beside the
    exponentials of another. 
    """
    step, width = pl.program_id(3), k_ref.shape[0]
    scale = _scale(q_ref)

    @pl.when(step == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)
        top_ref[...] = jnp.full_like(top_ref, -jnp.inf)
        weight_ref[...] = jnp.zeros_like(weight_ref)

    unused = -m % width  # rows of the last tile past the end of S; every other tile, and so the first, has none
    for start in range(0, width, chunk):
        size = min(chunk, width - start)
        s = dot(q_ref[...], k_ref[start : start + size, :], contract=(1, 1))
        v = v_ref[start : start + size, :]
        if start + size > width - unused:
            used = max(width - unused - start, 0) // LANES * LANES  # columns before this one exist in every tile
            key = step * width + start + used + jax.lax.broadcasted_iota(jnp.int32, (1, size - used), 1)
            rest = jnp.where(key < m, s[:, used:], -jnp.inf)
            s = jnp.concatenate([s[:, :used], rest], axis=1) if used else rest
            v = zeros_past_end(v, step * width + start, m, used)
        before = top_ref[...]
        top = jnp.maximum(before, s.max(axis=1, keepdims=True))
        shrink = jnp.exp2((before - top) * scale)
        p = jnp.exp2((s - jnp.tile(top, (1, size // LANES))) * scale)
        lanes = sum(p[:, c : c + LANES] for c in range(0, size, LANES))
        weight_ref[...] = weight_ref[...] * shrink + lanes
        sum_ref[...] = sum_ref[...] * shrink[:, : sum_ref.shape[1]] + dot(p.astype(v.dtype), v)
        top_ref[...] = top
