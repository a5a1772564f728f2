"""What `convert_weights.py` does: import to Orbax, export for PyTorch, inspect."""

import dataclasses
import math
import re
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from hybrid_dit.atomic import staged_folder
from hybrid_dit.convert import orbax_folder, part_files, sources
from hybrid_dit.convert.files import Weights
from hybrid_dit.convert.params import Params, ValueCheck
from hybrid_dit.convert.pipeline import DTYPES, write_rest
from hybrid_dit.convert.safetensors_file import DTYPES as FILE_DTYPES
from hybrid_dit.convert.source_folders import SourceFolder, find_part, find_pipeline
from hybrid_dit.errors import UserError
from hybrid_dit.progress import Progress


def import_weights(
    source: str | Path, target: str | Path, dtype: str | None = None, allow_nonfinite: bool = False
) -> str:
    """Writes a part or a whole pipeline as Orbax folders and returns what was done in words.

    Args:
        source: a part (see `sources.open_part`), a whole pipeline (see `source_folders`), or a run's workdir.
        target: folder to write; must not exist. A pipeline keeps diffusers' folders, with `params/` in each.
        dtype: of the parameters; None keeps that of every tensor.
        allow_nonfinite: take NaN and Inf as they are.

    Raises:
        UserError: the source can't be converted, its weights are broken, or the target exists.
    """

    def write(folder: Path, part: sources.Part, look, on_bytes) -> None:
        del look  # the files were looked at as they were read
        part_files.write_orbax(folder, part.config, part.attention, part.params, on_bytes)

    return _convert("import", source, target, f"Orbax, {dtype or 'dtypes kept'}", write, allow_nonfinite, dtype=dtype)


def export_weights(source: str | Path, target: str | Path, layout: str, allow_nonfinite: bool = False) -> str:
    """Writes a part or a whole pipeline as folders of safetensors and config.json; returns what was done in words.

    Args:
        source: as for `import_weights`, or what that wrote.
        target: folder to write; must not exist.
        layout: "diffusers", or "wan" (the original repository's), which for a pipeline means the DiT alone.
        allow_nonfinite: take NaN and Inf as they are.

    Raises:
        UserError: the source can't be converted, its weights are broken, or the target exists.
    """

    def write(folder: Path, part: sources.Part, look, on_bytes) -> None:
        look = look if part.layout == "orbax" else None  # PyTorch's files were looked at as they were read
        args = part.kind, part.config, part.attention, part.params, layout
        part_files.write_torch(folder, *args, look=look, on_bytes=on_bytes)

    return _convert("export", source, target, f"{layout} layout", write, allow_nonfinite, dit_alone=layout == "wan")


def _convert(
    label: str,
    source: str | Path,
    target: str | Path,
    told: str,
    write,
    allow_nonfinite: bool,
    dtype: str | None = None,
    dit_alone: bool = False,
) -> str:
    """Runs `write` for every part of `source` into a folder that appears as `target` when all is complete."""
    check = ValueCheck(source, allow_nonfinite)
    with staged_folder(target) as temporary:
        pipeline = find_pipeline(source)
        whole = pipeline is not None and not dit_alone
        parts, notes = _open(source, pipeline, whole, check)
        stored = [part.dtype for part in parts]
        if dtype is not None:
            parts = [_cast(part, dtype) for part in parts]
        total = sum(_size(part.params) for part in parts)
        progress = _ByteProgress(label, total)
        for part in parts:
            write(temporary / part.kind if whole else temporary, part, check.look, progress.add)
        check.finish()
        if whole:
            write_rest(temporary, pipeline.tokenizer, pipeline.shift)
    lines = [f"{p.path} ({sources.TITLES[p.kind]}, {p.layout}, {there})" for p, there in zip(parts, stored)]
    notes += tuple(note for part in parts for note in part.notes)
    return "\n".join([*lines, f"-> {target} ({told}, {total / 1e9:.3g} GB)", *(f"  note: {note}" for note in notes)])


def _open(source: str | Path, pipeline: SourceFolder | None, whole: bool, check: ValueCheck):
    """Returns the parts to convert, and notes for the person."""
    if pipeline is None:
        return [sources.open_part(find_part(source), look=check.look)], ()
    kinds = sources.KINDS if whole else ("transformer",)
    notes = () if whole else ("the DiT alone: surgery leaves text encoder and VAE as they are, keep the originals",)
    return [sources.open_part(pipeline.parts[kind], kind, check.look) for kind in kinds], notes + pipeline.notes


def _cast(part: sources.Part, dtype: str) -> sources.Part:
    return dataclasses.replace(part, params={path: p.astype(DTYPES[dtype]) for path, p in part.params.items()})


