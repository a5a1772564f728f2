"""Runs commands in other processes, several of which find each other through localhost."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# The library for collectives prints to file 1 in pieces that mix with Python's lines: Python keeps a copy of it.
SEPARATE = "import os, sys; sys.stdout = os.fdopen(os.dup(1), 'w'); os.dup2(os.open(os.devnull, os.O_WRONLY), 1)\n"


MAIN = "import sys\nfrom hybrid_dit import main\nsys.exit(main.main(sys.argv))"


class Several:
    """Processes of one run, 4 fake devices each, with their outputs in files (pipes would fill up)."""

    def __init__(self, folder: Path, program: str, *arguments: str, count: int = 2, **variables: str):
        """Starts them.

        Args:
            folder: for the outputs.
            program: Python code.
            *arguments: what the code finds in sys.argv[1:], after the options that say who it is.
            count: of processes.
            **variables: of the environment, beside those of this process.
        """
        folder.mkdir(parents=True, exist_ok=True)
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"  # the last one counts
        environment = os.environ | {"XLA_FLAGS": flags, **variables}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        where = f"--distributed.coordinator=localhost:{free_port()}", f"--distributed.processes={count}"
        self.outputs = [(folder / f"out{i}", folder / f"err{i}") for i in range(count)]
        self.processes = []
        for i, (out, err) in enumerate(self.outputs):
            command = [sys.executable, "-c", SEPARATE + program, *where, f"--distributed.process_id={i}", *arguments]
            with out.open("w") as stdout, err.open("w") as stderr:
                self.processes.append(
                    subprocess.Popen(command, cwd=ROOT, env=environment, stdout=stdout, stderr=stderr)
                )

    def finish(self, seconds: float = 240) -> list[tuple[int, str, str]]:
        """Waits; returns (exit code, stdout, stderr) of each."""
        try:
            codes = [process.wait(seconds) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
        return [(code, out.read_text(), err.read_text()) for code, (out, err) in zip(codes, self.outputs)]


def command_line(job: str, config, workdir: Path, *sections: str) -> list[str]:
    """The options of `main` that give this config's sections; those that are empty keep the job's defaults."""
    options = [f"--config={ROOT}/configs/{job}.py", f"--workdir={workdir}"]
    for section in sections:
        for name, value in config[section].items():
            text = ",".join(value) if isinstance(value, tuple) else value
            options.append(f"--config.{section}.{name}={text}")
    return [option for option in options if not option.endswith("=")]


def free_port() -> int:
    """Returns a port that nobody listens on now."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]
