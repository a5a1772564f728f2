"""An Orbax checkpoint of the Flax DiT (teacher or hybrid) as one folder.

It holds `params/`, `config.json` and for a hybrid `hybrid_config.json`. The configs are those of a diffusers
transformer folder, so that one reader serves both.
"""

from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from hybrid_dit.atomic import atomic_path, write_json
from hybrid_dit.convert import hybrid, tables, wan_keys
from hybrid_dit.errors import UserError
from hybrid_dit.models.wan import WanConfig
from hybrid_dit.ops.spec import AttentionSpec

PARAMS = "params"


def is_orbax_folder(folder: Path) -> bool:
    """Whether `save` wrote this folder."""
    return (folder / PARAMS).is_dir() and (folder / "config.json").is_file()


def save(folder: Path, config: WanConfig, attention: tuple[AttentionSpec, ...], params: Mapping, dtype) -> None:
    """Writes the folder as a whole or not at all, parameters as `dtype`."""
    with atomic_path(folder) as temporary:
        write_json(temporary / "config.json", wan_keys.config_to_diffusers(config))
        hybrid.write_description(temporary, attention)
        tree = jax.tree.map(lambda x: np.asarray(x, dtype), params)
        with ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.save((temporary / PARAMS).resolve(), tree)


def describe(folder: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Returns {parameter path: (shape, dtype)} without reading the parameters.

    Raises:
        UserError: `params/` is no Orbax checkpoint.
    """
    return {path: (tuple(m.shape), str(np.dtype(m.dtype))) for path, m in tables.flatten(_metadata(folder)).items()}


def load(folder: Path) -> dict:
    """Returns the parameters as NumPy arrays in their stored dtype.

    Raises:
        UserError: `params/` is no Orbax checkpoint, or incomplete.
    """
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), _metadata(folder))
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            return checkpointer.restore((folder / PARAMS).resolve(), restore_args=as_numpy)
    except (ValueError, OSError) as error:
        raise UserError(f"{folder / PARAMS} can't be read: {str(error).splitlines()[0]}") from error


def _metadata(folder: Path) -> dict:
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            return checkpointer.metadata((folder / PARAMS).resolve()).item_metadata.tree
    except (ValueError, OSError, AttributeError) as error:
        raise UserError(f"{folder / PARAMS} is not a readable Orbax checkpoint: {error}") from error
