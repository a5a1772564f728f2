"""Parameters of a Flax model that lie on disk, read piece by piece: what every conversion goes through.

A model is {"blocks/self_attn/q/kernel": Param, ...} whatever the files are; nothing is read before it is asked for, so
that a checkpoint larger than the machine's memory can be converted, and a device can read its own part alone.
"""

import dataclasses
import math
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from hybrid_dit.convert import tables
from hybrid_dit.convert.files import Weights
from hybrid_dit.convert.safetensors_file import DTYPES
from hybrid_dit.errors import UserError

Index = tuple[slice, ...]
SUPPORTED = ("F32", "BF16", "F16")  # dtypes of weights, as safetensors names them
# A matrix of a block is a piece of its own; arrays that aren't stacked are cut where memory would notice.
_STACKED_PIECE, _PIECE = 2**22, 2**26  # bytes


@dataclasses.dataclass(frozen=True, eq=False)
class Param:
    """One parameter.

    Attributes:
        shape: of the Flax array; blocks stacked in front.
        dtype: that `read` returns.
        read: index, a slice of step 1 per axis -> that part as an array of its own.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[Index], np.ndarray]

    @property
    def piece_shape(self) -> tuple[int, ...]:
        """Shape of the parts in which the parameter is read and stored, whole in all axes but the first."""
        if not self.shape:
            return ()
        row = max(1, math.prod(self.shape[1:]) * self.dtype.itemsize)
        rows = (_STACKED_PIECE if len(self.shape) > 2 else _PIECE) // row
        return (max(min(rows, self.shape[0]), 1), *self.shape[1:])

    def pieces(self) -> Iterator[Index]:
        """Yields the index of every piece."""
        rest = tuple(slice(0, n) for n in self.shape[1:])
        if not self.shape:
            yield ()
            return
        rows = self.piece_shape[0]
        for start in range(0, self.shape[0], rows):
            yield (slice(start, min(start + rows, self.shape[0])), *rest)

    def astype(self, dtype) -> "Param":
        """Returns the same parameter in another dtype."""
        dtype = np.dtype(dtype)
        return self if dtype == self.dtype else Param(self.shape, dtype, lambda i: self.read(i).astype(dtype))


Params = Mapping[str, Param]  # path "a/b/c" -> Param


class ValueCheck:
    """Looks at every tensor that passes for values that ruin a model without a word: NaN, Inf, embeddings of zeros."""

    _EMBEDDING = re.compile(r"(?:.*\.)?\w*(?:embed|shared)\w*\.(?:.*\.)?weight")

    def __init__(self, source: object, allow_nonfinite: bool = False):
        """Starts with nothing seen; `source` is for the message."""
        self.source, self.allow_nonfinite = source, allow_nonfinite
        self._lock = threading.Lock()
        self._nonfinite: Counter[str] = Counter()
        self._any_set: dict[str, bool] = {}  # of embeddings

    def look(self, name: str, tensor: np.ndarray) -> None:
        """Notes what is wrong with a tensor or a part of it, if anything; threads may call it."""
        count = count_nonfinite(tensor)
        embedding = self._EMBEDDING.fullmatch(name) and tensor.size
        any_set = bool(embedding and tensor.view(_bits(tensor.dtype)).any())
        with self._lock:
            if count:
                self._nonfinite[name] += count
            if embedding:
                self._any_set[name] = self._any_set.get(name, False) or any_set

    def finish(self) -> None:
        """Raises UserError if a tensor was bad (first ten, then a count)."""
        zero = sorted(name for name, any_set in self._any_set.items() if not any_set)
        problems = [f"{name} is all zeros: the file lacks this embedding" for name in zero]
        if not self.allow_nonfinite:
            bad = sorted(self._nonfinite.items())
            problems += [f"{name} has {count:,} values that are NaN or Inf" for name, count in bad]
        if problems:
            hint = " (--allow-nonfinite takes NaN and Inf as they are)" if self._nonfinite else ""
            raise UserError(f"{self.source} has broken weights{hint}:\n  " + tables.shortened(problems))


def count_nonfinite(array: np.ndarray) -> int:
    """Returns how many values are NaN or infinite; on bits, since comparing 16-bit floats is slow."""
    if not array.size or array.dtype.kind in "iub":
        return 0
    bits = _bits(array.dtype)
    largest = np.array(np.inf, array.dtype).view(bits)
    magnitude = array.view(bits) & ~np.array(1 << (8 * bits.itemsize - 1), bits)
    return 0 if magnitude.max() < largest else int((magnitude >= largest).sum())


def from_torch(
    weights: Weights,
    entries: Mapping[str, tables.Entry],
    abstract: Mapping,
    prefix: str = "",
    look: Callable[[str, np.ndarray], None] | None = None,
) -> dict[str, Param]:
    """Returns the Flax parameters that `weights` hold in a PyTorch layout.

    Args:
        weights: the files.
        entries: the layout's key table, checked against the files; slices that no entry fills are zero.
        abstract: the model's parameters as shapes.
        prefix: of the names in the files.
        look: is shown every tensor (or part of one) that is read, with its name.
    """
    groups: dict[str, dict[int | None, tuple[str, tables.Entry]]] = {path: {} for path in tables.flatten(abstract)}
    for name, entry in entries.items():
        groups[entry.flax][entry.index] = (prefix + name, entry)

    def read_one(name: str, entry: tables.Entry, index: Index) -> np.ndarray:
        axes = tables.KINDS[entry.kind].to_flax or tuple(range(len(entry.torch_shape)))
        if tuple(entry.torch_shape[a] for a in axes) == entry.flax_shape:  # a permutation: read what is needed
            part = weights.read_part(name, tuple(index[axes.index(a)] for a in range(len(axes))))
            if look:
                look(name, part)
            return tables.permuted(part, axes)
        whole = weights.read(name)  # small tensors with axes of length 1, and the patch embedding
        if look:
            look(name, whole)
        return entry.import_(whole)[index]

    def make(path: str, shape: tuple[int, ...]) -> Param:
        group = groups[path]
        dtypes = {DTYPES[weights.dtypes[name]] for name, _ in group.values()}
        dtype = dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)  # holds all of them exactly
        if None in group:
            return Param(shape, dtype, lambda index: read_one(*group[None], index))

        def read(index: Index) -> np.ndarray:
            out = np.zeros([len(range(*i.indices(n))) for i, n in zip(index, shape)], dtype)
            for row, block in enumerate(range(*index[0].indices(shape[0]))):
                if block in group:
                    out[row] = read_one(*group[block], index[1:])
            return out

        return Param(shape, dtype, read)

    return {path: make(path, tuple(leaf.shape)) for path, leaf in tables.flatten(abstract).items()}


def from_tree(tree: Mapping) -> dict[str, Param]:
    """Returns parameters that are in memory."""
    return {
        path: Param(tuple(array.shape), np.dtype(array.dtype), lambda index, a=array: np.asarray(a[index]))
        for path, array in tables.flatten(tree).items()
    }


def to_tree(params: Params, dtype=None) -> dict:
    """Reads everything into a nested dict of NumPy arrays.

    Args:
        params: what to read.
        dtype: of the result; None keeps each parameter's.
    """
    flat = {}
    for path, param in params.items():
        flat[path] = np.empty(param.shape, dtype or param.dtype)
        for index in param.pieces():
            flat[path][index] = param.read(index)
    return tables.unflatten(flat)


def _bits(dtype: np.dtype) -> np.dtype:
    """The unsigned integer of the same width."""
    return np.dtype(f"u{dtype.itemsize}")
