"""Pipeline folders: written whole, read back bit for bit, loadable by diffusers, and refused when broken."""

import dataclasses
import json
import shutil

import diffusers
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from pipelines import random_like, random_pipeline

from hybrid_dit import surgery
from hybrid_dit.convert import pipeline, tables
from hybrid_dit.convert.abstract import abstract_dit
from hybrid_dit.convert.description import FILE
from hybrid_dit.convert.files import Weights
from hybrid_dit.errors import UserError
from hybrid_dit.models.wan import WanDiT
from hybrid_dit.ops.spec import AttentionSpec, FeatureMapSpec, from_label

SPEC = AttentionSpec("hybrid", 4, "lattice", FeatureMapSpec("poly", 3, 1), "lse")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline") / "teacher"
    random_pipeline(folder, layers=3)
    return folder


@pytest.fixture(scope="module")
def teacher(folder):
    return pipeline.load_pipeline(folder)


@pytest.fixture(scope="module")
def student(teacher):
    """Blocks 0 and 2 are hybrid."""
    attention = (SPEC, AttentionSpec(), SPEC)
    dit = random_like(abstract_dit(teacher.wan, attention), np.random.default_rng(3))
    for array in tables.flatten(dit["feature_maps"]).values():
        array[1] = 0  # the convention for blocks that keep softmax
    return dataclasses.replace(teacher, attention=attention, dit=dit)


def assert_equal_trees(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_float32_round_trip_is_exact(kind, tmp_path, request):
    original = request.getfixturevalue(kind)
    pipeline.save_pipeline(tmp_path / "out", original, "float32")
    again = pipeline.load_pipeline(tmp_path / "out")
    for part in ("dit", "vae_params", "text_params"):
        assert_equal_trees(getattr(original, part), getattr(again, part))
    for part in ("wan", "attention", "vae", "text", "shift", "text_tokens"):
        assert getattr(original, part) == getattr(again, part)
    prompt = ["a small red circle moving left on a gray background"]
    np.testing.assert_array_equal(original.tokenizer(prompt, 64)[0], again.tokenizer(prompt, 64)[0])


def test_sixteen_bits_round_once_and_spare_the_text_encoder(student, tmp_path):
    pipeline.save_pipeline(tmp_path / "out", student, "bfloat16")
    again = pipeline.load_pipeline(tmp_path / "out")
    rounded = jax.tree.map(lambda x: np.asarray(x.astype(ml_dtypes.bfloat16), np.float32), student.dit)
    assert_equal_trees(rounded, again.dit)
    assert_equal_trees(student.text_params, again.text_params)
    pipeline.save_pipeline(tmp_path / "twice", again, "bfloat16")
    assert_equal_trees(again.dit, pipeline.load_pipeline(tmp_path / "twice").dit)


def test_only_converted_blocks_are_stored_and_described(student, tmp_path):
    pipeline.save_transformer(tmp_path / "out", student.wan, student.attention, student.dit)
    maps = {name for name in Weights(tmp_path / "out").shapes if ".feature_map." in name}
    assert {name.split(".")[1] for name in maps} == {"0", "2"}
    assert "blocks.0.feature_map.q.w0" in maps
    told = json.loads((tmp_path / "out" / FILE).read_text())
    assert told["blocks"][2] == dataclasses.asdict(SPEC) | {"feature_map": {"kind": "poly", "degree": 3, "layers": 1}}
    assert told["blocks"][1]["kind"] == "softmax"


def test_diffusers_reports_feature_maps_as_unexpected_and_loads_the_rest(student, tmp_path):
    pipeline.save_transformer(tmp_path / "out", student.wan, student.attention, student.dit)
    model, told = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    maps = {name for name in Weights(tmp_path / "out").shapes if ".feature_map." in name}
    assert set(told["unexpected_keys"]) == maps and not told["missing_keys"] and not told["mismatched_keys"]
    kernel = student.dit["blocks"]["self_attn"]["q"]["kernel"]
    np.testing.assert_array_equal(model.state_dict()["blocks.2.attn1.to_q.weight"].numpy(), kernel[2].T)


def test_a_teacher_has_no_description(teacher, tmp_path):
    pipeline.save_transformer(tmp_path / "out", teacher.wan, (AttentionSpec(),) * 3, teacher.dit)
    assert not (tmp_path / "out" / FILE).exists()
    assert pipeline.load_transformer(tmp_path / "out")[1] == ()


def test_diffusers_loads_a_teacher_that_was_written(teacher, tmp_path):
    pipeline.save_pipeline(tmp_path / "out", teacher, "float32")
    model = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "out" / "transformer", dtype=torch.float32)
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    kernel = teacher.dit["blocks"]["self_attn"]["q"]["kernel"]
    np.testing.assert_array_equal(state["blocks.2.attn1.to_q.weight"], kernel[2].T)
    vae = diffusers.AutoencoderKLWan.from_pretrained(tmp_path / "out" / "vae", dtype=torch.float32)
    expected = teacher.vae_params["decoder"]["conv_in"]["bias"]
    np.testing.assert_array_equal(vae.decoder.conv_in.bias.detach().numpy(), expected)


