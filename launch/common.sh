# Sourced by the launchers: options, dry runs, quoting, checks and errors. Works with macOS's bash 3.2.
# shellcheck shell=bash disable=SC2034

dry="${BITGEN_DRY_RUN:-}"
venv="${BITGEN_VENV:-${VENV:-.venv}}"
python="${PYTHON:-python3}"

fail() {
  echo "error: $*" >&2
  exit 2
}

note() { echo "# $*"; }

# ---- Options ----

# parse_options "NAME[=DEFAULT] ..." WORD ...: sets a variable for each name, from --NAME=VALUE, else
# from BITGEN_NAME, else from its default. The words after -- become the array `arguments`.
# Underscores keep the local names apart from those of options.
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
    if [[ "$1" == --*=* && "$_names" == *" $_name "* ]]; then
      printf -v "$_name" '%s' "${1#*=}"
    else
      own_option "$1" || shared_option "$1"
    fi
    shift
  done
  [ $# -eq 0 ] || shift
  arguments=("$@")
}

# A launcher with options of another form redefines this; status 1: the option is not one of them.
own_option() { return 1; }

# Options of every launcher; anything else is an error.
shared_option() {
  case "$1" in
    --dry-run) dry=1 ;;
    --venv=*) venv="${1#*=}" ;;
    --help | -h)
      # The comment at the top of the script.
      sed -n -e 1d -e '/^#/!q' -e 's/^# \{0,1\}//p' "$0"
      exit 0
      ;;
    *) fail "unknown option $1; launch/$(basename "$0") --help lists them, bitgen's own go behind --" ;;
  esac
}

# count NAME ...: checks that these options are whole numbers of at least 1.
count() {
  local _name
  for _name in "$@"; do
    case "${!_name}" in
      '' | 0* | *[!0-9]*) fail "--$_name is a number, 1 or more, got '${!_name}'" ;;
    esac
  done
}

# Checks that the words after -- tell bitgen what to run and where.
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

# need COMMAND REMEDY: checks that a program is installed; a dry run does without it.
need() {
  [ -n "$dry" ] || command -v "$1" > /dev/null || fail "$1 is not installed: $2"
}

# ---- Commands ----

# Prints the words as one line that a shell reads back as the same words.
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

# Prints a command and runs it; a dry run only prints it.
run() {
  if [ -n "$dry" ]; then
    quoted "$@"
  else
    echo "+ $(quoted "$@")" >&2
    "$@"
  fi
}

# Like run, but replaces this shell, so that signals reach the command.
run_last() {
  if [ -n "$dry" ]; then
    quoted "$@"
    exit 0
  fi
  echo "+ $(quoted "$@")" >&2
  exec "$@"
}

# run_again RESTARTS COMMAND ...: like run_last, but restarts the command while it ends with status 75,
# which means that something failed that is not a setting, such as another machine.
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

# Waits for a child process, even while signals are trapped; returns its status.
await() {
  while kill -0 "$1" 2> /dev/null; do wait "$1" || true; done
  wait "$1"
}

# environment PACKAGE EXTRA [MORE ...]: makes $venv, unless PACKAGE is installed there.
environment() {
  local package="$1"
  shift
  if compgen -G "$venv/lib/python3*/site-packages/$package-*.dist-info" > /dev/null; then
    return
  fi
  # torch only reads checkpoints of others, so its small build without GPU libraries is enough.
  run env VENV="$venv" PYTHON="$python" \
    PIP_EXTRA_INDEX_URL="${PIP_EXTRA_INDEX_URL:-https://download.pytorch.org/whl/cpu}" \
    bash launch/environment.sh "$@"
}
