#!/usr/bin/env bash
# Creates a TPU slice, or several that work as one, runs a command on all workers, recreates what was preempted, and deletes
# it. See --help.
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ROOT=$(dirname "$HERE")

usage() {
  cat <<'EOF'
usage: tpu_scripts/tpu.sh [--config FILE] [--dry-run] COMMAND

commands:
  create                ask for the slice and wait until it is there; does nothing if it is there already
  setup                 copy this repository to all workers and install it there
  launch -- CMD...      start CMD on all workers, in the background; its output goes to a log on each
  status                state of the slice, and of the run on each worker
  logs [WORKER|all]     follow the log of one worker (default: 0), or print the end of all; worker 3 of the second of several
                        slices is 1:3
  stop                  SIGTERM to the run on all workers (it saves a checkpoint), later SIGKILL
  babysit [--delete] -- CMD...
                        all of it: create, setup, launch; after a preemption delete, create and launch again, until CMD has
                        exited with 0 on every worker. May be stopped and started again at any time, and outlives a lost
                        network. A training that makes no progress is stopped and started again. Gives up when CMD fails by
                        itself MAX_FAILURES times, or on its first start at once with status 2. --delete: delete the slice
                        in the end
  delete [--yes]        delete the slice

options:
  --config FILE         settings (default: tpu_scripts/config.sh, see config.sh.example)
  --dry-run             print the commands instead of running them

examples:
  cp tpu_scripts/config.sh.example tpu_scripts/config.sh    # and fill it in
  tpu_scripts/tpu.sh --dry-run create
  tpu_scripts/tpu.sh babysit --delete -- bash tpu_scripts/with_bucket.sh BUCKET python -m titok_jax.train \
      --config configs/stage1.py:l32 --workdir gs://BUCKET/l32_stage1 --config.remat=full \
      --config.data.source.paths='/tmp/BUCKET/imagenet/train-*' --config.vqgan=gs://BUCKET/maskgit_vqgan.safetensors
  tpu_scripts/tpu.sh logs 0
  ACCELERATOR_TYPE=v5e-16 ZONE=us-west4-a tpu_scripts/tpu.sh create
  ACCELERATOR_TYPE=2xv5e-256 PROVISIONING=queued-spot tpu_scripts/tpu.sh create

docs/tpu.md says what lies in BUCKET, and how it comes there.
EOF
}

die() {
  echo "error: $*" >&2
  exit 2
}

say() {
  echo "[$(date '+%F %T')] $*"
}

# Runs a command. With --dry-run, prints it in a form that can be pasted into a shell.
run() {
  if [[ $DRY_RUN == yes ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

# Waits for the given number of polling intervals (default: 1).
pause() {
  local looks
  for ((looks = ${1:-1}; looks > 0; looks--)); do sleep "$POLL_SECONDS"; done
}

# ----------------------------------------------------------------------------------------------------------------------
# The slice

default_runtime_version() {
  case $ACCELERATOR_TYPE in
    v2-* | v3-* | v4-*) echo tpu-ubuntu2204-base ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) die "no runtime version is known for ACCELERATOR_TYPE=$ACCELERATOR_TYPE; set RUNTIME_VERSION" ;;
  esac
}

queued() {
  [[ $PROVISIONING == queued* ]]
}

# Prints gcloud's state of the node, or of the queued resource, in one word: NONE, WAITING, READY, GONE (it still exists, but
# will never run again) or DELETING. If gcloud does not answer, the state is never NONE, so that nothing is created twice.
# After five attempts without an answer the script fails, but babysit keeps asking. An error that will not pass by itself
# fails at once, unless babysit has had an answer before. Then it reports the error at each attempt, and continues when
# somebody has logged in again. (gcloud also advises to log in when there is no network.)
slice_state() {
  local kind=tpu-vm field="value(state)" state errors tries hint
  if queued; then
    kind=queued-resources field="value(state.state)"
  fi
  errors=$(mktemp)
  for ((tries = 1; ; tries++)); do
    if state=$(gcloud compute tpus "$kind" describe "$NAME" "${WHERE[@]}" --format="$field" 2>"$errors"); then
      case $state in
        READY | ACTIVE) state=READY ;;
        PREEMPTED | TERMINATED | SUSPENDED | SUSPENDING | FAILED | STOPPED | STOPPING | HIDDEN) state=GONE ;;
        DELETING) ;;
        *) state=WAITING ;; # CREATING, ACCEPTED, WAITING_FOR_RESOURCES, PROVISIONING, STARTING, REPAIRING, ...
      esac
      break
    fi
    hint=""
    if grep -qE "PERMISSION_DENIED|UNAUTHENTICATED|invalid_grant|have an active account|[Pp]roject '?[^/]* not found" "$errors"; then
      hint=", which will not pass by itself: see the account of gcloud, PROJECT and ZONE"
    elif grep -q NOT_FOUND "$errors"; then
      state=NONE
      break
    fi
    say "no answer about $NAME (look $tries)$hint:" >&2
    cat "$errors" >&2
    if [[ $ANSWERED == no && -n $hint || $GUARD == no && $tries == 5 ]]; then
      rm -f "$errors"
      die "cannot find out the state of $NAME"
    fi
    pause $((tries < 5 ? tries : 5))
  done
  rm -f "$errors"
  ((tries == 1)) || say "gcloud answers again" >&2
  echo "$state"
}

