"""Weights of a Wan DiT wherever they are: finds the layout, the sizes, and reads them into one Flax tree.

A source is a safetensors file or a folder of them in the original layout or diffusers', with or without ComfyUI's
prefix; a diffusers pipeline folder; a workdir of ours; or an Orbax folder that `convert_weights.py import` wrote.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from hybrid_dit.convert import hybrid, orbax_folder, tables, wan_keys
from hybrid_dit.convert.files import Weights, read_json
from hybrid_dit.convert.pipeline import abstract_dit
from hybrid_dit.errors import UserError
from hybrid_dit.models.wan import WanConfig
from hybrid_dit.ops.spec import AttentionSpec

PREFIX = "model.diffusion_model."  # of ComfyUI's single files
HEAD_DIM = 128  # of every published Wan
STORED = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # safetensors' names of the dtypes that are read
_MARKS = {"wan": "blocks.0.self_attn.q.weight", "diffusers": "blocks.0.attn1.to_q.weight"}
_SIZES = {  # tensors that the sizes are read from: feed-forward, text and time embedding
    "wan": ("blocks.0.ffn.0.weight", "text_embedding.0.weight", "time_embedding.0.weight"),
    "diffusers": (
        "blocks.0.ffn.net.0.proj.weight",
        "condition_embedder.text_embedder.linear_1.weight",
        "condition_embedder.time_embedder.linear_1.weight",
    ),
}


@dataclasses.dataclass(frozen=True)
class DiTSource:
    """A DiT on disk whose keys and shapes have been checked; parameters are read on demand.

    Attributes:
        path: file or folder of the DiT.
        layout: "wan", "diffusers" or "orbax".
        config: its sizes.
        attention: one spec per block; empty for a teacher.
        dtype: of the stored tensors; float32 if they are mixed (it holds all of them exactly).
        notes: what was inferred rather than read, for the person.
        read: returns the Flax parameters as NumPy arrays.
    """

    path: Path
    layout: str
    config: WanConfig
    attention: tuple[AttentionSpec, ...]
    dtype: str
    notes: tuple[str, ...]
    read: Callable[[], dict]


def locate(source: str | Path) -> Path:
    """Returns the file or folder of the DiT within a pipeline folder or workdir; `source` itself otherwise.

    Raises:
        UserError: there is nothing.
    """
    source = Path(source)
    if not source.exists():
        raise UserError(f"{source} does not exist")
    inner = [source / "transformer", source / "finetune" / "transformer"]
    return next((folder for folder in inner if (folder / "config.json").is_file()), source)


def layout_of(names) -> tuple[str, str] | None:
    """Returns (layout, prefix of the names) of a DiT's tensor names, None if they are none of the known."""
    for prefix in (PREFIX, ""):
        for layout, mark in _MARKS.items():
            if prefix + mark in names:
                return layout, prefix
    return None


def open_dit(source: str | Path) -> DiTSource:
    """Finds and checks a DiT.

    Raises:
        UserError: nothing there, no Wan DiT, or keys and shapes that don't fit its sizes.
    """
    path = locate(source)
    if path.is_dir() and orbax_folder.is_orbax_folder(path):
        return _open_orbax(path)
    weights = Weights(path)
    found = layout_of(weights.shapes)
    if found is None:
        raise UserError(
            f"{path} holds no Wan DiT: neither {_MARKS['wan']} nor {_MARKS['diffusers']} is among its "
            f"{len(weights.shapes)} tensors"
        )
    layout, prefix = found
    shapes = {n.removeprefix(prefix): shape for n, shape in weights.shapes.items() if n.startswith(prefix)}
    config, notes = _sizes(path, layout, shapes)
    attention = hybrid.read_description(path, config.num_layers) if path.is_dir() else ()
    maps = [name for name in shapes if ".feature_map." in name]
    if maps and not attention:
        raise UserError(f"{path} has feature maps ({maps[0]}, ...) but no {hybrid.FILE} to say what they are for")
    abstract = abstract_dit(config, attention)
    entries = hybrid.stored_entries(config, attention, layout, abstract)
    tables.check(entries, shapes, str(path))
    return DiTSource(
        path=path,
        layout=layout,
        config=config,
        attention=attention,
        dtype=_common_dtype(path, {weights.dtypes[prefix + name] for name in entries}),
        notes=(*((f"names start with {prefix}",) if prefix else ()), *notes),
        read=lambda: hybrid.import_dit(entries, lambda name: weights.read(prefix + name), abstract),
    )


