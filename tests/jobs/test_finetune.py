"""Stage 3 on a tiny random pipeline: outputs, exact continuation after kills, bad data and bad input."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import latent_sets
import numpy as np
import orbax.checkpoint as ocp
import pipelines
import pytest
from several import MAIN, Several, command_line

from configs import common
from hybrid_dit import surgery, surgery_io
from hybrid_dit.checkpoint import Checkpoints
from hybrid_dit.convert.files import write_safetensors
from hybrid_dit.convert.pipeline import load_transformer
from hybrid_dit.data.order import Order
from hybrid_dit.data.rendered import RenderedSource
from hybrid_dit.errors import UserError
from hybrid_dit.jobs import finetune
from hybrid_dit.loss_log import LossLog, read_rows
from hybrid_dit.workdir import Stage

CHOICE = ["R2", "softmax"]
STEPS = 12
ROOT = Path(__file__).parents[2]
# Imports once, then trains in a child that it kills at the given steps one after the other, and lets the last one end.
# A child waits for ever two steps after the one it is killed at, so that it can't be through before the kill arrives.
KILLER = """
import json, os, random, signal, sys, time
from hybrid_dit.command_line import parse
from hybrid_dit.data.feed import LatentSource
from hybrid_dit.data.rendered import RenderedSource
from hybrid_dit.jobs import finetune
from hybrid_dit.loss_log import read_rows

kills = json.loads(sys.argv[1])
config, workdir = parse(sys.argv[2:])
kind = RenderedSource if config.data.kind == "shapes" else LatentSource
real = kind.next
for kill in [*kills, None]:
    def next(source):
        state = source.state()
        while kill and state.get("step", state.get("position", {}).get("next_index")) > kill + 1:
            time.sleep(0.1)
        return real(source)

    child = os.fork()
    if child == 0:
        kind.next = next
        finetune.run(config, workdir)
        sys.stdout.flush()
        os._exit(0)
    steps = lambda: ([0] + [row["step"] for row in read_rows(workdir / "finetune/metrics.jsonl")])[-1]
    while kill and (steps() < kill or steps() > kill + 2):
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "the child ended by itself"
        time.sleep(0.002)
    if kill:
        time.sleep(random.random() * 0.05)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert os.waitstatus_to_exitcode(status) == (-signal.SIGKILL if kill else 0), status
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """(folder of a random pipeline, function that makes a config and a workdir with stages 1 and 2 complete)."""
    folder = tmp_path_factory.mktemp("pipeline")
    pipeline = pipelines.random_pipeline(folder / "random")

    def make(workdir, **finetune_settings):
        config = settings(folder / "random", **finetune_settings)
        specs = surgery_io.specs_from_config(config.distill)
        maps = {label: surgery.init_maps(jax.random.key(1), pipeline.wan, spec) for label, spec in specs.items()}
        stage = Stage(workdir, "distill", config)
        surgery_io.save_maps(stage.folder / surgery_io.MAPS_FILE, maps)
        stage.finish()
        stage = Stage(workdir, "select", config)
        numbers = {"cost": 1, "softmax_cost": 2, "predicted_error": 0.1, "attention_flops_saved": 0.5}
        surgery_io.save_choice(stage.folder / surgery_io.CHOICE_FILE, CHOICE, budget="1R2", **numbers)
        stage.finish()
        # What another run has encoded; tests/test_pairs.py encodes.
        latents = np.random.default_rng(0).standard_normal((config.finetune.videos, 3, 4, 4, 4), np.float32)
        write_safetensors(workdir / "finetune/latents.safetensors", {"latents": latents}, {})
        return config

    return pipeline, make


def settings(weights, **finetune_settings):
    config = common.get_config("finetune", "tiny")
    config.model.weights = str(weights)
    config.model.frames, config.model.height, config.model.width = pipelines.FRAMES, pipelines.SIZE, pipelines.SIZE
    config.distill.rates = ("R2", "linear")
    config.finetune.update({"steps": STEPS, "batch": 8, "warmup": 2, "videos": 10, "save_every": 2, "drop_text": 0.5})
    config.finetune.update({"ema": 0.8, **finetune_settings})
    return config


