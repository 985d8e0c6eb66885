#!/usr/bin/env bash
# Runs bitgen on this machine, on its CPU or on the accelerators that the installed JAX finds.
#
#   launch/local.sh [OPTIONS] -- --config=FILE --workdir=DIR [--mode=MODE] [--config.KEY=VALUE ...]
#
# After a stop or a crash, the same command resumes from the last checkpoint.
#
#   --devices=N      pretend to have N CPU devices, to try out a mesh
#   --processes=N    run N processes that talk to each other, to try out several hosts (1)
#   --port=N         port of the first process (12355)
#   --venv=DIR       virtual environment, made if bitgen is not in it (.venv)
#   --dry-run        print every command and run none
#   --help           this text
#
# Options are also read from BITGEN_DEVICES, BITGEN_PROCESSES, BITGEN_PORT, BITGEN_VENV.

# shellcheck disable=SC2154 # parse_options sets the variables
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/common.sh

parse_options "devices processes=1 port=12355" "$@"
set -- ${arguments[@]+"${arguments[@]}"}
count ${devices:+devices} processes port
check_run "$@"
note "devices=${devices:-what JAX finds} processes=$processes port=$port venv=$venv"

environment bitgen convert
command=("$venv/bin/python" -m bitgen.main)
if [ -n "$devices" ]; then
  flags="${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$devices"
  command=(env JAX_PLATFORMS=cpu XLA_FLAGS="$flags" "${command[@]}")
fi
[ "$processes" -gt 1 ] || run_last "${command[@]}" "$@"

pids=()
for ((i = 0; i < processes; i++)); do
  run_last env COORDINATOR_ADDRESS="localhost:$port" NUM_PROCESSES="$processes" PROCESS_ID="$i" \
    "${command[@]}" "$@" &
  # A dry run prints its lines in order.
  if [ -n "$dry" ]; then wait "$!"; else pids+=("$!"); fi
done
[ -z "$dry" ] || exit 0
trap 'kill -TERM "${pids[@]}" 2> /dev/null || true' TERM INT
status=0
for pid in "${pids[@]}"; do await "$pid" || status=$?; done
exit "$status"
