"""What surgery costs and saves: videos of held-out prompts from the same noise, before and after every stage."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import jax
import numpy as np

from hybrid_dit import cost, fidelity, generation, pictures, surgery
from hybrid_dit.atomic import atomic_path, write_json, write_text
from hybrid_dit.convert.files import read_json
from hybrid_dit.convert.pipeline import Pipeline, load_pipeline, load_transformer
from hybrid_dit.data.prompts import read_prompts
from hybrid_dit.data.shapes import Scene, parse_prompt
from hybrid_dit.errors import UserError
from hybrid_dit.evaluation import Sampled, summarise, to_csv, to_table, velocity_csv
from hybrid_dit.ops.spec import AttentionSpec
from hybrid_dit.progress import Progress
from hybrid_dit.surgery_io import CHOICE_FILE, MAPS_FILE, load_choice, load_maps, specs_from_config
from hybrid_dit.video_io import write_mp4
from hybrid_dit.workdir import Stage, is_done, require

PROBE = int.from_bytes(b"prob")  # tells the noise at which velocities are compared from that of the videos
NORMS = ("l1", "l2")
VARIANTS = ("teacher", "undistilled", "distilled", "finetuned")


def run(config, workdir: Path) -> None:
    """Prints the table, and writes to `evaluate/`: results.json and .csv, velocity.csv and .png, videos/, sheets/."""
    prompts = held_out(config)
    folders = {name: require(workdir, name, config) for name in ("distill", "select", "finetune")}
    if not is_done(workdir, "evaluate", config):
        measure(config, workdir, prompts, folders)
    folder = workdir / "evaluate"
    print(to_table(read_json(folder / "results.json")))
    print(f"videos, sheets and results: {folder}")


def measure(config, workdir: Path, prompts: list[str], folders: Mapping[str, Path]) -> None:
    """Samples all variants and writes everything.

    Args:
        config: of the run.
        workdir: of the run.
        prompts: to sample.
        folders: of the stages distill, select and finetune.
    """
    model, cfg = config.model, config.evaluate
    pipeline = load_pipeline(model.weights)
    shape = generation.latent_shape(pipeline.wan, pipeline.vae, model.frames, model.height, model.width)
    numerics = model.compute_dtype, model.attention_backend
    generator = generation.Generator(pipeline, cfg.sampler, cfg.sample_steps, cfg.guidance, *numerics)
    stage = Stage(workdir, "evaluate", config)
    variants = load_variants(config, pipeline, folders)
    sampled = sample_all(config, generator, pipeline, variants, prompts, shape, stage.folder / "cache")
    flops = attention_flops(pipeline, shape, sampled, generator.forwards)
    results = {
        "machine": f"{jax.device_count()} x {jax.devices()[0].device_kind}, jax {jax.__version__}",
        "videos": len(prompts),
        "sampler": f"{cfg.sampler}, {cfg.sample_steps} steps, guidance {cfg.guidance:g}",
        "variants": summarise(sampled, scenes_of(prompts, model), flops),
    }
    progress = Progress("evaluate: videos and sheets", len(prompts), "prompt")
    for i, prompt in enumerate(prompts):
        stem = generation.file_stem(prompt, i)
        sheet = stage.folder / "sheets" / f"{stem}.png"  # written last; there if an interrupted run came this far
        if not sheet.is_file():
            for name, result in sampled.items():
                write_mp4(stage.folder / "videos" / name / f"{stem}.mp4", result.videos[i])
            pictures.contact_sheet(sheet, {name: r.videos[i] for name, r in sampled.items()}, title=prompt)
        progress.update(i + 1)
    write_text(stage.folder / "results.csv", to_csv(results))
    if cfg.velocity_steps:
        write_text(stage.folder / "velocity.csv", velocity_csv(results))
        draw_velocity_errors(stage.folder / "velocity.png", results)
    write_json(stage.folder / "results.json", results)
    for left in stage.folder.rglob(".partial-*"):  # by a run that was killed
        left.unlink()
    stage.finish()


def held_out(config) -> list[str]:
    """Returns the prompts to evaluate on.

    Raises:
        UserError: none are wanted, or there are fewer.
    """
    cfg = config.evaluate
    if cfg.prompts < 1 or cfg.batch < 1 or cfg.velocity_steps < 0:
        raise UserError(
            f"evaluate.prompts={cfg.prompts} and evaluate.batch={cfg.batch} must be at least 1, "
            f"evaluate.velocity_steps={cfg.velocity_steps} at least 0 (0 compares no velocities)"
        )
    prompts = read_prompts(config.prompts.held_out)
    if len(prompts) < cfg.prompts:
        raise UserError(f"evaluate.prompts={cfg.prompts}, but {config.prompts.held_out} has {len(prompts)} prompts")
    return prompts[: cfg.prompts]


def scenes_of(prompts: Sequence[str], model) -> list[Scene] | None:
    """Returns what the videos should show, or None if a prompt is no moving-shapes sentence or videos don't suit."""
    if model.height != model.width or model.frames < 5:  # what `scoring` reads
        return None
    try:
        return [parse_prompt(prompt) for prompt in prompts]
    except UserError:
        return None


def load_variants(
    config, pipeline: Pipeline, folders: Mapping[str, Path]
) -> Iterator[tuple[str, tuple[AttentionSpec, ...], dict]]:
    """Yields (name, attention, parameters) of every variant, one at a time: real models fill the memory.

    Args:
        config: of the run.
        pipeline: the teacher's.
        folders: of the stages distill, select and finetune.
    """
    yield "teacher", pipeline.attention, pipeline.dit
    choice, specs = load_choice(folders["select"] / CHOICE_FILE), specs_from_config(config.distill)
    for name, file in (("undistilled", "undistilled.safetensors"), ("distilled", MAPS_FILE)):
        yield name, *surgery.assemble(pipeline.dit, load_maps(folders["distill"] / file), choice, specs)
    yield "finetuned", *load_transformer(folders["finetune"] / "transformer")[1:]


