"""From prompts to videos: the whole way against diffusers' WanPipeline, and what the pieces promise."""

import dataclasses
import re
import time
from functools import partial

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from pipelines import FRAMES, SIZE, random_like, random_pipeline

from hybrid_dit import generation, sharding
from hybrid_dit.convert.pipeline import load_pipeline, save_pipeline
from hybrid_dit.errors import UserError
from hybrid_dit.models.vae import VAEConfig
from hybrid_dit.models.vae import init as init_vae
from hybrid_dit.models.wan import WanConfig
from hybrid_dit.ops.spec import AttentionSpec

PROMPTS = ["a small red circle moving left on a gray background", "a large blue square moving up on a black background"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random pipeline whose VAE has 8 channels instead of 2.

    The norm of 2 random channels is now and then close to 0, and what is divided by it then magnifies rounding to
    anything; that of 8 never is.
    """
    root = tmp_path_factory.mktemp("generation")
    small = random_pipeline(root / "small")
    vae = dataclasses.replace(small.vae, base_dim=8)
    params = random_like(jax.eval_shape(partial(init_vae, vae), jax.random.key(0)), np.random.default_rng(1))
    save_pipeline(root / "pipeline", dataclasses.replace(small, vae=vae, vae_params=params), "float32")
    return root / "pipeline"


@pytest.fixture(scope="module")
def pipeline(folder):
    return load_pipeline(folder)


def shape_of(pipeline):
    return generation.latent_shape(pipeline.wan, pipeline.vae, FRAMES, SIZE, SIZE)


def generate(pipeline, prompts, noise, guidance=3.0, steps=4, attention=()):
    generator = generation.Generator(pipeline, "unipc", steps, guidance, "float32")
    context = generation.text_context(pipeline, [*prompts, ""])
    positive, negative = (jax.tree.map(lambda a, s=s: a[s], context) for s in (slice(-1), slice(-1, None)))
    return generator, generator.denoise(attention, pipeline.dit, noise, positive, negative)[0]


@pytest.mark.parametrize("guidance", [3.0, 1.0])
def test_whole_generation_equals_diffusers(folder, pipeline, guidance):
    torch.set_num_threads(1)
    reference = diffusers.WanPipeline.from_pretrained(folder, dtype=torch.float32)
    reference.set_progress_bar_config(disable=True)
    noise = generation.noise_for(jax.random.key(5), shape_of(pipeline), [0, 1])

    def theirs(output):
        return reference(
            prompt=PROMPTS,
            negative_prompt=["", ""],
            guidance_scale=guidance,
            max_sequence_length=512,  # Wan's; diffusers' default of 226 gives other videos
            height=SIZE,
            width=SIZE,
            num_frames=FRAMES,
            num_inference_steps=8,
            latents=torch.tensor(np.moveaxis(np.asarray(noise), -1, 1).copy()),  # which diffusers overwrites
            output_type=output,
        ).frames

    generator, latents = generate(pipeline, PROMPTS, noise, guidance, steps=8)
    expected = np.moveaxis(theirs("latent").numpy(), 1, -1)
    # One velocity agrees within 1e-5 (tests/models/test_wan.py), guidance 3 weighs two of them by 3 and -2, and the
    # steps' weights sum to 1: 5e-5. (Measured: 1e-6.)
    assert np.linalg.norm(latents - expected) / np.linalg.norm(expected) < 5e-5

    video, _ = generator.decode(latents)
    assert video.dtype == np.uint8 and video.shape == (2, FRAMES, SIZE, SIZE, 3)
    assert video.std() > 20  # there is a picture to compare
    # Rounding to whole levels is off by half a level; the latents' difference adds hundredths.
    assert np.abs(video - 255 * theirs("np")).max() < 0.55


def test_guidance_of_one_takes_half_the_forwards(pipeline):
    forwards = [generation.Generator(pipeline, "euler", 7, g, "float32").forwards for g in (1.0, 3.0)]
    assert forwards == [7, 14]


def test_forwards_of_an_interval_and_reused_steps(pipeline):
    generator = generation.Generator(pipeline, "euler", 10, 3.0, "float32", interval=(500.0, 900.0), reuse=1e9)
    inside = sum(500 <= t <= 900 for t in generator.sampler.schedule.timesteps)
    assert 0 < inside < 10 and generator.forwards == 10 + inside
    np.testing.assert_array_equal(generator.reused(pipeline.dit), [False, *[True] * 8, False])
    assert generation.Generator(pipeline, "euler", 10, 3.0, "float32").reused(pipeline.dit) is None


@pytest.mark.parametrize(
    "values, message",
    [
        ({"windows": -1}, "at least 0"),
        ({"reuse": -0.1}, "at least 0"),
        ({"interval": (900.0, 500.0)}, "LOW <= HIGH, got"),
        ({"interval": (900.0,)}, "two timesteps"),
    ],
)
def test_impossible_settings_are_refused(pipeline, values, message):
    with pytest.raises(UserError, match=message):
        generation.Generator(pipeline, "euler", 10, 3.0, "float32", **values)


def test_seconds_are_the_medians_of_each_kind_of_step():
    # The first step compiled; the kinds "a" and "b" take 2 and 1 seconds, one "a" was disturbed.
    assert generation._usual_seconds([50.0, 2.0, 1.0, 2.0, 9.0, 1.0], ["a", "a", "b", "a", "a", "b"]) == 4 * 2 + 2 * 1
    assert generation._usual_seconds([5.0], ["a"]) == 5


def test_one_program_per_attention_whatever_the_parameters(pipeline, monkeypatch):
    traces = []
    original = generation.make_velocity

    def counting(wan, attention, *numerics):
        velocity = original(wan, attention, *numerics)

        def wrapped(*args):
            traces.append(attention)
            time.sleep(0.5)  # part of tracing, hence of the first step alone
            return velocity(*args)

        return wrapped

    monkeypatch.setattr(generation, "make_velocity", counting)
    generator = generation.Generator(pipeline, "euler", 4, 1.0, "float32")
    context = generation.text_context(pipeline, PROMPTS[:1])
    noise = generation.noise_for(jax.random.key(0), shape_of(pipeline), [0])
    other = jax.tree.map(lambda x: 1.5 * x, pipeline.dit)
    first, seconds = generator.denoise((), pipeline.dit, noise, context, context)
    second, _ = generator.denoise((), other, noise, context, context)
    assert traces == [()]
    assert np.abs(first - second).max() > 1e-3  # the parameters are not baked in
    assert seconds < 0.5  # nor is tracing counted
    generator.denoise((AttentionSpec(),) * 2, pipeline.dit, noise, context, context)
    assert len(traces) == 2


def test_a_text_does_not_depend_on_the_texts_beside_it(pipeline):
    many = [f"a {size} {colour} circle" for size in ("small", "large") for colour in ("red", "blue")] * 5 + PROMPTS
    assert len(many) > generation.TEXT_BATCH
    text, count = generation.text_context(pipeline, many)
    assert len(text) == len(count) == len(many)
    for i in (0, generation.TEXT_BATCH, len(many) - 1):
        alone, alone_count = generation.text_context(pipeline, [many[i]])
        own = int(alone_count[0, :-1].sum())
        assert int(count[i, :-1].sum()) == own and count[i].sum() == pipeline.text_tokens
        # Another batch and padding change the order of float32 sums alone: values are of order 1.
        np.testing.assert_allclose(text[i, :own], alone[0, :own], atol=1e-5)
        assert not np.asarray(text[i, own:]).any()  # Wan's padding is zero


def test_a_large_text_encoder_is_split_over_the_devices(pipeline, monkeypatch):
    expected = generation.text_context(pipeline, PROMPTS)
    put, made = sharding.put, []
    monkeypatch.setattr(sharding, "put", lambda *args: made.append(put(*args)) or made[-1])
    monkeypatch.setattr(sharding, "WHOLE", 1000)
    found = generation.text_context(pipeline, PROMPTS)
    kernel = made[0]["blocks"]["ffn"]["gate"]["kernel"]
    assert kernel.addressable_shards[0].data.size * jax.local_device_count() == kernel.size
    assert len(found[0].devices()) == 1
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_allclose(found[0], expected[0], atol=1e-5)  # values of order 1, float32 sums in another order


def test_named_noise_depends_on_seed_name_and_number_alone():
    key, names, numbers = generation.noise_key(0), np.uint32([7, 7, 9]), np.uint32([0, 1, 0])
    noise, keys = generation.named_noise(key, (2, 3), names, numbers)
    alone, own = generation.named_noise(key, (2, 3), names[2:], numbers[2:])
    np.testing.assert_array_equal(noise[2], alone[0])
    np.testing.assert_array_equal(jax.random.key_data(keys)[2], jax.random.key_data(own)[0])
    distinct = [*noise, jax.random.normal(own[0], (2, 3)), generation.named_noise(key, (2, 3), numbers, names)[0][0]]
    for i, a in enumerate(distinct):
        assert all(np.abs(a - b).min() > 0 for b in distinct[:i])


def test_noise_of_a_sample_depends_on_key_and_index_alone():
    key = generation.noise_key(0)
    several = generation.noise_for(key, (2, 3), [4, 7])
    np.testing.assert_array_equal(several[1], generation.noise_for(key, (2, 3), [7])[0])
    assert np.abs(several[0] - several[1]).min() > 0
    assert np.abs(generation.noise_for(generation.noise_key(1), (2, 3), [7])[0] - several[1]).min() > 0


@pytest.mark.parametrize(
    "size, message",
    [
        ((32, 32, 32), "frames=32 is not 4n + 1; the nearest are 29 and 33"),
        ((0, 32, 32), "frames=0 is not 4n + 1; the nearest are 1 and 5"),
        ((33, 40, 32), "height=40 is not a multiple of 16; the nearest are 32 and 48"),
        ((33, 32, 8), "width=8 is not a multiple of 16"),
    ],
)
def test_sizes_that_do_not_fit_are_told_with_the_nearest(size, message):
    wan = WanConfig(dim=24, num_heads=2, ffn_dim=8, num_layers=1)
    with pytest.raises(UserError, match=re.escape(message)):
        generation.latent_shape(wan, VAEConfig(), *size)


def test_latent_shape_of_wans_video():
    wan = WanConfig(dim=24, num_heads=2, ffn_dim=8, num_layers=1)
    assert generation.latent_shape(wan, VAEConfig(), 81, 480, 832) == (21, 60, 104, 16)


def test_decoding_undoes_the_normalisation_of_encoding(pipeline):
    scaled = dataclasses.replace(pipeline.vae, latents_mean=(1.0, 2.0, 3.0, 4.0), latents_std=(0.5, 1.0, 2.0, 4.0))
    video = jax.random.uniform(jax.random.key(0), (1, 1, SIZE, SIZE, 3), minval=-1, maxval=1)
    plain, normal = (generation.encode_video(v, pipeline.vae_params, video) for v in (pipeline.vae, scaled))
    np.testing.assert_allclose(normal, (plain - jnp.arange(1.0, 5.0)) / jnp.array([0.5, 1, 2, 4]), atol=1e-5)
    before, after = (
        np.asarray(generation.decode_to_uint8(v, pipeline.vae_params, z)).astype(int)
        for v, z in ((pipeline.vae, plain), (scaled, normal))
    )
    assert np.abs(before - after).max() <= 1  # rounding may move a value across the border between two levels


@pytest.mark.parametrize(
    "prompt, stem",
    [
        ("A cat, eating: fish?", "A cat, eating: fish?-0"),  # VBench looks for the prompt letter by letter
        ("day/night\\dawn\nend", "day_night_dawn_end-0"),
        ("..", "..-0"),
    ],
)
def test_file_names_keep_the_prompt_where_they_can(prompt, stem, tmp_path):
    assert generation.file_stem(prompt, 0) == stem
    (tmp_path / f"{stem}.mp4").touch()
    assert [f.name for f in tmp_path.iterdir()] == [f"{stem}.mp4"]


def test_long_file_names_are_cut_at_a_character(tmp_path):
    stem = generation.file_stem("猫" * 200, 12)
    assert stem == "猫" * ((255 - len("-12.mp4")) // 3) + "-12"
    (tmp_path / f"{stem}.mp4").touch()


def test_the_backend_reaches_attention(pipeline):
    generator = generation.Generator(pipeline, "euler", 4, 1.0, "float32", "gpus")
    context = generation.text_context(pipeline, PROMPTS[:1])
    noise = generation.noise_for(jax.random.key(0), shape_of(pipeline), [0])
    with pytest.raises(UserError, match="attention backend 'gpus' is unknown"):
        generator.denoise((), pipeline.dit, noise, context, context)
