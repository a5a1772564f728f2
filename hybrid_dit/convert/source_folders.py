"""Where the parts of a model are in what a person points at: a pipeline, the original repository's folder, a run."""

import dataclasses
from pathlib import Path

from hybrid_dit.convert.files import read_json
from hybrid_dit.convert.sources import KINDS
from hybrid_dit.errors import UserError

PUBLISHED_SHIFT = 3.0  # flow_shift of the published Wan2.1 T2V pipelines in diffusers' layout
_ORIGINAL = {"text_encoder": "models_t5_*", "vae": "*VAE*"}  # beside the DiT's shards in the original folder
_SUFFIXES = (".pth", ".pt", ".safetensors")


@dataclasses.dataclass(frozen=True)
class SourceFolder:
    """The places of a whole pipeline's parts.

    Attributes:
        folder: the pipeline's.
        parts: kind -> file or folder, for all of `sources.KINDS`.
        tokenizer: folder of the tokenizer.
        shift: timestep shift of the flow schedule.
        notes: what was assumed, for the person.
    """

    folder: Path
    parts: dict[str, Path]
    tokenizer: Path
    shift: float
    notes: tuple[str, ...] = ()


def find_pipeline(source: str | Path) -> SourceFolder | None:
    """Returns where the parts of a whole pipeline are; None if `source` is a part, or a run's workdir.

    Raises:
        UserError: it doesn't exist, or a part of the pipeline is missing.
    """
    source = Path(source)
    if not source.exists():
        raise UserError(f"{source} does not exist")
    if (source / "model_index.json").is_file():
        return _diffusers(source)
    return _original(source) if source.is_dir() and _matches(source, "text_encoder") else None


def find_part(source: str | Path) -> Path:
    """Returns the DiT's folder within a folder that has more than that, `source` itself otherwise."""
    inner = [Path(source) / "transformer", Path(source) / "finetune" / "transformer"]  # the second: a run's workdir
    return next((folder for folder in inner if (folder / "config.json").is_file()), Path(source))


def _diffusers(source: Path) -> SourceFolder:
    missing = [name for name in (*KINDS, "tokenizer") if not (source / name).is_dir()]
    if missing:
        raise UserError(f"{source} has a model_index.json but no {missing[0]}/; fetch the whole pipeline")
    scheduler = source / "scheduler" / "scheduler_config.json"
    content = read_json(scheduler)
    shift = content.get("flow_shift", content.get("shift", 1.0))
    if isinstance(shift, bool) or not isinstance(shift, int | float) or not shift > 0:
        raise UserError(f"{scheduler} has flow_shift {shift!r}; expected a positive number")
    return SourceFolder(source, {kind: source / kind for kind in KINDS}, source / "tokenizer", float(shift))


def _original(source: Path) -> SourceFolder:
    parts = {"transformer": source}
    for kind, pattern in _ORIGINAL.items():
        found = _matches(source, kind)
        if len(found) != 1:
            there = " and ".join(file.name for file in found) or "none"
            raise UserError(f"{source} needs one file {pattern}, as in the original release; there is {there}")
        parts[kind] = found[0]
    tokenizer = source / "google" / "umt5-xxl"
    if not (tokenizer / "tokenizer.json").is_file():
        raise UserError(f"{tokenizer / 'tokenizer.json'} is missing; the original release has it there")
    note = f"the original release has no scheduler file; timestep shift {PUBLISHED_SHIFT:g}, as in diffusers' pipelines"
    return SourceFolder(source, parts, tokenizer, PUBLISHED_SHIFT, (note,))


def _matches(source: Path, kind: str) -> list[Path]:
    return sorted(file for file in source.glob(_ORIGINAL[kind]) if file.suffix in _SUFFIXES)
