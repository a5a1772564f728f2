"""Which tokens a device has when those of a video are split evenly over an axis of a mesh: static, known to all.

Device p of P holds tokens p·L ... (p+1)·L − 1 of the grid's order. Those past the end of the grid pad it.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_dit.array_typing import Array, Float, PyTree
from hybrid_dit.ops.spec import AttentionSpec
from hybrid_dit.ops.tokens import Grid, linear_keys, softmax_tokens


def padded_length(tokens: int, parts: int, rate: int) -> int:
    """Returns how long to make a video that `parts` devices don't divide: S then starts anew on each of them."""
    return tokens if tokens % parts == 0 else -(-tokens // (parts * rate)) * parts * rate


def softmax_rows(grid: Grid, spec: AttentionSpec, parts: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns which rows of its own each device gives to S, and where S lies in what all give together.

    Args:
        grid: of the tokens.
        spec: of hybrid attention.
        parts: P, number of devices.
        length: L, tokens of each.

    Returns:
        (rows [P, m], positions [|S|] in the P·m rows gathered), int32. All give as many, m: where a device has fewer,
        its list goes on with that of the one with the most, so that lists that only differ in length become equal.
    """
    tokens = softmax_tokens(grid, spec.rate, spec.pattern)
    lists = [tokens[tokens // length == p] - p * length for p in range(parts)]
    longest = max(lists, key=len)
    rows = np.stack([np.concatenate([x, longest[len(x) :]]) for x in lists])
    positions = np.concatenate([p * len(longest) + np.arange(len(x)) for p, x in enumerate(lists)])
    return rows.astype(np.int32), positions.astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Shard:
    """The part of a video that a device has; for use inside `shard_map`. Rows are [b, n, ...].

    Attributes:
        axes: names of the axes of the mesh that tokens are split over.
        parts: P, number of devices along them.
    """

    axes: tuple[str, ...]
    parts: int

    def first(self, length: int) -> Array:
        """The token of this device's first row, if every device has `length` of them; int32."""
        return jax.lax.axis_index(self.axes) * length

    def softmax_keys(self, x: Float[Array, "b n ..."], grid: Grid, spec: AttentionSpec) -> Float[Array, "b m ..."]:
        """S's rows of the whole video, in order, from this device's rows: what travels is |S| rows."""
        rows, positions = softmax_rows(grid, spec, self.parts, x.shape[1])
        return _take(_gather(self, self._take_own(x, rows)), positions)

    def softmax_keys_back(
        self, x: Float[Array, "b m ..."], grid: Grid, spec: AttentionSpec, length: int
    ) -> Float[Array, "b n ..."]:
        """The transpose of `softmax_keys`: sums over devices, at this device's rows of S, and zeros between."""
        like = jnp.zeros((x.shape[0], length, *x.shape[2:]), x.dtype)
        return jax.vjp(lambda rows: self.softmax_keys(rows, grid, spec), like)[1](x)[0]

    def all_keys(self, x: Float[Array, "b n h d"], grid: Grid) -> Float[Array, "b m h d"]:
        """Every token of the grid."""
        return _gather(self, x)[:, : grid[0] * grid[1] * grid[2]]

    def linear_keys(self, grid: Grid, spec: AttentionSpec, length: int) -> Float[Array, "n"]:
        """1.0 for this device's keys of the linear part, 0.0 for the others and for padding, float32."""
        keep = linear_keys(grid, spec, self.parts * length).reshape(self.parts, length)
        return jnp.asarray(keep)[jax.lax.axis_index(self.axes)]

    def sum(self, tree: PyTree) -> PyTree:
        """Sums over the devices of a video."""
        return jax.lax.psum(tree, self.axes)

    def _take_own(self, x, rows):
        if (rows == rows[0]).all():
            return _take(x, rows[0])
        return x.at[:, jnp.asarray(rows)[jax.lax.axis_index(self.axes)]].get(mode="promise_in_bounds")


def _take(x: Array, index: np.ndarray) -> Array:
    """x[:, index], index ascending; as a strided slice where it is evenly spaced, which is cheaper than a gather."""
    steps = np.unique(np.diff(index))
    if len(index) and len(steps) <= 1:
        return x[:, int(index[0]) : int(index[-1]) + 1 : int(steps[0]) if len(steps) else 1]
    return x.at[:, index].get(mode="promise_in_bounds", unique_indices=True, indices_are_sorted=True)


def _all_gather(shard, x):
    return jax.lax.all_gather(x, shard.axes, axis=1, tiled=True)


def _reduce_scatter(shard, _, cotangent):
    """In float32: the sum over devices, of numbers rounded on each, loses nothing more to 16 bits.

    Over the leading axis and one axis of the mesh after the other: else the TPU compiler makes it an all-reduce, which
    moves twice as much.
    """
    b, rows, *rest = cotangent.shape
    parts = cotangent.astype(jnp.float32).reshape(b, shard.parts, rows // shard.parts, *rest).swapaxes(0, 1)
    for axis in shard.axes:
        parts = parts.reshape(jax.lax.axis_size(axis), -1, *parts.shape[1:])
        parts = jax.lax.psum_scatter(parts, axis)
    return (parts[0].astype(cotangent.dtype),)


_gather = jax.custom_vjp(_all_gather, nondiff_argnums=(0,))
_gather.defvjp(lambda shard, x: (_all_gather(shard, x), None), _reduce_scatter)
