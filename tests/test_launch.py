"""The launch scripts: what they run, argument for argument, and that a failing job makes them fail and is named.

gcloud, kubectl, sbatch, srun, scontrol and git are stand-ins that record their arguments.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[1] / "launch"
AWKWARD = 'it\'s a "run"; with $HOME, `ls` & 100% (é)'  # a name that every careless script breaks at
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


@pytest.fixture
def stand(tmp_path):
    return Stand(tmp_path / "bin")


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


# local.sh


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


# slurm


def test_slurm_submits_with_all_arguments_as_they_are(stand, tmp_path):
    workdir = tmp_path / AWKWARD
    arguments = "2", "8", "configs/finetune.py:wan_1_3b", workdir, f"--config.prompts.train={AWKWARD}"
    dry = stand.run("slurm.sh", "--dry-run", "--wait", *arguments)
    assert not workdir.exists() and not stand.calls
    assert stand.run("slurm.sh", "--wait", *arguments).returncode == 0
    (call,) = stand.calls
    options = "--wait", "--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8"
    output = f"--output={str(workdir).replace('%', '%%')}/slurm-%j.log"
    assert call == ["sbatch", *options, output, "launch/slurm.sbatch", *map(str, arguments[2:])]
    assert commands(dry.stdout) == [call]
    stand.reply("sbatch", "exit 3")
    assert stand.run("slurm.sh", *arguments).returncode == 3


TASK = ["srun", "--kill-on-bad-exit=1", "--label", "bash", "-c"]  # then the code around a task and its two arguments


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (1, False), (75, True)])
def test_slurm_goes_back_to_the_queue_if_it_was_stopped(stand, tmp_path, code, requeued):
    stand.reply(
        "srun", f'[[ $HYBRID_DIT_STOP_CODE == 75 ]] || exit 9; echo "srun: error: task 3: exit {code}" >&2; exit {code}'
    )
    variables = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "12", "PYTHON": "my python"}
    done = stand.run("slurm.sbatch", "c.py", AWKWARD, f"--config.x={AWKWARD}", **variables)
    assert done.returncode == code and "task 3" in done.stderr
    job = ["my python", "-m", "hybrid_dit.main", "--distributed=auto", "--config=c.py", f"--workdir={AWKWARD}"]
    assert stand.calls[0][:5] == TASK and stand.calls[0][9:] == [*job, f"--config.x={AWKWARD}"]
    assert stand.calls[1:] == ([["scontrol", "requeue", "12"]] if requeued else [])


# Runs the tasks as srun does, of which each ends as its Python says, and returns the highest code, or `of_its_own`.
SRUN = """
highest=0
for i in 0 1 2; do
  code=0
  SLURM_PROCID=$i "${{@:3}}" || code=$?
  echo "task $i: $code" >>"$here/codes"
  if ((code > highest)); then highest=$code; fi
