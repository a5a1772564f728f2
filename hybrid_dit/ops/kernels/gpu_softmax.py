"""The softmax part of hybrid attention on a GPU: flash attention in Pallas (Triton), or cuDNN's.

Forward: softmax attention o_i over S, the log-sum-exp or maximum c_i, and the weight w_i = Σ_j exp(s_ij − c_i) with
which o_i enters Eq. 5. cuDNN returns no maximum, so it serves the stabiliser "lse" alone (w_i = 1).

Backward: with the total output y_i and the total log-normaliser L_i = c_i + log(w_i + φ_q(q_i)·z), c_i held fixed,

    p_ij = exp(s_ij − L_i),   ds_ij = p_ij (g_i·v_j − g_i·y_i),   dq = ds k,   dk = dsᵀ q,   dv = pᵀ g,

which is any flash attention's backward given (y, L) in place of its own output and log-sum-exp.

Floor: 4 N M D FLOPs a head forward and 10 N M D backward for N queries and M keys: 0.82 and 2.1 TFLOP at N = 32,760,
R = 8 and 12 heads of 128, 1.4 and 3.5 ms at the 580 TFLOP/s that cuDNN reaches.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.extend import core

from hybrid_dit.array_typing import Array, Float
from hybrid_dit.ops.kernels import gpu_tiles as tiles
from hybrid_dit.ops.kernels.gpu_tiles import Tile, Tiles, dot

LOG2E = math.log2(math.e)
PADDED = 128  # keys in odd number, which cuDNN's backward refuses, are padded to a multiple, and masked


def forward(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b m h d"],
    v: Float[Array, "b m h d"],
    sizes: Tiles,
    interpret: bool,
) -> tuple[Float[Array, "b n h d"], Float[Array, "b h n"], Float[Array, "b h n"]]:
    """Softmax attention in the dtype of `q`, Σ_j exp(s_ij − c_i) and c_i = max_j s_ij, both float32."""
    (b, n, heads, _), tile = q.shape, sizes.softmax
    vector = jax.ShapeDtypeStruct((b, heads, n), jnp.float32)
    return pl.pallas_call(
        functools.partial(_forward_kernel, tile=tile),
        grid=(pl.cdiv(n, tile.rows), heads, b),
        in_specs=[tiles.tokens_spec(x) for x in (q, k, v)],
        out_specs=[tiles.tokens_spec(q), tiles.vector_spec(vector), tiles.vector_spec(vector)],
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), vector, vector],
        compiler_params=tiles.params(tile),
        interpret=interpret,
        name="hybrid_softmax",
    )(q, k, v)


def _forward_kernel(q_ref, k_ref, v_ref, out_ref, weight_ref, top_ref, *, tile):
    at = tiles.span(pl.program_id(0) * tile.rows, tile.rows)
    total, weight, top = softmax_sums(tiles.rows(q_ref, at), k_ref, v_ref, tile.chunk)
    tiles.store_rows(out_ref, at, total * (1.0 / weight)[:, None])
    tiles.store_rows(weight_ref, at, weight)
    tiles.store_rows(top_ref, at, top)


def softmax_sums(q: Array, k_ref, v_ref, chunk: int) -> tuple[Array, Array, Array]:
    """Σ_j exp(s_ij − c_i) v_j [t, d], Σ_j exp(s_ij − c_i) [t] and c_i = max_j s_ij [t] of a tile of queries."""
    m, (t, d) = k_ref.shape[0], q.shape
    scale = d**-0.5 * LOG2E  # scores in units of log 2, so that exponentials are powers of two

    def step(j, sums, masked=False):
        total, weight, before = sums
        keys = pl.ds(j * chunk, chunk)
        if masked:
            k, v = (tiles.rows(x, tiles.span(j * chunk, chunk)) for x in (k_ref, v_ref))
        else:
            k, v = k_ref[keys, :], v_ref[keys, :]
        s = dot(q, k.T)
        if masked:
            s = jnp.where(j * chunk + jnp.arange(chunk)[None] < m, s, -jnp.inf)
        top = jnp.maximum(before, s.max(axis=1))
        shrink = jnp.exp2((before - top) * scale)
        p = jnp.exp2(s * scale - (top * scale)[:, None])
        total = total * shrink[:, None] + dot(p.astype(v.dtype), v)
        return total, weight * shrink + p.sum(axis=1), top

    # The first tile is never empty, so the maximum is finite after it.
    sums = jnp.zeros((t, d), jnp.float32), jnp.zeros((t,), jnp.float32), jnp.full((t,), -jnp.inf, jnp.float32)
    if m >= chunk:
        sums = jax.lax.fori_loop(0, m // chunk, step, sums)
    if m % chunk:
        sums = jax.lax.fori_loop(m // chunk, pl.cdiv(m, chunk), functools.partial(step, masked=True), sums)
    return sums[0], sums[1], sums[2] * d**-0.5


def backward(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b m h d"],
    v: Float[Array, "b m h d"],
    g: Float[Array, "b n h d"],
    delta: Float[Array, "b h n"],
    normaliser: Float[Array, "b h n"],
    sizes: Tiles,
    interpret: bool,
) -> tuple[Float[Array, "b n h d"], Float[Array, "b m h d"], Float[Array, "b m h d"]]:
    """dq, dk, dv of the module's formulas in the dtypes of q, k, v.

    Args:
        q: queries.
        k: keys of S.
        v: values of S.
        g: cotangent of the output, in the dtype of `q`.
        delta: g_i·y_i with the total output y, float32.
        normaliser: L_i, float32.
        sizes: of tiles.
        interpret: run on any platform, slowly.
    """
    ins = q, k, v, g, delta, normaliser
    dk, dv = backward_keys(*ins, sizes, interpret)
    return backward_queries(*ins, sizes, interpret), dk, dv


def backward_queries(q, k, v, g, delta, normaliser, sizes: Tiles, interpret: bool) -> Array:
    """The first of what `backward` returns."""
    ins = q, k, v, g, delta, normaliser
    return _backward(_dq_kernel, ins, [q], sizes.softmax_dq, interpret, "hybrid_softmax_dq")[0]


def backward_keys(q, k, v, g, delta, normaliser, sizes: Tiles, interpret: bool) -> tuple[Array, Array]:
    """The second and third of what `backward` returns."""
    ins = q, k, v, g, delta, normaliser
    return _backward(_dkv_kernel, ins, [k, v], sizes.softmax_dkv, interpret, "hybrid_softmax_dkv")


def _backward(kernel, ins, outs, tile: Tile, interpret, name):
    """Arrays like `outs`, from a program for every tile of their tokens."""
    return pl.pallas_call(
        functools.partial(kernel, tile=tile),
        grid=(pl.cdiv(outs[0].shape[1], tile.rows), outs[0].shape[2], outs[0].shape[0]),
        in_specs=[*(tiles.tokens_spec(x) for x in ins[:4]), *(tiles.vector_spec(x) for x in ins[4:])],
        out_specs=[tiles.tokens_spec(x) for x in outs],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outs],
        compiler_params=tiles.params(tile),
        interpret=interpret,
        name=name,
    )(*ins)


def _dq_kernel(q_ref, k_ref, v_ref, g_ref, delta_ref, normaliser_ref, dq_ref, *, tile):
    at = tiles.span(pl.program_id(0) * tile.rows, tile.rows)
    q, g = (tiles.rows(x, at) for x in (q_ref, g_ref))
    delta = tiles.rows(delta_ref, at)
    normaliser = tiles.rows(normaliser_ref, at) * LOG2E
    scale = q.shape[1] ** -0.5

    def step(j, dq):
        k, v = (tiles.rows(x, tiles.span(j * tile.chunk, tile.chunk)) for x in (k_ref, v_ref))
        p = jnp.exp2(dot(q, k.T) * (scale * LOG2E) - normaliser[:, None])
        ds = p * (dot(g, v.T) - delta[:, None])
        # Beyond the last key p may be infinite.
        ds = jnp.where(j * tile.chunk + jnp.arange(tile.chunk)[None] < k_ref.shape[0], ds, 0.0)
        return dq + dot(ds.astype(k.dtype), k)

    dq = jax.lax.fori_loop(0, pl.cdiv(k_ref.shape[0], tile.chunk), step, jnp.zeros(q.shape, jnp.float32))
    tiles.store_rows(dq_ref, at, dq * scale)


def _dkv_kernel(q_ref, k_ref, v_ref, g_ref, delta_ref, normaliser_ref, dk_ref, dv_ref, *, tile):
    at = tiles.span(pl.program_id(0) * tile.rows, tile.rows)
    k, v = (tiles.rows(x, at) for x in (k_ref, v_ref))
    scale = k.shape[1] ** -0.5

    def step(i, sums):  # everything transposed, keys along rows
        queries = tiles.span(i * tile.chunk, tile.chunk)
        q, g = (tiles.rows(x, queries) for x in (q_ref, g_ref))
        delta = tiles.rows(delta_ref, queries)
        normaliser = tiles.rows(normaliser_ref, queries, other=jnp.inf) * LOG2E  # beyond the end p is 0
        p = jnp.exp2(dot(k, q.T) * (scale * LOG2E) - normaliser[None])
        ds = p * (dot(v, g.T) - delta[None])
        return sums[0] + dot(ds.astype(q.dtype), q), sums[1] + dot(p.astype(g.dtype), g)

    zeros = jnp.zeros(k.shape, jnp.float32)
    dk, dv = jax.lax.fori_loop(0, pl.cdiv(q_ref.shape[0], tile.chunk), step, (zeros, zeros))
    tiles.store_rows(dk_ref, at, dk * scale)
    tiles.store_rows(dv_ref, at, dv)


# cuDNN


def cudnn_forward(q: Array, k: Array, v: Array, want_c: bool) -> tuple[Array, Array, Array | None]:
    """As `forward`, with c_i the log-sum-exp; 16-bit inputs on a GPU.

    Eq. 5 itself doesn't need it, since w_i = 1: without `want_c` it is None, and cuDNN is not asked for it.
    """
    out = _cudnn(k.shape[1], residual=want_c)(q, k, v)
    out, c = (out[0], out[1].astype(jnp.float32)) if want_c else (out, None)
    return out, jnp.ones((q.shape[0], q.shape[2], q.shape[1]), jnp.float32), c


def cudnn_backward(
    q: Array, k: Array, v: Array, g: Array, y: Array, normaliser: Array
) -> tuple[Array, Array, Array]:
    """As `backward`, with the total output y in place of `delta`, which cuDNN computes. Queries are even in number.

    JAX has no function that takes residuals. So the derivative of `_cudnn` is traced, the call of the forward taken out
    of it, and what that call returned is given instead.
    """
    m = k.shape[1]
    k, v = (jnp.pad(x, ((0, 0), (0, -m % PADDED if m % 2 else 0), (0, 0), (0, 0))) for x in (k, v))

    def derivative(q, k, v, g):
        (_, lse), vjp = jax.vjp(_cudnn(m), q, k, v)
        return vjp((g, jnp.zeros_like(lse)))

    traced = jax.make_jaxpr(derivative)(q, k, v, g)
    jaxpr = traced.jaxpr
    (call,) = (e for e in jaxpr.eqns if "attention_fwd" in e.primitive.name)
    out, lse = call.outvars[:2]
    rest = [e for e in jaxpr.eqns if e is not call]
    names = jaxpr.debug_info.with_unknown_names()
    given = jaxpr.replace(invars=[*jaxpr.invars, out, lse], eqns=rest, debug_info=names)
    run = core.jaxpr_as_fun(core.ClosedJaxpr(given, traced.consts))
    dq, dk, dv = run(q, k, v, g, y, normaliser.astype(lse.aval.dtype))
    return dq, dk[:, :m], dv[:, :m]


def _cudnn(m: int, residual: bool = True):
    """(q, k, v padded) -> softmax attention over the first m keys, with `residual` and its log-sum-exp [b, h, n]."""
    # `jax.nn.dot_product_attention` rounds the log-sum-exp to 16 bits, 3% of a weight; hence the inner one.
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    def attend(q, k, v):
        masks = {}
        if k.shape[1] != m:
            lengths = (jnp.full((len(q),), x, jnp.int32) for x in (q.shape[1], m))
            masks = dict(zip(("q_seqlen", "kv_seqlen"), lengths), mask_type=cudnn.MaskType.PADDING)
        return cudnn.dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5, return_residual=residual, **masks)

    return attend
