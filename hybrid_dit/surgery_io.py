"""What the stages of surgery hand to each other in files: feature maps of stage 1, the choice of stage 2.

Feature maps are one safetensors file with names such as "R4/q/w0" and arrays stacked over all blocks; the choice is a
small JSON file with one label per block.
"""

import json
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path

import numpy as np
import safetensors

from hybrid_dit.array_typing import PyTree
from hybrid_dit.atomic import write_json
from hybrid_dit.convert import tables
from hybrid_dit.convert.files import Weights, read_json, write_safetensors
from hybrid_dit.errors import UserError
from hybrid_dit.ops.spec import AttentionSpec, FeatureMapSpec, from_label

MAPS_FILE = "maps.safetensors"  # in the folder of stage 1
CHOICE_FILE = "rates.json"  # in the folder of stage 2


def specs_from_config(distill) -> dict[str, AttentionSpec]:
    """Returns label -> attention for every rate of the config's `distill` section, in its order.

    Raises:
        UserError: an unknown label, pattern or stabiliser, or one label twice.
    """
    if len(set(distill.rates)) < len(distill.rates):
        raise UserError(f"distill.rates names a rate twice: {', '.join(distill.rates)}")
    feature_map = FeatureMapSpec(
        distill.feature_map, distill.degree, distill.layers, distill.hidden, distill.activation, distill.shared
    )
    fields = {"pattern": distill.pattern, "feature_map": feature_map, "stabiliser": distill.stabiliser}
    return {label: from_label(label, **fields) for label in distill.rates}


def save_maps(path: str | Path, maps: Mapping[str, PyTree]) -> None:
    """Writes feature maps as float32.

    Args:
        path: the file, usually `MAPS_FILE` in the stage's folder.
        maps: label -> {"q": {...}, "k": {...}}, arrays [B, ...].
    """
    tensors = {name: np.asarray(array, np.float32) for name, array in tables.flatten(maps).items()}
    # Labels are listed apart: their order matters for tables, and fixed maps (elu) have no tensor to be known by.
    write_safetensors(path, tensors, {"labels": json.dumps(list(maps))})


def load_maps(path: str | Path) -> dict[str, dict]:
    """Inverse of `save_maps`: label -> {"q": {...}, "k": {...}}, float32 NumPy arrays [B, ...].

    Raises:
        UserError: the file is missing, broken, or was not written by `save_maps`.
    """
    weights = Weights(path)
    with safetensors.safe_open(path, framework="numpy") as handle:
        labels = (handle.metadata() or {}).get("labels")
    if labels is None:
        raise UserError(f"{path} holds no feature maps of a distillation; make it with --config=configs/distill.py")
    tree = tables.unflatten({name: weights.read(name) for name in weights.shapes})
    return {label: {"q": {}, "k": {}, **tree.get(label, {})} for label in json.loads(labels)}


def save_choice(
    path: str | Path,
    blocks: Sequence[str],
    *,
    budget: str | Real,
    cost: Real,
    softmax_cost: Real,
    predicted_error: Real,
    attention_flops_saved: Real,
) -> None:
    """Writes the selected rates.

    Args:
        path: the file, usually `CHOICE_FILE` in the stage's folder.
        blocks: one label per block, "softmax" where it stays.
        budget: as the user gave it.
        cost: of the selection, in the unit of the budget's cost table.
        softmax_cost: of the teacher, likewise.
        predicted_error: sum of the chosen blocks' distillation errors.
        attention_flops_saved: share of the teacher's self-attention FLOPs, 0 to 1.
    """
    numbers = {
        "cost": cost,
        "softmax_cost": softmax_cost,
        "predicted_error": predicted_error,
        "attention_flops_saved": attention_flops_saved,
    }
    write_json(path, {"blocks": list(blocks), "budget": budget, **{name: float(x) for name, x in numbers.items()}})


def load_choice(path: str | Path) -> list[str]:
    """Returns the label of every block.

    Raises:
        UserError: the file is missing, broken, or has no labels.
    """
    blocks = read_json(path).get("blocks")
    if not isinstance(blocks, list) or not all(isinstance(label, str) for label in blocks):
        raise UserError(f'{path} needs an entry "blocks" with one label per block, such as ["softmax", "R4", ...]')
    return blocks
