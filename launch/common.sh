# shellcheck shell=bash
# What the launch scripts share; sourced, not run.
# Commands are arrays of arguments from beginning to end: no string is ever parsed by a shell again.

DRY_RUN=false

# run COMMAND [ARGUMENT ...]: runs it, or prints it (quoted for a shell) with --dry-run.
run() {
  if $DRY_RUN; then
    printf '%q ' "$@"
    printf '\n'
  else
    "$@"
  fi
}

# fail MESSAGE: what is wrong and what to do.
fail() {
  printf 'error: %s\n' "$1" >&2
  exit 2
}

# need VARIABLE EXAMPLE: the setting must be there.
need() {
  [[ -n "${!1:-}" ]] || fail "$1 is not set; for example: export $1=$2"
}

# usage_of SCRIPT: prints the comment on top of it.
usage_of() {
  sed -n '2,/^[^#]/{/^#/!q;s/^# \{0,1\}//;p;}' "$1"
}
