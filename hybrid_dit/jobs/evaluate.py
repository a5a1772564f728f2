"""What surgery costs and saves: videos of held-out prompts from the same noise, before and after every stage."""

import csv
import dataclasses
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from hybrid_dit import cost, generation, pictures, scoring, surgery
from hybrid_dit.atomic import atomic_path, write_json, write_text
from hybrid_dit.convert.files import read_json
from hybrid_dit.convert.pipeline import Pipeline, load_pipeline, load_transformer
from hybrid_dit.data.prompts import read_prompts
from hybrid_dit.data.shapes import Scene, parse_prompt
from hybrid_dit.errors import UserError
from hybrid_dit.metrics import bootstrap_interval
from hybrid_dit.ops.spec import AttentionSpec
from hybrid_dit.progress import Progress
from hybrid_dit.surgery_io import CHOICE_FILE, MAPS_FILE, load_choice, load_maps, specs_from_config
from hybrid_dit.video_io import write_mp4
from hybrid_dit.workdir import Stage, is_done, require

VARIANTS = ("teacher", "undistilled", "distilled", "finetuned")


@dataclasses.dataclass(frozen=True)
class Sampled:
    """A variant's videos and what they took.

    Attributes:
        videos: uint8 [n, t, y, x, 3], as the VAE gave them (H.264 would cost score).
        denoise: seconds per video.
        decode: seconds per video.
        attention: one spec per block.
    """

    videos: np.ndarray
    denoise: float
    decode: float
    attention: tuple[AttentionSpec, ...]


def run(config, workdir: Path) -> None:
    """Writes `results.json`, `results.csv`, `videos/<variant>/*.mp4` and `sheets/*.png`; prints the table."""
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
    write_json(stage.folder / "results.json", results)
    stage.finish()


def held_out(config) -> list[str]:
    """Returns the prompts to evaluate on.

    Raises:
        UserError: none are wanted, or there are fewer.
    """
    cfg = config.evaluate
    if cfg.prompts < 1 or cfg.batch < 1:
        raise UserError(f"evaluate.prompts={cfg.prompts} and evaluate.batch={cfg.batch} must be at least 1")
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
    are the same in every run, the last one filled up to the common size.
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
    attentions = {}
    for name, attention, params in variants:
        attentions[name] = attention
        if all(file.is_file() for file in files[name]):
            continue
        params, progress.label = jax.device_put(params), f"evaluate, {name}"
        for start, file in zip(starts, files[name]):
            if file.is_file():
                continue
            index = np.minimum(np.arange(start, start + size), len(prompts) - 1)
            latents, denoise = generator.denoise(
                attention,
                params,
                generation.noise_for(key, shape, index.tolist()),
                jax.tree.map(lambda a, rows=index: a[rows], context),
                negative,
                key=jax.random.fold_in(key, start),
                on_step=lambda n, before=done: progress.update(before + n),
            )
            done += steps
            videos, decode = generator.decode(latents)
            with atomic_path(file) as temporary, open(temporary, "wb") as out:
                videos = videos[: len(prompts) - start]
                np.savez_compressed(out, videos=videos, denoise=denoise / size, decode=decode / size)
    sampled = {}
    for name, attention in attentions.items():
        parts = [dict(np.load(file)) for file in files[name]]
        seconds = {what: float(np.median([part[what] for part in parts])) for what in ("denoise", "decode")}
        sampled[name] = Sampled(np.concatenate([part["videos"] for part in parts]), attention=attention, **seconds)
    return sampled


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


