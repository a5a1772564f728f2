"""What a surgery's workdir holds, read into plain values; what is missing or broken is named, never an exception.

Everything that a page shows passes through here, so that drawing needs no further checks.
"""

import csv
import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hybrid_dit.convert.files import read_json
from hybrid_dit.errors import UserError
from hybrid_dit.loss_log import read_losses

STAGES = ("distill", "select", "finetune", "export", "evaluate")
_PARTS = re.compile(r"(\d+)|(\D+)")
_BROKEN = (UserError, OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, csv.Error)


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean with its 95% interval; a single video has none."""

    mean: float
    low: float | None
    high: float | None


@dataclasses.dataclass(frozen=True)
class Variant:
    """What `evaluate` measured of one variant; None where it doesn't apply.

    Attributes:
        name: teacher, undistilled, distilled, finetuned.
        score: 0 to 100, for videos of moving shapes.
        minus_teacher: the same minus the teacher's, pairwise.
        psnr: to the teacher's videos in dB.
        ssim: to the teacher's videos.
        motion: over the teacher's.
        velocity: timestep -> relative L1 error.
        denoise: seconds per video.
        decode: seconds per video.
        flops: of attention per video.
        saved: share of the teacher's FLOPs.
        each: score of every video.
        parts: parts of the score.
    """

    name: str
    score: Interval | None
    minus_teacher: Interval | None
    psnr: Interval | None
    ssim: Interval | None
    motion: Interval | None
    velocity: Mapping[float, Interval]
    denoise: float
    decode: float
    flops: float
    saved: float
    each: tuple[float, ...]
    parts: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Results:
    """The results of `evaluate`: how they were made, and the variants in order."""

    about: str
    variants: tuple[Variant, ...]


@dataclasses.dataclass(frozen=True)
class Errors:
    """Stage 1's errors on held-out prompts: (block, rate) -> (undistilled, distilled, low, high)."""

    blocks: int
    rates: tuple[str, ...]
    cells: Mapping[tuple[int, str], tuple[float, float, float, float]]


@dataclasses.dataclass(frozen=True)
class Choice:
    """Rates of all blocks with what they cost (share of softmax's) and the sum of their errors."""

    blocks: tuple[str, ...]
    share: float
    error: float
    saved: float


@dataclasses.dataclass(frozen=True)
class Front:
    """All efficient choices, ascending in cost, and models with one rate by name ("4R2")."""

    unit: str
    efficient: tuple[Choice, ...]
    homogeneous: Mapping[str, Choice]


@dataclasses.dataclass
class Contents:
    """What there is; fields are None or empty where a stage is missing.

    Attributes:
        workdir: that was read.
        status: of every stage: complete, not complete, or missing.
        results: of evaluate.
        budget: of select, as the user gave it.
        chosen: rates in use.
        homogeneous: the best model with one rate in the same budget.
        errors: of distill.
        front: of select.
        distill_loss: rate -> relative L1 error at every step, mean over blocks.
        finetune_loss: (steps, flow-matching losses).
        settings: seed and sections, of all stages together.
        environment: stage -> {what: text}.
        problems: a sentence for each file that can't be read.
    """

    workdir: Path
    status: dict[str, str]
    results: Results | None = None
    budget: str = ""
    chosen: Choice | None = None
    homogeneous: Choice | None = None
    errors: Errors | None = None
    front: Front | None = None
    distill_loss: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    finetune_loss: tuple[list[int], list[float]] | None = None
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    environment: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)
    problems: list[str] = dataclasses.field(default_factory=list)

    @property
    def rates(self) -> list[str]:
        """All rates that occur, R2 before R4 before linear, without softmax; a rate's place decides its colour."""
        found = {*self.distill_loss, *(self.errors.rates if self.errors else ())}
        choices = [self.chosen, self.homogeneous, *(self.front.homogeneous.values() if self.front else ())]
        for choice in filter(None, choices):
            found.update(choice.blocks)
        return sorted(found - {"softmax"}, key=lambda rate: [int(n) if n else s for n, s in _PARTS.findall(rate)])


