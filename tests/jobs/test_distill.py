"""Stage 1 on a tiny random pipeline: one step against a naive loop, learning, resume, outputs, bad input."""

import csv
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pipelines
import pytest

from configs import common
from hybrid_dit import generation, surgery
from hybrid_dit.errors import UserError
from hybrid_dit.jobs import distill
from hybrid_dit.models import wan
from hybrid_dit.sampling import make_sampler
from hybrid_dit.sharding import stacked_sharding
from hybrid_dit.surgery_io import MAPS_FILE, load_maps, specs_from_config


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline") / "random"
    return folder, pipelines.random_pipeline(folder, layers=8)


def settings(folder, **values):
    config = common.get_config("distill", "tiny")
    config.model.weights = str(folder)
    config.model.frames, config.model.height, config.model.width = pipelines.FRAMES, pipelines.SIZE, pipelines.SIZE
    config.distill.update(
        {"rates": ("R2", "linear"), "prompts": 2, "sample_steps": 4, "held_out_steps": 2, "held_out_prompts": 1}
    )
    config.distill.update(values)
    return config


def setting(weights, loss="value"):
    """A distiller, its state, and the arguments of one step."""
    folder, pipeline = weights
    config = settings(folder, loss=loss)
    sampler = make_sampler("euler_ancestral", num_steps=4, shift=pipeline.shift)
    distiller = distill.Distiller(
        wan=pipeline.wan,
        specs=specs_from_config(config.distill),
        sampler=sampler,
        guidance=5.0,
        loss=loss,
        learning_rate=1e-3,
        dtype="float32",
    )
    shape = generation.latent_shape(pipeline.wan, pipeline.vae, pipelines.FRAMES, pipelines.SIZE, pipelines.SIZE)
    x = generation.noise_for(jax.random.key(1), shape, [0])
    context = distill._contexts(pipeline, ["a small red circle moving left on a white background"], "")
    return distiller, distiller.init(jax.random.key(0)), (pipeline.dit, x, 1, context, jax.random.key(2))


@pytest.mark.parametrize("loss", surgery.LOSSES)
def test_a_step_equals_training_every_block_and_rate_alone(weights, loss):
    distiller, state, args = setting(weights, loss)
    dit, x, i, context, key = args
    new, x_next, errors = jax.jit(distiller.step)(state, *args)

    # The teacher, branch by branch, and guidance by hand.
    model = wan.WanDiT(distiller.wan)
    t = jnp.asarray(distiller.sampler.schedule.timesteps)[i][None]
    runs = [model.apply({"params": dit}, x, t, *c, mutable=["intermediates"]) for c in context]
    (cond, cond_vars), (uncond, uncond_vars) = runs
    _, expected = distiller.sampler.step((), x, uncond + 5.0 * (cond - uncond), i, key)
    # Guidance multiplies float32 rounding of the two branches (6e-8 of their size) by 5 + 4; a factor 10 on top.
    np.testing.assert_allclose(x_next, expected, atol=1e-5 * float(jnp.abs(expected).max()))

    captured = [wan.captured_attention(v) for v in (cond_vars, uncond_vars)]
    grid = distiller.wan.grid(x.shape)
    tx = optax.adamw(1e-3)
    for block in (0, 5):
        attention = [jnp.concatenate([c[n][block] for c in captured]) for n in range(4)]
        for label, spec in distiller.specs.items():
            maps = jax.tree.map(lambda a, b=block: a[b], state["maps"][label])

            def alone(phi, label=label, spec=spec, attention=attention):
                q, k, v, y = attention
                one = {label: spec}
                return surgery.block_losses({label: phi}, (q, k, v), y, one, grid, loss, jax.random.fold_in(key, i))

            (_, error), grads = jax.value_and_grad(alone, has_aux=True)(maps)
            updates, _ = tx.update(grads, tx.init(maps), maps)
            np.testing.assert_allclose(errors[label][block], error[label], rtol=1e-4)
            # Adam's first update is the sign of the gradient times the rate: compare where the sign is not rounding.
            for got, want, g in zip(
                *(
                    jax.tree.leaves(z)
                    for z in (
                        jax.tree.map(lambda a, b=block: a[b], new["maps"][label]),
                        optax.apply_updates(maps, updates),
                        grads,
                    )
                )
            ):
                clear = np.abs(g) > 1e-4 * np.abs(g).max()
                np.testing.assert_allclose(np.asarray(got)[clear], np.asarray(want)[clear], atol=2e-5)


