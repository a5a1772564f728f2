#!/usr/bin/env bash
# Runs a job on this machine and keeps its output in WORKDIR/log.txt.
#   launch/local.sh [--dry-run] CONFIG WORKDIR [--config.x.y=value ...]
# A run that is interrupted (Ctrl-C, kill, reboot) continues when the same command is given again.
set -euo pipefail

dry_run=false
if [[ "${1:-}" == "--dry-run" ]]; then
  dry_run=true
  shift
fi
if (($# < 2)); then
  echo "usage: $0 [--dry-run] CONFIG WORKDIR [--config.x.y=value ...]" >&2
  exit 2
fi
config=$1 workdir=$2
shift 2
command=("${PYTHON:-python}" -m hybrid_dit.main "--config=$config" "--workdir=$workdir" "$@")

if $dry_run; then
  printf '%q ' "${command[@]}"
  printf '\n'
  exit 0
fi
cd "$(dirname "$0")/.."
mkdir -p "$workdir"
PYTHONUNBUFFERED=1 "${command[@]}" 2>&1 | tee -a "$workdir/log.txt"
