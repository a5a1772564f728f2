"""Scores against the suites' formulas, worked out by hand."""

import csv
import io
import json
import random
import zipfile

import pytest

from hybrid_dit.errors import UserError
from hybrid_dit.vbench import results
from hybrid_dit.vbench.facts import VBENCH, VBENCH2

# Half of the way from low to high in every dimension but two.
QUALITY = {
    "subject_consistency": 0.5731,  # (0.1462 + 1) / 2
    "background_consistency": 0.63075,
    "temporal_flickering": 0.81465,
    "motion_smoothness": 0.85175,
    "dynamic_degree": 1.0,  # counts half
    "aesthetic_quality": 0.5,
    "imaging_quality": 0.5,
}
SEMANTIC = {
    "object_class": 0.5,
    "multiple_objects": 0.5,
    "human_action": 0.5,
    "color": 0.5,
    "spatial_relationship": 0.5,
    "scene": 0.8222,  # full
    "appearance_style": 0.1432,
    "temporal_style": 0.182,
    "overall_consistency": 0.182,
}


def write(path, scores):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps({name: [score, [{"video_path": "a", "video_results": 1}]] for name, score in scores.items()})
    )


def test_vbench_total_is_four_parts_quality_and_one_part_semantic():
    sums = results.summarise(VBENCH, QUALITY | SEMANTIC)
    quality = (6 * 0.5 + 0.5 * 1) / 6.5
    semantic = (8 * 0.5 + 1) / 9
    assert sums == pytest.approx({"quality": quality, "semantic": semantic, "total": (4 * quality + semantic) / 5})


@pytest.mark.parametrize(
    "suite, official",
    [
        (VBENCH, (0.1452577457469582, 0.701851864841818, 0.25657656956593017)),
        (
            VBENCH2,
            (
                0.49089899052481695,
                0.5094218223580178,
                0.47760209185072383,
                0.3990510679047021,
                0.5852400358049897,
                0.49244280168865007,
            ),
        ),
    ],
)
def test_sums_are_those_of_the_official_scripts(suite, official):
    """What `scripts/cal_final_score.py` and `VBench-2.0/scripts/cal_final_score.py` printed for these scores."""
    rng = random.Random(1)
    scores = {name: rng.random() for name in suite.dimensions}
    # Sums of at most 18 terms of order 1, in another order.
    assert list(results.summarise(suite, scores).values()) == pytest.approx(official, rel=1e-14)


def test_scores_beyond_the_bounds_are_not_clipped():
    assert results.normalised(VBENCH, "scene", 0.9) == pytest.approx(0.9 / 0.8222)
    assert results.normalised(VBENCH, "temporal_flickering", 0.5) == pytest.approx((0.5 - 0.6293) / 0.3707)


def test_vbench2_total_is_the_mean_of_five_means():
    scores = {name: 0.0 for name in VBENCH2.dimensions}
    assert len(scores) == 18
    scores |= {"Diversity": 0.6, "Multi-View_Consistency": 0.4, "Camera_Motion": 0.7}
    sums = results.summarise(VBENCH2, scores)
    expected = {"creativity": 0.3, "commonsense": 0, "controllability": 0.1, "human_fidelity": 0, "physics": 0.1}
    assert sums == pytest.approx(expected | {"total": 0.1})


def test_results_come_from_files_folders_and_zips(tmp_path):
    write(tmp_path / "one" / "results_2026_eval_results.json", QUALITY | SEMANTIC)
    (tmp_path / "one" / "results_2026_full_info.json").write_text("[]")  # lies beside it
    together = results.read_results(VBENCH, tmp_path / "one")
    assert together == QUALITY | SEMANTIC and list(together) == list(VBENCH.dimensions)
    for i, (name, score) in enumerate((QUALITY | SEMANTIC).items()):
        write(tmp_path / "many" / name / f"results_{i}_eval_results.json", {name: score})
    assert results.read_results(VBENCH, tmp_path / "many") == together
    assert results.read_results(VBENCH, tmp_path / "one" / "results_2026_eval_results.json") == together
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for file in (tmp_path / "many").rglob("*.json"):
            archive.write(file, file.relative_to(tmp_path))
        archive.writestr("__MACOSX/many/._x.json", b"\x00")
    assert results.read_results(VBENCH, tmp_path / "all.zip") == together


@pytest.mark.parametrize(
    "scores, message",
    [
        ({"imaging_quality": 67.2}, "imaging_quality is 67.2, expected a number from 0 to 1"),
        ({"imaging_quality": float("nan")}, "imaging_quality is nan"),
        ({"imaging_quality": True}, "is True"),
        ({"Diversity": 0.5}, "VBench has no dimension Diversity"),
        ({}, "has no results of VBench"),
    ],
)
def test_unfit_results_are_refused(tmp_path, scores, message):
    write(tmp_path / "a.json", scores)
    with pytest.raises(UserError, match=message):
        results.read_results(VBENCH, tmp_path / "a.json")


def test_contradictions_and_broken_files_are_refused(tmp_path):
    write(tmp_path / "r" / "old.json", {"scene": 0.5})
    write(tmp_path / "r" / "same.json", {"scene": 0.5})
    assert results.read_results(VBENCH, tmp_path / "r") == {"scene": 0.5}
    write(tmp_path / "r" / "new.json", {"scene": 0.6})
    with pytest.raises(UserError, match="scene is 0.6 in .*new.json and 0.5 in .*old.json"):
        results.read_results(VBENCH, tmp_path / "r")
    with pytest.raises(UserError, match="No such file"):
        results.read_results(VBENCH, tmp_path / "nothing.json")
    for name, content, message in (("a.json", "{", "not valid JSON"), ("a.zip", "no zip", "not a zip")):
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=message):
            results.read_results(VBENCH, tmp_path / name)


def test_tables_show_every_model_and_what_is_missing():
    models = {"teacher": QUALITY | SEMANTIC, "15R2": QUALITY | {"scene": 0.4111}}
    rows = {row["score"]: row for row in csv.DictReader(io.StringIO(results.to_csv(VBENCH, models)))}
    assert len(rows) == 16 + 2 + 1
    assert float(rows["scene"]["teacher_normalised"]) == pytest.approx(1)
    assert float(rows["scene"]["15R2"]) == 0.4111 and float(rows["scene"]["15R2_normalised"]) == pytest.approx(0.5)
    assert float(rows["quality"]["15R2_normalised"]) == pytest.approx(3.5 / 6.5)
    assert rows["total"]["15R2_normalised"] == "" and rows["color"]["15R2"] == ""
    table = results.to_markdown(VBENCH, models)
    assert "| VBench | teacher | 15R2 |" in table
    assert "| **quality** | **53.85** | **53.85** |" in table
    assert "| scene | 82.22 | 41.11 |" in table
    assert "| **total** | **54.19** | **–** |" in table  # (4 * 3.5 / 6.5 + 5 / 9) / 5 = 0.5419
    assert "15R2 has no object_class, multiple_objects" in table and "teacher has no" not in table
