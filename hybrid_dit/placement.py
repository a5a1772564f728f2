"""Where the activations of a distillation step live on a mesh with axes block, data, seq (`sharding.distill_mesh`)."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hybrid_dit.array_typing import Array
from hybrid_dit.sharding import AXIS, BLOCK, ways


@dataclasses.dataclass(frozen=True, eq=False)
class Placement:
    """Constraints on activations; on one device they do nothing.

    Attributes:
        mesh: of the step.
    """

    mesh: Mesh

    def whole(self, x: Array) -> Array:
        """On every device."""
        return self._constrain(x)

    def by_block(self, x: Array) -> Array:
        """[B, videos, n, ...]: blocks over their axis; the rest as XLA likes."""
        return self._constrain(x, BLOCK, *(PartitionSpec.UNCONSTRAINED,) * (x.ndim - 1))

    def split(self, tokens: Array, axes: tuple[str, ...]) -> Array:
        """[b, n, ...]: videos over the data axis where that divides, tokens over `axes`."""
        return self._constrain(tokens, self.data(len(tokens)), axes)

    def pad(self, x: Array, axis: int, axes: tuple[str, ...]) -> Array:
        """Appends zeros along `axis` until the devices of the mesh's `axes` divide its length."""
        width = [(0, 0)] * x.ndim
        width[axis] = 0, -x.shape[axis] % ways(self.mesh, axes)
        return jnp.pad(x, width)

    def data(self, videos: int) -> str | None:
        """The axis that this many videos are split over, None if they don't divide."""
        return AXIS if videos % self.mesh.shape[AXIS] == 0 else None

    def over_queries(self, attend: Callable, axes: tuple[str, ...], keys: int) -> Callable:
        """`attend(q, k, v)` with queries split over `axes` and every device holding all keys of its videos.

        Args:
            attend: gets the first `keys` keys and values, without those that pad them.
            axes: of the mesh; their devices divide the queries.
            keys: number of keys.
        """

        def run(q, k, v):
            return attend(q, k[:, :keys], v[:, :keys])

        if self.mesh.size == 1:
            return run

        def run_split(q, k, v):
            data = self.data(len(q))
            return jax.shard_map(
                run,
                mesh=self.mesh,
                in_specs=(PartitionSpec(data, axes), PartitionSpec(data), PartitionSpec(data)),
                out_specs=PartitionSpec(data, axes),
                check_vma=False,
            )(q, k, v)

        return run_split

    def _constrain(self, x: Array, *spec) -> Array:
        if self.mesh.size == 1:
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, PartitionSpec(*spec)))
