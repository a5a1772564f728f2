"""Reading `.pth`, `.pt` and `.bin` files of PyTorch, without PyTorch: as data, never as code.

Today's format is a zip archive of a pickle (`data.pkl`) and the storages' bytes (`data/KEY`), neither compressed; the
one before PyTorch 1.6 is five pickles followed by the storages (`torch/serialization.py`).
"""

import io
import math
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from hybrid_dit.convert import tensor_pickle
from hybrid_dit.convert.json_file import shown
from hybrid_dit.convert.open_file import OpenFile
from hybrid_dit.convert.safetensors_file import DTYPES, MAX_DIMS, are_counts
from hybrid_dit.convert.tensor_pickle import Storage, Tensor
from hybrid_dit.errors import UserError

SUFFIXES = (".pth", ".pt", ".bin")
WRAPPERS = ("state_dict", "model", "module")  # names under which training scripts nest the weights
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of the older format


class TorchValue:
    """One open file that `torch.save` wrote, whatever it holds: dicts, lists, numbers, texts, tensors.

    Attributes:
        path: the file.
        value: what was saved, with a description (`tensor_pickle.Tensor`) in place of each tensor.
    """

    def __init__(self, file: OpenFile):
        """Reads all but the tensors' numbers, which are read on demand.

        Raises:
            UserError: the file is broken, or would run code if PyTorch read it.
        """
        self.path = path = file.path
        self._file = file
        try:
            zipped = self._file.head(4) == b"PK\3\4"
            self.value, self._begin = self._read_zip() if zipped else self._read_old()
        except tensor_pickle.ForeignCode as error:
            raise UserError(
                f"{path} is refused: it holds more than tensors ({error}), and could run code if it was read the usual "
                "way. Nothing was run; get the weights as .safetensors"
            ) from error
        except (ValueError, OSError, EOFError, zipfile.BadZipFile, NotImplementedError, struct.error) as error:
            raise UserError(f"{path} is damaged or not a file of torch.save: {shown(error)}; fetch it again") from error

    @property
    def bytes_read(self) -> int:
        """Bytes of tensors read so far."""
        return self._file.bytes_read

    def tensor(self, tensor: Tensor, name: str = "tensor") -> np.ndarray:
        """Returns the numbers of a tensor in `value` (bfloat16 as ml_dtypes.bfloat16).

        Raises:
            UserError: it is not inside its storage, or the file has changed.
        """
        self.check(name, tensor)
        return self._read(name, tensor, tuple(map(range, tensor.shape)))

    def _read(self, name: str, tensor: Tensor, ranges: tuple[range, ...]) -> np.ndarray:
        dtype, shape = DTYPES[tensor.dtype], tuple(tensor.shape)
        begin = self._begin[tensor.storage.key] + tensor.offset * dtype.itemsize
        rows = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        if all(size == 1 or stride == row for size, stride, row in zip(shape, tensor.strides, rows)):
            return self._file.read(name, begin, dtype, shape, ranges)
        count = _span(tensor)
        flat = self._file.read(name, begin, dtype, (count,), [range(count)])
        strides = [n * dtype.itemsize for n in tensor.strides]
        whole = np.lib.stride_tricks.as_strided(flat, shape, strides)
        return np.array(whole[tuple(slice(r.start, r.stop) for r in ranges)], order="C")

    def _read_zip(self) -> tuple[Any, dict[str, int]]:
        """Returns the pickled value, and where each storage begins."""
        with self._file.stream() as stream, zipfile.ZipFile(stream) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
        pickles = [name for name in entries if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError(f"the archive has {len(pickles)} entries data.pkl, expected 1")
        root = pickles[0].removesuffix("data.pkl")
        if f"{root}byteorder" in entries and self._content(entries[f"{root}byteorder"]) != b"little":
            raise ValueError("numbers are stored with the high byte first")
        value = tensor_pickle.read(io.BytesIO(self._content(entries[pickles[0]])))
        begin = {}
        for storage in _storages(value):
            entry = entries.get(f"{root}data/{storage.key}")
            size = storage.count * DTYPES[storage.dtype].itemsize
            if entry is None or entry.file_size != size:
                found = "nothing" if entry is None else f"{entry.file_size} bytes"
                raise ValueError(f"storage {shown(storage.key)} has {found}, expected {shown(size)} bytes")
            begin[storage.key] = self._position(entry)
        return value, begin

    def _position(self, entry: zipfile.ZipInfo) -> int:
        """Returns where an entry's bytes begin, all of which are in the file as they are."""
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 or entry.file_size != entry.compress_size:
            raise ValueError(f"{shown(entry.filename)} in it is compressed, which PyTorch never does")
        head = self._file.head(30, entry.header_offset)  # a local header ends with its name and an extra field
        if head[:4] != b"PK\3\4":
            raise ValueError(f"{shown(entry.filename)} in it is not where the archive says")
        name, extra = struct.unpack("<HH", head[26:])
        begin = entry.header_offset + 30 + name + extra
        if begin + entry.file_size > self._file.size:
            raise ValueError(f"{shown(entry.filename)} in it is longer than the file")
        return begin

    def _content(self, entry: zipfile.ZipInfo) -> bytes:
        if entry.file_size > tensor_pickle.MAX_BYTES:
            raise ValueError(f"{shown(entry.filename)} in it has {entry.file_size:,} bytes")
        return self._file.head(entry.file_size, self._position(entry))

    def _read_old(self) -> tuple[Any, dict[str, int]]:
        """Returns the pickled value, and where each storage begins, of the format before PyTorch 1.6."""
        stream = io.BytesIO(self._file.head(tensor_pickle.MAX_BYTES))
        if (tensor_pickle.read(stream), tensor_pickle.read(stream)) != (_MAGIC, _PROTOCOL):
            raise ValueError("it doesn't start as one")
        system = tensor_pickle.read(stream)
        if not isinstance(system, dict) or system.get("little_endian") is not True:
            raise ValueError("numbers are stored with the high byte first")
        value, keys = tensor_pickle.read(stream), tensor_pickle.read(stream)
        storages = {storage.key: storage for storage in _storages(value)}
        known = isinstance(keys, list) and all(isinstance(key, str) and key in storages for key in keys)
        if not known or len(keys) != len(storages) or len(set(keys)) != len(keys):
            raise ValueError("its list of storages doesn't fit its tensors")
        begin, end = {}, stream.tell()
        for key in keys:
            count = int.from_bytes(self._file.head(8, end), "little")
            if count != storages[key].count:
                raise ValueError(f"storage {shown(key)} has {count} elements, expected {shown(storages[key].count)}")
            begin[key] = end + 8
            end = begin[key] + count * DTYPES[storages[key].dtype].itemsize
            if end > self._file.size:
                raise ValueError(f"the file ends at {self._file.size:,}, storage {shown(key)} at {end:,}")
        return value, begin

    def check(self, name: str, tensor: Tensor) -> None:
        """Checks that a tensor is inside its storage, element by element its own.

        Raises:
            UserError: it isn't.
        """
        numbers = (tensor.shape, tensor.strides, (tensor.offset,))
        if (
            not all(map(are_counts, numbers))
            or len(tensor.shape) != len(tensor.strides)
            or len(tensor.shape) > MAX_DIMS
        ):
            raise UserError(f"{self.path}: tensor {shown(name)} is described by {shown(numbers)}; fetch the file again")
        item, storage = DTYPES[tensor.dtype].itemsize, tensor.storage
        size, there = math.prod(tensor.shape) * item, storage.count * DTYPES[storage.dtype].itemsize
        most = math.prod(max(n, 1) for n in tensor.shape) * item
        if most >= 2**63 or size > there or (tensor.offset + _span(tensor)) * item > there:
            raise UserError(
                f"{self.path}: tensor {shown(name)} ({tensor.dtype}, {shown(list(tensor.shape))}) goes beyond its "
                f"storage of {there:,} bytes, or repeats it; fetch the file again"
            )


class TorchFile(TorchValue):
    """A file of named tensors: a dict of them, or one nested in a dict under a usual name.

    Attributes:
        path: the file.
        shapes: name -> shape.
        dtypes: name -> dtype as safetensors writes it.
        metadata: nothing, as far as this format goes.
        notes: what was unwrapped, for the person.
    """

    def __init__(self, path: Path):
        """Opens a file and checks that all its tensors lie inside it; they are read on demand.

        Raises:
            UserError: the file is broken, would run code if PyTorch read it, or holds something else than tensors.
        """
        super().__init__(OpenFile(path))
        self.metadata: dict[str, str] = {}
        value, self.notes = self._unwrapped(self.value)
        if not isinstance(value, dict) or not value:
            kind = "an empty dict" if value == {} else f"a {type(value).__name__}"
            raise UserError(f"{path} holds {kind} instead of named tensors; is it a file of weights?")
        wrong = [name for name, tensor in value.items() if not isinstance(name, str) or not isinstance(tensor, Tensor)]
        if wrong:
            some = ", ".join(f"{shown(name)} ({type(value[name]).__name__})" for name in wrong[:10])
            more = f" and {len(wrong) - 10} more" if len(wrong) > 10 else ""
            raise UserError(f"{path} holds what is no tensor: {some}{more}; is it a file of weights?")
        self._tensors: dict[str, Tensor] = value
        for name, tensor in value.items():
            self.check(name, tensor)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in value.items()}
        self.dtypes = {name: tensor.dtype for name, tensor in value.items()}

    def read(self, name: str, ranges: tuple[range, ...]) -> np.ndarray:
        """Returns the part of one tensor that `ranges` (one per axis, of step 1) select; see `OpenFile.read`.

        Of a tensor that isn't stored row by row (a transposed one) everything is read.
        """
        return self._read(name, self._tensors[name], ranges)

    def _unwrapped(self, value: Any) -> tuple[Any, tuple[str, ...]]:
        notes: list[str] = []
        for _ in WRAPPERS:  # {"module": {"state_dict": ...}} occurs; more levels than names don't
            inner = [key for key in WRAPPERS if isinstance(value, dict) and isinstance(value.get(key), dict)]
            if not inner:
                break
            others = [shown(key, 40) for key in value if key != inner[0]]
            beside = f"; left out: {', '.join(others[:10])}{', ...' if len(others) > 10 else ''}" if others else ""
            notes.append(f"{self.path.name}: weights are those under {inner[0]!r}{beside}")
            value = value[inner[0]]
        return value, tuple(notes)


def _span(tensor: Tensor) -> int:
    """Returns the number of elements from a tensor's first one to its last one in the storage."""
    if not math.prod(tensor.shape):
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides))


def _storages(value: Any) -> list[Storage]:
    """Returns the storages of all tensors in nested containers, each once."""
    found: dict[Storage, None] = {}
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            found[item.storage] = None
        elif isinstance(item, dict):
            waiting += item.values()
        elif isinstance(item, list | tuple):
            waiting += item
    if len({storage.key for storage in found}) != len(found):
        raise ValueError("it describes one storage in two ways")
    return list(found)
