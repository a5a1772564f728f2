"""Jobs: what `python -m hybrid_dit.main` runs, one module each, with a function `run(config, workdir)`.

`run` returns nothing, or an exit code.
"""

import difflib
import importlib
from pathlib import Path
from types import ModuleType

from hybrid_dit import processes
from hybrid_dit.errors import UserError

JOBS = ("surgery", "distill", "select_rates", "finetune", "export", "evaluate", "sample", "pretrain", "plan")
JOBS += ("build_data", "report", "vbench", "bench")
# What all processes of a run do together; the first does the other jobs alone.
TOGETHER = ("surgery", "distill", "finetune", "sample", "build_data")


def load(name: str) -> ModuleType:
    """Returns the module of a job, imported only now: jobs import much.

    Raises:
        UserError: there is no such job.
    """
    if name not in JOBS:
        near = difflib.get_close_matches(name, JOBS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"unknown job {name!r} in the config; {hint}Jobs are {', '.join(JOBS)}")
    return importlib.import_module(f"hybrid_dit.jobs.{name}")


def run(name: str, config, workdir: Path) -> int | None:
    """Runs a job, on all processes or on the first, and returns its exit code, if any, on all of them."""
    job = load(name)
    if name not in TOGETHER:
        return processes.on_main(job.run, config, workdir)
    processes.check_joined()
    return job.run(config, workdir)
