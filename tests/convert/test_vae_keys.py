import json

import jax
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from safetensors.numpy import load_file, save_file

from hybrid_dit.convert import tables
from hybrid_dit.convert.vae_keys import diffusers_rules, wan_rules
from hybrid_dit.errors import UserError
from hybrid_dit.models import vae as vae_lib
from hybrid_dit.models.vae import VAEConfig, WanVAE

torch.set_num_threads(1)

STATS = {"latents_mean": (0.0, 1.0), "latents_std": (1.0, 2.0)}
CONFIGS = {
    "one_block": VAEConfig(base_dim=2, z_dim=2, num_res_blocks=1, **STATS),
    "two_blocks": VAEConfig(base_dim=2, z_dim=2, num_res_blocks=2, **STATS),
    "other": VAEConfig(base_dim=2, z_dim=2, dim_mult=(2, 1, 3), temporal_downsample=(True, False), **STATS),
}


def abstract(config):
    return jax.eval_shape(lambda key: vae_lib.init(config, key), jax.random.key(0))


@pytest.fixture(params=CONFIGS)
def saved(request, tmp_path):
    """A folder that diffusers wrote (all parameters random), and its config."""
    config = CONFIGS[request.param]
    model = AutoencoderKLWan.from_config(config.to_diffusers())
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape) * 0.3)
    model.save_pretrained(tmp_path)
    return tmp_path, config


def test_folder_of_diffusers_loads_and_decodes_alike(saved):
    folder, _ = saved
    config = VAEConfig.from_diffusers(json.loads((folder / "config.json").read_text()))
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    entries = tables.expand(diffusers_rules(config), abstract(config))
    tables.check(entries, {k: v.shape for k, v in weights.items()}, str(folder))  # every key exactly once
    params = tables.import_tree(entries, weights.__getitem__)
    latents = np.random.default_rng(0).normal(size=(1, 2, 1, 2, 2)).astype(np.float32)
    with torch.no_grad():
        theirs = AutoencoderKLWan.from_pretrained(folder).decode(torch.from_numpy(latents).moveaxis(-1, 1)).sample
    ours = jax.jit(vae_lib.decode, static_argnums=0)(WanVAE(config), params, latents)
    theirs = theirs.moveaxis(1, -1).numpy()
    assert np.linalg.norm(ours - theirs) / np.linalg.norm(theirs) < 1e-5  # float32 rounding, see tests/models/test_vae


def test_round_trip_through_diffusers_is_bit_exact(saved, tmp_path):
    folder, config = saved
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    entries = tables.expand(diffusers_rules(config), abstract(config))
    params = tables.import_tree(entries, weights.__getitem__)
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, abstract(config))
    exported = dict(tables.export_tree(entries, params))
    assert exported.keys() == weights.keys()
    out = tmp_path / "exported"
    out.mkdir()
    save_file(exported, out / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config.to_diffusers()))
    state = AutoencoderKLWan.from_pretrained(out).state_dict()
    assert state.keys() == weights.keys()
    for name, tensor in state.items():
        np.testing.assert_array_equal(tensor.numpy(), weights[name])


def test_a_foreign_key_and_a_missing_key_are_errors(saved):
    folder, config = saved
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    weights["decoder.conv_on.bias"] = weights.pop("decoder.conv_in.bias")
    entries = tables.expand(diffusers_rules(config), abstract(config))
    with pytest.raises(UserError, match="missing decoder.conv_in.bias(.|\n)*unexpected decoder.conv_on.bias"):
        tables.check(entries, {k: v.shape for k, v in weights.items()}, str(folder))


def test_wan_layout_equals_what_diffusers_converts():
    """diffusers' converter is the independent reference; it knows the published architecture's numbering only."""
    config = CONFIGS["two_blocks"]
    params = jax.tree.map(lambda a: np.random.default_rng(0).normal(size=a.shape).astype(np.float32), abstract(config))
    wan, diffusers = (
        dict(tables.export_tree(tables.expand(rules(config), params), params)) for rules in (wan_rules, diffusers_rules)
    )
    converted = convert_wan_vae_to_diffusers(wan)
    assert converted.keys() == diffusers.keys()
    for name, tensor in converted.items():
        np.testing.assert_array_equal(tensor, diffusers[name])
