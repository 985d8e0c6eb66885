#!/usr/bin/env bash
# Rents a Cloud TPU, a single host or a pod, runs bitgen on all of its hosts, and restarts it after
# preemptions.
#
#   launch/tpu.sh all [OPTIONS] -- --config=FILE --workdir=DIR [--config.KEY=VALUE ...]
#
# `all` does create, install, run and watch. Given again, also from another computer, it continues
# with what is there, from the last checkpoint. Each step is an action of its own too:
#
#   create    queue a request (a queued resource) and wait until the TPU is ready
#   install   copy this checkout to every host, make its environment, mount the storage
#   run       start bitgen on every host, in the background              (needs -- ARGUMENTS)
#   watch     wait for its end; after a preemption do everything again   (needs -- ARGUMENTS)
#   log       print the last lines of every host's log
#   stop      save and stop the run, keep the TPU
#   delete    delete the TPU and the request; until then it costs money
#
#   --zone=ZONE          such as us-west4-a (required)
#   --type=TYPE          accelerator type, such as v5litepod-16 (required by all, create and watch)
#   --name=NAME          name of the TPU and of the request (bitgen)
#   --project=PROJECT    Google Cloud project (gcloud's setting)
#   --runtime=VERSION    version of the TPU's software (by the type)
#   --tier=TIER          spot (cheap, preempted at any time), on-demand, guaranteed, reserved (spot)
#   --mount=SOURCE       gs://BUCKET (best with a hierarchical namespace) or HOST:/EXPORT (NFS)
#   --at=DIR             where every host mounts it (/mnt/bitgen)
#   --poll=SECONDS       time between two checks of its state (60)
#   --restarts=N         give up after this many restarts (100)
#   --delete-after       delete the TPU after the run has succeeded
#   --dry-run            print every command and run none
#   --help               this text
#
# A pod needs the workdir and the data on storage that all hosts see: --mount=..., and --workdir below
# --at. Configs of your own go into configs/. Options are also read from BITGEN_ZONE, BITGEN_TYPE and
# so on.

# shellcheck disable=SC2154 # parse_options sets the variables
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/common.sh

action="${1:-}"
case "$action" in
  all | create | install | run | watch | log | stop | delete) shift ;;
  --help | -h) ;;
  *) fail "unknown action '$action': all, create, install, run, watch, log, stop or delete; --help explains them" ;;
esac
delete_after="${BITGEN_DELETE_AFTER:-}"
own_option() {
  [ "$1" = --delete-after ] && delete_after=1
}
parse_options "zone type name=bitgen project runtime tier=spot mount at=/mnt/bitgen poll=60
  restarts=100" "$@"
set -- ${arguments[@]+"${arguments[@]}"}

# ---- Checks, before anything is rented ----
[ -n "$zone" ] || fail "no --zone=ZONE: where the TPU is, such as us-west4-a"
case "$action" in
  all | create | watch)
    [ -n "$type" ] || fail "no --type=TYPE: the accelerator type, such as v5litepod-16"
    ;;
esac
case "$action" in
  all | run | watch) check_run "$@" ;;
  *) [ $# -eq 0 ] || fail "$action takes no arguments of bitgen, got $1" ;;
esac
case "$mount" in
  '' | gs://?* | ?*:/*) ;;
  *) fail "--mount=$mount is neither gs://BUCKET nor HOST:/EXPORT" ;;
esac
case "$tier" in
  spot | guaranteed | reserved) tier_flag=(--"$tier") ;;
  on-demand) tier_flag=() ;;
  *) fail "--tier=$tier is none of spot, on-demand, guaranteed, reserved" ;;
esac
count poll restarts
if [ -z "$runtime" ]; then
  case "$type" in
    v6e-*) runtime=v2-alpha-tpuv6e ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    *) runtime=tpu-ubuntu2204-base ;;
  esac
fi
need gcloud "see cloud.google.com/sdk; then gcloud auth login"
note "zone=$zone type=${type:-of the TPU} name=$name project=${project:-of gcloud} runtime=$runtime tier=$tier mount=${mount:-none} at=$at poll=$poll restarts=$restarts"

where=(--zone="$zone" --quiet)
[ -z "$project" ] || where+=(--project="$project")
tpus=(gcloud compute tpus)

# ---- The actions ----
request() {
  run "${tpus[@]}" queued-resources create "$name" --node-id="$name" --accelerator-type="$type" \
    --runtime-version="$runtime" ${tier_flag[@]+"${tier_flag[@]}"} "${where[@]}"
}

delete() { run "${tpus[@]}" queued-resources delete "$name" --force "${where[@]}"; }

describe=("${tpus[@]}" queued-resources describe "$name" "--format=value(state.state)" "${where[@]}")

# Prints the state of the request, or NONE; fails if gcloud cannot tell.
state() {
  local answer
  if answer="$("${describe[@]}" 2>&1)"; then
    echo "$answer" | tail -n 1
    return
  fi
  case "$answer" in
    *NOT_FOUND* | *"not found"*) echo NONE ;;
    *) fail "$answer" ;;
  esac
}