@pytest.fixture(scope="module")
def uninterrupted(base, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted")
    finetune.run(base[1](workdir), workdir)
    return workdir


@pytest.fixture(scope="module")
def uninterrupted_on_files(base, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted_on_files")
    config = base[1](workdir)
    config.data.update(on_files(workdir / "files"))
    finetune.run(config, workdir)
    return workdir


def rows(workdir):
    return read_rows(workdir / "finetune" / finetune.METRICS_FILE)


def without_times(workdir):
    return [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_s")} for row in rows(workdir)]


def assert_same_result(workdir, other):
    for a, b in zip(*(jax.tree.leaves(load_transformer(w / "finetune/transformer")[2]) for w in (workdir, other))):
        np.testing.assert_array_equal(a, b)
    assert without_times(workdir) == without_times(other)


def on_files(folder):
    """Settings of a set of two shapes, which is made if it isn't there."""
    if not folder.exists():
        latent_sets.write_set("tar", folder, latent_sets.samples(20, ((3, 4, 4), (1, 4, 4))))
    return {"kind": "tar", "path": str(folder)}


def untrained(pipeline, workdir, config):
    maps = surgery_io.load_maps(workdir / "distill" / surgery_io.MAPS_FILE)
    return surgery.assemble(pipeline.dit, maps, CHOICE, surgery_io.specs_from_config(config.distill))


# Results


def test_outputs_are_complete_and_everything_trained(base, uninterrupted):
    folder = uninterrupted / "finetune"
    assert json.loads((folder / "done.json").read_text())["weights"] == "ema"
    assert (folder / "loss.png").stat().st_size > 1000 and list((folder / "tensorboard").iterdir())
    table = rows(uninterrupted)
    assert [row["step"] for row in table] == list(range(1, STEPS + 1))
    assert {"loss", "grad_norm", "phi_norm", "learning_rate", "seconds", "tokens_per_s"} <= table[0].keys()
    config, attention, params = load_transformer(folder / "transformer")
    assert [spec.label for spec in attention] == CHOICE
    _, before = untrained(base[0], uninterrupted, settings("anywhere"))
    changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), before, params)
    assert all(jax.tree.leaves(changed)), changed
    # The feature maps of a block that keeps softmax stay zero: they are no part of the exported model.
    assert all(np.any(x[0]) and not np.any(x[1]) for x in jax.tree.leaves(params["feature_maps"]))


def test_the_last_and_the_best_checkpoints_are_there_with_all_that_a_run_needs(base, uninterrupted):
    with Checkpoints(uninterrupted / "finetune/checkpoints", keep_best=True) as checkpoints:
        losses = {n: np.mean([row["loss"] for row in rows(uninterrupted)[:n]]) for n in range(2, STEPS + 1, 2)}
        assert checkpoints.best == min(losses, key=losses.get)  # AVERAGED is 20: the mean of all so far
        extra = checkpoints.extra()
    assert extra["data"] == [{"step": STEPS}] and extra["config"]["finetune"]["steps"] == STEPS
    kept = {int(path.name) for path in (uninterrupted / "finetune/checkpoints").iterdir()}
    assert kept == {STEPS - 2, STEPS, min(losses, key=losses.get)}


def test_the_average_is_exported_not_the_last_weights(uninterrupted):
    exported = load_transformer(uninterrupted / "finetune/transformer")[2]["head"]["kernel"]
    with ocp.StandardCheckpointer() as checkpointer:
        state = checkpointer.restore(uninterrupted / f"finetune/checkpoints/{STEPS}/state")
    np.testing.assert_array_equal(exported, state["ema"]["head"]["kernel"])
    assert np.any(exported != np.asarray(state["params"]["head"]["kernel"]))


def test_a_complete_stage_is_left_alone(base, uninterrupted, capsys, monkeypatch):
    monkeypatch.setattr(finetune, "load_pipeline", None)  # would fail if anything were loaded
    finetune.run(settings(base[0].tokenizer_folder.parent), uninterrupted)
    out = capsys.readouterr().out
    assert "complete" in out and out.count("\n") == 1


# Continuing


def command(config, workdir):
    return command_line("finetune", config, workdir, "model", "distill", "finetune", "data")


@pytest.mark.slow
def test_two_processes_train_what_one_does(base, uninterrupted, tmp_path):
    """Sums over the batch are taken in another order; a sample dropped or drawn differently changes losses by 1e-2."""
    config = base[1](tmp_path / "run")
    several = Several(tmp_path, MAIN, *command(config, tmp_path / "run"))
    (first, out, error), (second, silent, other) = several.finish()
    assert (first, second) == (0, 0), error + other
    assert "finetune" in out and "finetune" not in silent
    one, two = ([row["loss"] for row in rows(workdir)] for workdir in (uninterrupted, tmp_path / "run"))
    np.testing.assert_allclose(two, one, rtol=1e-4)
    names = [{p.name for p in (w / "finetune").iterdir()} for w in (uninterrupted, tmp_path / "run")]
    assert names[0] == names[1]
    for a, b in zip(
        *(jax.tree.leaves(load_transformer(w / "finetune/transformer")[2]) for w in (uninterrupted, tmp_path / "run"))
    ):
        assert np.abs(a - b).max() <= 2 * STEPS * config.finetune.learning_rate  # the most that Adam can be apart


@pytest.mark.parametrize(
    ("expected", "count"),
    [("uninterrupted", 1)]
    + [pytest.param(*case, marks=pytest.mark.slow) for case in (("uninterrupted", 5), ("uninterrupted_on_files", 2))],
)
def test_a_run_killed_at_random_steps_ends_with_bit_equal_parameters(base, request, tmp_path, expected, count):
    uninterrupted = request.getfixturevalue(expected)
    config = base[1](tmp_path)
    if expected == "uninterrupted_on_files":
        config.data.update(on_files(uninterrupted / "files"))
    kills = sorted(random.sample(range(1, STEPS - 1), count))
    arguments = [json.dumps(kills), *command(config, tmp_path)]
    killer = subprocess.run(
        [sys.executable, "-c", KILLER, *arguments],
        cwd=ROOT,
        env=os.environ
        | {
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",  # a hundred small programs, six times
            "PYTHONPATH": str(ROOT),
        },
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert killer.returncode == 0, f"kills at {kills}\n{killer.stdout}\n{killer.stderr}"
    # A kill at step 5 or later has a checkpoint before it.
    assert killer.stdout.count("continues after step") >= sum(step >= 5 for step in kills)
    assert_same_result(tmp_path, uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_step_at_hand(base, uninterrupted, tmp_path, monkeypatch, capsys, number):
    config = base[1](tmp_path, save_every=100)
    real, reserved = LossLog.add, []

    def press(log, step, *args, **values):
        real(log, step, *args, **values)
        if step == 3:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(LossLog, "add", press)
        patch.setattr(Checkpoints, "reserve", lambda _, state: reserved.append(state))
        with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit) as info:
            finetune.run(config, tmp_path)
    assert number == signal.SIGINT or info.value.code == 0
    assert len(reserved) == 1  # before the step that may overwrite it
    assert "saving after step 3" in capsys.readouterr().out and not (tmp_path / "finetune/done.json").exists()
    if number == signal.SIGTERM:
        finetune.run(config, tmp_path)
        assert "continues after step 3" in capsys.readouterr().out
        assert_same_result(tmp_path, uninterrupted)


def test_every_process_takes_its_own_position_and_those_of_another_number_the_first(monkeypatch):
    states = [{"process": [i, 2]} for i in range(2)]
    assert finetune._position(states) == states[0]
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert finetune._position(states) == states[1] and finetune._position(states[:1]) == states[0]


# What one sees


def test_videos_are_sampled_with_the_averaged_weights_and_a_profile_is_written(
    base, uninterrupted, tmp_path, monkeypatch, capsys
):
    config = base[1](tmp_path, steps=5, sample_every=4, profile=1)
    calls = []
    make = lambda *args: lambda step, params: calls.append((step, np.asarray(params["head"]["kernel"])))  # noqa: E731
    monkeypatch.setattr(finetune, "SampleVideos", make)
    finetune.run(config, tmp_path)
    ((step, head),) = calls
    with ocp.StandardCheckpointer() as checkpointer:
        state = checkpointer.restore(tmp_path / "finetune/checkpoints/4/state")
    assert step == 4 and np.array_equal(head, state["ema"]["head"]["kernel"])
    assert list((tmp_path / "finetune/profile").rglob("*.xplane.pb")) and "profile in" in capsys.readouterr().out
    # Neither changes what is computed.
    assert without_times(tmp_path) == without_times(uninterrupted)[:5]


# Bad input


def test_divergence_names_the_step_its_samples_and_the_last_good_checkpoint(base, uninterrupted, tmp_path, monkeypatch):
    config = base[1](tmp_path)
    real, bad = RenderedSource.next, []

    def poisoned(source):
        batch = real(source)
        if source.state()["step"] == 4:
            bad.extend(batch.keys)
            batch.latents[2:4] *= np.float32("nan")
        return batch

    monkeypatch.setattr(RenderedSource, "next", poisoned)
    with pytest.raises(UserError, match=r"diverged at step 4: loss nan.*learning_rate") as info:
        finetune.run(config, tmp_path)
    assert f"not finite, of 8: {', '.join(bad[2:4])}; the last good" in str(info.value)
    assert f"the last good checkpoint is {tmp_path}/finetune/checkpoints/2." in str(info.value)
    assert not (tmp_path / "finetune/done.json").exists()
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3]
    with Checkpoints(tmp_path / "finetune/checkpoints") as checkpoints:
        assert checkpoints.latest == 2  # nothing that is not finite was saved


def test_all_processes_name_the_samples_of_all(tmp_path):
    program = """
import sys
from types import SimpleNamespace
from hybrid_dit import processes
options, _ = processes.parse(sys.argv[1:])
with processes.joined(options):
    import jax, numpy as np
    from pathlib import Path
    from hybrid_dit.jobs import finetune
    i = jax.process_index()
    keys = [f"sample {i} {n}" for n in "abc"]
    checkpoints = SimpleNamespace(latest=4 if i == 0 else None, folder=Path("x"))  # a folder that is seen late
    metrics = {"loss": 1.0, "grad_norm": 2.0, "sample_loss": np.ones(6)}
    finetune._check(metrics, 5, keys, i, checkpoints, SimpleNamespace(learning_rate=0.1))
    metrics |= {"loss": np.nan} if "loss" in sys.argv else {"grad_norm": np.inf}
    metrics["sample_loss"][4] = np.nan if "loss" in sys.argv else 1
    finetune._check(metrics, 5, keys, 1 - i, checkpoints, SimpleNamespace(learning_rate=0.1))
"""
    one = "loss nan, gradient norm 2.0; samples whose loss is not finite, of 6: sample 0 b; the last good"
    every = ", ".join(f"sample {i} {n}" for i in (1, 0) for n in "abc")
    for what, told in (("loss", one), ("norm", f"loss 1.0, gradient norm inf; its samples: {every}; the last good")):
        (first, _, error), (second, _, other) = Several(tmp_path / what, program, what).finish()
        assert (first, second) == (2, 2)
        assert (error + other).count("error: ") == 1  # equal texts are told once
        assert f"error: fine-tuning diverged at step 5: {told} checkpoint is x/4. " in error + other


@pytest.mark.slow
def test_one_process_goes_on_where_two_began_and_comes_to_the_same_batch(base, tmp_path):
    """In the share of the second one: a sample that is left out, then one that can't be trained on."""
    pairs, order = latent_sets.samples(20, ((3, 4, 4),)), Order({"all": range(20)}, [None] * 20, 8, 0, 2)
    first, third = (int(order.at(step).samples[4]) for step in (0, 2))
    pairs[first][0][0, 0, 0, 0] = np.nan
    pairs[third][0][:] = 1e30
    latent_sets.write_tar(tmp_path / "files/a.tar", pairs)
    config = base[1](tmp_path / "run")
    config.data.update({"kind": "tar", "path": str(tmp_path / "files")})
    results = Several(tmp_path, MAIN, *command(config, tmp_path / "run")).finish()
    assert [code for code, _, _ in results] == [2, 2]
    told = [error for _, _, error in results]
    assert f"left out a.tar/{first:09d}: latents holds NaN" in told[1] and "left out" not in told[0] + results[0][1]
    with pytest.raises(UserError) as info:
        finetune.run(config, tmp_path / "run")
    assert f"step 3: loss nan, gradient norm nan; samples whose loss is not finite, of 8: a.tar/{third:09d};" in (
        str(info.value)
    )
    assert f"the last good checkpoint is {tmp_path}/run/finetune/checkpoints/2." in str(info.value)
    assert f"error: {info.value}\n" in told[0] + told[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [({"finetune.videos": 0}, "rendered moving shapes"), ({"model.width": 64}, "square")],
)
def test_data_that_is_not_there(base, tmp_path, change, message):
    config = base[1](tmp_path)
    config.update_from_flattened_dict(change)
    for name in ("distill", "select"):  # made with the same settings
        (tmp_path / name / "settings.json").unlink()
        Stage(tmp_path, name, config)
    with pytest.raises(UserError, match=message):
        finetune.run(config, tmp_path)


@pytest.mark.parametrize(
    "change",
    [{"steps": 0}, {"save_every": 0}, {"keep": 0}, {"batch": 0}, {"warmup": -1}, {"drop_text": 1.5}, {"ema": 1.0}]
    + [{"learning_rate": value} for value in (0.0, -1e-4, float("nan"), float("inf"))],
)
def test_numbers_out_of_range_are_told_at_once(tmp_path, change):
    with pytest.raises(UserError, match=f"finetune.{next(iter(change))}="):
        finetune.run(settings("nowhere", **change), tmp_path)


def test_a_setting_that_was_refused_does_not_stay_in_the_workdir(tmp_path):
    for change in ({"schedule": "cosinus"}, {"timesteps": "normal"}, {"accumulate": 3}, {"learning_rates": (".*",)}):
        with pytest.raises(UserError, match=f"finetune.{next(iter(change))}"):
            finetune.run(settings("nowhere", **change), tmp_path)
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"finetune.learning_rates": ("block/.*=1", "feature_maps/.*=1")}, "matches 0 learning-rate rules"),
        ({"data.buckets": ("5x32x32",)}, "no samples of the shape 5x32x32"),
    ],
)
def test_a_setting_that_does_not_fit_model_or_data_can_be_corrected(base, tmp_path, monkeypatch, change, message):
    config = base[1](tmp_path)
    shutil.rmtree(tmp_path / "finetune")  # what `base` prepares
    config.data.update(on_files(tmp_path / "files"))
    monkeypatch.setattr(finetune, "train", lambda *args: pytest.fail("refused settings went through"))
    refused = config.copy_and_resolve_references()
    refused.update_from_flattened_dict(change)
    with pytest.raises(UserError, match=message):
        finetune.run(refused, tmp_path)
    monkeypatch.setattr(finetune, "train", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        finetune.run(config, tmp_path)


def test_missing_stages_are_named(base, tmp_path):
    with pytest.raises(UserError, match="distill"):
        finetune.run(settings("nowhere"), tmp_path)
