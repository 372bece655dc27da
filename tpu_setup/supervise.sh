#!/usr/bin/env bash
# On a host: keeps one command running. It is started again when it ends with a code that asks for it (42: preempted and
# saved), its output goes into one log, and a SIGTERM is handed on to it, so that it can save.
#
#   supervise.sh start NAME MAX_RESTARTS CODES WORD...   detached; CODES such as 42 or 42,143
#   supervise.sh status NAME       one line: none|running|ended|lost RESTARTS CODE LAST-LINE-OF-THE-LOG
#   supervise.sh stop NAME GRACE   SIGTERM, then SIGKILL after GRACE seconds
#   supervise.sh log NAME FROM     the log as it grows, until the run ends; FROM is a byte, or -LINES; "@BYTE" comes first
#   supervise.sh idle              fails if a run is active
set -euo pipefail

runs=${LLAMA_JAX_RUNS:-$HOME/llama_jax-runs}

fail() {
  echo "error: $*" >&2
  exit 2
}

# Writes a word into a file that others read at any moment.
put() {
  echo "$1" >"$2.new" && mv "$2.new" "$2"
}

# Whether the supervisor of a run's folder is alive: the pid may have gone to another process since.
active() {
  [ -f "$1/pid" ] && grep -qs supervise.sh "/proc/$(cat "$1/pid")/cmdline"
}

idle() {
  local folder
  for folder in "$runs"/*/; do
    if active "$folder"; then
      fail "the run $(basename "$folder") is active on this host; stop it first"
    fi
  done
}

start() {
  local folder="$runs/$1" command
  command=$(printf '%q ' "${@:2}")
  if active "$folder" && [ "$(cat "$folder/command")" = "$command" ]; then
    echo "runs already"
    return
  fi
  idle
  mkdir -p "$folder"
  rm -f "$folder/pid" "$folder/ended"
  put "$command" "$folder/command"
  put 0 "$folder/restarts"
  echo "--- $(date -u +%FT%TZ) started on $(hostname): $command" >>"$folder/log"
  setsid nohup bash "$0" keep "$folder" "${@:2}" </dev/null >>"$folder/log" 2>&1 &
  for _ in {1..600}; do
    [ -f "$folder/pid" ] && break
    sleep 0.05
  done
  [ -f "$folder/pid" ] || fail "the supervisor did not start; see $folder/log"
  echo "started"
}

keep() {
  local folder=$1 max=$2 codes=$3 restarts=0 stopped="" interrupted="" child="" code again
  shift 3
  put $$ "$folder/pid"
  trap 'stopped=yes interrupted=yes; [ -z "$child" ] || kill -TERM "$child" 2>/dev/null || true' TERM INT
  export PATH="$HOME/llama_jax-venv/bin:$PATH"
  ulimit -n "$(ulimit -Hn)" || true # checkpoints and data open many files
  cd "$(dirname "$0")/.."
  while true; do
    "$@" &
    child=$!
    [ -z "$stopped" ] || kill -TERM "$child" 2>/dev/null || true # it came while there was no child yet
    code=0
    wait "$child" || code=$?
    # A signal ends `wait` before the child: it has its own code still to come.
    while [ -n "$interrupted" ]; do
      interrupted="" again=0
      wait "$child" || again=$?
      [ "$again" = 127 ] || code=$again
    done
    child=""
    echo "--- $(date -u +%FT%TZ) ended with $code"
    if [ -n "$stopped" ] || [[ ",$codes," != *",$code,"* ]]; then
      break
    fi
    if [ "$restarts" -ge "$max" ]; then
      echo "--- not started again: $restarts restarts are the most allowed"
      break
    fi
    restarts=$((restarts + 1))
    put "$restarts" "$folder/restarts"
    sleep "${RESTART_PAUSE:-10}" &
    wait $! || true
    [ -z "$stopped" ] || break
    echo "--- $(date -u +%FT%TZ) restart $restarts of $max"
  done
  put "$code" "$folder/ended"
  exit "$code"
}

status() {
  local folder="$runs/$1" state=lost code=-
  [ -d "$folder" ] || { echo "none 0 -"; return; }
  # Asked in this order: a supervisor that is gone has written how its run ended.
  if [ ! -f "$folder/ended" ] && active "$folder"; then
    state=running
  elif [ -f "$folder/ended" ]; then
    state=ended code=$(cat "$folder/ended")
  fi
  echo "$state $(cat "$folder/restarts") $code $(tail -n 1 "$folder/log" | tr -d '\r' | cut -c 1-200)"
}

stop() {
  local folder="$runs/$1" grace=$2 pid
  active "$folder" || { echo "no run is active"; return; }
  pid=$(cat "$folder/pid")
  kill -TERM "$pid"
  for ((i = 0; i < grace * 10; i++)); do
    active "$folder" || { echo "ended with $(cat "$folder/ended")"; return; }
    sleep 0.1
  done
  kill -KILL -- "-$pid" # the supervisor leads the group of everything it started
  put 137 "$folder/ended"
  fail "did not end within $grace s of SIGTERM, and was killed; the last checkpoint stands"
}

log() {
  local file="$runs/$1/log" from=$2 pid
  [ -f "$file" ] || fail "there is no run $1 on this host"
  if [[ $from = -* ]]; then
    from=$(($(stat -c %s "$file") - $(tail -n "${from#-}" "$file" | wc -c) + 1))
  elif [ "$from" -gt $(($(stat -c %s "$file") + 1)) ]; then
    from=1 # another host with the same name: its log begins anew
  fi
  echo "@$from"
  if active "$runs/$1"; then
    pid=$(cat "$runs/$1/pid")
    exec tail -c "+$from" --pid="$pid" -s 0.5 -f "$file"
  fi
  exec tail -c "+$from" "$file"
}

case ${1:-} in
start | status | stop | log | idle | keep) "$@" ;;
*) fail "unknown word '${1:-}'; it is start, status, stop, log or idle" ;;
esac
