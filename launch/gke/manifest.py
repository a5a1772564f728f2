"""Prints the JobSet for a job on a GKE cluster with TPUs, as JSON, which kubectl reads like YAML.

Settings come from the environment (see jobset.sh), the job's arguments from the command line. They are data from
beginning to end: containers start Python directly, without a shell.
"""

import json
import os
import sys


def jobset(settings: dict[str, str], arguments: list[str]) -> dict:
    """Returns the manifest: a job per slice with a pod per host; if a pod fails, all start again and continue.

    Args:
        settings: GKE_NAME, GKE_IMAGE, GKE_CLAIM, GKE_TPU, GKE_TOPOLOGY, GKE_HOSTS, GKE_CHIPS, GKE_SLICES, GKE_RESTARTS,
            GKE_SPOT.
        arguments: CONFIG WORKDIR [--config.x.y=value ...].
    """
    config, workdir, *rest = arguments
    chips = {"google.com/tpu": int(settings["GKE_CHIPS"])}
    container = {
        "name": "hybrid-dit",
        "image": settings["GKE_IMAGE"],
        "command": ["python", "-m", "hybrid_dit.main", "--distributed=auto"],
        "args": [f"--config={config}", f"--workdir={workdir}", *rest],
        "env": [
            {"name": "PYTHONUNBUFFERED", "value": "1"},
            # 0 would count as finished: a job that was told to stop is to be started again.
            {"name": "HYBRID_DIT_STOP_CODE", "value": "75"},
        ],
        "resources": {"requests": chips, "limits": chips},
        "volumeMounts": [{"name": "workdir", "mountPath": "/mnt/hybrid_dit"}],
    }
    selector = {
        "cloud.google.com/gke-tpu-accelerator": settings["GKE_TPU"],
        "cloud.google.com/gke-tpu-topology": settings["GKE_TOPOLOGY"],
    }
    if settings["GKE_SPOT"]:
        selector["cloud.google.com/gke-spot"] = "true"
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": 120,  # to save; spot nodes get less
        "nodeSelector": selector,
        "containers": [container],
        "volumes": [{"name": "workdir", "persistentVolumeClaim": {"claimName": settings["GKE_CLAIM"]}}],
    }
    if settings["GKE_SPOT"]:
        spot = {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"}
        pod["tolerations"] = [spot]
    hosts = int(settings["GKE_HOSTS"])
    job = {"parallelism": hosts, "completions": hosts, "backoffLimit": 0, "template": {"spec": pod}}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": settings["GKE_NAME"],
            # One slice's job is alone on its node pool.
            "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
        },
        "spec": {
            "failurePolicy": {"maxRestarts": int(settings["GKE_RESTARTS"])},
            "replicatedJobs": [
                {"name": "slice", "replicas": int(settings["GKE_SLICES"]), "template": {"spec": job}},
            ],
        },
    }


if __name__ == "__main__":
    names = {name: value for name, value in os.environ.items() if name.startswith("GKE_")}
    print(json.dumps(jobset(names, sys.argv[1:]), indent=2))
