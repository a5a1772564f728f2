"""The numbers of an evaluation: every variant's videos against the prompts and against the teacher's, as tables."""

import csv
import dataclasses
import io
from collections.abc import Mapping, Sequence

import numpy as np

from hybrid_dit import fidelity, scoring
from hybrid_dit.data.shapes import Scene
from hybrid_dit.metrics import bootstrap_interval, bootstrap_ratio
from hybrid_dit.motion import motion_magnitude
from hybrid_dit.ops.spec import AttentionSpec

_INTERVALS = (
    "score",
    "score_minus_teacher",
    "psnr_to_teacher",
    "ssim_to_teacher",
    "motion",
    "motion_to_teacher",
)


@dataclasses.dataclass(frozen=True)
class Sampled:
    """A variant's videos and what they took.

    Attributes:
        videos: uint8 [n, t, y, x, 3], as the VAE gave them (H.264 would cost score).
        denoise: seconds per video.
        decode: seconds per video.
        attention: one spec per block.
        times: timesteps at which velocities were compared with the teacher's, [k].
        errors: their relative errors in the norms "l1" and "l2", [k, n]; empty for the teacher.
    """

    videos: np.ndarray
    denoise: float
    decode: float
    attention: tuple[AttentionSpec, ...]
    times: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))
    errors: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)


def summarise(sampled: Mapping[str, Sampled], scenes: Sequence[Scene] | None, flops: Mapping[str, int]) -> dict:
    """Returns the numbers of every variant; intervals are [mean, low, high] (95%, bootstrap over the videos).

    Args:
        sampled: all variants, the teacher first.
        scenes: what the videos should show, to score them; None reports likeness to the teacher's videos alone.
        flops: attention FLOPs per video.
    """
    teacher = sampled["teacher"]
    moves = teacher.videos.shape[1] > 1  # a picture has no motion
    teacher_motion = np.array([motion_magnitude(video) for video in teacher.videos]) if moves else None
    results, teacher_total = {}, None
    for name, result in sampled.items():
        row = {"blocks": [spec.label for spec in result.attention] or "softmax everywhere"}
        if scenes is not None:
            scores = scoring.score_batch(result.videos, scenes)
            teacher_total = scores["total"] if teacher_total is None else teacher_total
            row["score"] = _interval(scores["total"])
            row["score_minus_teacher"] = _interval(scores["total"] - teacher_total)
            row["score_of_each_video"] = [round(float(x), 2) for x in scores["total"]]
            row["parts"] = {part: round(float(values.mean()), 2) for part, values in scores.items() if part != "total"}
        own = name == "teacher"  # nothing to compare with
        row["psnr_to_teacher"] = None if own else _interval(fidelity.psnr(result.videos, teacher.videos))
        row["ssim_to_teacher"] = None if own else _interval(fidelity.ssim(result.videos, teacher.videos), 4)
        row["motion"] = row["motion_to_teacher"] = None
        if moves:
            motion = teacher_motion if own else np.array([motion_magnitude(video) for video in result.videos])
            row["motion"] = _interval(motion, 4)
            row["motion_to_teacher"] = None if own else _ratio(motion, teacher_motion)
        row["velocity_error"] = {
            "timesteps": [round(float(t), 2) for t in result.times],
            **{norm: [_interval(at, 5) for at in errors] for norm, errors in result.errors.items()},
        }
        row["seconds_denoise"] = round(result.denoise, 4)
        row["seconds_decode"] = round(result.decode, 4)
        row["attention_flops"] = flops[name]
        row["attention_flops_saved"] = round(1 - flops[name] / flops["teacher"], 4)
        results[name] = row
    return results


def to_table(results: Mapping) -> str:
    """Returns the results as an aligned text table."""
    head = [
        "score",
        "minus teacher",
        "PSNR to teacher",
        "SSIM",
        "motion",
        "denoise",
        "decode",
        "attention FLOPs",
        "saved",
    ]
    rows = [["", *head]]
    for name, row in results["variants"].items():
        rows.append(
            [
                name,
                _show(row.get("score")),
                "" if name == "teacher" else _show(row.get("score_minus_teacher")),
                "" if name == "teacher" else _show(row["psnr_to_teacher"], " dB"),
                "" if name == "teacher" else f"{row['ssim_to_teacher'][0]:.3f}",
                "" if name == "teacher" or not row["motion_to_teacher"] else f"{row['motion_to_teacher'][0]:.0%}",
                f"{row['seconds_denoise']:.2f} s",
                f"{row['seconds_decode']:.2f} s",
                f"{row['attention_flops']:.3g}",
                f"{row['attention_flops_saved']:.1%}",
            ]
        )
    kept = [c for c in range(len(rows[0])) if c == 0 or any(row[c] for row in rows[1:])]  # no scores, no column
    widths = [max(len(row[c]) for row in rows) for c in kept]
    lines = ["  ".join(row[c].ljust(w) for c, w in zip(kept, widths)).rstrip() for row in rows]
    hybrid = results["variants"]["finetuned"]["blocks"]
    return "\n".join(
        [
            f"{results['videos']} videos per variant, same noise: {results['sampler']}, on {results['machine']}",
            "seconds and FLOPs are per video",
            *lines,
            "[low, high]: 95% bootstrap interval over the videos; SSIM and motion are those relative to the teacher",
            f"blocks of the hybrid: {hybrid if isinstance(hybrid, str) else ' '.join(hybrid)}",
        ]
    )


def to_csv(results: Mapping) -> str:
    """Returns one line per variant; an interval is three columns."""
    rows = []
    for name, row in results["variants"].items():
        line = {"variant": name}
        for what in _INTERVALS:
            mean, low, high = row.get(what) or (None,) * 3
            line |= {what: mean, f"{what}_low": low, f"{what}_high": high}
        line |= {k: row[k] for k in ("seconds_denoise", "seconds_decode", "attention_flops", "attention_flops_saved")}
        rows.append(line | row.get("parts", {}))
    out = io.StringIO()
    writer = csv.DictWriter(out, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def velocity_csv(results: Mapping) -> str:
    """Returns one line per variant and timestep: relative L1 and L2 errors of the velocity with their intervals."""
    out = io.StringIO()
    ends = [f"{norm}{end}" for norm in ("l1", "l2") for end in ("", "_low", "_high")]
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["variant", "timestep", *ends])
    for name, row in results["variants"].items():
        errors = row["velocity_error"]
        if "l1" in errors:
            for time, l1, l2 in zip(errors["timesteps"], errors["l1"], errors["l2"], strict=True):
                writer.writerow([name, time, *l1, *l2])
    return out.getvalue()


def _interval(values: np.ndarray, digits: int = 2) -> list[float | None]:
    """Returns [mean, low, high]; one video has no interval."""
    if len(values) < 2:
        return [round(float(values[0]), digits), None, None]
    return [round(x, digits) for x in bootstrap_interval(values)]


def _ratio(values: np.ndarray, reference: np.ndarray) -> list[float | None] | None:
    """Returns [ratio of sums, low, high]; None if the reference is nothing."""
    if not reference.sum() > 0:
        return None
    if len(values) < 2:
        return [round(float(values[0] / reference[0]), 4), None, None]
    return [round(x, 4) for x in bootstrap_ratio(values, reference)]


def _show(interval: Sequence[float | None] | None, unit: str = "") -> str:
    if interval is None:
        return ""
    mean, low, high = interval
    return f"{mean:.1f}{unit}" + ("" if low is None else f" [{low:.1f}, {high:.1f}]")
