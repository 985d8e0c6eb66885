#!/usr/bin/env bash
# What launch/slurm.sh submits: starts a process for each GPU, and queues the job again when its time
# ends. Slurm runs a copy of this file, in the checkout.
set -euo pipefail
source launch/common.sh

command=(srun --kill-on-bad-exit=1 "$venv/bin/python" -m bitgen.main "$@")
[ -z "$dry" ] || run_last "${command[@]}"

# Slurm tells this script, which tells the processes: scancel with a signal reaches them alone.
again=""
tell="scancel --signal=TERM $SLURM_JOB_ID"
trap 'echo "the time is nearly over: saving, to go on in the next turn"; again=1; $tell' USR1
trap 'echo "told to stop: saving"; $tell' TERM

echo "+ $(quoted "${command[@]}")"
"${command[@]}" &
status=0
await "$!" || status=$?
# 75: something went wrong that is none of the settings.
if [ -n "$again" ] || [ "$status" -eq 75 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
