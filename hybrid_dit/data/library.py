"""Latents and text embeddings on disk, sample by sample: what the readers of all formats have in common.

A library knows the shape of all its samples before any of them is read, so that every process can work out the whole
order of training by itself. Looking that up takes a while in large sets; it is kept in a file.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hybrid_dit.array_typing import Float
from hybrid_dit.atomic import write_json
from hybrid_dit.convert.json_file import shown
from hybrid_dit.errors import UserError
from hybrid_dit.models.vae import VAEConfig
from hybrid_dit.progress import Progress

VERSION = 1  # of the file that keeps an index
Shape = tuple[int, int, int]  # latent frames, rows, columns


FLOATS = ("bfloat16", "float16", "float32", "float64")


class Sample(NamedTuple):
    """One sample as training wants it, in the dtype of the file."""

    latents: Float[np.ndarray, "t y x c"]  # normalised
    text: Float[np.ndarray, "l e"]  # the prompt's own tokens, no padding


class BadSample(Exception):
    """A sample that can't be used; the text says why."""


class Entry(NamedTuple):
    """Where a sample is and what to expect there."""

    shape: Shape
    length: int  # text tokens; -1: not known before it is read
    address: tuple  # what the reader needs to find it, such as a row or offsets; numbers and texts
    block: int = -1  # samples of a file with equal numbers are read together; -1: alone


@dataclasses.dataclass(frozen=True)
class Index:
    """All samples of a set in a fixed order.

    Attributes:
        files: names, relative to the set's folder.
        file: of each sample, index into `files`.
        entries: of each sample.
        bad: what can't be used, name -> reason.
    """

    files: tuple[str, ...]
    file: Sequence[int]
    entries: Sequence[Entry]
    bad: dict[str, str]

    def digest(self) -> str:
        """Returns a short name of all that is known of the samples, equal on all processes if their data is."""
        rows = [[f, *entry] for f, entry in zip(self.file, self.entries)]
        return hashlib.sha256(json.dumps([self.files, rows]).encode()).hexdigest()[:16]


class Library:
    """Base of the readers. They say which files there are (`find`), what is in one (`scan`) and read a sample.

    Attributes:
        kind: name of the format.
        raw: whether latents on disk are in the VAE's scale instead of the DiT's; by default what the format has.
        folder: of the set.
        index: its samples.
    """

    kind: str
    raw = False
    channels_last = False  # how latents are stored
    keep_index = True
    threads = 8  # that scan files; most of the time is spent waiting for the disk

    def __init__(self, folder: Path, vae: VAEConfig, cache: Path | None = None, raw: bool | None = None):
        """Looks through the folder.

        Args:
            folder: of the set.
            vae: its statistics convert latents in the VAE's scale.
            cache: folder for the index, so that the next start is quick.
            raw: whether latents are in the VAE's scale; None: as usual for the format.

        Raises:
            UserError: there is no such folder, or nothing of this format in it.
        """
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise UserError(f"there is no folder {self.folder}; set --config.data.path to the folder of the data")
        self._mean = np.asarray(vae.latents_mean, np.float32)
        self._scale = 1 / np.asarray(vae.latents_std, np.float32)
        self.raw = self.raw if raw is None else raw
        files, missing = self.find()
        if not files:
            some = "".join(f"\n  {name}: {reason}" for name, reason in list(missing.items())[:5])
            raise UserError(f"{self.folder} has no data of the kind {self.kind}: {self.expected()}{some}")
        self.index = self._indexed(files, missing, cache)

    def find(self) -> tuple[list[Path], dict[str, str]]:
        """Returns the files of the set in order, and what should be there but isn't (name -> reason)."""
        raise NotImplementedError

    def expected(self) -> str:
        """Says what the folder should have held."""
        raise NotImplementedError

    def scan(self, file: Path) -> tuple[list[Entry], dict[str, str]]:
        """Returns the samples in a file and what is unusable in it (name -> reason); reads no tensors.

        Raises:
            UserError, BadSample: nothing of the file can be used.
        """
        raise NotImplementedError

    def load(self, file: Path, entry: Entry) -> tuple[np.ndarray, np.ndarray]:
        """Returns latents [c, t, y, x] (or channels last) and text [l, e], which may be padded with zeros, as stored.

        Raises:
            UserError, BadSample: it can't be read.
        """
        raise NotImplementedError

    def key(self, i: int) -> str:
        """Returns what sample i is called in messages."""
        entry = self.index.entries[i]
        return "/".join([self.index.files[self.index.file[i]], *(str(part) for part in entry.address[:1])])

    def read(self, i: int) -> Sample:
        """Returns sample i; threads may call this at the same time.

        Raises:
            BadSample: it can't be read.
        """
        try:
            latents, text = self.load(self.folder / self.index.files[self.index.file[i]], self.index.entries[i])
        except (UserError, OSError) as error:
            raise BadSample(reason(error)) from error
        latents, text = (a[0] if a.ndim == n and len(a) == 1 else a for a, n in ((latents, 5), (text, 3)))
        if latents.ndim != 4 or text.ndim != 2:
            raise BadSample(f"latents {list(latents.shape)} or text {list(text.shape)} have the wrong number of axes")
        strange = [a.dtype.name for a in (latents, text) if a.dtype.name not in FLOATS]
        if strange:
            raise BadSample(f"holds {strange[0]} instead of floating-point numbers")
        c = latents.shape[-1 if self.channels_last else 0]
        if c != len(self._mean):
            raise BadSample(f"latents have {c} channels, those of the model's VAE have {len(self._mean)}")
        if not self.channels_last:
            latents = transposed(latents.reshape(c, -1)).reshape(*latents.shape[1:], c)
        if self.raw:
            latents = (latents.astype(np.float32) - self._mean) * self._scale
        return Sample(latents, text[: used_rows(text)])

    def _indexed(self, files: list[Path], missing: dict[str, str], cache: Path | None) -> Index:
        names = [str(f.relative_to(self.folder)) for f in files]
        status = [f.stat() for f in files]
        print_of = [[n, s.st_size, s.st_mtime_ns] for n, s in zip(names, status)]
        identity = hashlib.sha256(json.dumps([VERSION, self.kind, print_of]).encode()).hexdigest()[:16]
        kept = cache / f"index_{identity}.json" if cache and self.keep_index else None
        found = _read_kept(kept) or [None] * len(files)
        # What was bad is looked at again: the disk may only have been away.
        again = [i for i, one in enumerate(found) if one is None or one[1]]
        if again:
            progress = Progress(f"data: looking through {self.folder}", len(again), "file")
            with concurrent.futures.ThreadPoolExecutor(self.threads) as pool:
                for done, (i, one) in enumerate(zip(again, pool.map(self._scanned, [files[i] for i in again])), 1):
                    found[i] = one
                    progress.update(done)
            if kept:
                write_json(kept, found)
        entries, places, bad = [], [], dict(missing)
        for number, (rows, unusable) in enumerate(found):
            entries += [Entry(tuple(shape), length, tuple(address), block) for shape, length, address, block in rows]
            places += [number] * len(rows)
            bad |= unusable
        return Index(tuple(names), places, entries, bad)

    def _scanned(self, file: Path) -> tuple[list[Entry], dict[str, str]]:
        try:
            return self.scan(file)
        except (UserError, BadSample, OSError) as error:
            return [], {str(file.relative_to(self.folder)): reason(error)}


