"""All parts of a pipeline in every layout: what is told from shapes, what is converted, what is refused by name."""

import json
import shutil

import diffusers
import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers, convert_wan_vae_to_diffusers
from pipelines import random_like, random_pipeline

from hybrid_dit.convert import commands, sources, tables
from hybrid_dit.convert.files import Weights, write_safetensors
from hybrid_dit.convert.params import Param, ValueCheck, count_nonfinite, to_tree
from hybrid_dit.convert.pipeline import load_pipeline
from hybrid_dit.convert.wan_keys import config_to_wan
from hybrid_dit.errors import UserError
from hybrid_dit.models.umt5 import UMT5Config
from hybrid_dit.models.vae import VAEConfig
from hybrid_dit.models.wan import WanConfig

DIT = WanConfig(dim=128, num_heads=1, ffn_dim=40, num_layers=2, in_channels=4, text_dim=8, freq_dim=16)
TEXT = UMT5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2)
VAES = [
    VAEConfig(base_dim=2, dim_mult=(1, 2, 4, 4), num_res_blocks=2),
    VAEConfig(base_dim=3, dim_mult=(1, 1, 2), num_res_blocks=1, temporal_downsample=(True, False)),
]
CONFIGS = [DIT, TEXT, *VAES]


def random_tree(config, seed=0):
    return random_like(sources.abstract(config), np.random.default_rng(seed))


def tensors(config, layout, tree, dtype=np.float32):
    table = sources.entries(config, (), layout, tree)
    return {name: array.astype(dtype) for name, array in tables.export_tree(table, tree)}


def save_pth(path, named):
    def to_torch(array):
        if array.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(array.view(np.uint16).copy()).view(torch.bfloat16)
        return torch.from_numpy(array.copy())

    torch.save({name: to_torch(array) for name, array in named.items()}, path)


def assert_equal_trees(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("layout, suffix", [("wan", "pth"), ("diffusers", "safetensors")])
@pytest.mark.parametrize("config", CONFIGS, ids=["dit", "text", "vae", "vae3"])
def test_every_part_is_known_by_its_tensors_and_converts_both_ways(tmp_path, config, layout, suffix):
    tree = random_tree(config)
    named = tensors(config, layout, tree, ml_dtypes.bfloat16)
    file = tmp_path / f"weights.{suffix}"
    save_pth(file, named) if suffix == "pth" else write_safetensors(file, named, {})
    told = commands.import_weights(file, tmp_path / "orbax")
    assert "no config.json" in told and layout in told
    part = sources.open_part(tmp_path / "orbax")
    assert part.config == config
    expected = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), tree)
    assert_equal_trees(to_tree(part.params), expected)
    for target in sources.LAYOUTS:
        commands.export_weights(tmp_path / "orbax", tmp_path / target, target)
        weights = Weights(tmp_path / target)
        read = {name: weights.read(name) for name in weights.shapes}
        wanted = tensors(config, target, tree, ml_dtypes.bfloat16)
        assert {n: (a.shape, a.tobytes()) for n, a in read.items()} == {
            n: (a.shape, a.tobytes()) for n, a in wanted.items()
        }
        assert sources.open_part(tmp_path / target).config == config  # now from its config.json
    assert "complete " + sources.TITLES[part.kind] in commands.inspect_weights(tmp_path / "orbax")


def test_conversion_to_diffusers_equals_diffusers_own(tmp_path):
    for config, convert in (
        (DIT, convert_wan_transformer_to_diffusers),
        (VAES[0], convert_wan_vae_to_diffusers),
    ):
        tree = random_tree(config)
        write_safetensors(tmp_path / "wan.safetensors", tensors(config, "wan", tree), {})
        commands.import_weights(tmp_path / "wan.safetensors", tmp_path / "orbax")
        commands.export_weights(tmp_path / "orbax", tmp_path / "out", "diffusers")
        theirs = convert({name: torch.from_numpy(a) for name, a in tensors(config, "wan", tree).items()})
        weights = Weights(tmp_path / "out")
        assert weights.shapes.keys() == theirs.keys()
        for name, tensor in theirs.items():
            np.testing.assert_array_equal(weights.read(name), tensor.numpy(), err_msg=name)
        shutil.rmtree(tmp_path / "orbax")
        shutil.rmtree(tmp_path / "out")


