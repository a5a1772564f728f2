"""Stage 2: one rate per block under a budget, by the knapsack over stage 1's errors; and for all other budgets, too."""

import csv
import io
import math
from collections.abc import Mapping
from numbers import Real
from pathlib import Path

import numpy as np

from hybrid_dit import attention_costs, cost, generation, knapsack, pictures
from hybrid_dit.atomic import write_json, write_text
from hybrid_dit.convert.pipeline import load_pipeline_config
from hybrid_dit.errors import UserError
from hybrid_dit.knapsack import Selection
from hybrid_dit.ops.spec import AttentionSpec
from hybrid_dit.surgery_io import CHOICE_FILE, save_choice, specs_from_config
from hybrid_dit.workdir import Stage, require


def run(config, workdir: Path) -> None:
    """Writes `rates.json`, the baseline `homogeneous.json`, all budgets in `pareto.csv` and `.json`, and pictures.

    The pictures: `rates.png` (errors and the choice), `pareto.png` (the front and homogeneous models), `front.png` (the
    rates of every block along the front).
    """
    distilled = require(workdir, "distill", config)
    stage = Stage(workdir, "select", config)
    if stage.done:
        print(f"select: complete in {stage.folder}")
        return
    block_costs, flops = candidate_costs(config), flop_costs(config)
    labels, unit = list(block_costs), attention_costs.UNITS[config.select.costs]
    errors = read_errors(distilled / "errors.csv", labels[1:])
    errors = np.concatenate([np.zeros((len(errors), 1)), errors], axis=1)
    blocks = len(errors)
    costs = np.tile(np.array([block_costs[label] for label in labels]), (blocks, 1))
    budget = parse_budget(config, block_costs, blocks)

    best = knapsack.solve(errors, costs, budget)
    _save(stage.folder / CHOICE_FILE, config, best, block_costs, flops)
    print(f"select: budget {config.select.budget} = {budget:.4g} {unit} of self-attention per forward")
    print(_line("heterogeneous", best, block_costs, unit))

    baselines = {
        f"{count}{label}": knapsack.homogeneous(errors, costs, r, 0, count)
        for r, label in enumerate(labels[1:], start=1)
        for count in range(1, blocks + 1)
    }
    within = {name: s for name, s in baselines.items() if s.cost <= budget}
    if within:  # empty if no single rate reaches the budget
        name = min(within, key=lambda n: (within[n].error, within[n].cost))
        _save(stage.folder / "homogeneous.json", config, within[name], block_costs, flops)
        print(_line(f"homogeneous {name}", within[name], block_costs, unit))

    front = knapsack.pareto(errors, costs)
    _write_front(stage.folder, config, front, baselines, block_costs, flops)
    title = f"Relative L1 error of each block's attention, budget {config.select.budget}"
    pictures.error_heatmap(stage.folder / "rates.png", errors, labels, choice=best.choice, title=title)
    softmax = block_costs["softmax"] * blocks
    pictures.pareto_plot(
        stage.folder / "pareto.png",
        [(s.cost / softmax, s.error) for s in front],
        homogeneous={name: (s.cost / softmax, s.error) for name, s in baselines.items()},
        chosen=(best.cost / softmax, best.error),
        cost_label=f"cost of self-attention ({unit}) against softmax everywhere, {softmax:.3g} {unit}",
        title="Sum of block errors against cost",
    )
    pictures.rates_along_front(
        stage.folder / "front.png",
        [s.cost / softmax for s in front],
        np.array([s.choice for s in front]),
        labels,
        chosen=budget / softmax,
        cost_label=f"budget: share of softmax's cost ({unit})",
        title="The best rate of every block under every budget",
    )
    print(f"  {len(front)} efficient selections for all budgets: {stage.folder / 'pareto.csv'}")
    stage.finish(blocks=[labels[c] for c in best.choice])