def read(workdir: Path) -> Contents:
    """Returns what `workdir` holds.

    Raises:
        UserError: it holds no stage of a surgery.
    """
    status = {}
    for stage in STAGES:
        done, there = (workdir / stage / "done.json").is_file(), (workdir / stage).is_dir()
        status[stage] = "complete" if done else "not complete" if there else "missing"
    if set(status.values()) == {"missing"}:
        raise UserError(
            f"{workdir} holds no stage of a surgery ({', '.join(STAGES)}); give the --workdir of one, "
            "or make one with --config=configs/surgery.py"
        )
    found = Contents(workdir, status)

    def attempt(file: str, reader: Callable[[Path], Any]) -> Any:
        path = workdir / file
        if not path.is_file():
            return None
        try:
            return reader(path)
        except _BROKEN as error:
            reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            found.problems.append(f"{file} can't be read and is left out ({reason})")
            return None

    found.results = attempt("evaluate/results.json", _results)
    chosen = attempt("select/rates.json", lambda path: (str(read_json(path)["budget"]), _choice(read_json(path))))
    found.budget, found.chosen = chosen or ("", None)
    found.homogeneous = attempt("select/homogeneous.json", lambda path: _choice(read_json(path)))
    found.errors = attempt("distill/errors.csv", _errors)
    found.front = attempt("select/pareto.json", _front)
    found.distill_loss = attempt("distill/loss.csv", _distill_loss) or {}
    found.finetune_loss = attempt("finetune/metrics.jsonl", _finetune_loss)
    for stage in STAGES:
        found.settings |= attempt(f"{stage}/settings.json", _settings) or {}
        environment = attempt(f"{stage}/environment.json", read_json)
        if environment:
            found.environment[stage] = {str(what): str(text) for what, text in environment.items()}
    return found


def _results(path: Path) -> Results:
    results = read_json(path)
    about = f"{int(results['videos'])} videos per variant from the same noise"
    about += f": {results['sampler']}, on {results['machine']}"
    return Results(about, tuple(_variant(name, row) for name, row in results["variants"].items()))


def _variant(name: str, row: Mapping[str, Any]) -> Variant:
    velocity = row.get("velocity_error") or {"timesteps": ()}
    return Variant(
        name=name,
        score=_interval(row.get("score")),
        minus_teacher=_interval(row.get("score_minus_teacher")),
        psnr=_interval(row["psnr_to_teacher"]),
        ssim=_interval(row.get("ssim_to_teacher")),
        motion=_interval(row.get("motion_to_teacher")),
        velocity={_finite(t): _interval(x) for t, x in zip(velocity["timesteps"], velocity.get("l1", ()))},
        denoise=_finite(row["seconds_denoise"]),
        decode=_finite(row["seconds_decode"]),
        flops=_finite(row["attention_flops"]),
        saved=_finite(row["attention_flops_saved"]),
        each=tuple(_finite(x) for x in row.get("score_of_each_video", ())),
        parts={part: _finite(x) for part, x in row.get("parts", {}).items()},
    )


def _interval(values: Any) -> Interval | None:
    if values is None:
        return None
    mean, low, high = values
    return Interval(_finite(mean), None if low is None else _finite(low), None if high is None else _finite(high))


def _choice(numbers: Mapping[str, Any]) -> Choice:
    blocks = tuple(str(label) for label in numbers["blocks"])
    share = _finite(numbers["cost"]) / _finite(numbers["softmax_cost"])
    return Choice(blocks, share, _finite(numbers["predicted_error"]), _finite(numbers["attention_flops_saved"]))


def _front(path: Path) -> Front:
    front = read_json(path)
    efficient = sorted((_choice(point) for point in front["efficient"]), key=lambda c: c.share)
    if not efficient:
        raise ValueError("no efficient choice in it")
    return Front(str(front["unit"]), tuple(efficient), {k: _choice(v) for k, v in front["homogeneous"].items()})


def _errors(path: Path) -> Errors:
    rows = _rows(path)
    columns = ("undistilled", "distilled", "low", "high")
    cells = {(int(row["block"]), row["rate"]): tuple(_finite(row[c]) for c in columns) for row in rows}
    rates = tuple(dict.fromkeys(row["rate"] for row in rows))
    blocks = 1 + max(block for block, _ in cells)
    if len(cells) != blocks * len(rates):
        raise ValueError(f"{len(cells)} cells for {blocks} blocks and {len(rates)} rates")
    return Errors(blocks, rates, cells)


def _distill_loss(path: Path) -> dict[str, list[float]]:
    rows = _rows(path)
    return {rate: [float(row[rate]) for row in rows] for rate in rows[0] if rate != "step"}


def _finetune_loss(path: Path) -> tuple[list[int], list[float]]:
    steps, losses = read_losses(path)
    if not len(steps):
        raise ValueError("it has no steps")
    return steps.tolist(), losses.tolist()


def _settings(path: Path) -> dict[str, Any]:
    return {str(name): value for name, value in read_json(path).items()}


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise ValueError("no rows in it")
    return rows


def _finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{value} is not finite")
    return number
