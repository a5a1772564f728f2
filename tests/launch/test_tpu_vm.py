"""tpu_vm.sh and worker.sh: what is asked of gcloud, argument for argument; failing workers are named."""

import json
import os
import shutil
import signal
import subprocess

import pytest
from stand import AWKWARD, LAUNCH, POD, commands, python_that

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