def candidate_costs(config) -> dict[str, Real]:
    """Returns {label: cost of one block's self-attention} for softmax and every rate of `select.rates`, in this order.

    Raises:
        UserError: a rate is not among those that stage 1 distils, or costs can't be read.
    """
    flops = flop_costs(config)
    kind = config.select.costs
    if kind == "flops":
        return flops
    if kind == "timings":
        return attention_costs.read_timings(config.select.timings, list(flops))
    if kind == "compiled":
        return attention_costs.read_estimate(config.select.estimate, list(flops), attention_shape(config).tokens)
    raise UserError(f"select.costs={kind!r} is unknown; choose one of {', '.join(attention_costs.UNITS)}")


def flop_costs(config) -> dict[str, int]:
    """Returns the same in FLOPs, whatever the config's costs are.

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


def parse_budget(config, block_costs: Mapping[str, Real], blocks: int) -> Real:
    """Returns the config's budget in the unit of its costs, see `attention_costs.parse_budget`."""
    return attention_costs.parse_budget(config.select.budget, block_costs, blocks, config.select.costs)


def read_errors(path: Path, labels: list[str], column: str = "distilled") -> np.ndarray:
    """Returns the errors of `errors.csv`, [B, rates in the order of `labels`]: distilled or undistilled ones.

    Raises:
        UserError: a block lacks a rate.
    """
    with open(path, newline="") as file:
        rows = {(int(row["block"]), row["rate"]): float(row[column]) for row in csv.DictReader(file)}
    blocks = 1 + max((block for block, _ in rows), default=-1)
    missing = [(b, label) for b in range(blocks) for label in labels if (b, label) not in rows]
    if missing or not blocks:
        raise UserError(f"{path} lacks block {missing[0][0]} at {missing[0][1]}" if missing else f"{path} is empty")
    return np.array([[rows[b, label] for label in labels] for b in range(blocks)])


def _numbers(selection: Selection, block_costs: Mapping[str, Real], flops: Mapping[str, int]) -> dict:
    """Labels of a selection and its figures, as `save_choice` takes them."""
    blocks = [list(block_costs)[c] for c in selection.choice]
    return {
        "blocks": blocks,
        "cost": selection.cost,
        "softmax_cost": block_costs["softmax"] * len(blocks),
        "predicted_error": selection.error,
        "attention_flops_saved": 1 - sum(flops[label] for label in blocks) / (flops["softmax"] * len(blocks)),
    }


def _save(path: Path, config, selection: Selection, block_costs, flops) -> None:
    numbers = _numbers(selection, block_costs, flops)
    save_choice(path, numbers.pop("blocks"), budget=config.select.budget, **numbers)


def _write_front(folder: Path, config, front: list[Selection], baselines: Mapping[str, Selection], block_costs, flops):
    """`pareto.json` for programs and `pareto.csv` for people: every efficient selection, then the homogeneous ones."""
    names = ("cost", "share of softmax", "sum of errors", "FLOPs saved", "name", "rates of the blocks")
    rows, points = [], {"efficient": [], "homogeneous": {}}
    for name, selection in [*(("", s) for s in front), *baselines.items()]:
        point = _numbers(selection, block_costs, flops)
        share = point["cost"] / point["softmax_cost"]
        saved = point["attention_flops_saved"]
        shown = (f"{x:.6g}" for x in (point["cost"], share, selection.error, saved))
        rows.append([*shown, name or "efficient", " ".join(point["blocks"])])
        if name:
            points["homogeneous"][name] = point
        else:
            points["efficient"].append(point)
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([names, *rows])
    write_text(folder / "pareto.csv", out.getvalue())
    head = {"costs": config.select.costs, "unit": attention_costs.UNITS[config.select.costs]}
    write_json(folder / "pareto.json", head | {"block_costs": dict(block_costs)} | points)


def _line(name: str, selection: Selection, block_costs: Mapping[str, Real], unit: str) -> str:
    saved = 1 - selection.cost / (block_costs["softmax"] * len(selection.choice))
    chosen = " ".join(list(block_costs)[c] for c in selection.choice)
    return f"  {name}: error {selection.error:.4f}, {unit} of self-attention {-saved:+.1%}: {chosen}"
