"""Times attention, blocks and models on one device, against what it can do at most; see `configs/bench.py`.

Every measurement is a row, written as soon as it is there; rows that are there already, on the same kind of device and
with the same settings, are kept. What fails (a program too large for the device, say) is a row with the error, and
is tried again by the next run.
"""

import csv
import dataclasses
import io
import json
import os
import types
from collections.abc import Iterator, Mapping, Sequence
from numbers import Real
from pathlib import Path

import jax

from hybrid_dit import bench_cases, bench_timing, cost, duration_picture
from hybrid_dit.atomic import write_json, write_text
from hybrid_dit.bench_cases import DIRECTIONS, WHAT, Case, Sizes
from hybrid_dit.bench_timing import Rates
from hybrid_dit.convert.pipeline import load_pipeline_config
from hybrid_dit.errors import UserError
from hybrid_dit.models.vae import VAEConfig
from hybrid_dit.models.wan import PRESETS
from hybrid_dit.ops.spec import AttentionSpec
from hybrid_dit.surgery_io import specs_from_config
from hybrid_dit.workdir import Stage

BACKENDS = ("xla", "fused")
_KEY = (*(field.name for field in dataclasses.fields(Case)), "device", "jax")
_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def run(config, workdir: Path) -> int:
    """Measures what isn't measured yet; returns 1 if nothing could be, else 0.

    Raises:
        UserError: an unknown setting, or videos that don't fit the model.
    """
    sizes = model_sizes(config)
    wanted = list(dict.fromkeys(cases(config, sizes)))  # before the stage is opened: bad settings leave nothing behind
    stage = Stage(workdir, "bench", config)
    device = {"device": jax.local_devices()[0].device_kind, "jax": jax.__version__}
    table = Table(stage.folder, device)
    missing = [case for case in wanted if (row := table.find(case)) is None or row["error"]]
    print(
        f"bench: {len(wanted)} cases on one {device['device']} ({os.cpu_count()} CPU cores, jax {device['jax']}), "
        f"{len(wanted) - len(missing)} measured before"
    )
    for dtype in dict.fromkeys(case.dtype for case in missing):
        rates = table.rates(dtype)
        print(
            f"  floor, {dtype}: FLOPs (matrix products, hybrid_dit.cost; with gradients 3 x forward) at "
            f"{amount(rates.flops)}FLOP/s ({rates.source}),\n"
            f"  or arguments and outputs once at {amount(rates.bandwidth)}B/s (measured), whichever takes longer"
        )
    for case in missing:
        row = measured(sizes, case, table.rates(case.dtype), config.bench.repeats, config.bench.warmup)
        table.add(case, row)
        print("  " + line(table.find(case)), flush=True)
    write_timings(stage.folder / "timings.csv", config, table.rows)
    draw(stage.folder / "duration.png", config, sizes, table.rows)
    for text in expectations(table.rows, own_video(config)):
        print(f"bench: {text}")
    rows = [table.find(case) for case in wanted]
    failed = sum(bool(row["error"]) for row in rows)
    if rows:
        print(f"bench: {stage.folder / 'bench.csv'}{f'; {failed} of {len(rows)} cases failed' if failed else ''}")
    stage.finish(cases=len(rows), failed=failed)
    return 1 if rows and failed == len(rows) else 0


def model_sizes(config) -> Sizes:
    """Returns the sizes of the weights' folder, or of a published model.

    Raises:
        UserError: no such folder or model, or an unknown rate.
    """
    if config.model.weights:
        wan, vae = load_pipeline_config(config.model.weights)
    elif config.bench.preset in PRESETS:
        wan, vae = PRESETS[config.bench.preset], VAEConfig()
    else:
        raise UserError(
            f"bench.preset={config.bench.preset!r} is unknown; choose {' or '.join(PRESETS)}, or set model.weights"
        )
    # The maps that stage 1 would train, at rates of one's own.
    section = types.SimpleNamespace(**{**config.distill.to_dict(), "rates": config.bench.rates})
    specs = {"softmax": AttentionSpec(), **specs_from_config(section)}
    return Sizes(wan, vae, specs, config.bench.text_tokens)


