"""Stage 2 on made-up errors: the chosen rates, budgets in all spellings, the baseline, bad input."""

import csv
import itertools
import json

import numpy as np
import pipelines
import pytest

from configs import common
from hybrid_dit import cost
from hybrid_dit.errors import UserError
from hybrid_dit.jobs import select_rates
from hybrid_dit.ops.spec import AttentionSpec
from hybrid_dit.surgery_io import load_choice, specs_from_config
from hybrid_dit.workdir import Stage

RATES = ("R2", "R8", "linear")
# Frames and width large enough that every rate is cheaper than softmax with heads of 12.
FRAMES, SIZE = 33, 128
ERRORS = np.array([[0.1, 0.2, 0.3], [0.05, 0.4, 0.5], [0.3, 0.35, 0.36], [0.01, 0.02, 0.5]])


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline") / "random"
    pipelines.random_pipeline(folder, layers=len(ERRORS))
    return folder


def run(weights, workdir, budget, **select):
    config = common.get_config("select_rates", "tiny")
    config.model.weights = str(weights)
    config.model.frames, config.model.height, config.model.width = FRAMES, SIZE, SIZE
    config.distill.rates = RATES
    config.select.rates = RATES
    config.select.budget = budget
    config.select.update(select)
    stage = Stage(workdir, "distill", config)
    lines = ["block,rate,undistilled,distilled"]
    lines += [f"{b},{rate},9,{ERRORS[b, r]}" for b in range(len(ERRORS)) for r, rate in enumerate(RATES)]
    (stage.folder / "errors.csv").write_text("\n".join(lines))
    stage.finish()
    select_rates.run(config, workdir)
    return config, json.loads((workdir / "select/rates.json").read_text())


def costs(config):
    shape = select_rates.attention_shape(config)
    specs = {"softmax": AttentionSpec(), **specs_from_config(config.distill)}
    return {name: cost.self_attention_flops(shape, s) for name, s in specs.items()}


def brute_force(config, budget, table=None):
    table = table or costs(config)
    labels = ["softmax", *RATES]
    errors = np.concatenate([np.zeros((len(ERRORS), 1)), ERRORS], axis=1)
    feasible = (
        (sum(errors[b, r] for b, r in enumerate(choice)), sum(table[labels[r]] for r in choice), choice)
        for choice in itertools.product(range(len(labels)), repeat=len(ERRORS))
    )
    error, spent, choice = min(c for c in feasible if c[1] <= budget)
    return error, spent, [labels[r] for r in choice]


@pytest.mark.parametrize("budget", ["2R8", "4R2", "0.8"])
def test_rates_are_the_best_within_the_budget(weights, tmp_path, budget):
    config, result = run(weights, tmp_path, budget)
    table = costs(config)
    limit = {
        "2R8": 2 * table["R8"] + 2 * table["softmax"],
        "4R2": 4 * table["R2"],
        "0.8": 0.8 * 4 * table["softmax"],
    }[budget]
    error, spent, choice = brute_force(config, limit)
    assert result["blocks"] == choice == load_choice(tmp_path / "select/rates.json")
    assert result["cost"] == spent <= limit
    assert result["predicted_error"] == pytest.approx(error)
    assert result["attention_flops_saved"] == pytest.approx(1 - spent / (4 * table["softmax"]))
    baseline = json.loads((tmp_path / "select/homogeneous.json").read_text())
    assert len(set(baseline["blocks"]) - {"softmax"}) == 1  # one rate
    assert baseline["cost"] <= limit and baseline["predicted_error"] >= error
    assert {"rates.png", "pareto.png", "front.png"} <= {p.name for p in (tmp_path / "select").iterdir()}


# Unlike FLOPs: here R8 takes no less time than R2, and linear is by far the cheapest.
TIMES = {"softmax": 0.5, "R2": 0.25, "R8": 0.25, "linear": 0.03125}


def timings(folder):
    rows = "".join(f"{label},{seconds}\n" for label, seconds in TIMES.items())
    (folder / "times.csv").write_text(f"label,seconds\n{rows}")
    return {"costs": "timings", "timings": str(folder / "times.csv")}


def estimate(folder, tokens):
    report = {"unit": "cycles", "tokens": tokens, "costs": {label: 4e9 * t for label, t in TIMES.items()}}
    (folder / "plan.json").write_text(json.dumps(report))
    return {"costs": "compiled", "estimate": str(folder / "plan.json")}


@pytest.mark.parametrize("budget", ["2R8", "1200ms"])
def test_measured_costs_decide_instead_of_flops(weights, tmp_path, budget):
    config, result = run(weights, tmp_path, budget, **timings(tmp_path))
    limit = {"2R8": 1.5, "1200ms": 1.2}[budget]
    error, spent, choice = brute_force(config, limit, TIMES)
    assert result["blocks"] == choice and result["cost"] == spent <= limit and result["softmax_cost"] == 2.0
    assert result["predicted_error"] == pytest.approx(error)
    flops = costs(config)  # what is saved is still told in FLOPs
    saved = 1 - sum(flops[label] for label in choice) / (4 * flops["softmax"])
    assert result["attention_flops_saved"] == pytest.approx(saved)
    assert "R8" not in choice  # costs as much as R2, with larger errors


