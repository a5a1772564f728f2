"""`patch_wan`: the original code's model computes what the Flax model computes, padding and mixed sizes included."""

import math

import pytest
import torch
from hybrids import (
    CONFIG,
    channels_first,
    every_kind,
    random_hybrid,
    random_inputs,
    relative_error,
    velocity_of_jax,
    write_original_layout,
)
from wan_stand_in import WanStandIn

from hybrid_dit.errors import UserError
from hybrid_dit.ops.spec import FeatureMapSpec, from_label
from hybrid_dit.torch import load_hybrid, patch_wan


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original")
    specs, params = random_hybrid(folder / "diffusers")
    write_original_layout(folder / "wan", specs, params)
    return folder / "wan", specs, params


def run(model, latents, timesteps, text, seq_len):
    with torch.no_grad():
        videos = model(list(channels_first(latents)), torch.tensor(timesteps), list(torch.tensor(text)), seq_len)
    return [x.movedim(0, -1).numpy() for x in videos]


def test_equals_the_flax_model_with_and_without_padding(export):
    folder, specs, params = export
    model = patch_wan(WanStandIn(CONFIG), folder)
    latents, timesteps, text = random_inputs()
    want = velocity_of_jax(specs, params, latents, timesteps, text)
    for seq_len in (45, 52):
        got = run(model, latents, timesteps, text, seq_len)
        assert all(relative_error(g, w) <= 1e-5 for g, w in zip(got, want))


def test_videos_of_different_sizes_in_one_batch(export):
    """Each is what it is alone (which the test above holds against Flax)."""
    model = patch_wan(WanStandIn(CONFIG), export[0])
    sizes = [(3, 5, 3), (2, 3, 5)]
    inputs = [random_inputs(1, grid) for grid in sizes]
    videos = [channels_first(latents)[0] for latents, _, _ in inputs]
    text = [torch.tensor(t[0]) for _, _, t in inputs]
    with torch.no_grad():
        got = model(videos, torch.tensor([100.0, 100.0]), text, 45)
    for out, one in zip(got, inputs):
        alone = run(model, *one, seq_len=math.prod(out.shape[1:]) // 4)
        assert relative_error(out.movedim(0, -1), alone[0]) <= 1e-5


def test_every_token_in_s_is_the_softmax_model(tmp_path):
    """At R = 1 no token is left to the linear part: patched and unpatched model are the same function."""
    specs, params = random_hybrid(tmp_path / "diffusers", (from_label("R1"),) * CONFIG.num_layers)
    write_original_layout(tmp_path / "wan", specs, params)
    model = patch_wan(WanStandIn(CONFIG), tmp_path / "wan")
    inputs = random_inputs()
    patched = run(model, *inputs, 50)
    for block in model.blocks:
        del block.self_attn.forward
    for got, want in zip(patched, run(model, *inputs, 50)):
        assert relative_error(got, want) <= 1e-5


def test_a_shared_map_of_other_sizes_is_that_of_load_hybrid(tmp_path):
    """Which is held against Flax."""
    maps = FeatureMapSpec(hidden=10, activation="square", shared=True)
    specs, params = random_hybrid(tmp_path / "diffusers", every_kind(maps))
    write_original_layout(tmp_path / "wan", specs, params)
    model = patch_wan(WanStandIn(CONFIG), tmp_path / "wan")
    assert not [name for name in model.state_dict() if "feature_map.k" in name]
    latents, timesteps, text = random_inputs()
    with torch.no_grad():
        args = channels_first(latents), torch.tensor(timesteps), torch.tensor(text)
        want = load_hybrid(tmp_path / "diffusers")(*args).sample.movedim(1, -1)
    for got, expected in zip(run(model, latents, timesteps, text, 45), want):
        assert relative_error(got, expected) <= 1e-5


def test_keeps_the_model_s_dtype_and_names(export):
    model = patch_wan(WanStandIn(CONFIG).bfloat16(), export[0])
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert "blocks.1.feature_map.q.w0" in model.state_dict() and "blocks.0.feature_map.q.w0" not in model.state_dict()


def test_a_folder_that_does_not_fit_leaves_the_model_alone(export, tmp_path):
    model = WanStandIn(CONFIG)
    names = model.state_dict().keys()
    random_hybrid(tmp_path / "diffusers")
    with pytest.raises(UserError, match="files are in diffusers' layout.*missing blocks.0.cross_attn.k.bias.* more"):
        patch_wan(model, tmp_path / "diffusers")
    assert model.state_dict().keys() == names
    model.blocks[1].self_attn.window_size = (8, 8)
    with pytest.raises(UserError, match="windowed attention"):
        patch_wan(model, export[0])
    assert model.state_dict().keys() == names
    del model.blocks[3]
    with pytest.raises(UserError, match="describes 4 blocks, but the model has 3"):
        patch_wan(model, export[0])
