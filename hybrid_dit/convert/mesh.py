"""Weights from PyTorch files straight to the devices of a mesh: every process reads its own devices' parts alone."""

from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from hybrid_dit import sharding
from hybrid_dit.array_typing import DTypeLike, PyTree
from hybrid_dit.convert import tables
from hybrid_dit.convert.params import Index, Param
from hybrid_dit.convert.sources import Part, open_part


def load_sharded(
    source: str | Path | Part,
    mesh: Mesh,
    rules: sharding.Rules = sharding.DIT_RULES,
    dtype: DTypeLike | None = None,
) -> PyTree:
    """Returns a part's Flax parameters as arrays on the mesh, without an intermediate checkpoint.

    Args:
        source: file or folder of a part (see `sources.open_part`), or one that is open.
        mesh: devices of all processes.
        rules: where each parameter goes, see `sharding.param_shardings`.
        dtype: of the arrays; None keeps the stored one.

    Raises:
        UserError: as `open_part`.
        ValueError: a parameter matches no rule or several.
    """
    part = source if isinstance(source, Part) else open_part(source)
    shapes = {path: jax.ShapeDtypeStruct(p.shape, p.dtype) for path, p in part.params.items()}
    places = tables.flatten(sharding.param_shardings(mesh, tables.unflatten(shapes), rules))
    arrays = {path: _place(p if dtype is None else p.astype(dtype), places[path]) for path, p in part.params.items()}
    return tables.unflatten(arrays)


def _place(param: Param, where: jax.sharding.NamedSharding) -> jax.Array:
    wanted = {_bounds(index, param.shape) for index in where.addressable_devices_indices_map(param.shape).values()}
    # Neighbouring devices hold neighbouring parts: one read of all of them has longer runs in the file.
    around = tuple((min(b[a][0] for b in wanted), max(b[a][1] for b in wanted)) for a in range(len(param.shape)))
    if _size(around) > sum(map(_size, wanted)):
        parts = {bounds: param.read(_slices(bounds)) for bounds in wanted}
    else:
        whole = param.read(_slices(around))
        parts = {b: whole[tuple(slice(i - o[0], j - o[0]) for (i, j), o in zip(b, around))] for b in wanted}
    return jax.make_array_from_callback(param.shape, where, lambda index: parts[_bounds(index, param.shape)])


def _bounds(index: Index, shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple(part.indices(n)[:2] for part, n in zip(index, shape))


def _slices(bounds: tuple[tuple[int, int], ...]) -> Index:
    return tuple(slice(*pair) for pair in bounds)


def _size(bounds: tuple[tuple[int, int], ...]) -> int:
    return int(np.prod([j - i for i, j in bounds], dtype=np.int64))