request_slice() {
  local more=() nodes=(--node-id="$NAME")
  [[ $PROVISIONING == *spot ]] && more+=(--spot)
  [[ $PROVISIONING == *reserved ]] && more+=(--reserved)
  [[ -n $SERVICE_ACCOUNT ]] && more+=(--service-account="$SERVICE_ACCOUNT")
  [[ -n $NETWORK ]] && more+=(--network="$NETWORK")
  [[ -n $SUBNETWORK ]] && more+=(--subnetwork="$SUBNETWORK")
  [[ $INTERNAL_IPS == yes ]] && more+=(--internal-ips)
  # Only what is read may be attached to several machines.
  [[ -n $DATA_DISK ]] && more+=(--data-disk="source=projects/$PROJECT/zones/$ZONE/disks/$DATA_DISK,mode=read-only")
  more+=("${CREATE_WORDS[@]}")
  if queued; then
    # The machines of several slices learn of each other from their metadata; JAX and libtpu read it there.
    ((NUM_SLICES == 1)) || nodes=(--node-count="$NUM_SLICES" --node-prefix="$NAME")
    [[ -n $VALID_UNTIL ]] && more+=(--valid-until-duration="$VALID_UNTIL")
    run gcloud compute tpus queued-resources create "$NAME" "${nodes[@]}" "${WHERE[@]}" \
      --accelerator-type="$ACCELERATOR_TYPE" --runtime-version="$RUNTIME_VERSION" "${more[@]}"
  else
    run gcloud compute tpus tpu-vm create "$NAME" "${WHERE[@]}" \
      --accelerator-type="$ACCELERATOR_TYPE" --version="$RUNTIME_VERSION" "${more[@]}"
  fi
}

delete_slice() {
  if queued; then
    run gcloud compute tpus queued-resources delete "$NAME" "${WHERE[@]}" --force --quiet
  else
    run gcloud compute tpus tpu-vm delete "$NAME" "${WHERE[@]}" --quiet
  fi
}

# Deletes the slice and returns when it no longer exists. Until then it costs money.
delete_for_sure() {
  local state
  while true; do
    state=$(slice_state)
    case $state in
      NONE) return ;;
      DELETING) ;;
      *) delete_slice || say "the deletion failed; trying again in $POLL_SECONDS s" ;;
    esac
    pause
  done
}

# Requests the slice and returns when it is ready. A slice that is GONE is deleted and requested again.
create() {
  local state last=""
  if [[ $DRY_RUN == yes ]]; then
    request_slice
    return
  fi
  while true; do
    state=$(slice_state)
    [[ $state == "$last" ]] || say "$NAME: $state"
    last=$state
    case $state in
      READY) return ;;
      NONE) request_slice || say "the request failed; trying again in $POLL_SECONDS s" ;;
      GONE) delete_slice || say "the deletion failed; trying again in $POLL_SECONDS s" ;;
    esac
    pause
  done
}

# ----------------------------------------------------------------------------------------------------------------------
# Its workers

# Sets `reach` to the command for ssh or scp, and `which` to the flags that name a worker (N, or S:N of several slices) or all.
# The workers of several slices are reached through their queued resource.
address() {
  local verb=$1 worker=$2
  reach=(gcloud compute tpus tpu-vm "$verb") which=("${WHERE[@]}" --worker="${worker##*:}" --quiet)
  if ((NUM_SLICES > 1)); then
    reach[3]=queued-resources
    case $worker in
      all) which+=(--node=all) ;;
      *:*) which+=(--node="${worker%%:*}") ;;
      *) which+=(--node=0) ;;
    esac
  fi
  [[ $INTERNAL_IPS == no ]] || which+=(--internal-ip)
  which+=("${SSH_WORDS[@]}")
}

