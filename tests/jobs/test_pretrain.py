"""The pretraining job in miniature: what it writes, that the VAE is trained once, windows, optimisers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import pretrain_tiny
from hybrid_dit.convert.pipeline import load_pipeline
from hybrid_dit.data import shapes
from hybrid_dit.jobs import pretrain


def settings():
    config = pretrain_tiny.get_config()
    config.update({"frames": 5, "size": 16, "chunk": 2, "compute_dtype": "float32"})
    config.vae.update({"base_dim": 2, "frames": 5, "size": 16})
    config.vae.update({"steps": 2, "whole_steps": 2, "batch": 2, "whole_batch": 2})
    config.text.update({"d_model": 8, "d_ff": 8, "num_layers": 1, "num_heads": 2})
    config.dit.update({"dim": 16, "num_heads": 2, "ffn_dim": 16, "num_layers": 1, "videos": 6})
    config.dit.update({"steps": 4, "batch": 3, "warmup": 1})
    config.eval.update({"videos": 2, "steps": 2})
    return config


@pytest.mark.slow
def test_the_job_writes_a_pipeline_with_its_record_and_trains_the_vae_once(tmp_path, monkeypatch, capsys):
    config = settings()
    pretrain.run(config, tmp_path)
    pipeline = load_pipeline(tmp_path / "wan-tiny")
    assert pipeline.wan.dim == 16 and pipeline.vae.base_dim == 2 and pipeline.shift == config.dit.shift
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((pipeline.dit, pipeline.vae_params, pipeline.text_params)))
    record = json.loads((tmp_path / "wan-tiny/training.json").read_text())
    assert record["loss"]["step"] == [2, 4] and record["vae_loss"]["step"] == [2, 4]
    assert record["config"]["dit"]["steps"] == 4 and set(record["scores"]) == {"3.0"}
    assert (tmp_path / "wan-tiny/loss.png").stat().st_size > 1000

    monkeypatch.setattr(pretrain, "train_vae", lambda *_: pytest.fail("the VAE was there already"))
    _, params, losses = pretrain.train_vae_once(config, tmp_path / "vae", np.random.default_rng(0))
    assert [step for step, _ in losses] == [2, 4]
    stored = pipeline.vae_params["encoder"]["conv_in"]["kernel"]  # in bfloat16: 8 bits
    np.testing.assert_allclose(params["encoder"]["conv_in"]["kernel"], stored, rtol=2**-8)


def test_windows_show_the_same_world_shifted_in_space_and_time():
    rng = np.random.default_rng(0)
    whole = shapes.place_batch([shapes.sample_scene(rng, "train", 0.5) for _ in range(20)], rng, 33, 128)
    window = pretrain.clip_around_thing(whole, np.random.default_rng(1), 33, 17, 64)
    for field in ("kind", "colour", "radius", "velocity", "present", "background"):
        np.testing.assert_array_equal(getattr(window, field), getattr(whole, field))
    # Both things of a scene move by the same shift, up to the frames skipped: in units of their own velocity.
    both = whole.present.all(axis=1)
    moved = whole.start - window.start
    skipped = np.arange(17)[:, None, None, None] * whole.velocity[both]
    difference = (moved[both][:, 0] - moved[both][:, 1])[None]
    candidates = skipped[:, :, 1] - skipped[:, :, 0]
    assert np.abs(difference - candidates).max(axis=-1).min(axis=0).max() < 1e-3
    video = shapes.render_batch(window, frames=17, size=64)
    foreground = np.abs(np.asarray(video) - whole.background[:, None, None, None]).max(axis=-1) > 0.02
    assert foreground.any(axis=(1, 2, 3)).all()  # every window has its thing in it


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_optimisers_descend_and_scale_matrices_alike(optimizer):
    config = settings()
    config.dit.update({"optimizer": optimizer, "learning_rate": 1e-2, "steps": 200, "warmup": 2})
    tx = pretrain.make_optimizer(config.dit)
    key = jax.random.key(0)
    params = {"blocks": {"ffn_0": {"kernel": jax.random.normal(key, (2, 8, 8)), "bias": jnp.ones((2, 8))}}}

    def loss(p):
        return sum(jnp.square(x).sum() for x in jax.tree.leaves(p))

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state, updates

    state, first = tx.init(params), float(loss(params))
    for _ in range(100):
        params, state, updates = step(params, state)
    assert float(loss(params)) < 0.7 * first
    kernel = updates["blocks"]["ffn_0"]["kernel"]
    singular = np.linalg.svd(np.asarray(kernel), compute_uv=False)
    # Muon's defining property: the singular values of an update are nearly equal (Newton-Schulz leaves 0.7 to 1.2, and
    # may not lift the smallest); those of Adam's update spread like a random matrix's.
    spread = (singular[:, :-1].std() / singular[:, :-1].mean()) < 0.35
    assert spread == (optimizer == "muon")