def summarise(sampled: Mapping[str, Sampled], scenes: Sequence[Scene] | None, flops: Mapping[str, int]) -> dict:
    """Returns the numbers of every variant; intervals are [mean, low, high] (95%, bootstrap over the videos).

    Args:
        sampled: all variants, the teacher first.
        scenes: what the videos should show, to score them; None reports likeness to the teacher's videos alone.
        flops: attention FLOPs per video.
    """
    teacher = sampled["teacher"]
    results, teacher_total = {}, None
    for name, result in sampled.items():
        row = {"blocks": [spec.label for spec in result.attention] or "softmax everywhere"}
        if scenes is not None:
            scores = scoring.score_batch(result.videos, scenes)
            teacher_total = scores["total"] if teacher_total is None else teacher_total
            row["score"] = _interval(scores["total"])
            row["score_minus_teacher"] = _interval(scores["total"] - teacher_total)
            row["score_of_each_video"] = [round(float(x), 2) for x in scores["total"]]
            row["parts"] = {part: round(float(values.mean()), 2) for part, values in scores.items() if part != "total"}
        row["psnr_to_teacher"] = None if name == "teacher" else _interval(psnr(result.videos, teacher.videos))
        row["seconds_denoise"] = round(result.denoise, 4)
        row["seconds_decode"] = round(result.decode, 4)
        row["attention_flops"] = flops[name]
        row["attention_flops_saved"] = round(1 - flops[name] / flops["teacher"], 4)
        results[name] = row
    return results


def psnr(videos: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Returns 10 log10(255² / mean squared error) of every uint8 video [n, t, y, x, 3], float64; 100 dB at most."""
    pairs = zip(videos, reference)  # one by one: float copies of all of them may not fit
    error = np.array([np.square(a.astype(np.float32) - b).mean(dtype=np.float64) for a, b in pairs])
    return 10 * np.log10(255**2 / np.maximum(error, 255**2 * 1e-10))  # a limit, so that means of equal videos exist


def to_table(results: Mapping) -> str:
    """Returns the results as an aligned text table."""
    rows = [["", "score", "minus teacher", "PSNR to teacher", "denoise", "decode", "attention FLOPs", "saved"]]
    for name, row in results["variants"].items():
        rows.append(
            [
                name,
                _show(row.get("score")),
                "" if name == "teacher" else _show(row.get("score_minus_teacher")),
                "" if name == "teacher" else _show(row["psnr_to_teacher"], " dB"),
                f"{row['seconds_denoise']:.2f} s",
                f"{row['seconds_decode']:.2f} s",
                f"{row['attention_flops']:.3g}",
                f"{row['attention_flops_saved']:.1%}",
            ]
        )
    kept = [c for c in range(len(rows[0])) if c == 0 or any(row[c] for row in rows[1:])]  # no scores, no column
    widths = [max(len(row[c]) for row in rows) for c in kept]
    lines = ["  ".join(row[c].ljust(w) for c, w in zip(kept, widths)).rstrip() for row in rows]
    hybrid = results["variants"]["finetuned"]["blocks"]
    return "\n".join(
        [
            f"{results['videos']} videos per variant, same noise: {results['sampler']}, on {results['machine']}",
            "seconds and FLOPs are per video",
            *lines,
            "[low, high]: 95% bootstrap interval over the videos",
            f"blocks of the hybrid: {hybrid if isinstance(hybrid, str) else ' '.join(hybrid)}",
        ]
    )


def to_csv(results: Mapping) -> str:
    """Returns one line per variant; an interval is three columns."""
    rows = []
    for name, row in results["variants"].items():
        line = {"variant": name}
        for what in ("score", "score_minus_teacher", "psnr_to_teacher"):
            mean, low, high = row.get(what) or (None,) * 3
            line |= {what: mean, f"{what}_low": low, f"{what}_high": high}
        line |= {k: row[k] for k in ("seconds_denoise", "seconds_decode", "attention_flops", "attention_flops_saved")}
        rows.append(line | row.get("parts", {}))
    out = io.StringIO()
    writer = csv.DictWriter(out, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _interval(values: np.ndarray) -> list[float | None]:
    """Returns [mean, low, high]; one video has no interval."""
    if len(values) < 2:
        return [round(float(values[0]), 2), None, None]
    return [round(x, 2) for x in bootstrap_interval(values)]


def _show(interval: Sequence[float | None] | None, unit: str = "") -> str:
    if interval is None:
        return ""
    mean, low, high = interval
    return f"{mean:.1f}{unit}" + ("" if low is None else f" [{low:.1f}, {high:.1f}]")
