"""What a hybrid adds to a transformer folder: feature maps of the converted blocks, and `hybrid_config.json`.

Feature maps are stacked over all blocks in the Flax tree and stored for converted blocks alone; slices of the others
are never used, and zero by convention (`surgery.assemble` makes them so), so that export and import are exact inverses.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from hybrid_dit.atomic import write_json
from hybrid_dit.convert import tables, wan_keys
from hybrid_dit.convert.files import read_json
from hybrid_dit.errors import UserError
from hybrid_dit.models.wan import WanConfig
from hybrid_dit.ops.spec import AttentionSpec, FeatureMapSpec

FILE = "hybrid_config.json"
VERSION = 1


def write_description(folder: Path, attention: tuple[AttentionSpec, ...]) -> None:
    """Writes `hybrid_config.json` into `folder` if any block is converted."""
    if any(spec.converted for spec in attention):
        blocks = [{**dataclasses.asdict(spec), "feature_map": _described(spec.feature_map)} for spec in attention]
        write_json(folder / FILE, {"format": "hybrid_dit", "version": VERSION, "blocks": blocks})


def _described(spec: FeatureMapSpec) -> dict:
    """A feature map's fields, without later ones that have their default: readers that don't know them don't mind."""
    default = dataclasses.asdict(FeatureMapSpec())
    fields = dataclasses.asdict(spec)
    return {name: x for name, x in fields.items() if name in ("kind", "degree", "layers") or x != default[name]}


def read_description(folder: Path, num_layers: int) -> tuple[AttentionSpec, ...]:
    """Returns the attention of every block; () if the folder holds a plain softmax model.

    Raises:
        UserError: the description is of another version, or doesn't fit the model.
    """
    path = folder / FILE
    if not path.is_file():
        return ()
    value = read_json(path)
    if value.get("version") != VERSION:
        raise UserError(f"{path} has version {value.get('version')!r}; this release reads version {VERSION}")
    blocks = value.get("blocks", [])
    if len(blocks) != num_layers:
        raise UserError(f"{path} describes {len(blocks)} blocks, but the model has {num_layers}")
    try:
        specs = [AttentionSpec(**{**b, "feature_map": FeatureMapSpec(**b["feature_map"])}) for b in blocks]
    except (TypeError, KeyError) as error:
        raise UserError(f"{path} has an unknown or missing field: {error}") from error
    return tuple(specs)


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
