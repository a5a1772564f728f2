"""Gradient of the linear part on a GPU: four Pallas kernels on Triton that compute φ anew.

With n_i = φ_q(q_i) S and l_i = φ_q(q_i)·z, the numerator and denominator of the linear part, and their cotangents:

    dφ_q(q_i) = dn_i Sᵀ + dl_i z                  dS = Σ_i φ_q(q_i)ᵀ dn_i,  dz = Σ_i dl_i φ_q(q_i)        `query`
    dφ_k(k_j) = v_j dSᵀ + dz                      dv_j = φ_k(k_j) dS           for j in L                 `key`

Both write the cotangent dy of φ's pre-activations (in 16 bits, [b, h, n, f]). With the map x -> gelu(a) w1 + b1 where
a = x w0 + b0 and h = gelu(a), there follow from it

    dw1 = hᵀ dy,  da = (dy w1ᵀ) gelu'(a),  dw0 = xᵀ da, and column sums for the biases                   `parameters`
    dx = da w0ᵀ                                                                                           `inputs`

(b1's by XLA). Distillation needs no `inputs`. Sums over tokens are taken by several programs and added in fixed order.

Floor, multiply-adds a token and head at D = 128, F = hidden = 256: `query` 196,608 (the first layer once per power),
`key` 131,072 and 32,768 more for dv, `parameters` 196,608 for each map, `inputs` 131,072 for each: 0.57 TFLOP for
stage 1 and 0.8 for stage 3 with 32,760 tokens and 12 heads, 0.7 and 1.0 ms at 780 TFLOP/s. Memory: dy, 0.2 GB, is
written once and read (hidden / chunk) times, mostly from the L2 cache if programs of one chunk run side by side.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from hybrid_dit.array_typing import Array, Float
from hybrid_dit.ops.kernels import gpu_phi
from hybrid_dit.ops.kernels import gpu_tiles as tiles
from hybrid_dit.ops.kernels.gpu_linear import Weights, power_out_spec, power_spec
from hybrid_dit.ops.kernels.gpu_tiles import Tiles, dot
from hybrid_dit.ops.spec import FeatureMapSpec


def query(
    q: Float[Array, "b n h d"],
    dn: Float[Array, "b n h d"],
    dl: Float[Array, "b h n"],
    weights: Weights,
    sums: tuple[Float[Array, "b h f d"], Float[Array, "b h f"]],
    spec: FeatureMapSpec,
    sizes: Tiles,
    interpret: bool,
) -> tuple[Float[Array, "b h m f"], Float[Array, "b h f d"], Float[Array, "b h f"]]:
    """(dy of φ_q with rows padded to m, dS, dz), the latter two float32.

    Args:
        q: queries.
        dn: cotangent of the numerator, in the dtype of `q`.
        dl: of the denominator, float32.
        weights: of φ_q.
        sums: state S and normaliser z, in the dtype of `q` and float32.
        spec: of φ.
        sizes: of tiles.
        interpret: run on any platform, slowly.
    """
    (b, n, heads, d), tile, degree = q.shape, sizes.query, spec.degree
    padded = pl.cdiv(n, tiles.LONGEST) * tiles.LONGEST
    share, each = tiles.splits(sizes.programs, b * heads * degree, padded // tile.rows)
    w0, b0, w1, b1 = weights
    shapes = [jax.ShapeDtypeStruct((share, b, heads, degree * d, w), jnp.float32) for w in (d, tiles.COLUMNS)]

    def of_power(x, axis):  # the part of one power of [b, h, ...]
        block = [None, None, *x.shape[2:]]
        block[axis] = d
        index = lambda i, h, b: (b, h, *(jax.lax.rem(i, degree) if j == axis else 0 for j in range(2, x.ndim)))  # noqa: E731
        return pl.BlockSpec(tuple(block), index)

    dy = jax.ShapeDtypeStruct((b, heads, padded, degree * d), q.dtype)
    dy, state, normaliser = pl.pallas_call(
        functools.partial(_query_kernel, phi=gpu_phi.make(spec, q.dtype, interpret), tile=tile, each=each),
        grid=(degree * share, heads, b),
        in_specs=[
            *(tiles.tokens_spec(q), tiles.tokens_spec(dn), tiles.vector_spec(dl)),
            *(tiles.head_spec(w0), tiles.head_spec(b0), power_spec(w1, d, degree), power_spec(b1, d, degree)),
            *(of_power(sums[0], 2), of_power(sums[1], 2)),
        ],
        out_specs=[
            pl.BlockSpec((None, None, padded, d), lambda i, h, b: (b, h, 0, jax.lax.rem(i, degree))),
            *(power_out_spec(x, d, degree) for x in shapes),
        ],
        out_shape=[dy, *shapes],
        compiler_params=tiles.params(tile),
        interpret=interpret,
        name="hybrid_query_backward",
    )(q, dn, dl, *weights, *sums)
    return dy, state.sum(axis=0), normaliser.sum(axis=(0, -1))


def _query_kernel(
    q_ref, dn_ref, dl_ref, w0, b0, w1, b1, s_ref, z_ref, dy_ref, state_ref, normaliser_ref, *, phi, tile, each
):
    power, first = jax.lax.rem(pl.program_id(0), phi.spec.degree), jax.lax.div(pl.program_id(0), phi.spec.degree) * each
    d = q_ref.shape[1]
    s, z = s_ref[...], z_ref[...]

    def step(t, sums):
        start = (first + t) * tile.rows
        q, dn = (tiles.rows(x, start, tile.rows) for x in (q_ref, dn_ref))
        dl = tiles.rows(dl_ref, start, tile.rows)
        (y,) = phi.pre_activations(q, (w0, b0, w1, b1), tile.chunk)
        features, slope = phi.features_and_slope(y, power)
        features = features.astype(q.dtype).T
        dy = (dot(dn, s.T) + dl[:, None] * z[None]) * slope
        tiles.store_rows(dy_ref, start, dy)
        parts = tiles.columns(*tiles.two_parts(dl, q.dtype)).astype(q.dtype)
        return sums[0] + dot(features, dn), sums[1] + dot(features, parts)

    zeros = jnp.zeros((d, d), jnp.float32), jnp.zeros((d, tiles.COLUMNS), jnp.float32)
    state_ref[...], normaliser_ref[...] = jax.lax.fori_loop(0, each, step, zeros)


def key(
    k: Float[Array, "b n h d"],
    v: Float[Array, "b n h d"],
    keep: Float[Array, "n"],
    weights: Weights,
    sums: tuple[Float[Array, "b h f d"], Float[Array, "b h f"]],
    spec: FeatureMapSpec,
    sizes: Tiles,
    interpret: bool,
    values: bool,
) -> tuple[Float[Array, "b h m f"], Float[Array, "b n h d"] | None]:
    """(dy of φ_k, dv or None); zero for keys that `keep` leaves out.

    Args:
        k: keys.
        v: values.
        keep: 1.0 for the keys of L, 0.0 for others.
        weights: of φ_k.
        sums: dS in the dtype of `k` and dz in float32, from `query`.
        spec: of φ.
        sizes: of tiles.
        interpret: run on any platform, slowly.
        values: whether dv is asked for.
    """
    (b, n, heads, d), tile = k.shape, sizes.key
    padded = pl.cdiv(n, tiles.LONGEST) * tiles.LONGEST
    dy = jax.ShapeDtypeStruct((b, heads, padded, spec.degree * d), k.dtype)
    outs = [dy, jax.ShapeDtypeStruct(v.shape, v.dtype)][: 2 if values else 1]
    outs = pl.pallas_call(
        functools.partial(_key_kernel, phi=gpu_phi.make(spec, k.dtype, interpret), tile=tile),
        grid=(padded // tile.rows, heads, b),
        in_specs=[
            *(tiles.tokens_spec(k), tiles.tokens_spec(v), pl.BlockSpec((n,), lambda i, h, b: (0,))),
            tuple(tiles.head_spec(x) for x in weights),
            *(tiles.vector_spec(x) for x in sums),
        ],
        out_specs=[tiles.vector_spec(dy), tiles.tokens_spec(v)][: len(outs)],
        out_shape=outs,
        compiler_params=tiles.params(tile),
        interpret=interpret,
        name="hybrid_key_backward",
    )(k, v, keep, weights, *sums)
    return outs[0], outs[1] if values else None


def _key_kernel(k_ref, v_ref, keep_ref, weights, s_ref, z_ref, dy_ref, dv_ref=None, *, phi, tile):
    start = pl.program_id(0) * tile.rows
    k, v = (tiles.rows(x, start, tile.rows) for x in (k_ref, v_ref))
    keep = tiles.rows(keep_ref, start, tile.rows)[:, None] > 0
    dv = jnp.zeros(v.shape, jnp.float32)
    for power, of_power, y in phi.each_power(k, weights, tile):
        s, z = s_ref[of_power, :], z_ref[of_power]
        features, slope = phi.features_and_slope(y, power)
        dy = jnp.where(keep, (dot(v, s.T) + z[None]) * slope, 0.0)
        dy_ref[pl.ds(start, tile.rows), of_power] = dy.astype(k.dtype)
        if dv_ref is not None:
            dv += dot(features.astype(k.dtype), s)
    if dv_ref is not None:
        tiles.store_rows(dv_ref, start, jnp.where(keep, dv, 0.0))


def parameters(
    x: Float[Array, "b n h d"],
    dy: Float[Array, "b h m f"],
    weights: Weights,
    spec: FeatureMapSpec,
    sizes: Tiles,
    interpret: bool,
) -> tuple[Array, Array, Array, Array]:
    """Gradients of w0 [h, d, hidden], b0 [h, hidden], w1 [h, hidden, f], b1 [h, f], float32; hidden as in `weights`."""
    (b, _, heads, d), tile, f = x.shape, sizes.weights, dy.shape[-1]
    w0, b0, w1, _ = weights
    hidden, chunk = w0.shape[-1], tile.chunk
    chunks = hidden // chunk
    share, each = tiles.splits(sizes.programs, b * heads * chunks, dy.shape[2] // tile.rows)

    def chunk_of(i):
        return jax.lax.rem(i, chunks)

    def out_spec(x):  # the columns of [programs, b, h, ..., hidden] that a program's chunk makes
        block = (None, None, None, *x.shape[3:-1], chunk)
        middle = (0,) * (len(x.shape) - 4)
        return pl.BlockSpec(block, lambda i, h, b: (jax.lax.div(i, chunks), b, h, *middle, chunk_of(i)))

    sums = [jax.ShapeDtypeStruct((share, b, heads, *x), jnp.float32) for x in ((d, hidden), (hidden,), (f, hidden))]
    phi = gpu_phi.make(spec, x.dtype, interpret)
    outs = pl.pallas_call(
        functools.partial(_parameters_kernel, phi=phi, tile=tile, each=each, chunks=chunks),
        grid=(chunks * share, heads, b),
        in_specs=[
            *(tiles.tokens_spec(x), tiles.vector_spec(dy)),
            pl.BlockSpec((None, d, chunk), lambda i, h, b: (h, 0, chunk_of(i))),
            pl.BlockSpec((None, chunk), lambda i, h, b: (h, chunk_of(i))),
            pl.BlockSpec((None, chunk, f), lambda i, h, b: (h, chunk_of(i), 0)),
        ],
        out_specs=[out_spec(x) for x in sums],
        out_shape=sums,
        compiler_params=tiles.params(tile),
        interpret=interpret,
        name="hybrid_parameters_backward",
    )(x, dy, w0, b0, w1)
    dw0, db0, dw1 = (o.sum(axis=(0, 1)) for o in outs)
    # Another look at dy takes as long as this sum would in every program, each of which has all of dy.
    return dw0, db0, dw1.swapaxes(1, 2), dy.sum(axis=(0, 2), dtype=jnp.float32)


def _parameters_kernel(x_ref, dy_ref, w0_ref, b0_ref, w1_ref, dw0_ref, db0_ref, dw1_ref, *, phi, tile, each, chunks):
    d, slices = x_ref.shape[1], dy_ref.shape[1] // x_ref.shape[1]
    parts = [pl.ds(s * d, d) for s in range(slices)]
    first = jax.lax.div(pl.program_id(0), chunks) * each
    w0, b0, w1 = w0_ref[...], b0_ref[...], [w1_ref[:, part] for part in parts]

    def step(t, sums):
        dw0, db0, dw1 = sums
        start = (first + t) * tile.rows
        x = tiles.rows(x_ref, start, tile.rows)
        dys = [tiles.rows(dy_ref, start, tile.rows, part) for part in parts]
        h, slope = phi.gelu_and_slope(dot(x, w0) + b0[None])
        h = h.astype(x.dtype)
        da = sum(dot(dy, w.T) for dy, w in zip(dys, w1)) * slope
        # dw1 transposed: the matrix unit's first operand has at least 64 rows, and a chunk may have 32.
        dw1 = tuple(dw + dot(dy.T, h) for dw, dy in zip(dw1, dys))
        return dw0 + dot(x.T, da.astype(x.dtype)), db0 + da.sum(axis=0), dw1

    zeros = functools.partial(jnp.zeros, dtype=jnp.float32)
    sums = (
        zeros((d, tile.chunk)),
        zeros((tile.chunk,)),
        (zeros((d, tile.chunk)),) * slices,
    )
    dw0_ref[...], db0_ref[...], dw1 = jax.lax.fori_loop(0, each, step, sums)
    for part, dw in zip(parts, dw1):
        dw1_ref[part, :] = dw


def inputs(
    x: Float[Array, "b n h d"],
    dy: Float[Array, "b h m f"],
    weights: Weights,
    spec: FeatureMapSpec,
    sizes: Tiles,
    interpret: bool,
) -> Float[Array, "b n h d"]:
    """Gradient in what φ is applied to, in the dtype of `x`."""
    (b, n, heads, _), tile = x.shape, sizes.inputs
    return pl.pallas_call(
        functools.partial(_inputs_kernel, phi=gpu_phi.make(spec, x.dtype, interpret), tile=tile),
        grid=(pl.cdiv(n, tile.rows), heads, b),
        in_specs=[
            *(tiles.tokens_spec(x), tiles.vector_spec(dy)),
            *(tiles.head_spec(w) for w in weights[:3]),
        ],
        out_specs=tiles.tokens_spec(x),
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        compiler_params=tiles.params(tile),
        interpret=interpret,
        name="hybrid_inputs_backward",
    )(x, dy, *weights[:3])


def _inputs_kernel(x_ref, dy_ref, w0_ref, b0_ref, w1_ref, dx_ref, *, phi, tile):
    d = x_ref.shape[1]
    start = pl.program_id(0) * tile.rows
    x = tiles.rows(x_ref, start, tile.rows)
    parts = [pl.ds(s * d, d) for s in range(dy_ref.shape[1] // d)]
    dys = [tiles.rows(dy_ref, start, tile.rows, part) for part in parts]

    def step(j, dx):
        hidden = pl.ds(j * tile.chunk, tile.chunk)
        w0 = w0_ref[:, hidden]
        _, slope = phi.gelu_and_slope(dot(x, w0) + b0_ref[hidden][None])
        da = sum(dot(dy, w1_ref[hidden, part].T) for dy, part in zip(dys, parts)) * slope
        return dx + dot(da.astype(x.dtype), w0.T)

    dx = jax.lax.fori_loop(0, w0_ref.shape[1] // tile.chunk, step, jnp.zeros(x.shape, jnp.float32))
    tiles.store_rows(dx_ref, start, dx)
