"""A DiT's velocity on several devices: videos split over groups of devices, the tokens of a video within a group.

Parameters may be whole on every device or split over all of them (`sharding.DIT_RULES`); then a block's are gathered
when it runs. Attention is that of `ops.context_parallel`: of hybrid blocks only softmax tokens' keys and values travel.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from hybrid_dit.array_typing import Array, DTypeLike
from hybrid_dit.models.wan import WanBlock, WanConfig, WanEmbedding, WanHead
from hybrid_dit.ops.context_parallel import Split, attention
from hybrid_dit.ops.spec import AttentionSpec
from hybrid_dit.placement import Placement
from hybrid_dit.sharding import AXIS, BLOCK, SEQ

TOKENS = (BLOCK, SEQ)  # axes of the mesh that tokens are split over


@dataclasses.dataclass(frozen=True, eq=False)
class SplitDiT:
    """`WanDiT` without gradients on a mesh; equal to it up to rounding.

    Attributes:
        config: sizes.
        attention: one spec per block; empty: softmax everywhere.
        dtype: of activations.
        mesh: from `sharding.distill_mesh`.
        backend: of self-attention, see `ops.backends`.
    """

    config: WanConfig
    attention: tuple[AttentionSpec, ...]
    dtype: DTypeLike
    mesh: Mesh
    backend: str = "auto"

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
            run = partial(attention, grid=grid, split=Split(self.mesh, TOKENS, (AXIS,)), backend=self.backend)

            def attend(q, k, v):
                return jax.lax.switch(which, [partial(run, spec=spec) for spec in distinct], q, k, v, phi), ()

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
