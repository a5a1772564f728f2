"""Does the sum of block errors, which rate selection minimises, predict the error of the assembled model?

    python -m hybrid_dit.main --config=configs/distill.py --workdir=runs/tiny               # 4 minutes on 2 cores
    python benchmarks/assignment_errors.py --workdir=runs/tiny --out=docs/results/cpu       # 10 CPU minutes

Two sets of random assignments of rates to blocks, none fine-tuned:

* `free`: every block draws its rate from its own mix of all rates; costs differ, from nearly all softmax to none.
* `same cost`: one and the same set of rates (half softmax, the rest R2, R4, R8, R8) in random order. All cost the same,
  so that only *which* block gets which rate differs: the question that selection has to answer.

Predicted is the sum of the blocks' errors in the run's errors.csv, as in selection. Measured is the error of the
hybrid's velocity against the teacher's, relative to the teacher's, in L1 and L2, on latents of the teacher's own
trajectories for held-out prompts that errors.csv was not measured on. Spearman's rank correlation, with the 95%
percentile interval of 2,000 bootstrap resamples of the assignments.
"""

import argparse
import csv
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import spearmanr

from hybrid_dit import generation, surgery
from hybrid_dit.command_line import load
from hybrid_dit.convert.pipeline import load_pipeline
from hybrid_dit.data.prompts import read_prompts
from hybrid_dit.jobs.select_rates import read_errors
from hybrid_dit.sampling import guided, make_sampler
from hybrid_dit.surgery_io import MAPS_FILE, load_maps, specs_from_config
from hybrid_dit.workdir import require

SAME_COST = ("softmax",) * 4 + ("R2", "R4", "R8", "R8")  # of 8 blocks
RESAMPLES = 2000


def assignments(labels: list[str], blocks: int, count: int, rng: np.random.Generator) -> dict[str, list[list[str]]]:
    """`count` distinct assignments of either set."""
    free: list[list[str]] = []
    while len(free) < count:
        mix = rng.dirichlet(np.full(len(labels), 0.7))
        choice = rng.choice(labels, blocks, p=mix).tolist()
        if choice not in free and set(choice) != {"softmax"}:
            free.append(choice)
    same: list[list[str]] = []
    while len(same) < count:
        choice = rng.permutation(SAME_COST).tolist()
        if choice not in same:
            same.append(choice)
    return {"free": free, "same cost": same}


def teacher_latents(pipeline, config, prompts: list[str], shape, steps: int):
    """Latents [steps, b, t, y, x, c] and timesteps [steps] that the teacher meets, and the prompts' context."""
    context = generation.text_context(pipeline, [*prompts, config.model.negative_prompt])
    cond, uncond = jax.tree.map(lambda a: a[:-1], context), jax.tree.map(lambda a: a[-1:], context)
    sampler = make_sampler("euler_ancestral", num_steps=steps, shift=pipeline.shift)
    velocity = jax.jit(guided(generation.make_velocity(pipeline.wan), config.distill.guidance))
    key = generation.noise_key(config.seed)
    x = generation.noise_for(key, shape, range(len(prompts)))
    state, seen = sampler.init(x), []
    for i, t in enumerate(sampler.schedule.timesteps):
        seen.append(x)
        v = velocity(pipeline.dit, x, jnp.full(len(prompts), t), (cond, uncond))
        state, x = sampler.step(state, x, v, i, key)
    return jnp.stack(seen), jnp.asarray(sampler.schedule.timesteps), cond


def velocities(pipeline, attention, params, latents, timesteps, context) -> np.ndarray:
    """Conditional velocities on all latents, float64."""
    velocity = generation.make_velocity(pipeline.wan, attention)

    @jax.jit
    def run(params):
        one = lambda x, t: velocity(params, x, jnp.full(x.shape[0], t), context)  # noqa: E731
        return jax.lax.map(lambda xt: one(*xt), (latents, timesteps))

    return np.asarray(run(params), np.float64)


