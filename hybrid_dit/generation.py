"""From prompts to videos with a pipeline: text context, velocity function, sampling, decoding."""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_dit.array_typing import Array, DTypeLike
from hybrid_dit.convert.pipeline import Pipeline
from hybrid_dit.errors import UserError
from hybrid_dit.models.umt5 import UMT5Encoder, encode_prompts
from hybrid_dit.models.vae import VAEConfig, WanVAE, decode_chunked, encode
from hybrid_dit.models.wan import WanConfig, WanDiT, pack_text
from hybrid_dit.ops.spec import AttentionSpec

TEXT_ROWS = 8  # text lengths are rounded up to a multiple, so that few shapes are compiled


def latent_shape(wan: WanConfig, vae: VAEConfig, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
    """Returns the latents' (t, y, x, c) for a video of this size.

    Raises:
        UserError: frames is not 4n + 1, or height or width is no multiple of 16 (VAE stride times patch).
    """
    stride, space = vae.temporal_stride, vae.spatial_stride
    if frames < 1 or (frames - 1) % stride:
        near = max(frames - 1, 0) // stride * stride + 1
        raise UserError(f"frames={frames} is not {stride}n + 1; the nearest are {near} and {near + stride}")
    for name, size, patch in (("height", height, wan.patch[1]), ("width", width, wan.patch[2])):
        unit = space * patch
        if size < unit or size % unit:
            near = max(size // unit, 1) * unit
            raise UserError(f"{name}={size} is not a multiple of {unit}; the nearest are {near} and {near + unit}")
    return (frames - 1) // stride + 1, height // space, width // space, wan.in_channels


def text_context(pipeline: Pipeline, prompts: Sequence[str]) -> tuple[Array, Array]:
    """Returns what `velocity` takes as context for these prompts: packed embeddings and counts (see `pack_text`).

    All prompts that will share a batch (the negative one too) belong in one call, so that they get equal shapes.
    """
    ids, lengths = pipeline.tokenizer(prompts, pipeline.text_tokens)
    rows = min(-(-int(lengths.max()) // TEXT_ROWS) * TEXT_ROWS, pipeline.text_tokens)
    embed = jax.jit(partial(encode_prompts, UMT5Encoder(pipeline.text)))
    return pack_text(embed(pipeline.text_params, ids[:, :rows], lengths), lengths, pipeline.text_tokens)


def make_velocity(
    wan: WanConfig, attention: tuple[AttentionSpec, ...] = (), dtype: DTypeLike = jnp.float32
) -> Callable[..., Array]:
    """Returns velocity(params, x, t, (text, count)) for `hybrid_dit.sampling`."""
    model = WanDiT(wan, attention, dtype)

    def velocity(params, x, t, context):
        return model.apply({"params": params}, x, t, *context)

    return velocity


def decode_to_uint8(vae: VAEConfig, params, latents: Array) -> Array:
    """Returns the videos of normalised latents, uint8 [b, t, y, x, 3], decoded one latent frame at a time; for jit."""
    video = decode_chunked(WanVAE(vae), params, vae.denormalize(latents))
    return jnp.round((video + 1) * 127.5).astype(jnp.uint8)


def encode_video(vae: VAEConfig, params, video: Array) -> Array:
    """Returns the normalised latents (the posterior's mean) of videos [b, t, y, x, 3] in [-1, 1]; for jit."""
    return vae.normalize(encode(WanVAE(vae), params, video)[0])


def noise_for(key: Array, shape: tuple[int, ...], indices: Sequence[int]) -> Array:
    """Standard normal noise [len(indices), *shape]; sample i depends on `key` and i alone, not on its batch."""
    return jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), shape))(np.asarray(indices, np.uint32))
