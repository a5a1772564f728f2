"""A file opened for reading parts of row-major tensors: exact bytes by position, counted, from any thread."""

import io
import itertools
import math
import os
import stat
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hybrid_dit.convert.json_file import shown
from hybrid_dit.errors import UserError


class OpenFile:
    """One regular file, or a part of one that is a file of its own (a member of an archive); closed when unused.

    Attributes:
        path: the file; of a member, the archive's path followed by its name.
        size: its bytes when it was opened.
        bytes_read: bytes of tensors read so far.
    """

    def __init__(self, path: Path, member: tuple[str, int, int] | None = None):
        """Opens the file.

        Args:
            path: of the file.
            member: name, first byte and number of bytes of the part that counts; None: all of it.

        Raises:
            UserError: it is missing, no file, can't be read, or is too short for the part.
        """
        self.path, self.bytes_read, self._lock = path, 0, threading.Lock()
        try:
            if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for ever
                raise UserError(f"{path} is not a file")
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            weakref.finalize(self, os.close, self._fd)
            self._begin, self.size = 0, os.fstat(self._fd).st_size
        except FileNotFoundError as error:
            raise UserError(f"{path} is missing") from error
        except OSError as error:
            raise UserError(f"{path} can't be opened: {error.strerror}") from error
        if member:
            name, self._begin, size = member
            self.path = path / name
            if self._begin + size > self.size:
                raise UserError(f"{self.path} lies beyond the end of the file")
            self.size = size

    def head(self, count: int, offset: int = 0) -> bytes:
        """Returns `count` bytes at `offset`, fewer where the file ends; for headers, so not counted."""
        if not 0 <= offset < self.size:
            return b""
        try:
            return os.pread(self._fd, min(count, self.size - offset), self._begin + offset)
        except OSError as error:
            raise UserError(f"{self.path} can't be read: {error.strerror}") from error

    def read(
        self, name: str, offset: int, dtype: np.dtype, shape: tuple[int, ...], ranges: Sequence[range]
    ) -> np.ndarray:
        """Returns a part of a row-major tensor, reading its bytes alone.

        Args:
            name: of the tensor, for messages.
            offset: where its first element is.
            dtype: of the tensor.
            shape: of the whole tensor.
            ranges: what to read, one per axis, of step 1.

        Raises:
            UserError: the disk fails, or the file has become shorter since it was opened.
        """
        array = np.empty([len(r) for r in ranges], dtype)
        target = memoryview(array.reshape(-1).view(np.uint8))
        # Axes that are taken whole join the run of the axis before them; each step along the others is a run.
        axis = next((i for i in reversed(range(len(shape))) if len(ranges[i]) != shape[i]), 0)
        strides = [dtype.itemsize * math.prod(shape[i + 1 :]) for i in range(len(shape))]
        length = len(ranges[axis]) * strides[axis] if shape else dtype.itemsize
        offset += ranges[axis].start * strides[axis] if shape else 0
        filled = 0
        for outer in itertools.product(*ranges[:axis]) if array.nbytes else ():
            start = offset + sum(i * stride for i, stride in zip(outer, strides))
            self._read_into(target[filled : filled + length], start, name)
            filled += length
        with self._lock:
            self.bytes_read += array.nbytes
        return array

    def stream(self) -> io.BufferedReader:
        """Returns the content as a stream."""
        return io.BufferedReader(_Stream(self))

    def _read_into(self, view: memoryview, offset: int, name: str) -> None:
        while view:  # one call returns at most 2 GiB
            try:
                count = os.preadv(self._fd, [view], self._begin + offset)
            except OSError as error:
                raise UserError(f"{self.path}: tensor {shown(name)} can't be read: {error.strerror}") from error
            if not count:
                raise UserError(
                    f"{self.path}: tensor {shown(name)} ends early; the file changed while it was being read"
                )
            view, offset = view[count:], offset + count


class _Stream(io.RawIOBase):
    """An open file, or the part of one, as a stream."""

    def __init__(self, file: OpenFile):
        super().__init__()
        self._file, self._position = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._file.size}[whence]
        if start + offset < 0:
            raise OSError("a position before the start")
        self._position = start + offset
        return self._position

    def readinto(self, buffer) -> int:
        content = self._file.head(len(buffer), self._position)
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)
