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
NO_MODEL = ("report", "vbench")  # run none
DTYPES = ("float32", "bfloat16", "float16")  # of activations


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
    if name not in NO_MODEL and "model" in config:
        check_numerics(config)
    if name not in TOGETHER:
        return processes.on_main(job.run, config, workdir)
    processes.check_joined()
    return job.run(config, workdir)


def check_numerics(config) -> None:
    """Looks at settings that matter only once a model is compiled, when a job has already worked and written.

    Raises:
        UserError: an unknown dtype, or an unknown backend of attention.
    """
    from hybrid_dit.ops.backends import BACKENDS  # takes seconds, and not all jobs need it

    model = config.model
    settings = {
        f"model.compute_dtype={model.compute_dtype}": (model.compute_dtype, DTYPES),
        f"model.attention_backend={model.attention_backend}": (model.attention_backend, BACKENDS),
        f"sample.vae_dtype={config.sample.vae_dtype}": (config.sample.vae_dtype, DTYPES),
    }
    for setting, (value, known) in settings.items():
        if value not in known:
            raise UserError(f"{setting} is unknown; choose one of {', '.join(known)}")
