#!/usr/bin/env bash
# The part of tpu.sh that runs on each worker. tpu.sh copies it there and calls it:
#   check_environment FILE
#                      whether FILE can be the ENV_FILE; tpu.sh also calls this where it runs
#   setup              installs the repository
#   start CMD          runs CMD, a bash command line, in the background
#   status [CMD]       prints "worker HOST none|running|stuck|dead|stopped|exit N". none: there is no run, or its command is
#                      not CMD. stuck: it runs, but has been silent for longer than it said it would be. stopped: it got
#                      SIGTERM, whatever its exit status. dead: it ended without a status, for example because the machine
#                      restarted
#   stop SECONDS       sends SIGTERM, and SIGKILL after SECONDS
#   log                prints the end of the log
# ~/titok_run holds the files of the run: command, pid, exit, progress and log. progress is there if CMD writes it, as a
# training does: the time, in seconds since 1970, until which CMD may be silent. Logs of earlier runs are log.1, log.2, ..., from oldest
# to newest; the newest 20 are kept.
set -euo pipefail

SCRIPT=$(realpath "${BASH_SOURCE[0]}")
CODE=$HOME/titok_jax
RUN=$HOME/titok_run
VENV=$HOME/titok_venv
LOCKFILE=${LIBTPU_LOCKFILE:-/tmp/libtpu_lockfile} # the TPU runtime leaves it behind when it is killed

