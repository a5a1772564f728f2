"""From prompts to videos with a pipeline: text context, velocity function, sampling, decoding."""

import functools
import math
import re
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hybrid_dit import sharding
from hybrid_dit.array_typing import Array, DTypeLike, PyTree, Shaped
from hybrid_dit.convert.pipeline import Pipeline
from hybrid_dit.errors import UserError
from hybrid_dit.models.umt5 import UMT5Config, UMT5Encoder, encode_prompts
from hybrid_dit.models.vae import VAEConfig, WanVAE, encode
from hybrid_dit.models.vae_windows import decode_in_windows
from hybrid_dit.models.wan import WanConfig, WanDiT, modulation, pack_text
from hybrid_dit.ops.spec import AttentionSpec
from hybrid_dit.sampling import ALWAYS, check_interval, guided, guided_steps, make_sampler, reused_steps, stepwise
from hybrid_dit.split_dit import SplitDiT

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
    params = place_encoder(pipeline.text_params)
    place = jax.tree.leaves(params)[0].sharding  # of an encoder on a mesh: what it returns is whole on every device
    split = isinstance(place, NamedSharding)
    embed = _text_encoder(pipeline.text, sharding.replicated(place.mesh) if split else None)
    batch = min(TEXT_BATCH, len(prompts))
    parts = []
    for start in range(0, len(prompts), batch):
        index = np.minimum(np.arange(start, start + batch), len(prompts) - 1)  # the last batch is filled up
        found = embed(params, ids[index, :rows], lengths[index])
        parts.append(np.asarray(found) if split else found)  # others' arrays are on one device
    return pack_text(jnp.concatenate(parts)[: len(prompts)], lengths, pipeline.text_tokens)


def place_encoder(params: PyTree) -> PyTree:
    """Returns a text encoder's parameters on this process's devices: whole on one or, if large, split over all.

    Those on devices already stay where they are: place them once for several calls of `text_context`.
    """
    leaves = jax.tree.leaves(params)
    if isinstance(leaves[0], jax.Array) or sum(x.nbytes for x in leaves) <= sharding.WHOLE:
        return jax.device_put(params)
    mesh = sharding.data_mesh(jax.local_devices())
    return sharding.put(params, sharding.param_shardings(mesh, params, sharding.TEXT_RULES))


@functools.lru_cache(maxsize=2)
def _text_encoder(config: UMT5Config, place: NamedSharding | None) -> Callable[..., Array]:
    """One jitted function per encoder, so that only new shapes compile."""
    return jax.jit(partial(encode_prompts, UMT5Encoder(config)), out_shardings=place)


def make_velocity(
    wan: WanConfig,
    attention: tuple[AttentionSpec, ...] = (),
    dtype: DTypeLike = jnp.float32,
    backend: str = "auto",
    mesh: Mesh | None = None,
) -> Callable[..., Array]:
    """Returns velocity(params, x, t, (text, count)) for `hybrid_dit.sampling`, on the devices of a mesh or on one.

    `backend` is that of self-attention.
    """
    if mesh is not None and mesh.size > 1:
        return SplitDiT(wan, attention, dtype, mesh, backend).velocity
    model = WanDiT(wan, attention, dtype, backend=backend)

    def velocity(params, x, t, context):
        return model.apply({"params": params}, x, t, *context)

    return velocity


def decode_to_uint8(
    vae: VAEConfig, params, latents: Array, windows: int = 1, spread=None, dtype: DTypeLike = jnp.float32
) -> Array:
    """Returns the videos of normalised latents, uint8 [b, t, y, x, 3], decoded in pieces; for jit.

    Args:
        vae: the VAE's config.
        params: its parameters.
        latents: [b, t, y, x, c].
        windows: of columns, see `vae_windows`.
        spread: where windows are decoded, likewise.
        dtype: of activations.
    """

    def to_uint8(video):
        return jnp.round((video.astype(jnp.float32) + 1) * 127.5).astype(jnp.uint8)

    latents = vae.denormalize(latents)
    return decode_in_windows(WanVAE(vae, dtype), params, latents, windows, DECODE_CHUNK, to_uint8, spread)


