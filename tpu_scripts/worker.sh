#!/usr/bin/env bash
# One worker's part of tpu.sh, which copies it there and calls it:
#   setup              install the repository
#   start CMD          run CMD, a line for bash, in the background
#   status [CMD]       "worker HOST none|running|dead|stopped|exit N"; of another command than CMD: none. stopped: by SIGTERM,
#                      whatever it made of it; dead: together with this machine, without a word
#   stop SECONDS       SIGTERM, and SIGKILL after SECONDS
#   log                the end of the log
# The run lies in ~/titok_run: command, pid, exit, log; the logs of earlier runs in log.1, log.2, ..., oldest first, the newest 20
set -euo pipefail

CODE=$HOME/titok_jax
RUN=$HOME/titok_run
VENV=$HOME/titok_venv
LOCKFILE=${LIBTPU_LOCKFILE:-/tmp/libtpu_lockfile} # of the runtime, which leaves it behind when it is killed

setup() {
  local python
  if [[ -f $HOME/.titok_env ]]; then
    chmod 600 "$HOME/.titok_env"
  fi
  if [[ ! -x $VENV/bin/python ]]; then
    # The images of TPU machines have Python 3.10; uv brings a newer one.
    if python=$(command -v python3.12 || command -v python3.11); then
      "$python" -m venv "$VENV"
    else
      python3 -m pip install --quiet --user uv
      python3 -m uv venv --quiet --seed --python 3.11 "$VENV"
    fi
  fi
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -c "$CODE/constraints.txt" -e "${CODE}[tpu]"
  mkdir -p "$RUN"
  touch "$RUN/ready"
  echo "worker $(hostname) ready"
}

# The process group of the run, if it lives.
alive() {
  [[ -f $RUN/pid ]] && kill -0 -- "-$(<"$RUN/pid")" 2>/dev/null
}

# A process that an earlier run left behind holds the chips, and JAX then falls back to the CPU.
free_chips() {
  local devices=() device
  for device in /dev/accel* /dev/vfio/[0-9]*; do
    [[ ! -e $device ]] || devices+=("$device")
  done
  if ((${#devices[@]})) && command -v fuser >/dev/null; then
    sudo fuser --silent --kill -KILL "${devices[@]}" || true # 1: nobody holds them
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
  # Its own session: it outlives this connection, and its process group has its number.
  # shellcheck disable=SC2016 # expanded there
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
    if alive; then # asked first: a run that ends now has then written how
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
