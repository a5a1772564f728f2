"""Stage 2: one rate per block under a budget, by the knapsack over stage 1's errors."""

import csv
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from hybrid_dit import cost, generation, knapsack, pictures
from hybrid_dit.convert.pipeline import load_pipeline_config
from hybrid_dit.errors import UserError
from hybrid_dit.ops.spec import AttentionSpec
from hybrid_dit.surgery_io import CHOICE_FILE, save_choice, specs_from_config
from hybrid_dit.workdir import Stage, require


def run(config, workdir: Path) -> None:
    """Writes `rates.json`, the baseline `homogeneous.json`, and pictures of errors and trade-off."""
    distilled = require(workdir, "distill", config)
    stage = Stage(workdir, "select", config)
    if stage.done:
        print(f"select: complete in {stage.folder}")
        return
    block_costs = candidate_costs(config)
    labels = list(block_costs)
    errors = read_errors(distilled / "errors.csv", labels[1:])
    errors = np.concatenate([np.zeros((len(errors), 1)), errors], axis=1)
    blocks = len(errors)
    costs = np.tile(np.array([block_costs[label] for label in labels]), (blocks, 1))
    budget = parse_budget(config.select.budget, block_costs, blocks)

    best = knapsack.solve(errors, costs, budget)
    _save(stage.folder / CHOICE_FILE, config, best, labels, block_costs)
    print(f"select: budget {config.select.budget} = {budget / 1e9:.4g} GFLOPs of self-attention per forward")
    print(_line("heterogeneous", best, labels, block_costs))

    baselines = {}
    for r, label in enumerate(labels[1:], start=1):
        for count in range(1, blocks + 1):
            baselines[f"{count}{label}"] = knapsack.homogeneous(errors, costs, r, 0, count)
    within = {name: s for name, s in baselines.items() if s.cost <= budget}
    if within:  # empty if no single rate reaches the budget
        name = min(within, key=lambda n: (within[n].error, within[n].cost))
        _save(stage.folder / "homogeneous.json", config, within[name], labels, block_costs)
        print(_line(f"homogeneous {name}", within[name], labels, block_costs))

    title = f"Relative L1 error of each block's attention, budget {config.select.budget}"
    pictures.error_heatmap(stage.folder / "rates.png", errors, labels, choice=best.choice, title=title)
    pictures.pareto_plot(
        stage.folder / "pareto.png",
        [(s.cost, s.error) for s in knapsack.pareto(errors, costs)],
        homogeneous={name: (s.cost, s.error) for name, s in baselines.items()},
        chosen=(best.cost, best.error),
        cost_label="self-attention FLOPs per forward",
        title="Sum of block errors against cost",
    )
    stage.finish(blocks=[labels[c] for c in best.choice])


def candidate_costs(config) -> dict[str, int]:
    """Returns {label: FLOPs of one block's self-attention} for softmax and every rate of `select.rates`, in this order.

    Raises:
        UserError: a rate is not among those that stage 1 distils.
    """
    specs, shape = specs_from_config(config.distill), attention_shape(config)
    missing = [label for label in config.select.rates if label not in specs]
    if missing or not config.select.rates:
        raise UserError(
            f"select.rates={','.join(config.select.rates)} must name rates out of distill.rates={','.join(specs)}"
        )
    chosen = {"softmax": AttentionSpec(), **{label: specs[label] for label in config.select.rates}}
    return {label: cost.self_attention_flops(shape, spec) for label, spec in chosen.items()}


def attention_shape(config) -> cost.Shape:
    """Returns the sizes that decide FLOPs, for the config's model and video size."""
    wan, vae = load_pipeline_config(config.model.weights)
    latents = generation.latent_shape(wan, vae, config.model.frames, config.model.height, config.model.width)
    tokens = math.prod(wan.grid(latents))
    return cost.Shape(dim=wan.dim, heads=wan.num_heads, ffn=wan.ffn_dim, blocks=wan.num_layers, tokens=tokens)


def parse_budget(text: str | float, block_costs: Mapping[str, int | float], blocks: int) -> float | int:
    """Returns a budget in FLOPs of all blocks' self-attention.

    Args:
        text: "15R4" (15 blocks at R = 4), a share of the teacher's FLOPs (above 0, up to 1: "0.8"), or FLOPs ("2e12").
        block_costs: label -> FLOPs of one block's self-attention, among them "softmax".
        blocks: number of blocks.

    Raises:
        UserError: it is none of these.
    """
    try:
        number = float(text)
    except ValueError:
        return cost.named_budget(str(text), block_costs, blocks)
    if not number > 0 or not math.isfinite(number):
        raise UserError(f"select.budget={text} must be positive: a name like 15R4, a share up to 1, or FLOPs")
    return number * blocks * block_costs["softmax"] if number <= 1 else number


def read_errors(path: Path, labels: list[str]) -> np.ndarray:
    """Returns the distilled errors of `errors.csv`, [B, rates in the order of `labels`].

    Raises:
        UserError: a block lacks a rate.
    """
    with open(path, newline="") as file:
        rows = {(int(row["block"]), row["rate"]): float(row["distilled"]) for row in csv.DictReader(file)}
    blocks = 1 + max((block for block, _ in rows), default=-1)
    missing = [(b, label) for b in range(blocks) for label in labels if (b, label) not in rows]
    if missing or not blocks:
        raise UserError(f"{path} lacks block {missing[0][0]} at {missing[0][1]}" if missing else f"{path} is empty")
    return np.array([[rows[b, label] for label in labels] for b in range(blocks)])


def _save(path: Path, config, selection: knapsack.Selection, labels: list[str], block_costs) -> None:
    softmax = block_costs["softmax"] * len(selection.choice)
    save_choice(
        path,
        [labels[c] for c in selection.choice],
        budget=config.select.budget,
        cost=selection.cost,
        softmax_cost=softmax,
        predicted_error=selection.error,
        attention_flops_saved=1 - selection.cost / softmax,
    )


def _line(name: str, selection: knapsack.Selection, labels: list[str], block_costs) -> str:
    saved = 1 - selection.cost / (block_costs["softmax"] * len(selection.choice))
    chosen = " ".join(labels[c] for c in selection.choice)
    return f"  {name}: error {selection.error:.4f}, self-attention FLOPs -{saved:.1%}: {chosen}"
