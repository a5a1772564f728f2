#!/usr/bin/env bash
# Runs jobs on a Cloud TPU slice, from a machine with gcloud; docs/pods.md walks through it.
#   launch/tpu_vm.sh [--dry-run] create                  requests the slice (a queued resource)
#   launch/tpu_vm.sh [--dry-run] wait                    until it is there; fails if it never will be
#   launch/tpu_vm.sh [--dry-run] install                 copies this commit to all workers, installs, mounts TPU_NFS
#   launch/tpu_vm.sh [--dry-run] run CONFIG WORKDIR [--config.x.y=value ...]
#                                                        starts the job on all workers and shows it to the end
#   launch/tpu_vm.sh [--dry-run] logs                    shows it again, from the start
#   launch/tpu_vm.sh [--dry-run] stop                    SIGTERM: it saves and stops
#   launch/tpu_vm.sh [--dry-run] resume CONFIG WORKDIR [...]   after preemption: all of the above, as far as needed
#   launch/tpu_vm.sh [--dry-run] delete                  gives the slice back, which ends the costs
# Settings are variables: TPU_NAME, TPU_ZONE; TPU_TYPE (v5litepod-16), TPU_RUNTIME (v2-alpha-tpuv5-lite), TPU_SPOT=1
# for spot capacity, TPU_PROJECT (gcloud's default), TPU_NFS=HOST:/EXPORT (mounted at /mnt/hybrid_dit), TPU_POLL=30.
# The job goes on when this script is interrupted; `logs` comes back to it. If a worker fails, the script says which.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/common.sh
source "$here/common.sh"

action=${1:-help}
(($#)) && shift
type=${TPU_TYPE:-v5litepod-16} runtime=${TPU_RUNTIME:-v2-alpha-tpuv5-lite} poll=${TPU_POLL:-30}

main() {
  case $action in
    create | wait | install | run | logs | stop | resume | delete)
      need TPU_NAME my-pod
      need TPU_ZONE us-west4-a
      where=("--zone=$TPU_ZONE")
      [[ -z ${TPU_PROJECT:-} ]] || where+=("--project=$TPU_PROJECT")
      scratch=$(mktemp -d)
      trap 'rm -rf "$scratch"' EXIT
      ;;
    help | -h | --help)
      usage_of "${BASH_SOURCE[0]}"
      exit 0
      ;;
    *) fail "unknown command '$action'; one of create, wait, install, run, logs, stop, resume, delete" ;;
  esac
  if [[ $action == run || $action == resume ]]; then
    (($# >= 2)) || fail "usage: launch/tpu_vm.sh $action CONFIG WORKDIR [--config.x.y=value ...]"
    check_job "$1" "$2"
  else
    check_alone "$action" "$@"
  fi
  "do_$action" "$@"
}

do_create() {
  local spot=()
  [[ -z ${TPU_SPOT:-} ]] || spot=(--spot)
  run gcloud compute tpus queued-resources create "$TPU_NAME" "--node-id=$TPU_NAME" "${where[@]}" \
    "--accelerator-type=$type" "--runtime-version=$runtime" ${spot[@]+"${spot[@]}"}
}

# Prints the queued resource's state (ACTIVE, WAITING_FOR_RESOURCES, ...), or MISSING.
state() {
  local out
  if ! out=$(gcloud compute tpus queued-resources describe "$TPU_NAME" "${where[@]}" '--format=value(state.state)' \
    2>"$scratch/describe"); then
    if grep -q NOT_FOUND "$scratch/describe"; then
      echo MISSING
      return
    fi
    cat "$scratch/describe" >&2
    return 1
  fi
  echo "$out"
}

do_wait() {
  if $DRY_RUN; then
    run gcloud compute tpus queued-resources describe "$TPU_NAME" "${where[@]}" '--format=value(state.state)'
    return
  fi
  local now before=''
  while :; do
    now=$(state)
    [[ $now == "$before" ]] || echo "$TPU_NAME: $now"
    before=$now
    case $now in
      ACTIVE) return ;;
      FAILED | SUSPENDING | SUSPENDED | DELETING | MISSING)
        fail "$TPU_NAME is $now and will not come; look at it with: gcloud compute tpus queued-resources describe"
        ;;
    esac
    sleep "$poll"
  done
}

