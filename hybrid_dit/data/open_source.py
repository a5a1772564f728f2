"""The training data that a config asks for."""

from pathlib import Path

import jax
import numpy as np

from hybrid_dit import generation
from hybrid_dit.convert.pipeline import Pipeline
from hybrid_dit.data.feed import DTYPES, Form, LatentSource
from hybrid_dit.data.library import Library
from hybrid_dit.data.read_csv import CsvLibrary
from hybrid_dit.data.read_parquet import ParquetLibrary
from hybrid_dit.data.read_tar import TarLibrary
from hybrid_dit.data.read_tfds import TfdsLibrary
from hybrid_dit.data.rendered import RenderedSource
from hybrid_dit.data.source import Source, Text, own_rows, pack
from hybrid_dit.errors import UserError
from hybrid_dit.pairs import rendered_pairs
from hybrid_dit.text_cache import TextCache

LIBRARIES: dict[str, type[Library]] = {cls.kind: cls for cls in (TfdsLibrary, ParquetLibrary, TarLibrary, CsvLibrary)}
UNFIT = " which the DiT's patches don't divide"
SCALES = {"auto": None, "normalised": False, "raw": True}


def open_source(
    config, pipeline: Pipeline, folder: Path, process: int | None = None, processes: int | None = None
) -> tuple[Source, Text]:
    """Returns the source of one process, and the empty prompt's text in the shape of its batches.

    Args:
        config: sections `data`, `finetune` and `model`, and the seed.
        pipeline: what the data is for; encodes the empty prompt (and rendered shapes).
        folder: for what is worth keeping: the index of a large set, text embeddings, rendered latents.
        process: index of this process's share; None: that of the process.
        processes: number of shares; None: one per process. (Processes that split the tokens of a sample share it.)

    Raises:
        UserError: no data, data that doesn't fit the model, or processes that see different data.
    """
    process = jax.process_index() if process is None else process
    processes = jax.process_count() if processes is None else processes
    data, batch = config.data, config.finetune.batch
    share = {"batch": batch, "seed": config.seed, "process": process, "processes": processes}
    if data.kind == "shapes":
        pairs, empty = _shapes(config, pipeline, folder)
        return RenderedSource(pairs, **share), Text(empty.text, empty.count)
    if data.kind not in LIBRARIES:
        raise UserError(f"--config.data.kind={data.kind!r} is unknown; choose one of shapes, {', '.join(LIBRARIES)}")
    for name, value, known in (("dtype", data.dtype, DTYPES), ("scale", data.scale, SCALES)):
        if value not in known:
            raise UserError(f"--config.data.{name}={value!r} is unknown; choose one of {', '.join(known)}")
    for name in ("text_rows", "max_bad", "threads", "ahead"):
        if data[name] < 0:
            raise UserError(f"--config.data.{name}={data[name]} must be at least 0")
    if not data.path:
        raise UserError(f"no data given: set --config.data.path to a folder of the kind {data.kind} (see docs/data.md)")
    if "://" in data.path:
        raise UserError(f"--config.data.path={data.path} is an address; mount it or copy it, and give the folder")
    library = LIBRARIES[data.kind](Path(data.path), pipeline.vae, folder / "data", SCALES[data.scale])
    _same_everywhere(library.index.digest())
    buckets = find_buckets(library, pipeline, data.buckets)
    form = Form(
        channels=pipeline.wan.in_channels,
        text_dim=pipeline.wan.text_dim,
        text_tokens=pipeline.text_tokens,
        rows=_text_rows(library, data.text_rows, pipeline.text_tokens),
        dtype=data.dtype,
    )
    source = LatentSource(library, buckets, form, **share, max_bad=data.max_bad, threads=data.threads, ahead=data.ahead)
    sizes = ", ".join(f"{len(members)} of {name}" for name, members in buckets.items())
    print(f"data: {sizes}; all of them take {source.steps} steps", flush=True)
    return source, _empty(pipeline, folder, form)


