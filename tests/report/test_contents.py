import json
import shutil

import pytest
from example import CHOSEN, ENVIRONMENT, ERRORS, RATES, example

from hybrid_dit.errors import UserError
from hybrid_dit.report.contents import STAGES, Interval, read


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    return example(tmp_path_factory.mktemp("surgery"))


@pytest.fixture
def workdir(complete, tmp_path):
    return shutil.copytree(complete, tmp_path / "run")


def test_everything_is_read(complete):
    found = read(complete)
    assert found.problems == [] and set(found.status.values()) == {"complete"}
    assert found.chosen.blocks == CHOSEN and (found.chosen.share, found.chosen.error) == (0.7, 0.75)
    assert found.homogeneous.blocks == ("R4", "R4", "softmax") and found.budget.startswith("2R4 ")
    assert [c.share for c in found.front.efficient] == [0.5, 0.7, 1.0]  # sorted
    assert set(found.front.homogeneous) == {"1R4", "3Linear"}
    assert found.errors.rates == RATES and found.errors.blocks == 3
    assert {key: cell[1] for key, cell in found.errors.cells.items()} == {
        (b, rate): error for rate, errors in ERRORS.items() for b, error in enumerate(errors)
    }
    assert found.distill_loss["R4"][:3] == [2, 1, pytest.approx(2 / 3)]
    assert found.finetune_loss == (list(range(1, 21)), [2.0**-s for s in range(1, 21)])
    teacher, *_, tuned = found.results.variants
    assert teacher.psnr is None and tuned.psnr == Interval(23.5, None, None)
    assert teacher.ssim is None and tuned.ssim == Interval(0.78, 0.5, 0.875)
    assert teacher.motion is None and tuned.motion == Interval(1.25, 0.5, 1.5)
    assert not teacher.velocity
    assert tuned.velocity == {999.0: Interval(0.125, 0.0, 1.0), 137.5: Interval(0.625, 0.0, 1.0)}
    assert tuned.score == Interval(87.0, 77.5, 92.25) and tuned.each == (82.5, 91.5)
    assert found.settings["seed"] == 3 and found.settings["distill"]["rates"] == ["R2", "R4", "R8", "linear"]
    assert found.environment == {stage: ENVIRONMENT for stage in STAGES}


def test_rates_are_in_natural_order_without_softmax(workdir):
    file = workdir / "distill/errors.csv"
    file.write_text(file.read_text().replace("R2", "R16"))
    assert read(workdir).rates == ["R2", "R4", "R16", "linear"]  # R2 is still in loss.csv


def test_missing_and_unfinished_stages_have_a_status(workdir):
    shutil.rmtree(workdir / "evaluate")
    (workdir / "finetune/done.json").unlink()
    found = read(workdir)
    assert (found.status["evaluate"], found.status["finetune"]) == ("missing", "not complete")
    assert found.results is None and found.finetune_loss is not None and found.problems == []


def test_half_a_row_at_the_end_of_a_loss_log_is_left_out(workdir):
    with (workdir / "finetune/metrics.jsonl").open("a") as file:
        file.write('{"step": 21, "lo')
    found = read(workdir)
    assert len(found.finetune_loss[0]) == 20 and found.problems == []


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"variants": 3, "videos": 1}', "\x00\xff", "step\n", "a,b\n1\n"]
)
@pytest.mark.parametrize(
    "file",
    [
        "evaluate/results.json",
        "select/rates.json",
        "select/homogeneous.json",
        "select/pareto.json",
        "distill/errors.csv",
        "distill/loss.csv",
        "finetune/metrics.jsonl",
    ],
)
def test_a_broken_file_is_named_and_the_rest_is_read(workdir, file, content):
    if (file, content) in {("distill/loss.csv", "a,b\n1\n"), ("distill/loss.csv", "step\n")}:
        content = "step,R2\n1,many\n"  # those are no errors for a file whose columns are its own
    (workdir / file).write_text(content, encoding="latin-1")
    found = read(workdir)
    assert len(found.problems) == 1 and found.problems[0].startswith(f"{file} can't be read and is left out")
    others = [found.results, found.chosen, found.homogeneous, found.front, found.errors, found.distill_loss]
    assert sum(not other for other in [*others, found.finetune_loss]) == 1


def test_numbers_that_are_not_finite_are_a_problem(workdir):
    file = workdir / "select/rates.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "cost": float("nan")}))
    assert "select/rates.json" in read(workdir).problems[0]


def test_a_folder_without_stages_is_refused(tmp_path):
    (tmp_path / "sample").mkdir()
    with pytest.raises(UserError, match="holds no stage of a surgery .*--config=configs/surgery.py"):
        read(tmp_path)
