"""The linear part of hybrid attention on a GPU, φ fused in: two Pallas kernels on Triton.

`state` goes over tiles of keys and sums Σ_L φ_k(k_j)ᵀ v_j and Σ_L φ_k(k_j), several programs for a head and power,
whose sums are then added in a fixed order: no atomics, the same bits every time. `read` goes over tiles of queries and
writes Eq. 5's output, with the softmax part's sums given, or the linear part's own sums.

Floor, multiply-adds a token and head at D = 128, F = hidden = 256: φ 98,304, state and read-out 32,768 each, φ_k's
first layer once per power. So 163,840 for `state` and 131,072 for `read`, 0.23 TFLOP together for 32,760 tokens and 12
heads: 0.3 ms at the 780 TFLOP/s that an H100 reaches at best. Element-wise work takes about as long where it doesn't
overlap. Memory: q, k, v in, y out, 0.4 GB, 0.12 ms.

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


def state(
    k: Float[Array, "b n h d"],
    v: Float[Array, "b n h d"],
    keep: Float[Array, "n"],
    weights: Weights,
    spec: FeatureMapSpec,
    sizes: Tiles,
    interpret: bool,
    keep_features: bool = False,
) -> tuple[Float[Array, "b h f d"], Float[Array, "b h f"], Float[Array, "b h m f"] | None]:
    """Σ_j keep_j φ_k(k_j)ᵀ v_j and Σ_j keep_j φ_k(k_j), float32; what `key` reads of the features, or None."""
    (b, n, heads, d), tile, degree = k.shape, sizes.state, spec.degree
    share, each = tiles.splits(sizes.programs, b * heads * degree, pl.cdiv(n, tile.rows))
    w0, b0, w1, b1 = weights
    grid = (degree * share, heads, b)  # power first: programs that read the same keys run at the same time

    shapes = [jax.ShapeDtypeStruct((share, b, heads, degree * d, w), jnp.float32) for w in (d, tiles.COLUMNS)]
    specs = [power_out_spec(x, d, degree) for x in shapes]
    if keep_features:
        shapes.append(features_shape(k, degree))
        specs.append(power_features_spec(k, degree))
    sums, normaliser, *features = pl.pallas_call(
        functools.partial(_state_kernel, phi=gpu_phi.make(spec, k.dtype, interpret), tile=tile, each=each),
        grid=grid,
        in_specs=[
            tiles.tokens_spec(k),
            tiles.tokens_spec(v),
            pl.BlockSpec((n,), lambda i, h, b: (0,)),
            *(tiles.head_spec(w0), tiles.head_spec(b0), power_spec(w1, d, degree), power_spec(b1, d, degree)),
        ],
        out_specs=specs,
        out_shape=shapes,
        compiler_params=tiles.params(tile),
        interpret=interpret,
        name="hybrid_state",
    )(k, v, keep, w0, b0, w1, b1)
    return sums.sum(axis=0), normaliser[..., 0].sum(axis=0), features[0] if features else None


def _state_kernel(k_ref, v_ref, keep_ref, w0, b0, w1, b1, state_ref, normaliser_ref, kept_ref=None, *, phi, tile, each):
    power, first = jax.lax.rem(pl.program_id(0), phi.spec.degree), jax.lax.div(pl.program_id(0), phi.spec.degree) * each
    d = k_ref.shape[1]

    def step(t, sums):
        start = (first + t) * tile.rows
        k, v = tiles.rows(k_ref, start, tile.rows), tiles.rows(v_ref, start, tile.rows)
        keep = tiles.rows(keep_ref, start, tile.rows)
        (y,) = phi.pre_activations(k, (w0, b0, w1, b1), tile.chunk)
        features = jnp.where(keep[:, None] > 0, phi.features(y, power), 0.0)
        if kept_ref is not None:
            tiles.store_rows(kept_ref, start, phi.kept(y, features))
        features = features.astype(k.dtype).T
        return sums[0] + dot(features, v), sums[1] + dot(features, tiles.columns(keep).astype(k.dtype))

    zeros = jnp.zeros((d, d), jnp.float32), jnp.zeros((d, tiles.COLUMNS), jnp.float32)
    state_ref[...], normaliser_ref[...] = jax.lax.fori_loop(0, each, step, zeros)


# In a grid (powers · programs that share a head, heads, videos):


def power_spec(x: Array, d: int, degree: int) -> pl.BlockSpec:
    """The d last columns of [h, ..., f] that make a program's power."""
    return pl.BlockSpec((None, *x.shape[1:-1], d), lambda i, h, b: (h, *(0,) * (x.ndim - 2), jax.lax.rem(i, degree)))


