#!/usr/bin/env bash
# Runs bitgen on the NVIDIA GPUs of this machine, or of several with the same command on each.
#
#   launch/gpu.sh [OPTIONS] -- --config=FILE --workdir=DIR [--mode=MODE] [--config.KEY=VALUE ...]
#
# One process uses all GPUs of a machine. After a stop, a preemption or a crash, the same command
# resumes from the last checkpoint; after the loss of another machine, the run restarts by itself. With
# several machines, the workdir must be on storage that all of them see.
#
#   --gpus=0,1             use only these GPUs (all)
#   --nodes=N              number of machines (1)
#   --node=I               index of this machine, from 0
#   --coordinator=HOST:P   machine 0, and a port that is free there and open to the others
#   --restarts=N           at most this many restarts by itself (20)
#   --cuda=JAX_EXTRA       JAX's extra to install (cuda13)
#   --venv=DIR             virtual environment, made if JAX's GPU package is not in it (.venv)
#   --dry-run              print every command and run none
#   --help                 this text
#
# Options are also read from BITGEN_GPUS, BITGEN_NODES, BITGEN_NODE, BITGEN_COORDINATOR,
# BITGEN_RESTARTS, BITGEN_CUDA, BITGEN_VENV.

# shellcheck disable=SC2154 # parse_options sets the variables
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/common.sh

parse_options "gpus nodes=1 node coordinator restarts=20 cuda=cuda13" "$@"
set -- ${arguments[@]+"${arguments[@]}"}
count nodes restarts
if [ "$nodes" -gt 1 ]; then
  case "$node" in
    '' | *[!0-9]*) fail "--nodes=$nodes needs --node=I, the index of this machine, from 0" ;;
  esac
  [ "$node" -lt "$nodes" ] || fail "--node=$node is not one of $nodes machines, counted from 0"
  [ -n "$coordinator" ] || fail "--nodes=$nodes needs --coordinator=HOST:PORT of machine 0"
fi
check_run "$@"
need nvidia-smi "this machine has no NVIDIA driver; launch/local.sh runs on its CPU"
note "gpus=${gpus:-all} nodes=$nodes node=${node:-0} coordinator=${coordinator:-none} restarts=$restarts cuda=$cuda venv=$venv"

run nvidia-smi --list-gpus
environment 'jax_cuda*_plugin' convert "jax[$cuda]"
variables=("JAX_PLATFORMS=cuda,cpu") # an error where JAX would use the CPU alone
[ -z "$gpus" ] || variables+=(CUDA_VISIBLE_DEVICES="$gpus")
if [ "$nodes" -gt 1 ]; then
  variables+=(COORDINATOR_ADDRESS="$coordinator" NUM_PROCESSES="$nodes" PROCESS_ID="$node")
fi
run_again "$restarts" env "${variables[@]}" "$venv/bin/python" -m bitgen.main "$@"
