"""`hybrid_config.json`: which attention every block of an exported hybrid has. Read by the JAX and the PyTorch side."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from hybrid_dit.atomic import write_json
from hybrid_dit.convert.json_file import read_json, shown
from hybrid_dit.errors import UserError
from hybrid_dit.ops.spec import AttentionSpec, FeatureMapSpec

FILE = "hybrid_config.json"
FORMAT, VERSION = "hybrid_dit", 1
# Fields that version 1 had from the start. Later ones are written where they differ from their default, so that a
# release which doesn't know them reads what it can compute and refuses the rest.
_FIRST = {"kind", "degree", "layers"}


def write_description(folder: Path, attention: Sequence[AttentionSpec]) -> None:
    """Writes the file into `folder` if any block is converted."""
    if any(spec.converted for spec in attention):
        blocks = [{**dataclasses.asdict(spec), "feature_map": _fields(spec.feature_map)} for spec in attention]
        write_json(folder / FILE, {"format": FORMAT, "version": VERSION, "blocks": blocks})


def read_description(folder: Path, num_layers: int) -> tuple[AttentionSpec, ...]:
    """Returns the attention of every block; () if the folder holds a plain softmax model.

    Raises:
        UserError: not JSON, another version, unknown, missing or wrong fields, or not one entry per block.
    """
    path = folder / FILE
    if not path.is_file():
        return ()
    value = read_json(path)
    if value.get("format") != FORMAT:
        raise UserError(f'{path} is not a description of a hybrid: it has no "format": "{FORMAT}"')
    if value.get("version") != VERSION:
        found = shown(repr(value.get("version")))
        raise UserError(f"{path} has version {found}; this release reads version {VERSION}: update hybrid_dit")
    _check_fields(value, {"format", "version", "blocks"}, {"format", "version", "blocks"}, str(path))
    blocks = value["blocks"]
    if not isinstance(blocks, list) or len(blocks) != num_layers:
        count = len(blocks) if isinstance(blocks, list) else "no list of"
        raise UserError(f"{path} describes {count} blocks, but the model has {num_layers}; are both of one export?")
    return tuple(_spec(block, f"{path}, block {i}") for i, block in enumerate(blocks))


def _fields(spec: FeatureMapSpec) -> dict:
    default = dataclasses.asdict(FeatureMapSpec())
    return {name: x for name, x in dataclasses.asdict(spec).items() if name in _FIRST or x != default[name]}


def _spec(block: object, where: str) -> AttentionSpec:
    fields = {f.name: f for f in dataclasses.fields(AttentionSpec)}
    _check_fields(block, fields.keys(), fields.keys(), where)
    _check_types(block, AttentionSpec(), where)
    inner = block["feature_map"]
    _check_fields(inner, {f.name for f in dataclasses.fields(FeatureMapSpec)}, _FIRST, f"{where}, feature_map")
    _check_types(inner, FeatureMapSpec(), f"{where}, feature_map")
    try:
        return AttentionSpec(**{**block, "feature_map": FeatureMapSpec(**inner)})
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _check_fields(value: object, known, required, where: str) -> None:
    if not isinstance(value, dict):
        raise UserError(f"{where} is not an object with the fields {', '.join(sorted(known))}")
    for names, what in ((value.keys() - known, "unknown"), (required - value.keys(), "missing")):
        if names:
            listed = ", ".join(shown(name) for name in sorted(names))
            raise UserError(f"{where} has {what} fields: {listed}; was it written by this release?")


def _check_types(value: dict, example: AttentionSpec | FeatureMapSpec, where: str) -> None:
    """Every value must have the type of the default's; a feature map is checked on its own."""
    for name, found in value.items():
        wanted = type(getattr(example, name))
        if wanted is not FeatureMapSpec and type(found) is not wanted:
            told = {int: "a whole number", str: "a word", bool: "true or false"}[wanted]
            raise UserError(f"{where}: {name} is {shown(repr(found))}, not {told}")
