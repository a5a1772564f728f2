#!/usr/bin/env bash
# Submits a job to Slurm: one process per GPU, on NODES nodes with GPUS GPUs each.
#   launch/slurm.sh [--dry-run] [--wait] NODES GPUS CONFIG WORKDIR [--config.x.y=value ...]
# WORKDIR must be a folder that all nodes see. --wait stays until the job has ended and exits with its code.
# Partition, account and time limit: SBATCH_PARTITION, SBATCH_ACCOUNT, SBATCH_TIMELIMIT, which sbatch reads itself.
# PYTHON is the interpreter on the nodes (default: python). Output: WORKDIR/slurm-JOB.log.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/common.sh
source "$here/common.sh"

options=()
while (($#)); do
  case $1 in
    --wait) options+=(--wait) ;;
    *) break ;;
  esac
  shift
done
if (($# < 4)); then
  echo "usage:" >&2
  usage_of "${BASH_SOURCE[0]}" >&2
  exit 2
fi
nodes=$1 gpus=$2 config=$3 workdir=$4
shift 4
check_number NODES "$nodes"
check_number GPUS "$gpus"
check_job "$config" "$workdir"

cd "$here/.."
$DRY_RUN || mkdir -p "$workdir"
options+=("--nodes=$nodes" "--ntasks-per-node=$gpus" "--gpus-per-node=$gpus")
options+=("--output=${workdir//%/%%}/slurm-%j.log") # in sbatch's patterns %% is a percent sign
run sbatch "${options[@]}" launch/slurm.sbatch "$config" "$workdir" "$@"