def cases(config, sizes: Sizes) -> Iterator[Case]:
    """Yields what the settings ask for: ops of all videos; the rest of the model's own video.

    Raises:
        UserError: an unknown name, or a video that doesn't fit.
    """
    cfg = config.bench
    known = {"what": WHAT, "backward": (*WHAT, "videos"), "backends": BACKENDS, "dtypes": ("float32", "bfloat16")}
    for name, allowed in known.items():
        for value in cfg[name]:
            if value not in allowed:
                raise UserError(f"bench.{name}: {value!r} is unknown; choose out of {', '.join(allowed)}")
    if cfg.repeats < 1 or cfg.warmup < 0:
        raise UserError(f"bench.repeats={cfg.repeats} must be at least 1, bench.warmup={cfg.warmup} at least 0")
    own = own_video(config)
    for what in cfg.what:
        labels = cfg.models if what == "model" else sizes.specs
        for video in dict.fromkeys((own, *cfg.videos) if what == "op" else (own,)):
            sizes.tokens(video)
            backward = (what if video == own else "videos") in cfg.backward
            for dtype in cfg.dtypes:
                for direction in list(DIRECTIONS)[: 1 + backward]:
                    for label in labels:
                        for backend in cfg.backends:
                            backend = _platform_backend(backend)
                            backend = bench_cases.resolved_backend(sizes, label, dtype, backend)
                            yield Case(what, label, video, direction, dtype, backend)


def own_video(config) -> str:
    """The video of section `model`."""
    return f"{config.model.frames}x{config.model.height}x{config.model.width}"


def _platform_backend(name: str) -> str:
    """The kernels of this platform for "fused"; there are none for CPUs."""
    platform = jax.default_backend()
    return platform if name == "fused" and platform in ("tpu", "gpu") else "xla"


def measured(sizes: Sizes, case: Case, rates: Rates, repeats: int, warmup: int) -> dict:
    """Returns the row of a case without its names."""
    flops = bench_cases.flops(sizes, case)
    row = {"tokens": sizes.tokens(case.video), "flops": flops, "error": ""}
    try:
        function, shapes = bench_cases.program(sizes, case)
        timing = bench_timing.measure(function, shapes, bench_cases.random_inputs, repeats, warmup)
    except UserError:
        raise
    except Exception as error:  # whatever a compiler refuses is a result, and no reason to lose the other cases
        return row | {"error": f"{type(error).__name__}: {error}".replace("\n", " ")[:300]}
    floor = rates.floor(flops, timing.argument_bytes + timing.output_bytes)
    speeds = {"flops_per_s": flops / timing.seconds, "floor_seconds": floor, "of_floor": floor / timing.seconds}
    return row | dataclasses.asdict(timing) | speeds


class Table:
    """Rows of all runs in this folder: rows.json for the next run, bench.csv for people."""

    def __init__(self, folder: Path, device: Mapping[str, str]):
        """Reads what is there; `device` names this run's, with JAX's version."""
        self._folder, self._device = folder, dict(device)
        self._file = folder / "rows.json"
        there = json.loads(self._file.read_text()) if self._file.is_file() else {"rates": [], "rows": []}
        self._rates, self._rows = there["rates"], {tuple(row[k] for k in _KEY): row for row in there["rows"]}

    @property
    def rows(self) -> list[dict]:
        """All rows of this device."""
        return [row for row in self._rows.values() if self._device.items() <= row.items()]

    def find(self, case: Case) -> dict | None:
        """The row of a case on this device, or None."""
        return self._rows.get(self._key(case))

    def rates(self, dtype: str) -> Rates:
        """This device's rates, measured when they are asked for first."""
        key = {**self._device, "dtype": dtype}
        for row in self._rates:
            if key.items() <= row.items():
                return Rates(*(row[field.name] for field in dataclasses.fields(Rates)))
        rates = bench_timing.rates(dtype)
        self._rates.append(key | dataclasses.asdict(rates))
        self._write()
        return rates

    def add(self, case: Case, row: Mapping[str, object]) -> None:
        """Adds or replaces the row of a case, and writes both files."""
        # What `select` reads comes first.
        first = {"label": case.label, "seconds": row.get("seconds", "")}
        self._rows[self._key(case)] = first | dataclasses.asdict(case) | dict(row) | self._device
        self._write()

    def _key(self, case: Case) -> tuple[str, ...]:
        return (*dataclasses.astuple(case), *self._device.values())

    def _write(self) -> None:
        rows = list(self._rows.values())
        write_json(self._file, {"rates": self._rates, "rows": rows})
        write_text(self._folder / "bench.csv", as_csv(rows))


