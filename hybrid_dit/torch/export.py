"""Reads an exported hybrid into PyTorch models: its description, and its weights in one file or shards."""

from collections.abc import Callable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import torch
from torch import Tensor, nn

from hybrid_dit.convert import description
from hybrid_dit.convert.files import Weights
from hybrid_dit.errors import UserError
from hybrid_dit.ops.spec import AttentionSpec
from hybrid_dit.torch.feature_maps import FEATURE_MAPS

SHOWN = 10  # names listed in an error before a count


def find_transformer(folder: str | Path) -> Path:
    """Returns the folder with the transformer: `folder` itself, or `folder/transformer` of a whole pipeline.

    Raises:
        UserError: neither holds a hybrid.
    """
    folder = Path(folder)
    for place in (folder, folder / "transformer"):
        if (place / description.FILE).is_file():
            return place
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give the folder of an exported hybrid")
    raise UserError(f"{folder} holds no {description.FILE}, so it is no hybrid; load it as any other Wan model")


def read_attention(folder: Path, num_layers: int) -> tuple[AttentionSpec, ...]:
    """Returns the attention of every block.

    Raises:
        UserError: as `description.read_description`; or no block is converted, or one that this side can't compute.
    """
    specs = description.read_description(folder, num_layers)
    if not any(spec.converted for spec in specs):
        raise UserError(f"{folder / description.FILE} converts no block; load the folder as any other Wan model")
    for i, spec in enumerate(specs):
        if spec.feature_map.kind not in FEATURE_MAPS:
            raise UserError(
                f"{folder / description.FILE}, block {i}: feature map {spec.feature_map.kind!r} is unknown in PyTorch, "
                f"which has {', '.join(FEATURE_MAPS)}"
            )
    return specs


def load_into(model: nn.Module, folder: Path, dtype_of: Callable[[str, torch.dtype], torch.dtype], device: str) -> None:
    """Fills every parameter and buffer of `model` that its state dict has, in place of what is there (meta allowed).

    Args:
        model: its state dict has the names and shapes of the export.
        folder: with the safetensors files.
        dtype_of: (name, stored dtype) -> dtype wanted.
        device: where the tensors are put.

    Raises:
        UserError: broken files, or names or shapes of files and model differ.
    """
    weights, wanted = Weights(folder), model.state_dict()
    _check_names(wanted, weights.shapes, folder)
    state = {}
    for name, shape in weights.shapes.items():
        if shape != tuple(wanted[name].shape):
            shapes = f"{shape} in {weights.file_of(name).name}, {tuple(wanted[name].shape)} in the model"
            raise UserError(f"tensor {name} in {folder} has another shape than the model: {shapes}")
        tensor = _to_torch(weights.read(name))
        state[name] = tensor.to(device).to(dtype_of(name, tensor.dtype))
    model.load_state_dict(state, strict=True, assign=True)


def _to_torch(array: np.ndarray) -> Tensor:
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _check_names(expected: Mapping[str, Tensor], found: Mapping[str, tuple[int, ...]], folder: Path) -> None:
    missing, unexpected = expected.keys() - found.keys(), found.keys() - expected.keys()
    problems = [f"missing {_listed(missing)}"] if missing else []
    problems += [f"unexpected {_listed(unexpected)}"] if unexpected else []
    if problems:
        layouts = ("blocks.0.attn1.to_q.weight", "diffusers' layout"), ("blocks.0.self_attn.q.weight", "the original's")
        hint = "".join(f" (the files are in {layout})" for name, layout in layouts if name in unexpected)
        raise UserError(f"the weights in {folder} don't fit the model{hint}: {'; '.join(problems)}")


def _listed(names) -> str:
    names = sorted(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