def encode_video(vae: VAEConfig, params, video: Array) -> Array:
    """Returns the normalised latents (the posterior's mean) of videos [b, t, y, x, 3] in [-1, 1]; for jit."""
    return vae.normalize(encode(WanVAE(vae), params, video)[0])


def noise_for(key: Array, shape: tuple[int, ...], indices: Sequence[int]) -> Array:
    """Standard normal noise [len(indices), *shape]; sample i depends on `key` and i alone, not on its batch."""
    return jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), shape))(np.asarray(indices, np.uint32))


def noise_key(seed: int) -> Array:
    """Returns the key of the noise that videos start from: of its own, so that no stage has trained on it."""
    return jax.random.fold_in(jax.random.key(seed), int.from_bytes(b"eval"))


def named_noise(
    key: Array, shape: tuple[int, ...], names: Shaped[Array, "b"], numbers: Shaped[Array, "b"]
) -> tuple[Array, Array]:
    """Returns noise [b, *shape] and keys [b] for samplers, of the videos numbered `numbers` of the prompts `names`.

    Each depends on `key`, its name and its number alone, to the last bit.

    Args:
        key: from `noise_key`.
        shape: of one video's latents.
        names: CRC-32 of every prompt's name, uint32.
        numbers: which video of the prompt, uint32.
    """

    def one(name, number):
        own = jax.random.fold_in(jax.random.fold_in(key, number), name)
        return jax.random.normal(own, shape), jax.random.fold_in(own, int.from_bytes(b"step"))

    return jax.vmap(one)(names, numbers)


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
        interval: Sequence[float] = ALWAYS,
        sequential: bool = False,
        reuse: float = 0.0,
        mesh: Mesh | None = None,
        windows: int = 0,
        vae_dtype: DTypeLike = jnp.float32,
    ):
        """Prepares sampling with a pipeline's sizes, VAE and timestep shift; its DiT parameters are not used.

        Args:
            pipeline: sizes, VAE and shift.
            sampler: a name of `hybrid_dit.sampling.SAMPLERS`.
            num_steps: denoising steps.
            guidance: scale; 1 evaluates the conditional branch alone.
            dtype: of the DiT's activations.
            backend: of its self-attention, see `ops.backends`; on one device.
            interval: of the timesteps that are guided, see `guided`.
            sequential: guidance's branches one after the other.
            reuse: threshold for steps that take an earlier velocity, see `reused_steps`; 0: none.
            mesh: from `sharding.distill_mesh`; None: one device.
            windows: in which videos are decoded, one after the other; 0: those that devices share, whole on one.
            vae_dtype: of the VAE's activations.
        """
        self.wan, self.guidance, self.dtype, self.backend = pipeline.wan, guidance, jnp.dtype(dtype), backend
        self.sampler = make_sampler(sampler, num_steps, pipeline.shift)
        self.interval, self.sequential = check_interval(interval), sequential
        self.mesh = mesh if mesh and mesh.size > 1 else None
        if windows < 0:
            raise UserError(f"windows={windows} must be at least 0")
        self._threshold, self._windows = reuse, windows
        self._vae, self._vae_dtype = pipeline.vae, jnp.dtype(vae_dtype)
        reused_steps(np.ones((1, 1)), reuse)  # refuses thresholds that are none
        self._runs: dict[tuple[AttentionSpec, ...], Callable[..., Array]] = {}
        self._decoders: dict[tuple[int, ...], Callable[..., Array]] = {}
        whole = None if self.mesh is None else sharding.replicated(self.mesh)
        self._vae_params = jax.device_put(pipeline.vae_params, whole)

    @property
    def forwards(self) -> int:
        """Forward passes of the DiT per video, if no step is reused."""
        return self.sampler.schedule.num_steps + int(self._guided.sum())

    @property
    def _guided(self) -> np.ndarray:
        times = self.sampler.schedule.timesteps
        return guided_steps(times, self.interval) & (self.guidance != 1)

    def reused(self, params) -> np.ndarray | None:
        """Returns which steps reuse a velocity, bool [steps]; None if none may."""
        if not self._threshold:
            return None
        whole = None if self.mesh is None else sharding.replicated(self.mesh)
        features = jax.jit(partial(modulation, self.wan), out_shardings=whole)(params, self.sampler.schedule.timesteps)
        return reused_steps(features, self._threshold)

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
        """Returns the latents of a batch, and the seconds it took: the median of each kind of step times their number.

        Args:
            attention: one spec per block; empty for softmax everywhere.
            params: the DiT's parameters, on the device.
            noise: [b, t, y, x, c].
            context: of the prompts, from `text_context`.
            negative: of the negative prompt, a batch of 1.
            key: for samplers that draw noise, see `Sampler`.
            on_step: called with the number of finished steps.
        """
        if attention not in self._runs:
            velocity = self.velocity(attention)
            self._runs[attention] = stepwise(velocity, self.sampler)
        times = [time.perf_counter()]

        def after_step(done: int, _) -> None:
            times.append(time.perf_counter())
            on_step(done)

        both = context if self.guidance == 1 else (context, negative)
        reuse = self.reused(params)
        latents = self._runs[attention](params, noise, both, key, after_step, reuse)
        none = np.zeros(self.sampler.schedule.num_steps, bool)
        kinds = list(zip(self._guided.tolist(), (none if reuse is None else reuse).tolist()))
        return latents, _usual_seconds([after - before for before, after in zip(times, times[1:])], kinds)

    def velocity(self, attention: tuple[AttentionSpec, ...]) -> Callable[..., Array]:
        """Returns the velocity function of one step, guidance included."""
        velocity = make_velocity(self.wan, attention, self.dtype, self.backend, self.mesh)
        return velocity if self.guidance == 1 else guided(velocity, self.guidance, self.interval, self.sequential)

    def decode(self, latents: Array) -> tuple[np.ndarray, float]:
        """Returns the videos of normalised latents, uint8 [b, t, y, x, 3], and the seconds it took."""
        if latents.shape not in self._decoders:
            whole = None if self.mesh is None else sharding.replicated(self.mesh)
            decode = decoder(self._vae, len(latents), self._windows, self.mesh, self._vae_dtype)
            decode = jax.jit(decode, out_shardings=whole)
            self._decoders[latents.shape] = decode.lower(self._vae_params, latents).compile()
        began = time.perf_counter()
        videos = np.asarray(self._decoders[latents.shape](self._vae_params, latents))
        return videos, time.perf_counter() - began


