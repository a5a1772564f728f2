"""The tutorial's file: its feature map against float64, in attention, and in a stage of surgery."""

import csv
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pipelines import FRAMES, SIZE, random_pipeline

from hybrid_dit import cost, main
from hybrid_dit.ops import feature_maps
from hybrid_dit.ops.hybrid import attention
from hybrid_dit.ops.spec import AttentionSpec, FeatureMapSpec

FILE = Path(__file__).parents[2] / "examples" / "add_attention.py"


@pytest.fixture(scope="module", autouse=True)
def example():
    spec = importlib.util.spec_from_file_location("add_attention", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del feature_maps.FEATURE_MAPS["focused"]


def naive(phi, x, power):
    """The docstring's formula, float64."""
    r = np.maximum(np.einsum("nhi,hio->nho", x, np.float64(phi["w0"])) + np.float64(phi["b0"]), 0) + 1e-6
    sharp = r**power
    return sharp * np.linalg.norm(r, axis=-1, keepdims=True) / np.linalg.norm(sharp, axis=-1, keepdims=True)


def test_attention_with_it_equals_naive_attention(example):
    n, h, d, grid = 15, 2, 6, (1, 3, 5)
    spec = AttentionSpec("hybrid", 4, feature_map=FeatureMapSpec("focused"))
    q, k, v = (np.asarray(jax.random.normal(key, (1, n, h, d))) for key in jax.random.split(jax.random.key(0), 3))
    phi = feature_maps.init(jax.random.key(1), h, d, spec.feature_map)
    y = attention(q, k, v, phi, spec=spec, grid=grid)

    q64, k64, v64 = (np.float64(x[0]) for x in (q, k, v))
    scores = np.einsum("nhd,mhd->hnm", q64, k64) / np.sqrt(d)
    chosen = np.arange(n) % 4 == 0
    c = scores[:, :, chosen].max(axis=-1, keepdims=True)
    linear = np.einsum("nhf,mhf->hnm", naive(phi["q"], q64, example.POWER), naive(phi["k"], k64, example.POWER))
    weights = np.where(chosen, np.exp(scores - c), linear)
    expected = np.einsum("hnm,mhd->nhd", weights / weights.sum(axis=-1, keepdims=True), v64)
    # Powers of 3 and two norms: some ten roundings of 6e-8 in each weight.
    np.testing.assert_allclose(y[0], expected, rtol=2e-5, atol=2e-6)

    gradient = jax.grad(lambda phi: jnp.abs(attention(q, k, v, phi, spec=spec, grid=grid)).sum())(phi)
    assert all(np.isfinite(g).all() and np.abs(g).max() > 0 for g in jax.tree.leaves(gradient))


def test_its_cost_is_counted_from_its_shapes():
    shape = cost.Shape(dim=12, heads=2, ffn=8, blocks=1, tokens=10)
    spec = AttentionSpec("linear", feature_map=FeatureMapSpec("focused"))
    assert cost.phi_params(shape, spec) == 2 * (6 * 6 + 6)
    assert cost.features(6, spec) == 6


def test_a_stage_runs_with_it(tmp_path, capsys):
    random_pipeline(tmp_path / "weights")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a large red circle moving left on a white background\n")
    code = main.main(
        [
            "",
            f"--config={FILE.parents[1] / 'configs' / 'distill.py'}",
            f"--workdir={tmp_path}",
            "--config.distill.feature_map=focused",
            "--config.distill.rates=R4,",
            f"--config.prompts.train={prompts}",
            f"--config.prompts.held_out={prompts}",
            f"--config.model.weights={tmp_path}/weights",
            f"--config.model.frames={FRAMES}",
            f"--config.model.height={SIZE}",
            f"--config.model.width={SIZE}",
            "--config.distill.prompts=1",
            "--config.distill.sample_steps=2",
            "--config.distill.held_out_prompts=1",
            "--config.distill.held_out_steps=3",
        ]
    )
    assert code == 0, capsys.readouterr().err
    with open(tmp_path / "distill" / "errors.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 and all(0 < float(row["distilled"]) < 2 for row in rows)
