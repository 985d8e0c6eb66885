#!/usr/bin/env bash
# Runs on every host of a TPU, in the checkout that launch/tpu.sh copied there.
#
#   launch/tpu_worker.sh install [SOURCE DIR]        make the environment, mount the storage
#   launch/tpu_worker.sh start BITGEN_ARGUMENTS...   start in the background, unless it is running
#   launch/tpu_worker.sh state | log | stop
#
# The run outlives the connection. It holds a lock, which a reboot releases.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/common.sh

records="${BITGEN_RECORDS:-$HOME/bitgen-run}" # log, lock and state
[ -n "$dry" ] || mkdir -p "$records"

# Whether a program is missing; a dry run assumes that it is.
lacks() { [ -n "$dry" ] || ! command -v "$1" > /dev/null; }

running() { ! flock --shared --nonblock "$records/lock" true; }

# running | ended STATUS | stopped (by the machine) | halted (by the user) | gone (by a reboot) | none
state() {
  if running; then
    echo running
  elif [ -s "$records/state" ]; then
    cat "$records/state"
  elif [ -e "$records/pid" ]; then
    echo gone
  else
    echo none
  fi
}

attach() { # SOURCE DIR
  if [ -z "$dry" ] && mountpoint --quiet "$2"; then return; fi
  run sudo mkdir -p "$2"
  case "$1" in
    gs://*)
      if lacks gcsfuse; then
        local from=https://packages.cloud.google.com/apt key=/usr/share/keyrings/cloud.google.asc
        local line="deb [signed-by=$key] $from gcsfuse-\$(lsb_release -cs) main"
        run sudo curl -fsS -o "$key" "$from/doc/apt-key.gpg"
        run bash -c "echo \"$line\" | sudo tee /etc/apt/sources.list.d/gcsfuse.list > /dev/null"
        run sudo apt-get -qq update
        run sudo apt-get -qq install -y gcsfuse
      fi
      run sudo chown "$(id -un)" "$2"
      run gcsfuse --implicit-dirs --rename-dir-limit=1000000 "${1#gs://}" "$2"
      ;;
    *:/*)
      if lacks mount.nfs; then
        run sudo apt-get -qq update
        run sudo apt-get -qq install -y nfs-common
      fi
      run sudo mount -t nfs "$1" "$2"
      ;;
    *) fail "cannot mount $1: gs://BUCKET or HOST:/EXPORT" ;;
  esac
}

too_old() { ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; }

install() { # [SOURCE DIR]
  if [ $# -eq 2 ]; then attach "$1" "$2"; fi
  if [ ! -e "$venv" ] && { [ -n "$dry" ] || too_old; }; then
    # TPU images come with Python 3.10; a dry run assumes so too.
    run "$python" -m pip install --user --quiet uv
    run "$python" -m uv venv --quiet --seed --python=3.12 "$venv"
  fi
  [ ! -e "$venv" ] || python="$venv/bin/python"
  environment libtpu convert 'jax[tpu]'
}

start() { # BITGEN_ARGUMENTS
  [ -z "$dry" ] || run_last env JAX_PLATFORMS=tpu,cpu "$venv/bin/python" -m bitgen.main "$@"
  if running; then
    note "a run is going on here already"
    return
  fi
  rm -f "$records/state" "$records/halt"
  echo starting > "$records/pid"
  setsid nohup bash launch/tpu_worker.sh supervise "$@" >> "$records/log" 2>&1 < /dev/null &
  for _ in 1 2 3 4 5 6 7 8 9 10; do
    if running || [ -s "$records/state" ]; then return; fi
    sleep 1
  done
  fail "the run did not start; see $records/log"
}

# Runs bitgen under the lock, passes signals on, and records how it ended.
supervise() {
  local status=0 told="" child
  exec 9> "$records/lock"
  flock --timeout 5 9 || fail "a run is going on here already"
  echo "$$" > "$records/pid"
  trap 'told=1; kill -TERM "$child"' TERM INT HUP
  export JAX_PLATFORMS=tpu,cpu # an error where JAX would use the CPU alone
  echo "+ $(quoted "$venv/bin/python" -m bitgen.main "$@")"
  "$venv/bin/python" -m bitgen.main "$@" &
  child=$!
  await "$child" || status=$?
  if [ -e "$records/halt" ]; then
    echo halted > "$records/state"
  elif [ -n "$told" ]; then
    echo stopped > "$records/state"
  else
    echo "ended $status" > "$records/state"
  fi
}

halt() {
  running || return 0
  touch "$records/halt"
  kill -TERM "$(cat "$records/pid")"
  note "told the run to save and stop"
  # Wait until it releases the lock.
  flock --timeout 600 "$records/lock" true || fail "it has not stopped in ten minutes"
}

action="${1:-}"
[ $# -eq 0 ] || shift
case "$action" in
  install) install "$@" ;;
  start) start "$@" ;;
  supervise) supervise "$@" ;;
  state) echo "bitgen-run: $(state)" ;;
  log) tail -n "${1:-40}" "$records/log" | sed "s/^/$(hostname): /" ;;
  stop) halt ;;
  *) fail "unknown action '$action'" ;;
esac
