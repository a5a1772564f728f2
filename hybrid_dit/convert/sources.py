"""Weights of a Wan model wherever they are: finds the part, the layout and the sizes, and reads piece by piece.

A part is the DiT, the text encoder (UMT5) or the VAE. Its source is a file or folder of PyTorch weights in the original
layout or that of diffusers and transformers, with or without ComfyUI's prefix, or an Orbax folder of ours.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from hybrid_dit.convert import hybrid, orbax_folder, sizes, tables, umt5_keys, vae_keys, wan_keys
from hybrid_dit.convert.abstract import abstract_dit, abstract_text, abstract_vae
from hybrid_dit.convert.files import Weights, read_json
from hybrid_dit.convert.params import SUPPORTED, Params, from_torch
from hybrid_dit.errors import UserError
from hybrid_dit.models.umt5 import UMT5Config
from hybrid_dit.models.vae import VAEConfig
from hybrid_dit.models.wan import WanConfig
from hybrid_dit.ops.spec import AttentionSpec

PREFIX = "model.diffusion_model."  # of ComfyUI's single files
KINDS = ("transformer", "text_encoder", "vae")  # names of the parts' folders in a pipeline
TITLES = dict(zip(KINDS, ("Wan DiT", "UMT5 encoder", "Wan VAE")))
LAYOUTS = ("wan", "diffusers")  # the second is transformers' for the text encoder
_MARKS = {  # (part, layout) -> a tensor by which they are known
    ("transformer", "wan"): "blocks.0.self_attn.q.weight",
    ("transformer", "diffusers"): "blocks.0.attn1.to_q.weight",
    ("text_encoder", "wan"): "blocks.0.attn.q.weight",
    ("text_encoder", "diffusers"): "encoder.block.0.layer.0.SelfAttention.q.weight",
    ("vae", "wan"): "encoder.conv1.weight",
    ("vae", "diffusers"): "encoder.conv_in.weight",
}
Config = WanConfig | UMT5Config | VAEConfig


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a model on disk whose names, shapes and dtypes have been checked; values are read on demand.

    Attributes:
        kind: one of `KINDS`.
        path: its file or folder.
        layout: "wan", "diffusers" or "orbax".
        config: its sizes.
        attention: of a DiT, one spec per block; empty for a teacher.
        params: its Flax parameters.
        dtypes: dtype -> number of tensors stored in it.
        notes: what was inferred rather than read, for the person.
    """

    kind: str
    path: Path
    layout: str
    config: Config
    attention: tuple[AttentionSpec, ...]
    params: Params
    dtypes: Counter
    notes: tuple[str, ...] = ()

    @property
    def dtype(self) -> str:
        """The stored dtypes in words."""
        return told_dtypes(self.dtypes)


def told_dtypes(dtypes: Counter) -> str:
    """Returns "bfloat16", or "bfloat16 x 30, float32 x 2" if there are several."""
    return next(iter(dtypes)) if len(dtypes) == 1 else ", ".join(f"{name} x {n}" for name, n in dtypes.items())


def recognise(names) -> tuple[str, str, str] | None:
    """Returns (part, layout, prefix of the names) of tensor names, None if they are none of the known."""
    for prefix in (PREFIX, ""):
        for (kind, layout), mark in _MARKS.items():
            if prefix + mark in names:
                return kind, layout, prefix
    return None


