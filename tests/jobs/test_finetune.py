"""Stage 3 on a tiny random pipeline: exact resume, equal losses on 1 and 8 devices, outputs, bad input."""

import csv
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pipelines
import pytest

from configs import common
from hybrid_dit import sharding, surgery, surgery_io
from hybrid_dit.checkpoint import Checkpoints
from hybrid_dit.convert.pipeline import load_transformer
from hybrid_dit.errors import UserError
from hybrid_dit.jobs import finetune
from hybrid_dit.pairs import Pairs, batch_at
from hybrid_dit.trainer import Trainer
from hybrid_dit.workdir import Stage

CHOICE = ["R2", "softmax"]
STEPS = 5
ROOT = Path(__file__).parents[2]


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
        return config

    return pipeline, make


def settings(weights, **finetune_settings):
    config = common.get_config("finetune", "tiny")
    config.model.weights = str(weights)
    config.model.frames, config.model.height, config.model.width = pipelines.FRAMES, pipelines.SIZE, pipelines.SIZE
    config.distill.rates = ("R2", "linear")
    config.finetune.update({"steps": STEPS, "batch": 4, "warmup": 2, "videos": 6, "save_every": 2, "drop_text": 0.5})
    config.finetune.update(finetune_settings)
    return config


@pytest.fixture(scope="module")
def uninterrupted(base, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted")
    config = base[1](workdir)
    finetune.run(config, workdir)
    return workdir


def rows(workdir):
    with open(workdir / "finetune" / "loss.csv", newline="") as file:
        return list(csv.reader(file))


def assert_same_result(workdir, other):
    for a, b in zip(*(jax.tree.leaves(load_transformer(w / "finetune/transformer")[2]) for w in (workdir, other))):
        np.testing.assert_array_equal(a, b)
    assert rows(workdir) == rows(other)


@pytest.fixture(scope="module")
def noise_pairs():
    """Eight pairs of noise, and an empty prompt."""
    rng = np.random.default_rng(0)

    def noise(*shape):
        return rng.standard_normal(shape, np.float32)

    pairs = Pairs(noise(8, 3, 4, 4, 4), noise(8, 5, 8), np.ones((8, 5), np.float32))
    return pairs, Pairs(pairs.latents[:1], noise(1, 5, 8), np.ones((1, 5), np.float32))


@pytest.fixture(scope="module")
def make_trainer(base, noise_pairs, tmp_path_factory):
    """Function that returns (trainer on the first devices, parameters of the untrained hybrid)."""
    pipeline, make = base

    def trainer(devices=1, **finetune_settings):
        folder = tmp_path_factory.mktemp("stages")
        config = make(folder, **{"learning_rate": 3e-3, "drop_text": 0.0, **finetune_settings})
        attention, params = untrained(pipeline, folder, config)
        mesh = sharding.data_mesh(jax.devices()[:devices])
        return Trainer(config, pipeline.wan, attention, 3.0, noise_pairs[1], mesh), params

    return trainer


def untrained(pipeline, workdir, config):
    maps = surgery_io.load_maps(workdir / "distill" / surgery_io.MAPS_FILE)
    return surgery.assemble(pipeline.dit, maps, CHOICE, surgery_io.specs_from_config(config.distill))


# Results


def test_outputs_are_complete_and_everything_trained(base, uninterrupted):
    folder = uninterrupted / "finetune"
    assert (folder / "done.json").is_file() and (folder / "loss.png").stat().st_size > 1000
    table = rows(uninterrupted)
    assert table[0] == ["step", "loss", "grad_norm"] and [int(r[0]) for r in table[1:]] == list(range(1, STEPS + 1))
    config, attention, params = load_transformer(folder / "transformer")
    assert [spec.label for spec in attention] == CHOICE
    _, before = untrained(base[0], uninterrupted, settings("anywhere"))
    changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), before, params)
    assert all(jax.tree.leaves(changed)), changed
    # The feature maps of a block that keeps softmax stay zero: they are no part of the exported model.
    assert all(np.any(x[0]) and not np.any(x[1]) for x in jax.tree.leaves(params["feature_maps"]))