def test_the_compilers_estimate_decides_likewise(weights, tmp_path):
    tokens = 9 * 8 * 8  # 33 frames of 128 x 128
    config, result = run(weights, tmp_path, "0.6", **estimate(tmp_path, tokens))
    _, spent, choice = brute_force(config, 0.6 * 4 * 0.5, TIMES)
    assert result["blocks"] == choice and result["cost"] == pytest.approx(4e9 * spent, rel=1e-15)


def test_unknown_costs_and_missing_files(weights, tmp_path):
    with pytest.raises(UserError, match="select.costs='time' is unknown; choose one of flops, timings, compiled"):
        run(weights, tmp_path / "a", "2R8", costs="time")
    with pytest.raises(UserError, match="set --config.select.timings to"):
        run(weights, tmp_path / "b", "2R8", costs="timings")
    with pytest.raises(UserError, match="for videos of 7 tokens, this run's have 576"):
        run(weights, tmp_path / "c", "2R8", **estimate(tmp_path, 7))


def test_one_distillation_answers_all_budgets(weights, tmp_path):
    config, _ = run(weights, tmp_path, "2R8")
    report = json.loads((tmp_path / "select/pareto.json").read_text())
    table, front = costs(config), report["efficient"]
    assert report["unit"] == "FLOPs" and report["block_costs"] == table
    totals = {sum(table[label] for label in c) for c in itertools.product(["softmax", *RATES], repeat=len(ERRORS))}
    for budget in totals:
        error, spent, choice = brute_force(config, budget)
        point = [p for p in front if p["cost"] <= budget][-1]
        assert point["blocks"] == choice and point["cost"] == spent
        assert point["predicted_error"] == pytest.approx(error)
    assert report["homogeneous"].keys() == {f"{n}{label}" for n in range(1, 5) for label in RATES}
    # Blocks 3 and 1 have the smallest errors at R2.
    assert report["homogeneous"]["2R2"]["blocks"] == ["softmax", "R2", "softmax", "R2"]
    with open(tmp_path / "select/pareto.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["rates of the blocks"].split() for row in rows[: len(front)]] == [p["blocks"] for p in front]
    assert [row["name"] for row in rows[len(front) :]] == list(report["homogeneous"])
    shares = [float(row["share of softmax"]) for row in rows[: len(front)]]
    assert shares == pytest.approx([p["cost"] / (4 * table["softmax"]) for p in front], rel=1e-5)  # six digits


def test_a_budget_out_of_reach_states_the_smallest_reachable(weights, tmp_path):
    with pytest.raises(UserError, match="smallest") as caught:
        run(weights, tmp_path, "0.01")
    config = common.get_config("select_rates", "tiny")
    config.model.weights = str(weights)
    config.model.frames, config.model.height, config.model.width = FRAMES, SIZE, SIZE
    config.distill.rates = RATES
    smallest = 4 * min(costs(config).values())
    assert f"{smallest:.3g}"[:4] in str(caught.value) or f"{smallest}" in str(caught.value)
    assert not (tmp_path / "select/rates.json").exists()


@pytest.mark.parametrize("budget", ["-3", "nan", "R4x", "9R4"])
def test_nonsense_budgets_are_refused(weights, tmp_path, budget):
    with pytest.raises(UserError, match="budget|convert|can't read"):
        run(weights, tmp_path, budget)


def test_missing_distillation_says_how_to_get_it(weights, tmp_path):
    config = common.get_config("select_rates", "tiny")
    config.model.weights = str(weights)
    with pytest.raises(UserError, match="configs/distill.py"):
        select_rates.run(config, tmp_path)


def test_candidates_are_those_of_the_config_alone(weights, tmp_path):
    # The linear column of ERRORS is the cheapest way to the budget, but the paper's candidates are the rates.
    config = common.get_config("select_rates", "tiny")
    config.model.weights = str(weights)
    config.model.frames, config.model.height, config.model.width = FRAMES, SIZE, SIZE
    assert list(select_rates.candidate_costs(config)) == ["softmax", "R2", "R4", "R8"]
    config.select.rates = ("R2", "R16")
    with pytest.raises(UserError, match="select.rates=R2,R16 must name rates out of distill.rates=R2,R4,R8,linear"):
        select_rates.candidate_costs(config)


def test_missing_errors_are_named(tmp_path):
    (tmp_path / "errors.csv").write_text("block,rate,undistilled,distilled\n0,R2,1,1\n0,R8,1,1\n1,R2,1,1\n")
    with pytest.raises(UserError, match="block 1 at R8"):
        select_rates.read_errors(tmp_path / "errors.csv", ["R2", "R8"])
