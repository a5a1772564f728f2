"""From prompts to videos with a pipeline: text context, velocity function, sampling, decoding."""

import functools
import re
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_dit.array_typing import Array, DTypeLike
from hybrid_dit.convert.pipeline import Pipeline
from hybrid_dit.errors import UserError
from hybrid_dit.models.umt5 import UMT5Config, UMT5Encoder, encode_prompts
from hybrid_dit.models.vae import VAEConfig, WanVAE, decode_chunked, encode
from hybrid_dit.models.wan import WanConfig, WanDiT, pack_text
from hybrid_dit.ops.spec import AttentionSpec
from hybrid_dit.sampling import guided, make_sampler, stepwise

TEXT_ROWS = 8  # text lengths are rounded up to a multiple, so that few shapes are compiled
TEXT_BATCH = 16  # prompts encoded at once
DECODE_CHUNK = 2  # latent frames decoded at once: 1 takes less memory, 2 is fastest on CPU


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
    embed, params = _text_encoder(pipeline.text), jax.device_put(pipeline.text_params)
    batch = min(TEXT_BATCH, len(prompts))
    parts = []
    for start in range(0, len(prompts), batch):
        index = np.minimum(np.arange(start, start + batch), len(prompts) - 1)  # the last batch is filled up
        parts.append(embed(params, ids[index, :rows], lengths[index]))
    return pack_text(jnp.concatenate(parts)[: len(prompts)], lengths, pipeline.text_tokens)


@functools.lru_cache(maxsize=2)
def _text_encoder(config: UMT5Config) -> Callable[..., Array]:
    """One jitted function per encoder, so that only new shapes compile."""
    return jax.jit(partial(encode_prompts, UMT5Encoder(config)))


def make_velocity(
    wan: WanConfig, attention: tuple[AttentionSpec, ...] = (), dtype: DTypeLike = jnp.float32, backend: str = "auto"
) -> Callable[..., Array]:
    """Returns velocity(params, x, t, (text, count)) for `hybrid_dit.sampling`."""
    model = WanDiT(wan, attention, dtype, backend=backend)

    def velocity(params, x, t, context):
        return model.apply({"params": params}, x, t, *context)

    return velocity


def decode_to_uint8(vae: VAEConfig, params, latents: Array) -> Array:
    """Returns the videos of normalised latents, uint8 [b, t, y, x, 3], decoded in pieces; for jit."""
    video = decode_chunked(WanVAE(vae), params, vae.denormalize(latents), DECODE_CHUNK)
    return jnp.round((video + 1) * 127.5).astype(jnp.uint8)


def encode_video(vae: VAEConfig, params, video: Array) -> Array:
    """Returns the normalised latents (the posterior's mean) of videos [b, t, y, x, 3] in [-1, 1]; for jit."""
    return vae.normalize(encode(WanVAE(vae), params, video)[0])


def noise_for(key: Array, shape: tuple[int, ...], indices: Sequence[int]) -> Array:
    """Standard normal noise [len(indices), *shape]; sample i depends on `key` and i alone, not on its batch."""
    return jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), shape))(np.asarray(indices, np.uint32))


def noise_key(seed: int) -> Array:
    """Returns the key of the noise that videos start from: of its own, so that no stage has trained on it."""
    return jax.random.fold_in(jax.random.key(seed), int.from_bytes(b"eval"))


class Generator:
    """Samples and decodes with programs that are compiled once per attention and shape; parameters are arguments.

    Both methods return seconds without compilation, so that no separate warm-up is needed to compare models.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        sampler: str,
        num_steps: int,
        guidance: float,
        dtype: DTypeLike,
        backend: str = "auto",
    ):
        """Prepares sampling with a pipeline's sizes, VAE and timestep shift; its DiT parameters are not used.

        Args:
            pipeline: sizes, VAE and shift.
            sampler: a name of `hybrid_dit.sampling.SAMPLERS`.
            num_steps: denoising steps.
            guidance: scale; 1 evaluates the conditional branch alone.
            dtype: of the DiT's activations.
            backend: of its self-attention, see `ops.backends`.
        """
        self.wan, self.guidance, self.dtype, self.backend = pipeline.wan, guidance, jnp.dtype(dtype), backend
        self.sampler = make_sampler(sampler, num_steps, pipeline.shift)
        self._runs: dict[tuple[AttentionSpec, ...], Callable[..., Array]] = {}
        self._decode = jax.jit(partial(decode_to_uint8, pipeline.vae))
        self._decoders: dict[tuple[int, ...], Callable[..., Array]] = {}
        self._vae_params = jax.device_put(pipeline.vae_params)

    @property
    def forwards(self) -> int:
        """Forward passes of the DiT per video."""
        return self.sampler.schedule.num_steps * (1 if self.guidance == 1 else 2)

    def denoise(
        self,
        attention: tuple[AttentionSpec, ...],
        params,
        noise: Array,
        context: tuple[Array, Array],
        negative: tuple[Array, Array],
        key: Array | None = None,
        on_step: Callable[[int], None] = lambda done: None,
    ) -> tuple[Array, float]:
        """Returns the latents of a batch, and the seconds it took: the median step times the number of steps.

        Args:
            attention: one spec per block; empty for softmax everywhere.
            params: the DiT's parameters, on the device.
            noise: [b, t, y, x, c].
            context: of the prompts, from `text_context`.
            negative: of the negative prompt, a batch of 1.
            key: for samplers that draw noise.
            on_step: called with the number of finished steps.
        """
        if attention not in self._runs:
            velocity = make_velocity(self.wan, attention, self.dtype, self.backend)
            self._runs[attention] = stepwise(
                velocity if self.guidance == 1 else guided(velocity, self.guidance), self.sampler
            )
        times = [time.perf_counter()]

        def after_step(done: int, _) -> None:
            times.append(time.perf_counter())
            on_step(done)

        both = context if self.guidance == 1 else (context, negative)
        latents = self._runs[attention](params, noise, both, key, after_step)
        steps = [after - before for before, after in zip(times, times[1:])]
        return latents, statistics.median(steps[1:] or steps) * len(steps)  # the first step may have compiled

    def decode(self, latents: Array) -> tuple[np.ndarray, float]:
        """Returns the videos of normalised latents, uint8 [b, t, y, x, 3], and the seconds it took."""
        if latents.shape not in self._decoders:
            self._decoders[latents.shape] = self._decode.lower(self._vae_params, latents).compile()
        began = time.perf_counter()
        videos = np.asarray(self._decoders[latents.shape](self._vae_params, latents))
        return videos, time.perf_counter() - began


def file_stem(prompt: str, index: int) -> str:
    """Returns the name of a prompt's video without ending, `{prompt}-{index}` as VBench expects it.

    Only what a file system can't hold is changed: slashes and control characters become "_", and the prompt is cut
    such that name and ending fit into 255 bytes.
    """
    tail = f"-{index}"
    safe = re.sub(r"[/\\\x00-\x1f\x7f]", "_", prompt)
    room = 255 - len(tail) - len(".mp4")
    return safe.encode()[:room].decode(errors="ignore") + tail
