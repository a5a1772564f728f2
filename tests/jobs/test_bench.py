"""The bench job on a random pipeline: rows, what is kept, failures, and the hand-over of seconds to selection."""

import csv
import json

import jax
import pytest
from workdirs import tiny_config

from hybrid_dit import bench_timing, cost
from hybrid_dit.bench_timing import Rates, Timing
from hybrid_dit.errors import UserError
from hybrid_dit.jobs import bench, select_rates
from hybrid_dit.workdir import Stage

RATES = Rates(flops=1e9, source="made up", bandwidth=1e12)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("bench")


def settings(root, **values):
    small = {"bench__rates": "R2,linear", "bench__models": "softmax,1R2", "bench__videos": "5x32x32"}
    return tiny_config("bench", root, **small | {f"bench__{k}": v for k, v in values.items()})


def rows(workdir):
    with open(workdir / "bench/bench.csv", newline="") as file:
        return list(csv.DictReader(file))


def pretend(monkeypatch, seconds=None, broken=()):
    """Replaces measuring: the n-th case takes n seconds, those whose number is in `broken` don't fit."""
    count = []

    def measure(function, shapes, inputs, repeats, warmup):
        count.append((repeats, warmup))
        n = len(count)
        if n in broken:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of\nmemory")
        return Timing(float(n), n - 0.5, n + 0.5, 0.1, 10, 20, 30)

    monkeypatch.setattr(bench_timing, "measure", measure)
    monkeypatch.setattr(bench_timing, "rates", lambda dtype: RATES)
    return count


def test_measured_seconds_decide_in_selection(root, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_timing, "rates", lambda dtype: RATES)  # large products are slow in unoptimised programs
    config = settings(root, what="op,attention", backward="", videos="")
    assert bench.run(config, tmp_path) == 0
    out = capsys.readouterr().out
    assert "bench: 6 cases on one cpu" in out and "at 1 GFLOP/s (made up)" in out and "FAILED" not in out
    table = rows(tmp_path)
    assert [row["what"] for row in table] == ["op"] * 3 + ["attention"] * 3
    for row in table:
        assert 0 < float(row["fastest"]) <= float(row["seconds"]) <= float(row["slowest"])
        assert row["device"] == "cpu" and row["jax"] == jax.__version__ and row["backend"] == "xla"
        assert float(row["of_floor"]) * float(row["seconds"]) == pytest.approx(float(row["floor_seconds"]), rel=1e-4)
        assert float(row["flops_per_s"]) * float(row["seconds"]) == pytest.approx(float(row["flops"]), rel=1e-4)
        assert row["tokens"] == "12" and row["video"] == "9x32x32"
    assert (tmp_path / "bench/duration.png").stat().st_size > 10_000

    # Stage 1's errors say that everything but softmax is bad, so the budget decides.
    selection = tiny_config("select", root, select__costs="timings", select__budget="1.0")
    selection.select.timings = str(tmp_path / "bench/timings.csv")
    stage = Stage(tmp_path, "distill", selection)
    lines = [f"{block},{rate},9,0.{block + 1}" for block in range(2) for rate in ("R2", "linear")]
    (stage.folder / "errors.csv").write_text("\n".join(["block,rate,undistilled,distilled", *lines]))
    stage.finish()
    select_rates.run(selection, tmp_path)
    choice = json.loads((tmp_path / "select/rates.json").read_text())
    assert choice["blocks"] == ["softmax"] * 2
    times = {row["label"]: float(row["seconds"]) for row in table if row["what"] == "attention"}
    assert choice["cost"] == choice["softmax_cost"] == 2 * times["softmax"]
    costs = json.loads((tmp_path / "select/pareto.json").read_text())
    assert costs["unit"] == "s" and costs["block_costs"] == times


def test_rows_are_kept_and_sweeps_grow(root, tmp_path, monkeypatch, capsys):
    count = pretend(monkeypatch)
    bench.run(settings(root, what="op", backward="op", repeats=7, warmup=2), tmp_path)
    assert count == [(7, 2)] * 9  # three labels: forward and with gradients; forward of the other video
    assert {(r["video"], r["tokens"], r["direction"]) for r in rows(tmp_path)} == {
        ("9x32x32", "12", "forward"),
        ("9x32x32", "12", "forward+backward"),
        ("5x32x32", "8", "forward"),
    }
    before = (tmp_path / "bench/bench.csv").read_bytes()
    bench.run(settings(root, what="op", backward="op", repeats=7, warmup=2), tmp_path)
    assert len(count) == 9 and (tmp_path / "bench/bench.csv").read_bytes() == before
    assert "9 measured before" in capsys.readouterr().out
    # Other cases are added to those; the model's are compared with what their ops save.
    bench.run(settings(root, what="model", backward="", repeats=7, warmup=2), tmp_path)
    assert len(count) == 11 and (tmp_path / "bench/bench.csv").read_text().startswith("label,seconds,")
    times = {(r["what"], r["label"], r["direction"], r["video"]): float(r["seconds"]) for r in rows(tmp_path)}
    op = {label: times["op", label, "forward", "9x32x32"] for label in ("softmax", "R2")}
    whole = times["model", "softmax", "forward", "9x32x32"]
    expected = whole / (whole - (op["softmax"] - op["R2"]))
    speed = whole / times["model", "1R2", "forward", "9x32x32"]
    assert f"1R2 forward float32 xla: {speed:.2f}x softmax, by its ops {expected:.2f}x" in capsys.readouterr().out
    with pytest.raises(UserError, match="bench.repeats: 7 there, 8 in this command"):
        bench.run(settings(root, what="op", repeats=8, warmup=2), tmp_path)


