"""A DiT's velocity on several devices: videos split over groups of devices, the tokens of a video within a group.

Parameters may be whole on every device or split over all of them (`sharding.DIT_RULES`); then a block's are gathered
when it runs. Queries stay where their tokens are, and every device of a group gets all keys of its videos; the state of
linear attention is summed over the group.
"""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from hybrid_dit.array_typing import Array, DTypeLike
from hybrid_dit.models.wan import WanBlock, WanConfig, WanEmbedding, WanHead
from hybrid_dit.ops.hybrid import combine, linear_part, softmax_part
from hybrid_dit.ops.softmax import softmax_attention
from hybrid_dit.ops.spec import AttentionSpec
from hybrid_dit.placement import Placement
from hybrid_dit.sharding import BLOCK, SEQ

TOKENS = (BLOCK, SEQ)  # axes of the mesh that tokens are split over


@dataclasses.dataclass(frozen=True, eq=False)
class SplitDiT:
    """`WanDiT` without gradients on a mesh; equal to it up to rounding.

    Attributes:
        config: sizes.
        attention: one spec per block; empty: softmax everywhere.
        dtype: of activations.
        mesh: from `sharding.distill_mesh`.
    """

    config: WanConfig
    attention: tuple[AttentionSpec, ...]
    dtype: DTypeLike
    mesh: Mesh

    def velocity(self, params, x: Array, t: Array, context: tuple[Array, Array]) -> Array:
        """As `generation.make_velocity` returns: x [b, t, y, x, c], t [b], context (text, count) -> like x, float32."""
        place, grid = Placement(self.mesh), self.config.grid(x.shape)
        specs = self.attention or (AttentionSpec(),) * self.config.num_layers
        distinct = tuple(dict.fromkeys(specs))
        ends = {k: jax.tree.map(place.whole, v) for k, v in params.items() if k not in ("blocks", "feature_maps")}
        embed = WanEmbedding(self.config, self.dtype)
        tokens, time, (*conditions, rope) = embed.apply({"params": ends}, x, t, *context)
        n = tokens.shape[1]
        # Padded once: an array whose tokens the devices don't divide ends up whole on all of them.
        tokens = place.split(place.pad(tokens, 1, TOKENS), TOKENS)
        conditions = (*conditions, jax.tree.map(lambda a: place.pad(a, 0, TOKENS), rope))

        def body(tokens, xs):
            block, phi, which = xs
            block = jax.tree.map_with_path(partial(self._gather, place), block)
            phi = jax.tree.map(place.whole, phi)

            def attend(q, k, v):
                q, k, v = (place.split(a, TOKENS) for a in (q, k, v))
                branches = [partial(self._attention, place, grid, spec) for spec in distinct]
                return jax.lax.switch(which, branches, q, k, v, phi), ()

            layer = WanBlock(self.config, (), grid, self.dtype, attend)
            out, _ = layer.apply({"params": block}, tokens, 0, {}, *conditions)
            return place.split(out, TOKENS), None

        which = jnp.asarray([distinct.index(spec) for spec in specs], jnp.int32)
        phi = params.get("feature_maps", {"q": {}, "k": {}})
        tokens, _ = jax.lax.scan(body, tokens, (params["blocks"], phi, which))
        return WanHead(self.config, self.dtype).apply({"params": ends}, tokens[:, :n], time, grid)

    def _gather(self, place: Placement, path, leaf: Array) -> Array:
        """A block's parameter whole on every device; matrices in the dtype they are used in, half the traffic."""
        return place.whole(leaf.astype(self.dtype) if path[-1].key == "kernel" else leaf)

    def _attention(self, place: Placement, grid, spec: AttentionSpec, q, k, v, phi) -> Array:
        keys = math.prod(grid)
        if spec.kind == "softmax":
            return place.over_queries(softmax_attention, TOKENS, keys)(q, k, v)
        part = partial(softmax_part, spec=spec, grid=grid)
        if spec.kind == "hybrid":  # linear attention's are scalar zeros
            part = place.over_queries(part, TOKENS, keys)
        sums = part(q, k, v)
        return combine(sums, linear_part(q, k, v, phi, spec, grid)).astype(q.dtype)
