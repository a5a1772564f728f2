"""What the TPU kernels share: tile sizes per generation, and how tiles are cut, masked and read."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hybrid_dit.array_typing import Array, PyTree
from hybrid_dit.ops.manual import manual_device
from hybrid_dit.ops.spec import AttentionSpec
from hybrid_dit.ops.tokens import Grid

TINY = 1e-18  # as in `ops.hybrid`
LANES = 128
ONES = 16  # rows of a register of 16-bit numbers


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Tile sizes in tokens; multiples of 128. `benchmarks/tpu_schedule.py` shows what others cost.

    Attributes:
        state: keys and values of a step of the kernel that sums the linear part's state.
        queries: of the forward kernel of queries.
        keys: softmax keys of a step of it.
        chunk: softmax keys whose scores exist at a time.
        vmem: MiB that a kernel may use.
        back_queries, back_keys, back_chunk: the same of the backward kernel of queries.
        back_linear: keys and values of a step of the backward kernel of keys.
        back_rows: tokens of a tile that go back through a feature map at a time.
        back_span: softmax keys whose gradients are summed in fast memory at a time.
        back_vmem: MiB that a backward kernel may use.
    """

    state: int = 1024
    queries: int = 1024
    keys: int = 2048
    chunk: int = 512
    vmem: int = 32
    back_queries: int = 1024
    back_keys: int = 1024
    back_chunk: int = 512
    back_linear: int = 1024
    back_rows: int = 512
    back_span: int = 16384
    back_vmem: int = 60


# By generation, as in `hybrid_dit.targets`.
BLOCKS = {
    "v5e": Blocks(),
    "v5p": Blocks(),
    "v6e": Blocks(state=2048, queries=2048, keys=4096, chunk=1024, back_rows=1024),
    "tpu7x": Blocks(chunk=1024, back_rows=1024),
}
_KINDS = {"TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v6 lite": "v6e", "TPU7x": "tpu7x"}


def default_blocks() -> Blocks:
    """Tile sizes for the TPU that the program is traced for, inside `shard_map`; else for that of this process.

    Those of v5e for a kind that is not in the table, or without a TPU.
    """
    return BLOCKS[_KINDS.get((manual_device() or jax.devices()[0]).device_kind, "v5e")]


def flat(x: Array) -> Array:
    """[b, n, h, d] -> [b, n, h·d], as projections make it: a head is a block of columns."""
    return x.reshape(*x.shape[:2], -1)


def tiles(n: int, size: int, multiple: int) -> tuple[int, int]:
    """(how many, size) of equal tiles that cover n rows, each a multiple of `multiple` and of about `size` at most."""
    size = pl.cdiv(pl.cdiv(n, pl.cdiv(n, size)), multiple) * multiple
    return pl.cdiv(n, size), size


def per_head(x: Array) -> pl.BlockSpec:
    """The slice of head `j` of an array [h, ...], in a grid of (batch, head, ...)."""
    return pl.BlockSpec((None, *x.shape[1:]), lambda i, j, *_: (j, *(0,) * (x.ndim - 1)))


def per_video_and_head(x: Array | jax.ShapeDtypeStruct) -> pl.BlockSpec:
    """The slice of video `i` and head `j` of an array [b, h, ...]."""
    return pl.BlockSpec((None, None, *x.shape[2:]), lambda i, j, *_: (i, j, *(0,) * (len(x.shape) - 2)))


def compiler_params(vmem: int, *semantics: str) -> pltpu.CompilerParams:
    """Of a kernel that may use so many MiB of fast memory, on a grid with these semantics."""
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=vmem * 2**20)


@jax.custom_batching.custom_vmap
def _in_hbm(x):
    return pltpu.with_memory_space_constraint(x, pltpu.HBM)


@_in_hbm.def_vmap
def _(size, batched, x):  # the primitive has no rule of its own
    del size
    return _in_hbm(x), batched[0]


def in_hbm(tree: PyTree, interpret: object) -> PyTree:
    """Operands that are read tile by tile, kept in the TPU's main memory.

    XLA would put small ones into fast memory, where a tile is then copied by instructions and not beside them.
    """
    return tree if interpret else jax.tree.map(_in_hbm, tree)


def zeros_past_end(x: Array, start: Array, n: int, used: int) -> Array:
    """Rows `start`... of n, with those past the end, where lies whatever was in memory (NaN perhaps), made zero.

    Args:
        x: the rows.
        start: of the first.
        n: how many there are in all.
        used: a number of rows of `x` that are there wherever it starts.
    """
    row = start + used + jax.lax.broadcasted_iota(jnp.int32, (x.shape[0] - used, 1), 0)
    rest = jnp.where(row < n, x[used:], 0.0)
    return jnp.concatenate([x[:used], rest]) if used else rest  # the compiler for TPUs has no empty arrays


def first_spec(first: Array | None) -> pl.BlockSpec | None:
    """The whole of `first`, the number of the first row's token, int32 [1], in scalar memory."""
    return None if first is None else pl.BlockSpec(memory_space=pltpu.SMEM)


def in_linear(token: Array, spec: AttentionSpec, grid: Grid, first=None) -> Array:
    """Whether tokens, int32, are in L: `ops.tokens.linear_mask` without an array in memory.

    Args:
        token: their numbers.
        spec: of the attention.
        grid: of the tokens.
        first: reference to what is added to the numbers; then tokens past the end of the grid are not in L.
    """
    if first is not None:
        token += first[0]
        return (token < math.prod(grid)) & in_linear(token, spec, grid)
    if spec.kind == "linear":
        return token >= 0
    if spec.pattern == "stride":
        return jax.lax.rem(token, spec.rate) != 0
    row, column = jax.lax.div(token, grid[2]), jax.lax.rem(token, grid[2])
    frame, row = jax.lax.div(row, grid[1]), jax.lax.rem(row, grid[1])
    return jax.lax.rem(column + 3 * row + 5 * frame, spec.rate) != 0


def read(params) -> dict[str, Array]:
    """Values of named references."""
    return {name: ref[...] for name, ref in params.items()}
