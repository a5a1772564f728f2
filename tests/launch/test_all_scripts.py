"""What all launch scripts have in common: usage, dry runs, arguments that are refused."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from stand import LAUNCH, POD, RUN


def test_shellcheck_finds_nothing():
    scripts = sorted(p for p in LAUNCH.rglob("*") if p.suffix in (".sh", ".sbatch"))
    assert len(scripts) == 7
    shellcheck = Path(sys.executable).parent / "shellcheck"
    done = subprocess.run([shellcheck, "-x", *scripts], capture_output=True, text=True, cwd=LAUNCH.parent)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", ["local.sh", "slurm.sh", "tpu_vm.sh", "gke/jobset.sh"])
def test_without_arguments_the_usage_is_shown(stand, script):
    done = stand.run(script)
    assert f"launch/{script} [--dry-run]" in done.stdout + done.stderr and not stand.calls


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        *[("tpu_vm.sh", [action]) for action in ("create", "wait", "install", "logs", "stop", "delete")],
        *[("tpu_vm.sh", [action, "c.py", "w", "--config.x=1"]) for action in ("run", "resume")],
        ("gke/jobset.sh", ["submit", "c.py", "w", "--config.x=1"]),
        *[("gke/jobset.sh", [action]) for action in ("wait", "logs", "delete")],
        ("slurm.sh", ["--wait", "2", "8", "c.py", "w", "--config.x=1"]),
        ("local.sh", ["--processes=2", "c.py", "w", "--config.x=1"]),
    ],
)
def test_dry_run_counts_wherever_it_is(stand, tmp_path, script, arguments):
    """The same is printed, and nothing is run but git, which looks."""
    variables = {**POD, **RUN, "PORT": "1234", "PYTHON": sys.executable, "TMPDIR": str(tmp_path)}
    printed = set()
    for i in range(len(arguments) + 1):
        done = stand.run(script, *arguments[:i], "--dry-run", *arguments[i:], **variables)
        assert done.returncode == 0, done.stderr
        printed.add(re.sub(r"/tmp\.\w+/", "/", done.stdout))  # the scratch folder
    assert len(printed) == 1 and "--dry-run" not in printed.pop()
    assert {call[0] for call in stand.calls} <= {"git"} and not (LAUNCH.parent / "w").exists()


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("tpu_vm.sh", ["create", "a b", "c"], "create takes no arguments, but got 'a b c'"),
        ("tpu_vm.sh", ["delete", "--dryrun"], "delete takes no arguments, but got '--dryrun'"),
        ("gke/jobset.sh", ["wait", "--now"], "wait takes no arguments, but got '--now'"),
        ("gke/jobset.sh", ["delete", "--now"], "delete takes no arguments, but got '--now'"),
        ("tpu_vm.sh", ["resume", "--spot", "w"], "'--spot' is where CONFIG or WORKDIR should be"),
        ("tpu_vm.sh", ["run", "c.py", "--config.x=1"], "'--config.x=1' is where CONFIG or WORKDIR should be"),
        ("gke/jobset.sh", ["submit", "--spot", "c.py", "w"], "'--spot' is where CONFIG or WORKDIR should be"),
        ("slurm.sh", ["2", "8", "--wait", "c.py", "w"], "'--wait' is where CONFIG or WORKDIR should be"),
        ("slurm.sh", ["2", "0", "c.py", "w"], "GPUS is '0', not a whole number of at least 1"),
        ("local.sh", ["c.py", "--processes=2", "w"], "'--processes=2' is where CONFIG or WORKDIR should be"),
        ("local.sh", ["--processes=two", "c.py", "w"], "--processes is 'two', not a whole number of at least 1"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(stand, script, arguments, message):
    done = stand.run(script, *arguments, **POD, **RUN, PYTHON="false")
    assert done.returncode == 2 and done.stderr.startswith(f"error: {message}") and not stand.calls
