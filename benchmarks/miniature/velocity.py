"""What predicts the score of a model: the sum of its blocks' errors, or the error of its velocity?

    python benchmarks/miniature/velocity.py --out=docs/results/miniature/velocity.csv    # 12 minutes on 2 cores

For every model that the tables score with one seed of the default distillation and without fine-tuning: its score, the
sum that rate selection minimises, and the relative L1 error of its velocity, at latents of the teacher's trajectories
for held-out prompts that no block error was measured on. Prints Spearman's rank correlations with the score.
"""

import argparse
import csv
import json
import sys
from pathlib import Path

from hybrid_dit.main import set_up

set_up()  # before JAX is imported

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from scipy.stats import spearmanr  # noqa: E402
from study import Study, every_attention, with_maps  # noqa: E402

from hybrid_dit import surgery  # noqa: E402
from hybrid_dit.models.wan import WanDiT  # noqa: E402
from hybrid_dit.surgery_io import MAPS_FILE, load_maps  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1]))
from assignment_errors import teacher_latents  # noqa: E402


def scored(study: Study, seed: int) -> dict[tuple[str, ...], float]:
    """{labels of the blocks: score} of the models in question."""
    found = {}
    for line in study.all_scores.path.read_text().splitlines():
        row = json.loads(line)
        plain = row["distill"] == "{}" and row["maps"] == MAPS_FILE and not row["finetune"]
        choice = tuple(row["choice"].split())
        if plain and row["seed"] == seed and set(choice) != {"softmax"}:
            found[choice] = float(np.mean(row["total"]))
    return found


def main() -> None:
    """Writes a row per model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="CSV file")
    parser.add_argument("--measured", type=Path, default=Path("docs/results/miniature/measured"))
    parser.add_argument("--work", type=Path, default=Path("runs/miniature"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trajectories", type=int, default=10)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args()

    study = Study(args.work, args.measured, args.trajectories, args.prompts, sample_steps=20)
    maps = load_maps(study.distilled(args.seed, {}) / MAPS_FILE)
    errors, labels = study.errors(args.seed, {}), ["softmax", *study.specs]
    latents, times, context = teacher_latents(study.pipeline, study.config, study.prompts, study.shape, args.steps)
    blocks = study.pipeline.wan.num_layers
    model = WanDiT(study.pipeline.wan, every_attention(study.specs, blocks))

    @jax.jit
    def run(params, which):
        one = lambda x, t: model.apply({"params": params}, x, jnp.full(len(x), t), *context, which)  # noqa: E731
        return jax.lax.map(lambda xt: one(*xt), (latents, times))

    def velocity(choice):
        _, params = surgery.assemble(study.pipeline.dit, maps, choice, study.specs)
        which = jnp.asarray([labels.index(label) for label in choice], jnp.int32)
        return np.asarray(run(with_maps(params, maps), which), np.float64)

    teacher, rows = velocity(("softmax",) * blocks), []
    for choice, score in sorted(scored(study, args.seed).items(), key=lambda x: -x[1]):
        total = sum(errors[b, labels.index(c) - 1] for b, c in enumerate(choice) if c != "softmax")
        apart = np.abs(velocity(choice) - teacher).sum() / np.abs(teacher).sum()
        rows.append({"blocks": " ".join(choice), "score": score, "sum of errors": total, "velocity error": apart})
        print("  ".join(f"{x:.3f}" if isinstance(x, float) else x for x in rows[-1].values()), flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with open(args.out, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    for name in ("sum of errors", "velocity error"):
        rank = spearmanr([row["score"] for row in rows], [row[name] for row in rows]).statistic
        print(f"{len(rows)} models, {name}: Spearman {rank:.3f}")


if __name__ == "__main__":
    main()