done
of_its_own={of_its_own}
exit "${{of_its_own:-$highest}}"
"""


@pytest.mark.parametrize(
    ("tasks", "of_its_own", "seen", "code"),
    [
        ((75, 75, 75), "", (0, 0, 0), 75),  # srun sees no bad exit
        ((75, 143, 143), "", (0, 143, 143), 75),  # the others were killed on their way out
        ((75, 75, 75), 143, (0, 0, 0), 75),  # srun itself says that it killed
        ((0, 0, 0), "", (0, 0, 0), 0),
        ((0, 3, 0), "", (0, 3, 0), 3),
        ((0, 0, 0), 143, (0, 0, 0), 143),
    ],
)
def test_slurm_goes_back_to_the_queue_whatever_srun_makes_of_it(stand, tmp_path, tasks, of_its_own, seen, code):
    stand.reply("srun", SRUN.format(of_its_own=of_its_own))
    python = python_that(tmp_path, f"import os, sys; sys.exit({tasks}[int(os.environ['SLURM_PROCID'])])")
    variables = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "12", "PYTHON": python}
    for _ in range(2):  # the second time as the same job, back from the queue
        done = stand.run("slurm.sbatch", "c.py", AWKWARD, **variables)
        assert done.returncode == code
    assert (stand.folder / "codes").read_text() == "".join(f"task {i}: {c}\n" for i, c in enumerate(seen)) * 2
    assert stand.calls[1:2] == ([["scontrol", "requeue", "12"]] if code == 75 else stand.calls[:1])
    assert not any((tmp_path / AWKWARD).iterdir())


def test_slurm_what_a_batch_script_that_was_killed_has_left_does_not_count(stand, tmp_path):
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "slurm-12.stopped").write_text("stopped\n")
    variables = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "12"}
    assert stand.run("slurm.sbatch", "c.py", "w", **variables).returncode == 0
    assert [call[0] for call in stand.calls] == ["srun"]


def test_slurm_a_stop_that_cannot_be_noted_is_not_taken_for_the_end(stand, tmp_path):
    stand.reply("srun", 'ln -sf /no/such/folder/file "$8"\n' + SRUN.format(of_its_own=""))
    variables = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "12", "PYTHON": python_that(tmp_path, "exit(75)")}
    assert stand.run("slurm.sbatch", "c.py", "w", **variables).returncode == 75
    assert (stand.folder / "codes").read_text().splitlines() == [f"task {i}: 75" for i in range(3)]
    assert stand.calls[1:] == [["scontrol", "requeue", "12"]]
    stand.reply("scontrol", "exit 4")
    assert stand.run("slurm.sbatch", "c.py", "w", **variables).returncode == 4


def test_slurm_signals_all_processes_of_a_task_and_it_gets_one(stand, tmp_path):
    """As slurmstepd does: the shell around the task and the task; a second signal would end it without a checkpoint."""
    code = (
        "import os, signal, sys, time\n"
        "got = []\n"
        "signal.signal(signal.SIGTERM, lambda *_: got.append(1))\n"
        "os.killpg(0, signal.SIGTERM)\n"
        "time.sleep(0.5)\n"
        "sys.exit(75 if len(got) == 1 else 9)"
    )
    stand.reply("srun", 'setsid --wait "${@:3}"; echo "task: $?" >>"$here/codes"')
    variables = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "12", "PYTHON": python_that(tmp_path, code)}
    assert stand.run("slurm.sbatch", "c.py", "w", **variables).returncode == 75
    assert (stand.folder / "codes").read_text() == "task: 0\n"


# tpu_vm.sh

POD = {"TPU_NAME": "my pod", "TPU_ZONE": "us-west4-a", "TPU_PROJECT": "p", "TPU_POLL": "0"}
WHERE = ["--zone=us-west4-a", "--project=p"]
QUEUED = ["gcloud", "compute", "tpus", "queued-resources"]
CREATE = [*QUEUED, "create", "my pod", "--node-id=my pod", *WHERE, "--accelerator-type=v5litepod-16"]
CREATE += ["--runtime-version=v2-alpha-tpuv5-lite"]
DESCRIBE = [*QUEUED, "describe", "my pod", *WHERE, "--format=value(state.state)"]
DELETE = [*QUEUED, "delete", "my pod", *WHERE, "--force", "--quiet"]


def ssh(action):
    command = f"--command=bash hybrid_dit/launch/worker.sh {action}"
    return ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "my pod", *WHERE, "--worker=all", command]


def test_tpu_create_and_delete(stand):
    assert stand.run("tpu_vm.sh", "create", **POD).returncode == 0
    more = {"TPU_SPOT": "1", "TPU_TYPE": "v6e-16", "TPU_RUNTIME": "v2-alpha-tpuv6e"}
    assert stand.run("tpu_vm.sh", "create", **POD, **more).returncode == 0
    assert stand.run("tpu_vm.sh", "delete", **POD).returncode == 0
    v6e = [*CREATE[:-2], "--accelerator-type=v6e-16", "--runtime-version=v2-alpha-tpuv6e", "--spot"]
    assert stand.calls == [CREATE, v6e, DELETE]


@pytest.mark.parametrize("variable", ["TPU_NAME", "TPU_ZONE"])
def test_tpu_settings_that_are_missing(stand, variable):
    done = stand.run("tpu_vm.sh", "create", **{k: v for k, v in POD.items() if k != variable})
    assert done.returncode == 2 and f"{variable} is not set; for example: export {variable}=" in done.stderr
    assert not stand.calls


def test_tpu_wait_sees_the_states(stand):
    states = (
        'n=$(grep -ao describe "$here/calls" | wc -l); set -- WAITING_FOR_RESOURCES PROVISIONING ACTIVE; echo "${!n}"'
    )
    stand.reply("gcloud", states)
    done = stand.run("tpu_vm.sh", "wait", **POD)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "my pod: ACTIVE" and stand.calls == [DESCRIBE] * 3
    stand.reply("gcloud", "echo FAILED")
    done = stand.run("tpu_vm.sh", "wait", **POD)
    assert done.returncode == 2 and "my pod is FAILED and will not come" in done.stderr
    stand.reply("gcloud", "echo PERMISSION_DENIED >&2; exit 1")
    done = stand.run("tpu_vm.sh", "wait", **POD)
    assert done.returncode == 1 and "PERMISSION_DENIED" in done.stderr


KEEP = 'for a in "$@"; do [[ -f $a ]] && cp "$a" "$here/sent-$(basename "$a")"; done; :'


def test_tpu_install_sends_this_commit_and_the_settings(stand):
    stand.reply("gcloud", KEEP)
    stand.reply("git", "[[ $* == *rev-parse* ]] && echo 0a1b2c")
    done = stand.run("tpu_vm.sh", "install", **POD, TPU_NFS=f"10.0.0.2:/{AWKWARD}")
    assert done.returncode == 0, done.stderr
    status, commit, settings, pack, archive, install = stand.calls
    assert status[3:] == ["status", "--porcelain"] and status[:2] == commit[:2] == pack[:2] == ["git", "-C"]
    assert pack[3:] == ["archive", "--format=tar.gz", f"--output={archive[5]}", "HEAD"]
    assert archive[:5] == ["gcloud", "compute", "tpus", "tpu-vm", "scp"]
    assert archive[6:] == ["my pod:hybrid_dit.tar.gz", *WHERE, "--worker=all"]
    assert settings[6:] == ["my pod:hybrid_dit.settings", *WHERE, "--worker=all"]
    assert install[-1].endswith("bash hybrid_dit/launch/worker.sh install") and install[:-1] == ssh("")[:-1]
    assert (stand.folder / "sent-settings").read_text() == f"10.0.0.2:/{AWKWARD}\0" + "0a1b2c\0"


def test_tpu_run_sends_the_arguments_as_they_are(stand):
    stand.reply("gcloud", KEEP)
    arguments = "configs/distill.py:wan_1_3b", f"/mnt/hybrid_dit/{AWKWARD}", f"--config.prompts.train={AWKWARD}", ""
    done = stand.run("tpu_vm.sh", "run", *arguments, **POD)
    assert done.returncode == 0, done.stderr
    assert stand.calls[0][6:] == ["my pod:hybrid_dit.arguments", *WHERE, "--worker=all"]
    assert stand.calls[1:] == [ssh("start"), ssh("follow")]
    assert (stand.folder / "sent-arguments").read_text() == "".join(f"{a}\0" for a in arguments)
    dry = commands(stand.run("tpu_vm.sh", "--dry-run", "run", *arguments, **POD).stdout)
    assert dry[1:] == [ssh("start"), ssh("follow")] and dry[0][6:] == stand.calls[0][6:]


def test_tpu_a_worker_that_fails_is_named(stand):
    follow = "[[ $* == *follow* ]] || exit 0; echo step 1; echo hybrid_dit worker w-{} ended with code {} >&2; exit {}"
    stand.reply("gcloud", follow.format(2, 137, 0))  # even if gcloud itself says nothing
    done = stand.run("tpu_vm.sh", "run", "c.py", "w", **POD)
    assert done.returncode == 1 and "step 1" in done.stdout
    assert done.stderr.endswith("error: the job failed:\nhybrid_dit worker w-2 ended with code 137\n")
    stand.reply("gcloud", follow.format(0, 0, 0))
    assert stand.run("tpu_vm.sh", "logs", **POD).returncode == 0
    stand.reply("gcloud", "exit 255")
    done = stand.run("tpu_vm.sh", "logs", **POD)
    assert done.returncode == 2 and "'launch/tpu_vm.sh logs' comes back to it" in done.stderr


@pytest.mark.parametrize(
    ("what", "arguments"),
    [
        ("scp", ["install"]),
        (":hybrid_dit.tar.gz", ["install"]),
        ("worker.sh install", ["install"]),
        ("scp", ["run", "c.py", "w"]),
        ("worker.sh start", ["run", "c.py", "w"]),
        ("worker.sh stop", ["stop"]),
        ("describe", ["resume", "c.py", "w"]),
        ("hybrid_dit.settings", ["resume", "c.py", "w"]),
        ("hybrid_dit.arguments", ["resume", "c.py", "w"]),
        ("worker.sh start", ["resume", "c.py", "w"]),
        ("create", ["create"]),
        ("delete", ["delete"]),
    ],
)
def test_tpu_fails_with_what_it_runs_and_goes_no_further(stand, what, arguments):
    stand.reply("gcloud", f"[[ $* == *describe* ]] && echo ACTIVE; [[ $* == *{what!r}* ]] && exit 7; :")
    done = stand.run("tpu_vm.sh", *arguments, **POD)
    assert done.returncode == (1 if what == "describe" else 7)
    assert [call for call in stand.calls if what in " ".join(call)] == [stand.calls[-1]]


@pytest.mark.parametrize("what", ["rev-parse", "archive"])
def test_tpu_install_fails_if_git_does(stand, what):
    stand.reply("git", f"[[ $* != *{what}* ]] || exit 128")
    assert stand.run("tpu_vm.sh", "install", **POD).returncode == 128
    assert what in stand.calls[-1]


def test_tpu_resume_asks_for_a_slice_that_was_taken_away(stand):
    """Suspended, hence deleted and requested; active at the third look."""
    reply = """
