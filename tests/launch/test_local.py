"""local.sh: what it runs, argument for argument, and that a failing process makes it fail and is named."""

import os
import signal
import subprocess
import sys
import time

import pytest
from stand import AWKWARD, LAUNCH, commands, python_that


def test_local_dry_run_prints_the_command_quoted_and_runs_nothing(stand, tmp_path):
    workdir = tmp_path / AWKWARD
    done = stand.run("local.sh", "--dry-run", "configs/surgery.py", workdir, "--config.seed=1", PYTHON="/opt/my python")
    assert done.returncode == 0 and not workdir.exists()
    expected = ["--config=configs/surgery.py", f"--workdir={workdir}", "--config.seed=1"]
    assert commands(done.stdout) == [["/opt/my python", "-m", "hybrid_dit.main", *expected]]


def test_local_a_failing_job_fails_and_leaves_its_message_in_the_log(stand, tmp_path):
    done = stand.run("local.sh", "configs/no_such.py", tmp_path / "run", PYTHON=sys.executable)
    assert done.returncode == 2
    assert "configs/no_such.py does not exist" in (tmp_path / "run" / "log.txt").read_text()


def test_local_several_processes_get_their_number_and_devices(stand, tmp_path):
    options = "--processes=2", "--gpus-each=2", "--cpu-devices=3"
    done = stand.run("local.sh", "--dry-run", *options, "c.py", "w", "--config.x=a b", PORT="1234", PYTHON="python")
    each = "PYTHONUNBUFFERED=1", "CUDA_VISIBLE_DEVICES={}", "JAX_PLATFORMS=cpu"
    flags = "XLA_FLAGS=--xla_force_host_platform_device_count=3"
    job = "python", "-m", "hybrid_dit.main", "--config=c.py", "--workdir=w", "--config.x=a b"
    who = "--distributed.coordinator=localhost:1234", "--distributed.processes=2", "--distributed.process_id={}"
    assert commands(done.stdout) == [
        [text.format(number) for text, number in zip(("env", *each, flags, *job, *who), [None, None, gpus, *[i] * 99])]
        for i, gpus in enumerate(("0,1", "2,3"))
    ]


def test_local_a_process_that_fails_is_named(stand, tmp_path):
    code = "import sys; print('argv', sys.argv[1:]); sys.exit(3 if sys.argv[-1].endswith('process_id=1') else 0)"
    workdir = tmp_path / AWKWARD
    python = python_that(tmp_path, code)
    done = stand.run("local.sh", "--processes=3", "c.py", workdir, AWKWARD, PYTHON=python, PORT="1234")
    assert done.returncode == 3
    assert done.stderr == "error: process 1 ended with code 3\n"
    log = (workdir / "log.txt").read_text()
    assert log.count(repr(AWKWARD)) == 3 and done.stdout == log


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("how", ["ctrl-c", "kill"])
def test_local_a_signal_reaches_all_processes_and_their_last_words_are_logged(tmp_path, processes, how):
    code = (
        "import signal, sys, time\n"
        "got = []\n"
        "stop = lambda *_: (got.append(1), time.sleep(0.3), print('saved' * (len(got) < 2)), sys.exit())\n"
        "signal.signal(signal.SIGTERM, stop); signal.signal(signal.SIGINT, stop)\n"
        "print('ready', flush=True); time.sleep(30)"
    )
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": python_that(tmp_path, code), "PORT": "1234"}
    command = [LAUNCH / "local.sh", f"--processes={processes}", "c.py", str(tmp_path / "run")]
    script = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)
    log = tmp_path / "run" / "log.txt"
    while not log.is_file() or log.read_text().count("ready") < processes:
        time.sleep(0.02)
    if how == "ctrl-c":
        os.killpg(script.pid, signal.SIGINT)  # as a terminal does
    else:
        script.terminate()
    out, _ = script.communicate(timeout=20)  # until nobody holds the other end
    assert script.returncode == 0 and out.count("saved") == processes
    assert log.read_text() == out