@pytest.fixture(scope="module")
def original_release(tmp_path_factory):
    """A pipeline (16 latent channels, as published) and the same weights as the original release has them."""
    root = tmp_path_factory.mktemp("release")
    small = random_pipeline(root / "small")
    vae = VAEConfig(base_dim=2, num_res_blocks=1, dim_mult=(1, 1, 1, 1))
    text = UMT5Config(**{**TEXT.__dict__, "vocab_size": small.text.vocab_size})
    dit = WanConfig(dim=128, num_heads=1, ffn_dim=40, num_layers=2, text_dim=8, freq_dim=16)
    folder = root / "Wan2.1-T2V"
    (folder / "google").mkdir(parents=True)
    named = list(tensors(dit, "wan", random_tree(dit, 1), ml_dtypes.bfloat16).items())
    shards = [dict(named[:9]), dict(named[9:])]
    files = [f"diffusion_pytorch_model-{i + 1:05d}-of-00002.safetensors" for i in range(2)]
    for file, shard in zip(files, shards):
        write_safetensors(folder / file, shard, {})
    index = {"metadata": {}, "weight_map": {name: file for file, shard in zip(files, shards) for name in shard}}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    save_pth(folder / "models_t5_umt5-xxl-enc-bf16.pth", tensors(text, "wan", random_tree(text, 2), ml_dtypes.bfloat16))
    save_pth(folder / "Wan2.1_VAE.pth", tensors(vae, "wan", random_tree(vae, 3)))
    shutil.copytree(root / "small" / "tokenizer", folder / "google" / "umt5-xxl")
    return folder


def test_the_original_release_converts_in_one_command(original_release, tmp_path):
    read = load_pipeline(original_release)  # jobs take it as it is
    told = commands.import_weights(original_release, tmp_path / "orbax")
    assert "timestep shift 3" in told and "UMT5 encoder, wan, bfloat16" in told and "Wan VAE, wan, float32" in told
    told = commands.export_weights(tmp_path / "orbax", tmp_path / "diffusers", "diffusers")
    for folder in ("orbax", "diffusers"):
        again = load_pipeline(tmp_path / folder)
        assert (again.wan, again.text, again.vae, again.shift) == (read.wan, read.text, read.vae, 3.0)
        for part in ("dit", "text_params", "vae_params"):
            assert_equal_trees(getattr(read, part), getattr(again, part))
    theirs = diffusers.WanPipeline.from_pretrained(tmp_path / "diffusers", dtype=torch.float32)
    kernel = read.text_params["blocks"]["ffn"]["up"]["kernel"][1].T
    found = theirs.text_encoder.state_dict()["encoder.block.1.layer.1.DenseReluDense.wi_1.weight"]
    np.testing.assert_array_equal(found.float().numpy(), kernel)
    assert "Wan VAE" in commands.inspect_weights(original_release)


def test_the_original_layout_of_a_pipeline_is_its_dit(original_release, tmp_path):
    told = commands.export_weights(original_release, tmp_path / "out", "wan")
    assert "the DiT alone" in told
    there, here = Weights(original_release), Weights(tmp_path / "out")
    assert there.shapes == here.shapes
    assert all(there.read(name).tobytes() == here.read(name).tobytes() for name in there.shapes)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda f: (f / "Wan2.1_VAE.pth").unlink(), r"needs one file \*VAE\*.*there is none"),
        (lambda f: shutil.rmtree(f / "google"), "tokenizer.json is missing"),
        (lambda f: shutil.copy(f / "Wan2.1_VAE.pth", f / "my_VAE.pth"), "there is Wan2.1_VAE.pth and my_VAE.pth"),
        (lambda f: shutil.copy(f / "Wan2.1_VAE.pth", f / "models_t5_x.pth"), "needs one file models_t5_"),
        (
            lambda f: shutil.copy(f / "Wan2.1_VAE.pth", f / "models_t5_umt5-xxl-enc-bf16.pth"),
            "holds a Wan VAE, expected a UMT5 encoder",
        ),
    ],
)
def test_an_incomplete_release_is_refused(original_release, tmp_path, change, message):
    shutil.copytree(original_release, tmp_path / "in")
    change(tmp_path / "in")
    with pytest.raises(UserError, match=message):
        commands.import_weights(tmp_path / "in", tmp_path / "out")
    assert [f.name for f in tmp_path.iterdir()] == ["in"]


