#!/usr/bin/env bash
# Runs a job on this machine and keeps its output in WORKDIR/log.txt.
#   launch/local.sh [--dry-run] [OPTIONS] CONFIG WORKDIR [--config.x.y=value ...]
#     --processes=N    N processes that work together (default 1, which needs none of the other options)
#     --gpus-each=K    process I gets K GPUs, from number I*K on
#     --cpu-devices=K  K fake devices per process, to try things out without accelerators
# A run that is interrupted (Ctrl-C, kill, reboot) continues when the same command is given again.
# If a process fails, all end; the script says which and exits with the first one's code.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/common.sh
source "$here/common.sh"

processes=1 gpus_each='' cpu_devices=''
while (($#)); do
  case $1 in
    --processes=*) processes=${1#*=} ;;
    --gpus-each=*) gpus_each=${1#*=} ;;
    --cpu-devices=*) cpu_devices=${1#*=} ;;
    *) break ;;
  esac
  shift
done
if (($# < 2)) || [[ $1 == --* ]]; then
  echo "usage:" >&2
  usage_of "${BASH_SOURCE[0]}" >&2
  exit 2
fi
check_number --processes "$processes"
check_number --gpus-each "${gpus_each:-1}"
check_number --cpu-devices "${cpu_devices:-1}"
check_job "$1" "$2"
config=$1 workdir=$2
shift 2
command=("${PYTHON:-python}" -m hybrid_dit.main "--config=$config" "--workdir=$workdir" "$@")

cd "$here/.."
if ((processes == 1)) && [[ -z $gpus_each$cpu_devices ]]; then
  if $DRY_RUN; then
    run "${command[@]}"
    exit 0
  fi
  mkdir -p "$workdir"
  # The job takes the place of this script, so that a signal reaches it; Ctrl-C must not end tee before it (-i).
  exec env PYTHONUNBUFFERED=1 "${command[@]}" > >(exec tee -ia "$workdir/log.txt") 2>&1
fi

port=${PORT:-$("${PYTHON:-python}" -c 'import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])')}
if ! $DRY_RUN; then
  mkdir -p "$workdir"
  exec 3> >(exec tee -ia "$workdir/log.txt") # -i: Ctrl-C reaches the whole group, and tee is to end last
  tee=$!
fi
pids=()
set -m # process groups of their own: Ctrl-C reaches this script alone, and a process that gets two signals does not save
for ((i = 0; i < processes; i++)); do
  settings=(PYTHONUNBUFFERED=1)
  if [[ -n $gpus_each ]]; then
    devices=$(seq -s, $((i * gpus_each)) $((i * gpus_each + gpus_each - 1)))
    settings+=("CUDA_VISIBLE_DEVICES=$devices")
  fi
  if [[ -n $cpu_devices ]]; then
    settings+=(JAX_PLATFORMS=cpu "XLA_FLAGS=--xla_force_host_platform_device_count=$cpu_devices")
  fi
  who=("--distributed.coordinator=localhost:$port" "--distributed.processes=$processes" "--distributed.process_id=$i")
  one=(env "${settings[@]}" "${command[@]}" "${who[@]}")
  if $DRY_RUN; then
    run "${one[@]}"
  else
    "${one[@]}" >&3 2>&1 3>&- &
    pids+=("$!")
  fi
done
$DRY_RUN && exit 0

# Ctrl-C and kill go on to the processes, which save and stop.
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' INT TERM
first=0
for i in "${!pids[@]}"; do
  code=0
  while :; do
    wait "${pids[$i]}" && code=0 || code=$?
    # A trapped signal ends `wait`, not the process.
    kill -0 "${pids[$i]}" 2>/dev/null || break
  done
  if ((code)); then
    printf 'error: process %d ended with code %d\n' "$i" "$code" >&2
    first=$((first ? first : code))
  fi
done
exec 3>&-
wait "$tee" || true # until everything is in the log
exit "$first"
