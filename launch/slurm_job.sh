#!/usr/bin/env bash
# The job that launch/slurm.sh submits: starts one process per GPU, and queues itself again near its
# time limit. Slurm runs a copy of this file, in the checkout.
set -euo pipefail
source launch/common.sh

command=(srun --kill-on-bad-exit=1 "$venv/bin/python" -m bitgen.main "$@")
[ -z "$dry" ] || run_last "${command[@]}"

# Slurm signals this script, and scancel passes the signal on to the processes only.
again=""
tell="scancel --signal=TERM $SLURM_JOB_ID"
trap 'echo "the time limit is near: saving, to resume in the next job"; again=1; $tell' USR1
trap 'echo "told to stop: saving"; $tell' TERM

echo "+ $(quoted "${command[@]}")"
"${command[@]}" &
status=0
await "$!" || status=$?
# Status 75: something failed that is not a setting, such as a node.
if [ -n "$again" ] || [ "$status" -eq 75 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
