#!/usr/bin/env bash
# Runs on each worker of a TPU slice, by launch/tpu_vm.sh: install, installed, start, follow or stop, in the home folder.
# Reads ~/hybrid_dit.settings (the NFS export, the commit) and ~/hybrid_dit.arguments (CONFIG WORKDIR ...), texts ended by
# zero bytes.
set -euo pipefail
home=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
venv=$home/hybrid_dit_venv log=$home/hybrid_dit.log pid_file=$home/hybrid_dit.pid code_file=$home/hybrid_dit.code
mark=$home/hybrid_dit/installed # the settings that were installed; goes with the folder when another install begins
name=$(hostname)

running() {
  [[ -f $pid_file ]] && kill -0 "$(cat "$pid_file")" 2>/dev/null
}

read_settings() {
  mapfile -d '' settings <"$home/hybrid_dit.settings"
  nfs=${settings[0]:-}
}

case ${1:-} in
  install)
    read_settings
    if [[ -n $nfs ]] && ! mountpoint -q /mnt/hybrid_dit; then
      command -v mount.nfs >/dev/null || { sudo apt-get update -q && sudo apt-get install -q -y nfs-common; }
      sudo mkdir -p /mnt/hybrid_dit
      sudo mount -t nfs "$nfs" /mnt/hybrid_dit
    fi
    # The image's Python is 3.10; uv brings a newer one.
    [[ -x $venv/bin/python ]] || { python3 -m pip install --user --quiet uv && python3 -m uv venv --python 3.12 "$venv"; }
    python3 -m uv pip install --quiet --python "$venv/bin/python" -e "$home/hybrid_dit[tpu]"
    cp "$home/hybrid_dit.settings" "$mark" # last: all that comes before has worked
    echo "hybrid_dit worker $name: installed"
    ;;
  installed) # whether `install` with these settings has come to its end
    running && exit 0 # the files of a job that runs are not to be replaced
    cmp --silent "$home/hybrid_dit.settings" "$mark" || exit 1
    read_settings
    [[ -z $nfs ]] || mountpoint -q /mnt/hybrid_dit # lost if the machine was started anew
    ;;
  start)
    if running; then
      echo "hybrid_dit worker $name ended with code 2: a job is running already; stop it first" >&2
      exit 2
    fi
    mapfile -d '' arguments <"$home/hybrid_dit.arguments"
    command=("$venv/bin/python" -m hybrid_dit.main --distributed=auto "--config=${arguments[0]}"
      "--workdir=${arguments[1]}" "${arguments[@]:2}")
    rm -f "$code_file" "$pid_file"
    : >"$log"
    cd "$home/hybrid_dit"
    export PYTHONUNBUFFERED=1
    # In a session of its own, so that it outlives this connection; the code is left in a file.
    # shellcheck disable=SC2016  # the inner shell expands its own arguments
    setsid bash -c '"${@:3}" & echo $! >"$1"; code=0; wait $! || code=$?; echo $code >"$2.new"; mv "$2.new" "$2"' \
      bash "$pid_file" "$code_file" "${command[@]}" >"$log" 2>&1 </dev/null &
    until [[ -s $pid_file ]]; do sleep 0.1; done
    ;;
  follow)
    [[ -f $pid_file ]] || { echo "hybrid_dit worker $name ended with code 2: no job was started here" >&2 && exit 2; }
    tail -n +1 -F --pid="$(cat "$pid_file")" "$log" 2>/dev/null || true
    for _ in {1..50}; do # written right after the end
      [[ -f $code_file ]] && break
      sleep 0.1
    done
    code=$(cat "$code_file" 2>/dev/null || echo 1) # no code: the machine was started anew
    echo "hybrid_dit worker $name ended with code $code" >&2
    exit "$code"
    ;;
  stop)
    if running; then kill -TERM "$(cat "$pid_file")"; fi
    ;;
  *)
    echo "usage: worker.sh install|installed|start|follow|stop (by launch/tpu_vm.sh)" >&2
    exit 2
    ;;
esac
