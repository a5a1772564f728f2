"""Trains a small Wan pipeline from scratch on moving shapes: the VAE, then DiT and text encoder together.

This is not part of Attention Surgery; it makes the teacher that surgery operates on where no Wan weights are at hand.
"""

import dataclasses
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hybrid_dit import generation, pictures, scoring
from hybrid_dit.atomic import write_json
from hybrid_dit.convert import tables
from hybrid_dit.convert.files import Weights, read_json, write_safetensors
from hybrid_dit.convert.pipeline import Pipeline, save_pipeline
from hybrid_dit.data import shapes
from hybrid_dit.data.tokenizer import build_word_tokenizer
from hybrid_dit.flow import flow_matching_loss
from hybrid_dit.metrics import bootstrap_interval
from hybrid_dit.models import vae as vae_lib
from hybrid_dit.models.umt5 import UMT5Config, UMT5Encoder, encode_prompts
from hybrid_dit.models.vae import VAEConfig, WanVAE
from hybrid_dit.models.wan import WanConfig, WanDiT, pack_text
from hybrid_dit.progress import Progress
from hybrid_dit.sampling import guided, make_sampler, sample


def run(config, workdir: Path) -> None:
    """Trains, evaluates on held-out prompts and writes `workdir/wan-tiny` with `training.json` and `loss.png`.

    The VAE is kept in `workdir/vae`, so that a second run trains the DiT alone.
    """
    began = time.time()
    rng = np.random.default_rng(config.seed)
    vae_config, vae_params, vae_losses = train_vae_once(config, workdir / "vae", rng)
    print(f"VAE trained after {time.time() - began:.0f} s")
    scenes, latents, vae_config = make_latents(config, rng, vae_config, vae_params)
    print(f"{len(scenes)} videos encoded after {time.time() - began:.0f} s")
    pipeline, losses = train_dit(config, workdir, scenes, latents, vae_config, vae_params)
    print(f"DiT trained after {time.time() - began:.0f} s")
    # What users get is the stored precision, so that is what gets scored.
    folder = workdir / "wan-tiny"
    save_pipeline(folder, pipeline)
    record = {
        "seed": config.seed,
        "machine": f"{jax.device_count()} x {jax.devices()[0].device_kind}, jax {jax.__version__}",
        "config": config.to_dict(),
        "scores": evaluate(config, pipeline),
        "vae_scores_on_truth": score_vae(config, vae_config, vae_params),
        "seconds": round(time.time() - began),
        "loss": {"step": [int(s) for s, _ in losses], "value": [round(float(v), 5) for _, v in losses]},
        "vae_loss": {"step": [int(s) for s, _ in vae_losses], "value": [round(float(v), 5) for _, v in vae_losses]},
    }
    write_json(folder / "training.json", record)
    curves = {"DiT: flow matching": tuple(np.array(losses).T), "VAE: error + KL": tuple(np.array(vae_losses).T)}
    pictures.loss_curves(folder / "loss.png", curves)
    print(f"scores on held-out prompts: {record['scores']}")


def train_vae_once(config, folder: Path, rng: np.random.Generator):
    """`train_vae`, kept in `folder`: an interrupted job does not train it again."""
    file = folder / "vae.safetensors"
    if file.is_file():
        print(f"VAE of an earlier run: {file}")
        weights = Weights(file)
        params = tables.unflatten({name: weights.read(name) for name in weights.shapes})
        vae_config = VAEConfig(base_dim=config.vae.base_dim, num_res_blocks=config.vae.num_res_blocks)
        return vae_config, params, read_json(folder / "loss.json")["loss"]
    vae_config, params, losses = train_vae(config, rng)
    write_json(folder / "loss.json", {"loss": losses})
    write_safetensors(file, tables.flatten(params), {})
    return vae_config, params, losses