def find_buckets(library: Library, pipeline: Pipeline, wanted: tuple[str, ...]) -> dict[str, list[int]]:
    """Returns the samples of every shape, "FRAMESxHEIGHTxWIDTH" of the video -> numbers, sorted by name.

    Args:
        library: the data.
        pipeline: its DiT takes latents whose rows and columns its patches divide.
        wanted: names to keep; empty for all that the DiT takes.

    Raises:
        UserError: a wanted one isn't there, or none is left.
    """
    vae, patch = pipeline.vae, pipeline.wan.patch
    found: dict[str, list[int]] = {}
    for number, entry in enumerate(library.index.entries):
        t, y, x = entry.shape
        name = f"{(t - 1) * vae.temporal_stride + 1}x{y * vae.spatial_stride}x{x * vae.spatial_stride}"
        if any(n % p for n, p in zip(entry.shape, patch)):
            name += UNFIT
        found.setdefault(name, []).append(number)
    there = ", ".join(f"{name} ({len(members)})" for name, members in sorted(found.items())) or "none"
    absent = [name for name in wanted if name not in found]
    if absent:
        raise UserError(f"{library.folder} has no samples of the shape {absent[0]} (data.buckets); its shapes: {there}")
    kept = {n: found[n] for n in sorted(found) if (n in wanted if wanted else not n.endswith(UNFIT))}
    if not kept:
        why = "".join(f"\n  {name}: {reason}" for name, reason in list(library.index.bad.items())[:5])
        raise UserError(f"{library.folder} has no sample that this model can train on; its shapes: {there}{why}")
    left = sum(map(len, found.values())) - sum(map(len, kept.values()))
    if left:
        print(f"note: {left} samples of other shapes are left out; the data has {there}")
    return kept


def _shapes(config, pipeline: Pipeline, folder: Path):
    if not config.finetune.videos:
        raise UserError(
            "no training data: give a folder with --config.data.kind and --config.data.path (see docs/data.md), or "
            "rendered moving shapes with --config.finetune.videos=48 and equal --config.model.height and .width"
        )
    if config.model.height != config.model.width:
        raise UserError(
            f"moving shapes are square, but model.height={config.model.height} and model.width={config.model.width}; "
            "set both to the same number"
        )
    return rendered_pairs(
        pipeline,
        config.finetune.videos,
        config.model.frames,
        config.model.height,
        config.seed,
        folder / "latents.safetensors",
    )


def _text_rows(library: Library, wanted: int, most: int) -> int:
    """Returns the rows that hold every prompt, rounded up as elsewhere; all there can be if the set doesn't tell."""
    if wanted:
        return min(wanted, most)
    lengths = [entry.length for entry in library.index.entries]
    longest = most if not lengths or min(lengths) < 0 else max(lengths)
    unit = generation.TEXT_ROWS
    return min(-(-longest // unit) * unit, most)


def _empty(pipeline: Pipeline, folder: Path, form: Form) -> Text:
    text, count = (np.asarray(x) for x in TextCache(folder / "text", pipeline, [""]).context([""]))
    own = own_rows(text[0], count[0]).astype(DTYPES[form.dtype])
    text, count = pack(own, form.rows, form.text_tokens)
    return Text(text[None], count[None])


def _same_everywhere(digest: str) -> None:
    """Raises UserError on every process unless all see the same data: otherwise they would wait for each other."""
    if jax.process_count() == 1:
        return
    from jax.experimental import multihost_utils

    mine = np.frombuffer(bytes.fromhex(digest), np.uint8)
    everywhere = np.asarray(multihost_utils.process_allgather(mine))
    different = [i for i, other in enumerate(everywhere) if (other != everywhere[0]).any()]
    if different:
        raise UserError(
            f"process {different[0]} sees other data than process 0 at data.path; all processes need the same folder"
        )