def test_a_complete_stage_is_left_alone(base, uninterrupted, capsys, monkeypatch):
    monkeypatch.setattr(finetune, "load_pipeline", None)  # would fail if anything were loaded
    finetune.run(settings(base[0].tokenizer_folder.parent), uninterrupted)
    out = capsys.readouterr().out
    assert "complete" in out and out.count("\n") == 1


def test_loss_falls_on_one_batch_and_every_step_has_its_own_noise(make_trainer, noise_pairs):
    trainer, params = make_trainer()
    pairs, _ = noise_pairs
    state = trainer.init(params)
    step = trainer.compile(state, pairs)
    losses = []
    for _ in range(30):
        state = state._replace(step=jnp.zeros_like(state.step))  # the same noise and levels every time
        state, metrics = step(state, pairs)
        losses.append(float(metrics["loss"]))
    # 20,000 parameters against eight fixed noise tensors; a gradient of the wrong sign would raise the loss.
    assert losses[-1] < 0.8 * losses[0]
    _, metrics = step(trainer.init(params)._replace(step=state.step + 1), pairs)
    assert abs(float(metrics["loss"]) / losses[0] - 1) > 1e-3  # the same parameters and pairs, another step


# Continuing


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_an_interrupted_run_continues_to_bit_equal_parameters(base, uninterrupted, tmp_path, monkeypatch, stop_after):
    config = base[1](tmp_path)
    real = finetune.LossLog.add

    def crash(log, step, *values):
        real(log, step, *values)
        if step > stop_after:
            raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(finetune.LossLog, "add", crash)
        with pytest.raises(RuntimeError, match="power cut"):
            finetune.run(config, tmp_path)
    assert len(rows(tmp_path)) == 1 + stop_after + 1
    assert not (tmp_path / "finetune/done.json").exists()
    # What is cached must be read, not made again.
    monkeypatch.setattr("hybrid_dit.pairs._encode", None)
    finetune.run(config, tmp_path)
    assert_same_result(tmp_path, uninterrupted)


def test_ctrl_c_saves_the_step_at_hand(base, uninterrupted, tmp_path, monkeypatch, capsys):
    config = base[1](tmp_path, save_every=100)
    real = finetune.LossLog.add

    def press(log, step, *values):
        real(log, step, *values)
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(finetune.LossLog, "add", press)
        with pytest.raises(KeyboardInterrupt):
            finetune.run(config, tmp_path)
    out = capsys.readouterr().out
    assert "saving after step 3" in out and "batch of 4 does not divide over 8 devices" in out
    finetune.run(config, tmp_path)
    assert "continues after step 3" in capsys.readouterr().out
    assert_same_result(tmp_path, uninterrupted)


def test_a_killed_process_continues_to_bit_equal_parameters(base, uninterrupted, tmp_path):
    config = base[1](tmp_path)
    overrides = [
        f"--config.{section}.{name}={','.join(value) if isinstance(value, tuple) else value}"
        for section in ("model", "distill", "finetune")
        for name, value in config[section].items()
    ]
    command = [sys.executable, "-m", "hybrid_dit.main", "--config=configs/finetune.py", f"--workdir={tmp_path}"]
    log = tmp_path / "finetune/loss.csv"
    process = subprocess.Popen(
        [*command, *overrides], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    began = time.monotonic()
    while process.poll() is None and time.monotonic() - began < 120:
        if log.is_file() and log.read_text().count("\n") > 3:  # step 3 is done, the checkpoint of step 2 perhaps
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.002)
    assert process.wait() == -signal.SIGKILL, process.stdout.read()
    assert not (tmp_path / "finetune/done.json").exists()
    finetune.run(config, tmp_path)
    assert_same_result(tmp_path, uninterrupted)


# Devices


