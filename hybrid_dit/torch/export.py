"""Reads an exported hybrid for PyTorch: its description and its safetensors files, single or sharded."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import safetensors
import torch
from torch import Tensor, nn

from hybrid_dit.errors import UserError
from hybrid_dit.ops.spec import AttentionSpec, FeatureMapSpec
from hybrid_dit.torch.feature_maps import FEATURE_MAPS

DESCRIPTION = "hybrid_config.json"  # written by `hybrid_dit.convert.hybrid`
VERSION = 1
INDEX = "*.safetensors.index.json"
SHOWN = 10  # names listed in an error before a count


def find_transformer(folder: str | Path) -> Path:
    """Returns the folder with the transformer: `folder` itself, or `folder/transformer` of a whole pipeline.

    Raises:
        UserError: neither holds a hybrid.
    """
    folder = Path(folder)
    for place in (folder, folder / "transformer"):
        if (place / DESCRIPTION).is_file():
            return place
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give the folder of an exported hybrid")
    raise UserError(f"{folder} holds no {DESCRIPTION}, so it is no hybrid; load it as any other Wan model")


def read_description(folder: Path, num_layers: int) -> tuple[AttentionSpec, ...]:
    """Returns the attention of every block from `hybrid_config.json`.

    Raises:
        UserError: not JSON, another version, unknown or missing fields, or not one entry per block.
    """
    path = folder / DESCRIPTION
    value = read_json(path)
    if not isinstance(value, dict) or value.get("format") != "hybrid_dit":
        raise UserError(f'{path} is not a description of a hybrid: it has no "format": "hybrid_dit"')
    if value.get("version") != VERSION:
        raise UserError(
            f"{path} has version {value.get('version')!r}; this release reads version {VERSION}: update hybrid_dit"
        )
    _check_fields(value, {"format", "version", "blocks"}, str(path))
    blocks = value["blocks"]
    if not isinstance(blocks, list) or len(blocks) != num_layers:
        count = len(blocks) if isinstance(blocks, list) else "no list of"
        raise UserError(f"{path} describes {count} blocks, but the model has {num_layers}; are both of one export?")
    specs = tuple(_spec(block, f"{path}, block {i}") for i, block in enumerate(blocks))
    if not any(spec.converted for spec in specs):
        raise UserError(f"{path} converts no block; load the folder as any other Wan model")
    return specs


def write_description(folder: Path, specs: Sequence[AttentionSpec]) -> None:
    """Writes `hybrid_config.json` into `folder`; inverse of `read_description`."""
    value = {"format": "hybrid_dit", "version": VERSION, "blocks": [dataclasses.asdict(spec) for spec in specs]}
    (folder / DESCRIPTION).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _spec(block: dict, where: str) -> AttentionSpec:
    _check_fields(block, {f.name for f in dataclasses.fields(AttentionSpec)}, where)
    _check_fields(block["feature_map"], {f.name for f in dataclasses.fields(FeatureMapSpec)}, f"{where}, feature_map")
    numbers = {"rate": block["rate"], **{x: block["feature_map"][x] for x in ("degree", "layers")}}
    for name, number in numbers.items():
        if type(number) is not int:
            raise UserError(f"{where}: {name} is {number!r}, not a whole number")
    if block["feature_map"]["kind"] not in FEATURE_MAPS:
        kind = block["feature_map"]["kind"]
        raise UserError(f"{where}: feature map {kind!r} is unknown; this release has {', '.join(FEATURE_MAPS)}")
    try:
        return AttentionSpec(**{**block, "feature_map": FeatureMapSpec(**block["feature_map"])})
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _check_fields(value: object, expected: set[str], where: str) -> None:
    if not isinstance(value, dict):
        raise UserError(f"{where} is not an object with the fields {', '.join(sorted(expected))}")
    for names, kind in ((value.keys() - expected, "unknown"), (expected - value.keys(), "missing")):
        if names:
            raise UserError(f"{where} has {kind} fields: {', '.join(sorted(names))}; was it written by this release?")


def weight_files(folder: Path) -> dict[str, Path]:
    """Returns tensor name -> file, of a single file, of shards with an index, or of shards without.

    Raises:
        UserError: no files, a broken file, a name in two files, or an index that doesn't fit them or leaves the folder.
    """
    indexes = sorted(folder.glob(INDEX))
    if len(indexes) > 1:
        raise UserError(f"{folder} has several index files: {', '.join(x.name for x in indexes)}; keep one")
    if indexes:
        claimed = _read_index(indexes[0])
        files = sorted({folder / name for name in claimed.values()})
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"no weights in {folder}: expected .safetensors files")
    place: dict[str, Path] = {}
    for file in files:
        with _open(file) as handle:
            for name in handle.keys():  # noqa: SIM118
                if name in place:
                    raise UserError(f"tensor {name} is in two files of {folder}: {place[name].name} and {file.name}")
                place[name] = file
    if indexes and {name: file.name for name, file in place.items()} != claimed:
        wrong = [n for n in {**place, **claimed} if n not in place or claimed.get(n) != place[n].name]
        raise UserError(f"{indexes[0]} doesn't fit its files at {_listed(wrong)}; fetch the folder again")
    return place


def _read_index(path: Path) -> dict[str, str]:
    value = read_json(path)
    claimed = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(claimed, dict) or not all(isinstance(name, str) for name in claimed.values()):
        raise UserError(f"{path} has no weight_map from tensor names to file names")
    for name in set(claimed.values()):
        # A plain name only: an index must not lead to files elsewhere. (A link in the folder is the user's own.)
        if name != Path(name).name or "\\" in name or not name.endswith(".safetensors"):
            raise UserError(f"{path} names {name!r}, which is not a .safetensors file of its own folder")
    return claimed


def _open(path: Path, device: str = "cpu"):
    try:
        return safetensors.safe_open(path, framework="pt", device=device)
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path} is missing, truncated or no safetensors file ({error}); fetch it again") from error


def read_json(path: Path) -> object:
    """Returns the content of a JSON file.

    Raises:
        UserError: it is missing or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error


