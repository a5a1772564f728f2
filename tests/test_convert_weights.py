"""convert_weights.py: bit-exact round trips in every direction, what it infers, and what it refuses."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from pipelines import random_like

from hybrid_dit.convert import commands, hybrid, orbax_folder, pipeline, sources, tables, wan_keys
from hybrid_dit.convert.abstract import abstract_dit
from hybrid_dit.convert.files import Weights, write_safetensors
from hybrid_dit.convert.params import to_tree
from hybrid_dit.errors import UserError
from hybrid_dit.models.wan import WanConfig
from hybrid_dit.ops.spec import AttentionSpec, FeatureMapSpec

ROOT = Path(__file__).parents[1]
TEACHER = ()
PHI = FeatureMapSpec("poly", 2, 1)
STUDENT = (AttentionSpec("hybrid", 2, feature_map=PHI), AttentionSpec(), AttentionSpec("linear", feature_map=PHI))
SMALL = WanConfig(dim=24, num_heads=2, ffn_dim=40, num_layers=3, in_channels=4, text_dim=8, freq_dim=16, eps=1e-5)
PUBLISHED = WanConfig(dim=128, num_heads=1, ffn_dim=40, num_layers=3, in_channels=4, text_dim=8, freq_dim=16)


def parameters(config, attention, dtype=np.float32):
    params = random_like(abstract_dit(config, attention), np.random.default_rng(0))
    for array in tables.flatten(params.get("feature_maps", {})).values():
        array[1] = 0  # block 1 keeps softmax
    return jax.tree.map(lambda x: x.astype(dtype).astype(np.float32), params)


def tensors(config, attention, layout, params, dtype=np.float32):
    entries = hybrid.stored_entries(config, attention, layout, params)
    return {name: array.astype(dtype) for name, array in tables.export_tree(entries, params)}


def load_orbax(folder):
    """With Orbax's own reader, which must agree with ours."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        theirs = jax.tree.map(np.asarray, checkpointer.restore((folder / "params").resolve()))
    ours = to_tree(orbax_folder.open_params(folder))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert jax.tree.map(lambda x: x.dtype, ours) == jax.tree.map(lambda x: x.dtype, theirs)
    return ours


