"""Several processes of one run: the command line, and real ones that fail, end and are killed together."""

import os
import signal
import subprocess
import sys
import time

import pytest
from several import ROOT, Several

from hybrid_dit import processes
from hybrid_dit.errors import UserError
from hybrid_dit.processes import Options, parse

# A run of `main` whose job is the code in sys.argv[-1]; all other arguments are for `main`.
PROGRAM = """
import os, signal, sys, time
from hybrid_dit import main, process_group, processes
process_group.LOST = 2.0
def job(config, workdir):
    import jax, numpy as np
    from hybrid_dit import jobs
    from hybrid_dit.errors import UserError
    index = jax.process_index()
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("x",))
    split, whole = (jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)) for axes in ("x", ""))
    def collective():
        return float(jax.jit(lambda x: x.sum(), out_shardings=whole)(jax.device_put(np.ones(8), split)))
    print("in the job", flush=True)
    here = locals() | globals()
    exec("def run():\\n  " + code.replace("\\n", "\\n  "), here)
    return here["run"]()
code = sys.argv.pop()
from hybrid_dit import jobs
jobs.load = lambda name: type("Job", (), {"run": staticmethod(job)})
jobs.TOGETHER += ("sample",)
sys.exit(main.main(sys.argv))
"""


def several(folder, code, *arguments, **variables):
    options = "--config=configs/sample.py", f"--workdir={folder / 'run'}"
    return Several(folder, PROGRAM, *options, *arguments, code, **variables)


def test_they_end_together_and_the_first_alone_prints(tmp_path):
    code = """
assert collective() == 8 and len(processes.devices()) == 8
found = processes.on_main(lambda: [len(processes.devices()), processes.on_main(lambda: index)])
assert found == [4, 0], found
processes.barrier("all", 20)
print("devices", *found)
time.sleep(index)  # the first waits for the second
"""
    (first, told, error), (second, silent, other) = several(tmp_path, code).finish()
    assert (first, second) == (0, 0), error + other
    assert "in the job\ndevices 4 0\n" in told and "in the job" not in silent
    assert error == other == ""


def test_the_first_does_some_jobs_alone_and_all_get_the_exit_code(tmp_path):
    """JAX sets up its devices with all processes: they must have done so before one of them is alone."""
    code = "print('sum', jax.numpy.ones(len(processes.devices())).sum())\nreturn 1"
    (first, told, error), (second, silent, other) = several(tmp_path, code, "--config.job=evaluate").finish()
    assert (first, second) == (1, 1) and "in the job\nsum 4.0\n" in told and "sum" not in silent
    assert error == other == ""


def test_a_process_that_fails_ends_the_one_that_waits_for_it(tmp_path):
    began = time.monotonic()
    code = "collective()\nif index: raise OSError('no space left on device')\ncollective()"
    (first, _, told), (second, _, own) = several(tmp_path, code).finish()
    assert (first, second) == (1, 1)
    assert "error: process 1 on " in told and "failed first: OSError: no space left on device\n" in told
    assert "Gloo" not in told and "Traceback" not in told
    assert "Traceback" in own and own.endswith("error: OSError: no space left on device\n")
    assert time.monotonic() - began < 60  # starting up included; JAX alone would take 100 s to notice


def test_bad_input_is_told_once(tmp_path):
    results = several(tmp_path, "", "--config.seeed=1").finish()
    assert [code for code, _, _ in results] == [2, 2]
    assert "".join(error for _, _, error in results) == "error: unknown config key --config.seeed; did you mean seed?\n"


def test_a_killed_process_is_found_out(tmp_path):
    code = "collective()\nif index: os.kill(os.getpid(), signal.SIGKILL)\ncollective()"
    (first, _, told), (second, _, _) = several(tmp_path, code).finish()
    assert (first, second) == (1, -signal.SIGKILL)
    assert "error: process 1 on " in told and "failed first: no sign of life for 2 s; it was killed" in told


@pytest.mark.parametrize("code", [0, 75])
def test_sigterm_outside_of_loops_ends_all_at_once(tmp_path, code):
    job = "if index: os.kill(os.getpid(), signal.SIGTERM)\nprocesses.on_main(time.sleep, 60)"
    first, second = several(tmp_path, job, HYBRID_DIT_STOP_CODE=str(code or "")).finish()
    assert (first[0], second[0]) == (code, code)
    told = f"stopped with exit code {code}; the same command continues\n"
    assert first[2].startswith("process 1 on ") and first[2].endswith(f" {told}") and second[2] == told


