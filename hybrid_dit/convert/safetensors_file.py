"""Reading safetensors: 8 bytes of header length, a JSON header, then the tensors' bytes without gap or overlap.

Format: https://github.com/huggingface/safetensors#format. The reader is our own because the library maps the file,
which keeps the whole of it resident beside the arrays made from it, and reads whole tensors or strided slices only.
Nothing of the header is trusted: once a file is open, every tensor's bytes are known to lie inside it.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from hybrid_dit.convert.json_file import parse_object, shown
from hybrid_dit.convert.open_file import OpenFile
from hybrid_dit.errors import UserError

DTYPES: dict[str, np.dtype] = {  # safetensors' names; those of less than a byte (F4, F6_...) are of no use here
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "C64": np.dtype(np.complex64),
}
METADATA = "__metadata__"
# The library allows 100 MB. Wan 14B needs 0.15; ours keeps hostile JSON, which grows 30-fold, to 0.5 s and 0.12 GB.
MAX_HEADER = 4_000_000
MAX_DIMS = 32  # NumPy 1's limit


class SafetensorsFile:
    """One open file.

    Attributes:
        path: the file.
        shapes: name -> shape, in the order of the data.
        dtypes: name -> dtype as safetensors writes it.
        metadata: free text that the writer left.
        notes: nothing, as far as this format goes.
    """

    def __init__(self, path: Path):
        """Opens a file and checks its whole header.

        Raises:
            UserError: it can't be read, or anything in it contradicts the format or the file's size.
        """
        self.path = path
        self.notes: tuple[str, ...] = ()
        self._file = OpenFile(path)
        size = self._file.size
        header, self._data = self._read_header(size)
        self.metadata = self._checked_metadata(header.pop(METADATA, {}))
        ranges = {name: self._checked(name, info) for name, info in header.items()}
        ordered = sorted(ranges, key=ranges.__getitem__)  # by begin, then end: empty tensors come first
        self._check_tiling(ordered, ranges, size - self._data)
        self.shapes = {name: tuple(header[name]["shape"]) for name in ordered}
        self.dtypes = {name: header[name]["dtype"] for name in ordered}
        self._begin = {name: ranges[name][0] for name in ordered}

    @property
    def bytes_read(self) -> int:
        """Bytes of tensors read so far."""
        return self._file.bytes_read

    def read(self, name: str, ranges: tuple[range, ...]) -> np.ndarray:
        """Returns the part of one tensor that `ranges` (one per axis, of step 1) select; see `OpenFile.read`."""
        offset = self._data + self._begin[name]
        return self._file.read(name, offset, DTYPES[self.dtypes[name]], self.shapes[name], ranges)

    def _read_header(self, size: int) -> tuple[dict, int]:
        """Returns the parsed header and where the data starts."""
        length = int.from_bytes(self._file.head(8), "little")
        if size < 8 or 8 + length > size:
            raise self._broken(f"its header should have {length:,} bytes, but the whole file has {size:,}")
        if length > MAX_HEADER:
            raise self._broken(f"its header has {length:,} bytes, at most {MAX_HEADER:,} are expected")
        content = self._file.head(length, 8)
        if content[:1] != b"{" or len(content) != length:
            raise self._broken(f"its header starts with {content[:8]!r}, expected {{")
        try:
            return parse_object(content, "its header"), 8 + length
        except UserError as error:
            raise self._broken(str(error)) from error

    def _checked_metadata(self, metadata: object) -> dict[str, str]:
        if not isinstance(metadata, dict) or not all(_is_text(t) for pair in metadata.items() for t in pair):
            raise self._broken(f"{METADATA} is {shown(metadata)}, expected texts by name")
        return metadata

    def _checked(self, name: str, info: object) -> tuple[int, int]:
        """Checks what the header says about one tensor by itself; returns where its bytes begin and end."""
        if not _is_text(name):
            raise self._broken(f"{shown(name)} is no name for a tensor")
        what = f"tensor {shown(name)}"
        if not isinstance(info, dict) or info.keys() != {"dtype", "shape", "data_offsets"}:
            raise self._broken(f"{what} is described by {shown(info)}, expected dtype, shape and data_offsets")
        dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            known = ", ".join(DTYPES)
            raise UserError(f"{self.path}: {what} has dtype {shown(dtype)}, known are {known}; fetch it again")
        if not are_counts(shape) or len(shape) > MAX_DIMS:
            raise self._broken(f"{what} has shape {shown(shape)}, expected at most {MAX_DIMS} whole numbers >= 0")
        if not are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            raise self._broken(f"{what} has data_offsets {shown(offsets)}, expected [begin, end]")
        item = DTYPES[dtype].itemsize
        # NumPy refuses an empty array, too, if its other axes multiply to more than it can address.
        if math.prod(max(n, 1) for n in shape) * item >= 2**63:
            raise self._broken(f"{what} has shape {shown(shape)}, more than fits in memory")
        if offsets[1] - offsets[0] != math.prod(shape) * item:
            raise self._broken(
                f"{what} ({dtype}, {shown(shape)}) takes {shown(offsets[1] - offsets[0])} bytes by its data_offsets, "
                f"expected {math.prod(shape) * item}"
            )
        return offsets[0], offsets[1]

    def _check_tiling(self, ordered: list[str], ranges: Mapping[str, tuple[int, int]], size: int) -> None:
        """Checks that the tensors' bytes follow each other from 0 to `size`."""
        end = 0
        for name in ordered:
            if ranges[name][0] != end:
                which = "overlaps the one before it" if ranges[name][0] < end else "leaves a gap before it"
                begins = shown(ranges[name][0])
                raise self._broken(f"tensor {shown(name)} {which}: it begins at {begins}, expected {shown(end)}")
            end = ranges[name][1]
        if end != size:
            raise self._broken(f"{size:,} bytes of tensors are there, expected {shown(end)}")

    def _broken(self, what: str) -> UserError:
        return UserError(f"{self.path} is truncated or not a safetensors file: {what}; fetch it again")


def are_counts(value: object) -> bool:
    """Whether a value is a list or tuple of whole numbers >= 0."""
    return isinstance(value, list | tuple) and all(type(n) is int and n >= 0 for n in value)  # bool is an int, too


def _is_text(value: object) -> bool:
    """Whether a value is a string that UTF-8 can hold: JSON may spell half a surrogate pair."""
    try:
        return isinstance(value, str) and value.encode("utf-8") is not None
    except UnicodeEncodeError:
        return False
