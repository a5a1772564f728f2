#!/usr/bin/env bash
# Runs jobs on a GKE cluster with a TPU node pool and the JobSet controller, through kubectl; see docs/pods.md.
#   launch/gke/jobset.sh [--dry-run] submit CONFIG WORKDIR [--config.x.y=value ...]
#   launch/gke/jobset.sh [--dry-run] wait      until it has ended; fails with it and shows the pods that failed
#   launch/gke/jobset.sh [--dry-run] logs      of the first process, as it comes
#   launch/gke/jobset.sh [--dry-run] delete    ends it; submit with the same arguments continues
# Settings are variables: GKE_NAME, GKE_IMAGE (with this package and [tpu] installed), GKE_CLAIM (a ReadWriteMany volume
# claim, mounted at /mnt/hybrid_dit: WORKDIR lies there); GKE_TPU (tpu-v5-lite-podslice), GKE_TOPOLOGY (4x4),
# GKE_HOSTS (4) of a slice with GKE_CHIPS (4) each, GKE_SLICES (1), GKE_RESTARTS (20), GKE_SPOT=1 for spot nodes,
# GKE_NAMESPACE (default), GKE_POLL=30. Preemption and failures start all pods again, at most GKE_RESTARTS times.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/common.sh
source "$here/../common.sh"

action=${1:-help}
(($#)) && shift
case $action in
  submit | wait | logs | delete)
    need GKE_NAME my-run
    [[ $action == submit ]] || check_alone "$action" "$@"
    ;;
  help | -h | --help)
    usage_of "${BASH_SOURCE[0]}"
    exit 0
    ;;
  *) fail "unknown command '$action'; one of submit, wait, logs, delete" ;;
esac
export GKE_NAME GKE_TPU=${GKE_TPU:-tpu-v5-lite-podslice} GKE_TOPOLOGY=${GKE_TOPOLOGY:-4x4} GKE_HOSTS=${GKE_HOSTS:-4}
export GKE_CHIPS=${GKE_CHIPS:-4} GKE_SLICES=${GKE_SLICES:-1} GKE_RESTARTS=${GKE_RESTARTS:-20} GKE_SPOT=${GKE_SPOT:-}
kubectl=(kubectl "--namespace=${GKE_NAMESPACE:-default}")
of_run="jobset.sigs.k8s.io/jobset-name=$GKE_NAME"

conditions=(get jobset "$GKE_NAME" '--output=jsonpath={.status.conditions[?(@.status=="True")].type}')

case $action in
  submit)
    need GKE_IMAGE us-docker.pkg.dev/my-project/images/hybrid-dit:1
    need GKE_CLAIM shared-disk
    (($# >= 2)) || fail "usage: launch/gke/jobset.sh submit CONFIG WORKDIR [--config.x.y=value ...]"
    check_job "$1" "$2"
    for name in GKE_HOSTS GKE_CHIPS GKE_SLICES; do check_number "$name" "${!name}"; done
    check_number GKE_RESTARTS "$GKE_RESTARTS" 0
    export GKE_IMAGE GKE_CLAIM
    manifest=$("${PYTHON:-python3}" "$here/manifest.py" "$@")
    if $DRY_RUN; then
      run "${kubectl[@]}" apply --filename=-
      printf '%s\n' "$manifest"
    else
      printf '%s\n' "$manifest" | "${kubectl[@]}" apply --filename=-
    fi
    ;;
  wait)
    if $DRY_RUN; then
      run "${kubectl[@]}" "${conditions[@]}"
      exit 0
    fi
    while :; do
      now=$("${kubectl[@]}" "${conditions[@]}")
      case " $now " in
        *" Completed "*) exit 0 ;;
        *" Failed "*) break ;;
      esac
      sleep "${GKE_POLL:-30}"
    done
    echo "error: $GKE_NAME failed; pods that did:" >&2
    "${kubectl[@]}" get pods "--selector=$of_run" --field-selector=status.phase=Failed --output=name >&2
    "${kubectl[@]}" logs "--selector=$of_run" --prefix --tail=20 >&2 || true
    exit 1
    ;;
  logs)
    first="$of_run,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
    run "${kubectl[@]}" logs "--selector=$first" --follow --tail=-1
    ;;
  delete)
    run "${kubectl[@]}" delete jobset "$GKE_NAME"
    ;;
esac
