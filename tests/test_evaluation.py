"""Tables of an evaluation from videos whose numbers are known."""

import csv
import io

import numpy as np
import pytest

from hybrid_dit import evaluation, scoring
from hybrid_dit.data import shapes
from hybrid_dit.data.shapes import parse_prompt

PROMPTS = [
    "a small red circle moving left on a gray background",
    "a large blue square moving up and a small red circle moving down on a black background",
    "a small cyan triangle moving right on a white background",
]


def test_without_scenes_likeness_alone_is_reported():
    video = np.zeros((2, 5, 16, 16, 3), np.uint8)
    sampled = {
        name: evaluation.Sampled(video + value, 1.0, 0.5, ()) for name, value in (("teacher", 0), ("finetuned", 20))
    }
    rows = evaluation.summarise(sampled, None, {"teacher": 100, "finetuned": 75})
    assert "score" not in rows["finetuned"]
    assert rows["finetuned"]["psnr_to_teacher"] == pytest.approx([10 * np.log10(255**2 / 20**2)] * 3, abs=0.005)
    assert rows["finetuned"]["attention_flops_saved"] == 0.25
    table = evaluation.to_table({"machine": "m", "videos": 2, "sampler": "s", "variants": rows})
    assert "score" not in table and "22.1 dB" in table and "motion  " not in table  # nothing moves in the teacher's
    assert rows["finetuned"]["motion_to_teacher"] is None
    # Two constant images differ in luminance alone: (2ab + C1) / (a² + b² + C1), C1 = (0.01 · 255)².
    assert rows["finetuned"]["ssim_to_teacher"] == pytest.approx([6.5025 / (400 + 6.5025)] * 3, abs=5e-5)


def test_scores_tell_right_videos_from_wrong_ones():
    scenes = [parse_prompt(prompt) for prompt in PROMPTS]
    placements = shapes.place_batch(scenes, np.random.default_rng(0), 17, 64)
    truth = scoring.to_uint8(np.asarray(shapes.render_batch(placements, frames=17, size=64)))
    videos = {"teacher": truth, "finetuned": truth[:, ::-1]}
    sampled = {name: evaluation.Sampled(video, 1.0, 1.0, ()) for name, video in videos.items()}
    rows = evaluation.summarise(sampled, scenes, {"teacher": 2, "finetuned": 1})
    assert rows["teacher"]["score"][0] > 90
    assert rows["teacher"]["score_minus_teacher"] == [0, 0, 0]
    mean, low, high = rows["finetuned"]["score_minus_teacher"]
    assert low <= mean <= high < -30  # played backwards, what moves is half of the score
    assert rows["finetuned"]["motion_to_teacher"][0] == pytest.approx(1, abs=0.02)  # it moves as fast
    assert rows["finetuned"]["parts"]["direction"] < 10 < 90 < rows["finetuned"]["parts"]["colour"]


def test_one_video_has_no_interval():
    video = np.zeros((1, 5, 16, 16, 3), np.uint8)
    rows = evaluation.summarise({"teacher": evaluation.Sampled(video, 1.0, 1.0, ())}, None, {"teacher": 1})
    assert rows["teacher"]["psnr_to_teacher"] is None
    assert evaluation._interval(np.array([3.0])) == [3.0, None, None]


def test_pictures_have_no_motion():
    """A model with frames=1 makes pictures; everything else is measured on them."""
    video = np.full((2, 1, 16, 16, 3), 9, np.uint8)
    sampled = {name: evaluation.Sampled(video, 1.0, 0.5, ()) for name in ("teacher", "finetuned")}
    rows = evaluation.summarise(sampled, None, {"teacher": 100, "finetuned": 75})
    assert rows["finetuned"]["motion"] is None and rows["finetuned"]["ssim_to_teacher"][0] == 1
    results = {"machine": "m", "videos": 2, "sampler": "s", "variants": rows}
    assert "100.0 dB" in evaluation.to_table(results)
    assert "finetuned,,,,,,,100.0,100.0,100.0,1.0,1.0,1.0,,,,,,," in evaluation.to_csv(results)


def test_tables_show_every_measure():
    rng = np.random.default_rng(0)
    teacher = rng.integers(0, 256, (2, 5, 16, 16, 3), np.uint8)
    errors = {"l1": np.array([[0.1, 0.3], [0.5, 0.5]]), "l2": np.array([[0.2, 0.2], [0.4, 0.8]])}
    sampled = {
        "teacher": evaluation.Sampled(teacher, 1.0, 0.5, ()),
        "finetuned": evaluation.Sampled(teacher // 2, 1.0, 0.5, (), np.array([900.0, 30.0]), errors),
    }
    rows = evaluation.summarise(sampled, None, {"teacher": 100, "finetuned": 75})
    results = {"machine": "m", "videos": 2, "sampler": "s", "variants": rows}
    assert rows["finetuned"]["velocity_error"]["l1"][0] == [0.2, 0.1, 0.3]  # of two values, the ends are the values
    lines = list(csv.DictReader(io.StringIO(evaluation.velocity_csv(results))))
    assert [(line["timestep"], line["l1"], line["l2_high"]) for line in lines] == [
        ("900.0", "0.2", "0.2"),
        ("30.0", "0.5", "0.8"),
    ]
    (_, tuned) = csv.DictReader(io.StringIO(evaluation.to_csv(results)))
    for what in ("psnr_to_teacher", "ssim_to_teacher", "motion", "motion_to_teacher"):
        assert float(tuned[what]) == rows["finetuned"][what][0]
    assert f"{rows['finetuned']['motion_to_teacher'][0]:.0%}" in evaluation.to_table(results)
