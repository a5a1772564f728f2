"""Entry point: `python -m hybrid_dit.main --config=configs/JOB.py[:MODEL] --workdir=DIR [--config.x.y=value ...]`.

The config's `job` names the module of `hybrid_dit.jobs` that runs. A config about another job has a `run` beside it:
`configs/plan.py` runs `plan` for the job that `--config.job` says.
"""

import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from hybrid_dit import processes
from hybrid_dit.command_line import USAGE, parse
from hybrid_dit.errors import UserError


def main(argv: Sequence[str]) -> int:
    """Runs the job that the config names; returns the exit code: 0 done, 2 bad input, 130 interrupted.

    A job's `run` may return an exit code of its own (`plan`: 1 for a step that does not fit).
    """
    if {"-h", "--help"} & set(argv[1:]):
        print(f"usage: {USAGE}\n{processes.HELP}")
        return 0
    try:
        distributed, argv = processes.parse(argv[1:])
        set_up()
        with processes.joined(distributed):
            config, workdir = parse(argv)
            from hybrid_dit import jobs  # imports JAX, which reads its environment then

            return jobs.run(config.get("run", config.job), config, workdir) or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if processes.is_main():
            print("interrupted; the same command continues", file=sys.stderr)
        return 130


def set_up() -> None:
    """Keeps compiled programs between runs (JAX_COMPILATION_CACHE_DIR, else the user's cache), and silences noise."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hybrid_dit" / "jax"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")  # many small ones add up
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA's warnings on loading cached programs
    warnings.filterwarnings("ignore", message=".*donated buffers were not usable.*")


if __name__ == "__main__":
    sys.exit(main(sys.argv))
