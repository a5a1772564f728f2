"""Stage 1 on a tiny random pipeline: learning, outputs, interruptions of every kind, bad input."""

import csv
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from several import MAIN, Several, command_line
from workdirs import PROMPTS, tiny_config

from hybrid_dit import sharding
from hybrid_dit.errors import UserError
from hybrid_dit.jobs import distill
from hybrid_dit.surgery_io import MAPS_FILE, load_maps
from hybrid_dit.text_cache import embedding_file

REPOSITORY = Path(__file__).parents[2]
STEPS = 10  # of each of two trajectories
SHORT = {
    "distill__prompts": 2,
    "distill__sample_steps": STEPS,
    "distill__held_out_steps": 3,
    "distill__held_out_prompts": 1,
    "distill__learning_rate": 1e-2,
}


def settings(root, **values):
    return tiny_config("distill", root, **{**SHORT, **{f"distill__{k}": v for k, v in values.items()}})


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("distill")


@pytest.fixture(scope="module")
def whole(root):
    """The folder of a run that nothing interrupted, on 8 devices."""
    distill.run(settings(root), root / "whole")
    return root / "whole" / "distill"


def maps_of(folder):
    return jax.tree.leaves(load_maps(folder / MAPS_FILE))


def assert_bit_equal(folder, whole):
    for a, b in zip(maps_of(folder), maps_of(whole)):
        np.testing.assert_array_equal(a, b)
    for name in ("errors.csv", "errors_by_timestep.csv", "loss.csv"):
        assert (folder / name).read_text() == (whole / name).read_text()


def assert_equal_to_rounding(folder, whole):
    # Rounding grows with every one of 20 steps, and Adam may turn an update whose gradient is all rounding.
    off = np.concatenate([np.abs(a - b).ravel() for a, b in zip(maps_of(folder), maps_of(whole))])
    assert off.max() <= 20 * 1e-2 and (off > 0.05 * 1e-2).mean() < 0.02


def stop_at(step, action, monkeypatch):
    """Calls `action` when training reports that `step` steps are done; undo with `monkeypatch.undo()`."""
    original = distill.Progress.update

    def update(self, done, **values):
        if self.label == "distill" and done == step:
            action()
        original(self, done, **values)

    monkeypatch.setattr(distill.Progress, "update", update)


