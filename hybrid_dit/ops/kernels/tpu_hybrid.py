"""Hybrid attention (paper Eq. 5) forward on a TPU, as two Pallas kernels that fuse the feature maps.

Kernel A goes over tiles of all keys and values and sums the linear part's state Σ φ_k(k_j)ᵀ v_j and normaliser
Σ φ_k(k_j) over L: φ_k exists only in VMEM. Kernel B goes over tiles of queries; for each it runs an online softmax
over tiles of S's keys, then φ_q and the read-out of the state, and writes the quotient. Products take operands of the
inputs' dtype; everything else is float32, and roundings lie where `ops.hybrid` has them.

S's keys and values, N/R tokens, are copied out before (a strided slice, or a gather for the lattice). Any number of
tokens: tiles that reach past the end are masked, nothing is padded in memory.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hybrid_dit.array_typing import Array, DTypeLike, Float, PyTree
from hybrid_dit.ops.kernels import tile_features
from hybrid_dit.ops.kernels.tile_features import LOG2E, dot
from hybrid_dit.ops.spec import AttentionSpec
from hybrid_dit.ops.tokens import Grid, softmax_tokens

TINY = 1e-18  # as in `ops.hybrid`
LANES = 128
ONES = 16  # rows of a register of 16-bit numbers


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Tile sizes in tokens; multiples of 128. `benchmarks/tpu_schedule.py` shows what others cost.

    Attributes:
        state: keys and values of a step of kernel A.
        queries: of kernel B.
        keys: softmax keys of a step of kernel B.
        chunk: softmax keys whose scores exist at a time.
        vmem: MiB that a kernel may use.
    """

    state: int = 1024
    queries: int = 1024
    keys: int = 2048
    chunk: int = 512
    vmem: int = 32


# By generation, as in `hybrid_dit.targets`.
BLOCKS = {"v5e": Blocks(), "v5p": Blocks(), "v6e": Blocks(queries=2048, chunk=1024), "tpu7x": Blocks(chunk=1024)}
_KINDS = {"TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v6 lite": "v6e", "TPU7x": "tpu7x"}


def default_blocks() -> Blocks:
    """Tile sizes for the TPU of this process; those of v5e for a kind that is not in the table, or without a TPU."""
    return BLOCKS[_KINDS.get(jax.devices()[0].device_kind, "v5e")]


def aligned(head_dim: int) -> bool:
    """Whether a TPU takes heads of this width: one head is one column of lanes. Interpreted, up to 128 do."""
    return head_dim == LANES


