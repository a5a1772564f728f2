"""The linear part of hybrid attention on a GPU, forward: two Pallas kernels on Triton.

`features` writes φ_k(k_j) in 16 bits, for the keys of L and, where those have a regular stride (`gpu_hybrid`), for no
others; `gpu_products` sums them with the values to the state and the normaliser. (One kernel for both, which computed
φ_k's first layer once per power for want of registers, took 0.52 ms on an H200 for 32,760 keys and 12 heads, `features`
0.30; attention at R = 8 went from 2.35 to 2.19 ms.)

`read` goes over tiles of queries and writes Eq. 5's output, with the softmax part's sums given, or the linear part's
own sums. φ_q is fused in, but where a backward pass will want the features of queries, too: then `features` writes them
first. So a block that is computed anew for its backward pass, but for what `ops.residuals` keeps, gets them back
without its softmax.

Floor, multiply-adds a token and head at D = 128, F = hidden = 256: φ 98,304, the read-out 32,768. With
32,760 tokens, as many keys and 12 heads that is 0.18 TFLOP together, 0.23 ms at the 780 TFLOP/s that an H100 reaches at
best; 0.17 TFLOP with the keys of L at R = 8, 0.14 at R = 2. Element-wise work takes about as long where it doesn't
overlap. Memory: 0.3 GB each, 0.14 ms together.

The state is read in 16 bits: that adds a hundredth to the output's error, most of which is its own rounding and that of
the features.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from hybrid_dit.array_typing import Array, Float
from hybrid_dit.ops.kernels import gpu_phi
from hybrid_dit.ops.kernels import gpu_tiles as tiles
from hybrid_dit.ops.kernels.gpu_tiles import Tiles, dot
from hybrid_dit.ops.spec import FeatureMapSpec

Weights = tuple[Array, Array, Array, Array]  # of one map, from `gpu_phi.operands`
State = tuple[Array, Array]  # [b, h, f, d] in the inputs' dtype, and the normaliser [b, h, f] in float32


def features(
    x: Float[Array, "b n h d"],
    keep: Float[Array, "n"] | None,
    weights: Weights,
    spec: FeatureMapSpec,
    sizes: Tiles,
    interpret: bool,
    skip: int = 0,
) -> Float[Array, "b h m f"]:
    """φ(x_i) in the dtype of `x`, [b, h, m, f] with m = `tiles.length(n, skip)`.

    Args:
        x: queries or keys.
        keep: 0 for tokens whose features are 0.
        weights: of the map.
        spec: of φ.
        sizes: of tiles.
        interpret: run on any platform, slowly.
        skip: leave out the tokens whose number it divides; the others' features follow each other.

    Returns:
        Features. Those of rows past the last token are 0 with `keep` or `skip`, and φ(0) otherwise.
    """
    tile, keep, (b, n, heads, d) = sizes.features, tiles.given(keep), x.shape
    shape = jax.ShapeDtypeStruct((b, heads, tiles.length(n, skip), spec.degree * d), x.dtype)
    return pl.pallas_call(
        functools.partial(_features_kernel, phi=gpu_phi.make(spec, x.dtype, interpret), tile=tile, skip=skip),
        grid=(shape.shape[2] // tile.rows, heads, b),
        in_specs=[
            tiles.tokens_spec(x),
            tuple(pl.BlockSpec(z.shape, lambda i, h, b: (0,)) for z in keep),
            tuple(tiles.head_spec(w) for w in weights),
        ],
        out_specs=tiles.vector_spec(shape),
        out_shape=shape,
        compiler_params=tiles.params(tile),
        interpret=interpret,
        name="hybrid_features",
    )(x, keep, weights)


def _features_kernel(x_ref, keep_ref, weights, out_ref, *, phi, tile, skip):
    start = pl.program_id(0) * tile.rows
    at = tiles.span(start, tile.rows, skip)
    for power, of_power, y in phi.each_power(tiles.rows(x_ref, at), weights, tile):
        features = phi.features(y, power)
        if keep_ref or skip:
            kept = tiles.rows(keep_ref[0], at) > 0 if keep_ref else at < x_ref.shape[0]
            features = jnp.where(kept[:, None], features, 0.0)
        out_ref[pl.ds(start, tile.rows), of_power] = features.astype(out_ref.dtype)


def read(
    q: Float[Array, "b n h d"],
    softmax: tuple[Array, Array] | None,
    weights: Weights,
    sums: State,
    spec: FeatureMapSpec,
    sizes: Tiles,
    interpret: bool,
    divide: bool = True,
    given: Float[Array, "b h m f"] | None = None,
) -> tuple[Float[Array, "b n h d"], Float[Array, "b h n"]]:
    """φ_q(q_i)·state and φ_q(q_i)·normaliser, with the softmax part added.

    Args:
        q: queries.
        softmax: softmax attention over S [b, n, h, d] and the weight [b, h, n] with which it enters Eq. 5: its
            numerator is their product. None without S.
        weights: of φ_q.
        sums: of the keys.
        spec: of φ.
        sizes: of tiles.
        interpret: run on any platform, slowly.
        divide: whether to write Eq. 5's quotient in the dtype of `q`, or its numerator in float32.
        given: φ_q(q_i), from `features`; computed here otherwise.

    Returns:
        (quotient or numerator, denominator in float32).
    """
    (b, n, heads, _), tile = q.shape, sizes.read if given is None else sizes.read_given
    out = jax.ShapeDtypeStruct(q.shape, q.dtype if divide else jnp.float32)
    denominator = jax.ShapeDtypeStruct((b, heads, n), jnp.float32)
    softmax = () if softmax is None else softmax
    of, of_specs = (q, *weights), (tiles.tokens_spec(q), *(tiles.head_spec(x) for x in weights))
    if given is not None:
        of, of_specs = (given,), (tiles.vector_spec(given),)
    return pl.pallas_call(
        functools.partial(_read_kernel, phi=gpu_phi.make(spec, q.dtype, interpret), tile=tile, divide=divide),
        grid=(pl.cdiv(n, tile.rows), heads, b),
        in_specs=[
            of_specs,
            tuple(f(x) for f, x in zip((tiles.tokens_spec, tiles.vector_spec), softmax)),
            tuple(tiles.vector_spec(x) for x in sums),
        ],
        out_specs=(tiles.tokens_spec(out), tiles.vector_spec(denominator)),
        out_shape=(out, denominator),
        compiler_params=tiles.params(tile),
        interpret=interpret,
        name="hybrid_read",
    )(of, softmax, sums)


def _read_kernel(of, softmax, sums, out_ref, denominator_ref, *, phi, tile, divide):
    start, (state_ref, normaliser_ref) = pl.program_id(0) * tile.rows, sums
    at = tiles.span(start, tile.rows)
    numerator = jnp.zeros((tile.rows, out_ref.shape[1]), jnp.float32)
    denominator = jnp.zeros((tile.rows,), jnp.float32)
    for of_power, features in _features_of(of, start, phi, tile, out_ref.shape[1]):
        # Not of rounded features where they are computed here: rounding each for a sum of float32 costs more than it.
        numerator += dot(features.astype(state_ref.dtype), state_ref[of_power, :])
        denominator += (features.astype(jnp.float32) * normaliser_ref[of_power][None]).sum(axis=1)
    if softmax:
        weight = tiles.rows(softmax[1], at)
        numerator += tiles.rows(softmax[0], at).astype(jnp.float32) * weight[:, None]
        denominator += weight
    if divide:
        numerator = numerator * (1.0 / jnp.maximum(denominator, tiles.TINY))[:, None]
    tiles.store_rows(out_ref, at, numerator)
    tiles.store_rows(denominator_ref, at, denominator)


def _features_of(of, start, phi, tile, d):
    """Yields (columns, features) of every power: read, or computed in float32 from (queries, weights)."""
    if len(of) == 1:
        for part in tiles.slices(d, of[0].shape[1]):
            yield part, of[0][pl.ds(start, tile.rows), part]
        return
    q_ref, *weights = of
    q = tiles.rows(q_ref, tiles.span(start, tile.rows))
    for power, of_power, y in phi.each_power(q, weights, tile):
        yield of_power, phi.features(y, power)