def test_writing_replaces_the_folder_or_leaves_it(teacher, tmp_path, monkeypatch):
    pipeline.save_pipeline(tmp_path / "out", teacher, "float32")
    before = sorted(f.relative_to(tmp_path) for f in tmp_path.rglob("*"))
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "_scheduler_config", lambda shift: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pipeline.save_pipeline(tmp_path / "out", teacher, "bfloat16")
        with pytest.raises(ZeroDivisionError):
            pipeline.save_pipeline(tmp_path / "new", teacher, "bfloat16")
    assert sorted(f.relative_to(tmp_path) for f in tmp_path.rglob("*")) == before
    assert_equal_trees(pipeline.load_pipeline(tmp_path / "out").dit, teacher.dit)


def edit_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda f: shutil.rmtree(f), "out does not exist"),
        (lambda f: (f / "model_index.json").unlink(), "has no model_index.json"),
        (lambda f: shutil.rmtree(f / "vae"), "has a model_index.json but no vae/"),
        (lambda f: (f / "vae" / "config.json").write_text("{"), "vae.config.json is not valid JSON"),
        (lambda f: (f / "text_encoder" / "model.safetensors").unlink(), "no weights at .*text_encoder"),
        (lambda f: (f / "text_encoder" / "model.safetensors").write_bytes(b"junk" * 9), "truncated or not a safetens"),
        (lambda f: (f / "tokenizer" / "tokenizer.json").unlink(), "tokenizer.json does not exist"),
        (lambda f: (f / "scheduler" / "scheduler_config.json").unlink(), "scheduler_config.json is missing"),
        (lambda f: edit_json(f / "transformer" / "config.json", num_layers=4), "describes 3 blocks, but the model has"),
        (lambda f: edit_json(f / "transformer" / "config.json", ffn_dim=40), r"has shape \[48.*\], expected \[40"),
        (lambda f: edit_json(f / "transformer" / FILE, version=2), "version 2; this release reads version 1"),
        (lambda f: edit_json(f / "transformer" / FILE, blocks=[]), "describes 0 blocks, but the model has 3"),
        (lambda f: (f / "transformer" / FILE).unlink(), "has feature maps .blocks.0.feature_map.k.b0, ...."),
    ],
)
def test_broken_folders_are_refused_with_the_place(student, tmp_path, change, message):
    pipeline.save_pipeline(tmp_path / "out", student, "float32")
    change(tmp_path / "out")
    with pytest.raises(UserError, match=message):
        pipeline.load_pipeline(tmp_path / "out")


