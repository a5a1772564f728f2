"""Samples videos of prompts with the teacher or the finished hybrid."""

import itertools
import os
import shutil
import zlib
from functools import partial
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding

from hybrid_dit import generation, pictures, processes, sample_loading, sharding
from hybrid_dit.convert import sources
from hybrid_dit.convert.pipeline import find, load_pipeline_config
from hybrid_dit.data.prompts import read_prompts
from hybrid_dit.errors import UserError
from hybrid_dit.progress import Progress
from hybrid_dit.video_io import write_mp4
from hybrid_dit.workdir import Stage, is_done, require

VARIANTS = ("teacher", "finetuned")
# Settings that decide which videos are made, or how fast, not how they look.
_FREE = ("prompt", "prompts", "names", "first", "samples", "batch", "sequential", "windows")


def run(config, workdir: Path) -> None:
    """Writes `sample_<variant>/videos/{prompt}-{i}.mp4`, i = 0.., and for each a strip of its frames in `sheets/`.

    Finished videos are not sampled again. A video's noise depends on the seed, its prompt's name and i alone: the same
    prompt in another list, or with the other variant, starts from the same noise.
    """
    cfg = config.sample
    if cfg.variant not in VARIANTS:
        raise UserError(f"sample.variant={cfg.variant!r} is unknown; choose one of {', '.join(VARIANTS)}")
    if cfg.batch < 1 or cfg.samples < 1 or cfg.first < 0:
        raise UserError("sample.batch and sample.samples must be at least 1, sample.first at least 0 (0 means all)")
    prompts = wanted(cfg)
    model = config.model
    shape = generation.latent_shape(*load_pipeline_config(model.weights), model.frames, model.height, model.width)
    tuned = require(workdir, "finetune", config) if cfg.variant == "finetuned" else None
    stage, settings = f"sample_{cfg.variant}", _settings(config)
    is_done(workdir, stage, settings)  # other settings are told before weights are read
    videos, sheets = workdir / stage / "videos", workdir / stage / "sheets"
    # VBench takes everything in the folder of videos for one, hidden files too: only finished ones are moved there.
    unfinished = workdir / stage / "unfinished"
    wanted_videos = [(name, prompt, i) for name, prompt in prompts.items() for i in range(cfg.samples)]
    missing = processes.on_main(_missing, videos, wanted_videos)
    todo = list(itertools.compress(wanted_videos, missing))
    total = len(wanted_videos)
    print(f"sample: {total} videos with the {cfg.variant}, {total - len(todo)} of them in {videos} already")
    if not todo:
        return

    mesh = sample_loading.sampling_mesh(cfg)
    generator = make_generator(config, mesh)
    Stage(workdir, stage, settings)
    texts = [*dict.fromkeys(prompt for _, prompt, _ in todo), model.negative_prompt]
    text = sample_loading.encode_texts(model.weights, workdir / stage / "text", texts)
    source = find(model.weights).parts["transformer"] if tuned is None else tuned / "transformer"
    part = sources.open_part(source, "transformer")
    params = sample_loading.load_dit(part, mesh, model.compute_dtype)

    whole = sharding.replicated(mesh)
    key = generation.noise_key(config.seed)
    start_from = jax.jit(
        partial(generation.named_noise, key, shape), out_shardings=(sample_loading.by_video(mesh, cfg.batch), whole)
    )
    negative = place_text(text, [model.negative_prompt], whole)
    progress = Progress("sample", len(todo) * cfg.sample_steps)
    for start in range(0, len(todo), cfg.batch):
        videos_now = todo[start : start + cfg.batch]
        count = len(videos_now)
        padded = [videos_now[min(j, count - 1)] for j in range(cfg.batch)]  # one shape, hence one compiled program
        names, numbers = zip(*((zlib.crc32(name.encode()), i) for name, _, i in padded))
        noise, keys = start_from(np.uint32(names), np.uint32(numbers))
        latents, _ = generator.denoise(
            part.attention,
            params,
            noise,
            place_text(text, [prompt for _, prompt, _ in padded], whole),
            negative,
            key=keys,
            on_step=lambda n, start=start, count=count: progress.update(start * cfg.sample_steps + n * count),
        )
        for (name, prompt, i), video in zip(videos_now, generator.decode(latents)[0]):
            stem = generation.file_stem(name, i)
            if processes.is_main():  # every process has all videos
                pictures.contact_sheet(sheets / f"{stem}.png", {f"sample {i}": video}, title=prompt, fps=cfg.fps)
                write_mp4(unfinished / f"{stem}.mp4", video, cfg.fps)
                videos.mkdir(exist_ok=True)
                os.replace(unfinished / f"{stem}.mp4", videos / f"{stem}.mp4")  # last: the video is finished
    if processes.is_main():
        shutil.rmtree(unfinished, ignore_errors=True)  # with what killed runs left
    print(f"sample: videos in {videos}, strips of frames in {sheets}")


def make_generator(config, mesh) -> generation.Generator:
    """Returns what samples and decodes as a config's sections `model` and `sample` say, with the VAE's parameters."""
    cfg, model = config.sample, config.model
    return generation.Generator(
        sample_loading.load_vae(model.weights),
        cfg.sampler,
        cfg.sample_steps,
        cfg.guidance,
        model.compute_dtype,
        model.attention_backend,
        interval=cfg.interval,
        sequential=cfg.sequential,
        reuse=cfg.reuse,
        mesh=mesh,
        windows=cfg.windows,
        vae_dtype=cfg.vae_dtype,
    )


def place_text(text, prompts: list[str], whole: NamedSharding):
    """Returns the context of prompts, whole on every device."""
    context = jax.tree.map(np.asarray, text.context(prompts))
    return sharding.put(context, jax.tree.map(lambda _: whole, context))


def wanted(cfg) -> dict[str, str]:
    """Returns name -> prompt, in order; names are what files are called (VBench: the original of a rewritten prompt).

    Raises:
        UserError: no prompts, another number of names, or two prompts of one file name.
    """
    if cfg.prompt:
        prompts = [cfg.prompt]
    else:
        prompts = read_prompts(cfg.prompts) if cfg.prompts else []
        if not prompts:
            raise UserError("no prompts; set --config.sample.prompt or --config.sample.prompts to a file of them")
    names = read_prompts(cfg.names) if cfg.names else prompts
    if len(names) != len(prompts):
        raise UserError(f"sample.names has {len(names)} lines for {len(prompts)} prompts; give one for each")
    pairs = dict(zip(names, prompts))
    stems: dict[str, str] = {}
    for name, prompt in zip(names, prompts):
        stem = generation.file_stem(name, cfg.samples - 1)
        if pairs[name] != prompt or stems.setdefault(stem, name) != name:
            raise UserError(f"two prompts would both be written to {stem}.mp4; tell them apart with sample.names")
    return dict(list(pairs.items())[: cfg.first or None])


def _settings(config):
    """Returns the config without `_FREE`: asking for more videos is not another setting."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        for name in _FREE:
            del config.sample[name]
    return config


def _missing(videos: Path, wanted_videos: list[tuple[str, str, int]]) -> list[bool]:
    """Whether each video's file is not there."""
    return [not (videos / f"{generation.file_stem(name, i)}.mp4").is_file() for name, _, i in wanted_videos]
