"""What a distillation writes about itself: training curves of every block and rate, and errors on held-out prompts."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from hybrid_dit import pictures
from hybrid_dit.array_typing import Float
from hybrid_dit.atomic import atomic_path, write_text
from hybrid_dit.loss_log import running_mean

CURVES = "curves.npz"
BUCKETS = (0, 250, 500, 750, 1000)  # of timesteps
RESAMPLES = 1000
LEVEL = 0.95


class Curves:
    """Loss and relative L1 error of every step, block and rate, before the step's update.

    Attributes:
        labels: of the rates.
        loss: list of float32 [B, rates], one per step.
        error: likewise.
    """

    def __init__(self, labels: Sequence[str]):
        """Starts with no steps."""
        self.labels, self.loss, self.error = list(labels), [], []

    def add(self, metrics: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, float]:
        """Appends a step's metrics as `Distiller.step` returns them; returns each rate's mean error."""
        for name, values in (("loss", self.loss), ("error", self.error)):
            values.append(np.stack([np.asarray(metrics[name][s], np.float32) for s in self.labels], axis=1))
        return dict(zip(self.labels, self.error[-1].mean(axis=0).tolist()))

    def save(self, folder: Path) -> None:
        """Writes `curves.npz`: "labels", "loss" and "error" float32 [steps, B, rates]."""
        with atomic_path(folder / CURVES) as temporary:
            np.savez(temporary, labels=self.labels, loss=np.stack(self.loss), error=np.stack(self.error))

    @classmethod
    def load(cls, folder: Path, steps: int) -> "Curves":
        """Returns the first `steps` steps of what is saved."""
        with np.load(folder / CURVES) as file:
            curves = cls(file["labels"].tolist())
            curves.loss, curves.error = list(file["loss"][:steps]), list(file["error"][:steps])
        return curves

    def report(self, folder: Path) -> None:
        """Writes `loss.csv` (mean error over blocks, step by step), `loss.png`, and one picture per rate, by block."""
        error = np.stack(self.error)
        rows = [[step + 1, *(f"{value:.6g}" for value in values)] for step, values in enumerate(error.mean(axis=1))]
        _write_csv(folder / "loss.csv", ["step", *self.labels], rows)
        steps = np.arange(1, len(error) + 1)
        curves = {label: (steps, error[:, :, r].mean(axis=1)) for r, label in enumerate(self.labels)}
        value_label = "relative L1 error, mean over blocks"
        pictures.loss_curves(folder / "loss.png", curves, value_label=value_label)
        width = max(len(error) // 20, 1)
        for r, label in enumerate(self.labels):
            curves = {
                f"block {b}": (steps, running_mean(error[:, b, r].astype(np.float64), width))
                for b in range(error.shape[1])
            }
            about = {"value_label": f"relative L1 error, mean of {width} steps", "title": f"Every block at {label}"}
            pictures.loss_curves(folder / f"loss_{label}.png", curves, **about)


def bootstrap(errors: Float[np.ndarray, "p s ..."], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Ends of the 95% interval of the mean over prompts p and steps s, by resampling prompts and, in each, steps.

    Errors of one trajectory are alike, so steps alone would promise too much; with few prompts the interval is rough.
    """
    rng = np.random.default_rng(seed)
    prompts, steps = errors.shape[:2]
    means = []
    for _ in range(RESAMPLES):
        p = rng.integers(prompts, size=prompts)[:, None]
        means.append(errors[p, rng.integers(steps, size=(prompts, steps))].mean(axis=(0, 1)))
    return tuple(np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0))


def write_errors(
    folder: Path,
    labels: Sequence[str],
    errors: Mapping[str, Float[np.ndarray, "p s B r"]],
    timesteps: Float[np.ndarray, "s"],
) -> None:
    """Writes `errors.csv`, `errors_by_timestep.csv` and `errors.png`.

    Args:
        folder: of the stage.
        labels: of the rates.
        errors: "undistilled" and "distilled" -> relative L1 of every held-out prompt, step, block and rate.
        timesteps: what the teacher was given at each step.
    """
    means = {name: e.mean(axis=(0, 1)) for name, e in errors.items()}
    low, high = bootstrap(errors["distilled"])
    cells = [(b, r) for b in range(len(low)) for r in range(len(labels))]
    rows = [[b, labels[r], *(f"{x[b, r]:.6g}" for x in (*_pair(means), low, high))] for b, r in cells]
    _write_csv(folder / "errors.csv", ["block", "rate", "undistilled", "distilled", "low", "high"], rows)

    rows = []
    for start, end in zip(BUCKETS, BUCKETS[1:]):
        inside = (timesteps >= start) & ((timesteps < end) | (end == BUCKETS[-1]))
        if inside.any():
            part = {name: e[:, inside].mean(axis=(0, 1)) for name, e in errors.items()}
            rows += [
                [b, labels[r], start, end, int(inside.sum()), *(f"{x[b, r]:.6g}" for x in _pair(part))]
                for b, r in cells
            ]
    _write_csv(
        folder / "errors_by_timestep.csv",
        ["block", "rate", "from_timestep", "to_timestep", "steps", "undistilled", "distilled"],
        rows,
    )
    title = "Relative L1 error of each block's attention after distillation, held-out prompts"
    pictures.error_heatmap(folder / "errors.png", means["distilled"], labels, title=title)


def _pair(values: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    return values["undistilled"], values["distilled"]


def _write_csv(path: Path, header: list[str], rows: list[list]) -> None:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([header, *rows])
    write_text(path, out.getvalue())
