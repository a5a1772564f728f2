"""Where arrays live on several devices: the batch split over a mesh axis, large parameters too (FSDP).

Most jobs have one axis. Distillation has three: blocks (independent of each other), videos, and tokens. Fine-tuning has
three: copies of the weights (one per slice of a pod), videos together with the parts of the weights, and tokens.

Parameters follow `(regex, PartitionSpec)` rules over their paths. Each path must match exactly one rule, so that a new
parameter can't end up somewhere by accident.
"""

import math
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
from hybrid_dit.ops.context_parallel import Split
from hybrid_dit.rules import assign, like

AXIS = "data"
BLOCK, SEQ, REPLICA = "block", "seq", "replica"
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
WHOLE = 4 * 2**30  # weights of up to this many bytes need not be split: gathering them would cost time at every step


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


def train_mesh(replicas: int = 0, seq: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns a mesh (replica, data, seq) for one device to many slices.

    Weights, moments and averages are split over `data` (FSDP) and copied over the others; videos are split over replica
    and data, tokens over seq. So what crosses slices is one sum of gradients per step.

    Args:
        replicas: copies of the weights; 0 for one per slice (pods joined by a data-centre network), else 1.
        seq: ways to split tokens.
        devices: all of them by default.

    Raises:
        UserError: the ways don't divide the number of devices.
    """
    devices = processes.devices() if devices is None else devices
    slices = [getattr(device, "slice_index", None) or 0 for device in devices]
    return Mesh(np.array(devices)[_arranged(slices, replicas, seq)], (REPLICA, AXIS, SEQ))


def _arranged(slices: Sequence[int], replicas: int, seq: int) -> np.ndarray:
    """Returns which device goes where, [replicas, data, seq], by the slices that they belong to."""
    replicas = replicas or len(set(slices))
    if replicas < 1 or seq < 1 or len(slices) % (replicas * seq):
        raise UserError(
            f"{len(slices)} devices can't hold {replicas} copies of the weights, tokens split {seq} ways; "
            "choose mesh.replicas and mesh.seq whose product divides the number of devices"
        )
    return np.argsort(slices, kind="stable").reshape(replicas, -1, seq)


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
    """Splits the leading axis over the mesh's axes for videos; where that doesn't divide, all get the whole batch."""
    axes = _batch_axes(mesh)
    fits = axes and batch % ways(mesh, axes) == 0
    return NamedSharding(mesh, PartitionSpec(axes if len(axes) > 1 else axes[0])) if fits else replicated(mesh)


def process_share(mesh: Mesh) -> tuple[int, int]:
    """Returns (index, count): of every batch, cut into `count` equal parts, this process needs the part at `index`.

    Processes whose devices share videos (tokens of a video are split over them) need the same part.

    Raises:
        UserError: the devices of this process are not next to each other in the mesh.
    """
    owners = np.vectorize(lambda device: device.process_index, otypes=[int])(mesh.devices)
    return _share(owners.reshape(ways(mesh, _batch_axes(mesh)), -1), jax.process_index())  # videos come first


def _share(owners: np.ndarray, process: int) -> tuple[int, int]:
    """`process_share`, given the process of every device, [parts of a batch, devices]."""
    videos, mine = len(owners), np.flatnonzero((owners == process).any(axis=1)).tolist()
    if videos % len(mine) or mine != list(range(mine[0], mine[0] + len(mine))) or mine[0] % len(mine):
        raise UserError(
            f"this process's devices hold the parts {mine} of {videos} of a batch, which are not next to each other; "
            "choose mesh.replicas and mesh.seq that divide the number of devices of a process, or that it divides"
        )
    return mine[0] // len(mine), videos // len(mine)


def put_batch(tree: PyTree, place: NamedSharding, count: int) -> PyTree:
    """Places this process's part of a batch, one of `count` (see `process_share`), as part of the whole batch."""

    def put_one(x):
        return jax.make_array_from_process_local_data(place, np.asarray(x), (len(x) * count, *x.shape[1:]))

    return jax.tree.map(put_one, tree)


def _batch_axes(mesh: Mesh) -> tuple[str, ...]:
    return tuple(name for name in mesh.axis_names if name in (REPLICA, AXIS))


def param_shardings(mesh: Mesh, params: Mapping, rules: Rules = DIT_RULES) -> PyTree:
    """Returns a NamedSharding for every parameter.

    Args:
        mesh: from `data_mesh`.
        params: nested dict of arrays or shapes.
        rules: (regex over the whole path "a/b/c", spec). An axis that its devices don't divide is left whole.

    Raises:
        ValueError: a path matches no rule or several.
    """
    flat, out = tables.flatten(params), {}
    for path, spec in assign(rules, flat, "sharding").items():
        fits = all(size % ways(mesh, name) == 0 for name, size in zip(spec, flat[path].shape))
        out[path] = NamedSharding(mesh, spec if fits else PartitionSpec())
    return like(params, out)


def context_split(mesh: Mesh) -> Split:
    """Returns how attention splits videos, and the tokens of each over SEQ, on a mesh from `train_mesh`."""
    return Split(mesh, (SEQ,), _batch_axes(mesh))


def split_activations(place: NamedSharding, rows: int) -> AbstractContextManager:
    """In this context, a DiT is traced such that outputs of its dense layers are split by videos, and by tokens (SEQ).

    Without it XLA may choose to gather the activations of the whole batch and to split a matrix product instead.
    Self-attention itself must be split over SEQ too: `context_split`.

    Args:
        place: of the batch, from `batch_sharding`.
        rows: of a video in the blocks, its tokens and their padding (`Split.rows`).
    """
    mesh, videos = place.mesh, place.spec[0] if place.spec else None
    seq = dict(mesh.shape).get(SEQ, 1)

    def split(x, *axes):
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(videos, *axes)))

    def keep(layer, args, kwargs, context):
        out = layer(*args, **kwargs)
        if not isinstance(context.module, nn.Dense):
            return out
        of_video = seq > 1 and out.ndim == 3 and out.shape[1] == rows
        return split(out, SEQ) if of_video else split(out)

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
