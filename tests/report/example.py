"""A small workdir of a surgery, written by hand with numbers that tests know and texts as nasty as users can be."""

import csv
import json
from pathlib import Path

import numpy as np

from configs import common
from hybrid_dit.loss_log import LossLog
from hybrid_dit.report.films import VARIANTS
from hybrid_dit.video_io import write_mp4

NASTY = "</script><script>alert('1')</script><img src=x onerror=alert(2)> \"quotes\" & <!-- ]]>"
PROMPT = NASTY.replace("/", "_")  # as in a file name
RATES = ("R2", "R4", "linear")
CHOSEN = ("R4", "softmax", "linear")
ERRORS = {"R2": (0.1, 0.2, 0.3), "R4": (0.15, 0.25, 0.5), "linear": (0.2, 0.4, 0.6)}
FRAMES, SIZE, PROMPTS = 9, 16, 2
ENVIRONMENT = {"python": "3.12.1", "devices": "8 x <b>TPU</b> v5e"}


def point(blocks=CHOSEN, cost=70.0, error=0.75) -> dict:
    return {
        "blocks": list(blocks),
        "cost": cost,
        "softmax_cost": 100.0,
        "predicted_error": error,
        "attention_flops_saved": 1 - cost / 100,
    }


def results() -> dict:
    rows = {}
    for i, name in enumerate(VARIANTS):
        rows[name] = {
            "score": [90.0 - i, 80.5 - i, 95.25 - i],
            "score_minus_teacher": [-1.0 * i, -2.0 * i, 0.0],
            "score_of_each_video": [85.5 - i, 94.5 - i],
            "parts": {"shape": 91.5, "colour": 88.25},
            "psnr_to_teacher": None if not i else [20.5 + i, None, None],
            "ssim_to_teacher": None if not i else [0.75 + i / 100, 0.5, 0.875],
            "motion_to_teacher": None if not i else [0.5 + i / 4, 0.5, 1.5],
            "velocity_error": {"timesteps": [999.0, 137.5]},
            "seconds_denoise": 4.0 - i,
            "seconds_decode": 1.25,
            "attention_flops": 8e10 if not i else 6e10,
            "attention_flops_saved": 0.0 if not i else 0.25,
        }
        if i:
            rows[name]["velocity_error"]["l1"] = [[0.5 - i / 8, 0.0, 1.0], [1.0 - i / 8, 0.0, 1.0]]
    return {"machine": f"1 x {NASTY}", "videos": PROMPTS, "sampler": "unipc, 20 steps", "variants": rows}


def example(workdir: Path, **settings) -> Path:
    """Writes all five stages as complete; `settings` are changed ones, "select__budget" for select.budget."""
    config = common.get_config("surgery", "tiny")
    config.model.negative_prompt = NASTY
    for key, value in settings.items():
        section, name = key.split("__")
        config[section][name] = value
    sections = ("model", "prompts", "distill", "select", "finetune", "evaluate")
    everything = {"seed": 3, **{section: config[section].to_dict() for section in sections}}
    for stage in ("distill", "select", "finetune", "export", "evaluate"):
        _json(workdir / stage / "settings.json", everything)
        _json(workdir / stage / "environment.json", ENVIRONMENT)
        _json(workdir / stage / "done.json", {})

    cells = [(b, rate, errors[b]) for rate, errors in ERRORS.items() for b in range(3)]
    rows = [[b, rate, 2 * error, error, 0.9 * error, 1.1 * error] for b, rate, error in cells]
    _csv(workdir / "distill/errors.csv", ["block", "rate", "undistilled", "distilled", "low", "high"], rows)
    _csv(workdir / "distill/loss.csv", ["step", *RATES], [[s, 1 / s, 2 / s, 3 / s] for s in range(1, 101)])
    with LossLog(workdir / "finetune/metrics.jsonl", 0, 1) as log:
        for step in range(1, 21):
            log.add(step, 2.0**-step, grad_norm=1.0)
    _json(workdir / "select/rates.json", {"budget": f"2R4 {NASTY}", **point()})
    _json(workdir / "select/homogeneous.json", {"budget": "2R4", **point(("R4", "R4", "softmax"), 70.0, 0.9)})
    front = [point(cost=70.0), point(("linear",) * 3, 50.0, 1.2), point(("softmax",) * 3, 100.0, 0.0)]
    baselines = {"1R4": point(("R4", "softmax", "softmax"), 85.0, 0.5), "3Linear": point(("linear",) * 3, 50.0, 1.2)}
    _json(workdir / "select/pareto.json", {"unit": "FLOPs", "efficient": front, "homogeneous": baselines})

    _json(workdir / "evaluate/results.json", results())
    for v, name in enumerate(VARIANTS):
        for i in range(PROMPTS):
            t, y, x = np.ogrid[:FRAMES, :SIZE, :SIZE]
            video = np.stack(
                [t * 25 + 0 * y + 0 * x, y * 9 + 40 * v + 0 * t + 0 * x, x * 9 + 40 * i + 0 * t + 0 * y], -1
            )
            write_mp4(workdir / f"evaluate/videos/{name}/{PROMPT}-{i}.mp4", video.astype(np.uint8))
    return workdir


def _json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def _csv(path: Path, header: list[str], rows: list[list]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