def fits(spec: AttentionSpec, head_dim: int, dtype: DTypeLike) -> bool:
    """Whether the kernels, interpreted or not, compute this attention."""
    known = not spec.converted or tile_features.fits(spec.feature_map)
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
    interpret: bool | pltpu.InterpretParams = False,
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
    """
    blocks = blocks or default_blocks()
    # With R = 1 every token is a softmax token: nothing is left for the linear part.
    linear = spec.kind == "linear" or (spec.kind == "hybrid" and spec.rate > 1)
    sums = ()
    if linear:
        keys_map = tile_features.operands(phi["q" if spec.feature_map.shared else "k"], k.dtype)
        sums = _state(_flat(k), _flat(v), keys_map, q.shape[2], spec, grid, blocks, interpret)
        sums = (tile_features.operands(phi["q"], q.dtype), *sums)
    softmax = () if spec.kind == "linear" else tuple(_flat(_softmax_rows(x, spec, grid)) for x in (k, v))
    y = _outputs(_flat(q), softmax, sums, q.shape[2], spec, blocks, interpret)
    return y.reshape(q.shape)


def _flat(x: Array) -> Array:
    """[b, n, h, d] -> [b, n, h·d], as projections make it: a head is a block of columns."""
    return x.reshape(*x.shape[:2], -1)


def _softmax_rows(x: Array, spec: AttentionSpec, grid: Grid) -> Array:
    """Rows of S, [b, m, ...]."""
    if spec.kind == "softmax" or spec.rate == 1:
        return x
    if spec.pattern == "stride":
        return x[:, :: spec.rate]
    return jnp.take(x, softmax_tokens(grid, spec.rate, spec.pattern), axis=1)


def _tiles(n: int, size: int, multiple: int) -> tuple[int, int]:
    """(how many, size) of equal tiles that cover n rows, each a multiple of `multiple` and of about `size` at most."""
    size = pl.cdiv(pl.cdiv(n, pl.cdiv(n, size)), multiple) * multiple
    return pl.cdiv(n, size), size


def _per_head(x: Array) -> pl.BlockSpec:
    """The slice of head `j` of an array [h, ...], in a grid of (batch, head, ...)."""
    return pl.BlockSpec((None, *x.shape[1:]), lambda i, j, *_: (j, *(0,) * (x.ndim - 1)))


def _per_video_and_head(x: Array | jax.ShapeDtypeStruct) -> pl.BlockSpec:
    """The slice of video `i` and head `j` of an array [b, h, ...]."""
    return pl.BlockSpec((None, None, *x.shape[2:]), lambda i, j, *_: (i, j, *(0,) * (len(x.shape) - 2)))


def _compiler_params(blocks: Blocks, *semantics: str) -> pltpu.CompilerParams:
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=blocks.vmem * 2**20)


# Kernel A: state and normaliser of the linear part


def _state(k, v, params, heads, spec, grid, blocks, interpret):
    """Σ v_j φ_k(k_j)ᵀ over L [b, h, parts, d, f], the sum of parts of the inputs' dtype, and Σ φ_k(k_j) [b, h, 1, f].

    Transposed, since v is narrower than φ_k(k), the other candidate for a transpose on the way into the matrix unit.
    """
    b, n, d = k.shape[0], k.shape[1], k.shape[2] // heads
    f = tile_features.width(spec.feature_map, d)
    count, size = _tiles(n, blocks.state, LANES)
    tile = pl.BlockSpec((None, size, d), lambda i, j, t: (i, t, j))
    shapes = jax.ShapeDtypeStruct((b, heads, d, f), jnp.float32), jax.ShapeDtypeStruct((b, heads, 1, f), jnp.float32)
    state, normaliser = pl.pallas_call(
        functools.partial(_state_kernel, spec=spec, grid=grid, n=n),
        grid=(b, heads, count),
        in_specs=[tile, tile, jax.tree.map(_per_head, params)],
        out_specs=tuple(_per_video_and_head(x) for x in shapes),
        out_shape=shapes,
        compiler_params=_compiler_params(blocks, "parallel", "parallel", "arbitrary"),
        interpret=interpret,
        name="hybrid_state",
    )(k, v, params)
    if k.dtype == jnp.float32:
        return state[:, :, None], normaliser
    high = state.astype(k.dtype)
    return jnp.stack([high, (state - high.astype(jnp.float32)).astype(k.dtype)], axis=2), normaliser


def _state_kernel(k_ref, v_ref, params, state_ref, normaliser_ref, *, spec, grid, n):
    t = pl.program_id(2)

    @pl.when(t == 0)
    def _():
        state_ref[...] = jnp.zeros_like(state_ref)
        normaliser_ref[...] = jnp.zeros_like(normaliser_ref)

    size, d = k_ref.shape
    k = k_ref[...]
    if n % size:
        k = _zeros_past_end(k, t * size, n, used=n % size // ONES * ONES)
    phi = tile_features.apply(_read(params), k, spec.feature_map)
    # Tokens along lanes, where a mask is a few registers wide; a row of ones beside v makes the normaliser a product.
    token = t * size + jax.lax.broadcasted_iota(jnp.int32, (1, size), 1)
    keep = (token < n) & _in_linear(token, spec, grid)
    ones = jnp.ones((ONES, size), phi.dtype)
    sums = dot(jnp.where(keep, jnp.concatenate([v_ref[...].T, ones]), 0.0), phi)
    state_ref[...] += sums[:d]
    normaliser_ref[...] += sums[d : d + 1]


def _zeros_past_end(x: Array, start: Array, n: int, used: int) -> Array:
    """Rows `start`... of n, with those past the end, where lies whatever was in memory (NaN perhaps), made zero.

    Args:
        x: the rows.
        start: of the first.
        n: how many there are in all.
        used: a number of rows of `x` that are there wherever it starts.
    """
    row = start + used + jax.lax.broadcasted_iota(jnp.int32, (x.shape[0] - used, 1), 0)
    return jnp.concatenate([x[:used], jnp.where(row < n, x[used:], 0.0)])


def _in_linear(token: Array, spec: AttentionSpec, grid: Grid) -> Array:
    """Whether tokens, int32, are in L: `ops.tokens.linear_mask` without an array in memory."""
    if spec.kind == "linear":
        return token >= 0
    if spec.pattern == "stride":
        return jax.lax.rem(token, spec.rate) != 0
    row, column = jax.lax.div(token, grid[2]), jax.lax.rem(token, grid[2])
    frame, row = jax.lax.div(row, grid[1]), jax.lax.rem(row, grid[1])
    return jax.lax.rem(column + 3 * row + 5 * frame, spec.rate) != 0


def _read(params) -> dict[str, Array]:
    return {name: ref[...] for name, ref in params.items()}


# Kernel B: outputs


def _outputs(q, softmax, sums, heads, spec, blocks, interpret):
    """y, [b, n, h·d].

    Args:
        q: queries [b, n, h·d].
        softmax: S's keys and values, [b, m, h·d] each; empty without S.
        sums: parameters of φ_q, state, normaliser; empty without L.
        heads: H.
        spec: what to compute.
        blocks: tile sizes.
        interpret: as in `forward`.
    """
    b, n, d = q.shape[0], q.shape[1], q.shape[2] // heads
    rows, size = _tiles(n, blocks.queries, 16)
    m = softmax[0].shape[1] if softmax else 0
    steps, width = _tiles(m, blocks.keys, LANES) if softmax else (1, 0)
    params, sums = (sums[0], sums[1:]) if sums else ({}, ())
    tile = pl.BlockSpec((None, size, d), lambda i, j, r, s: (i, r, j))
    keys = pl.BlockSpec((None, width, d), lambda i, j, r, s: (i, s, j))
    return pl.pallas_call(
        functools.partial(_outputs_kernel, spec=spec, m=m, chunk=blocks.chunk),
        grid=(b, heads, rows, steps),
        in_specs=[
            tile,
            jax.tree.map(lambda x: keys, softmax),
            jax.tree.map(_per_head, params),
            jax.tree.map(_per_video_and_head, sums),
        ],
        out_specs=tile,
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch_shapes=[tuple(pltpu.VMEM((size, x), jnp.float32) for x in (d, LANES, LANES) if softmax)],
        compiler_params=_compiler_params(blocks, "parallel", "parallel", "parallel", "arbitrary"),
        interpret=interpret,
        name="hybrid_outputs",
    )(q, softmax, params, sums)


def _outputs_kernel(q_ref, keys, params, sums, out_ref, scratch, *, spec, m, chunk):
    if m:
        _softmax_step(q_ref, *keys, *scratch, m=m, chunk=chunk)

    @pl.when(pl.program_id(3) == pl.num_programs(3) - 1)
    def _():
        numerator, denominator = 0.0, 0.0
        if m:
            numerator, denominator = scratch[0][...], scratch[2][...].sum(axis=1, keepdims=True)
            if spec.stabiliser == "lse":  # c = log Σ exp s instead of the maximum
                numerator, denominator = numerator / denominator, jnp.ones_like(denominator)
        if sums:
            state_ref, normaliser_ref = sums
            phi = tile_features.apply(_read(params), q_ref[...], spec.feature_map)
            for part in range(state_ref.shape[0]):
                numerator += dot(phi, state_ref[part], contract=(1, 1))
            denominator += (phi.astype(jnp.float32) * normaliser_ref[...]).sum(axis=1, keepdims=True)
        out_ref[...] = (numerator / jnp.maximum(denominator, TINY)).astype(out_ref.dtype)


def _softmax_step(q_ref, k_ref, v_ref, sum_ref, top_ref, weight_ref, *, m, chunk):
    """Takes a tile of keys into Σ exp(s − c) v, the running c (equal in all lanes), Σ exp(s − c) (spread over lanes).

    The tile is taken chunk by chunk in straight-line code, so that the products of one chunk are scheduled beside the
    exponentials of another. Scores are in units of log 2, so that exponentials are powers of two.
    """
    step, width = pl.program_id(3), k_ref.shape[0]
    scale = q_ref.shape[1] ** -0.5 * LOG2E

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
            s = jnp.concatenate([s[:, :used], jnp.where(key < m, s[:, used:], -jnp.inf)], axis=1)
            v = _zeros_past_end(v, step * width + start, m, used)
        before = top_ref[...]
        top = jnp.maximum(before, s.max(axis=1, keepdims=True))
        shrink = jnp.exp2((before - top) * scale)
        p = jnp.exp2((s - jnp.tile(top, (1, size // LANES))) * scale)
        lanes = sum(p[:, c : c + LANES] for c in range(0, size, LANES))
        weight_ref[...] = weight_ref[...] * shrink + lanes
        sum_ref[...] = sum_ref[...] * shrink[:, : sum_ref.shape[1]] + dot(p.astype(v.dtype), v)
        top_ref[...] = top