if [[ $* == *describe* ]]; then
  if grep -q create "$here/calls" -a; then echo ACTIVE; else echo SUSPENDED; fi
fi
"""
    stand.reply("gcloud", reply)
    done = stand.run("tpu_vm.sh", "resume", "c.py", "w", **POD, TPU_SPOT="1")
    assert done.returncode == 0, done.stderr
    assert stand.calls[:4] == [DESCRIBE, DELETE, [*CREATE, "--spot"], DESCRIBE]
    assert done.stdout.startswith("my pod: SUSPENDED; requesting it anew")
    assert [call[-1].rsplit(" ", 1)[-1] for call in stand.calls if "ssh" in call] == ["install", "start", "follow"]


def test_tpu_resume_on_a_slice_that_is_there_only_runs(stand):
    stand.reply("gcloud", "[[ $* == *describe* ]] && echo ACTIVE; :")
    assert stand.run("tpu_vm.sh", "resume", "c.py", "w", **POD).returncode == 0
    assert stand.calls[0] == DESCRIBE
    assert [call for call in stand.calls if "ssh" in call] == [ssh("installed"), ssh("start"), ssh("follow")]
    (stand.folder / "calls").unlink()
    stand.reply("gcloud", "[[ $* == *describe* ]] && { echo NOT_FOUND >&2; exit 1; }; :")
    stand.run("tpu_vm.sh", "resume", "c.py", "w", **POD)
    assert stand.calls[:2] == [DESCRIBE, CREATE]


def test_tpu_resume_installs_what_an_install_that_failed_has_left_out(stand, tmp_path, worker):
    """gcloud runs the commands in the worker's home; git packs the launch scripts."""
    home = tmp_path / "home"
    stand.reply(
        "git",
        f"""
case $* in
  *rev-parse*) cat "$here/commit" ;;
  *archive*) for a in "$@"; do [[ $a == --output=* ]] && tar -czf "${{a#*=}}" -C {LAUNCH.parent} launch; done ;;
esac
""",
    )
    stand.reply(
        "gcloud",
        f"""
case $* in
  *describe*) echo ACTIVE ;;
  *scp*) [[ $6 != *"$(cat "$here/fails")"* ]] || exit 1; cp "$5" "{home}/${{6#*:}}" ;;
  *ssh*) command="${{@: -1}}"; cd {home} && bash -c "${{command#--command=}}" ;;
esac
exit
""",
    )
    (stand.folder / "python3").write_text('#!/bin/sh\n! grep -q uv "$(dirname "$0")/fails"')  # installs with uv
    (stand.folder / "python3").chmod(0o755)
    shutil.rmtree(home / "hybrid_dit")

    def resume(commit, fails):
        (stand.folder / "commit").write_text(commit)
        (stand.folder / "fails").write_text(fails)
        before = len(stand.calls)
        done = stand.run("tpu_vm.sh", "resume", "c.py", "w", "0", **POD)
        return done.returncode, [call[-1].rsplit(" ", 1)[-1] for call in stand.calls[before:] if "ssh" in call]

    assert resume("1", fails="tar.gz") == (1, ["installed"])
    assert resume("1", fails="uv") == (1, ["installed", "install"])
    assert resume("1", fails="nothing") == (0, ["installed", "install", "start", "follow"])
    assert resume("1", fails="nothing") == (0, ["installed", "start", "follow"])
    assert resume("2", fails="tar.gz") == (1, ["installed"])
    assert resume("2", fails="nothing") == (0, ["installed", "install", "start", "follow"])
    worker("start", "c.py", "w", "wait")
    assert resume("3", fails="nothing") == (2, ["installed", "start"])  # nothing is replaced under a job that runs
    worker("stop")


