"""All of Attention Surgery in order: distill, select, finetune, export, evaluate."""

import time
from pathlib import Path

import numpy as np

from hybrid_dit import jobs, knapsack, processes
from hybrid_dit.errors import UserError
from hybrid_dit.jobs import evaluate, report, select_rates
from hybrid_dit.progress import duration
from hybrid_dit.report import NAME, check_size, is_current
from hybrid_dit.sampling import make_sampler
from hybrid_dit.workdir import is_done

STAGES = {  # folder -> (job, what it does)
    "distill": ("distill", "train feature maps of every block and rate to copy softmax attention"),
    "select": ("select_rates", "choose a rate per block under the budget"),
    "finetune": ("finetune", "train the hybrid with flow matching"),
    "export": ("export", "write the hybrid as a pipeline folder"),
    "evaluate": ("evaluate", "sample held-out prompts before and after every stage"),
}


def run(config, workdir: Path) -> None:
    """Runs the stages that are not complete in `workdir`, prints the table of `evaluate`, and writes `report.html`.

    Raises:
        UserError: as the stages; what can be told from the settings is raised before any work.
    """
    check(config)
    done = {folder: is_done(workdir, folder, config) for folder in STAGES}
    began = time.monotonic()
    for n, (folder, (job, what)) in enumerate(STAGES.items(), start=1):
        elapsed = duration(time.monotonic() - began)
        print(f"\n=== {n}/{len(STAGES)} {folder}: {what} (after {elapsed}) ===", flush=True)
        if done[folder] and folder != "evaluate":  # which prints its table again
            print(f"complete in {workdir / folder}")
        else:
            jobs.run(job, config, workdir)
    print()
    processes.on_main(_report, config, workdir)
    print(f"surgery took {duration(time.monotonic() - began)}")


def _report(config, workdir: Path) -> None:
    """Writes the page unless it is there and nothing was done since."""
    if is_current(workdir):
        print(f"report: {workdir / NAME}")
    else:
        report.run(config, workdir)


def check(config) -> None:
    """Raises UserError for settings of late stages that can't work, so that no early stage runs in vain."""
    evaluate.held_out(config)
    make_sampler(config.evaluate.sampler, config.evaluate.sample_steps, shift=1.0)
    check_size(report.max_bytes(config))
    costs = select_rates.candidate_costs(config)
    blocks = select_rates.attention_shape(config).blocks
    budget = select_rates.parse_budget(config, costs, blocks)
    table = np.tile(list(costs.values()), (blocks, 1))
    try:
        knapsack.solve(np.zeros(table.shape), table, budget)
    except UserError as error:
        raise UserError(f"select.budget={config.select.budget}: {error}") from error