def config_to_wan(config: WanConfig) -> dict:
    """Returns the original repository's config.json (`WanModel`)."""
    return {
        "_class_name": "WanModel",
        "dim": config.dim,
        "eps": config.eps,
        "ffn_dim": config.ffn_dim,
        "freq_dim": config.freq_dim,
        "in_dim": config.in_channels,
        "model_type": "t2v",
        "num_heads": config.num_heads,
        "num_layers": config.num_layers,
        "out_dim": config.in_channels,
        "patch_size": list(config.patch),
        "text_dim": config.text_dim,
        "text_len": 512,
    }


def _open_orbax(path: Path) -> DiTSource:
    config = _read_config(path)
    attention = hybrid.read_description(path, config.num_layers)
    found = orbax_folder.describe(path)
    wanted = {name: tuple(leaf.shape) for name, leaf in tables.flatten(abstract_dit(config, attention)).items()}
    wrong = [name for name in wanted if name not in found or found[name][0] != wanted[name]]
    wrong += sorted(found.keys() - wanted.keys())
    if wrong:
        there = found.get(wrong[0], ("nothing",))[0]
        raise UserError(f"{path}: parameter {wrong[0]}: found {there}, expected {wanted.get(wrong[0], 'nothing')}")
    dtypes = {dtype for _, dtype in found.values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else "float32"
    return DiTSource(path, "orbax", config, attention, dtype, (), lambda: orbax_folder.load(path))


def _sizes(path: Path, layout: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[WanConfig, tuple[str, ...]]:
    """Returns the sizes from the folder's config.json, or from the tensors' shapes, and what was inferred."""
    if path.is_dir() and (path / "config.json").is_file():
        return _read_config(path), ()
    missing = [n for n in ("patch_embedding.weight", *_SIZES[layout]) if len(shapes.get(n, ())) < 2]
    if missing:
        raise UserError(f"{path} lacks {missing[0]}, so its sizes can't be told, and has no config.json")
    dim, in_channels, *patch = shapes["patch_embedding.weight"]
    if dim % HEAD_DIM:
        raise UserError(
            f"{path} has no config.json, and its width {dim} is no multiple of {HEAD_DIM}, the head width of published "
            "models; put its config.json beside the weights in a folder and give the folder"
        )
    ffn, text, time = (shapes[name] for name in _SIZES[layout])
    config = WanConfig(
        dim=dim,
        num_heads=dim // HEAD_DIM,
        ffn_dim=ffn[0],
        num_layers=1 + max(int(m[1]) for name in shapes if (m := re.match(r"blocks\.(\d+)\.", name))),
        in_channels=in_channels,
        text_dim=text[1],
        freq_dim=time[1],
        patch=tuple(patch),
    )
    return config, (f"no config.json; sizes are from the shapes, {dim // HEAD_DIM} heads = {dim} / {HEAD_DIM}",)


def _read_config(folder: Path) -> WanConfig:
    """Reads config.json of diffusers' layout or the original one."""
    value = read_json(folder / "config.json")
    try:
        if "num_attention_heads" in value:
            return wan_keys.config_from_diffusers(value)
        return WanConfig(
            dim=value["dim"],
            num_heads=value["num_heads"],
            ffn_dim=value["ffn_dim"],
            num_layers=value["num_layers"],
            in_channels=value["in_dim"],
            text_dim=value.get("text_dim", 4096),  # not in the published file; WanModel's default
            freq_dim=value["freq_dim"],
            patch=tuple(value.get("patch_size", (1, 2, 2))),
            eps=value["eps"],
        )
    except KeyError as error:
        raise UserError(f"{folder / 'config.json'} lacks {error}; is it the config of a Wan DiT?") from error


def _common_dtype(path: Path, dtypes: set[str]) -> str:
    unknown = sorted(dtypes - STORED.keys())
    if unknown:
        raise UserError(f"{path} stores tensors as {unknown[0]}; supported are {', '.join(STORED)}")
    return STORED[next(iter(dtypes))] if len(dtypes) == 1 else "float32"