# Reads KEY=VALUE lines into the array `environment`. They are data: nothing in them is expanded or run. A value that a shell
# would change stands between single quotes. "export " may stand in front; empty lines and those that begin with # do not
# count. Names that mean something to bash itself are refused: it would run what BASH_ENV says. Messages show no values.
read_environment() {
  local file=$1 line key value number=0 plain='[^[:space:]"$`\;&|<>()~'"']*"
  local pattern="^(export[[:blank:]]+)?([A-Za-z_][A-Za-z0-9_]*)=(.*)$"
  local forms="^($plain|'([^']*)'|\"([^\"\$\`\\]*)\")$"
  environment=()
  while IFS= read -r line || [[ -n $line ]]; do
    number=$((number + 1))
    line=${line#"${line%%[![:space:]]*}"} line=${line%"${line##*[![:space:]]}"} # without space at its ends
    [[ -n $line && $line != \#* ]] || continue
    if ! [[ $line =~ $pattern ]]; then
      echo "error: $file, line $number: expected KEY=VALUE" >&2
      return 2
    fi
    key=${BASH_REMATCH[2]} value=${BASH_REMATCH[3]}
    if [[ $key == BASH* || $key == ENV || $key == UID || $key == EUID || $key == PPID || $key == SHELLOPTS ]]; then
      echo "error: $file, line $number: bash keeps $key to itself" >&2
      return 2
    fi
    if ! [[ $value =~ $forms ]]; then
      echo "error: $file, line $number: nothing is expanded here; write $key='...'" >&2
      return 2
    fi
    if [[ $value == [\"\']* ]]; then
      value=${value:1:-1}
    fi
    environment+=("$key=$value")
  done <"$file"
}

check_environment() {
  read_environment "$1"
}

setup() {
  local python
  if [[ -f $HOME/.titok_env ]]; then
    chmod 600 "$HOME/.titok_env"
  fi
  if [[ ! -x $VENV/bin/python ]]; then
    # The images of TPU machines have Python 3.10; uv installs a newer one.
    if python=$(command -v python3.12 || command -v python3.11); then
      "$python" -m venv "$VENV"
    else
      python3 -m pip install --quiet --user uv
      python3 -m uv venv --quiet --seed --python 3.11 "$VENV"
    fi
  fi
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -c "$CODE/constraints.txt" -e "${CODE}[train,tpu]"
  mkdir -p "$RUN"
  touch "$RUN/ready"
  echo "worker $(hostname) ready"
}

# Whether the process group of the run is alive.
alive() {
  [[ -f $RUN/pid ]] && kill -0 -- "-$(<"$RUN/pid")" 2>/dev/null
}

# Kills processes that an earlier run left behind: they hold the chips, so JAX would fall back to the CPU.
free_chips() {
  local devices=() device
  for device in /dev/accel* /dev/vfio/[0-9]*; do
    [[ ! -e $device ]] || devices+=("$device")
  done
  if ((${#devices[@]})) && command -v fuser >/dev/null; then
    sudo fuser --silent --kill -KILL "${devices[@]}" || true # status 1: no process holds them
  fi
  rm -f "$LOCKFILE" 2>/dev/null || sudo rm -f "$LOCKFILE"
}

start() {
  local command=$1 number=1 earlier environment=()
  if alive; then
    echo "worker $(hostname): a run is going on; stop it first" >&2
    exit 1
  fi
  if [[ -f $HOME/.titok_env ]]; then
    read_environment "$HOME/.titok_env"
  fi
  mkdir -p "$RUN"
  free_chips
  if [[ -f $RUN/log ]]; then
    for earlier in "$RUN"/log.*; do
      [[ ! -e $earlier ]] || ((${earlier##*.} < number)) || number=$((${earlier##*.} + 1))
    done
    mv "$RUN/log" "$RUN/log.$number"
    rm -f "$RUN/log.$((number - 20))"
  fi
  rm -f "$RUN/exit" "$RUN/pid" "$RUN/progress"
  printf '%s' "$command" >"$RUN/command"
  # The run gets its own session, so it outlives this connection and its process group has its process id.
  setsid nohup bash "$SCRIPT" run "$command" >"$RUN/log" 2>&1 </dev/null &
  while [[ ! -s $RUN/pid ]]; do sleep 0.05; done
  echo "worker $(hostname) running"
}

# Runs a command, records its process id and its exit status, and waits for it.
run() {
  local ended="" interrupted="" status environment=()
  echo $$ >"$RUN/pid"
  [[ ! -f $HOME/.titok_env ]] || read_environment "$HOME/.titok_env"
  trap "ended=stopped interrupted=yes" TERM # the command gets it too, and may well exit with 0
  {
    cd "$CODE"
    set -- "$1" "$VENV/bin" # the names below may be any
    ((${#environment[@]} == 0)) || export "${environment[@]}"
    export PATH="$2:$PATH" TITOK_JAX_PROGRESS="$RUN/progress" JAX_PLATFORMS="${JAX_PLATFORMS:-tpu,cpu}"
    eval "exec env $1" # env: for VARIABLE=value in front
  } &
  until wait $!; status=$?; [[ -z $interrupted ]]; do interrupted=""; done # a signal ends `wait`
  echo "${ended:-exit $status}" >"$RUN/exit.new"
  mv "$RUN/exit.new" "$RUN/exit"
}

status() {
  local state=none silent_until
  [[ -f $RUN/ready ]] || return 1
  if [[ -f $RUN/command && ($# -eq 0 || $(<"$RUN/command") == "${1:-}") ]]; then
    if alive; then # checked first: a run that has ended by then has written its exit status
      state=running
      silent_until=$(cat "$RUN/progress" 2>/dev/null || true)
      if [[ $silent_until =~ ^[0-9]{1,12}$ ]] && (($(date +%s) > silent_until)); then
        state=stuck
      fi
    elif [[ -f $RUN/exit ]]; then
      state=$(<"$RUN/exit")
    else
      state=dead
    fi
  fi
  echo "worker $(hostname) $state"
}

stop() {
  local left=$1
  [[ $left =~ ^[0-9]{1,9}$ ]] || {
    echo "error: stop needs a number of seconds, found ${left@Q}" >&2
    exit 2
  }
  alive || return 0
  kill -TERM -- "-$(<"$RUN/pid")" || return 0 # it has just ended
  while alive && ((left-- > 0)); do sleep 1; done
  if alive; then
    kill -KILL -- "-$(<"$RUN/pid")"
  fi
}

log() {
  echo "--- worker $(hostname): $RUN/log"
  tail -n 30 "$RUN/log" | sed "s/^/[$(hostname)] /"
}

"$@"
