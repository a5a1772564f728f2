"""Where arrays live on several devices: the batch split over a mesh axis, large parameters too (FSDP).

Most jobs have one axis. Distillation has three: blocks (independent of each other), videos, and tokens.

Parameters follow `(regex, PartitionSpec)` rules over their paths. Each path must match exactly one rule, so that a new
parameter can't end up somewhere by accident.
"""

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hybrid_dit import processes
from hybrid_dit.array_typing import PyTree
from hybrid_dit.convert import tables
from hybrid_dit.errors import UserError

AXIS = "data"
BLOCK, SEQ = "block", "seq"
Rules = Sequence[tuple[str, PartitionSpec]]

# Matrices are split along the axis they contract over; a block's are gathered when the block runs. Vectors are small.
DIT_RULES: Rules = (
    (r"blocks/.*/kernel", PartitionSpec(None, AXIS)),
    (r"blocks/.*(bias|scale|modulation)", PartitionSpec()),
    (r"feature_maps/[qk]/w\d+", PartitionSpec(None, None, AXIS)),
    (r"feature_maps/[qk]/b\d+", PartitionSpec()),
    (r"(patch_embedding|(time|text)_embedding_\d|time_projection|head)/kernel", PartitionSpec(AXIS)),
    (r"(patch_embedding|(time|text)_embedding_\d|time_projection|head)/bias", PartitionSpec()),
    (r"head_modulation", PartitionSpec()),
)

TEXT_RULES: Rules = (
    (r"blocks/.*/kernel", PartitionSpec(None, AXIS)),
    (r"embed/embedding", PartitionSpec(AXIS)),
    (r".*(scale|relative_bias)", PartitionSpec()),
)
REPLICATED: Rules = ((r".*", PartitionSpec()),)


def data_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns a mesh with all devices (or those given) along one axis."""
    return Mesh(np.array(processes.devices() if devices is None else devices), (AXIS,))


def distill_mesh(data: int = 1, seq: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns a mesh (block, data, seq): `data` ways of videos, `seq` of tokens, the rest of the devices for blocks.

    Raises:
        UserError: the ways don't divide the number of devices.
    """
    devices = processes.devices() if devices is None else devices
    if data < 1 or seq < 1 or len(devices) % (data * seq):
        raise UserError(
            f"{len(devices)} devices can't be split {data} ways over videos times {seq} over tokens; "
            "choose mesh.data and mesh.seq whose product divides the number of devices"
        )
    return Mesh(np.array(devices).reshape(-1, data, seq), (BLOCK, AXIS, SEQ))


def over_all_axes(mesh: Mesh, rules: Rules) -> Rules:
    """Returns the rules with the axis of one-axis meshes replaced by all axes of `mesh` together."""
    axes = mesh.axis_names
    return [(pattern, PartitionSpec(*(axes if name == AXIS else name for name in spec))) for pattern, spec in rules]


def ways(mesh: Mesh, name: str | Sequence[str] | None) -> int:
    """Returns how many parts an entry of a PartitionSpec splits an array's axis into."""
    names = () if name is None else (name,) if isinstance(name, str) else name
    return math.prod(mesh.shape[n] for n in names)


def padded(count: int, parts: int) -> int:
    """Returns the smallest multiple of `parts` that is at least `count`."""
    return -(-count // parts) * parts


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, batch: int) -> NamedSharding:
    """Splits the leading axis over the devices; where that doesn't divide, every device gets the whole batch."""
    return replicated(mesh) if batch % mesh.size else NamedSharding(mesh, PartitionSpec(AXIS))


def stacked_sharding(tree: PyTree, mesh: Mesh | None = None) -> PyTree:
    """Returns a NamedSharding per leaf that splits its leading axis, blocks; where that doesn't divide it stays whole.

    For training in which blocks are independent, such as distillation. `mesh` defaults to all devices.
    """
    mesh = mesh or data_mesh()

    def choose(leaf):
        fits = leaf.ndim > 0 and leaf.shape[0] % mesh.size == 0
        return NamedSharding(mesh, PartitionSpec(AXIS)) if fits else replicated(mesh)

    return jax.tree.map(choose, tree)


def param_shardings(mesh: Mesh, params: Mapping, rules: Rules = DIT_RULES) -> PyTree:
    """Returns a NamedSharding for every parameter.

    Args:
        mesh: from `data_mesh`.
        params: nested dict of arrays or shapes.
        rules: (regex over the whole path "a/b/c", spec). An axis that its devices don't divide is left whole.

    Raises:
        ValueError: a path matches no rule or several.
    """
    compiled = [(re.compile(pattern), spec) for pattern, spec in rules]
    out = {}
    for path, leaf in tables.flatten(params).items():
        hits = [spec for pattern, spec in compiled if pattern.fullmatch(path)]
        if len(hits) != 1:
            raise ValueError(f"parameter {path} matches {len(hits)} sharding rules; expected exactly one")
        fits = all(size % ways(mesh, name) == 0 for name, size in zip(hits[0], leaf.shape))
        out[path] = NamedSharding(mesh, hits[0] if fits else PartitionSpec())
    return _like(params, out)


def split_activations(sharding: NamedSharding) -> AbstractContextManager:
    """In this context, a model is traced such that outputs of dense layers have their leading (batch) axis split.

    Without it XLA may choose to gather the activations of the whole batch and to split a matrix product instead.
    """

    def keep(layer, args, kwargs, context):
        out = layer(*args, **kwargs)
        return jax.lax.with_sharding_constraint(out, sharding) if isinstance(context.module, nn.Dense) else out

    return nn.intercept_methods(keep)


def put(tree: PyTree, shardings: PyTree) -> PyTree:
    """Places host arrays that are equal on every process; each process uploads its own devices' parts only."""

    def place(array, sharding):
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(place, tree, shardings)


def to_host(tree: PyTree) -> PyTree:
    """Returns whole NumPy arrays, gathered one at a time so that no device ever holds more than one of them whole."""

    def gather(array):
        whole = jax.device_put(array, replicated(array.sharding.mesh))
        return np.array(whole)

    return jax.tree.map(gather, tree)


def _like(tree: Mapping, flat: Mapping[str, object], prefix: str = "") -> dict:
    """`flat` in the structure of `tree`; unlike `tables.unflatten` it keeps empty subtrees (fixed feature maps)."""
    return {
        name: _like(value, flat, f"{prefix}{name}/") if isinstance(value, Mapping) else flat[f"{prefix}{name}"]
        for name, value in tree.items()
    }
