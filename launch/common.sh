# Sourced by the launchers: dry runs, quoting, checks and errors. Works with bash 3.2 of macOS too.
# shellcheck shell=bash disable=SC2034

dry="${BITGEN_DRY_RUN:-}"
venv="${BITGEN_VENV:-${VENV:-.venv}}"
python="${PYTHON:-python3}"

fail() {
  echo "error: $*" >&2
  exit 2
}

note() { echo "# $*"; }

# The words as one line that a shell reads back as the same words.
quoted() {
  local word line="" quote="'\\''"
  for word in "$@"; do
    case "$word" in
      '' | *[!A-Za-z0-9_./:=,@%+-]*) word="'${word//\'/$quote}'" ;;
    esac
    line="$line${line:+ }$word"
  done
  printf '%s\n' "$line"
}

# Prints a command and runs it; in a dry run prints it alone.
run() {
  if [ -n "$dry" ]; then
    quoted "$@"
  else
    echo "+ $(quoted "$@")" >&2
    "$@"
  fi
}

# The same, in place of this shell, so that signals reach the command.
run_last() {
  [ -z "$dry" ] || {
    quoted "$@"
    exit 0
  }
  echo "+ $(quoted "$@")" >&2
  exec "$@"
}

# run_again RESTARTS COMMAND ...: the same, and once more where it ends with status 75: something went
# wrong that is none of its settings.
run_again() {
  local left="$1" status told=""
  shift
  [ -z "$dry" ] || run_last "$@"
  trap 'told=1; kill -TERM "$child" 2> /dev/null || true' TERM INT
  while true; do
    echo "+ $(quoted "$@")" >&2
    "$@" &
    child=$!
    status=0
    await "$child" || status=$?
    if [ "$status" -ne 75 ] || [ -n "$told" ] || [ "$left" -eq 0 ]; then exit "$status"; fi
    left=$((left - 1))
    note "starting it again, at most $left times more"
  done
}

# Options that every launcher takes; anything else is an error.
shared_option() {
  case "$1" in
    --dry-run) dry=1 ;;
    --venv=*) venv="${1#*=}" ;;
    --help | -h)
      # The comment that the script begins with.
      sed -n -e 1d -e '/^#/!q' -e 's/^# \{0,1\}//p' "$0"
      exit 0
      ;;
    *) fail "unknown option $1; launch/$(basename "$0") --help lists them, bitgen's own go behind --" ;;
  esac
}

# parse_options "NAME[=DEFAULT] ..." WORDS...: sets a variable for each name, from --NAME=VALUE, else from
# BITGEN_NAME, else its default. `arguments` are the words that follow --. The locals have names that
# no option has.
parse_options() {
  local _names=" " _spec _name _variable
  for _spec in $1; do
    _name="${_spec%%=*}"
    _names="$_names$_name "
    _variable="BITGEN_$(printf '%s' "$_name" | tr '[:lower:]' '[:upper:]')"
    [ "$_spec" != "$_name" ] || _spec="$_name="
    printf -v "$_name" '%s' "${!_variable:-${_spec#*=}}"
  done
  shift
  while [ $# -gt 0 ] && [ "$1" != -- ]; do
    _name="${1%%=*}"
    _name="${_name#--}"
    case "$1 $_names" in
      --*=*" $_name "*) printf -v "$_name" '%s' "${1#*=}" ;;
      *) own_option "$1" || shared_option "$1" ;;
    esac
    shift
  done
  [ $# -eq 0 ] || shift
  arguments=("$@")
}

# A launcher with other options than --NAME=VALUE defines this again; 1: it is not one of them.
own_option() { return 1; }

# need COMMAND REMEDY: that a program is there; a dry run does without.
need() {
  [ -n "$dry" ] || command -v "$1" > /dev/null || fail "$1 is not installed: $2"
}

# count NAME VALUE: that an option is a whole number of at least 1.
count() {
  case "$2" in
    '' | 0* | *[!0-9]*) fail "--$1 is a number, 1 or more, got '$2'" ;;
  esac
}

# That the words behind -- tell bitgen what to run and where.
check_run() {
  local word config="" workdir=""
  for word in "$@"; do
    case "$word" in
      --config | --config=?*) config=1 ;;
      --workdir | --workdir=?*) workdir=1 ;;
    esac
  done
  [ -n "$config" ] || fail "no --config=FILE: put bitgen's arguments behind --, as in -- --config=configs/bigr.py:L --workdir=runs/bigr_L"
  [ -n "$workdir" ] || fail "no --workdir=DIR behind --: the directory that the run writes to"
}

# environment PACKAGE EXTRA [MORE ...]: makes $venv, unless PACKAGE is installed there.
environment() {
  local package="$1"
  shift
  if compgen -G "$venv/lib/python3*/site-packages/$package-*.dist-info" > /dev/null; then
    return
  fi
  # torch only reads files of others: its build without GPU libraries is enough, and in nobody's way.
  run env VENV="$venv" PYTHON="$python" \
    PIP_EXTRA_INDEX_URL="${PIP_EXTRA_INDEX_URL:-https://download.pytorch.org/whl/cpu}" \
    bash launch/environment.sh "$@"
}

# Waits for a child, also through signals that are trapped here; returns its status.
await() {
  while kill -0 "$1" 2> /dev/null; do wait "$1" || true; done
  wait "$1"
}