def train_vae(config, rng: np.random.Generator):
    """Returns (VAEConfig, params, [(step, loss)]).

    The loss is |x − x̂| + 2 (x − x̂)² per pixel, things weighted against the background, plus the KL term. Most steps
    see short, narrow clips around a thing, which are cheap and all foreground; the last ones see whole videos.
    """
    cfg = config.vae
    vae_config = VAEConfig(base_dim=cfg.base_dim, num_res_blocks=cfg.num_res_blocks)
    vae = WanVAE(vae_config, jnp.dtype(config.compute_dtype))
    params = vae_lib.init(vae_config, jax.random.key(config.seed))
    total = cfg.steps + cfg.whole_steps
    rate = cfg.learning_rate
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, total // 50 + 1, total, 0.02 * rate)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.99))

    def loss_fn(params, video, background, key):
        mean, logvar = (x.astype(jnp.float32) for x in vae.apply({"params": params}, video, method="encode"))
        latents = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
        out = vae.apply({"params": params}, latents, clip=False, method="decode").astype(jnp.float32)
        thing = jnp.abs(video - background[:, None, None, None]).max(axis=-1, keepdims=True) > 0.02
        error = (jnp.abs(out - video) + 2 * jnp.square(out - video)) * jnp.where(thing, cfg.thing_weight, 1.0)
        kl = 0.5 * (jnp.square(mean) + jnp.exp(logvar) - 1 - logvar).mean()
        return error.mean() + cfg.kl * kl

    @partial(jax.jit, donate_argnums=0, static_argnums=(3, 4))
    def chunk(state, placements, key, frames, size):
        def step(state, inputs):
            params, opt = state
            placement, key = inputs
            video = shapes.render_batch(placement, frames=frames, size=size)
            loss, grads = jax.value_and_grad(loss_fn)(params, video, placement.background, key)
            updates, opt = tx.update(grads, opt, params)
            return (optax.apply_updates(params, updates), opt), loss

        return jax.lax.scan(step, state, (placements, jax.random.split(key, config.chunk)))

    state, losses = (params, tx.init(params)), []
    progress = Progress("VAE", total, every=10.0)
    for start in range(0, total, config.chunk):
        whole = start >= cfg.steps
        batch = cfg.whole_batch if whole else cfg.batch
        scenes = [shapes.sample_scene(rng, "train", config.two_objects) for _ in range(config.chunk * batch)]
        placements = shapes.place_batch(scenes, rng, config.frames, config.size)
        if not whole:
            placements = clip_around_thing(placements, rng, config.frames, cfg.frames, cfg.size)
        placements = jax.tree.map(lambda a, n=batch: a.reshape(config.chunk, n, *a.shape[1:]), placements)
        key = jax.random.fold_in(jax.random.key(config.seed), start)
        shape = (config.frames, config.size) if whole else (cfg.frames, cfg.size)
        state, values = chunk(state, placements, key, *shape)
        losses.append((start + config.chunk, float(values.mean())))
        progress.update(start + config.chunk, loss=losses[-1][1])
    return vae_config, jax.device_get(state[0]), losses


def clip_around_thing(placements: shapes.Placement, rng: np.random.Generator, frames: int, clip: int, size: int):
    """Returns the placements as seen by a window of `clip` frames and `size` pixels around a random thing's middle."""
    b = len(placements.present)
    first = rng.integers(0, frames - clip + 1, (b, 1, 1))
    start = placements.start + first * placements.velocity
    chosen = rng.integers(0, placements.present.sum(axis=1))
    middle = (start + placements.velocity * clip / 2)[np.arange(b), chosen]
    corner = middle - size / 2 + rng.uniform(-size / 4, size / 4, (b, 2))
    return placements._replace(start=(start - corner[:, None]).astype(np.float32))


def make_latents(config, rng: np.random.Generator, vae_config: VAEConfig, params, batch: int = 32):
    """Renders and encodes the training set; returns (scenes, normalised latents, VAEConfig with their statistics)."""
    encode = jax.jit(
        lambda params, placements: WanVAE(vae_config, jnp.dtype(config.compute_dtype)).apply(
            {"params": params},
            shapes.render_batch(placements, frames=config.frames, size=config.size),
            method="encode",
        )
    )
    scenes = [shapes.sample_scene(rng, "train", config.two_objects) for _ in range(config.dit.videos)]
    placements = shapes.place_batch(scenes, rng, config.frames, config.size)
    means, spread = [], []
    progress = Progress("encode", len(scenes), "video", every=10.0)
    for start in range(0, len(scenes), batch):
        part = jax.tree.map(lambda a, s=start: a[np.arange(s, s + batch) % len(scenes)], placements)
        mean, logvar = encode(params, part)
        means.append(mean[: len(scenes) - start].astype(jnp.bfloat16))
        spread.append(np.asarray(jnp.exp(logvar.astype(jnp.float32)).mean(axis=(0, 1, 2, 3))))
        progress.update(min(start + batch, len(scenes)))
    latents = jnp.concatenate(means)
    part = latents[:2000].astype(jnp.float32)
    mean, std = np.asarray(part.mean(axis=(0, 1, 2, 3))), np.asarray(part.std(axis=(0, 1, 2, 3)))
    share = std / np.sqrt(std**2 + np.mean(spread, axis=0))
    print(f"share of each latent channel's spread that the video decides: {np.round(share, 2)}")
    std = np.where(share > 0.1, std, 1.0)  # don't blow up channels that the KL term switched off
    vae_config = dataclasses.replace(
        vae_config,
        latents_mean=tuple(round(float(x), 4) for x in mean),
        latents_std=tuple(round(float(x), 4) for x in std),
    )
    normalize = jax.jit(lambda x: vae_config.normalize(x.astype(jnp.float32)).astype(jnp.bfloat16), donate_argnums=0)
    return scenes, normalize(latents), vae_config