# Runs a command line on the given worker, or on all. A run must start on all workers: a program that is started on some of
# them waits for the others until it gives up.
on_workers() {
  local reach which
  address ssh "$1"
  shift
  # Without ServerAliveInterval, ssh would wait for hours if the other end is gone. 9>&- keeps the lock of babysit from ssh.
  run "${reach[@]}" "$NAME" "${which[@]}" --ssh-flag=-oServerAliveInterval=30 --command="$*" 9>&-
}

# Copies a file to all workers.
copy() {
  local reach which
  address scp all
  run "${reach[@]}" "$1" "$NAME:$2" "${which[@]}"
}

# Writes an archive of the files that git tracks, as they are now. Others, which may hold secrets, stay here.
pack() {
  local archive=$1 changed untracked
  git -C "$ROOT" rev-parse --verify --quiet HEAD >/dev/null || die "$ROOT is no git repository; setup copies the files that git tracks"
  # A commit of the changes to tracked files, on no branch; empty if there are none.
  changed=$(git -C "$ROOT" -c user.name=tpu.sh -c user.email=tpu.sh@localhost stash create) || die "git cannot read the changes in $ROOT"
  [[ -z $changed ]] || say "copying $ROOT with its changes that are not committed" >&2
  untracked=$(git -C "$ROOT" ls-files --others --exclude-standard | head -n 5 | tr '\n' ' ')
  [[ -z $untracked ]] || say "not copying what git does not track: ${untracked% }; git add what the workers need" >&2
  git -C "$ROOT" archive --format=tar.gz --output="$archive" "${changed:-HEAD}"
}

setup() {
  local archive status=0
  archive=$(mktemp -d)/titok_jax.tar.gz
  pack "$archive"
  copy "$archive" titok_jax.tar.gz || status=$?
  if [[ -n $ENV_FILE ]]; then
    copy "$(realpath "$ENV_FILE")" .titok_env || status=$?
  fi
  rm -r "$(dirname "$archive")"
  ((status == 0)) || return "$status"
  on_workers all "mkdir -p titok_jax && tar -xzf titok_jax.tar.gz -C titok_jax && bash titok_jax/tpu_scripts/worker.sh setup"
}

# Quotes the command as one word for the shell of a worker, so that the words of CMD arrive unchanged.
quoted() {
  local command
  command=$(printf '%q ' "$@")
  printf '%q' "${command% }"
}

launch() {
  on_workers all "bash titok_jax/tpu_scripts/worker.sh start $(quoted "$@")"
}

stop() {
  on_workers all "bash titok_jax/tpu_scripts/worker.sh stop $(quoted "$STOP_SECONDS")"
}

# Prints the state of the run on all workers in one word:
#   bare      the workers are not set up
#   idle      CMD must be started, for the first time or again
#   running, finished
#   stuck     CMD makes no progress on a worker, by what it said itself
#   refused   CMD ended with status 2 (our commands reject an impossible request) or with 126 or 127 (bash: no such program)
#   failed    CMD failed otherwise by itself, or it was started on only some of the workers
# Returns a nonzero status if the workers cannot be reached.
run_state() {
  local lines
  lines=$(on_workers all "bash titok_jax/tpu_scripts/worker.sh status $(quoted "$@") || echo 'worker ? bare'") || return
  lines=$(grep '^worker ' <<<"$lines") || return
  case $lines in
    *" bare"*) echo bare ;;
    *" exit "[1-9]*) if grep -qE ' exit (2|126|127)$' <<<"$lines"; then echo refused; else echo failed; fi ;;
    *" stuck"*) echo stuck ;;
    *" running"*)
      # A worker that has finished does not wait for others. But if the run is missing on one worker, all others wait for it.
      if grep -qE ' (none|dead|stopped)$' <<<"$lines"; then echo failed; else echo running; fi
      ;;
    # A training that gets SIGTERM saves and ends on all workers, but it has not finished.
    *" none"* | *" dead"* | *" stopped"*) echo idle ;;
    *) echo finished ;;
  esac
}