@pytest.mark.parametrize("layers, message", [(4, "missing blocks.3.attn2"), (2, "unexpected blocks.2.attn1")])
def test_another_number_of_blocks_is_refused(folder, tmp_path, layers, message):
    shutil.copytree(folder, tmp_path / "out")
    edit_json(tmp_path / "out" / "transformer" / "config.json", num_layers=layers)
    with pytest.raises(UserError, match=message):
        pipeline.load_pipeline(tmp_path / "out")


def test_sizes_are_read_without_weights(folder, teacher, tmp_path):
    shutil.copytree(folder, tmp_path / "out", ignore=shutil.ignore_patterns("*.safetensors"))
    assert pipeline.load_pipeline_config(tmp_path / "out") == (teacher.wan, teacher.vae)
    with pytest.raises(UserError, match="--config.model.weights"):
        pipeline.load_pipeline_config("")


def test_a_hybrid_with_a_fixed_feature_map_survives_the_round_trip_and_runs(teacher, tmp_path):
    attention = (from_label("linear", feature_map=FeatureMapSpec("elu")), *[AttentionSpec()] * 2)
    maps = surgery.init_maps(jax.random.key(0), teacher.wan, attention[0])
    specs = {"linear": attention[0]}
    hybrid_specs, params = surgery.assemble(teacher.dit, {"linear": maps}, ["linear", "softmax", "softmax"], specs)
    pipeline.save_transformer(tmp_path / "transformer", teacher.wan, hybrid_specs, params)
    wan, read_specs, read = pipeline.load_transformer(tmp_path / "transformer")
    assert read_specs == hybrid_specs == attention
    x = jax.random.normal(jax.random.key(1), (1, 1, 4, 4, wan.in_channels))
    text = jnp.ones((1, 2, wan.text_dim))
    outs = [WanDiT(wan, attention).apply({"params": p}, x, jnp.ones(1), text) for p in (params, read)]
    np.testing.assert_array_equal(*outs)
    assert not np.allclose(outs[0], WanDiT(wan).apply({"params": teacher.dit}, x, jnp.ones(1), text))


def test_one_map_for_queries_and_keys_is_stored_once_and_comes_back(teacher, tmp_path):
    spec = from_label("R2", feature_map=FeatureMapSpec(hidden=5, activation="exp", shared=True))
    attention = (spec, *[AttentionSpec()] * 2)
    maps = surgery.init_maps(jax.random.key(0), teacher.wan, spec)
    hybrid_specs, params = surgery.assemble(teacher.dit, {"R2": maps}, ["R2", "softmax", "softmax"], {"R2": spec})
    pipeline.save_transformer(tmp_path / "transformer", teacher.wan, hybrid_specs, params)
    names = [name for name in Weights(tmp_path / "transformer").shapes if "feature_map" in name]
    assert sorted(names) == [f"blocks.0.feature_map.q.{x}" for x in ("b0", "b1", "w0", "w1")]
    wan, read_specs, read = pipeline.load_transformer(tmp_path / "transformer")
    assert read_specs == attention
    for name, array in params["feature_maps"]["q"].items():
        np.testing.assert_array_equal(read["feature_maps"]["q"][name], array)
    x = jax.random.normal(jax.random.key(1), (1, 1, 4, 4, wan.in_channels))
    text = jnp.ones((1, 2, wan.text_dim))
    outs = [WanDiT(wan, attention).apply({"params": p}, x, jnp.ones(1), text) for p in (params, read)]
    np.testing.assert_array_equal(*outs)


def test_descriptions_without_later_fields_are_read_with_their_defaults(student, tmp_path):
    pipeline.save_pipeline(tmp_path / "out", student, "float32")
    told = json.loads((tmp_path / "out" / "transformer" / FILE).read_text())
    # What a feature map had at first is all that is written while the rest is at its default.
    assert all(set(b["feature_map"]) == {"kind", "degree", "layers"} for b in told["blocks"])
    assert pipeline.load_pipeline(tmp_path / "out").attention == student.attention