def test_errors_fall_and_everything_is_written(whole):
    with open(whole / "errors.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["block", "rate", "undistilled", "distilled", "low", "high"]
    assert [(int(r["block"]), r["rate"]) for r in rows] == [(b, r) for b in range(2) for r in ("R2", "linear")]
    before, after, low, high = (np.array([float(r[n]) for r in rows]) for n in list(rows[0])[2:])
    assert after.mean() < 0.9 * before.mean()  # random q, k, v are hard to fit; what is fitted must carry over
    assert (low <= after).all() and (after <= high).all()

    with np.load(whole / "curves.npz") as curves:
        assert curves["error"].shape == curves["loss"].shape == (2 * STEPS, 2, 2)
        assert curves["labels"].tolist() == ["R2", "linear"]
        assert curves["error"][0].mean() > curves["error"][-STEPS:].mean()
        mean = curves["error"].mean(axis=1)
    with open(whole / "loss.csv", newline="") as file:
        table = np.array(list(csv.reader(file))[1:], float)
    np.testing.assert_allclose(table[:, 1:], mean, rtol=1e-5)
    pictures = {"errors.png", "loss.png", "loss_R2.png", "loss_linear.png"}
    assert pictures | {"undistilled.safetensors", MAPS_FILE} <= {p.name for p in whole.iterdir()}


def test_held_out_timesteps_are_none_of_those_trained_on(whole):
    """Both schedules start at t = 1000 (pure noise) and end alike: of three held-out steps one is new, t = 750."""
    with open(whole / "errors_by_timestep.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(r["from_timestep"], r["to_timestep"], r["steps"]) for r in rows} == {("750", "1000", "1")}
    with open(whole / "errors.csv", newline="") as file:
        errors = [r["distilled"] for r in csv.DictReader(file)]
    assert [r["distilled"] for r in rows] == errors  # one bucket: the same mean


def test_prompts_trained_on_are_left_out_where_possible(capsys):
    assert distill._untrained(["a", "b"], ["b"]) == ["a"]
    assert not capsys.readouterr().out
    assert distill._untrained(["b"], ["b"]) == ["b"]
    assert "note: every held-out prompt" in capsys.readouterr().out


def test_text_is_encoded_once(whole, root):
    texts = {embedding_file(whole / "text", prompt).name for prompt in [*PROMPTS, ""]}
    assert {p.name for p in (whole / "text").iterdir()} == texts


def test_sigterm_saves_within_a_step_and_exits_0(whole, root, monkeypatch, capsys):
    stop_at(13, lambda: os.kill(os.getpid(), signal.SIGTERM), monkeypatch)
    with pytest.raises(SystemExit) as ending:
        distill.run(settings(root), root / "term")
    assert ending.value.code == 0 and not (root / "term/distill" / MAPS_FILE).exists()
    monkeypatch.undo()
    capsys.readouterr()
    distill.run(settings(root), root / "term")
    assert "continues after 13 steps" in capsys.readouterr().out
    assert_bit_equal(root / "term/distill", whole)

    distill.run(settings(root), root / "term")
    assert "complete" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"distill.learning_rate: 0.01 there, 0.5 in this command"):
        distill.run(settings(root, learning_rate=0.5), root / "term")


KILLED = """
import os, signal, sys, time
from hybrid_dit import main, progress
update = progress.Progress.update
def killed(self, done, **values):
    if self.label == "distill" and done == STEP:
        while STEP > 10 and not os.path.isdir(sys.argv[2].partition("=")[2] + "/distill/checkpoints/10"):
            time.sleep(0.01)  # it is written in the background
        os.kill(os.getpid(), signal.SIGKILL)
    update(self, done, **values)
progress.Progress.update = killed
sys.exit(main.main(sys.argv))
"""


def command(config, workdir):
    return command_line("distill", config, workdir, "model", "prompts", "distill")


def test_sigkill_loses_only_steps_that_come_again(whole, root, capsys):
    config = settings(root)
    step = random.SystemRandom().randrange(1, 2 * STEPS)
    killed = [sys.executable, "-c", KILLED.replace("STEP", str(step)), *command(config, root / "kill")]
    result = subprocess.run(killed, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert result.returncode == -signal.SIGKILL, result.stderr
    distill.run(config, root / "kill")
    out = capsys.readouterr().out
    print("killed at step", step)  # at 10, the checkpoint at the end of a trajectory may or may not be complete
    assert step == 10 or ("continues after 10 steps" in out) == (step > 10)
    assert_bit_equal(root / "kill/distill", whole)


def test_another_mesh_continues_to_the_same_maps(whole, root, monkeypatch):
    """One device, interrupted; then eight, block inputs kept and two blocks padded to eight."""
    one = sharding.distill_mesh(devices=jax.devices()[:1])
    monkeypatch.setattr(sharding, "distill_mesh", lambda data, seq: one)
    stop_at(12, lambda: os.kill(os.getpid(), signal.SIGINT), monkeypatch)
    config = settings(root, activations="stacked")
    with pytest.raises(KeyboardInterrupt):
        distill.run(config, root / "mesh")
    monkeypatch.undo()
    distill.run(config, root / "mesh")
    assert_equal_to_rounding(root / "mesh/distill", whole)


@pytest.mark.slow
def test_two_processes_finish_what_one_began(whole, root, tmp_path, monkeypatch, capsys):
    """One process on 8 devices, interrupted; then two on 4 each, to the same files, which the first of them writes.

    Programs of the two are compiled without optimisation, which takes half the time and rounds otherwise.
    """
    config, workdir = settings(root), root / "several"
    stop_at(18, lambda: os.kill(os.getpid(), signal.SIGTERM), monkeypatch)
    with pytest.raises(SystemExit):
        distill.run(config, workdir)
    monkeypatch.undo()
    several = Several(tmp_path, MAIN, *command(config, workdir))
    (first, out, error), (second, silent, other) = several.finish()
    assert (first, second) == (0, 0), error + other
    assert "continues after 18 steps" in out and "distill" not in silent
    there, here = ({str(p.relative_to(f)) for p in f.rglob("*")} for f in (whole, workdir / "distill"))
    assert {name for name in there ^ here if not name.startswith("checkpoints")} == set()
    assert_equal_to_rounding(workdir / "distill", whole)


def test_wrong_choices_are_named_before_anything_is_written(root, tmp_path):
    with pytest.raises(UserError, match="distill.loss='valeu'"):
        distill.run(settings(root, loss="valeu"), tmp_path)
    with pytest.raises(UserError, match="distill.activations='x' is unknown; choose one of inside, stacked"):
        distill.run(settings(root, activations="x"), tmp_path)
    with pytest.raises(UserError, match="R2, R4"):
        distill.run(settings(root, rates="Q2"), tmp_path)
    config = settings(root)
    with config.unlocked():
        config.mesh.seq = 3
    with pytest.raises(UserError, match="mesh.seq"):
        distill.run(config, tmp_path)
    assert not list(tmp_path.iterdir())
