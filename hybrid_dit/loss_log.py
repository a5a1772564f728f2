"""One JSON object per training step in a file that survives interruptions: each step has one line, none is missing."""

import json
from collections import deque
from pathlib import Path

import numpy as np

from hybrid_dit.array_typing import Float, Int
from hybrid_dit.atomic import write_text


class LossLog:
    """Appends lines to a file; a line is on disk when `add` returns. Use it with `with`."""

    def __init__(self, path: Path | None, finished: int, averaged: int):
        """Opens the file and drops lines after step `finished`, which an interrupted run wrote and which come again.

        Args:
            path: the file; None keeps the mean alone (another process writes).
            finished: the last step whose result is not lost.
            averaged: number of losses that `mean` is taken over.
        """
        rows = [row for row in read_rows(path) if row["step"] <= finished] if path else []
        self.recent = deque((row["loss"] for row in rows), maxlen=averaged)
        self._file = None
        if path:
            write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
            self._file = path.open("a", encoding="utf-8")

    def __enter__(self) -> "LossLog":
        return self

    def __exit__(self, *_) -> None:
        if self._file:
            self._file.close()

    def add(self, step: int, loss: float, **values) -> None:
        """Writes a step's line: step and loss, and whatever else JSON can hold."""
        self.recent.append(loss)
        if self._file:
            self._file.write(json.dumps({"step": step, "loss": loss, **values}) + "\n")
            self._file.flush()

    @property
    def mean(self) -> float:
        """Mean of the last losses."""
        return float(np.mean(self.recent))


def read_rows(path: Path) -> list[dict]:
    """Returns the lines of a log, oldest first; none if there is no file."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]  # a power cut may leave part of a line at the end


def read_losses(path: Path) -> tuple[Int[np.ndarray, "n"], Float[np.ndarray, "n"]]:
    """Returns the steps and losses of a log."""
    rows = read_rows(path)
    return np.array([row["step"] for row in rows], np.int64), np.array([row["loss"] for row in rows], np.float64)


def running_mean(values: Float[np.ndarray, "n"], width: int) -> Float[np.ndarray, "n"]:
    """Mean of each value and the up to `width - 1` before it."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    first = np.maximum(np.arange(len(values)) + 1 - width, 0)
    return (sums[1:] - sums[first]) / (np.arange(len(values)) + 1 - first)
