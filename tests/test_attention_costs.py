"""Costs and budgets from files: values, units, and what is wrong with a file."""

import json
import math

import pytest

from hybrid_dit import attention_costs
from hybrid_dit.attention_costs import parse_budget, read_estimate, read_timings
from hybrid_dit.errors import UserError

LABELS = ["softmax", "R2", "R8"]
SECONDS = {"softmax": 0.25, "R2": 0.125, "R8": 0.0625}


def test_timings_come_in_the_order_asked_for(tmp_path):
    file = tmp_path / "t.csv"
    file.write_text("device,label,seconds\nx,R8,0.0625\nx,R4,0.1\nx,softmax,2.5e-1\nx,R2,0.125\n")
    assert list(read_timings(file, LABELS).items()) == list(SECONDS.items())


@pytest.mark.parametrize(
    "text, message",
    [
        ("label,ms\nR2,1\n", "no column seconds; its first line must be label,seconds"),
        ("", "no column label or seconds"),
        ("label,seconds\nsoftmax,1\nR2,1\n", "lacks R8; it has softmax, R2"),
        ("label,seconds\nsoftmax,1\nR2,1\nR8,0\n", "the cost of R8 is '0'; expected a positive number"),
        ("label,seconds\nsoftmax,1\nR2,fast\nR8,1\n", "the cost of R2 is 'fast'"),
        ("label,seconds\nsoftmax,1\nR2\nR8,1\n", "the cost of R2 is None"),
        ("label,seconds\nsoftmax,1\nR2,nan\nR8,1\n", "the cost of R2 is 'nan'"),
        ("label,seconds\nsoftmax,1\nR2,1\nR2,2\nR8,1\n", "several rows for R2"),
    ],
)
def test_timings_that_are_wrong(tmp_path, text, message):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        read_timings(tmp_path / "t.csv", LABELS)


def test_files_that_are_missing_say_where_they_come_from(tmp_path):
    with pytest.raises(UserError, match="set --config.select.timings to the CSV that the bench job writes"):
        read_timings("", LABELS)
    with pytest.raises(UserError, match="select.estimate=.*none.json does not exist; .*configs/plan.py"):
        read_estimate(tmp_path / "none.json", LABELS, 10)


def test_estimates(tmp_path):
    file = tmp_path / "e.json"
    report = {"unit": "cycles", "tokens": 10, "costs": {"R8": 3, "softmax": 9, "R2": 6, "linear": 1}}
    file.write_text(json.dumps(report))
    assert list(read_estimate(file, LABELS, 10).items()) == [("softmax", 9.0), ("R2", 6.0), ("R8", 3.0)]
    with pytest.raises(UserError, match="for videos of 10 tokens, this run's have 11"):
        read_estimate(file, LABELS, 11)
    with pytest.raises(UserError, match="lacks R16"):
        read_estimate(file, ["R16"], 10)
    file.write_text(json.dumps({"job": "distill"}))
    with pytest.raises(UserError, match="holds no costs; make it with"):
        read_estimate(file, LABELS, 10)


@pytest.mark.parametrize(
    "text, kind, expected",
    [
        ("2R8", "timings", 2 * 0.0625 + 2 * 0.25),
        ("0.5", "timings", 0.5 * 4 * 0.25),
        (0.5, "compiled", 0.5 * 4 * 0.25),
        ("0.7s", "timings", 0.7),
        ("700ms", "timings", 0.7),
        ("0.7 s", "timings", 0.7),
        ("12e9", "flops", 12e9),
        ("1200", "compiled", 1200),
    ],
)
def test_budgets(text, kind, expected):
    assert math.isclose(parse_budget(text, SECONDS, 4, kind), expected, rel_tol=1e-15)


@pytest.mark.parametrize(
    "text, kind, message",
    [
        ("12", "timings", "not in the unit of select.costs=timings: .*0.3s or 40ms"),
        ("3s", "flops", "not in the unit of select.costs=flops: .* or FLOPs"),
        ("3ms", "compiled", "or cycles"),
        ("-3s", "timings", "must be positive"),
        ("nan", "flops", "must be positive"),
        ("9R8", "timings", "converts 9 blocks, but the model has 4"),
        ("2R4", "compiled", "2R4 needs the cost of R4"),
        ("much", "timings", "can't read 'much'"),
    ],
)
def test_budgets_that_are_wrong(text, kind, message):
    with pytest.raises(UserError, match=message):
        parse_budget(text, SECONDS, 4, kind)


def test_every_kind_has_a_unit_and_suffixes():
    assert attention_costs.UNITS.keys() == attention_costs._SUFFIXES.keys()