def test_another_device_does_not_use_these_rows(root, tmp_path, monkeypatch):
    count = pretend(monkeypatch)
    bench.run(settings(root, what="attention", backward="", videos=""), tmp_path)
    file = tmp_path / "bench/rows.json"
    file.write_text(file.read_text().replace('"device": "cpu"', '"device": "TPU v5p"'))
    bench.run(settings(root, what="attention", backward="", videos=""), tmp_path)
    assert len(count) == 6
    with open(tmp_path / "bench/timings.csv", newline="") as stream:
        assert [(row["label"], row["seconds"]) for row in csv.DictReader(stream)] == [
            ("softmax", "4"),
            ("R2", "5"),
            ("linear", "6"),
        ]


def test_what_does_not_fit_is_a_row(root, tmp_path, monkeypatch, capsys):
    pretend(monkeypatch, broken=(2,))
    assert bench.run(settings(root, what="attention", backward="", videos=""), tmp_path) == 0
    assert "FAILED: JaxRuntimeError: RESOURCE_EXHAUSTED: Out of memory" in capsys.readouterr().out
    failed = rows(tmp_path)[1]
    assert failed["label"] == "R2" and failed["seconds"] == "" and failed["error"].endswith("Out of memory")
    assert "R2" not in (tmp_path / "bench/timings.csv").read_text()
    count = pretend(monkeypatch)  # what failed, and only that, is tried again
    assert bench.run(settings(root, what="attention", backward="", videos=""), tmp_path) == 0
    assert len(count) == 1 and rows(tmp_path)[1]["label"] == "R2" and not rows(tmp_path)[1]["error"]
    assert "R2" in (tmp_path / "bench/timings.csv").read_text()
    pretend(monkeypatch, broken=range(10))
    assert bench.run(settings(root, what="attention", backward="", videos=""), tmp_path / "all") == 1
    assert not (tmp_path / "all/bench/timings.csv").exists()


def test_the_fastest_backend_counts(root, tmp_path, monkeypatch):
    pretend(monkeypatch)
    config = settings(root, what="attention", rates="R2", backward="")
    row = {"what": "attention", "direction": "forward", "dtype": "float32"}
    table = [
        row | {"label": "R2", "seconds": 3.0, "backend": "xla"},
        row | {"label": "R2", "seconds": 2.0, "backend": "tpu"},
        row | {"label": "R2", "seconds": 1.0, "backend": "tpu", "dtype": "bfloat16"},
        row | {"label": "R2", "seconds": 0.5, "backend": "tpu", "direction": "forward+backward"},
    ]
    bench.write_timings(tmp_path / "timings.csv", config, table)
    with open(tmp_path / "timings.csv", newline="") as stream:
        (best,) = csv.DictReader(stream)
    assert best["seconds"] == "2" and best["backend"] == "tpu"


def test_published_models_need_no_weights_and_nothing_has_to_be_measured(root, tmp_path, monkeypatch, capsys):
    count = pretend(monkeypatch)
    config = tiny_config("bench", root, bench__what="")
    config.model.weights, config.bench.preset = "", "wan_1_3b"
    config.model.frames, config.model.height, config.model.width = 81, 480, 832
    sizes = bench.model_sizes(config)
    assert sizes.tokens(bench.own_video(config)) == 32_760
    assert sizes.specs["R8"].rate == 8 and sizes.wan.num_layers == 30
    drawn = []
    monkeypatch.setattr(bench.duration_picture, "draw", lambda path, panels, title: drawn.append((panels, title)))
    config.bench.videos = ("81x320x480", "201x320x480")
    assert bench.run(config, tmp_path) == 0 and not count
    panels, title = drawn[0]
    assert list(panels) == ["480x832", "320x480"] and "seconds" not in title
    counted, timed = panels["320x480"]
    assert counted["R8"][0] == (81, cost.attention_flops(cost.wan_1_3b(12_600), sizes.specs["R8"]))
    assert [frames for frames, _ in counted["softmax"]] == list(range(81, 202, 4)) and not any(timed.values())


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("what", "ops", "bench.what: 'ops' is unknown; choose out of op, attention, block, model"),
        ("backends", "triton", "bench.backends: 'triton' is unknown; choose out of xla, fused"),
        ("rates", "R2,fast", "unknown attention 'fast'"),
        ("models", "3R2", "bench.models: 3R2 must name at most 2 blocks"),
        ("videos", "9x33x32", "height=33 is not a multiple"),
        ("repeats", 0, "bench.repeats=0 must be at least 1"),
        ("warmup", -1, "bench.warmup=-1 at least 0"),
        ("preset", "wan_2b", "bench.preset='wan_2b' is unknown; choose wan_1_3b or wan_14b, or set model.weights"),
    ],
)
def test_bad_settings(root, tmp_path, name, value, message):
    config = settings(root, **{name: value})
    if name == "preset":
        config.model.weights = ""
    with pytest.raises(UserError, match=message):
        bench.run(config, tmp_path)
    assert not list(tmp_path.iterdir())


def test_amounts():
    shown = {bench.amount(x) for x in (1.234e13, 61.4e9, 2.5e6, 1500, 20)}
    assert shown == {"12.3 T", "61.4 G", "2.5 M", "1.5 k", "20 "}