def train_dit(config, workdir: Path, scenes, latents, vae_config: VAEConfig, vae_params):
    """Trains DiT and text encoder with flow matching; returns (Pipeline with the averaged weights, [(step, loss)])."""
    cfg = config.dit
    words = shapes.all_words()
    folder = workdir / "parts"
    tokenizer = build_word_tokenizer(words, folder / "tokenizer")
    text_config = UMT5Config(
        vocab_size=len(words) + 3,
        d_model=config.text.d_model,
        d_kv=config.text.d_model // config.text.num_heads,
        d_ff=config.text.d_ff,
        num_layers=config.text.num_layers,
        num_heads=config.text.num_heads,
    )
    wan = WanConfig(
        dim=cfg.dim,
        num_heads=cfg.num_heads,
        ffn_dim=cfg.ffn_dim,
        num_layers=cfg.num_layers,
        in_channels=vae_config.z_dim,
        text_dim=config.text.d_model,
    )
    ids, lengths = tokenizer([s.prompt for s in scenes], 64)
    ids = jnp.asarray(ids[:, : lengths.max()])
    empty_ids, empty_length = (jnp.asarray(x[0]) for x in tokenizer([""], ids.shape[1]))
    lengths = jnp.asarray(lengths)
    model = WanDiT(wan, dtype=jnp.dtype(config.compute_dtype))
    encoder = UMT5Encoder(text_config)

    key = jax.random.key(config.seed + 1)
    params = {
        "dit": jax.jit(model.init)(key, latents[:1] * 1.0, jnp.zeros(1), jnp.zeros((1, 1, wan.text_dim)))["params"],
        "text": jax.jit(encoder.init)(key, ids[:1], jnp.ones_like(ids[:1]))["params"],
    }
    print(f"parameters: DiT {count(params['dit']):,}, text {count(params['text']):,}, VAE {count(vae_params):,}")
    tx = make_optimizer(cfg)

    def loss_fn(params, key, latents, ids, lengths):
        key_drop, key_flow = jax.random.split(key)
        drop = jax.random.bernoulli(key_drop, cfg.drop_text, lengths.shape)
        ids = jnp.where(drop[:, None], empty_ids, ids)
        lengths = jnp.where(drop, empty_length, lengths)
        text = encode_prompts(encoder, params["text"], ids, lengths)
        context = pack_text(text, lengths, Pipeline.text_tokens)
        velocity = lambda x, t: model.apply({"params": params["dit"]}, x, t, *context)  # noqa: E731
        return flow_matching_loss(velocity, latents, key_flow, cfg.shift).mean()

    @partial(jax.jit, donate_argnums=0)
    def chunk(state, first, latents, ids, lengths):
        def step(state, i):
            params, ema, opt = state
            key_i = jax.random.fold_in(key, i)
            index = jax.random.randint(jax.random.fold_in(key_i, 0), (cfg.batch,), 0, latents.shape[0])
            batch = latents[index], ids[index], lengths[index]
            loss, grads = jax.value_and_grad(loss_fn)(params, jax.random.fold_in(key_i, 1), *batch)
            updates, opt = tx.update(grads, opt, params)
            params = optax.apply_updates(params, updates)
            ema = optax.incremental_update(params, ema, 1 - cfg.ema)
            return (params, ema, opt), loss

        return jax.lax.scan(step, state, first + jnp.arange(config.chunk))

    state, losses = (params, jax.tree.map(jnp.copy, params), tx.init(params)), []
    progress = Progress("DiT", cfg.steps, every=10.0)
    for start in range(0, cfg.steps, config.chunk):
        state, values = chunk(state, start, latents, ids, lengths)
        losses.append((start + config.chunk, float(values.mean())))
        progress.update(start + config.chunk, loss=losses[-1][1])
    ema = jax.device_get(state[1])
    pipeline = Pipeline(
        wan=wan,
        dit=ema["dit"],
        attention=(),
        vae=vae_config,
        vae_params=vae_params,
        text=text_config,
        text_params=ema["text"],
        tokenizer=tokenizer,
        tokenizer_folder=folder / "tokenizer",
        shift=cfg.shift,
    )
    return pipeline, losses