def test_a_missing_embedding_is_an_error_not_zeros(tmp_path):
    named = tensors(TEXT, "diffusers", random_tree(TEXT))
    without = {name: array for name, array in named.items() if name != "shared.weight"}
    write_safetensors(tmp_path / "without.safetensors", without, {})
    with pytest.raises(UserError, match="lacks encoder.embed_tokens.weight"):
        commands.import_weights(tmp_path / "without.safetensors", tmp_path / "out")
    named["shared.weight"] = np.zeros_like(named["shared.weight"])
    write_safetensors(tmp_path / "zero.safetensors", named, {})
    for allow in (False, True):
        with pytest.raises(UserError, match="shared.weight is all zeros"):
            commands.import_weights(tmp_path / "zero.safetensors", tmp_path / "out", allow_nonfinite=allow)
    named["shared.weight"][-1, -1] = 1e-30
    write_safetensors(tmp_path / "tiny.safetensors", named, {})
    commands.import_weights(tmp_path / "tiny.safetensors", tmp_path / "out")


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_nan_and_inf_are_refused_with_key_and_count(tmp_path, dtype):
    named = tensors(DIT, "wan", random_tree(DIT), dtype)
    named["blocks.1.ffn.0.weight"][3, 4:7] = [np.nan, np.inf, -np.inf]
    named["head.head.bias"][0] = np.nan
    write_safetensors(tmp_path / "in.safetensors", named, {})
    with pytest.raises(UserError) as error:
        commands.import_weights(tmp_path / "in.safetensors", tmp_path / "orbax")
    assert "blocks.1.ffn.0.weight has 3 values" in str(error.value)
    assert "head.head.bias has 1 values" in str(error.value) and "--allow-nonfinite" in str(error.value)
    assert [f.name for f in tmp_path.iterdir()] == ["in.safetensors"]
    told = commands.import_weights(tmp_path / "in.safetensors", tmp_path / "orbax", allow_nonfinite=True)
    assert "Wan DiT" in told
    with pytest.raises(UserError, match="blocks.1.ffn.0.weight has 3 values"):
        commands.export_weights(tmp_path / "orbax", tmp_path / "out", "wan")
    commands.export_weights(tmp_path / "orbax", tmp_path / "out", "wan", allow_nonfinite=True)
    found = Weights(tmp_path / "out").read("blocks.1.ffn.0.weight")
    assert found.tobytes() == named["blocks.1.ffn.0.weight"].tobytes()


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
def test_counting_on_bits_equals_isfinite(dtype):
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**16, 4096, dtype=np.uint16)
    values = np.frombuffer(rng.bytes(8 * 999), dtype) if np.dtype(dtype).itemsize > 2 else bits.view(dtype)
    with np.errstate(all="ignore"):
        assert count_nonfinite(values) == (~np.isfinite(values.astype(np.float64))).sum()
    assert count_nonfinite(np.zeros(0, dtype)) == count_nonfinite(np.ones(3, np.int32)) == 0


def test_what_is_wrong_is_told_together_and_cut_at_ten():
    check = ValueCheck("file")
    for i in range(12):
        check.look(f"blocks.{i}.ffn.0.weight", np.float32([np.nan]))
    with pytest.raises(UserError, match="and 2 more"):
        check.finish()


def test_names_shapes_and_dtypes_that_are_wrong_come_in_one_message(tmp_path):
    named = tensors(DIT, "wan", random_tree(DIT))
    named["blocks.0.ffn.0.bias"] = named["blocks.0.ffn.0.bias"][:-1]
    named["blocks.0.ffn.2.weights"] = named.pop("blocks.0.ffn.2.weight")
    named["head.head.bias"] = named["head.head.bias"].astype(np.int32)
    write_safetensors(tmp_path / "in.safetensors", named, {})
    with pytest.raises(UserError) as error:
        sources.open_part(tmp_path / "in.safetensors")
    text = str(error.value)
    assert "blocks.0.ffn.0.bias has shape [39], expected [40]" in text and "missing blocks.0.ffn.2.weight" in text
    assert "head.head.bias is stored as I32" in text and "(4 problems)" in text
    assert "unexpected blocks.0.ffn.2.weights (nearest expected name: blocks.0.ffn.2.weight)" in text


def test_a_lost_chunk_of_an_orbax_folder_is_an_error_not_zeros(tmp_path):
    write_safetensors(tmp_path / "in.safetensors", tensors(DIT, "wan", random_tree(DIT)), {})
    commands.import_weights(tmp_path / "in.safetensors", tmp_path / "orbax")
    kernels = tmp_path / "orbax" / "params" / "blocks.ffn_0.kernel"
    next(file for file in kernels.iterdir() if file.name != ".zarray").unlink()
    part = sources.open_part(tmp_path / "orbax")
    with pytest.raises(UserError, match="blocks/ffn_0/kernel can't be read"):
        to_tree(part.params)
    with pytest.raises(UserError, match="blocks/ffn_0/kernel can't be read"):
        commands.export_weights(tmp_path / "orbax", tmp_path / "out", "wan")
    assert not (tmp_path / "out").exists()


def test_a_config_of_a_million_blocks_is_refused_at_once(tmp_path):
    (tmp_path / "in").mkdir()
    write_safetensors(tmp_path / "in" / "model.safetensors", tensors(DIT, "wan", random_tree(DIT)), {})
    content = config_to_wan(DIT) | {"num_layers": 10**6}
    (tmp_path / "in" / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="too few for the 1000000 blocks"):
        sources.open_part(tmp_path / "in")


def test_pieces_tile_every_parameter():
    for shape in [(), (0,), (7,), (3, 5), (300, 2**18), (2, 3, 1, 4)]:
        param = Param(shape, np.dtype(np.float32), lambda index: np.zeros(0))
        seen = np.zeros(shape, np.int8)
        for index in param.pieces():
            seen[index] += 1
        assert (seen == 1).all()
