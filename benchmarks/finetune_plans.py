"""Plans stage 3's step for the pods of docs/results by compiling it for each, and prints the table.

    python benchmarks/finetune_plans.py --out=docs/results/plan           # two hours on 2 cores; needs the TPU compiler
    python benchmarks/finetune_plans.py --out=docs/results/plan --table   # the table alone, from the files

480x832x81 (32,760 tokens), batch 16, float32 AdamW, bfloat16 activations, blocks recomputed. What is there already is
not compiled again. The search for the largest batch, several compilations each, is made for 15R4 alone.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
GIB = 2**30
SETTINGS = {  # (model, target) -> devices that share the tokens of a video
    ("wan_1_3b", "v5e:4x4"): 1,
    ("wan_1_3b", "v5p:2x2x2"): 1,
    ("wan_1_3b", "v6e:4x4"): 1,
    ("wan_1_3b", "v5e:16x16"): 16,
    ("wan_14b", "v5p:4x4x4"): 4,
    ("wan_14b", "v6e:16x16"): 16,
}
BUDGETS = {"softmax": "0R4", "15R4": "15R4", "20R8": "20R8"}  # no block at R4: all softmax
SEARCHED = "15R4"


def file_of(out: Path, model: str, target: str, label: str) -> Path:
    """Returns where a plan is kept."""
    return out / f"finetune_{model}_{target.replace(':', '_')}_{label}.json"


def compile_plan(file: Path, model: str, target: str, label: str, seq: int) -> None:
    """Runs `configs/plan.py` in a process of its own and keeps its report; exit code 1 says that it does not fit."""
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".plan_") as work:
        command = [
            *(sys.executable, "-m", "hybrid_dit.main", f"--config=configs/plan.py:{model}", f"--workdir={work}"),
            *(f"--config.target={target}", "--config.job=finetune", f"--config.select.budget={BUDGETS[label]}"),
            *(f"--config.mesh.seq={seq}", f"--config.layouts={label == SEARCHED}"),
        ]
        code = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}).returncode
        made = list(Path(work, "plan").glob("*.json"))
        if code not in (0, 1) or not made:
            raise SystemExit(f"{' '.join(command)} ended with code {code}")
        made[0].replace(file)


def row(report: dict, model: str, target: str, label: str, seq: int) -> str:
    """Returns a line of the table; "–" for what a step that does not fit has no program for."""
    gib = lambda n: f"{n / GIB:.2f}"  # noqa: E731
    cells = [model.replace("wan_", "").replace("_", ".").upper(), target, label, str(report["devices"]), str(seq)]
    moved = report.get("collectives")
    sums = "–" if moved is None else f"{sum(t['bytes'] for t in moved.values()) / GIB:.1f}"
    least = report.get("least_seconds", {})
    rate = f"{report['tokens_per_step'] / max(least.values()):,.0f} ({max(least, key=least.get)})" if least else "–"
    largest = report.get("layouts", {}).get("largest_videos_per_device") or ""
    cells += [gib(report["argument_bytes"]) if moved is not None else "–", gib(report["needed_bytes"])]
    cells += [gib(report["memory_bytes"]), sums, f"{report['flops_per_device']:.3g}", rate, largest]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the JSON files")
    parser.add_argument("--table", action="store_true", help="compile nothing")
    args = parser.parse_args()
    titles = ["model", "target", "attention", "devices", "mesh.seq", "arguments, GiB", "needed, GiB", "of, GiB"]
    titles += ["collectives, GiB", "FLOPs", "tokens/s at most (by)", "videos per device at once"]
    lines = [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
    args.out.mkdir(parents=True, exist_ok=True)
    for (model, target), seq in SETTINGS.items():
        for label in BUDGETS:
            file = file_of(args.out, model, target, label)
            if not file.exists() and not args.table:
                compile_plan(file.resolve(), model, target, label, seq)
            if file.exists():
                lines.append(row(json.loads(file.read_text()), model, target, label, seq))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
