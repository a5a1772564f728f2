"""Sums over tokens on a GPU, Σ_i a_iᵀ b_i and Σ_i w_i a_i, as one Pallas kernel on Triton.

The linear part's state and normaliser, their gradients, and the gradients of φ's matrices and biases are all of this
form. Several programs share the tokens of a head, and what they find is added in a fixed order: no atomics, the same
bits every time.

Floor at D = 128, F = 256, 32,760 tokens and 12 heads: 0.026 TFLOP and 0.3 GB for the state, 0.07 ms at the 4.3 TB/s
that an H200 copies with; 0.077 TFLOP and 0.7 GB for the gradients of one map's two matrices, 0.16 ms. With the keys of
L at R = 8 an eighth less.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from hybrid_dit.array_typing import Array, Float
from hybrid_dit.ops.kernels import gpu_tiles as tiles
from hybrid_dit.ops.kernels.gpu_tiles import Tiles, dot


def products(
    a: Float[Array, "b h m u"],
    b: Float[Array, "b _ _ w"],
    d: int,
    sizes: Tiles,
    interpret: bool,
    weight: Float[Array, "b h n"] | None = None,
    skip: int = 0,
) -> tuple[Float[Array, "b h u w"], Float[Array, "b h u"]]:
    """(Σ_i a_iᵀ b_i, Σ_i w_i a_i) over tokens, float32.

    Args:
        a: one side.
        b: the other, [b, h, m, w] as `a`, or [b, n, h, d], of which `a` has all tokens, or those that `skip` leaves.
        d: width of a head; the last axes are multiples.
        sizes: of tiles.
        interpret: run on any platform, slowly.
        weight: w, float32; 1 unless given.
        skip: for b of the second form: a's tokens are those of b that it does not divide; all of them where 0.
    """
    (videos, heads, m, u), tile, wide = a.shape, sizes.products, b.shape[3] // d
    left, pair = u // d, 2 - wide % 2  # slices of b that a program takes: as many as accumulators fit registers
    groups = wide // pair
    share, each = tiles.splits(sizes.programs, videos * heads * left * groups, m // tile.rows)

    def split(i):  # (which programs, slice of a, slices of b): those that read the same tokens run side by side
        rest = jax.lax.div(i, left)
        return jax.lax.div(rest, groups), jax.lax.rem(i, left), jax.lax.rem(rest, groups)

    b_spec = pl.BlockSpec((None, b.shape[1], None, d), lambda i, h, video: (video, 0, h, 0))
    if b.shape[:3] == a.shape[:3]:
        b_spec = pl.BlockSpec((None, None, m, pair * d), lambda i, h, video: (video, h, 0, split(i)[2]))
    weights = tiles.given(weight)
    sums, vector = pl.pallas_call(
        functools.partial(_kernel, tile=tile, each=each, programs=left * groups, skip=skip),
        grid=(left * groups * share, heads, videos),
        in_specs=[
            pl.BlockSpec((None, None, m, d), lambda i, h, video: (video, h, 0, split(i)[1])),
            b_spec,
            tuple(tiles.vector_spec(x) for x in weights),
        ],
        out_specs=[
            pl.BlockSpec((None, None, None, d, pair * d), lambda i, h, v: (split(i)[0], v, h, *split(i)[1:])),
            pl.BlockSpec((None, None, None, d, tiles.COLUMNS), lambda i, h, v: (split(i)[0], v, h, *split(i)[1:])),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((share, videos, heads, u, x), jnp.float32) for x in (wide * d, groups * tiles.COLUMNS)
        ],
        compiler_params=tiles.params(tile),
        interpret=interpret,
        name="hybrid_products",
    )(a, b, weights)
    return sums.sum(axis=0), vector[..., : tiles.COLUMNS].sum(axis=(0, -1))


def _kernel(a_ref, b_ref, weight_ref, sums_ref, vector_ref, *, tile, each, programs, skip):
    first = jax.lax.div(pl.program_id(0), programs) * each
    d, dtype = a_ref.shape[1], a_ref.dtype
    parts = tiles.slices(d, b_ref.shape[1])

    def step(t, sums):
        start = (first + t) * tile.rows
        at = tiles.span(start, tile.rows)
        of_b = tiles.span(start, tile.rows, skip)
        a = tiles.rows(a_ref, at).T
        weights = [jnp.ones((tile.rows,), jnp.float32)]
        if weight_ref:
            weights = tiles.two_parts(tiles.rows(weight_ref[0], at), dtype)
        found = [dot(a, tiles.rows(b_ref, of_b, part)) for part in parts]
        found.append(dot(a, tiles.columns(*weights).astype(dtype)))
        return tuple(x + y for x, y in zip(sums, found))

    zeros = [jnp.zeros((d, w), jnp.float32) for w in (*(d,) * len(parts), tiles.COLUMNS)]
    *sums, vector_ref[...] = jax.lax.fori_loop(0, each, step, tuple(zeros))
    for part, total in zip(parts, sums):
        sums_ref[:, part] = total
