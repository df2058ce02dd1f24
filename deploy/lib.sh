# Shared by the scripts of this folder; sourced, not run.

# step TITLE LOG COMMAND...: runs COMMAND with its output in LOG and a progress line every few
# seconds (the log's last line); prints the log's end and returns the status when it fails.
step() {
  local title=$1 log=$2 started=$SECONDS status=0
  shift 2
  mkdir -p "$(dirname "$log")"
  printf '== %s\n' "$title"
  "$@" >"$log" 2>&1 &
  local pid=$!
  while kill -0 "$pid" 2>/dev/null; do
    # Returns as soon as the command ends, else after five seconds.
    timeout 5 tail --pid="$pid" -f /dev/null || true
    if kill -0 "$pid" 2>/dev/null; then
      printf '   %4d s  %s\n' "$((SECONDS - started))" "$(tail -n 1 "$log" 2>/dev/null | cut -c1-100)"
    fi
  done
  wait "$pid" || status=$?
  if [ "$status" -ne 0 ]; then
    printf '== %s FAILED (status %d), end of %s:\n' "$title" "$status" "$log"
    tail -n 60 "$log"
    return "$status"
  fi
  printf '   done in %d s\n' "$((SECONDS - started))"
}
