# shellcheck shell=bash
# What the launch scripts share; sourced, not run.
# Commands are arrays of arguments from beginning to end: no string is ever parsed by a shell again.

# --dry-run counts wherever it is, since the price of missing it is a slice that is really deleted; no job has an option
# of that name. Taken out of the script's own arguments, which a sourced file shares.
DRY_RUN=false
for argument in "$@"; do
  shift
  if [[ $argument == --dry-run ]]; then
    DRY_RUN=true
  else
    set -- "$@" "$argument"
  fi
done

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

# check_number NAME VALUE [LEAST]: a whole number of at least LEAST (default 1).
check_number() {
  local least=${3:-1}
  if [[ ! $2 =~ ^(0|[1-9][0-9]{0,8})$ ]] || (($2 < least)); then
    fail "$1 is '$2', not a whole number of at least $least"
  fi
}

# check_job CONFIG WORKDIR: an option in their place would be taken for one of them.
check_job() {
  local given
  for given in "$1" "$2"; do
    [[ $given != --* ]] || fail "'$given' is where CONFIG or WORKDIR should be; settings (--config...) come after both"
  done
}

# check_alone ACTION [ARGUMENT ...]: for actions that take no arguments.
check_alone() {
  (($# == 1)) || fail "$1 takes no arguments, but got '${*:2}'; nothing was done"
}

# usage_of SCRIPT: prints the comment on top of it.
usage_of() {
  sed -n '2,/^[^#]/{/^#/!q;s/^# \{0,1\}//;p;}' "$1"
}