def _read_kept(path: Path | None):
    try:
        return json.loads(path.read_text()) if path and path.is_file() else None
    except (ValueError, OSError):  # cut off by a full disk, say: it can be made again
        return None


class Cache:
    """The last few blocks that were read, shared by threads: a block is read once even if several want it."""

    def __init__(self, size: int):
        """Keeps `size` blocks."""
        self._size, self._lock, self._blocks = size, threading.Lock(), {}

    def get(self, key, make):
        """Returns the block `key`, made by `make()` unless it is here."""
        with self._lock:
            future = self._blocks.pop(key, None)
            mine = future is None
            if mine:
                future = concurrent.futures.Future()
            self._blocks[key] = future  # the most recent one is last
            while len(self._blocks) > self._size:
                del self._blocks[next(iter(self._blocks))]
        if mine:
            try:
                future.set_result(make())
            except BaseException as error:
                with self._lock:
                    self._blocks.pop(key, None)
                future.set_exception(error)
        return future.result()


def reason(error: Exception) -> str:
    """Returns an error as one short line."""
    return shown(error, 300)


def latent_shape(shape: Sequence) -> Shape:
    """Returns t, y, x of latents stored as [c, t, y, x], perhaps with one more axis of size 1 before.

    Raises:
        BadSample: it is no such shape.
    """
    inner = shape[1:] if len(shape) == 5 and shape[0] == 1 else shape
    if len(inner) != 4 or not all(isinstance(n, int) and n > 0 for n in inner):
        raise BadSample(f"latents {list(shape)} are not [c, t, y, x]")
    return tuple(int(n) for n in inner[1:])


def transposed(flat: np.ndarray) -> np.ndarray:
    """Returns a [c, n] array as [n, c], row by row in memory."""
    if flat.dtype.itemsize == 2:  # NumPy copies integers faster than types it doesn't know
        return np.ascontiguousarray(flat.view(np.uint16).T).view(flat.dtype)
    return np.ascontiguousarray(flat.T)


def is_finite(array: np.ndarray) -> bool:
    """Returns whether an array has neither NaN nor infinity in it."""
    if array.dtype.name == "bfloat16":  # seven times as fast as isfinite: all ones in the exponent
        return not ((array.view(np.uint16) & 0x7F80) == 0x7F80).any()
    return bool(np.isfinite(array).all())


def used_rows(text: np.ndarray) -> int:
    """Returns the number of rows up to the last one that is not zero: Wan pads embeddings with zeros."""
    rows = np.flatnonzero(text.any(axis=1))
    return int(rows[-1]) + 1 if len(rows) else 0