def test_eight_devices_compute_what_one_does(weights):
    distiller, state, args = setting(weights)
    one = jax.jit(distiller.step)(state, *args)
    sharding = stacked_sharding(state)
    assert len(jax.devices()) == 8 and not jax.tree.leaves(sharding)[0].is_fully_replicated
    eight = jax.jit(distiller.step, out_shardings=(sharding, None, None))(jax.device_put(state, sharding), *args)
    for a, b in zip(jax.tree.leaves(one[1:]), jax.tree.leaves(eight[1:])):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)  # float32 sums in another order


def test_the_job_lowers_errors_writes_its_files_and_resumes_exactly(weights, tmp_path, monkeypatch, capsys):
    folder, pipeline = weights
    config = settings(folder, sample_steps=10, learning_rate=1e-2)
    distill.run(config, tmp_path / "whole")
    out = tmp_path / "whole/distill"
    names = {"maps.safetensors", "undistilled.safetensors", "errors.csv", "errors.png", "loss.csv", "loss.png"}
    assert names <= {p.name for p in out.iterdir()}
    with open(out / "errors.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(int(r["block"]), r["rate"]) for r in rows] == [(b, r) for b in range(8) for r in ("R2", "linear")]
    before, after = (np.array([float(r[name]) for r in rows]) for name in ("undistilled", "distilled"))
    assert after.mean() < 0.9 * before.mean()  # random q, k, v are hard to fit; what is fitted must carry over

    # Interrupted by a signal in the middle of the second trajectory, then run again.
    original = distill.Progress.update

    def signal_at_step_13(self, done, **values):
        if self.label == "distill" and done == 13:
            os.kill(os.getpid(), signal.SIGINT)
        original(self, done, **values)

    monkeypatch.setattr(distill.Progress, "update", signal_at_step_13)
    with pytest.raises(KeyboardInterrupt):
        distill.run(config, tmp_path / "resumed")
    assert not (tmp_path / "resumed/distill/maps.safetensors").exists()
    monkeypatch.setattr(distill.Progress, "update", original)
    capsys.readouterr()
    distill.run(config, tmp_path / "resumed")
    assert "continues after 13 steps" in capsys.readouterr().out
    for name in ("errors.csv", "loss.csv"):
        assert (tmp_path / "resumed/distill" / name).read_text() == (out / name).read_text()
    one, two = (jax.tree.leaves(load_maps(tmp_path / w / "distill" / MAPS_FILE)) for w in ("whole", "resumed"))
    for a, b in zip(one, two):
        np.testing.assert_array_equal(a, b)

    distill.run(config, tmp_path / "whole")
    assert "complete" in capsys.readouterr().out
    config.distill.learning_rate = 0.5
    with pytest.raises(UserError, match=r"distill.learning_rate: 0.01 there, 0.5 in this command"):
        distill.run(config, tmp_path / "whole")


def test_unknown_losses_and_rates_are_named(weights, tmp_path):
    with pytest.raises(UserError, match="distill.loss='valeu'"):
        distill.run(settings(weights[0], loss="valeu"), tmp_path)
    with pytest.raises(UserError, match="R2, R4"):
        distill.run(settings(weights[0], rates=("Q2",)), tmp_path)
    assert not list(tmp_path.iterdir())