babysit() {
  local state what last="" failures=0 started=0 starts=0
  if [[ $DRY_RUN == yes ]]; then
    create
    setup
    launch "$@"
    return
  fi
  GUARD=yes
  while true; do
    state=$(slice_state)
    ANSWERED=yes
    if [[ $state != READY ]]; then
      if [[ $state == GONE ]]; then
        say "$NAME was preempted, or has failed; it is deleted and made again"
        failures=0
      fi
      create
      continue
    fi
    # If the workers cannot be reached, the slice may be about to be preempted. Its next state will show that.
    state=$(run_state "$@") || state=unreachable
    [[ $state == "$last" ]] || say "the workers: $state"
    last=$state
    case $state in
      finished)
        say "the command has exited with 0 on every worker"
        return
        ;;
      bare) setup || say "the setup failed; trying again" ;;
      idle)
        started=$SECONDS starts=$((starts + 1))
        launch "$@" || say "the start failed; trying again"
        ;;
      failed | refused | stuck)
        if ((SECONDS - started > 3600)); then
          failures=0
        fi
        failures=$((failures + 1))
        [[ $state == stuck ]] && what="makes no progress" || what=failed
        say "the command $what ($failures of $MAX_FAILURES times); the ends of the logs:"
        logs all || true
        stop || true
        # A command that ran before may be refused because of a temporary problem. So give up only in the first ten minutes
        # after the first start.
        if [[ $state == refused ]] && ((starts == 1 && SECONDS - started < 600)); then
          die "the command cannot do what it was told to; see the logs above. $NAME is still there: tpu_scripts/tpu.sh delete"
        fi
        if ((failures >= MAX_FAILURES)); then
          die "the command fails by itself, not by preemption. $NAME is still there: tpu_scripts/tpu.sh delete"
        fi
        started=$SECONDS starts=$((starts + 1))
        launch "$@" || say "the start failed; trying again"
        ;;
    esac
    pause
  done
}

logs() {
  local worker=${1:-0}
  if [[ $worker == all ]]; then
    on_workers all "bash titok_jax/tpu_scripts/worker.sh log"
  else
    [[ $worker =~ ^([0-9]+:)?[0-9]+$ ]] || die "logs takes the number of a worker, or all; found $worker"
    [[ $worker != *:* ]] || ((NUM_SLICES > 1)) || die "logs takes the number of a worker, for there is one slice; found $worker"
    on_workers "$worker" "tail -n 100 -F titok_run/log"
  fi
}

# ----------------------------------------------------------------------------------------------------------------------
# Arguments

