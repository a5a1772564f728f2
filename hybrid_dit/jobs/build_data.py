"""Turns videos and captions, or moving shapes, into a latent set to train on.

Shards are built one by one and shared out over processes; a shard that is whole is never touched again, one that is not
is built anew from the start. What is in a shard depends on the settings alone, so an interruption leaves no trace.
"""

import collections
import concurrent.futures
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from hybrid_dit import generation, sharding
from hybrid_dit.convert.pipeline import DTYPES, Pipeline, load_pipeline
from hybrid_dit.data import shapes
from hybrid_dit.data.captions import find_videos
from hybrid_dit.data.clips import Bucket, parse_bucket, read_clip
from hybrid_dit.data.library import is_finite
from hybrid_dit.data.shards import Record, ShardFolder
from hybrid_dit.errors import UserError
from hybrid_dit.models.vae import VAEConfig, WanVAE, encode_chunked
from hybrid_dit.pairs import TWO_THINGS
from hybrid_dit.processes import barrier, on_main
from hybrid_dit.progress import Progress
from hybrid_dit.workdir import Stage, is_done

FOLDER = "data"
FPS = 0.01, 1000.0
A_DAY = 86400.0  # seconds that processes that are done wait for the others' shards


class Item(NamedTuple):
    """Something to encode."""

    key: str
    caption: str
    clip: Callable[[], tuple[Bucket, np.ndarray]]  # uint8 [t, y, x, 3]; raises UserError with the reason to skip it


def run(config, workdir: Path) -> None:
    """Writes `data/`: shards, TFDS's description, manifest.json and skipped.csv.

    Raises:
        UserError: no videos, buckets that the model can't take, or other settings than the folder was begun with.
    """
    cfg = config.build_data
    process = jax.process_index() if cfg.processes < 1 else cfg.process
    processes = jax.process_count() if cfg.processes < 1 else cfg.processes
    if not 0 <= process < processes:
        raise UserError(f"build_data.process={process} is not one of {processes}; count from 0")
    if cfg.dtype not in ("float32", "bfloat16") or cfg.compute_dtype not in ("float32", "bfloat16"):
        raise UserError("build_data.dtype and build_data.compute_dtype are float32 or bfloat16")
    for name in ("shard", "batch", "enlarge"):
        if not cfg[name] > 0:
            raise UserError(f"build_data.{name}={cfg[name]} must be more than 0")
    if not FPS[0] <= cfg.fps <= FPS[1]:
        raise UserError(f"build_data.fps={cfg.fps} must be from {FPS[0]:g} to {FPS[1]:g} frames per second")
    if is_done(workdir, FOLDER, _settings(config)):
        print(f"build_data: complete in {workdir / FOLDER}")
        return
    pipeline = load_pipeline(config.model.weights, ("vae", "text_encoder"))
    buckets = [parse_bucket(text) for text in cfg.buckets]
    for bucket in buckets:
        generation.latent_shape(pipeline.wan, pipeline.vae, *bucket)
    items, skipped = _items(cfg, buckets, config.seed)
    stage = Stage(workdir, FOLDER, _settings(config))  # not before: settings that were refused must not be kept
    names = [f"{i.key}: {i.caption}" for i in items]
    folder = ShardFolder(stage.folder, names, cfg.shard, pipeline.wan.in_channels, pipeline.wan.text_dim, cfg.dtype)
    mine = range(process, folder.shards, processes)
    whole = {n for n in mine if folder.report(n).is_file()}
    total, done = (sum(len(folder.items(n)) for n in numbers) for numbers in (mine, whole))
    print(
        f"build_data: {len(items)} videos in {folder.shards} shards, {total} of them for process {process} of "
        f"{processes}; {done} are done, {len(skipped)} were left out at once",
        flush=True,
    )
    encode = Encoder(pipeline, cfg.batch, cfg.dtype, cfg.compute_dtype)
    progress = Progress("build_data", max(total, 1), "video", start=done)
    for number in mine:
        if number in whole:
            continue
        before = done

        def advance(count: int, before=before) -> None:
            progress.update(before + count)

        records, bad = encode(_clips([items[i] for i in folder.items(number)], cfg.threads), advance)
        folder.write(number, records, bad)
        done += len(folder.items(number))
        for name, why in bad.items():
            print(f"build_data: left out {name}: {why}", flush=True)
    barrier("build_data", A_DAY)
    missing = on_main(folder.missing)
    if missing:
        print(f"build_data: process {process} is done; {len(missing)} of {folder.shards} shards are the others'")
        return
    manifest = on_main(
        folder.finish,
        skipped,
        dtype=cfg.dtype,
        fps=cfg.fps,
        text_tokens=pipeline.text_tokens,
        weights=str(config.model.weights),
    )
    print(
        f"build_data: {manifest['samples']} samples in {stage.folder}, {manifest['skipped']} left out (skipped.csv). "
        f"Train on it with --config.data.kind=tfds --config.data.path={stage.folder}"
    )
    stage.finish(samples=manifest["samples"], skipped=manifest["skipped"])


