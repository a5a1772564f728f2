"""Entry point: `python -m hybrid_dit.main --config=configs/JOB.py[:MODEL] --workdir=DIR [--config.x.y=value ...]`."""

import importlib
import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from hybrid_dit.errors import UserError


def parse(argv: list[str]):
    """Returns (config, workdir) from the command line.

    Raises:
        UserError: unknown flag or config key, a value of the wrong type, or no config or workdir.
    """
    values = flags.FlagValues()
    config_flag = config_flags.DEFINE_config_file("config", None, "Job file, with :MODEL if any.", flag_values=values)
    workdir = flags.DEFINE_string("workdir", None, "Folder that receives all outputs.", flag_values=values)
    try:
        rest = values(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        raise UserError(f"command line: {error.args[0] if error.args else error}") from error
    if len(rest) > 1:
        raise UserError(f"command line: unexpected argument {rest[1]!r}; options look like --config.steps=100")
    if config_flag.value is None or not workdir.value:
        raise UserError("usage: python -m hybrid_dit.main --config=configs/JOB.py[:MODEL] --workdir=DIR [--config.x=y]")
    return config_flag.value, Path(workdir.value)


def main(argv: list[str]) -> int:
    """Runs the job that the config names; returns the exit code."""
    try:
        config, workdir = parse(argv)
        job = importlib.import_module(f"hybrid_dit.jobs.{config.job}")
        workdir.mkdir(parents=True, exist_ok=True)
        job.run(config, workdir)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