def check_names(expected: Mapping[str, Tensor], found: Mapping[str, Path], folder: Path) -> None:
    """Raises UserError unless the files hold exactly the tensors that the model wants."""
    missing, unexpected = expected.keys() - found.keys(), found.keys() - expected.keys()
    problems = [f"missing {_listed(missing)}"] if missing else []
    problems += [f"unexpected {_listed(unexpected)}"] if unexpected else []
    if problems:
        layouts = ("blocks.0.attn1.to_q.weight", "diffusers' layout"), ("blocks.0.self_attn.q.weight", "the original's")
        hint = "".join(
            f" (the files are in {layout})" for name, layout in layouts if name in found.keys() - expected.keys()
        )
        raise UserError(f"the weights in {folder} don't fit the model{hint}: {'; '.join(problems)}")


def _listed(names) -> str:
    names = sorted(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def tensors(place: Mapping[str, Path], device: str) -> Iterator[tuple[str, Tensor]]:
    """Yields every tensor, file by file, as stored, on `device`."""
    for file in sorted(set(place.values())):
        with _open(file, device) as handle:
            for name in sorted(n for n, where in place.items() if where == file):
                yield name, handle.get_tensor(name)


def load_into(model: nn.Module, folder: Path, dtype_of: Callable[[str, torch.dtype], torch.dtype], device: str) -> None:
    """Fills every parameter and buffer of `model` that its state dict has, in place of what is there (meta allowed).

    Args:
        model: its state dict has the names and shapes of the export.
        folder: with the safetensors files.
        dtype_of: (name, stored dtype) -> dtype wanted.
        device: where the tensors are put.

    Raises:
        UserError: names or shapes of files and model differ.
    """
    place, wanted = weight_files(folder), model.state_dict()
    check_names(wanted, place, folder)
    state = {}
    for name, tensor in tensors(place, device):
        if tensor.shape != wanted[name].shape:
            shapes = f"{tuple(tensor.shape)} in {place[name].name}, {tuple(wanted[name].shape)} in the model"
            raise UserError(f"tensor {name} in {folder} has another shape than the model: {shapes}")
        state[name] = tensor.to(dtype_of(name, tensor.dtype))
    model.load_state_dict(state, strict=True, assign=True)