CONFIG=$HERE/config.sh DRY_RUN=no GUARD=no ANSWERED=no
while [[ ${1:-} == -* ]]; do
  case $1 in
    --help | -h)
      usage
      exit
      ;;
    --dry-run) DRY_RUN=yes ;;
    --config)
      [[ $# -ge 2 ]] || die "--config needs a file"
      CONFIG=$2
      shift
      ;;
    *) die "unknown option $1; see --help" ;;
  esac
  shift
done
COMMAND=${1:-}
[[ -n $COMMAND ]] || {
  usage >&2
  exit 2
}
shift

[[ -f $CONFIG ]] || die "there is no $CONFIG; copy tpu_scripts/config.sh.example to it and fill it in"
[[ $CONFIG == */* ]] || CONFIG=./$CONFIG # bash would look for it on the PATH
# shellcheck source=tpu_scripts/config.sh.example
source "$CONFIG"
for variable in NAME PROJECT ZONE ACCELERATOR_TYPE PROVISIONING POLL_SECONDS STOP_SECONDS MAX_FAILURES; do
  [[ -n ${!variable:-} ]] || die "$CONFIG does not set $variable"
done
RUNTIME_VERSION=${RUNTIME_VERSION:-} SERVICE_ACCOUNT=${SERVICE_ACCOUNT:-} VALID_UNTIL=${VALID_UNTIL:-} ENV_FILE=${ENV_FILE:-}
NETWORK=${NETWORK:-} SUBNETWORK=${SUBNETWORK:-} INTERNAL_IPS=${INTERNAL_IPS:-no} DATA_DISK=${DATA_DISK:-}
case $PROVISIONING in
  on-demand | spot | reserved | queued | queued-spot | queued-reserved) ;;
  *) die "PROVISIONING is $PROVISIONING, expected on-demand, spot or reserved, or queued, queued-spot or queued-reserved" ;;
esac
[[ $INTERNAL_IPS == yes || $INTERNAL_IPS == no ]] || die "INTERNAL_IPS is ${INTERNAL_IPS@Q}, expected yes or no"
# 2xv5e-256 is two slices. gcloud knows v5e-256 as v5litepod-256; in all other names the two agree.
NUM_SLICES=1
if [[ $ACCELERATOR_TYPE =~ ^([1-9][0-9]{0,2})x(v.*)$ ]]; then
  NUM_SLICES=${BASH_REMATCH[1]} ACCELERATOR_TYPE=${BASH_REMATCH[2]}
fi
ACCELERATOR_TYPE=${ACCELERATOR_TYPE/#v5e-/v5litepod-}
((NUM_SLICES == 1)) || queued || die "$NUM_SLICES slices need PROVISIONING=queued, queued-spot or queued-reserved, not $PROVISIONING"
# These words get into command lines and file names, here and on the workers, and bash computes with the numbers.
for variable in NAME PROJECT ZONE ACCELERATOR_TYPE RUNTIME_VERSION SERVICE_ACCOUNT VALID_UNTIL NETWORK SUBNETWORK DATA_DISK; do
  [[ ${!variable} =~ ^([A-Za-z0-9][A-Za-z0-9.:@_-]*)?$ ]] || die "$variable is ${!variable@Q}, expected letters, digits and . : @ _ -"
done
for variable in STOP_SECONDS MAX_FAILURES; do
  [[ ${!variable} =~ ^[0-9]{1,9}$ ]] || die "$variable is ${!variable@Q}, expected a whole number"
done
[[ $POLL_SECONDS =~ ^[0-9]{1,9}(\.[0-9]+)?$ ]] || die "POLL_SECONDS is ${POLL_SECONDS@Q}, expected a number"
read -ra CREATE_WORDS <<<"${CREATE_FLAGS:-}"
read -ra SSH_WORDS <<<"${SSH_FLAGS:-}"
for word in "${CREATE_WORDS[@]}" "${SSH_WORDS[@]}"; do
  [[ $word =~ ^--[a-z][a-z-]*(=[A-Za-z0-9.:@_/,=+-]+)?$ ]] || die "CREATE_FLAGS and SSH_FLAGS hold ${word@Q}, expected --FLAG or --FLAG=VALUE"
done
if [[ -n $ENV_FILE ]]; then
  [[ -f $ENV_FILE ]] || die "ENV_FILE $ENV_FILE does not exist"
  bash "$HERE/worker.sh" check_environment "$ENV_FILE" || exit 2
fi
[[ $DRY_RUN == yes ]] || command -v gcloud >/dev/null || die "gcloud is not on the PATH: install the Google Cloud CLI"
WHERE=(--project="$PROJECT" --zone="$ZONE")

# Checks that the arguments are -- CMD...
take_command() {
  [[ ${1:-} == -- && $# -ge 2 ]] || die "$COMMAND needs a command after --, such as: $COMMAND -- python -m titok_jax.train ..."
}

# Two babysits for one slice would undo each other's work. The lock is in a folder of the user's own, where nobody else can lay
# a link, and opening it changes no file.
hold_lock() {
  local folder=${XDG_CACHE_HOME:-$HOME/.cache}/titok_jax lock
  lock=$folder/babysit_${PROJECT}_${ZONE}_$NAME.lock
  mkdir -p "$folder"
  [[ ! -e $lock && ! -L $lock || -f $lock && ! -L $lock ]] || die "$lock is no regular file; remove it"
  exec 9>>"$lock"
  flock -n 9 || die "another babysit watches over $NAME"
}

case $COMMAND in
  create | setup | status | stop) [[ $# -eq 0 ]] || die "$COMMAND takes no argument; found $1" ;;
esac
case $COMMAND in
  create | babysit) RUNTIME_VERSION=${RUNTIME_VERSION:-$(default_runtime_version)} ;;
esac
case $COMMAND in
  create) create ;;
  setup) setup ;;
  launch)
    take_command "$@"
    launch "${@:2}"
    ;;
  status)
    if [[ $DRY_RUN == no ]]; then
      state=$(slice_state)
      say "$NAME: $state"
    fi
    on_workers all "bash titok_jax/tpu_scripts/worker.sh status"
    ;;
  logs) logs "$@" ;;
  stop) stop ;;
  babysit)
    delete_at_end=no
    if [[ ${1:-} == --delete ]]; then
      delete_at_end=yes
      shift
    fi
    take_command "$@"
    [[ $DRY_RUN == yes ]] || hold_lock
    babysit "${@:2}"
    case $DRY_RUN$delete_at_end in
      yesyes) delete_slice ;;
      yesno) ;;
      noyes) delete_for_sure ;;
      nono) say "$NAME is still there and is paid for: tpu_scripts/tpu.sh delete" ;;
    esac
    ;;
  delete)
    if [[ ${1:-} != --yes && $DRY_RUN == no ]]; then
      read -r -p "Delete $NAME in $ZONE of $PROJECT? [y/N] " answer
      [[ $answer == [yY]* ]] || die "not deleted"
    fi
    delete_slice
    ;;
  *) die "unknown command $COMMAND; see --help" ;;
esac