# What workers run is always the same text; settings and arguments travel in files.
on_workers() {
  run gcloud compute tpus tpu-vm ssh "$TPU_NAME" "${where[@]}" --worker=all "--command=$1"
}

to_workers() {
  run gcloud compute tpus tpu-vm scp "$1" "$TPU_NAME:$2" "${where[@]}" --worker=all
}

do_install() {
  if [[ -n $(git -C "$here/.." status --porcelain) ]]; then
    echo "note: changes that are not committed stay here" >&2
  fi
  send_settings
  run git -C "$here/.." archive --format=tar.gz "--output=$scratch/hybrid_dit.tar.gz" HEAD
  to_workers "$scratch/hybrid_dit.tar.gz" hybrid_dit.tar.gz
  on_workers 'rm -rf hybrid_dit && mkdir hybrid_dit && tar -xzf hybrid_dit.tar.gz -C hybrid_dit && bash hybrid_dit/launch/worker.sh install'
}

# What `worker.sh install` is to install, and `worker.sh installed` compares with.
send_settings() {
  local commit
  commit=$(git -C "$here/.." rev-parse HEAD)
  run_into "$scratch/settings" "${TPU_NFS:-}" "$commit"
  to_workers "$scratch/settings" hybrid_dit.settings
}

# run_into FILE TEXT ...: writes the texts, each ended by a zero byte, which no argument can hold.
run_into() {
  local file=$1
  shift
  if $DRY_RUN; then
    printf '# into %q, each ended by a zero byte: ' "$file"
    printf '%q ' "$@"
    printf '\n'
  else
    printf '%s\0' "$@" >"$file"
  fi
}

do_run() {
  run_into "$scratch/arguments" "$@"
  to_workers "$scratch/arguments" hybrid_dit.arguments
  on_workers 'bash hybrid_dit/launch/worker.sh start'
  do_logs
}

do_logs() {
  local code=0 failed
  if $DRY_RUN; then
    on_workers 'bash hybrid_dit/launch/worker.sh follow'
    return
  fi
  on_workers 'bash hybrid_dit/launch/worker.sh follow' 2>&1 | tee "$scratch/log" || code=$?
  failed=$(grep -a '^hybrid_dit worker .* ended with code [1-9]' "$scratch/log" || true)
  if [[ -n $failed ]]; then
    printf 'error: the job failed:\n%s\n' "$failed" >&2
    exit 1
  fi
  ((code == 0)) || fail "gcloud ssh ended with code $code before the job did; 'launch/tpu_vm.sh logs' comes back to it"
}

do_stop() {
  on_workers 'bash hybrid_dit/launch/worker.sh stop'
}

do_resume() {
  local now=ACTIVE
  if $DRY_RUN; then
    do_wait
    echo "# if the slice is gone:"
    do_delete
    do_create
    do_wait
    echo "# if it is there, whether this commit is installed:"
    send_settings
    on_workers 'bash hybrid_dit/launch/worker.sh installed'
    echo "# if it is not:"
    do_install
    echo "# in any case:"
    do_run "$@"
    return
  fi
  now=$(state)
  case $now in
    FAILED | SUSPENDING | SUSPENDED)
      echo "$TPU_NAME: $now; requesting it anew"
      do_delete
      do_create
      ;;
    MISSING) do_create ;;
  esac
  if [[ $now != ACTIVE ]]; then
    do_wait
    do_install
  else
    # An earlier `install` may have failed on some workers.
    send_settings
    if ! on_workers 'bash hybrid_dit/launch/worker.sh installed'; then
      echo "$TPU_NAME: this commit is not installed on all workers; installing it"
      do_install
    fi
  fi
  do_run "$@"
}

do_delete() {
  run gcloud compute tpus queued-resources delete "$TPU_NAME" "${where[@]}" --force --quiet
}

main "$@"