class _ByteProgress:
    """Progress in megabytes; several threads may add."""

    def __init__(self, label: str, total: int):
        self._progress, self._done, self._lock = Progress(label, max(total // 10**6, 1), "MB"), 0, threading.Lock()

    def add(self, count: int) -> None:
        with self._lock:
            before, self._done = self._done // 10**6, self._done + count
            if self._done // 10**6 > before:  # once per megabyte: the last line comes once
                self._progress.update(self._done // 10**6)


def _size(params: Params) -> int:
    return sum(math.prod(param.shape) * param.dtype.itemsize for param in params.values())


def inspect_weights(source: str | Path) -> str:
    """Returns a description of a file or folder: layout, sizes, dtypes, and every tensor (blocks folded into a line).

    Raises:
        UserError: there are no weights.
    """
    pipeline = find_pipeline(source)
    if pipeline is not None:
        return "\n\n".join(_inspect(pipeline.parts[kind]) for kind in sources.KINDS)
    return _inspect(find_part(source))


def _inspect(path: Path) -> str:
    if path.is_dir() and orbax_folder.is_orbax_folder(path):
        found = {name: (p.shape, p.dtype.name) for name, p in orbax_folder.open_params(path).items()}
        sizes = {name: math.prod(p.shape) * p.dtype.itemsize for name, p in orbax_folder.open_params(path).items()}
        layout = "orbax"
    else:
        weights = Weights(path)
        found = {name: (shape, FILE_DTYPES[weights.dtypes[name]].name) for name, shape in weights.shapes.items()}
        sizes = {n: math.prod(shape) * FILE_DTYPES[weights.dtypes[n]].itemsize for n, shape in weights.shapes.items()}
        known = sources.recognise(found)
        layout = known and known[1] + (f", names start with {known[2]}" if known[2] else "")
    count = sum(math.prod(shape) for shape, _ in found.values())
    lines = [
        str(path),
        f"  {len(found)} tensors, {count:,} parameters, {sum(sizes.values()) / 1e9:.3g} GB, "
        + sources.told_dtypes(Counter(dtype for _, dtype in found.values())),
    ]
    if layout is None:
        lines.append("  layout: no part of a Wan model")
    else:
        lines.append(f"  layout: {layout}")
        lines += _part_lines(path)
    return "\n".join([*lines, *_folded(found)])


def _part_lines(path: Path) -> list[str]:
    try:
        part = sources.open_part(path)
    except UserError as error:  # inspecting broken files is what this is for
        return [f"  CAN'T BE CONVERTED: {error}"]
    lines = [f"  complete {sources.TITLES[part.kind]}: {_told_config(part)}"]
    if part.kind == "transformer":
        lines.append(f"  attention: {' '.join(s.label for s in part.attention) or 'softmax everywhere'}")
    return lines + [f"  {note}" for note in part.notes if "names start" not in note]


def _told_config(part: sources.Part) -> str:
    c = part.config
    if part.kind == "transformer":
        return (
            f"{c.num_layers} blocks, width {c.dim} = {c.num_heads} heads x {c.head_dim}, feed-forward {c.ffn_dim}, "
            f"{c.in_channels} latent channels, text {c.text_dim}"
        )
    if part.kind == "text_encoder":
        return (
            f"{c.num_layers} blocks, width {c.d_model}, {c.num_heads} heads x {c.d_kv}, feed-forward {c.d_ff}, "
            f"vocabulary {c.vocab_size}"
        )
    return f"{c.z_dim} latent channels, widths {' '.join(str(c.base_dim * m) for m in c.dim_mult)}"


def _folded(found: Mapping[str, tuple[tuple[int, ...], str]]) -> Iterator[str]:
    """Yields one line per tensor; those that differ in their block's number alone share a line."""
    groups: dict[tuple, list[int]] = {}
    for name, (shape, dtype) in found.items():
        match = re.search(r"(?<=\bblocks\.)\d+(?=\.)|(?<=\bblock\.)\d+(?=\.)", name)
        pattern = (name[: match.start()], name[match.end() :]) if match else (name, None)
        groups.setdefault((*pattern, shape, dtype), []).append(int(match[0]) if match else -1)
    for (head, tail, shape, dtype), numbers in groups.items():
        numbers.sort()
        whole = numbers == list(range(numbers[0], numbers[-1] + 1)) and len(numbers) > 1
        shown = f"{{{numbers[0]}..{numbers[-1]}}}" if whole else ",".join(map(str, numbers))
        name = head if tail is None else f"{head}{shown}{tail}"
        yield f"  {dtype:9} {str(list(shape)):24} {name}"
