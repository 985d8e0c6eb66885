#!/usr/bin/env bash
# Submits a bitgen run to Slurm, on any number of nodes, with one process per GPU.
#
#   launch/slurm.sh [OPTIONS] -- --config=FILE --workdir=DIR [--mode=MODE] [--config.KEY=VALUE ...]
#
# Near its time limit the job saves and queues itself again; after a preemption or the failure of a
# node it is queued again. Each time, and when the same command is given again, the run resumes from
# the last checkpoint. This checkout, the environment and the workdir must be on storage that all
# nodes see.
#
#   --nodes=N           number of nodes (1)
#   --gpus=N            GPUs per node (8)
#   --cpus=N            cores per GPU (8)
#   --time=LIMIT        time limit of a job (24:00:00)
#   --grace=SECONDS     time to save before the limit (300)
#   --name=JOB          name of the job (bitgen)
#   --partition=NAME    partition (the cluster's default)
#   --logs=DIR          folder for the logs (runs/slurm)
#   --sbatch=OPTION     any other option of sbatch; may be repeated
#   --cuda=JAX_EXTRA    JAX's extra to install (cuda13)
#   --venv=DIR          virtual environment, made if JAX's GPU package is not in it (.venv)
#   --dry-run           print every command and run none
#   --help              this text
#
# All options except --sbatch are also read from BITGEN_NODES, BITGEN_GPUS and so on.

# shellcheck disable=SC2154 # parse_options sets the variables
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/common.sh

more=()
own_option() {
  [ "${1%%=*}" = --sbatch ] && more+=("${1#*=}")
}
parse_options "nodes=1 gpus=8 cpus=8 time=24:00:00 grace=300 name=bitgen partition logs=runs/slurm
  cuda=cuda13" "$@"
set -- ${arguments[@]+"${arguments[@]}"}
count nodes gpus cpus grace
check_run "$@"
need sbatch "run this on a login node of a Slurm cluster; launch/gpu.sh is for machines without Slurm"
note "nodes=$nodes gpus=$gpus cpus=$cpus time=$time grace=$grace name=$name partition=${partition:-default} logs=$logs cuda=$cuda venv=$venv"

environment 'jax_cuda*_plugin' convert "jax[$cuda]"
run mkdir -p "$logs"
[ -z "$partition" ] || more+=(--partition="$partition")
run env BITGEN_VENV="$venv" JAX_PLATFORMS=cuda,cpu sbatch --job-name="$name" --nodes="$nodes" --ntasks-per-node="$gpus" \
  --gpus-per-node="$gpus" --cpus-per-task="$cpus" --time="$time" --requeue --open-mode=append \
  --signal="B:USR1@$grace" --chdir="$PWD" --output="$logs/%x-%j.log" \
  ${more[@]+"${more[@]}"} launch/slurm_job.sh "$@"
if [ -n "$dry" ]; then
  note "and on the nodes:"
  BITGEN_DRY_RUN=1 BITGEN_VENV="$venv" bash launch/slurm_job.sh "$@"
fi
