"""A file opened for reading parts of row-major tensors: exact bytes by position, counted, from any thread."""

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
    """One regular file, closed when it is no longer used.

    Attributes:
        path: the file.
        size: its bytes when it was opened.
        bytes_read: bytes of tensors read so far.
    """

    def __init__(self, path: Path):
        """Opens the file.

        Raises:
            UserError: it is missing, no file, or can't be read.
        """
        self.path, self.bytes_read, self._lock = path, 0, threading.Lock()
        try:
            if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for ever
                raise UserError(f"{path} is not a file")
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            weakref.finalize(self, os.close, self._fd)
            self.size = os.fstat(self._fd).st_size
        except FileNotFoundError as error:
            raise UserError(f"{path} is missing") from error
        except OSError as error:
            raise UserError(f"{path} can't be opened: {error.strerror}") from error

    def head(self, count: int, offset: int = 0) -> bytes:
        """Returns `count` bytes at `offset`, fewer where the file ends; for headers, so not counted."""
        if not 0 <= offset < self.size:
            return b""
        try:
            return os.pread(self._fd, min(count, self.size - offset), offset)
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

    def _read_into(self, view: memoryview, offset: int, name: str) -> None:
        while view:  # one call returns at most 2 GiB
            try:
                count = os.preadv(self._fd, [view], offset)
            except OSError as error:
                raise UserError(f"{self.path}: tensor {shown(name)} can't be read: {error.strerror}") from error
            if not count:
                raise UserError(
                    f"{self.path}: tensor {shown(name)} ends early; the file changed while it was being read"
                )
            view, offset = view[count:], offset + count
