"""Gradient of the linear part on a GPU: four Pallas kernels on Triton, which read the features that the forward kept.

With n_i = φ_q(q_i) S and l_i = φ_q(q_i)·z, the numerator and denominator of the linear part, and their cotangents:

    dφ_q(q_i) = dn_i Sᵀ + dl_i z                  dS = Σ_i φ_q(q_i)ᵀ dn_i,  dz = Σ_i dl_i φ_q(q_i)        `query`
    dφ_k(k_j) = v_j dSᵀ + dz                      dv_j = φ_k(k_j) dS           for j in L                 `key`

Both write the cotangent dy of φ's pre-activations (in 16 bits, [b, h, m, f]). With the map x -> gelu(a) w1 + b1 where
a = x w0 + b0 and h = gelu(a), there follow from it

    da = (dy w1ᵀ) gelu'(a),  dx = da w0ᵀ          of every token, with h                                  `hidden`
    dw1 = Σ_i h_iᵀ dy_i,  dw0 = Σ_i x_iᵀ da_i                                                             `products`

and column sums for the biases, by XLA. Distillation needs no dx. Sums over tokens are taken by several programs and
added in fixed order.

Floor, multiply-adds a token and head at D = 128, F = hidden = 256: `query` 65,536, `key` 32,768 and as many for dv,
`hidden` 98,304 and 32,768 for dx, `products` 98,304; the latter two for both maps. That is 0.38 TFLOP for stage 1 and
0.46 for stage 3 with 32,760 tokens and 12 heads, 0.5 and 0.6 ms at 780 TFLOP/s. Memory: features, dy, h and da, 0.2 GB
each and map, are written once and read once or twice, 2.6 GB with q, k, v and dn: 0.6 ms at 4.3 TB/s.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from hybrid_dit.array_typing import Array, Float
from hybrid_dit.ops.kernels import gpu_phi
from hybrid_dit.ops.kernels import gpu_tiles as tiles
from hybrid_dit.ops.kernels.gpu_linear import Weights, power_features_spec, power_out_spec
from hybrid_dit.ops.kernels.gpu_tiles import Tiles, dot
from hybrid_dit.ops.spec import FeatureMapSpec


def query(
    features: Float[Array, "b h m f"],
    dn: Float[Array, "b n h d"],
    dl: Float[Array, "b h n"],
    sums: tuple[Float[Array, "b h f d"], Float[Array, "b h f"]],
    spec: FeatureMapSpec,
    sizes: Tiles,
    interpret: bool,
) -> tuple[Float[Array, "b h m f"], Float[Array, "b h f d"], Float[Array, "b h f"]]:
    """(dy of φ_q, dS, dz), the latter two float32.

    Args:
        features: what `gpu_linear.read` kept.
        dn: cotangent of the numerator, in the dtype of the queries.
        dl: of the denominator, float32.
        sums: state S and normaliser z, in the dtype of the queries and float32.
        spec: of φ.
        sizes: of tiles.
        interpret: run on any platform, slowly.
    """
    (b, _, heads, d), tile, degree = dn.shape, sizes.query, spec.degree
    share, each = tiles.splits(sizes.programs, b * heads * degree, features.shape[2] // tile.rows)
    shapes = [jax.ShapeDtypeStruct((share, b, heads, degree * d, w), jnp.float32) for w in (d, tiles.COLUMNS)]

    def of_power(x, axis):  # the part of one power of [b, h, ...]
        block = [None, None, *x.shape[2:]]
        block[axis] = d
        index = lambda i, h, b: (b, h, *(jax.lax.rem(i, degree) if j == axis else 0 for j in range(2, x.ndim)))  # noqa: E731
        return pl.BlockSpec(tuple(block), index)

    dy, state, normaliser = pl.pallas_call(
        functools.partial(_query_kernel, phi=gpu_phi.make(spec, dn.dtype, interpret), tile=tile, each=each),
        grid=(degree * share, heads, b),
        in_specs=[
            *(power_features_spec(dn, degree), tiles.tokens_spec(dn), tiles.vector_spec(dl)),
            *(of_power(sums[0], 2), of_power(sums[1], 2)),
        ],
        out_specs=[power_features_spec(dn, degree), *(power_out_spec(x, d, degree) for x in shapes)],
        out_shape=[jax.ShapeDtypeStruct(features.shape, features.dtype), *shapes],
        compiler_params=tiles.params(tile),
        interpret=interpret,
        name="hybrid_query_backward",
    )(features, dn, dl, *sums)
    return dy, state.sum(axis=0), normaliser.sum(axis=(0, -1))


def _query_kernel(kept_ref, dn_ref, dl_ref, s_ref, z_ref, dy_ref, state_ref, normaliser_ref, *, phi, tile, each):
    power, first = jax.lax.rem(pl.program_id(0), phi.spec.degree), jax.lax.div(pl.program_id(0), phi.spec.degree) * each
    d = dn_ref.shape[1]
    s, z = s_ref[...], z_ref[...]

    def step(t, sums):
        start = (first + t) * tile.rows
        kept, dn, dl = (tiles.rows(x, start, tile.rows) for x in (kept_ref, dn_ref, dl_ref))
        features, slope = phi.features_and_slope(kept.astype(jnp.float32), power)
        features = features.astype(dn.dtype).T
        dy = (dot(dn, s.T) + dl[:, None] * z[None]) * slope
        tiles.store_rows(dy_ref, start, dy)
        parts = tiles.columns(*tiles.two_parts(dl, dn.dtype)).astype(dn.dtype)
        return sums[0] + dot(features, dn), sums[1] + dot(features, parts)

    zeros = jnp.zeros((d, d), jnp.float32), jnp.zeros((d, tiles.COLUMNS), jnp.float32)
    state_ref[...], normaliser_ref[...] = jax.lax.fori_loop(0, each, step, zeros)


def key(
    features: Float[Array, "b h m f"],
    v: Float[Array, "b n h d"],
    keep: Float[Array, "n"],
    sums: tuple[Float[Array, "b h f d"], Float[Array, "b h f"]],
    spec: FeatureMapSpec,
    sizes: Tiles,
    interpret: bool,
    values: bool,
) -> tuple[Float[Array, "b h m f"], Float[Array, "b n h d"] | None]:
    """(dy of φ_k, dv or None); zero for keys that `keep` leaves out.

    Args:
        features: what `gpu_linear.state` kept.
        v: values.
        keep: 1.0 for the keys of L, 0.0 for others.
        sums: dS in the dtype of `v` and dz in float32, from `query`.
        spec: of φ.
        sizes: of tiles.
        interpret: run on any platform, slowly.
        values: whether dv is asked for.
    """
    (b, n, heads, _), tile = v.shape, sizes.key
    shapes = [jax.ShapeDtypeStruct(x.shape, v.dtype) for x in (features, v)[: 2 if values else 1]]
    dy, *dv = pl.pallas_call(
        functools.partial(_key_kernel, phi=gpu_phi.make(spec, v.dtype, interpret), tile=tile),
        grid=(features.shape[2] // tile.rows, heads, b),
        in_specs=[
            *(tiles.vector_spec(features), tiles.tokens_spec(v), pl.BlockSpec((n,), lambda i, h, b: (0,))),
            *(tiles.vector_spec(x) for x in sums),
        ],
        out_specs=[tiles.vector_spec(features), tiles.tokens_spec(v)][: len(shapes)],
        out_shape=shapes,
        compiler_params=tiles.params(tile),
        interpret=interpret,
        name="hybrid_key_backward",
    )(features, v, keep, *sums)
    return dy, dv[0] if values else None


def _key_kernel(kept_ref, v_ref, keep_ref, s_ref, z_ref, dy_ref, dv_ref=None, *, phi, tile):
    start = pl.program_id(0) * tile.rows
    v, keep = tiles.rows(v_ref, start, tile.rows), tiles.rows(keep_ref, start, tile.rows)[:, None] > 0
    dv = jnp.zeros(v.shape, jnp.float32)
    for power, of_power in enumerate(tiles.slices(v.shape[1], kept_ref.shape[1])):
        s, z = s_ref[of_power, :], z_ref[of_power]
        kept = kept_ref[pl.ds(start, tile.rows), of_power].astype(jnp.float32)
        features, slope = phi.features_and_slope(kept, power)
        dy = jnp.where(keep, (dot(v, s.T) + z[None]) * slope, 0.0)
        dy_ref[pl.ds(start, tile.rows), of_power] = dy.astype(v.dtype)
        if dv_ref is not None:
            dv += dot(features.astype(v.dtype), s)
    if dv_ref is not None:
        tiles.store_rows(dv_ref, start, jnp.where(keep, dv, 0.0))


def hidden(
    x: Float[Array, "b n h d"],
    dy: Float[Array, "b h m f"],
    weights: Weights,
    spec: FeatureMapSpec,
    sizes: Tiles,
    interpret: bool,
    inputs: bool,
) -> tuple[Float[Array, "b h m u"], Float[Array, "b h m u"], Float[Array, "b n h d"] | None]:
    """(h, da, dx or None) of one map, in the dtype of `x`.

    Args:
        x: what φ is applied to.
        dy: cotangent of its pre-activations, 0 in the rows past those of `x`.
        weights: of the map.
        spec: of φ.
        sizes: of tiles.
        interpret: run on any platform, slowly.
        inputs: whether dx is asked for.
    """
    (b, _, heads, _), tile = x.shape, sizes.hidden
    units = jax.ShapeDtypeStruct((*dy.shape[:3], weights[0].shape[-1]), x.dtype)
    shapes = [units, units, *[jax.ShapeDtypeStruct(x.shape, x.dtype)] * inputs]
    h, da, *dx = pl.pallas_call(
        functools.partial(_hidden_kernel, phi=gpu_phi.make(spec, x.dtype, interpret), tile=tile),
        grid=(dy.shape[2] // tile.rows, heads, b),
        in_specs=[
            *(tiles.tokens_spec(x), tiles.vector_spec(dy)),
            *(tiles.head_spec(w) for w in weights[:3]),
        ],
        out_specs=[tiles.vector_spec(units), tiles.vector_spec(units), tiles.tokens_spec(x)][: len(shapes)],
        out_shape=shapes,
        compiler_params=tiles.params(tile),
        interpret=interpret,
        name="hybrid_hidden_backward",
    )(x, dy, *weights[:3])
    return h, da, dx[0] if inputs else None


def _hidden_kernel(x_ref, dy_ref, w0_ref, b0_ref, w1_ref, h_ref, da_ref, dx_ref=None, *, phi, tile):
    start = pl.program_id(0) * tile.rows
    here, parts = pl.ds(start, tile.rows), tiles.slices(x_ref.shape[1], dy_ref.shape[1])
    x = tiles.rows(x_ref, start, tile.rows)
    dys = [dy_ref[here, part] for part in parts]

    def step(j, dx):
        units = pl.ds(j * tile.chunk, tile.chunk)
        w0 = w0_ref[:, units]
        h, slope = phi.gelu_and_slope(dot(x, w0) + b0_ref[units][None])
        da = (sum(dot(dy, w1_ref[units, part].T) for dy, part in zip(dys, parts)) * slope).astype(x.dtype)
        h_ref[here, units], da_ref[here, units] = h.astype(x.dtype), da
        return dx if dx_ref is None else dx + dot(da, w0.T)

    zero = 0 if dx_ref is None else jnp.zeros(x.shape, jnp.float32)
    dx = jax.lax.fori_loop(0, w0_ref.shape[1] // tile.chunk, step, zero)
    if dx_ref is not None:
        tiles.store_rows(dx_ref, start, dx)


def products(
    x: Float[Array, "b _ _ u"],
    y: Float[Array, "b h m f"],
    d: int,
    sizes: Tiles,
    interpret: bool,
) -> Float[Array, "h u f"]:
    """Σ_i x_iᵀ y_i over tokens and videos, float32, for every head.

    Args:
        x: one side, [b, h, m, u] as `y`, or [b, n, h, d] as inputs have it; then tokens may be fewer than m.
        y: the other.
        d: width of a head; the last axes are multiples.
        sizes: of tiles.
        interpret: run on any platform, slowly.
    """
    (b, heads, m, f), tile = y.shape, sizes.products
    in_rows = x.shape[:3] != y.shape[:3]
    left, right = x.shape[3] // d, f // d
    wide = 2 - right % 2  # slices of y that a program takes: as many as accumulators fit registers
    groups = right // wide
    share, each = tiles.splits(sizes.programs, b * heads * left * groups, m // tile.rows)

    def split(i):  # (which programs, slice of x, slices of y); those that read the same tokens run side by side
        rest = jax.lax.div(i, left)
        return jax.lax.div(rest, groups), jax.lax.rem(i, left), jax.lax.rem(rest, groups)

    if in_rows:
        x_spec = pl.BlockSpec((None, x.shape[1], None, d), lambda i, h, b: (b, 0, h, split(i)[1]))
    else:
        x_spec = pl.BlockSpec((None, None, m, d), lambda i, h, b: (b, h, 0, split(i)[1]))
    shape = jax.ShapeDtypeStruct((share, b, heads, left * d, f), jnp.float32)
    out = pl.pallas_call(
        functools.partial(_products_kernel, tile=tile, each=each, programs=left * groups),
        grid=(left * groups * share, heads, b),
        in_specs=[x_spec, pl.BlockSpec((None, None, m, wide * d), lambda i, h, b: (b, h, 0, split(i)[2]))],
        out_specs=pl.BlockSpec((None, None, None, d, wide * d), lambda i, h, b: (split(i)[0], b, h, *split(i)[1:])),
        out_shape=shape,
        compiler_params=tiles.params(tile),
        interpret=interpret,
        name="hybrid_products_backward",
    )(x, y)
    return out.sum(axis=(0, 1))


def _products_kernel(x_ref, y_ref, out_ref, *, tile, each, programs):
    first = jax.lax.div(pl.program_id(0), programs) * each
    d = x_ref.shape[1]
    parts = tiles.slices(d, y_ref.shape[1])

    def step(t, sums):
        start = (first + t) * tile.rows
        x = tiles.rows(x_ref, start, tile.rows).T
        return tuple(s + dot(x, tiles.rows(y_ref, start, tile.rows, part)) for s, part in zip(sums, parts))

    sums = jax.lax.fori_loop(0, each, step, (jnp.zeros((d, d), jnp.float32),) * len(parts))
    for part, total in zip(parts, sums):
        out_ref[:, part] = total
