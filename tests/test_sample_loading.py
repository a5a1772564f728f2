"""What sampling loads: where it goes, in which dtype, and that nothing is loaded in vain."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from pipelines import random_pipeline

from hybrid_dit import generation, sample_loading, sharding
from hybrid_dit.convert import tables
from hybrid_dit.convert.abstract import abstract_dit
from hybrid_dit.convert.pipeline import load_pipeline
from hybrid_dit.models.wan import WanDiT

PROMPTS = ["a small red circle moving left on a gray background", ""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loading") / "pipeline"
    random_pipeline(folder, dim=32)
    return folder


def settings(batch, sequential=False, guidance=3.0):
    return SimpleNamespace(batch=batch, sequential=sequential, guidance=guidance)


@pytest.mark.parametrize(
    "cfg, groups",
    [
        (settings(1), 2),  # a branch of guidance each
        (settings(1, sequential=True), 1),
        (settings(1, guidance=1.0), 1),
        (settings(3), 2),
        (settings(8, sequential=True), 8),
        (settings(12, sequential=True), 4),
    ],
)
def test_devices_are_grouped_by_what_goes_through_the_dit_at_once(cfg, groups):
    mesh = sample_loading.sampling_mesh(cfg)
    assert dict(mesh.shape) == {"block": 1, "data": groups, "seq": 8 // groups}
    split = sample_loading.by_video(mesh, cfg.batch).spec
    assert split == (PartitionSpec("data") if cfg.batch % groups == 0 else PartitionSpec())


@pytest.mark.parametrize("whole", [True, False])
def test_a_large_dit_is_split_over_all_devices(folder, monkeypatch, whole):
    if not whole:
        monkeypatch.setattr(sharding, "WHOLE", 1000)
    mesh = sample_loading.sampling_mesh(settings(2))
    params = sample_loading.load_dit(folder / "transformer", mesh, "bfloat16")
    expected = tables.flatten(load_pipeline(folder).dit)
    flat = tables.flatten(params)
    for path, array in flat.items():
        dtype = sample_loading.kept_dtype(path, "bfloat16")
        np.testing.assert_array_equal(np.asarray(array), expected[path].astype(dtype), err_msg=path)
    kernel = flat["blocks/ffn_0/kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // (1 if whole else 8)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params)
    config = load_pipeline(folder, kinds=()).wan
    assert sample_loading.abstract_params(abstract_dit(config), mesh, "bfloat16") == shapes  # what plans compile for


def test_kept_dtypes_change_no_bit(folder):
    pipeline = load_pipeline(folder)
    shape = generation.latent_shape(pipeline.wan, pipeline.vae, 5, 32, 32)
    x = generation.noise_for(jax.random.key(0), shape, [0])
    text = jax.random.normal(jax.random.key(1), (1, 3, pipeline.wan.text_dim))
    flat = {p: a.astype(sample_loading.kept_dtype(p, "bfloat16")) for p, a in tables.flatten(pipeline.dit).items()}
    assert {a.dtype.name for a in flat.values()} == {"bfloat16", "float32"}
    run = jax.jit(WanDiT(pipeline.wan, dtype=jnp.bfloat16).apply)
    arguments = x, np.float32([500]), text
    kept = run({"params": tables.unflatten(flat)}, *arguments)
    np.testing.assert_array_equal(kept, run({"params": pipeline.dit}, *arguments))


def test_texts_are_encoded_on_all_devices_once(folder, tmp_path, monkeypatch):
    loaded = []
    load = sample_loading.load_sharded
    monkeypatch.setattr(sample_loading, "load_sharded", lambda *a: loaded.append(load(*a)) or loaded[-1])
    cache = sample_loading.encode_texts(str(folder), tmp_path, PROMPTS)
    assert loaded[0]["blocks"]["ffn"]["gate"]["kernel"].addressable_shards[0].data.shape == (1, 1, 16)  # of 8 rows
    pipeline = load_pipeline(folder)
    expected, counts = generation.text_context(pipeline, PROMPTS)
    text, count = cache.context(PROMPTS)
    np.testing.assert_array_equal(count, counts)
    np.testing.assert_allclose(text, expected, atol=1e-5)  # values of order 1, float32 sums in another order
    again = sample_loading.encode_texts(str(folder), tmp_path, PROMPTS)
    assert len(loaded) == 1
    np.testing.assert_array_equal(again.context(PROMPTS)[0], text)


def test_parts_that_are_not_asked_for_are_not_read(folder):
    vae = sample_loading.load_vae(str(folder))
    assert vae.dit == {} and vae.text_params == {}
    whole = load_pipeline(folder)
    same = jax.tree.map(np.array_equal, vae.vae_params, whole.vae_params)
    assert all(jax.tree.leaves(same))
    empty = {"dit": {}, "text_params": {}, "vae_params": {}, "tokenizer": None}
    rest = [{f.name: getattr(p, f.name) for f in dataclasses.fields(p) if f.name not in empty} for p in (vae, whole)]
    assert rest[0] == rest[1]