create() {
  if [ -n "$dry" ]; then
    quoted "${describe[@]}"
    note "if there is none; what was preempted or has failed is deleted first:"
    request
    note "every $poll s until the state is ACTIVE:"
    quoted "${describe[@]}"
    return
  fi
  local now last="" asked=""
  while true; do
    # Only the first check must succeed; the connection may be lost later.
    now="$(state)" || { [ -n "$last" ] && now="$last" || exit 2; }
    [ "$now" = "$last" ] || note "$(date '+%F %T') $name is $now"
    last="$now"
    case "$now" in
      ACTIVE) return ;;
      NONE) request ;;
      SUSPENDED) delete ;;
      FAILED)
        [ -z "$asked" ] || fail "the request failed: gcloud compute tpus queued-resources describe $name ${where[*]}"
        delete
        asked=1
        ;;
    esac
    sleep "$poll"
  done
}

on_hosts() {
  run "${tpus[@]}" tpu-vm ssh "$name" --worker=all "--command=$1" "${where[@]}"
}

# worker WORD ...: runs launch/tpu_worker.sh on every host.
worker() {
  on_hosts "cd bitgen && $(quoted bash launch/tpu_worker.sh "$@")"
  case "$dry$1" in
    1install | 1start) BITGEN_DRY_RUN=1 bash launch/tpu_worker.sh "$@" | sed 's/^/#   there: /' ;;
  esac
}

# Waits until every host answers, which takes minutes on a new TPU.
reach() {
  local left=10
  until on_hosts true; do
    left=$((left - 1))
    [ "$left" -gt 0 ] || return 1
    sleep "$poll"
  done
}

install() {
  local archive="${TMPDIR:-/tmp}/bitgen-$name.tar.gz"
  reach \
    && run tar -czf "$archive" --exclude=__pycache__ bitgen configs launch pyproject.toml README.md \
    && run "${tpus[@]}" tpu-vm scp "$archive" "$name:bitgen.tar.gz" --worker=all "${where[@]}" \
    && on_hosts "mkdir -p bitgen && tar -xzf bitgen.tar.gz -C bitgen" \
    && worker install ${mount:+"$mount" "$at"}
}

look="if cd bitgen 2> /dev/null; then bash launch/tpu_worker.sh state; else echo 'bitgen-run: none'; fi"

# Prints each different state of the hosts' runs once; nothing if a host cannot be reached.
report() {
  local answers
  answers="$(on_hosts "$look" 2> /dev/null)" || return 0
  echo "$answers" | sed -n 's/^.*bitgen-run: //p' | sort -u
}

# Installs and starts bitgen unless it is running. A failure ends this script, except when the TPU has
# been taken away.
begin() {
  if [ -z "$dry" ] && report | grep -qx running; then
    note "a run is going on there already"
  elif ! { install && worker start "$@"; }; then
    sleep "$poll"
    [ "$(state)" != ACTIVE ] || fail "bitgen was not started, see above; the TPU is still there"
  fi
}

# Starts bitgen again, on a new TPU if the old one is gone.
again() {
  [ "$restarts" -gt 0 ] || fail "no restarts are left; the same command continues, --restarts=N allows more"
  restarts=$((restarts - 1))
  create
  begin "$@"
}

watch() {
  if [ -n "$dry" ]; then
    note "every $poll s until the run has ended:"
    quoted "${describe[@]}"
    on_hosts "$look"
    note "after a preemption all of it again, at most $restarts times:"
    delete
    request
    begin "$@"
    return
  fi
  local now said=""
  while true; do
    now="$(state)" || now=UNKNOWN
    [ "$now" != ACTIVE ] || now="ACTIVE $(report | tr '\n' ' ')"
    [ "$now" = "$said" ] || note "$(date '+%F %T') $name is $now"
    said="$now"
    # Status 75: something failed that is not a setting, such as another host.
    case "${now//ended 75/lost}" in
      UNKNOWN | "ACTIVE " | *running*) ;; # no connection, or still running
      ACTIVE*halted*)
        note "stopped by hand; the same command resumes from the last checkpoint"
        return
        ;;
      ACTIVE*stopped* | ACTIVE*gone* | ACTIVE*none*) again "$@" ;;
      ACTIVE*"ended "[1-9]*)
        worker log
        fail "the run failed, see above; the TPU is still there: launch/tpu.sh delete"
        ;;
      "ACTIVE ended 0 ") return ;;
      ACTIVE*lost* | SUSPEND* | FAILED | NONE | DELETING) again "$@" ;;
    esac
    sleep "$poll"
  done
}

case "$action" in
  all)
    create
    begin "$@"
    watch "$@"
    if [ -n "$delete_after" ]; then
      delete
    else
      note "the TPU is still there and costs money: launch/tpu.sh delete $(quoted --name="$name" --zone="$zone" ${project:+--project="$project"})"
    fi
    ;;
  create) create ;;
  install) install ;;
  run) worker start "$@" ;;
  watch) watch "$@" ;;
  log) worker log ;;
  stop) worker stop ;;
  delete) delete ;;
esac