def decoder(
    vae: VAEConfig, batch: int, windows: int = 0, mesh: Mesh | None = None, dtype: DTypeLike = jnp.float32
) -> Callable[..., Array]:
    """Returns `decode_to_uint8` of (parameters, latents [batch, ...]) for the devices of a mesh.

    Args:
        vae: the VAE's config.
        batch: videos at once.
        windows: see `Generator`.
        mesh: of the program; None: one device.
        dtype: of activations.
    """
    spread = None
    if mesh is not None and mesh.size > 1 and not windows:  # as many as give every device one
        windows, spread = mesh.size // math.gcd(batch, mesh.size), partial(_over_all, mesh)
    return partial(decode_to_uint8, vae, windows=windows or 1, spread=spread, dtype=dtype)


def _over_all(mesh: Mesh, x: Array) -> Array:
    """Splits the leading axis over all devices, where that divides."""
    split = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    return x if len(x) % mesh.size else jax.lax.with_sharding_constraint(x, split)


def _usual_seconds(seconds: Sequence[float], kinds: Sequence) -> float:
    """Returns the sum of all steps with each replaced by the median of its kind, the first left out: it may compile."""
    groups = {kind: [s for s, k in zip(seconds[1:], kinds[1:]) if k == kind] for kind in kinds}
    return sum(statistics.median(groups[kind] or seconds[:1]) for kind in kinds)


def file_stem(prompt: str, index: int) -> str:
    """Returns the name of a prompt's video without ending, `{prompt}-{index}` as VBench expects it.

    Only what a file system can't hold is changed: slashes and control characters become "_", and the prompt is cut
    such that name and ending fit into 255 bytes.
    """
    tail = f"-{index}"
    safe = re.sub(r"[/\\\x00-\x1f\x7f]", "_", prompt)
    room = 255 - len(tail) - len(".mp4")
    return safe.encode()[:room].decode(errors="ignore") + tail
