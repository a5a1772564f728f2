"""Samples videos of prompts with the teacher or the finished hybrid."""

import re
import zlib
from pathlib import Path

import jax
import numpy as np

from hybrid_dit import generation, pictures
from hybrid_dit.convert.pipeline import load_pipeline, load_pipeline_config, load_transformer
from hybrid_dit.data.prompts import read_prompts
from hybrid_dit.errors import UserError
from hybrid_dit.progress import Progress
from hybrid_dit.video_io import write_mp4
from hybrid_dit.workdir import Stage, is_done, require

VARIANTS = ("teacher", "finetuned")
_WHICH = ("prompt", "prompts", "names", "first", "samples")  # settings that decide which videos, not how they look


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
    _remove_interrupted(videos)
    todo = [
        (name, prompt, i)
        for name, prompt in prompts.items()
        for i in range(cfg.samples)
        if not (videos / f"{generation.file_stem(name, i)}.mp4").is_file()
    ]
    total = len(prompts) * cfg.samples
    print(f"sample: {total} videos with the {cfg.variant}, {total - len(todo)} of them in {videos} already")
    if not todo:
        return

    pipeline = load_pipeline(model.weights)
    attention, params = pipeline.attention, pipeline.dit
    if tuned is not None:
        _, attention, params = load_transformer(tuned / "transformer")
    numerics = model.compute_dtype, model.attention_backend
    generator = generation.Generator(pipeline, cfg.sampler, cfg.sample_steps, cfg.guidance, *numerics)
    Stage(workdir, stage, settings)

    texts = list(dict.fromkeys(prompt for _, prompt, _ in todo))
    context = generation.text_context(pipeline, [*texts, model.negative_prompt])
    negative = jax.tree.map(lambda a: a[-1:], context)
    params, key = jax.device_put(params), generation.noise_key(config.seed)
    progress = Progress("sample", len(todo) * cfg.sample_steps)
    for start in range(0, len(todo), cfg.batch):
        part = todo[start : start + cfg.batch]
        count = len(part)
        padded = [part[min(j, count - 1)] for j in range(cfg.batch)]  # one shape, hence one compiled program
        noise = np.concatenate([_noise(key, shape, name, i) for name, _, i in padded])
        rows = np.array([texts.index(prompt) for _, prompt, _ in padded])
        latents, _ = generator.denoise(
            attention,
            params,
            noise,
            jax.tree.map(lambda a, rows=rows: a[rows], context),
            negative,
            key=jax.random.fold_in(key, start),
            on_step=lambda n, start=start, count=count: progress.update(start * cfg.sample_steps + n * count),
        )
        for (name, prompt, i), video in zip(part, generator.decode(latents)[0]):
            stem = generation.file_stem(name, i)
            pictures.contact_sheet(sheets / f"{stem}.png", {f"sample {i}": video}, title=prompt, fps=cfg.fps)
            write_mp4(videos / f"{stem}.mp4", video, cfg.fps)  # last: this file says that the video is finished
    print(f"sample: videos in {videos}, strips of frames in {sheets}")


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


def _noise(key, shape: tuple[int, ...], name: str, i: int):
    return generation.noise_for(jax.random.fold_in(key, i), shape, [zlib.crc32(name.encode())])


def _settings(config):
    """Returns the config without what only says which videos are wanted: asking for more is not another setting."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        for name in _WHICH:
            del config.sample[name]
    return config


def _remove_interrupted(videos: Path) -> None:
    """Deletes unfinished files of a killed run: VBench takes everything in the folder for a video."""
    for file in videos.glob(".*.mp4"):
        if re.fullmatch(r"\.[0-9a-f]{32}\.mp4", file.name):
            file.unlink()
