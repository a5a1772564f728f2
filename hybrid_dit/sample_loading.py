"""What sampling reads from disk, part by part: text encoder and DiT are never in memory together.

Both go straight to the devices, each process reading what its own devices hold.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hybrid_dit import processes, sharding
from hybrid_dit.array_typing import DTypeLike, PyTree
from hybrid_dit.convert import sources, tables
from hybrid_dit.convert.mesh import load_sharded
from hybrid_dit.convert.pipeline import Pipeline, find, load_pipeline
from hybrid_dit.text_cache import TextCache, embedding_file

# Dense layers that are only ever used in the dtype of activations: kept in it, they give the same to the last bit.
_CAST = re.compile(r"(blocks/(self_attn|cross_attn|ffn_).*|patch_embedding|text_embedding_\d|head)/(kernel|bias)")


def sampling_mesh(cfg, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns a mesh for the batches of a config's section `sample`.

    It has as many groups of devices as get an equal share of what goes through the DiT at once: videos, twice as many
    where guidance evaluates its branches together.

    Args:
        cfg: the section.
        devices: all, if not given.
    """
    devices = jax.devices() if devices is None else devices
    branches = 1 if cfg.guidance == 1 or cfg.sequential else 2
    groups = math.gcd(cfg.batch * branches, len(devices))
    return sharding.distill_mesh(groups, len(devices) // groups, devices)


def by_video(mesh: Mesh, batch: int) -> NamedSharding:
    """Splits videos over the groups of devices; where that doesn't divide, every device gets all."""
    divides = batch % mesh.shape[sharding.AXIS] == 0
    return NamedSharding(mesh, PartitionSpec(sharding.AXIS)) if divides else sharding.replicated(mesh)


def encode_texts(weights: str, folder: Path, prompts: Sequence[str]) -> TextCache:
    """Returns the prompts' embeddings from a folder; the text encoder is loaded if some are missing, and freed again.

    Args:
        weights: of the pipeline.
        folder: of embeddings, see `text_cache`.
        prompts: all that will be asked for.
    """
    pipeline = load_pipeline(weights, kinds=())
    processes.on_main(_encode_missing, pipeline, weights, folder, prompts)
    return TextCache(folder, pipeline, prompts)


def _encode_missing(pipeline: Pipeline, weights: str, folder: Path, prompts: Sequence[str]) -> None:
    """Runs the encoder with its matrices split over this process's devices, if there is something to encode."""
    if all(embedding_file(folder, prompt).is_file() for prompt in prompts):
        return
    part = sources.open_part(find(weights).parts["text_encoder"], "text_encoder")
    mesh = sharding.data_mesh(processes.devices())
    TextCache(folder, dataclasses.replace(pipeline, text_params=load_sharded(part, mesh, sharding.TEXT_RULES)), prompts)


def load_dit(source: str | Path | sources.Part, mesh: Mesh, dtype: DTypeLike) -> PyTree:
    """Returns a DiT's parameters on the mesh: whole on every device, or split over all of them if they are large.

    Args:
        source: of the DiT, as for `sources.open_part`.
        mesh: from `sampling_mesh`.
        dtype: of activations.
    """
    part = source if isinstance(source, sources.Part) else sources.open_part(source, "transformer")
    params = {path: p.astype(kept_dtype(path, dtype)) for path, p in part.params.items()}
    return load_sharded(dataclasses.replace(part, params=params), mesh, dit_rules(params, mesh))


def abstract_params(shapes: PyTree, mesh: Mesh, dtype: DTypeLike) -> PyTree:
    """Returns shapes, dtypes and places of what `load_dit` returns, for parameters of these shapes."""
    flat = {p: jax.ShapeDtypeStruct(x.shape, kept_dtype(p, dtype)) for p, x in tables.flatten(shapes).items()}
    tree = tables.unflatten(flat)
    places = sharding.param_shardings(mesh, tree, dit_rules(flat, mesh))
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, places)


def kept_dtype(path: str, dtype: DTypeLike) -> np.dtype:
    """Returns the dtype in which sampling keeps a parameter: a dense layer's in that of activations, else float32."""
    return np.dtype(dtype if _CAST.fullmatch(path) else np.float32)


def dit_rules(params: Mapping, mesh: Mesh) -> sharding.Rules:
    """Returns where parameters {path: anything with shape and dtype} go: whole everywhere unless they are large."""
    size = sum(math.prod(p.shape) * p.dtype.itemsize for p in params.values())
    return sharding.REPLICATED if size <= sharding.WHOLE else sharding.over_all_axes(mesh, sharding.DIT_RULES)


def load_vae(weights: str) -> Pipeline:
    """Returns the pipeline with the parameters of its VAE alone."""
    return load_pipeline(weights, kinds=("vae",))
