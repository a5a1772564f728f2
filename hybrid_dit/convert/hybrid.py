"""The tensors of a DiT on disk, teacher or hybrid.

Feature maps are stacked over all blocks in the Flax tree and stored for converted blocks alone; slices of the others
are never used, and zero by convention (`surgery.assemble` makes them so), so that export and import are exact inverses.
"""

from collections.abc import Mapping

from hybrid_dit.convert import tables, wan_keys
from hybrid_dit.models.wan import WanConfig
from hybrid_dit.ops.spec import AttentionSpec


def stored_entries(
    config: WanConfig, attention: tuple[AttentionSpec, ...], layout: str, params: Mapping
) -> dict[str, tables.Entry]:
    """Returns the key table's entries without the feature maps of blocks that keep softmax.

    Args:
        config: sizes.
        attention: one spec per block, or empty.
        layout: "wan" or "diffusers".
        params: the DiT's parameters, or their shapes.
    """
    entries = tables.expand(wan_keys.rules(config, layout), params)
    return {
        name: entry
        for name, entry in entries.items()
        if not entry.flax.startswith("feature_maps/") or attention[entry.index].converted
    }