def test_sigterm_ends_a_single_process_even_while_it_is_busy(tmp_path):
    """A function in C that takes minutes stands for a compilation: both keep Python's signal handlers waiting."""
    busy = """
import hashlib, threading
threading.Timer(1, os.kill, (os.getpid(), signal.SIGTERM)).start()
hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
"""
    command = [sys.executable, "-c", PROGRAM, "--config=configs/sample.py", f"--workdir={tmp_path}", busy]
    began = time.monotonic()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100)
    assert run.returncode == 0 and run.stderr == "stopped with exit code 0; the same command continues\n"
    assert "in the job\n" in run.stdout and time.monotonic() - began < 60


def test_sigterm_to_one_of_two_saves_both_at_the_same_step_and_they_continue(tmp_path):
    """Each step adds 1 to an array that lies on both; the second run starts where the first was when it saved."""
    code = """
from hybrid_dit.checkpoint import Checkpoints
from hybrid_dit.interruption import Interruption
add = jax.jit(lambda x: x + 1)
with Checkpoints(workdir / "checkpoints") as checkpoints, Interruption() as interruption:
    state = {"x": jax.device_put(np.zeros(8), split)}
    first, state = checkpoints.restore(state) or (0, state)
    x = state["x"]
    print("from", first)
    for n in range(first + 1, first + 1000):
        x = add(x)
        assert float(jax.jit(lambda x: x.sum(), out_shardings=whole)(x)) == 8 * n
        if index and n == first + 3:
            os.kill(os.getpid(), signal.SIGTERM)
        if interruption.due():
            checkpoints.save(n, {"x": x})
            print("saved", n)
            interruption.stop()
"""
    code, saved = code.replace("workdir", "workdir.parents[1]"), [0]
    for run in "ab":
        (first, out, error), (second, _, other) = several(tmp_path / run, code).finish()
        assert (first, second) == (0, 0), error + other
        assert "stopping after this step" in other and error == ""
        told = out[out.index("from") :].split()
        assert told[:2] == ["from", str(saved[-1])] and told[2] == "saved" and int(told[3]) > saved[-1] + 3
        saved.append(int(told[3]))


def test_a_process_that_is_left_alone_says_so(tmp_path):
    run = several(tmp_path, "", "--distributed.timeout=2")
    run.processes[0].kill()
    _, (code, _, error) = run.finish()
    assert code != 0
    assert error.startswith("process 1 of 2 at localhost:")
    assert "waits for the others, for 2 s at most; is every one of them started" in error


def test_auto_without_a_cluster_is_told(tmp_path):
    program = "import sys\nfrom hybrid_dit import main\nsys.exit(main.main(sys.argv))"
    run = subprocess.run(
        [sys.executable, "-c", program, "--distributed=auto", "--config=configs/sample.py"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "TPU_SKIP_MDS_QUERY": "1"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert run.returncode == 2
    assert run.stderr.startswith("error: the processes of this run can't come together (coordinator_address should be")


def test_one_process_needs_no_options():
    assert parse(["--config=a", "--workdir", "b"], {}) == (None, ["--config=a", "--workdir", "b"])
    assert parse([], {"JAX_NUM_PROCESSES": "4"}) == (None, [])
    assert processes.is_main() and processes.count() == 1
    assert processes.on_main(max, 3, 4) == 4 and processes.stop(15) == 15 and processes.stop(None) is None
    processes.barrier("alone", 0.0)


def test_the_others_are_found_by_options_by_variables_or_by_jax():
    given = ["--distributed.coordinator=h:1", "--distributed.processes=4", "--distributed.process_id=3"]
    assert parse([*given, "--workdir=x"], {}) == (Options("h:1", 4, 3), ["--workdir=x"])
    variables = {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
    assert parse(["--distributed.timeout=9"], variables) == (Options("h:1", 4, 3, 9), [])
    assert parse(["--distributed=auto"], variables) == (Options(), [])


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        (["--distributed=yes"], {}, "--distributed=yes is unknown; several processes: --distributed=auto"),
        (["--distributed.cordinator=h:1"], {}, "unknown option --distributed.cordinator"),
        (["--distributed=auto", "--distributed.processes=2"], {}, "finds out --distributed.processes by itself"),
        (["--distributed.processes=2"], {}, "--distributed.coordinator is missing"),
        (["--distributed.coordinator=h:1", "--distributed.process_id=0"], {}, "--distributed.processes is missing"),
        ([], {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "2"}, "JAX_PROCESS_ID is missing"),
        ([], {"JAX_COORDINATOR_ADDRESS": "h", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}, "h is not HOST:PORT"),
        ([], {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"}, "must be less than"),
        ([], {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "x", "JAX_PROCESS_ID": "0"}, "not a whole number"),
        (["--distributed.timeout=0"], {}, "--distributed.timeout=0 is not a whole number of at least 1"),
    ],
)
def test_options_that_are_wrong(arguments, variables, message):
    with pytest.raises(UserError) as info:
        parse(arguments, variables)
    assert message in str(info.value)