def open_part(path: str | Path, kind: str | None = None, look: Callable[[str, np.ndarray], None] | None = None) -> Part:
    """Finds and checks a part.

    Args:
        path: its file or folder.
        kind: which part is expected; None takes any.
        look: is shown every tensor that is read from PyTorch's layouts, see `params.ValueCheck`.

    Raises:
        UserError: nothing there, no part of a Wan model, or names, shapes and dtypes that don't fit its sizes.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if path.is_dir() and orbax_folder.is_orbax_folder(path):
        part = _open_orbax(path)
    else:
        part = _open_torch(path, Weights(path), kind, look)
    if kind not in (None, part.kind):
        raise UserError(f"{path} holds a {TITLES[part.kind]}, expected a {TITLES[kind]}")
    return part


def abstract(config: Config, attention: tuple[AttentionSpec, ...] = ()) -> dict:
    """Returns the parameter tree of a part as shapes."""
    if isinstance(config, WanConfig):
        return abstract_dit(config, attention)
    return abstract_text(config) if isinstance(config, UMT5Config) else abstract_vae(config)


def entries(
    config: Config, attention: tuple[AttentionSpec, ...], layout: str, shapes: Mapping, found=()
) -> dict[str, tables.Entry]:
    """Returns the key table of a part in "wan" or "diffusers" layout.

    Args:
        config: of the part.
        attention: of a DiT.
        layout: which names.
        shapes: the part's parameters, or their shapes.
        found: names in the file to import; leave out to export.
    """
    if isinstance(config, WanConfig):
        return hybrid.stored_entries(config, attention, layout, shapes)
    if isinstance(config, UMT5Config):
        return tables.expand(umt5_keys.wan_rules() if layout == "wan" else umt5_keys.hf_rules(found), shapes)
    rules = vae_keys.wan_rules if layout == "wan" else vae_keys.diffusers_rules
    return tables.expand(rules(config), shapes)


def _open_torch(path: Path, weights: Weights, kind: str | None, look) -> Part:
    known = recognise(weights.shapes)
    if known is None:
        expected = TITLES[kind] if kind else "Wan DiT, UMT5 encoder or Wan VAE"
        marks = [mark for (k, _), mark in _MARKS.items() if kind in (None, k)]
        raise UserError(
            f"{path} holds no {expected}: none of {', '.join(marks)} is among its {len(weights.shapes)} tensors"
        )
    kind, layout, prefix = known
    shapes = {n.removeprefix(prefix): shape for n, shape in weights.shapes.items() if n.startswith(prefix)}
    config, notes = _config(kind, path, layout, shapes)
    attention = ()
    if kind == "transformer":
        attention = hybrid.read_description(path, config.num_layers) if path.is_dir() else ()
        maps = [name for name in shapes if ".feature_map." in name]
        if maps and not attention:
            raise UserError(f"{path} has feature maps ({maps[0]}, ...) but no {hybrid.FILE} to say what they are for")
    if getattr(config, "num_layers", 0) > len(shapes):  # before a table of as many blocks is made
        raise UserError(f"{path} holds {len(shapes)} tensors, too few for the {config.num_layers} blocks of its config")
    tree = abstract(config, attention)
    table = entries(config, attention, layout, tree, shapes)
    dtypes = {name: weights.dtypes[prefix + name] for name in shapes}
    optional = umt5_keys.is_optional if kind == "text_encoder" else lambda name: False
    tables.check(table, shapes, str(path), optional, dtypes, SUPPORTED)
    return Part(
        kind=kind,
        path=path,
        layout=layout,
        config=config,
        attention=attention,
        params=from_torch(weights, table, tree, prefix, look),
        dtypes=Counter(str(_STORED[dtypes[name]]) for name in table),
        notes=(*((f"names start with {prefix}",) if prefix else ()), *notes, *weights.notes),
    )


def _open_orbax(path: Path) -> Part:
    content = read_json(path / "config.json")
    kind = kind_of_config(content)
    config, _ = _config(kind, path, "diffusers", {})
    attention = hybrid.read_description(path, config.num_layers) if kind == "transformer" else ()
    params = orbax_folder.open_params(path)
    wanted = {name: tuple(leaf.shape) for name, leaf in tables.flatten(abstract(config, attention)).items()}
    wrong = [name for name in wanted if name not in params or params[name].shape != wanted[name]]
    wrong += sorted(params.keys() - wanted.keys())
    problems = [
        f"{name}: found {params[name].shape if name in params else 'nothing'}, expected {wanted.get(name, 'nothing')}"
        for name in wrong
    ]
    if problems:
        raise UserError(f"{path} does not fit its config.json:\n  {tables.shortened(problems)}")
    dtypes = Counter(param.dtype.name for param in params.values())
    return Part(kind, path, "orbax", config, attention, {name: params[name] for name in wanted}, dtypes)


def kind_of_config(content: Mapping) -> str:
    """Returns the part that a config.json describes."""
    if content.get("model_type") == "umt5":
        return "text_encoder"
    return "vae" if content.get("_class_name") == "AutoencoderKLWan" else "transformer"


def _config(kind: str, path: Path, layout: str, shapes: Mapping) -> tuple[Config, tuple[str, ...]]:
    """Returns the sizes from the folder's config.json, or from the tensors' shapes, and what was inferred."""
    if path.is_dir() and (path / "config.json").is_file():
        return read_config(path, kind), ()
    return sizes.INFER[kind](path, layout, shapes)


def read_config(folder: Path, kind: str) -> Config:
    """Reads a part's config.json; a DiT's may be diffusers' or the original one.

    Raises:
        UserError: it is missing or describes something else.
    """
    path = folder / "config.json"
    content = read_json(path)
    try:
        if kind == "text_encoder":
            return UMT5Config.from_hf(content)
        if kind == "vae":
            return VAEConfig.from_diffusers(content)
        read = wan_keys.config_from_diffusers if "num_attention_heads" in content else wan_keys.config_from_wan
        return read(content)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except KeyError as error:
        raise UserError(f"{path} lacks {error}; is it the config of a {TITLES[kind]}?") from error
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{path} has a value of the wrong type ({error}); is it a {TITLES[kind]}'s config?") from error


_STORED = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