def power_out_spec(x: jax.ShapeDtypeStruct, d: int, degree: int) -> pl.BlockSpec:
    """The d rows of [programs, b, h, f, ...] that a program's power makes."""
    block = (None, None, None, d, x.shape[-1])
    return pl.BlockSpec(block, lambda i, h, b: (jax.lax.div(i, degree), b, h, jax.lax.rem(i, degree), 0))


def features_shape(x: Array, degree: int) -> jax.ShapeDtypeStruct:
    """[b, h, m, f] with rows padded to a multiple of `LONGEST`."""
    b, n, heads, d = x.shape
    return jax.ShapeDtypeStruct((b, heads, pl.cdiv(n, tiles.LONGEST) * tiles.LONGEST, degree * d), x.dtype)


def power_features_spec(x: Array, degree: int) -> pl.BlockSpec:
    """The d columns of `features_shape` that a program's power makes."""
    block = (None, None, features_shape(x, degree).shape[2], x.shape[3])
    return pl.BlockSpec(block, lambda i, h, b: (b, h, 0, jax.lax.rem(i, degree)))


def read(
    q: Float[Array, "b n h d"],
    softmax: tuple[Array, Array] | None,
    weights: Weights,
    sums: State,
    spec: FeatureMapSpec,
    sizes: Tiles,
    interpret: bool,
    divide: bool = True,
    keep_features: bool = False,
) -> tuple[Float[Array, "b n h d"], Float[Array, "b h n"], Float[Array, "b h m f"] | None]:
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
        keep_features: whether to write what `query` reads of the features.

    Returns:
        (quotient or numerator, denominator in float32, what `query` reads or None).
    """
    (b, n, heads, _), tile = q.shape, sizes.read
    shapes = [
        jax.ShapeDtypeStruct(q.shape, q.dtype if divide else jnp.float32),
        jax.ShapeDtypeStruct((b, heads, n), jnp.float32),
    ]
    specs = [tiles.tokens_spec(shapes[0]), tiles.vector_spec(shapes[1])]
    if keep_features:
        shapes.append(features_shape(q, spec.degree))
        specs.append(tiles.vector_spec(shapes[2]))
    softmax = () if softmax is None else softmax
    out, denominator, *features = pl.pallas_call(
        functools.partial(_read_kernel, phi=gpu_phi.make(spec, q.dtype, interpret), tile=tile, divide=divide),
        grid=(pl.cdiv(n, tile.rows), heads, b),
        in_specs=[
            tiles.tokens_spec(q),
            tuple(f(x) for f, x in zip((tiles.tokens_spec, tiles.vector_spec), softmax)),
            tuple(tiles.head_spec(x) for x in weights),
            tuple(tiles.vector_spec(x) for x in sums),
        ],
        out_specs=specs,
        out_shape=shapes,
        compiler_params=tiles.params(tile),
        interpret=interpret,
        name="hybrid_read",
    )(q, softmax, weights, sums)
    return out, denominator, features[0] if features else None


def _read_kernel(q_ref, softmax, weights, sums, out_ref, denominator_ref, kept_ref=None, *, phi, tile, divide):
    start = pl.program_id(0) * tile.rows
    q, (state_ref, normaliser_ref) = tiles.rows(q_ref, start, tile.rows), sums
    numerator, denominator = jnp.zeros(q.shape, jnp.float32), jnp.zeros(q.shape[:1], jnp.float32)
    for power, of_power, y in phi.each_power(q, weights, tile):
        features = phi.features(y, power)
        if kept_ref is not None:
            kept_ref[pl.ds(start, tile.rows), of_power] = phi.kept(y, features).astype(q.dtype)
        features = features.astype(q.dtype)
        numerator += dot(features, state_ref[of_power, :])
        denominator += (features.astype(jnp.float32) * normaliser_ref[of_power][None]).sum(axis=1)
    if softmax:
        weight = tiles.rows(softmax[1], start, tile.rows)
        numerator += tiles.rows(softmax[0], start, tile.rows).astype(jnp.float32) * weight[:, None]
        denominator += weight
    if divide:
        numerator = numerator * (1.0 / jnp.maximum(denominator, tiles.TINY))[:, None]
    tiles.store_rows(out_ref, start, numerator)
    tiles.store_rows(denominator_ref, start, denominator)