def test_one_and_eight_devices_give_the_same_losses(make_trainer, noise_pairs):
    losses = {}
    for devices in (1, 8):
        trainer, params = make_trainer(devices)
        state = trainer.init(params)
        step = trainer.compile(state, noise_pairs[0])
        losses[devices] = []
        for n in range(4):
            state, metrics = step(state, batch_at(noise_pairs[0], n, 8, 0))
            losses[devices].append([float(metrics["loss"]), float(metrics["grad_norm"])])
        kernel = state.params["blocks"]["ffn_0"]["kernel"]
        assert len(kernel.sharding.device_set) == devices
        assert kernel.addressable_shards[0].data.size == kernel.size // devices  # spread, not copied
        assert state.opt_state[1][0].mu["blocks"]["ffn_0"]["kernel"].sharding == kernel.sharding
    # Sums over the batch and over split matrices are taken in another order: a few hundred float32 roundings (6e-8
    # each) that add up like a random walk, amplified by AdamW's division in later steps. A batch that is dropped,
    # doubled or differently drawn on some device changes losses by 1e-2 and more.
    np.testing.assert_allclose(losses[1], losses[8], rtol=2e-5)


def test_eight_devices_exchange_parameters_and_gradients_but_no_activations(make_trainer, noise_pairs):
    trainer, params = make_trainer(8)
    program = trainer.lower(trainer.abstract(params), noise_pairs[0]).compile().as_text()
    gathered = re.findall(r"= \w+\[([\d,]*)\]\S* all-gather\(", program)
    assert "24,48" in gathered  # the feed-forward's matrix
    assert not [shape for shape in gathered if shape.startswith("8,12")]  # [batch, tokens, ...]


# Settings


def test_dropped_prompts_use_the_empty_one(make_trainer, noise_pairs):
    pairs, _ = noise_pairs
    texts = jnp.stack([pairs.text, pairs.text + 1])
    for share in (0.0, 1.0):
        trainer, params = make_trainer(drop_text=share)
        loss = jax.jit(lambda text, t=trainer, p=params: t.loss(p, pairs._replace(text=text), jax.random.key(0)))
        assert (loss(texts[0]) == loss(texts[1])) == (share == 1.0)


def test_warm_up_starts_above_zero_and_ends_at_the_learning_rate(make_trainer):
    trainer, _ = make_trainer(learning_rate=1e-3, warmup=4)
    rates = [float(trainer._learning_rate(jnp.int32(n))) for n in range(6)]
    np.testing.assert_allclose(rates, [0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3, 1e-3], rtol=1e-6)  # float32


def test_the_backend_reaches_attention(base, noise_pairs, tmp_path):
    pipeline, make = base
    config = make(tmp_path)
    attention, params = untrained(pipeline, tmp_path, config)
    config.model.attention_backend = "gpus"
    mesh = sharding.data_mesh(jax.devices()[:1])
    trainer = Trainer(config, pipeline.wan, attention, 3.0, noise_pairs[1], mesh)
    with pytest.raises(UserError, match="attention backend 'gpus' is unknown"):
        jax.eval_shape(trainer.loss, params, noise_pairs[0], jax.random.key(0))


# Bad input


def test_divergence_names_the_step_and_what_to_do(base, tmp_path, monkeypatch):
    config = base[1](tmp_path)
    poison = {3: np.float32("nan")}
    monkeypatch.setattr(
        finetune,
        "batch_at",
        lambda pairs, step, *rest: jax.tree.map(lambda x: x * poison.get(step, 1), batch_at(pairs, step, *rest)),
    )
    with pytest.raises(UserError, match=r"diverged at step 4: loss nan.*learning_rate"):
        finetune.run(config, tmp_path)
    assert not (tmp_path / "finetune/done.json").exists()
    assert [int(row[0]) for row in rows(tmp_path)[1:]] == [1, 2, 3]
    with Checkpoints(tmp_path / "finetune/checkpoints") as checkpoints:
        assert checkpoints.latest == 2  # nothing that is not finite was saved


@pytest.mark.parametrize(
    ("change", "message"),
    [({"finetune.videos": 0}, "rendered moving shapes"), ({"model.width": 64}, "square")],
)
def test_data_that_is_not_there(base, tmp_path, change, message):
    config = base[1](tmp_path)
    config.update_from_flattened_dict(change)
    for name in ("distill", "select"):  # made with the same settings
        (tmp_path / name / "settings.json").unlink()
    with pytest.raises(UserError, match=message):
        finetune.run(config, tmp_path)


def test_missing_stages_are_named(base, tmp_path):
    with pytest.raises(UserError, match="distill"):
        finetune.run(settings("nowhere"), tmp_path)