def make_optimizer(cfg) -> optax.GradientTransformation:
    """Muon for the matrices inside blocks and text encoder, Adam for all else; or AdamW for everything.

    Muon's updates are scaled to the size of Adam's (`consistent_rms`), so that one learning rate and decay serve both.
    """
    schedule = optax.warmup_cosine_decay_schedule(0.0, cfg.learning_rate, cfg.warmup, cfg.steps)
    clip = optax.clip_by_global_norm(cfg.clip)
    if cfg.optimizer == "adamw":
        return optax.chain(clip, optax.adamw(schedule, b2=0.99, weight_decay=cfg.weight_decay))

    def matrices(params):
        def one(path, x):
            names = [p.key for p in path]
            matrix = "blocks" in names and names[-1] == "kernel"
            return optax.contrib.MuonDimensionNumbers(x.ndim - 2, x.ndim - 1) if matrix else None

        return jax.tree_util.tree_map_with_path(one, params)

    muon = optax.contrib.muon(
        schedule,
        weight_decay=cfg.weight_decay,
        consistent_rms=0.2,
        adam_b2=0.99,
        adam_learning_rate=schedule,
        muon_weight_dimension_numbers=matrices,
    )
    return optax.chain(clip, muon)


def evaluate(config, pipeline: Pipeline, batch: int = 64) -> dict:
    """Scores videos of held-out prompts; returns {guidance scale: `summary`}."""
    rng = np.random.default_rng(config.seed + 2)
    scenes = [shapes.sample_scene(rng, "held_out", config.two_objects) for _ in range(config.eval.videos)]
    context = generation.text_context(pipeline, [s.prompt for s in scenes] + [""])
    shape = generation.latent_shape(pipeline.wan, pipeline.vae, config.frames, config.size, config.size)
    noise = generation.noise_for(jax.random.key(config.seed + 3), shape, range(len(scenes)))
    velocity = generation.make_velocity(pipeline.wan, dtype=jnp.dtype(config.compute_dtype))
    decode = jax.jit(partial(generation.decode_to_uint8, pipeline.vae))
    sampler = make_sampler("unipc", num_steps=config.eval.steps, shift=pipeline.shift)
    result = {}
    for guidance in config.eval.guidance:
        generate = jax.jit(partial(sample, guided(velocity, guidance), sampler))
        videos = []
        for start in range(0, len(scenes), batch):
            part = jax.tree.map(lambda a, s=start: a[: len(scenes)][s : s + batch], context)
            negative = jax.tree.map(lambda a: a[-1:], context)
            latents = generate(pipeline.dit, noise[start : start + batch], (part, negative))
            videos.append(np.asarray(decode(pipeline.vae_params, latents)))
        result[str(guidance)] = summary(scoring.score_batch(np.concatenate(videos), scenes))
        print(f"guidance {guidance}: {result[str(guidance)]}")
    return result


def score_vae(config, vae_config: VAEConfig, params, videos: int = 128, batch: int = 32) -> dict:
    """Scores ground truth after a pass through the VAE: how much the VAE alone costs."""
    rng = np.random.default_rng(config.seed + 4)
    scenes = [shapes.sample_scene(rng, "held_out", config.two_objects) for _ in range(videos)]
    placements = shapes.place_batch(scenes, rng, config.frames, config.size)

    @jax.jit
    def through(params, placements):
        truth = shapes.render_batch(placements, frames=config.frames, size=config.size)
        latents = generation.encode_video(vae_config, params, truth)
        return generation.decode_to_uint8(vae_config, params, latents)

    parts = [jax.tree.map(lambda a, s=s: a[s : s + batch], placements) for s in range(0, videos, batch)]
    return summary(scoring.score_batch(np.concatenate([np.asarray(through(params, p)) for p in parts]), scenes))


def summary(scores: dict[str, np.ndarray]) -> dict:
    """Means per attribute, and the total with its bootstrap interval."""
    total = bootstrap_interval(scores["total"])
    means = {name: round(float(np.mean(values)), 2) for name, values in scores.items() if name != "total"}
    return {**means, "total": [round(float(x), 2) for x in total]}


def count(params) -> int:
    """Number of parameters."""
    return sum(x.size for x in jax.tree.leaves(params))
