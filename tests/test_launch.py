"""The launch scripts: what they would run, and that a failing job makes them fail."""

import shlex
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "launch" / "local.sh"


def launch(*arguments, python="python"):
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": python}
    return subprocess.run([SCRIPT, *arguments], capture_output=True, text=True, env=environment)


def test_dry_run_prints_the_command_quoted_and_runs_nothing(tmp_path):
    workdir = str(tmp_path / "a run; with $signs")
    result = launch("--dry-run", "configs/surgery.py", workdir, "--config.seed=1", python="/opt/my python")
    assert result.returncode == 0 and not list(tmp_path.iterdir())
    expected = ["--config=configs/surgery.py", f"--workdir={workdir}", "--config.seed=1"]
    assert shlex.split(result.stdout) == ["/opt/my python", "-m", "hybrid_dit.main", *expected]


def test_a_failing_job_fails_and_leaves_its_message_in_the_log(tmp_path):
    result = launch("configs/no_such.py", str(tmp_path / "run"), python=sys.executable)
    assert result.returncode == 2
    assert "configs/no_such.py does not exist" in (tmp_path / "run" / "log.txt").read_text()


def test_missing_arguments_show_the_usage():
    result = launch("configs/surgery.py")
    assert result.returncode == 2 and "usage:" in result.stderr