class Encoder:
    """Latents and text embeddings of clips, on all devices of this process."""

    def __init__(self, pipeline: Pipeline, batch: int, dtype: str, compute_dtype: str):
        """Places both.

        Args:
            pipeline: VAE and text encoder.
            batch: clips per device.
            dtype: of the results.
            compute_dtype: of the VAE's activations.
        """
        text_params = generation.place_encoder(pipeline.text_params)
        self._pipeline, self._dtype = dataclasses.replace(pipeline, text_params=text_params), DTYPES[dtype]
        mesh = sharding.data_mesh(jax.local_devices())
        self._batch = batch * mesh.size
        self._by_batch = sharding.batch_sharding(mesh, self._batch)
        self._params = jax.device_put(pipeline.vae_params, sharding.replicated(mesh))
        self._encode = _encoder(pipeline.vae, compute_dtype)

    def __call__(
        self, clips: Iterable[tuple[Item, Bucket | None, np.ndarray | str]], advance: Callable[[int], None]
    ) -> tuple[list[Record], dict[str, str]]:
        """Returns the records of a shard in the order of its items, and what was left out.

        Args:
            clips: (item, bucket, clip), or (item, None, reason) for what can't be read.
            advance: called with the number of items that are through.
        """
        waiting: dict[Bucket, list[tuple[Item, np.ndarray]]] = collections.defaultdict(list)
        latents: dict[str, np.ndarray] = {}
        items, bad = [], {}
        for item, bucket, clip in clips:
            items.append(item)
            if bucket is None:
                bad[item.key] = str(clip)
            else:
                waiting[bucket].append((item, clip))
                if len(waiting[bucket]) == self._batch:
                    latents |= self._latents(waiting.pop(bucket))
            advance(len(latents) + len(bad))
        for bucket in list(waiting):
            latents |= self._latents(waiting.pop(bucket))
            advance(len(latents) + len(bad))
        broken = [key for key, value in latents.items() if not is_finite(value)]
        bad |= dict.fromkeys(broken, "its latents hold NaN or infinity; is build_data.compute_dtype=float32 better?")
        good = [item for item in items if item.key not in bad]
        texts = self._texts([item.caption for item in good])
        records = [Record(i.key, i.caption, latents[i.key], text) for i, text in zip(good, texts)]
        return records, bad

    def _latents(self, group: list[tuple[Item, np.ndarray]]) -> dict[str, np.ndarray]:
        index = np.minimum(np.arange(self._batch), len(group) - 1)  # the last batch is filled up
        video = jax.device_put(np.stack([group[i][1] for i in index]), self._by_batch)
        found = np.asarray(self._encode(self._params, video)).astype(self._dtype)
        return {item.key: found[i] for i, (item, _) in enumerate(group)}

    def _texts(self, captions: Sequence[str]) -> list[np.ndarray]:
        if not captions:
            return []
        text, count = (np.asarray(x) for x in generation.text_context(self._pipeline, captions))
        return [own[: int(rows[:-1].sum())].astype(self._dtype) for own, rows in zip(text, count)]


@functools.lru_cache(maxsize=1)
def _encoder(config: VAEConfig, compute_dtype: str) -> Callable[..., jax.Array]:
    """Returns encode(params, uint8 videos) -> normalised latents, float32; jitted."""
    vae = WanVAE(config, jnp.dtype(compute_dtype))

    @jax.jit
    def encode(params, video):
        mean, _ = encode_chunked(vae, params, video.astype(jnp.float32) / 127.5 - 1)
        return config.normalize(mean.astype(jnp.float32))

    return encode


def _settings(config) -> ConfigDict:
    """Returns what decides on the result: all but which process this is, and its threads."""
    section = {k: v for k, v in config.build_data.items() if k not in ("process", "processes", "threads")}
    return ConfigDict({"seed": config.seed, "build_data": {"weights": config.model.weights, **section}})


def _items(cfg, buckets: list[Bucket], seed: int) -> tuple[list[Item], dict[str, str]]:
    """Returns what is to be encoded, in order, and what is left out from the start."""
    if not buckets:
        raise UserError("build_data.buckets is empty; give at least one, such as 81x480x832")
    if cfg.videos:
        videos, skipped = find_videos(cfg.videos, cfg.captions)

        def reader(path: Path):
            return lambda: read_clip(path, buckets, cfg.fps, cfg.enlarge)

        return [Item(v.key, v.caption, reader(v.path)) for v in videos], skipped
    if cfg.captions:
        raise UserError("build_data.captions needs the videos they belong to: set --config.build_data.videos")
    if cfg.shapes < 1:
        raise UserError("nothing to encode: set --config.build_data.videos to a folder of videos with captions")
    wide = [str(b) for b in buckets if b.height != b.width]
    if wide:
        raise UserError(f"moving shapes are square, but build_data.buckets has {wide[0]}; use such as 33x128x128")
    return [_scene(i, buckets[i % len(buckets)], seed) for i in range(cfg.shapes)], {}


def _scene(number: int, bucket: Bucket, seed: int) -> Item:
    rng = np.random.default_rng((seed, number))
    scene = shapes.sample_scene(rng, "train", TWO_THINGS)
    placement = shapes.place(scene, rng, bucket.frames, bucket.height)

    def clip() -> tuple[Bucket, np.ndarray]:
        return bucket, np.asarray(_render(placement, bucket.frames, bucket.height))

    return Item(f"scene {number:06d}", scene.prompt, clip)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _render(placement: shapes.Placement, frames: int, size: int) -> jax.Array:
    video = shapes.render(placement, frames=frames, size=size)
    return jnp.round((video + 1) * 127.5).astype(jnp.uint8)


def _clips(items: Sequence[Item], threads: int) -> Iterator[tuple[Item, Bucket | None, np.ndarray | str]]:
    """Reads clips in threads, a few ahead of the encoder, and yields them in order."""

    def read(item: Item):
        try:
            return item, *item.clip()
        except UserError as error:
            return item, None, str(error)

    threads = max(threads, 1)
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        ahead: collections.deque = collections.deque()
        for item in items:
            ahead.append(pool.submit(read, item))
            if len(ahead) > 2 * threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
