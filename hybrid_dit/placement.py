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

    def pad_and_split(self, tokens: Array, axes: tuple[str, ...]) -> Array:
        """As `split`, after appending zeros until the devices divide the tokens."""
        missing = -tokens.shape[1] % ways(self.mesh, axes)
        return self.split(jnp.pad(tokens, ((0, 0), (0, missing), *((0, 0),) * (tokens.ndim - 2))), axes)

    def data(self, videos: int) -> str | None:
        """The axis that this many videos are split over, None if they don't divide."""
        return AXIS if videos % self.mesh.shape[AXIS] == 0 else None

    def over_queries(self, attend: Callable, axes: tuple[str, ...]) -> Callable:
        """`attend(q, k, v)` with queries split over `axes` and every device holding all keys of its videos."""
        if self.mesh.size == 1:
            return attend
        shards = ways(self.mesh, axes)

        def run_split(q, k, v):
            n, data = q.shape[1], self.data(len(q))
            q = jnp.pad(q, ((0, 0), (0, -n % shards), (0, 0), (0, 0)))
            run = jax.shard_map(
                attend,
                mesh=self.mesh,
                in_specs=(PartitionSpec(data, axes), PartitionSpec(data), PartitionSpec(data)),
                out_specs=PartitionSpec(data, axes),
                check_vma=False,
            )
            return jax.tree.map(lambda a: a[:, :n], run(q, k, v))

        return run_split

    def _constrain(self, x: Array, *spec) -> Array:
        if self.mesh.size == 1:
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, PartitionSpec(*spec)))
