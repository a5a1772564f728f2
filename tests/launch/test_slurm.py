"""slurm.sh and slurm.sbatch: what is submitted, and when a job goes back into the queue."""

import pytest
from stand import AWKWARD, commands, python_that


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
