"""The paper's tables in miniature, on the bundled model.

    python benchmarks/miniature distillation                # one table
    python benchmarks/miniature all --processes=12          # all of them; half took 9 minutes on an H200

Tables: distillation, rates, selection, loss, feature_maps, finetuning, stabiliser, pattern (scores of videos), errors
and widths (errors of blocks). Each writes TABLE.md and TABLE.json into docs/results/miniature (or `--out`), from what
is in `measured/` there: what is missing is measured first, and kept, so interrupt it when you like. Scores are those of
`hybrid_dit.scoring`, 0 to 100, on held-out prompts that no error was measured on, from one and the same noise; every
distillation is made with several seeds. Scores are means over seeds, intervals 95% bootstrap over videos (of their
means over seeds).

Beside the scores of a model are the FLOPs that its self-attention saves, and what the same choice of rates is worth at
full size: the time of softmax over that of its blocks' attention alone, without projections, as measured on an H200.
"""

import argparse
import csv
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hybrid_dit.main import set_up

set_up()  # before JAX is imported, which reads where to keep programs then

import numpy as np  # noqa: E402
from study import Row, Study  # noqa: E402
from tables import ERRORS, TABLES, WIDTHS, Table  # noqa: E402

from hybrid_dit import cost  # noqa: E402
from hybrid_dit.jobs import select_rates  # noqa: E402
from hybrid_dit.metrics import bootstrap_interval  # noqa: E402
from hybrid_dit.ops.spec import AttentionSpec, FeatureMapSpec  # noqa: E402
from hybrid_dit.surgery_io import specs_from_config  # noqa: E402

SWEEP = Path("docs/results/h200/attention_sweep.csv")  # by benchmarks/attention_gpu.py
BENCH = Path("docs/results/h200/bench.csv")  # by configs/bench.py:wan_1_3b; has `linear`
SPEED = "attention alone at 32,760 tokens, times softmax's speed"
DEFAULT_MAP = FeatureMapSpec()


def times_of_attention() -> dict[tuple[str, str], float]:
    """{(label, stabiliser): seconds of a block's attention over softmax's}, forward, at 480 x 832 x 81."""
    with SWEEP.open() as file:
        rows = [row for row in csv.DictReader(file) if row["n"] == "32760" and row["what"] == "forward"]
        rows = [row for row in rows if row["backend"] != "xla"]
    ms = {(f"R{row['rate']}", row["stabiliser"]): float(row["ms"]) for row in rows}
    softmax = ms.pop(("R0", ""))
    with BENCH.open() as file:
        own = [row for row in csv.DictReader(file) if row["what"] == "op" and row["tokens"] == "32760"]
    seconds = {row["label"]: float(row["seconds"]) for row in own}
    linear = seconds["linear"] / seconds["softmax"]
    fixed = {(label, c): x for label, x in (("softmax", 1.0), ("linear", linear)) for c in ("max", "lse")}
    return {key: x / softmax for key, x in ms.items()} | fixed


def interval(values: np.ndarray) -> list[float]:
    """[mean, low, high]."""
    return [round(x, 2) for x in bootstrap_interval(values)]


def scored(study: Study, table: Table, seeds: list[int]) -> dict:
    """Scores every row and checks every claim."""
    teacher, values, rows = study.teacher(), {}, []
    for row in table.rows:
        runs = [study.score(row, seed) for seed in seeds]
        found = {name: np.array([run[name] for run in runs]) for name in ("total", *table.columns)}  # [seeds, videos]
        values[row.name] = found
        rows.append(
            {
                "model": row.name,
                "score": interval(found["total"].mean(axis=0)),
                "seeds": by_seed(found["total"]),
                **worth(study, row, [run["choice"] for run in runs]),
                **{name: interval(found[name].mean(axis=0)) for name in table.columns},
                "blocks (seed 0)": " ".join(runs[0]["choice"]),
            }
        )
    claims = []
    for claim in table.claims:
        difference = values[claim.better][claim.column] - values[claim.worse][claim.column]
        claims.append(
            {
                "better": claim.better,
                "worse": claim.worse,
                "claim": claim.source,
                "difference": interval(difference.mean(axis=0)),
                "seeds": by_seed(difference),
                "seen": verdict(difference),
            }
        )
    shown = {name: interval(np.array(teacher[name])) for name in ("total", *table.columns)}
    return {"title": table.title, "teacher": shown, "rows": rows, "claims": claims}


def by_seed(values: np.ndarray) -> str:
    """Means over videos of [seeds, videos]."""
    return ", ".join(f"{mean:.1f}" for mean in values.mean(axis=1))


def verdict(difference: np.ndarray) -> str:
    """What [seeds, videos] say of a claim: seeds are few, so all have to agree with the interval over videos."""
    _, low, high = interval(difference.mean(axis=0))
    if low <= 0 <= high:
        return "not told apart"
    if len({bool(mean > 0) for mean in difference.mean(axis=1)}) > 1:
        return "seeds disagree"
    return "yes" if low > 0 else "the opposite"


def worth(study: Study, row: Row, choices: Sequence[Sequence[str]]) -> dict:
    """What a row's choices of rates, one for each seed, save: FLOPs of this model, time of the real one's attention.

    The time is without projections, and only known for stride and the default feature map.
    """
    specs, shape = specs_from_config(study.settings(0, row.distill).distill), select_rates.attention_shape(study.config)
    specs = {"softmax": AttentionSpec(), **specs}
    flops = {label: cost.self_attention_flops(shape, spec) for label, spec in specs.items()}
    saved = [1 - sum(flops[c] for c in choice) / (len(choice) * flops["softmax"]) for choice in choices]
    times, speed = times_of_attention(), "not measured"
    if all(spec.pattern == "stride" and spec.feature_map == DEFAULT_MAP for spec in specs.values()):
        each = [len(choice) / sum(times[c, specs[c].stabiliser] for c in choice) for choice in choices]
        speed = round(float(np.mean(each)), 2)
    return {"self-attention FLOPs saved": round(float(np.mean(saved)), 3), SPEED: speed}


