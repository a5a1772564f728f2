"""Stand-ins for gcloud, kubectl, sbatch, srun, scontrol and git, which record their arguments."""

import subprocess
import sys
from pathlib import Path

LAUNCH = Path(__file__).parents[2] / "launch"
AWKWARD = 'it\'s a "run"; with $HOME, `ls` & 100% (é)'  # a name that every careless script breaks at
# What a slice and a job are set up with.
POD = {"TPU_NAME": "my pod", "TPU_ZONE": "us-west4-a", "TPU_PROJECT": "p", "TPU_POLL": "0"}
RUN = {"GKE_NAME": "my-run", "GKE_IMAGE": "image:1", "GKE_CLAIM": "disk", "GKE_POLL": "0"}
RECORDER = """#!/usr/bin/env bash
here=$(dirname "$0") name=$(basename "$0")
{ printf '%s\\0' "$name" "$@"; printf '\\n\\0'; } >>"$here/calls"
[[ -p /dev/stdin && $name == kubectl ]] && cat >>"$here/stdin"
[[ -f $here/$name.reply ]] && source "$here/$name.reply"
exit 0
"""


class Stand:
    """A folder with stand-ins, first on the PATH."""

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir()
        for name in ("gcloud", "kubectl", "sbatch", "srun", "scontrol", "git"):
            (folder / name).write_text(RECORDER)
            (folder / name).chmod(0o755)

    def reply(self, name, code):
        """Bash code that the stand-in runs, with its arguments in "$@"."""
        (self.folder / f"{name}.reply").write_text(code)

    def run(self, script, *arguments, **variables):
        environment = {"PATH": f"{self.folder}:/usr/bin:/bin", "HOME": str(self.folder), **variables}
        command = [LAUNCH / script, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)

    @property
    def calls(self):
        """A list of commands, each a list of arguments."""
        file = self.folder / "calls"
        calls = file.read_text().split("\0\n\0")[:-1] if file.is_file() else []
        return [call.split("\0") for call in calls]


def commands(text):
    """What a dry run printed, read by the shell itself; without comments."""
    show = "printf '%s\\0' "
    lines = "".join(f"{show}{line}; echo\n" for line in text.splitlines() if not line.startswith("#"))
    done = subprocess.run(["bash"], input=lines, capture_output=True, text=True, check=True)
    return [line.split("\0")[:-1] for line in done.stdout.splitlines()]


def python_that(folder, code):
    """A Python interpreter that runs `code` whatever it is asked to run."""
    file = folder / "python stand-in"
    file.write_text(f"#!{sys.executable}\n{code}")
    file.chmod(0o755)
    return str(file)
