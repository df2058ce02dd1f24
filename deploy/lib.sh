# Shared by the scripts of this folder; sourced, not run. A script with an EXIT trap of its own calls end_step first.
step_pid=
trap end_step EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# process_tree PID: it and what descends from it.
process_tree() {
  local child
  echo "$1"
  for child in $(cat "/proc/$1"/task/*/children 2>/dev/null); do process_tree "$child"; done
}

# end_step: what the interrupted step has started ends; what is deaf to SIGTERM, as process 1 of a container is,
# after two seconds.
end_step() {
  [ -n "$step_pid" ] || return 0
  local pids
  mapfile -t pids < <(process_tree "$step_pid")
  kill "${pids[@]}" 2>/dev/null || true
  for _ in {1..20}; do
    kill -0 "${pids[@]}" 2>/dev/null || break
    sleep 0.1
  done
  kill -KILL "${pids[@]}" 2>/dev/null || true
  wait "$step_pid" 2>/dev/null || true
  step_pid=
}

# step TITLE LOG COMMAND...: runs COMMAND with its output in LOG and a progress line every few
# seconds (the log's last line); prints the log's end and returns the status when it fails.
step() {
  local title=$1 log=$2 started=$SECONDS status=0
  shift 2
  mkdir -p "$(dirname "$log")"
  printf '== %s\n' "$title"
  "$@" >"$log" 2>&1 &
  step_pid=$!
  while kill -0 "$step_pid" 2>/dev/null; do
    # Returns as soon as the command ends, else after five seconds. In the foreground, so that Ctrl-C ends it too.
    timeout --foreground 5 tail --pid="$step_pid" -f /dev/null || true
    if kill -0 "$step_pid" 2>/dev/null; then
      printf '   %4d s  %s\n' "$((SECONDS - started))" "$(tail -n 1 "$log" 2>/dev/null | cut -c1-100)"
    fi
  done
  wait "$step_pid" || status=$?
  step_pid=
  if [ "$status" -ne 0 ]; then
    printf '== %s FAILED (status %d), end of %s:\n' "$title" "$status" "$log"
    tail -n 60 "$log"
    return "$status"
  fi
  printf '   done in %d s\n' "$((SECONDS - started))"
}
