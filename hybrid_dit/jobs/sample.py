"""Samples videos of prompts with the teacher or the finished hybrid."""

import itertools
import os
import shutil
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding

from hybrid_dit import generation, pictures, processes, sample_loading, sharding
from hybrid_dit.atomic import write_json
from hybrid_dit.convert import sources
from hybrid_dit.convert.files import read_json
from hybrid_dit.convert.pipeline import find, load_pipeline_config
from hybrid_dit.data.prompts import read_prompts
from hybrid_dit.errors import UserError
from hybrid_dit.progress import Progress
from hybrid_dit.vbench import layout
from hybrid_dit.video_io import write_mp4
from hybrid_dit.workdir import Stage, is_done, require

VARIANTS = ("teacher", "finetuned")
# Settings that decide which videos are made, or how fast, not how they look.
_FREE = ("prompt", "prompts", "names", "first", "samples", "share", "batch", "sequential", "windows")


def run(config, workdir: Path) -> None:
    """Writes `sample_<variant>/videos/{prompt}-{i}.mp4`, i = 0.., and for each a strip of its frames in `sheets/`.

    With `suite.name`, writes what that suite expects to `sample_<variant>/<suite>/`, and no sheets. Finished videos are
    not sampled again. A video's noise depends on the seed, its prompt's name and i alone: the same prompt in another
    list, or with the other variant, starts from the same noise.
    """
    cfg = config.sample
    if cfg.variant not in VARIANTS:
        raise UserError(f"sample.variant={cfg.variant!r} is unknown; choose one of {', '.join(VARIANTS)}")
    if cfg.batch < 1 or cfg.samples < 1 or cfg.first < 0:
        raise UserError("sample.batch and sample.samples must be at least 1, sample.first at least 0 (0 means all)")
    if cfg.fps <= 0:
        raise UserError(f"sample.fps={cfg.fps} must be positive")
    everything = wanted_videos(config)
    mine = layout.of_share(everything, cfg.share)
    model = config.model
    shape = generation.latent_shape(*load_pipeline_config(model.weights), model.frames, model.height, model.width)
    tuned = require(workdir, "finetune", config) if cfg.variant == "finetuned" else None
    stage, settings = f"sample_{cfg.variant}", _settings(config)
    is_done(workdir, stage, settings)  # other settings are told before weights are read
    videos, sheets = workdir / stage / (config.suite.name or "videos"), workdir / stage / "sheets"
    # VBench takes everything in the folder of videos for one, hidden files too: only finished ones are moved there.
    own = "" if len(mine) == len(everything) else "_" + cfg.share.replace("/", "_of_")  # not cleared up by others
    unfinished = workdir / stage / f"unfinished{own}"
    record = workdir / stage / f"{videos.name}_texts.json"
    texts = processes.on_main(check_texts, record, videos, everything)
    todo = list(itertools.compress(mine, processes.on_main(_missing, videos, mine)))
    part_of = f" (share {cfg.share} of {len(everything):,})" if own else ""
    print(
        f"sample: {len(mine):,} videos{part_of} with the {cfg.variant}, {len(mine) - len(todo):,} in {videos} already"
    )
    if not todo:
        return

    mesh = sample_loading.sampling_mesh(cfg)
    generator = make_generator(config, mesh)
    Stage(workdir, stage, settings)
    processes.on_main(write_json, record, texts)
    prompts = [*dict.fromkeys(video.prompt for video in todo), model.negative_prompt]
    text = sample_loading.encode_texts(model.weights, workdir / stage / "text", prompts)
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
        names, numbers = zip(*((zlib.crc32(video.name.encode()), video.index) for video in padded))
        noise, keys = start_from(np.uint32(names), np.uint32(numbers))
        latents, _ = generator.denoise(
            part.attention,
            params,
            noise,
            place_text(text, [video.prompt for video in padded], whole),
            negative,
            key=keys,
            on_step=lambda n, start=start, count=count: progress.update(start * cfg.sample_steps + n * count),
        )
        for video, pixels in zip(videos_now, generator.decode(latents)[0]):
            if processes.is_main():  # every process has all videos
                if not config.suite.name:  # thousands of sheets would help nobody
                    sheet = sheets / Path(video.files[0]).with_suffix(".png")
                    strip = {f"sample {video.index}": pixels}
                    pictures.contact_sheet(sheet, strip, title=video.prompt, fps=cfg.fps)
                publish(pixels, unfinished, videos, video.files, cfg.fps)
    if processes.is_main():
        shutil.rmtree(unfinished, ignore_errors=True)  # with what killed runs left
    print(f"sample: videos in {videos}" + ("" if config.suite.name else f", strips of frames in {sheets}"))


def publish(pixels: np.ndarray, unfinished: Path, videos: Path, files: Sequence[str], fps: int | float) -> None:
    """Writes a video to all its places, the last step of each a rename: what is there is finished."""
    written, copy = unfinished / Path(files[0]).name, unfinished / "copy.mp4"
    write_mp4(written, pixels, fps)
    for file in files:
        shutil.copyfile(written, copy)
        (videos / file).parent.mkdir(parents=True, exist_ok=True)
        os.replace(copy, videos / file)
    written.unlink()


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


def wanted_videos(config) -> list[layout.Video]:
    """Returns all videos that the config asks for: those of its suite, or `wanted`."""
    if config.suite.name:
        return layout.videos_of(config.suite)
    return [
        layout.Video(name, prompt, i, (f"{generation.file_stem(name, i)}.mp4",))
        for name, prompt in wanted(config.sample).items()
        for i in range(config.sample.samples)
    ]


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


def check_texts(record: Path, videos: Path, wanted: Sequence[layout.Video]) -> dict[str, str]:
    """Returns file -> what the model was given, of videos in a folder or wanted in it whose text is not their name.

    Files keep the name of a rewritten prompt's original, so that only this tells with which text they were made.

    Args:
        record: JSON file of what this returned before; made when sampling begins.
        videos: the folder.
        wanted: all that will be in it.

    Raises:
        UserError: a video that is there was made with another text than is wanted now.
    """
    texts = {file: video.prompt for video in wanted for file in video.files if video.prompt != video.name}
    if not record.is_file():
        return texts
    before = read_json(record)
    for video in wanted:
        for file in video.files:
            if before.pop(file, video.name) != video.prompt and (videos / file).is_file():
                raise UserError(
                    f"{videos / file} was made with another text than is wanted now; set suite.rewritten or "
                    "sample.prompts as they were, use another --workdir, or delete that folder to make it anew"
                )
    return before | texts


def _settings(config):
    """Returns the config without `_FREE`: asking for more videos is not another setting."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        for name in _FREE:
            del config.sample[name]
    return config


def _missing(videos: Path, mine: list[layout.Video]) -> list[bool]:
    """Whether one of each video's files is not there."""
    return [not all((videos / file).is_file() for file in video.files) for video in mine]
