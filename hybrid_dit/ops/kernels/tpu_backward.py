"""The backward pass of hybrid attention (paper Eq. 5, c_i held fixed) on a TPU, as two Pallas kernels.

With g_i the cotangent of y_i divided by the row's denominator, and δ_i = g_i·y_i: g_i is the cotangent of the
numerator, −δ_i that of the denominator. So that of a score is exp(s_ij − c_i) (g_i·v_j − δ_i), a flash backward pass
with the total output and the total normaliser; and the linear part has the same two cotangents.

Kernel A (`queries`) goes over tiles of queries and, within, over tiles of S's keys. It recomputes scores once, for the
gradients of q and of S's k and v together; the latter are summed in VMEM for all keys of a head (for `back_span` of
them; more take another pass). For every tile of queries it then goes back through φ_q, and sums the gradients of
φ_q's parameters and of the linear part's state and normaliser. Kernel B (`keys`) goes over tiles of all keys, back
through φ_k, and puts the rows of S, which come from kernel A, in their places.

Scores are held as [keys, queries]: what belongs to a query is a row then, and no product transposes them.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hybrid_dit.array_typing import Array
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
from hybrid_dit.ops.spec import AttentionSpec
from hybrid_dit.ops.tokens import softmax_tokens

LARGEST = 4096  # tokens of a tile of kernel B that has to be a multiple of R


def queries(rows, stats, softmax, params, sums, heads, spec, blocks, interpret, total=lambda sums: sums):
    """Gradients of q [b, n, h·d]; of S's k and v [b, m or more, h·d] float32; of state and normaliser; of φ_q.

    Args:
        rows: queries, cotangents, outputs, [b, n, h·d] each.
        stats: what `tpu_forward.outputs` keeps.
        softmax: S's keys and values, [b, m, h·d] each; empty without S.
        params: of φ_q in float32; empty without L.
        sums: state and normaliser, as of `tpu_forward.in_parts`; empty without L.
        heads: H.
        spec: what was computed.
        blocks: tile sizes.
        interpret: as in `tpu_hybrid.backward`.
        total: makes gradients of state and normaliser, float32, those from all queries, where these are a part.

    Returns:
        dq; (dk, dv) or (); ([b, h, d, f] in the dtype of q, [b, h, 1, f] float32) or (); {name: [h, ...]} float32.
    """
    m, span = softmax[0].shape[1] if softmax else 0, blocks.back_span
    if m <= span:
        dq, dkeys, dstate, dparams = _queries(rows, stats, softmax, params, sums, heads, blocks, interpret, spec, None)
    else:
        dq, dkeys, dstate, dparams = 0.0, [], (), {}
        for start in range(0, m, span):
            part = tuple(x[:, start : start + span] for x in softmax)
            with_linear = (params, sums) if start == 0 else ({}, ())
            new = _queries(rows, stats, part, *with_linear, heads, blocks, interpret, spec, jnp.float32)
            dq, (dstate, dparams) = dq + new[0], new[2:] if start == 0 else (dstate, dparams)
            dkeys.append(new[1])
        dq = dq.astype(rows[0].dtype)
        dkeys = tuple(jnp.concatenate(x, axis=1) for x in zip(*dkeys))
    if sums:
        d = rows[0].shape[2] // heads
        dstate, dnormaliser = total((dstate[:, :, :d], dstate[:, :, d : d + 2].sum(axis=2, keepdims=True)))
        dstate = dstate.astype(rows[0].dtype), dnormaliser
    return dq, dkeys, dstate, jax.tree.map(lambda x: x.sum(axis=0), dparams)


def _queries(rows, stats, softmax, params, sums, heads, blocks, interpret, spec, dtype):
    """As `queries` for keys that fit: dq in `dtype` (None: as q), `dstate` with the rows beside it, per video."""
    q = rows[0]
    b, n, d = q.shape[0], q.shape[1], q.shape[2] // heads
    count, size = tiles(n, blocks.back_queries, LANES)
    m = softmax[0].shape[1] if softmax else 0
    steps, width = tiles(m, blocks.back_keys, LANES) if softmax else (1, 0)
    tile = pl.BlockSpec((None, size, d), lambda i, j, r, s: (i, r, j))
    keys = pl.BlockSpec((None, width, d), lambda i, j, r, s: (i, s, j))
    all_keys = pl.BlockSpec((None, steps * width, d), lambda i, j, r, s: (i, 0, j))
    sums = tuple(x[:, :, 0] if i == 0 else x for i, x in enumerate(sums))  # the state's high part is enough here
    f32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    dkeys = tuple(f32((b, steps * width, x.shape[2])) for x in softmax)
    dstate = tuple(f32((b, heads, d + ONES, x.shape[3])) for x in sums[:1])
    dparams = jax.tree.map(lambda x: f32((b, *x.shape)), params)
    dq, dkeys, dstate, dparams = pl.pallas_call(
        functools.partial(_queries_kernel, spec=spec, n=n, m=m, blocks=blocks),
        grid=(b, heads, count, steps),
        in_specs=[
            (tile,) * 3,
            pl.BlockSpec((None, None, 2, size), lambda i, j, r, s: (i, j, 0, r)),
            jax.tree.map(lambda x: keys, softmax),
            jax.tree.map(per_head, params),
            jax.tree.map(per_video_and_head, sums),
        ],
        out_specs=(
            tile,
            jax.tree.map(lambda x: all_keys, dkeys),
            jax.tree.map(per_video_and_head, dstate),
            jax.tree.map(per_video_and_head, dparams),
        ),
        out_shape=(jax.ShapeDtypeStruct(q.shape, dtype or q.dtype), dkeys, dstate, dparams),
        scratch_shapes=[
            pltpu.VMEM((size, d), q.dtype),
            pltpu.VMEM((size, d), q.dtype),
            pltpu.VMEM((2, size), jnp.float32),
            pltpu.VMEM((d, size), jnp.float32),
        ],
        compiler_params=compiler_params(blocks.back_vmem, "parallel", "parallel", "arbitrary", "arbitrary"),
        interpret=interpret,
        name="hybrid_back_queries",
    )(rows, stats, in_hbm(softmax, interpret), params, sums)
    return dq, dkeys, dstate[0] if sums else (), dparams


def _queries_kernel(rows, stats_ref, keys, params, sums, dq_ref, dkeys, dstate, dparams, *scratch, spec, n, m, blocks):
    q_ref, g_ref, row_ref, sum_ref = scratch
    r, step = pl.program_id(2), pl.program_id(3)
    size, d = q_ref.shape

    @pl.when(step == 0)
    def _():
        _scaled_rows(*rows, stats_ref, q_ref, g_ref, row_ref, r * size, n)
        sum_ref[...] = jnp.zeros_like(sum_ref)

    if m:
        width = keys[0].shape[0]
        here = pl.ds(pl.multiple_of(step * width, LANES), width)

        @pl.when(r == 0)
        def _():
            for ref in dkeys:
                ref[here, :] = jnp.zeros((width, d), jnp.float32)

        _softmax_step(q_ref, g_ref, row_ref, sum_ref, *keys, *dkeys, m=m, chunk=blocks.back_chunk)

        @pl.when(r == pl.num_programs(2) - 1)
        def _():
            dkeys[0][here, :] *= d**-0.5

    if sums:

        @pl.when((r == 0) & (step == 0))
        def _():
            for ref in (*dstate, *dparams.values()):
                ref[...] = jnp.zeros_like(ref)

    @pl.when(step == pl.num_programs(3) - 1)
    def _():
        dq = sum_ref[...].T * d**-0.5
        if sums:
            dq += _linear_rows(q_ref, g_ref, row_ref, params, *sums, *dstate, dparams, spec, blocks.back_rows)
        dq_ref[...] = dq.astype(dq_ref.dtype)


def _scaled_rows(q_in, g_in, y_in, stats_ref, q_ref, g_ref, row_ref, start, n):
    """Writes q, g / denominator, and rows of c and δ; zeros for queries past the end, where inputs may be NaN."""
    size, d = q_ref.shape
    q, g, y, stats = q_in[...], g_in[...], y_in[...], stats_ref[...]
    if n % size:
        q, g, y = (zeros_past_end(x, start, n, n % size // ONES * ONES) for x in (q, g, y))
        stats = jnp.where(start + jax.lax.broadcasted_iota(jnp.int32, (1, size), 1) < n, stats, 0.0)
    c, inverse = stats[:1], stats[1:]
    g = g.astype(jnp.float32)
    delta = (g * y.astype(jnp.float32)).T.sum(axis=0, keepdims=True) * inverse
    q_ref[...] = q
    g_ref[...] = (g * _columns(inverse, d)).astype(g_ref.dtype)
    # A denominator that was raised to TINY is a constant.
    row_ref[...] = jnp.concatenate([c, jnp.where(inverse < 1 / TINY, delta, 0.0)])


def _columns(row: Array, width: int) -> Array:
    """Numbers [1, t] in float32 -> [t, width], each repeated along its row."""
    lanes = jnp.broadcast_to(row, (LANES, row.shape[1])).T
    return jnp.tile(lanes, (1, pl.cdiv(width, LANES)))[:, :width]


def _softmax_step(q_ref, g_ref, row_ref, sum_ref, k_ref, v_ref, dk_ref, dv_ref, *, m, chunk):
    """Adds a tile of keys to dqᵀ (`sum_ref`), and the tile of queries to these keys' dk and dv.

    Chunk by chunk in straight-line code, as in the forward kernel.
    """
    step, width = pl.program_id(3), k_ref.shape[0]
    scale = q_ref.shape[1] ** -0.5 * LOG2E
    unused = -m % width
    for start in range(0, width, chunk):
        size = min(chunk, width - start)
        here = pl.ds(pl.multiple_of(step * width + start, LANES), size)
        q, g, c, delta = q_ref[...], g_ref[...], row_ref[:1], row_ref[1:]
        k, v = k_ref[start : start + size, :], v_ref[start : start + size, :]
        past_end = start + size > width - unused
        if past_end:
            used = max(width - unused - start, 0) // ONES * ONES
            k, v = (zeros_past_end(x, step * width + start, m, used) for x in (k, v))
        p = jnp.exp2(dot(k, q, contract=(1, 1)) * scale - c)
        if past_end:
            p = zeros_past_end(p, step * width + start, m, used)
        dv_ref[here, :] += dot(p.astype(g.dtype), g)
        ds = (p * (dot(v, g, contract=(1, 1)) - delta)).astype(q.dtype)
        dk_ref[here, :] += dot(ds, q)
        sum_ref[...] += dot(k.T, ds)


def _linear_rows(q_ref, g_ref, row_ref, params, state_ref, normaliser_ref, dstate_ref, dparams, spec, chunk):
    """Adds a tile of queries to what is summed over queries; returns the linear part of dq, float32."""
    wide, dqs = _wide(params), []
    for start in range(0, q_ref.shape[0], chunk):
        here = slice(start, start + chunk)
        g, delta, state = g_ref[here, :], row_ref[1:, here], state_ref[...]
        phi, pull = _map(wide, q_ref[here, :], spec)
        # Two rows beside g make the normaliser's gradient of the same product: −δ and what its rounding leaves.
        high = (-delta).astype(g.dtype)
        low = (-delta - high.astype(jnp.float32)).astype(g.dtype)
        extra = jnp.concatenate([high, low, jnp.zeros((ONES - 2, delta.shape[1]), g.dtype)])
        dstate_ref[...] += dot(jnp.concatenate([g.T, extra]), phi)
        dqs.append(_pull(pull, dot(g, state) - _columns(delta, state.shape[1]) * normaliser_ref[...], dparams))
    return jnp.concatenate(dqs)


def _wide(params) -> dict[str, Array]:
    """Parameters in float32, so that their gradients are."""
    return {name: x.astype(jnp.float32) for name, x in read(params).items()}


def _map(wide, x, spec):
    """φ(x) in the dtype of x, and what takes its cotangent to those of parameters and x."""
    phi, pull = jax.vjp(functools.partial(tile_features.unrounded, spec=spec.feature_map), wide, x)
    return phi.astype(x.dtype), pull


def _pull(pull, dphi, dparams):
    """Adds gradients of parameters; returns that of x, float32."""
    new, dx = pull(dphi)
    for name, ref in dparams.items():
        ref[...] += new[name]
    return dx.astype(jnp.float32)


# Kernel B: keys


def keys(k, v, softmax_grads, params, state_grads, heads, spec, grid, blocks, interpret, first=None):
    """Gradients of k, v [b, n, h·d], of S's tokens too, and of φ_k {name: [h, ...]} float32.

    Without `softmax_grads`, those of v at rows that are not in L are of no meaning.

    Args:
        k: keys of all tokens, [b, n, h·d].
        v: values, likewise.
        softmax_grads: those of S's k and v, as `queries` returns them; empty without S.
        params: of φ_k in float32.
        state_grads: those of state and normaliser, likewise.
        heads: H.
        spec: what was computed.
        grid: of the tokens.
        blocks: tile sizes.
        interpret: as in `tpu_hybrid.backward`.
        first: as in `tpu_forward.state`.
    """
    b, n, d = k.shape[0], k.shape[1], k.shape[2] // heads
    multiple = math.lcm(LANES, 8 * spec.rate)
    inside = bool(softmax_grads) and spec.pattern == "stride" and multiple <= LARGEST
    count, size = tiles(n, blocks.back_linear, multiple if inside else LANES)
    tile = pl.BlockSpec((None, size, d), lambda i, j, t: (i, t, j))
    rows = pl.BlockSpec((None, size // spec.rate, d), lambda i, j, t: (i, t, j))
    given = softmax_grads if inside else ()
    dparams = jax.tree.map(lambda x: jax.ShapeDtypeStruct((b, *x.shape), jnp.float32), params)
    dk, dv, dparams = pl.pallas_call(
        functools.partial(_keys_kernel, spec=spec, grid=grid, n=n, chunk=blocks.back_rows),
        grid=(b, heads, count),
        in_specs=[
            tile,
            tile,
            jax.tree.map(per_head, params),
            jax.tree.map(per_video_and_head, state_grads),
            jax.tree.map(lambda x: rows, given),
            first_spec(first),
        ],
        out_specs=(tile, tile, jax.tree.map(per_video_and_head, dparams)),
        out_shape=(*(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)), dparams),
        scratch_shapes=[pltpu.VMEM((size, d), jnp.float32) for _ in given],
        compiler_params=compiler_params(blocks.back_vmem, "parallel", "parallel", "arbitrary"),
        interpret=interpret,
        name="hybrid_back_keys",
    )(k, v, params, state_grads, in_hbm(given, interpret), first)
    if softmax_grads and not inside:
        dk, dv = (_placed(x, y, spec, grid) for x, y in zip((dk, dv), softmax_grads))
    return dk, dv, jax.tree.map(lambda x: x.sum(axis=0), dparams)


def _placed(x: Array, rows: Array, spec: AttentionSpec, grid) -> Array:
    """x [b, n, ...] with the tokens of S replaced by the first `rows` [b, m or more, ...]."""
    index = softmax_tokens(grid, spec.rate, spec.pattern)
    return x.at[:, index].set(rows[:, : len(index)].astype(x.dtype), unique_indices=True, indices_are_sorted=True)


def _keys_kernel(
    k_ref, v_ref, params, state_grads, given, origin, dk_ref, dv_ref, dparams, *wide_refs, spec, grid, n, chunk
):
    t = pl.program_id(2)

    @pl.when(t == 0)
    def _():
        for ref in dparams.values():
            ref[...] = jnp.zeros_like(ref)

    size, wide = k_ref.shape[0], _wide(params)
    for start in range(0, size, chunk):
        here, first = slice(start, start + chunk), t * size + start
        k, v = k_ref[here, :], v_ref[here, :]
        if 0 < n % size < start + k.shape[0]:
            used = max(n % size - start, 0) // ONES * ONES
            k, v = (zeros_past_end(x, first, n, used) for x in (k, v))
        dstate, dnormaliser = state_grads[0][...], state_grads[1][...]
        phi, pull = _map(wide, k, spec)
        token = first + jax.lax.broadcasted_iota(jnp.int32, (1, k.shape[0]), 1)
        keep = _columns(((token < n) & in_linear(token, spec, grid, origin)).astype(jnp.float32), dstate.shape[1])
        dk = _pull(pull, (dot(v, dstate) + dnormaliser) * keep, dparams)
        dv = dot(phi, dstate, contract=(1, 1))
        for i, (ref, x) in enumerate([(dk_ref, dk), (dv_ref, dv)]):
            if given:
                wide_refs[i][here, :] = x
            else:
                ref[here, :] = x.astype(ref.dtype)
    for ref, rows, wide_ref in zip((dk_ref, dv_ref), given, wide_refs):  # every R-th row of the tile is one of S
        wide_ref[pl.ds(0, size // spec.rate, spec.rate), :] = rows[...]
        ref[...] = wide_ref[...].astype(ref.dtype)