def errors(study: Study, seeds: list[int]) -> dict:
    """Held-out relative L1 error by rate, mean over blocks and seeds, for every setting of `ERRORS`."""
    labels, rows = list(study.config.distill.rates), []
    for name, changed in ERRORS.items():
        for column in ("undistilled", "distilled") if not changed else ("distilled",):
            values = np.stack([study.errors(seed, changed, column=column) for seed in seeds])  # [seeds, B, labels]
            setting = f"{name}, not distilled" if column == "undistilled" else name
            rows.append({"setting": setting, **by_rate(values, labels)})
    return {"title": "Relative L1 error of a block's attention, mean over blocks", "rows": rows}


def widths(study: Study, seeds: list[int]) -> dict:
    """The same for both token patterns at several numbers of tokens per row."""
    labels, rows = list(study.config.distill.rates), []
    for width in WIDTHS:
        for pattern in ("stride", "lattice"):
            model = {} if width == 8 else {"width": 16 * width}
            changed = {} if pattern == "stride" else {"pattern": pattern}
            values = [study.errors(seed, changed, model) for seed in seeds]
            rows.append({"setting": f"{width} tokens a row, {pattern}", **by_rate(np.stack(values), labels)})
    return {"title": "Stride and lattice by width of the token grid: relative L1 error, mean over blocks", "rows": rows}


def by_rate(values: np.ndarray, labels: list[str]) -> dict:
    """{label: [mean, least, most] over seeds of the mean over blocks}."""
    seeds = values.mean(axis=1)
    return {
        label: [round(float(f(seeds[:, r])), 4) for f in (np.mean, np.min, np.max)] for r, label in enumerate(labels)
    }


def markdown(report: dict) -> str:
    """A report as a table, claims below it."""

    def cell(value):
        if isinstance(value, list):
            return f"{value[0]:g} [{value[1]:g}, {value[2]:g}]"
        return str(value)

    def grid(rows):
        head = list(rows[0])
        return [
            "| " + " | ".join(head) + " |",
            "|" + "---|" * len(head),
            *("| " + " | ".join(cell(row[name]) for name in head) + " |" for row in rows),
        ]

    lines = [f"## {report['title']}", "", report["made"], ""]
    if "teacher" in report:
        shown = (f"{name} {cell(value)}" for name, value in report["teacher"].items())
        lines += [f"Teacher: {', '.join(shown)}.", ""]
    lines += grid(report["rows"])
    if report.get("claims"):
        lines += ["", *grid(report["claims"])]
    return "\n".join(lines) + "\n"


def fill(names: list[str], seeds: list[int], processes: int, settings: list[str]) -> None:
    """Makes every table of every seed in a process of its own, for what they leave measured.

    Programs as small as the bundled model's leave a GPU idle between them, and scores are taken on the host.

    Raises:
        SystemExit: one of them failed; what it said is on the screen.
    """
    first = sorted(names, key=lambda name: name in TABLES)  # those that distil most

    def run(job):
        name, seed = job
        with tempfile.TemporaryDirectory() as out:
            command = [sys.executable, str(Path(__file__).parent), name, f"--seeds={seed}", f"--out={out}", *settings]
            return job, subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode

    with ThreadPoolExecutor(processes) as pool:
        jobs = [(name, seed) for seed in seeds for name in first]  # the first seed's programs are the others', too
        for i, (job, code) in enumerate(pool.map(run, jobs)):
            print(f"{i + 1} of {len(jobs)}: {job[0]}, seed {job[1]}", flush=True)
            if code:
                pool.shutdown(wait=False, cancel_futures=True)
                raise SystemExit(f"{job[0]}, seed {job[1]}: exit code {code}")


def main() -> None:
    """Makes the tables that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*TABLES, "errors", "widths"]
    parser.add_argument("tables", nargs="+", choices=[*names, "all"])
    parser.add_argument("--out", type=Path, default=Path("docs/results/miniature"))
    parser.add_argument("--measured", type=Path, help="folder of what was measured; in --out unless given")
    parser.add_argument("--work", type=Path, default=Path("runs/miniature"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--trajectories", type=int, default=10, help="of each distillation; 50 steps each")
    parser.add_argument("--videos", type=int, default=64)
    parser.add_argument("--sample-steps", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1, help="that share the device and the work folder")
    args = parser.parse_args()
    names = names if "all" in args.tables else args.tables
    args.measured = args.measured or args.out / "measured"
    settings = {name: getattr(args, name) for name in ("work", "measured", "trajectories", "videos", "sample_steps")}
    if args.processes > 1:
        given = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
        fill(names, args.seeds, args.processes, given)
    study = Study(**settings)
    for name in names:
        began, machines = time.monotonic(), set()
        study.all_errors.machines = study.all_scores.machines = machines
        if name in TABLES:
            report = scored(study, TABLES[name](study), args.seeds)
        else:
            report = {"errors": errors, "widths": widths}[name](study, args.seeds)
        scores = "; in brackets the least and the most of the seeds"
        if name in TABLES:
            scores = f"; {args.videos} videos, UniPC {args.sample_steps} steps, guidance 3; in brackets 95% over videos"
        report["made"] = (
            f"{len(args.seeds)} seeds, {50 * args.trajectories} steps of distillation{scores}; measured on "
            f"{' and '.join(sorted(machines))}."
        )
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
        (args.out / f"{name}.md").write_text(markdown(report))
        print(markdown(report), f"{name} took {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