# worker.sh


@pytest.fixture
def worker(tmp_path):
    """worker(action) in a home folder whose Python prints its arguments and ends with the code in the last one."""
    home = tmp_path / "home"
    (home / "hybrid_dit/launch").mkdir(parents=True)
    (home / "hybrid_dit_venv/bin").mkdir(parents=True)
    (home / "hybrid_dit/launch/worker.sh").write_bytes((LAUNCH / "worker.sh").read_bytes())
    code = (
        "import json, os, sys, time\nprint(json.dumps(sys.argv[1:]), flush=True)\n"
        "if sys.argv[-1] == 'wait': time.sleep(30)\nsys.exit(int(sys.argv[-1]))"
    )
    os.rename(python_that(tmp_path, code), home / "hybrid_dit_venv/bin/python")

    def run(action, *arguments):
        if arguments:
            (home / "hybrid_dit.arguments").write_text("".join(f"{a}\0" for a in arguments))
        script = home / "hybrid_dit/launch/worker.sh"
        return subprocess.run(["bash", script, action], capture_output=True, text=True, timeout=30)

    return run


def test_worker_runs_the_job_apart_and_tells_its_code(worker):
    assert worker("start", "c.py", AWKWARD, f"--config.x={AWKWARD}", "7").returncode == 0
    done = worker("follow")
    expected = ["-m", "hybrid_dit.main", "--distributed=auto", "--config=c.py", f"--workdir={AWKWARD}"]
    assert json.loads(done.stdout) == [*expected, f"--config.x={AWKWARD}", "7"]
    assert done.returncode == 7 and done.stderr.endswith(" ended with code 7\n")
    worker("start", "c.py", "w", "0")
    assert worker("follow").returncode == 0