def correlation(predicted: np.ndarray, measured: np.ndarray) -> dict:
    """Spearman's rank correlation and its bootstrap interval over assignments."""
    rng = np.random.default_rng(0)
    draws = [rng.integers(len(predicted), size=len(predicted)) for _ in range(RESAMPLES)]
    values = [spearmanr(predicted[i], measured[i]).statistic for i in draws]
    low, high = np.nanquantile(values, [0.025, 0.975])
    whole = spearmanr(predicted, measured).statistic
    return {"spearman": round(float(whole), 3), "low": round(float(low), 3), "high": round(float(high), 3)}


def picture(path: Path, rows: list[dict], report: dict) -> None:
    """Predicted against measured, one panel per set."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.4), dpi=110, layout="constrained", facecolor="white")
    for n, name in enumerate(report["sets"]):
        axes = figure.add_subplot(1, 2, n + 1)
        mine = [row for row in rows if row["set"] == name]
        for norm, marker, colour in (("L1", "o", "#0072b2"), ("L2", "s", "#d55e00")):
            r = report["sets"][name][norm]
            label = f"relative {norm}: Spearman {r['spearman']:.2f} [{r['low']:.2f}, {r['high']:.2f}]"
            x, y = [row["predicted"] for row in mine], [row[norm] for row in mine]
            axes.plot(x, y, marker, color=colour, ms=5, alpha=0.75, label=label)
        axes.set(title=f"{name} ({len(mine)} assignments)", xlabel="predicted: sum of block errors", ylim=(0, None))
        axes.set_ylabel("measured: relative error of the velocity")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, loc="lower right")
    FigureCanvasAgg(figure)
    figure.savefig(path)


def main():
    """Writes assignment_errors.csv, .json and .png."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True, help="with a complete stage 1 of configs/distill.py")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--assignments", type=int, default=40, help="of each set")
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args()

    config = load("configs/distill.py")
    folder = require(args.workdir, "distill", config)
    specs = specs_from_config(config.distill)
    errors = read_errors(folder / "errors.csv", list(specs))
    blocks = len(errors)
    table = {label: errors[:, r] for r, label in enumerate(specs)} | {"softmax": np.zeros(blocks)}
    pipeline, maps = load_pipeline(config.model.weights), load_maps(folder / MAPS_FILE)
    shape = generation.latent_shape(
        pipeline.wan, pipeline.vae, config.model.frames, config.model.height, config.model.width
    )
    first = config.distill.held_out_prompts
    prompts = read_prompts(config.prompts.held_out)[first : first + args.prompts]
    latents = teacher_latents(pipeline, config, prompts, shape, args.steps)
    teacher = velocities(pipeline, (), pipeline.dit, *latents)

    rows = []
    for name, choices in assignments(["softmax", *specs], blocks, args.assignments, np.random.default_rng(0)).items():
        for n, choice in enumerate(choices):
            attention, params = surgery.assemble(pipeline.dit, maps, choice, specs)
            difference = velocities(pipeline, attention, params, *latents) - teacher
            row = {
                "set": name,
                "predicted": float(sum(table[label][b] for b, label in enumerate(choice))),
                "L1": float(np.abs(difference).sum() / np.abs(teacher).sum()),
                "L2": float(np.linalg.norm(difference) / np.linalg.norm(teacher)),
                "rates": " ".join(choice),
            }
            rows.append(row)
            print(f"{name} {n + 1}/{len(choices)}  predicted {row['predicted']:.3f}  L1 {row['L1']:.4f}", flush=True)
    column = lambda name, key: np.array([row[key] for row in rows if row["set"] == name])  # noqa: E731
    sets = {
        name: {norm: correlation(column(name, "predicted"), column(name, norm)) for norm in ("L1", "L2")}
        for name in dict.fromkeys(row["set"] for row in rows)
    }
    report = {
        "assignments_per_set": args.assignments,
        "latents": f"{len(prompts)} held-out prompts x {args.steps} timesteps",
        "machine": f"{os.cpu_count()} CPU cores, jax {jax.__version__}",
        "sets": sets,
    }
    print(json.dumps(report, indent=2))
    args.out.mkdir(parents=True, exist_ok=True)
    with open(args.out / "assignment_errors.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    (args.out / "assignment_errors.json").write_text(json.dumps(report, indent=2) + "\n")
    picture(args.out / "assignment_errors.png", rows, report)


if __name__ == "__main__":
    main()
