"""Parity with diffusers' AutoencoderKLWan, streaming, and the config.

Errors are relative, ||a - b|| / ||b||. Both sides compute in float32 (eps 6e-8) and differ only in the order of sums;
some 30 layers of sums over up to 27 * 16 products leave about 1e-6. A frame or channel in the wrong place gives 1e-2.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan

from hybrid_dit.convert import tables
from hybrid_dit.convert.vae_keys import diffusers_rules
from hybrid_dit.errors import UserError
from hybrid_dit.models import vae as vae_lib
from hybrid_dit.models.vae import VAEConfig, WanVAE

torch.set_num_threads(1)

TOLERANCE = 1e-5
encode, decode, encode_chunked, decode_chunked = (
    jax.jit(f, static_argnums=(0, 3) if "chunked" in f.__name__ else 0)  # op by op, compilation takes 10 times as long
    for f in (vae_lib.encode, vae_lib.decode, vae_lib.encode_chunked, vae_lib.decode_chunked)
)
STATS = {"latents_mean": (0.5, -1.0, 0.25, 2.0), "latents_std": (2.0, 0.5, 1.5, 3.0)}
SMALL = VAEConfig(base_dim=4, z_dim=4, num_res_blocks=1, **STATS)
QUICK = dataclasses.replace(SMALL, dim_mult=(1, 2, 2), temporal_downsample=(True, True))  # to compile
CONFIGS = {
    "published": SMALL,  # space, then space and time twice
    "two_blocks": dataclasses.replace(SMALL, num_res_blocks=2, dim_mult=(1, 3, 2), temporal_downsample=(True, True)),
    "time_once": dataclasses.replace(SMALL, dim_mult=(2, 1, 4), temporal_downsample=(False, True)),
    "space_only": dataclasses.replace(SMALL, dim_mult=(1, 2), temporal_downsample=(False,)),
}


def random_pair(config: VAEConfig):
    """A diffusers VAE, all of whose parameters are random, and our parameters imported from it."""
    torch.manual_seed(0)
    model = AutoencoderKLWan.from_config(config.to_diffusers()).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("gamma"):
                p.copy_(1 + 0.3 * torch.randn(p.shape))
            elif name.endswith("bias"):
                p.copy_(0.3 * torch.randn(p.shape))
            else:
                p.copy_(torch.randn(p.shape) / p[0].numel() ** 0.5)
        model.decoder.conv_out.weight.mul_(1.5)  # so that the clamp to [-1, 1] acts on some pixels, not on most
    entries = tables.expand(diffusers_rules(config), abstract(config))
    state = model.state_dict()
    return model, tables.import_tree(entries, lambda name: state[name].numpy())


def abstract(config):
    return jax.eval_shape(lambda key: vae_lib.init(config, key), jax.random.key(0))


def random_video(config, frames, rows=2, columns=3, batch=2):
    shape = (batch, frames, rows * config.spatial_stride, columns * config.spatial_stride, 3)
    return np.random.default_rng(1).uniform(-1, 1, shape).astype(np.float32)


def random_latents(config, frames, rows=2, columns=3, batch=2):
    return np.random.default_rng(2).normal(size=(batch, frames, rows, columns, config.z_dim)).astype(np.float32)


def to_torch(x):
    return torch.from_numpy(np.moveaxis(x, -1, 1).copy())


def from_torch(x):
    return np.moveaxis(x.detach().numpy(), 1, -1)


def relative(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.parametrize(("name", "latent_frames"), [("published", 1), *((name, 4) for name in CONFIGS)])
def test_equals_diffusers(name, latent_frames):
    config = CONFIGS[name]
    model, params = random_pair(config)
    # diffusers encodes 1 frame and then 4 at a time, whatever the temporal stride, and drops what is left over
    video = random_video(config, 1 + 4 * (latent_frames - 1))
    latents = random_latents(config, latent_frames)
    with torch.no_grad():
        posterior = model.encode(to_torch(video)).latent_dist
        decoded = from_torch(model.decode(to_torch(latents)).sample)
    vae = WanVAE(config)
    mean, logvar = encode(vae, params, video)
    assert mean.shape[1] == 1 + (video.shape[1] - 1) // config.temporal_stride
    assert relative(mean, from_torch(posterior.mean)) < TOLERANCE
    assert relative(logvar, from_torch(posterior.logvar)) < TOLERANCE
    ours = decode(vae, params, latents)
    assert ours.shape[1] == 1 + (latent_frames - 1) * config.temporal_stride
    assert relative(ours, decoded) < TOLERANCE


def test_clipping_can_be_switched_off():
    _, params = random_pair(QUICK)
    latents = random_latents(QUICK, 3)
    vae = WanVAE(QUICK)
    unclipped = jax.jit(lambda p, z: vae.apply({"params": p}, z, clip=False, method="decode"))(params, latents)
    assert 0.01 < np.mean(np.abs(unclipped) > 1) < 0.75
    np.testing.assert_array_equal(np.clip(unclipped, -1, 1), decode(vae, params, latents))


def test_gradient_equals_diffusers():
    config = QUICK
    model, params = random_pair(config)
    video = random_video(config, 5, rows=1, columns=2, batch=1)
    weights = np.random.default_rng(3).normal(size=video.shape).astype(np.float32)
    (model(to_torch(video)).sample * to_torch(weights)).sum().backward()

    def loss(params):
        return jnp.sum(WanVAE(config).apply({"params": params}, video) * weights)

    ours = dict(tables.export_tree(tables.expand(diffusers_rules(config), params), jax.jit(jax.grad(loss))(params)))
    # The gradient sums over the whole video and passes all layers twice: a tenfold tolerance for the same rounding.
    for name, p in model.named_parameters():
        assert relative(ours[name], p.grad.numpy()) < 10 * TOLERANCE, name


@pytest.mark.parametrize("chunk", [1, 2])
def test_chunked_equals_whole(chunk):
    vae = WanVAE(QUICK)
    _, params = random_pair(QUICK)
    video, latents = random_video(QUICK, 21), random_latents(QUICK, 6)  # uneven for chunks of 2
    for a, b in zip(encode_chunked(vae, params, video, chunk), encode(vae, params, video)):
        assert relative(a, b) < TOLERANCE
    whole = decode(vae, params, latents)
    assert relative(decode_chunked(vae, params, latents, chunk), whole) < TOLERANCE


def test_pieces_of_any_length_continue_each_other():
    vae = WanVAE(QUICK)
    _, params = random_pair(QUICK)
    latents = random_latents(QUICK, 6)
    step = jax.jit(vae_lib.decode_chunk, static_argnums=0)
    cache, pieces = None, []
    for piece in np.split(latents, [1, 2, 4], axis=1):
        frames, cache = step(vae, params, piece, cache)
        pieces.append(frames)
    assert [p.shape[1] for p in pieces] == [1, 4, 8, 8]
    assert relative(np.concatenate(pieces, axis=1), decode(vae, params, latents)) < TOLERANCE


@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_memory_of_a_chunk_does_not_grow_with_the_video(direction):
    vae = WanVAE(QUICK)
    params = abstract(QUICK)

    def temp(function, latent_frames):
        if direction == "encode":
            x = jax.ShapeDtypeStruct((1, 4 * latent_frames - 3, 32, 32, 3), jnp.float32)
        else:
            x = jax.ShapeDtypeStruct((1, latent_frames, 4, 4, QUICK.z_dim), jnp.float32)
        compiled = jax.jit(lambda p, x: function(vae, p, x)).lower(params, x).compile()
        analysis = compiled.memory_analysis()
        return analysis.temp_size_in_bytes, analysis.output_size_in_bytes

    chunked, whole = getattr(vae_lib, f"{direction}_chunked"), getattr(vae_lib, direction)
    (short, short_out), (long, long_out) = temp(chunked, 5), temp(chunked, 25)
    assert long - short <= 1.01 * (long_out - short_out)  # the pieces of the output, before they are joined
    assert temp(whole, 25)[0] - long > 1e6  # what streaming saves


def test_later_frames_do_not_change_earlier_ones():
    vae = WanVAE(QUICK)
    _, params = random_pair(QUICK)
    latents = random_latents(QUICK, 4)
    changed = latents.copy()
    changed[:, 2:] += 1
    a, b = decode(vae, params, latents), decode(vae, params, changed)
    np.testing.assert_array_equal(a[:, :5], b[:, :5])
    assert relative(a[:, 5:], b[:, 5:]) > 0.1


def test_bfloat16():
    _, params = random_pair(QUICK)
    latents = random_latents(QUICK, 3)
    ours = decode(WanVAE(QUICK, jnp.bfloat16), params, latents)
    assert ours.dtype == jnp.bfloat16
    # Each of some 30 layers rounds to 8 bits (relative 2^-9); errors add up as a random walk, with a factor to spare.
    assert relative(ours, decode(WanVAE(QUICK), params, latents)) < 4 * 30**0.5 * 2**-9


def test_normalization():
    latents = jnp.asarray(random_latents(SMALL, 2))
    expected = (latents - np.array(SMALL.latents_mean)) / np.array(SMALL.latents_std)
    np.testing.assert_allclose(SMALL.normalize(latents), expected, rtol=1e-6)
    np.testing.assert_allclose(SMALL.denormalize(SMALL.normalize(latents)), latents, rtol=1e-5, atol=1e-6)


def test_defaults_are_those_of_diffusers():
    """A config without entries is the published VAE; the parameter count is that of Wan2.1_VAE.pth."""
    with torch.device("meta"):
        published = AutoencoderKLWan()
    assert VAEConfig.from_diffusers(published.config) == VAEConfig.from_diffusers({}) == VAEConfig()
    sizes = [p.size for p in jax.tree.leaves(abstract(VAEConfig()))]
    assert (len(sizes), sum(sizes)) == (194, 126_892_531)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_config_round_trip(config):
    written = config.to_diffusers()
    assert VAEConfig.from_diffusers(written) == config
    read = AutoencoderKLWan.from_config(written).config
    assert {k: read[k] for k in written if not k.startswith("_")} == {k: v for k, v in written.items() if k[0] != "_"}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"is_residual": True}, "is_residual=True is not supported"),
        ({"attn_scales": [1.0]}, "attn_scales"),
        ({"patch_size": 2}, "patch_size"),
        ({"decoder_base_dim": 256}, "decoder_base_dim"),
        ({"base_dims": 96}, "did you mean 'base_dim'"),
        ({"temperal_downsample": [True]}, "one entry per step"),
        ({"z_dim": 4}, "latents_mean has 16 entries"),
    ],
)
def test_other_architectures_are_refused(entries, message):
    with pytest.raises(UserError, match=message):
        VAEConfig.from_diffusers(entries)


@pytest.mark.parametrize("shape", [(1, 4, 16, 16, 3), (1, 5, 12, 16, 3), (1, 5, 16, 20, 3), (1, 5, 16, 16, 4)])
@pytest.mark.parametrize("function", [vae_lib.encode, vae_lib.encode_chunked])
def test_videos_that_do_not_fit_are_refused(shape, function):
    with pytest.raises(UserError, match="can't encode a video"):
        vae_lib.check_video(SMALL, shape)
    if shape[-1] == 3:  # the channel count is in the annotation, too
        with pytest.raises(UserError, match="can't encode a video"):
            function(WanVAE(SMALL), {}, jnp.zeros(shape))
