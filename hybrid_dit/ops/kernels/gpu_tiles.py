"""What the GPU kernels (Pallas on Triton) share: sizes of tiles, masked loads and stores, products, block specs."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from hybrid_dit.array_typing import Array

TINY = 1e-18  # as in `ops.hybrid`
COLUMNS = 16  # the narrowest second operand of a product: what sums over a tile's rows are multiplied by
LONGEST = 128  # tile of tokens; arrays made here are padded to a multiple


@dataclasses.dataclass(frozen=True)
class Tile:
    """Sizes of one kernel; powers of 2.

    Attributes:
        rows: tokens of a tile, at most `LONGEST`.
        chunk: hidden units, or keys of softmax, that a step of the inner loop takes.
        warps: of 32 threads.
        stages: of the software pipeline that loads what the loop takes next.
        width: of φ's pre-activations, how many of a token are in registers at a time. With more than 256 they spill,
            and chunks of φ's second matrix outgrow shared memory.
    """

    rows: int = 128
    chunk: int = 64
    warps: int = 8
    stages: int = 2
    width: int = 256


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Sizes of all kernels, for Hopper; `benchmarks/attention_gpu.py` measures others.

    Attributes:
        features: φ of keys; of queries, too, where there will be a backward pass.
        read: φ of queries, and read-out of the state.
        read_given: read-out of the state alone.
        products: sums over tokens.
        pre_activations: backward through φ's activations.
        hidden: backward through φ's hidden units.
        softmax: flash attention.
        softmax_dq: its gradient in queries.
        softmax_dkv: its gradient in keys and values.
        programs: about how many programs share the sums over tokens, one for each of 132 multiprocessors.
    """

    features: Tile = Tile(rows=64, warps=4)
    read: Tile = Tile(rows=64, warps=4)
    read_given: Tile = Tile(rows=64, warps=4)
    products: Tile = Tile(rows=64, stages=4)
    pre_activations: Tile = Tile(rows=64, warps=4)
    hidden: Tile = Tile(rows=64, warps=4, stages=1)
    softmax: Tile = Tile(chunk=128, stages=3)
    softmax_dq: Tile = Tile(rows=64, warps=4)
    softmax_dkv: Tile = Tile(rows=64, warps=4)
    programs: int = 132


def params(tile: Tile) -> plgpu.CompilerParams:
    """What the compiler is told about a kernel."""
    return plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages)


def given(x: Array | None) -> tuple[Array, ...]:
    """An operand of a kernel that may be missing."""
    return () if x is None else (x,)


def dot(x: Array, y: Array) -> Array:
    """x @ y accumulated and returned in float32; float32 operands are multiplied as such, not as TF32."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    dims = (((1,), (0,)), ((), ()))
    return jax.lax.dot_general(x, y, dims, precision=precision, preferred_element_type=jnp.float32)


def slices(d: int, width: int) -> list:
    """A `pl.ds` for every `d` of `width` columns."""
    return [pl.ds(start, d) for start in range(0, width, d)]


# Loads and stores. A ref is one head's: [n, d], or a row vector [n]. Rows are given by their numbers, an int32 [t].


def span(start: Array, size: int, skip: int = 0) -> Array:
    """The numbers of `size` tokens from the `start`-th on, leaving out the multiples of `skip`."""
    at = start + jnp.arange(size)
    return at + jax.lax.div(at, skip - 1) + 1 if skip else at


def length(n: int, skip: int = 0) -> int:
    """How many of n tokens are left then, padded to a multiple of `LONGEST` that is not 0."""
    return max(1, pl.cdiv(n - pl.cdiv(n, skip) if skip else n, LONGEST)) * LONGEST


def rows(ref, at: Array, columns=None, other: float = 0.0) -> Array:
    """Rows of `ref`, all columns or those of a `pl.ds`; `other` where they are past the end."""
    real = at < ref.shape[0]
    if len(ref.shape) == 1:
        return plgpu.load(ref.at[at], mask=real, other=other)
    columns = pl.ds(0, ref.shape[1]) if columns is None else columns
    part = ref.at[at[:, None], (columns.start + jnp.arange(columns.size))[None]]
    return plgpu.load(part, mask=real[:, None], other=other)


def store_rows(ref, at: Array, value: Array) -> None:
    """Writes `value` to rows of `ref`, but for those past the end."""
    real = at < ref.shape[0]
    if value.ndim == 1:
        plgpu.store(ref.at[at], value.astype(ref.dtype), mask=real)
    else:
        part = ref.at[at[:, None], jnp.arange(value.shape[1])[None]]
        plgpu.store(part, value.astype(ref.dtype), mask=real[:, None])


# Row sums by the matrix unit: Σ_i x_i c_i of a tile x [t, f] is a column of xᵀ [c, 0, ...]. In registers it would take
# shuffles between threads for every tile.


def columns(*values: Array) -> Array:
    """[t, COLUMNS] with the given vectors [t] as its first columns, zeros after them."""
    column = jax.lax.broadcasted_iota(jnp.int32, (len(values[0]), COLUMNS), 1)
    out = jnp.zeros(column.shape, jnp.float32)
    for i, value in enumerate(values):
        out = jnp.where(column == i, value[:, None].astype(jnp.float32), out)
    return out


def two_parts(x: Array, dtype) -> tuple[Array, ...]:
    """float32 as a sum of numbers of `dtype`: two of 16 bits."""
    if dtype == jnp.float32:
        return (x,)
    high = x.astype(dtype).astype(jnp.float32)
    return high, x - high


# Block specs for a grid (inner, head, video)


def tokens_spec(x: Array | jax.ShapeDtypeStruct) -> pl.BlockSpec:
    """All tokens of one video and head of [b, n, h, d]."""
    return pl.BlockSpec((None, x.shape[1], None, x.shape[3]), lambda i, h, b: (b, 0, h, 0))


def vector_spec(x: Array | jax.ShapeDtypeStruct) -> pl.BlockSpec:
    """One video and head of [b, h, ...]."""
    return pl.BlockSpec((None, None, *x.shape[2:]), lambda i, h, b: (b, h, *(0,) * (len(x.shape) - 2)))


def head_spec(x: Array) -> pl.BlockSpec:
    """One head of [h, ...]."""
    return pl.BlockSpec((None, *x.shape[1:]), lambda i, h, b: (h, *(0,) * (x.ndim - 1)))


def splits(programs: int, heads: int, tiles: int) -> tuple[int, int]:
    """(how many programs share a head's tiles, tiles of each): about `programs` in all, none of them without a tile."""
    each = -(-tiles // max(1, min(tiles, programs // heads)))
    return -(-tiles // each), each
