"""What `convert_weights.py` does: import to Orbax, export for PyTorch, inspect."""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from hybrid_dit.atomic import atomic_path, write_json
from hybrid_dit.convert import hybrid, orbax_folder, sources, tables
from hybrid_dit.convert.files import Weights, write_safetensors
from hybrid_dit.convert.pipeline import DIFFUSERS_FILE, DTYPES, save_transformer
from hybrid_dit.errors import UserError

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def import_weights(source: str | Path, target: str | Path, dtype: str | None = None) -> str:
    """Writes a DiT as an Orbax folder and returns what was done in words.

    Args:
        source: see `hybrid_dit.convert.sources`.
        target: folder to write; must not exist.
        dtype: of the parameters; None keeps the source's.

    Raises:
        UserError: the source is no DiT, or the target exists.
    """
    target = _fresh(target)
    dit = sources.open_dit(source)
    dtype = dtype or dit.dtype
    orbax_folder.save(target, dit.config, dit.attention, dit.read(), DTYPES[dtype])
    return _told(dit, target, f"Orbax, {dtype}")


def export_weights(source: str | Path, target: str | Path, layout: str) -> str:
    """Writes a DiT as a folder of safetensors and config.json, in the source's dtype; returns what was done in words.

    Args:
        source: see `hybrid_dit.convert.sources`.
        target: folder to write; must not exist.
        layout: "wan" (the original repository's) or "diffusers".

    Raises:
        UserError: the source is no DiT, or the target exists.
    """
    target = _fresh(target)
    dit = sources.open_dit(source)
    params = dit.read()
    if layout == "diffusers":
        save_transformer(target, dit.config, dit.attention, params, dit.dtype)
    else:
        entries = hybrid.stored_entries(dit.config, dit.attention, layout, params)
        tensors = {name: t.astype(DTYPES[dit.dtype]) for name, t in tables.export_tree(entries, params)}
        with atomic_path(target) as temporary:
            write_safetensors(temporary / DIFFUSERS_FILE, tensors, {"format": "pt"})
            write_json(temporary / "config.json", sources.config_to_wan(dit.config))
            hybrid.write_description(temporary, dit.attention)
    return _told(dit, target, f"{layout} layout, {dit.dtype}")


def inspect_weights(source: str | Path) -> str:
    """Returns a description of a file or folder: layout, sizes, dtypes, and every tensor (blocks folded into a line).

    Raises:
        UserError: there are no weights.
    """
    source = Path(source)
    parts = [source / name for name in ("transformer", "text_encoder", "vae") if (source / name).is_dir()]
    if (source / "model_index.json").is_file() and parts:
        return "\n\n".join(_inspect(part) for part in parts)
    return _inspect(sources.locate(source))


def _inspect(path: Path) -> str:
    if path.is_dir() and orbax_folder.is_orbax_folder(path):
        found, layout = orbax_folder.describe(path), ("orbax", "")
    else:
        weights = Weights(path)
        found = {n: (s, sources.STORED.get(weights.dtypes[n], weights.dtypes[n])) for n, s in weights.shapes.items()}
        layout = sources.layout_of(found)
    sizes = {name: math.prod(shape) for name, (shape, _) in found.items()}
    size = sum(sizes[name] * _BYTES.get(dtype, 1) for name, (_, dtype) in found.items())
    dtypes = Counter(dtype for _, dtype in found.values())
    lines = [
        str(path),
        f"  {len(found)} tensors, {sum(sizes.values()):,} parameters, {size / 1e9:.3g} GB, "
        + ", ".join(f"{dtype} x {count}" for dtype, count in dtypes.items()),
    ]
    if layout is None:
        lines.append("  layout: not a Wan DiT")
    else:
        lines.append(f"  layout: {layout[0]}" + (f", names start with {layout[1]}" if layout[1] else ""))
        lines += _dit_lines(path)
    return "\n".join([*lines, *_folded(found)])


def _dit_lines(path: Path) -> list[str]:
    try:
        dit = sources.open_dit(path)
    except UserError as error:  # inspecting broken files is what this is for
        return [f"  CAN'T BE CONVERTED: {error}"]
    c = dit.config
    blocks = [spec.label for spec in dit.attention]
    return [
        f"  complete Wan DiT: {c.num_layers} blocks, width {c.dim} = {c.num_heads} heads x {c.head_dim}, feed-forward "
        f"{c.ffn_dim}, {c.in_channels} latent channels, text {c.text_dim}",
        f"  attention: {' '.join(blocks) if blocks else 'softmax everywhere'}",
        *(f"  {note}" for note in dit.notes if "names start" not in note),
    ]


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


def _fresh(target: str | Path) -> Path:
    target = Path(target)
    if target.exists():
        raise UserError(f"{target} exists; remove it or give another name")
    return target


def _told(dit: sources.DiTSource, target: Path, as_what: str) -> str:
    notes = "".join(f"\n  note: {note}" for note in dit.notes)
    return f"{dit.path} ({dit.layout}, {dit.dtype}) -> {target} ({as_what}){notes}"
