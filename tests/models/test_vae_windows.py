"""Windows of columns against the whole: exact at the seams, and no column more than that takes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pipelines import random_like

from hybrid_dit import generation, sharding
from hybrid_dit.models import vae as vae_lib
from hybrid_dit.models.vae import VAEConfig, WanVAE
from hybrid_dit.models.vae_windows import decode_in_windows, halo, windows

CONFIG = VAEConfig(
    base_dim=4,
    z_dim=4,
    num_res_blocks=1,
    dim_mult=(1, 2),
    temporal_downsample=(True,),
    latents_mean=(0.0,) * 4,
    latents_std=(1.0,) * 4,
)
COLUMNS = 20


@pytest.fixture(scope="module")
def params():
    shapes = jax.eval_shape(functools.partial(vae_lib.init, CONFIG), jax.random.key(0))
    return random_like(shapes, np.random.default_rng(0))


@pytest.fixture(scope="module")
def latents():
    return np.random.default_rng(1).standard_normal((2, 3, 2, COLUMNS, CONFIG.z_dim)).astype(np.float32)


@pytest.fixture(scope="module")
def whole(params, latents):
    return jax.jit(functools.partial(vae_lib.decode_chunked, WanVAE(CONFIG)))(params, latents)


def test_a_window_needs_less_memory():
    vae = WanVAE(dataclasses.replace(CONFIG, base_dim=16, dim_mult=(1, 1, 1), temporal_downsample=(True, True)))
    shapes = jax.eval_shape(functools.partial(vae_lib.init, vae.config), jax.random.key(0))

    def temporaries(count):
        decode = jax.jit(functools.partial(decode_in_windows, vae, count=count))
        z = jax.ShapeDtypeStruct((1, 1, 4, 60, 4), jnp.float32)
        return decode.lower(shapes, z).compile().memory_analysis().temp_size_in_bytes

    width = windows(60, 4, halo(vae.config))[0]
    assert width == 27
    assert temporaries(4) < (width / 60 + 0.2) * temporaries(1)  # and what is kept of the others


def test_halo_of_wan():
    # By hand, in pixels: 6 convolutions at every level; upsampling doubles and adds one; one more at the end.
    pixels = ((6 * 2 + 1 + 6) * 2 + 1 + 6) * 2 + 1 + 6 + 1
    assert pixels == 98 and halo(VAEConfig()) == 13 == -(-pixels // 8)


def test_halo_is_what_a_pixel_depends_on(params):
    """Derivatives of one row of pixels by what goes into the local part of the decoder."""
    reach, middle = halo(CONFIG), COLUMNS // 2
    x = np.random.default_rng(1).standard_normal((1, 1, 1, COLUMNS, 8)).astype(np.float32)

    def pixel(x):  # the pixels of latent column `middle`, not clipped
        out = WanVAE(CONFIG).apply({"params": params}, x, method=lambda vae, x: vae.decoder.rest(x))
        return out[..., 2 * middle : 2 * middle + 2, :].sum()

    depends = np.abs(jax.jit(jax.grad(pixel))(x)).sum(axis=(0, 1, 2, 4)) > 0
    np.testing.assert_array_equal(np.flatnonzero(depends), np.arange(middle - reach, middle + reach + 1))


def test_windows_equal_the_whole(params, latents, whole):
    decode = functools.partial(decode_in_windows, WanVAE(CONFIG), count=3)
    assert windows(COLUMNS, 3, halo(CONFIG))[0] < COLUMNS
    # The same sums in float32, whose rounding (6e-8) some ten layers carry on.
    np.testing.assert_allclose(jax.jit(decode)(params, latents), whole, rtol=0, atol=1e-5)


def test_devices_share_the_windows(params, latents, whole):
    mesh = sharding.distill_mesh(1, 4, jax.devices()[:4])
    spread = functools.partial(generation._over_all, mesh)
    decode = jax.jit(
        functools.partial(generation.decode_to_uint8, CONFIG, windows=2, spread=spread),
        out_shardings=sharding.replicated(mesh),
    )
    compiled = decode.lower(params, latents).compile()
    expected = np.asarray((whole + 1) * 127.5, np.float64)
    assert np.abs(np.asarray(compiled(params, latents)) - expected).max() < 0.51  # rounded to whole levels
    # 2 windows of 2 videos on 4 devices: each has one window of one video in its convolutions.
    width = windows(COLUMNS, 2, halo(CONFIG))[0]
    assert f"f32[1,{4},{2 * width},4]" in compiled.as_text().replace("f32[1,1,", "f32[1,")


def test_every_column_is_covered_once():
    for columns in (5, 20, 104, 160):
        for count in (1, 2, 3, 8, 40):
            width, starts, borders = windows(columns, count, 4)
            assert borders[0] == 0 and borders[-1] == columns and len(borders) == len(starts) + 1
            for start, left, right in zip(starts, borders, borders[1:]):
                assert start >= 0 and start + width <= columns and left < right
                assert left - start >= (4 if start else 0)  # from the window's edge to what is kept of it
                assert start + width - right >= (4 if start + width < columns else 0)
    assert windows(160, 3, 13) == (71, [0, 44, 89], [0, 57, 102, 160])  # as the module says