def sample_all(config, generator: generation.Generator, pipeline: Pipeline, variants, prompts, shape, cache: Path):
    """Samples every variant from the same noise; returns {variant: Sampled}.

    Each batch is kept in `cache` when it is finished, so that an interrupted evaluation goes on from there. Batches
    are the same in every run, the last one filled up to the common size. Velocities, guidance included, are compared
    at the teacher's latents with fresh noise, so that all variants are asked about the same inputs.
    """
    size = config.evaluate.batch
    starts = range(0, len(prompts), size)
    context = generation.text_context(pipeline, [*prompts, config.model.negative_prompt])
    negative = jax.tree.map(lambda a: a[-1:], context)
    key, steps = generation.noise_key(config.seed), config.evaluate.sample_steps
    files = {name: [cache / f"{name}_{start:05d}.npz" for start in starts] for name in VARIANTS}
    total = len(VARIANTS) * len(starts) * steps
    done = steps * sum(file.is_file() for group in files.values() for file in group)
    progress = Progress("evaluate", total, start=done)
    times = fidelity.probe_times(generator.sampler.schedule.timesteps, config.evaluate.velocity_steps)
    attentions, velocities = {}, {}
    for name, attention, params in variants:
        attentions[name] = attention
        if all(file.is_file() for file in files[name]):
            continue
        params, progress.label = jax.device_put(params), f"evaluate, {name}"
        if attention not in velocities:  # compiled once per attention
            velocities[attention] = jax.jit(generator.velocity(attention))
        for i, (start, file) in enumerate(zip(starts, files[name])):
            if file.is_file():
                continue
            index = np.minimum(np.arange(start, start + size), len(prompts) - 1)
            texts = jax.tree.map(lambda a, rows=index: a[rows], context)
            both = texts if generator.guidance == 1 else (texts, negative)
            latents, denoise = generator.denoise(
                attention,
                params,
                generation.noise_for(key, shape, index.tolist()),
                texts,
                negative,
                key=jax.random.fold_in(key, start),
                on_step=lambda n, before=done: progress.update(before + n),
            )
            done += steps
            videos, decode = generator.decode(latents)
            compared = {}
            if len(times):
                again = generation.noise_for(jax.random.fold_in(key, PROBE), shape, index.tolist())
                ask = partial(
                    fidelity.velocities, velocities[attention], params, noise=again, times=times, context=both
                )
                compared = compare_velocities(ask, latents, None if name == "teacher" else files["teacher"][i])
            with atomic_path(file) as temporary, open(temporary, "wb") as out:
                real = len(prompts) - start
                errors = {norm: values[:, :real] for norm, values in compared.items() if norm in NORMS}
                arrays = {"videos": videos[:real], "denoise": denoise / size, "decode": decode / size}
                np.savez_compressed(out, **arrays, **(compared | errors))
    sampled = {}
    for name, attention in attentions.items():
        parts = [load(file, skip=("latents", "velocities")) for file in files[name]]
        seconds = {what: float(np.median([part[what] for part in parts])) for what in ("denoise", "decode")}
        errors = {norm: np.concatenate([p[norm] for p in parts], axis=1) for norm in NORMS if norm in parts[0]}
        videos = np.concatenate([part["videos"] for part in parts])
        sampled[name] = Sampled(videos, attention=attention, times=times, errors=errors, **seconds)
    return sampled


def compare_velocities(
    ask: Callable[..., np.ndarray], latents: jax.Array, teacher: Path | None
) -> dict[str, np.ndarray]:
    """Returns what a batch's file in the cache says of velocities.

    Args:
        ask: latents -> velocities at all timesteps.
        latents: of the variant's own videos.
        teacher: the teacher's file for the same batch; None: this is the teacher.
    """
    if teacher is None:
        return {"latents": np.asarray(latents), "velocities": ask(latents)}
    there = load(teacher)
    return fidelity.relative_errors(ask(there["latents"]), there["velocities"])


def load(file: Path, skip: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """Returns the arrays of a batch in the cache, without those named in `skip`."""
    with np.load(file) as arrays:
        return {name: arrays[name] for name in arrays.files if name not in skip}


def draw_velocity_errors(path: Path, results: Mapping) -> None:
    """Draws the relative L1 error of the velocity by timestep, one curve per variant."""
    curves = {}
    for name, row in results["variants"].items():
        errors = row["velocity_error"]
        if "l1" in errors:
            curves[name] = (errors["timesteps"], errors["l1"])
    label = "relative L1 error of the velocity"
    title = "Velocity against the teacher's at the same noisy latents"
    pictures.interval_curves(path, curves, "timestep (1000: noise)", label, title)


def attention_flops(pipeline: Pipeline, shape, sampled: Mapping[str, Sampled], forwards: int) -> dict[str, int]:
    """Returns the FLOPs of all self-attention cores (φ included) in making one video, for every variant."""
    wan = pipeline.wan
    sizes = cost.Shape(
        dim=wan.dim, heads=wan.num_heads, ffn=wan.ffn_dim, blocks=wan.num_layers, tokens=math.prod(wan.grid(shape))
    )

    def video(attention: tuple[AttentionSpec, ...]) -> int:
        specs = attention or (AttentionSpec(),) * wan.num_layers
        return forwards * sum(cost.attention_flops(sizes, spec) for spec in specs)

    return {name: video(result.attention) for name, result in sampled.items()}
