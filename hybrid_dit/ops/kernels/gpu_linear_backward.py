"""Gradient of the linear part on a GPU: two Pallas kernels on Triton beside `gpu_products`, features given.

With n_i = φ_q(q_i) S and l_i = φ_q(q_i)·z, the numerator and denominator of the linear part, and their cotangents:

    dφ_q(q_i) = dn_i Sᵀ + dl_i z                  dS = Σ_i φ_q(q_i)ᵀ dn_i,  dz = Σ_i dl_i φ_q(q_i)
    dφ_k(k_j) = v_j dSᵀ + dz                      dv_j = φ_k(k_j) dS                          for j in L

`pre_activations` takes both to the cotangents dy of what φ's activations are applied to (16 bits, [b, h, m, f]), the
activation's slope being known from its value. With the map x -> gelu(a) w1 + b1 where a = x w0 + b0 and h = gelu(a),

    da = (dy w1ᵀ) gelu'(a),  dx = da w0ᵀ          of every query and key of L, with h         `hidden`
    dw1 = Σ_i h_iᵀ dy_i,  db1 = Σ_i dy_i,  dw0 = Σ_i x_iᵀ da_i,  db0 = Σ_i da_i.

Distillation needs no dx and dv.

Floor, multiply-adds a token and head at D = 128, F = hidden = 256: `pre_activations` 32,768, and as many for dv;
`hidden` 98,304 and 32,768 for dx. Both run for queries and keys: 0.2 TFLOP for stage 1 and 0.28 for stage 3 with 32,760
of each and 12 heads, 0.26 and 0.36 ms at 780 TFLOP/s; with the keys of L at R = 8, 6% less, at R = 2 a quarter. Memory:
0.5 GB and 0.7 GB for each of the two runs, so 0.24 and 0.33 ms at 4.3 TB/s; and 0.1 GB each to write zeros to dx and dv
first, where the keys of S have no rows among them.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from hybrid_dit.array_typing import Array, Float
from hybrid_dit.ops.kernels import gpu_phi
from hybrid_dit.ops.kernels import gpu_tiles as tiles
from hybrid_dit.ops.kernels.gpu_linear import State, Weights
from hybrid_dit.ops.kernels.gpu_tiles import Tiles, dot
from hybrid_dit.ops.spec import FeatureMapSpec


def pre_activations(
    features: Float[Array, "b h m f"],
    g: Float[Array, "b n h d"],
    weight: Float[Array, "b h n"] | None,
    sums: State,
    spec: FeatureMapSpec,
    sizes: Tiles,
    interpret: bool,
    values: bool = False,
    skip: int = 0,
) -> tuple[Float[Array, "b h m f"], Float[Array, "b n h d"] | None]:
    """(dy_i = (g_i Sᵀ + w_i z) ψ'(y_i), features_i S or None): 0 where the features are 0, and in rows past n.

    Args:
        features: φ of queries or keys.
        g: dn for queries, v for keys.
        weight: w, float32: dl for queries; 1 where None, for keys.
        sums: S and z for queries, dS and dz for keys.
        spec: of φ.
        sizes: of tiles.
        interpret: run on any platform, slowly.
        values: whether the second is asked for: for keys it is dv.
        skip: which tokens the features are not of, as for `gpu_linear.features`; their rows of dv are 0.
    """
    (b, _, heads, _), tile = g.shape, sizes.pre_activations
    weights, zeros = tiles.given(weight), _zeros(g, values, skip)
    shapes = [jax.ShapeDtypeStruct(x.shape, g.dtype) for x in (features, g)[: 2 if values else 1]]
    dy, *out = pl.pallas_call(
        functools.partial(_pre_activations_kernel, phi=gpu_phi.make(spec, g.dtype, interpret), tile=tile, skip=skip),
        grid=(features.shape[2] // tile.rows, heads, b),
        in_specs=[
            *(tiles.vector_spec(features), tiles.tokens_spec(g)),
            tuple(tiles.vector_spec(x) for x in sums),
            tuple(tiles.vector_spec(x) for x in weights),
            tuple(tiles.tokens_spec(x) for x in zeros),
        ],
        out_specs=[tiles.vector_spec(features), tiles.tokens_spec(g)][: len(shapes)],
        out_shape=shapes,
        input_output_aliases={4 + len(weights): 1} if zeros else {},
        compiler_params=tiles.params(tile),
        interpret=interpret,
        name="hybrid_pre_activations_backward",
    )(features, g, sums, weights, zeros)
    return dy, out[0] if values else None


def _zeros(x, wanted, skip) -> tuple[Array, ...]:
    """What a kernel writes rows of, where it does not write all of them."""
    return (jnp.zeros_like(x),) if wanted and skip else ()


def _pre_activations_kernel(features_ref, g_ref, sums, weight_ref, _, dy_ref, out_ref=None, *, phi, tile, skip):
    start = pl.program_id(0) * tile.rows
    here, at = pl.ds(start, tile.rows), tiles.span(start, tile.rows, skip)
    g = tiles.rows(g_ref, at)
    out = jnp.zeros(g.shape, jnp.float32)
    for power, of_power in enumerate(tiles.slices(g.shape[1], features_ref.shape[1])):
        s, z = sums[0][of_power, :], sums[1][of_power][None]
        features = features_ref[here, of_power]
        if weight_ref:
            z = tiles.rows(weight_ref[0], at)[:, None] * z
        dy = (dot(g, s.T) + z) * phi.slope(features.astype(jnp.float32), power)
        dy_ref[here, of_power] = dy.astype(g.dtype)
        if out_ref is not None:
            out += dot(features, s)
    if out_ref is not None:
        tiles.store_rows(out_ref, at, out)


def hidden(
    x: Float[Array, "b n h d"],
    dy: Float[Array, "b h m f"],
    weights: Weights,
    spec: FeatureMapSpec,
    sizes: Tiles,
    interpret: bool,
    inputs: bool,
    skip: int = 0,
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
        skip: which tokens rows of dy are not of, as for `gpu_linear.features`; their rows of dx are 0.
    """
    (b, _, heads, _), tile = x.shape, sizes.hidden
    units = jax.ShapeDtypeStruct((*dy.shape[:3], weights[0].shape[-1]), x.dtype)
    zeros = _zeros(x, inputs, skip)
    shapes = [units, units, *[jax.ShapeDtypeStruct(x.shape, x.dtype)] * inputs]
    h, da, *dx = pl.pallas_call(
        functools.partial(_hidden_kernel, phi=gpu_phi.make(spec, x.dtype, interpret), tile=tile, skip=skip),
        grid=(dy.shape[2] // tile.rows, heads, b),
        in_specs=[
            *(tiles.tokens_spec(x), tiles.vector_spec(dy)),
            *(tiles.head_spec(w) for w in weights[:3]),
            tuple(tiles.tokens_spec(z) for z in zeros),
        ],
        out_specs=[tiles.vector_spec(units), tiles.vector_spec(units), tiles.tokens_spec(x)][: len(shapes)],
        out_shape=shapes,
        input_output_aliases={5: 2} if zeros else {},
        compiler_params=tiles.params(tile),
        interpret=interpret,
        name="hybrid_hidden_backward",
    )(x, dy, *weights[:3], zeros)
    return h, da, dx[0] if inputs else None


def _hidden_kernel(x_ref, dy_ref, w0_ref, b0_ref, w1_ref, _, h_ref, da_ref, dx_ref=None, *, phi, tile, skip):
    start = pl.program_id(0) * tile.rows
    here, parts = pl.ds(start, tile.rows), tiles.slices(x_ref.shape[1], dy_ref.shape[1])
    at = tiles.span(start, tile.rows, skip)
    x = tiles.rows(x_ref, at)
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
        tiles.store_rows(dx_ref, at, dx)
