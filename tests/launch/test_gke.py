"""gke/jobset.sh: the manifest and what is asked of kubectl; a failing job makes it fail and is named."""

import json

import pytest
from stand import AWKWARD, RUN, commands


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