def stored(folder):
    """Every tensor of a file or folder as (dtype, shape, bytes)."""
    weights = Weights(folder)
    read = {name: weights.read(name) for name in weights.shapes}
    return {name: (str(array.dtype), array.shape, array.tobytes()) for name, array in read.items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("attention", [TEACHER, STUDENT], ids=["teacher", "hybrid"])
def test_every_direction_is_exact(tmp_path, attention, dtype):
    params = parameters(SMALL, attention, pipeline.DTYPES[dtype])
    pipeline.save_transformer(tmp_path / "diffusers", SMALL, attention, params, dtype)
    commands.export_weights(tmp_path / "diffusers", tmp_path / "wan", "wan")
    expected = tensors(SMALL, attention, "wan", params, pipeline.DTYPES[dtype])
    assert stored(tmp_path / "wan") == {n: (str(a.dtype), a.shape, a.tobytes()) for n, a in expected.items()}
    for layout in ("diffusers", "wan"):
        commands.import_weights(tmp_path / layout, tmp_path / f"orbax_{layout}")
        loaded = load_orbax(tmp_path / f"orbax_{layout}")
        assert jax.tree.structure(loaded) == jax.tree.structure(params)
        for path, array in tables.flatten(loaded).items():
            assert str(array.dtype) == dtype
            np.testing.assert_array_equal(array.astype(np.float32), tables.flatten(params)[path])
        for target in ("diffusers", "wan"):
            out = tmp_path / f"{layout}_to_{target}"
            commands.export_weights(tmp_path / f"orbax_{layout}", out, target)
            assert stored(out) == stored(tmp_path / target)
            again = sources.open_part(out)
            assert (again.config, again.attention, again.layout) == (SMALL, attention, target)


def test_dtype_of_the_import_can_be_chosen(tmp_path):
    params = parameters(SMALL, STUDENT)
    pipeline.save_transformer(tmp_path / "in", SMALL, STUDENT, params)
    commands.import_weights(tmp_path / "in", tmp_path / "orbax", "bfloat16")
    loaded = tables.flatten(load_orbax(tmp_path / "orbax"))
    for path, array in tables.flatten(params).items():
        assert loaded[path].dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(loaded[path], array.astype(ml_dtypes.bfloat16))


def test_mixed_dtypes_are_kept(tmp_path):
    """Per parameter; a stack whose blocks differ becomes float32, which holds all of them exactly."""
    params = parameters(SMALL, TEACHER, ml_dtypes.bfloat16)
    mixed = tensors(SMALL, TEACHER, "wan", params, ml_dtypes.bfloat16)
    precise = mixed["blocks.2.norm3.weight"] = np.float32([1 + 2**-20] * SMALL.dim)
    mixed["head.head.bias"] = mixed["head.head.bias"].astype(np.float32) + np.float32(2**-20)
    (tmp_path / "in").mkdir()
    write_safetensors(tmp_path / "in" / "model.safetensors", mixed, {})
    (tmp_path / "in" / "config.json").write_text(json.dumps(wan_keys.config_to_wan(SMALL)))
    told = commands.import_weights(tmp_path / "in", tmp_path / "orbax")
    assert "bfloat16 x" in told and "float32 x 2" in told
    loaded = load_orbax(tmp_path / "orbax")
    np.testing.assert_array_equal(loaded["blocks"]["norm3"]["scale"][2], precise)
    expected = mixed["blocks.1.norm3.weight"].astype(np.float32)
    np.testing.assert_array_equal(loaded["blocks"]["norm3"]["scale"][1], expected)
    commands.export_weights(tmp_path / "orbax", tmp_path / "out", "wan")
    widened = {f"blocks.{i}.norm3.weight" for i in range(3)}
    before, after = stored(tmp_path / "in"), stored(tmp_path / "out")
    assert {n: t for n, t in before.items() if n not in widened} == {n: t for n, t in after.items() if n not in widened}


@pytest.mark.parametrize("layout", wan_keys.LAYOUTS)
@pytest.mark.parametrize("prefix", ["", sources.PREFIX], ids=["plain", "comfyui"])
def test_single_files_without_config_are_understood(tmp_path, layout, prefix):
    params = parameters(PUBLISHED, TEACHER)
    named = {prefix + name: a for name, a in tensors(PUBLISHED, TEACHER, layout, params).items()}
    if prefix:
        named["first_stage_model.decoder.conv1.weight"] = np.zeros(3, np.float32)  # other parts lie beside the DiT
    write_safetensors(tmp_path / "model.safetensors", named, {})
    told = commands.import_weights(tmp_path / "model.safetensors", tmp_path / "orbax")
    assert "no config.json; sizes are from the shapes, 1 heads = 128 / 128" in told
    assert sources.open_part(tmp_path / "orbax").config == PUBLISHED
    loaded = tables.flatten(load_orbax(tmp_path / "orbax"))
    for path, array in tables.flatten(params).items():
        np.testing.assert_array_equal(loaded[path], array)


def test_shards_are_read_as_one(tmp_path):
    params = parameters(PUBLISHED, TEACHER)
    named = list(tensors(PUBLISHED, TEACHER, "wan", params).items())
    (tmp_path / "in").mkdir()
    for i in range(3):
        write_safetensors(tmp_path / "in" / f"model-{i + 1:05d}-of-00003.safetensors", dict(named[i::3]), {})
    commands.export_weights(tmp_path / "in", tmp_path / "out", "wan")
    assert stored(tmp_path / "out") == stored(tmp_path / "in")
    (tmp_path / "in" / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match="missing|lacks"):
        commands.export_weights(tmp_path / "in", tmp_path / "other", "wan")
    assert not (tmp_path / "other").exists()


def test_pipelines_and_workdirs_hold_a_dit(tmp_path):
    params = parameters(SMALL, STUDENT)
    pipeline.save_transformer(tmp_path / "pipeline" / "transformer", SMALL, STUDENT, params)
    pipeline.save_transformer(tmp_path / "run" / "finetune" / "transformer", SMALL, STUDENT, params)
    for source in ("pipeline", "run"):
        commands.export_weights(tmp_path / source, tmp_path / f"{source}_out", "diffusers")
        assert stored(tmp_path / f"{source}_out") == stored(tmp_path / "pipeline" / "transformer")
        description = (tmp_path / f"{source}_out" / hybrid.FILE).read_text()
        assert description == (tmp_path / "pipeline" / "transformer" / hybrid.FILE).read_text()


def test_inspect_tells_layout_sizes_and_every_tensor(tmp_path):
    params = parameters(SMALL, STUDENT)
    pipeline.save_transformer(tmp_path / "hybrid", SMALL, STUDENT, params, "bfloat16")
    text = commands.inspect_weights(tmp_path / "hybrid")
    count = sum(int(np.prod(shape)) for shape in Weights(tmp_path / "hybrid").shapes.values())
    assert f"{count:,} parameters" in text and f"{2 * count / 1e9:.3g} GB" in text
    assert "layout: diffusers" in text and "attention: R2 softmax linear" in text
    assert "3 blocks, width 24 = 2 heads x 12" in text
    assert "  bfloat16  [40, 24]                 blocks.{0..2}.ffn.net.0.proj.weight" in text.splitlines()
    assert "blocks.0,2.feature_map.q.w0" in text and "proj_out.bias" in text
    commands.import_weights(tmp_path / "hybrid", tmp_path / "orbax")
    text = commands.inspect_weights(tmp_path / "orbax")
    assert "layout: orbax" in text and "[3, 24, 40]" in text and "attention: R2 softmax linear" in text


def test_inspect_describes_broken_and_foreign_files_too(tmp_path):
    named = tensors(PUBLISHED, TEACHER, "wan", parameters(PUBLISHED, TEACHER))
    del named["head.head.bias"]
    write_safetensors(tmp_path / "model.safetensors", named, {})
    text = commands.inspect_weights(tmp_path / "model.safetensors")
    assert "layout: wan" in text and "missing head.head.bias" in text and "patch_embedding.weight" in text
    write_safetensors(tmp_path / "vae.safetensors", {"conv1.weight": np.zeros((2, 3), np.float32)}, {})
    assert "layout: no part of a Wan model" in commands.inspect_weights(tmp_path / "vae.safetensors")


def refusals(tmp_path):
    """(source, message) of what can't be converted."""
    named = tensors(SMALL, TEACHER, "wan", parameters(SMALL, TEACHER))
    write_safetensors(tmp_path / "narrow.safetensors", named, {})
    write_safetensors(tmp_path / "other.safetensors", {"a": np.zeros(2, np.float32)}, {})
    named = tensors(PUBLISHED, TEACHER, "wan", parameters(PUBLISHED, TEACHER))
    write_safetensors(tmp_path / "double.safetensors", {n: a.astype(np.float64) for n, a in named.items()}, {})
    three = np.zeros(3, np.float32)
    write_safetensors(tmp_path / "shape.safetensors", named | {"blocks.1.ffn.0.bias": three}, {})
    write_safetensors(tmp_path / "extra.safetensors", named | {"img_emb.proj.0.weight": three}, {})
    student = tensors(PUBLISHED, STUDENT, "wan", parameters(PUBLISHED, STUDENT))
    write_safetensors(tmp_path / "undescribed.safetensors", student, {})
    content = (tmp_path / "shape.safetensors").read_bytes()
    (tmp_path / "short.safetensors").write_bytes(content[: len(content) // 2])
    (tmp_path / "empty").mkdir()
    return {
        "nowhere": "nowhere does not exist",
        "empty": "no weights at",
        "narrow.safetensors": "its width 24 is no multiple of 128",
        "other.safetensors": "holds no Wan DiT, UMT5 encoder or Wan VAE",
        "double.safetensors": "is stored as F64; supported are F32, BF16, F16",
        "shape.safetensors": "blocks.1.ffn.0.bias has shape [3], expected [40]",
        "extra.safetensors": "unexpected img_emb.proj.0.weight",
        "undescribed.safetensors": "but no hybrid_config.json",
        "short.safetensors": "truncated or not a safetensors file",
    }


def test_what_can_not_be_converted_is_told_and_nothing_written(tmp_path):
    for source, message in refusals(tmp_path).items():
        for convert in (commands.import_weights, lambda s, t: commands.export_weights(s, t, "wan")):
            with pytest.raises(UserError) as error:
                convert(tmp_path / source, tmp_path / "out")
            assert message in str(error.value), source
            assert not (tmp_path / "out").exists()


def test_an_existing_target_is_left_alone(tmp_path):
    pipeline.save_transformer(tmp_path / "in", SMALL, TEACHER, parameters(SMALL, TEACHER))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    for convert in (commands.import_weights, lambda s, t: commands.export_weights(s, t, "diffusers")):
        with pytest.raises(UserError, match="mine exists; remove it"):
            convert(tmp_path / "in", tmp_path / "mine")
    assert (tmp_path / "mine" / "file").exists()


def test_a_broken_orbax_folder_is_refused(tmp_path):
    pipeline.save_transformer(tmp_path / "in", SMALL, TEACHER, parameters(SMALL, TEACHER))
    commands.import_weights(tmp_path / "in", tmp_path / "orbax")
    config = tmp_path / "orbax" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"ffn_dim": 48}))
    with pytest.raises(UserError, match=r"blocks/ffn_0/bias: found \(3, 40\), expected \(3, 48\)"):
        commands.export_weights(tmp_path / "orbax", tmp_path / "out", "wan")
    shutil.rmtree(tmp_path / "orbax" / "params")
    (tmp_path / "orbax" / "params").mkdir()
    with pytest.raises(UserError, match="params is not a readable Orbax checkpoint"):
        commands.inspect_weights(tmp_path / "orbax")


@pytest.fixture
def cli():
    spec = importlib.util.spec_from_file_location("convert_weights", ROOT / "convert_weights.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_command_line(cli, tmp_path, capsys):
    pipeline.save_transformer(tmp_path / "in", SMALL, TEACHER, parameters(SMALL, TEACHER))
    assert cli(["import", str(tmp_path / "in"), str(tmp_path / "orbax"), "--dtype=bfloat16"]) == 0
    assert cli(["export", str(tmp_path / "orbax"), str(tmp_path / "wan"), "--format=wan"]) == 0
    assert cli(["inspect", str(tmp_path / "wan")]) == 0
    assert "layout: wan" in capsys.readouterr().out
    assert cli(["inspect", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'none'} does not exist\n"
    for wrong in (["export", "a", "b"], ["import", "a", "b", "--dtype=int8"], ["convert"], []):
        with pytest.raises(SystemExit) as error:
            cli(wrong)
        assert error.value.code == 2


def test_as_a_program(tmp_path):
    command = [sys.executable, ROOT / "convert_weights.py", "inspect", str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr
