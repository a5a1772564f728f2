"""Batches from a library of samples, prepared ahead by grain's threads; bad samples are replaced, counted and named.

What a step trains on is a pure function of its number (`hybrid_dit.data.order`). grain runs that function ahead of
training and keeps the position. Its elements are whole batches, so that they don't depend on the number of threads.
"""

import functools
import hashlib
import io
import json
import sys
from typing import NamedTuple

import grain
import ml_dtypes
import numpy as np

from hybrid_dit.convert.json_file import shown
from hybrid_dit.data.library import BadSample, Library, Sample, is_finite
from hybrid_dit.data.order import Order
from hybrid_dit.data.source import Batch, pack
from hybrid_dit.errors import UserError

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
SHOWN = 10  # bad samples in an error message


class Form(NamedTuple):
    """What all samples must look like, and what batches are made of."""

    channels: int  # of latents
    text_dim: int  # width of the text encoder's output
    text_tokens: int  # padded length that the model was trained with
    rows: int  # text rows of a batch without the one that stands for padding; the longest prompt
    dtype: str  # of batches: float32 or bfloat16


class Made(NamedTuple):
    """One element of grain's pipeline."""

    batch: Batch | None  # None: too many samples are bad to fill it
    bad: dict[str, str]  # what was met on the way, name -> reason


class LatentSource:
    """A `Source` of one process over any `Library`.

    Attributes:
        bad: samples that were found to be unusable so far, name -> reason.
        steps: number of batches in which all samples come up about once.
    """

    def __init__(
        self,
        library: Library,
        buckets: dict[str, list[int]],
        form: Form,
        *,
        batch: int,
        seed: int,
        max_bad: int,
        process: int = 0,
        processes: int = 1,
        threads: int = 2,
        ahead: int = 2,
    ):
        """Prepares the order; reads nothing yet.

        Args:
            library: where samples are.
            buckets: name -> sample numbers of one shape.
            form: of samples and batches.
            batch: of all processes together.
            seed: of the order.
            max_bad: number of bad samples that are tolerated on this process.
            process: index of this process, which takes its rows of every batch.
            processes: their number.
            threads: that prepare batches; 0: the caller's own.
            ahead: batches kept ready.

        Raises:
            UserError: the batch doesn't divide, too few samples, or too many bad ones already.
        """
        entries, files = library.index.entries, library.index.file
        blocks = [None if e.block < 0 else (f, e.block) for f, e in zip(files, entries)]
        self._order = functools.partial(Order, buckets, blocks, batch, seed)
        self._rows = range(batch * process // processes, batch * (process + 1) // processes)
        self._library, self._form, self._max_bad, self._process = library, form, max_bad, [process, processes]
        self._options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead if threads else 1)
        self._identity = {"data": library.index.digest(), "settings": _digest([list(buckets), batch, seed])}
        self.bad: dict[str, str] = {}
        self._count(library.index.bad, sys.stdout)  # all processes have found the same: process 0 alone is heard
        self._begin(processes)

    def next(self) -> Batch:
        """Returns the next batch.

        Raises:
            UserError: more samples than `max_bad` are unusable.
        """
        made = next(self._iterator)
        self._count(made.bad, sys.stderr)  # of this process's rows; the others' stdout goes nowhere
        if made.batch is None:
            raise UserError(self._complaint("no usable sample is left for a batch"))
        return made.batch

    def state(self) -> dict:
        """Returns the position, for `restore`; equal on all processes but for `process` and what it found `bad`."""
        order = {"shares": self._shares, "position": self._iterator.get_state()}
        return {**self._identity, **order, "process": self._process, "bad": dict(self.bad)}

    def restore(self, state: dict) -> None:
        """Continues where `state` was taken, by any number of processes, with the same batches of all together.

        Where it was taken by another process, or by one of another number, bad samples are counted anew.

        Raises:
            UserError: it was taken with other data, batch, seed or shapes.
        """
        for name, value in self._identity.items():
            if state.get(name) != value:
                what = "files or samples" if name == "data" else "shapes, batch or seed"
                raise UserError(
                    f"the data position of the checkpoint belongs to other {what}; train on what it was made with, or "
                    "start in another --workdir"
                )
        if state["shares"] != self._shares:
            self._begin(state["shares"])
        self._iterator.set_state(state["position"])
        self.bad = dict(state["bad"] if state["process"] == self._process else self._library.index.bad)

    def _begin(self, shares: int) -> None:
        """Starts at the first batch of the order that was made for this many processes."""
        order = self._order(shares)
        self.steps, self._shares = order.steps, shares
        batches = _Batches(self._library, order, self._rows, self._form, self._max_bad)
        self._iterator = iter(grain.MapDataset.source(batches).to_iter_dataset(self._options))

    def _count(self, bad: dict[str, str], console: io.TextIOBase) -> None:
        new = {name: why for name, why in bad.items() if name not in self.bad}
        self.bad |= new
        for name, why in list(new.items())[:SHOWN]:
            print(f"data: left out {shown(name)}: {why}", file=console, flush=True)
        if new:
            process, processes = self._process
            who = f" on process {process}" if processes > 1 else ""
            told = f"data: {len(self.bad)} bad samples so far{who}, at most {self._max_bad} are accepted"
            print(told, file=console, flush=True)
        if len(self.bad) > self._max_bad:
            raise UserError(self._complaint("too many bad samples"))

    def _complaint(self, what: str) -> str:
        lines = [f"\n  {shown(name)}: {why}" for name, why in list(self.bad.items())[:SHOWN]]
        more = f"\n  and {len(self.bad) - SHOWN} more" if len(self.bad) > SHOWN else ""
        return (
            f"{what}: {len(self.bad)}, and data.max_bad={self._max_bad}. Repair or remove them, or accept more with "
            f"--config.data.max_bad=N:{''.join(lines)}{more}"
        )


class _Batches:
    """Batch n as element n: what grain reads. Safe for threads."""

    def __init__(self, library: Library, order: Order, rows: range, form: Form, max_bad: int):
        self._library, self._order, self._rows, self._form, self._max_bad = library, order, rows, form, max_bad
        self._known: dict[int, str] = {}  # bad samples need not be read again to be known as bad

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, step: int) -> Made:
        samples, keys, bad = [], [], {}
        for row, number in zip(self._rows, self._order.at(step, self._rows).samples.tolist()):
            sample = self._read(number, bad)
            if sample is None:
                for number in self._order.substitutes(step, row, self._max_bad + 1).tolist():
                    sample = self._read(number, bad)
                    if sample is not None:
                        break
                else:
                    return Made(None, bad)
            samples.append(sample)
            keys.append(self._library.key(number))
        form, dtype = self._form, DTYPES[self._form.dtype]
        texts = [pack(s.text.astype(dtype, copy=False), form.rows, form.text_tokens) for s in samples]
        latents = np.empty((len(samples), *samples[0].latents.shape), dtype)
        for i, sample in enumerate(samples):
            latents[i] = sample.latents
        text, count = (np.stack(parts) for parts in zip(*texts))
        return Made(Batch(latents, text, count, tuple(keys)), bad)

    def _read(self, number: int, bad: dict[str, str]) -> Sample | None:
        """Returns a sample that is as it should be, or None and its name and the reason in `bad`."""
        why = self._known.get(number)
        if why is None:
            try:
                sample = self._library.read(number)
                self._check(number, sample)
                return sample
            except BadSample as error:
                why = self._known[number] = str(error)
        bad[self._library.key(number)] = why
        return None

    def _check(self, number: int, sample: Sample) -> None:
        form, expected = self._form, (*self._library.index.entries[number].shape, self._form.channels)
        if sample.latents.shape != expected:
            raise BadSample(f"latents are {list(sample.latents.shape)}, expected {list(expected)}")
        rows, width = sample.text.shape
        if width != form.text_dim:
            raise BadSample(f"text embedding has width {width}, the model takes {form.text_dim}")
        if not rows:
            raise BadSample("text embedding is empty or all zeros")
        if rows > form.rows:
            raise BadSample(f"text has {rows} tokens, batches have room for {form.rows} (data.text_rows)")
        for name, array in (("latents", sample.latents), ("text embedding", sample.text)):
            if not is_finite(array):
                raise BadSample(f"{name} holds NaN or infinity")


def _digest(value) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
