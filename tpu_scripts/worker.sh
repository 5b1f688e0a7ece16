#!/usr/bin/env bash
# The part of tpu.sh that runs on each worker. tpu.sh copies it there and calls it:
#   setup              installs the repository
#   start CMD          runs CMD, a bash command line, in the background
#   status [CMD]       prints "worker HOST none|running|dead|stopped|exit N". none: there is no run, or its command is not
#                      CMD. stopped: it got SIGTERM, whatever its exit status. dead: it ended without a status, for example
#                      because the machine restarted
#   stop SECONDS       sends SIGTERM, and SIGKILL after SECONDS
#   log                prints the end of the log
# ~/titok_run holds the files of the run: command, pid, exit and log. Logs of earlier runs are log.1, log.2, ..., from oldest
# to newest; the newest 20 are kept.
set -euo pipefail

CODE=$HOME/titok_jax
RUN=$HOME/titok_run
VENV=$HOME/titok_venv
LOCKFILE=${LIBTPU_LOCKFILE:-/tmp/libtpu_lockfile} # the TPU runtime leaves it behind when it is killed

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
  local command=$1 number=1 earlier
  if alive; then
    echo "worker $(hostname): a run is going on; stop it first" >&2
    exit 1
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
  rm -f "$RUN/exit" "$RUN/pid"
  printf '%s' "$command" >"$RUN/command"
  # The run gets its own session, so it outlives this connection and its process group has its process id.
  # shellcheck disable=SC2016 # expanded by the inner bash
  setsid nohup bash -c '
    echo $$ >"$1/pid"
    if [[ -f $HOME/.titok_env ]]; then set -a; source "$HOME/.titok_env"; set +a; fi
    export PATH="$2/bin:$PATH" JAX_PLATFORMS="${JAX_PLATFORMS:-tpu,cpu}"
    ended= interrupted=
    trap "ended=stopped interrupted=yes" TERM # the command gets it too, and may well exit with 0
    cd "$3"
    { eval "exec env $4"; } & # env: for VARIABLE=value in front
    until wait $!; status=$?; [[ -z $interrupted ]]; do interrupted=; done # a signal ends `wait`
    echo "${ended:-exit $status}" >"$1/exit.new"; mv "$1/exit.new" "$1/exit"
  ' run "$RUN" "$VENV" "$CODE" "$command" >"$RUN/log" 2>&1 </dev/null &
  while [[ ! -s $RUN/pid ]]; do sleep 0.05; done
  echo "worker $(hostname) running"
}

status() {
  local state=none
  [[ -f $RUN/ready ]] || return 1
  if [[ -f $RUN/command && ($# -eq 0 || $(<"$RUN/command") == "${1:-}") ]]; then
    if alive; then # checked first: a run that has ended by then has written its exit status
      state=running
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
