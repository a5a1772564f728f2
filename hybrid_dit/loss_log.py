"""The loss of every training step in a CSV file that survives interruptions: each step has one row, none is missing."""

import csv
from collections import deque
from pathlib import Path

import numpy as np

from hybrid_dit.array_typing import Float, Int
from hybrid_dit.atomic import write_text

HEADER = ("step", "loss", "grad_norm")


class LossLog:
    """Appends rows to a file; a row is on disk when `add` returns. Use it with `with`."""

    def __init__(self, path: Path, finished: int, averaged: int):
        """Opens the file and drops rows after step `finished`, which an interrupted run wrote and which come again.

        Args:
            path: the CSV file.
            finished: the last step whose result is not lost.
            averaged: number of losses that `mean` is taken over.
        """
        rows = [row for row in _read(path) if row[0] <= finished]
        write_text(path, "".join(",".join(row) + "\n" for row in (HEADER, *(_text(*row) for row in rows))))
        self.recent = deque((loss for _, loss, _ in rows), maxlen=averaged)
        self._file = path.open("a", encoding="utf-8")

    def __enter__(self) -> "LossLog":
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    def add(self, step: int, loss: float, grad_norm: float) -> None:
        """Writes a step's row."""
        self._file.write(",".join(_text(step, loss, grad_norm)) + "\n")
        self._file.flush()
        self.recent.append(loss)

    @property
    def mean(self) -> float:
        """Mean of the last losses."""
        return float(np.mean(self.recent))


def read_losses(path: Path) -> tuple[Int[np.ndarray, "n"], Float[np.ndarray, "n"]]:
    """Returns the steps and losses of a log."""
    rows = _read(path)
    return np.array([step for step, _, _ in rows], np.int64), np.array([loss for _, loss, _ in rows], np.float64)


def running_mean(values: Float[np.ndarray, "n"], width: int) -> Float[np.ndarray, "n"]:
    """Mean of each value and the up to `width - 1` before it."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    first = np.maximum(np.arange(len(values)) + 1 - width, 0)
    return (sums[1:] - sums[first]) / (np.arange(len(values)) + 1 - first)


def _text(step: int, loss: float, grad_norm: float) -> tuple[str, str, str]:
    return str(step), repr(loss), repr(grad_norm)  # enough digits to read back the same numbers


def _read(path: Path) -> list[tuple[int, float, float]]:
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))[1:]
    # A power cut may leave half a row at the end.
    return [(int(row[0]), float(row[1]), float(row[2])) for row in rows if len(row) == len(HEADER) and all(row)]