def as_csv(rows: Sequence[Mapping[str, object]]) -> str:
    """Returns rows as CSV with all columns that any of them has."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(dict.fromkeys(k for row in rows for k in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    return out.getvalue()


def write_timings(path: Path, config, rows: Sequence[Mapping]) -> None:
    """Writes label,seconds of one block's self-attention with its projections, for `select.costs=timings`.

    One row per label: the model's video and dtype, forward; of several backends the fastest.
    """
    found = [
        row
        for row in rows
        if (row["what"], row["direction"], row["dtype"]) == ("attention", "forward", config.model.compute_dtype)
        and row["seconds"]
    ]
    best: dict[str, Mapping] = {}
    for row in found:
        label = row["label"]
        best[label] = min(best.get(label, row), row, key=lambda r: r["seconds"])
    if not best:
        return
    write_text(path, as_csv(list(best.values())))
    print(f"bench: {path}, for --config.select.costs=timings --config.select.timings={path}")


def expectations(rows: Sequence[Mapping], video: str) -> Iterator[str]:
    """Yields for every hybrid model its speed-up, and the one expected from what its attention saves as an op."""
    names = "what", "label", "direction", "dtype", "backend"
    times = {tuple(row[n] for n in names): row["seconds"] for row in rows if row["seconds"] and row["video"] == video}
    for (what, label, direction, dtype, backend), seconds in times.items():
        if what != "model" or label == "softmax":
            continue
        count, rate = cost.parse_name(label)
        run = direction, dtype

        def softmax(what, run=run, backend=backend):  # which a backend may leave to XLA
            return times.get((what, "softmax", *run, backend), times.get((what, "softmax", *run, "xla")))

        whole, op, hybrid = softmax("model"), softmax("op"), times.get(("op", rate, *run, backend))
        if whole and op and hybrid:
            expected = whole / (whole - count * (op - hybrid))
            yield f"{label} {direction} {dtype} {backend}: {whole / seconds:.2f}x softmax, by its ops {expected:.2f}x"


def draw(path: Path, config, sizes: Sizes, rows: Sequence[Mapping]) -> None:
    """Draws FLOPs and seconds of attention alone against the length of videos, for all heights and widths in turn."""
    wan, dtype = sizes.wan, config.model.compute_dtype
    videos = [bench_cases.video_size(v) for v in dict.fromkeys((own_video(config), *config.bench.videos))]
    panels = {}
    for size in dict.fromkeys(video[1:] for video in videos):
        lengths = sorted(video[0] for video in videos if video[1:] == size)
        counted: dict[str, list[tuple[int, float]]] = {label: [] for label in sizes.specs}
        for frames in range(lengths[0], lengths[-1] + 1, sizes.vae.temporal_stride):
            tokens = sizes.tokens("x".join(map(str, (frames, *size))))
            shape = cost.Shape(wan.dim, wan.num_heads, wan.ffn_dim, wan.num_layers, tokens, sizes.text_tokens)
            for label, spec in sizes.specs.items():
                counted[label].append((frames, cost.attention_flops(shape, spec)))
        seconds: dict[tuple[str, int], float] = {}
        for row in rows:
            frames, *row_size = bench_cases.video_size(row["video"])
            wanted = (row["what"], row["direction"], row["dtype"]) == ("op", "forward", dtype)
            if wanted and tuple(row_size) == size and row["seconds"]:
                key = row["label"], frames
                seconds[key] = min(row["seconds"], seconds.get(key, row["seconds"]))
        timed = {s: sorted((f, t) for (label, f), t in seconds.items() if label == s) for s in sizes.specs}
        panels["x".join(map(str, size))] = counted, timed
    name = config.bench.preset or Path(config.model.weights).name
    measured_any = any(points for _, timed in panels.values() for points in timed.values())
    where = f"; seconds: {rows[0]['device']}, {dtype}" if measured_any else ""
    duration_picture.draw(path, panels, title=f"Attention of one block of {name}, forward{where}")
    print(f"bench: {path}")


def line(row: Mapping) -> str:
    """Returns a row for people."""
    name = f"{row['what']:9} {row['label']:8} {row['video']:12} {row['tokens']:>6,} tokens  {row['direction']:16} "
    name += f"{row['dtype']:8} {row['backend']:3}"
    if row["error"]:
        return f"{name}  FAILED: {row['error'][:120]}"
    memory = sum(row[f"{kind}_bytes"] for kind in ("argument", "output", "temporary"))
    return (
        f"{name}  {1e3 * row['seconds']:9.3f} ms ({1e3 * row['fastest']:.3f} to {1e3 * row['slowest']:.3f})  "
        f"{amount(row['flops_per_s']):>6}FLOP/s  {row['of_floor']:4.0%} of floor {1e3 * row['floor_seconds']:.3f} ms  "
        f"memory {amount(memory)}B (temporary {amount(row['temporary_bytes'])}B)"
    )


def amount(number: Real) -> str:
    """Returns 1.23 T, 45.6 G, ... for what a unit follows."""
    for size, prefix in _UNITS:
        if number >= size:
            return f"{number / size:.3g} {prefix}"
    return f"{number:.3g} "