def test_worker_runs_one_job_at_a_time_and_stops_it(worker):
    assert worker("follow").returncode == 2
    assert worker("start", "c.py", "w", "wait").returncode == 0
    again = worker("start")
    assert again.returncode == 2 and "a job is running already" in again.stderr
    worker("stop")
    assert worker("follow").returncode == 128 + signal.SIGTERM


def test_worker_has_installed_nothing_without_the_disk(worker, tmp_path):
    home = tmp_path / "home"
    for file in ("hybrid_dit.settings", "hybrid_dit/installed"):
        (home / file).write_text("\0commit\0")
    assert worker("installed").returncode == 0
    for file in ("hybrid_dit.settings", "hybrid_dit/installed"):
        (home / file).write_text("10.0.0.2:/share\0commit\0")
    assert worker("installed").returncode != 0  # nothing is mounted here


# gke

RUN = {"GKE_NAME": "my-run", "GKE_IMAGE": "image:1", "GKE_CLAIM": "disk", "GKE_POLL": "0"}


def test_gke_submits_a_manifest_with_all_arguments_as_they_are(stand):
    arguments = "configs/distill.py", f"/mnt/hybrid_dit/{AWKWARD}", f"--config.prompts.train={AWKWARD}"
    done = stand.run("gke/jobset.sh", "submit", *arguments, **RUN, GKE_HOSTS="8", GKE_TOPOLOGY="4x8")
    assert done.returncode == 0, done.stderr
    assert stand.calls == [["kubectl", "--namespace=default", "apply", "--filename=-"]]
    manifest = json.loads((stand.folder / "stdin").read_text())
    assert (manifest["kind"], manifest["metadata"]["name"]) == ("JobSet", "my-run")
    (job,) = manifest["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert (job["replicas"], spec["parallelism"], spec["completions"], spec["backoffLimit"]) == (1, 8, 8, 0)
    pod = spec["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x8" and "tolerations" not in pod
    (container,) = pod["containers"]
    assert container["command"] == ["python", "-m", "hybrid_dit.main", "--distributed=auto"]
    expected = [f"--config={arguments[0]}", f"--workdir={arguments[1]}", arguments[2]]
    assert container["args"] == expected and container["resources"]["limits"] == {"google.com/tpu": 4}
    dry = stand.run("gke/jobset.sh", "--dry-run", "submit", *arguments, **RUN, GKE_SPOT="1").stdout
    command, _, text = dry.partition("\n")
    assert commands(command) == stand.calls
    pod = json.loads(text)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true" and len(pod["tolerations"]) == 1


def test_gke_wait_fails_with_the_job_and_names_the_pods(stand):
    stand.reply("kubectl", "[[ $* == *jobset* ]] && echo StartupPolicyCompleted Completed; :")
    assert stand.run("gke/jobset.sh", "wait", **RUN).returncode == 0
    reply = (
        "case $* in *'get jobset'*) echo Failed ;; *'get pods'*) echo pod/my-run-slice-0-2 ;; *logs*) echo bad ;; esac"
    )
    stand.reply("kubectl", reply)
    done = stand.run("gke/jobset.sh", "wait", **RUN)
    assert done.returncode == 1
    assert done.stderr == "error: my-run failed; pods that did:\npod/my-run-slice-0-2\nbad\n"
    stand.reply("kubectl", "echo 'jobsets \"my-run\" not found' >&2; exit 1")
    done = stand.run("gke/jobset.sh", "wait", **RUN)
    assert done.returncode == 1 and "not found" in done.stderr


def test_gke_logs_and_delete(stand):
    stand.run("gke/jobset.sh", "logs", **RUN, GKE_NAMESPACE="team a")
    stand.run("gke/jobset.sh", "delete", **RUN)
    logs, delete = stand.calls
    assert logs[:3] == ["kubectl", "--namespace=team a", "logs"] and logs[-2:] == ["--follow", "--tail=-1"]
    assert "jobset.sigs.k8s.io/jobset-name=my-run" in logs[3]
    assert delete == ["kubectl", "--namespace=default", "delete", "jobset", "my-run"]


@pytest.mark.parametrize("arguments", [("submit", "c.py", "w"), ("logs",), ("delete",)])
def test_gke_fails_with_kubectl(stand, arguments):
    stand.reply("kubectl", "exit 7")
    assert stand.run("gke/jobset.sh", *arguments, **RUN).returncode == 7 and len(stand.calls) == 1


@pytest.mark.parametrize("variable", ["GKE_HOSTS", "GKE_CHIPS", "GKE_SLICES", "GKE_RESTARTS"])
@pytest.mark.parametrize("value", ["x", "-1", "1.5", "08", "9" * 30])
def test_gke_numbers(stand, variable, value):
    done = stand.run("gke/jobset.sh", "submit", "c.py", "w", **RUN, **{variable: value})
    least = 0 if variable == "GKE_RESTARTS" else 1
    assert done.returncode == 2 and not stand.calls
    assert done.stderr == f"error: {variable} is '{value}', not a whole number of at least {least}\n"


@pytest.mark.parametrize("variable", ["GKE_IMAGE", "GKE_CLAIM", "GKE_NAME"])
def test_gke_settings_that_are_missing(stand, variable):
    variables = {k: v for k, v in RUN.items() if k != variable}
    done = stand.run("gke/jobset.sh", "submit", "c.py", "w", **variables)
    assert done.returncode == 2 and f"{variable} is not set" in done.stderr and not stand.calls
