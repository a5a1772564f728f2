"""Which files of a folder hold its weights: an index says so, or every shard that lies there."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from hybrid_dit.convert.json_file import read_json, shown
from hybrid_dit.convert.torch_file import SUFFIXES
from hybrid_dit.errors import UserError

ENDING = ".safetensors"
INDEX_ENDING = ".safetensors.index.json"
MAX_INDEX = 4_000_000  # bytes; Wan 14B's has 0.1 MB


def find(folder: Path) -> tuple[list[Path], dict[str, str] | None, list[str]]:
    """Returns (files, name of each tensor -> name of its file if an index says so, notes for the person).

    Raises:
        UserError: nothing there, several indices to choose from, or an index that leads out of the folder.
    """
    indices = sorted(folder.glob(f"*{INDEX_ENDING}"))
    shards = sorted(folder.glob(f"*{ENDING}"))
    bases = {_base(path) for path in [*indices, *shards]}
    plain = [path for path in indices if not _is_variant(path, bases)]
    if len(plain) > 1:
        raise UserError(f"{folder} has several indices: {_listed([p.name for p in plain])}; leave one of them there")
    if plain:
        weight_map = _read_index(plain[0])
        files = [_inside(folder, name, plain[0]) for name in sorted(set(weight_map.values()))]
        return files, weight_map, _left_out(shards, files, f"not in {plain[0].name}")
    files = [path for path in shards if not _is_variant(path, bases)]
    if not files:
        others = sorted(path.name for path in folder.glob("*") if path.suffix in SUFFIXES)
        hint = f"; to read {others[0]}, give the file itself" if others else ""
        raise UserError(f"no weights at {folder}: expected a .safetensors file or a folder that holds some{hint}")
    return files, None, _left_out(shards, files, "a variant of one that was read")


def check_index(index: Mapping[str, str], found: Mapping[str, str], folder: Path) -> None:
    """Checks that an index and the files it names agree; both map a tensor's name to its file's name.

    Raises:
        UserError: a tensor is missing, in another file, or not in the index.
    """
    missing = [f"{shown(n)} (in {index[n]} by the index)" for n in index if n not in found]
    moved = [f"{shown(n)} ({found[n]}, {index[n]} by the index)" for n in index if found.get(n, index[n]) != index[n]]
    unlisted = [f"{shown(n)} (in {found[n]})" for n in found if n not in index]
    parts = [("missing", missing), ("in another file", moved), ("not in the index", unlisted)]
    told = [f"{what} {_listed(names)}" for what, names in parts if names]
    if told:
        raise UserError(f"{folder}: the index and the files don't agree: {'; '.join(told)}; fetch the folder again")


def _read_index(path: Path) -> dict[str, str]:
    weight_map = read_json(path, MAX_INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{path} has no weight_map {{tensor: file}}; fetch it again, or remove it to use every shard")
    for name, file in weight_map.items():
        # No separator of any system, nothing hidden or relative, no NUL: a name and nothing else.
        if not isinstance(file, str) or not re.fullmatch(r"[^/\\:.\s][^/\\:]{0,250}", file) or not file.isprintable():
            raise UserError(f"{path}: tensor {shown(name)} is said to be in {shown(file)}, expected the name of a file")
        if not file.endswith(ENDING):
            raise UserError(f"{path}: tensor {shown(name)} is said to be in {shown(file)}, expected a {ENDING} file")
    return weight_map


def _inside(folder: Path, name: str, index: Path) -> Path:
    """Returns the file an index names; a link must stay inside the folder, or be one of a Hugging Face cache.

    That cache keeps `REPO/snapshots/REVISION/...` as links into `REPO/blobs`.
    """
    path = folder / name
    try:
        home, target = folder.resolve(strict=True), path.resolve(strict=True)
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing, but {index.name} names it; fetch it again") from error
    except (OSError, RuntimeError) as error:  # a loop of links is a RuntimeError before Python 3.13
        raise UserError(f"{path}, which {index.name} names, can't be followed: {shown(error)}") from error
    blobs = [parent.parent.parent / "blobs" for parent in [home, *home.parents] if parent.parent.name == "snapshots"]
    if not target.is_relative_to(home) and target.parent not in blobs:
        raise UserError(f"{path}, which {index.name} names, is a link out of the folder; put the file itself there")
    return path


def _base(path: Path) -> str:
    """Returns a file's name without ending and number of the shard."""
    name = path.name.removesuffix(INDEX_ENDING).removesuffix(ENDING)
    return re.sub(r"-\d+-of-\d+$", "", name)


def _is_variant(path: Path, bases: set[str]) -> bool:
    """Whether a file is `x.fp16.safetensors` beside `x.safetensors`."""
    base, dot, _ = _base(path).rpartition(".")
    return bool(dot) and base in bases


def _left_out(shards: Sequence[Path], files: Sequence[Path], why: str) -> list[str]:
    names = [path.name for path in shards if path not in files]
    return [f"left out {_listed(names)}: {why}"] if names else []


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
