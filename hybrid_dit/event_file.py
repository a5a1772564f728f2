"""Event files that TensorBoard reads, written without TensorFlow.

A file is a sequence of records: length (uint64, little endian), masked CRC-32C of the length, data, masked CRC-32C of
the data. The data is a protocol buffer `Event` (tensorflow/core/util/event.proto), of which a few fields are used:
    Event    1 wall_time double, 2 step int64, 3 file_version string, 5 summary, 7 session_log
    Summary  1 value (repeated);  Value  1 tag string, 2 simple_value float;  SessionLog  1 status (1: START)
"""

import os
import struct
import time
from collections.abc import Mapping
from pathlib import Path


class EventFile:
    """Scalars by step; a record is on disk when `add` returns. Use it with `with`."""

    def __init__(self, folder: Path, first: int):
        """Opens a new file. TensorBoard drops what earlier files say of step `first` and later ones.

        Args:
            folder: TensorBoard's --logdir, created; it may hold the files of interrupted runs.
            first: the step that comes next.
        """
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns() // 1000:017d}.{os.getpid()}"  # read in the order of names
        self._file = (folder / name).open("wb")
        self._write(_bytes(3, b"brain.Event:2"))
        self._write(_int(2, first) + _bytes(7, _int(1, 1)))

    def __enter__(self) -> "EventFile":
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes the scalars of a step by their tags; "a/b" is shown in group "a"."""
        values = (_bytes(1, tag.encode()) + _float(2, value) for tag, value in scalars.items())
        self._write(_int(2, step) + _bytes(5, b"".join(_bytes(1, value) for value in values)))

    def _write(self, event: bytes) -> None:
        data = _double(1, time.time()) + event
        length = struct.pack("<Q", len(data))
        self._file.write(length + _masked_crc(length) + data + _masked_crc(data))
        self._file.flush()


def crc32c(data: bytes) -> int:
    """Returns the CRC-32C (Castagnoli, RFC 3720) of the data."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def _masked_crc(data: bytes) -> bytes:
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _table_entry(byte: int) -> int:
    for _ in range(8):
        byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
    return byte


_TABLE = [_table_entry(byte) for byte in range(256)]


# Fields of a protocol buffer: (number << 3 | wire type), then the value.


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _int(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _double(field: int, value: float) -> bytes:
    return _varint(field << 3 | 1) + struct.pack("<d", value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _float(field: int, value: float) -> bytes:
    return _varint(field << 3 | 5) + struct.pack("<f", value)
