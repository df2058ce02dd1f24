#!/usr/bin/env bash
# system-calls.sh BIN UNIT: what kvferryd and kvferry-rails call, beside the unit's SystemCallFilter=.
# A hand-off between two daemons runs under strace, which reports only calls that systemd's group does not
# hold; there must be none. Calls of a GPU's driver are not seen here.
set -euo pipefail
bin=$1 unit=$2
filter=$(sed -n 's/^SystemCallFilter=//p' "$unit")
# Groups within the group are opened up, names that this kernel's strace does not know left out ("?").
allowed() {
  systemd-analyze syscall-filter "$1" | sed 's/^ *//' | while read -r name; do
    case $name in
      @*) [ "$name" = "$1" ] || allowed "$name" ;;
      '#'* | '') ;;
      *) echo "?$name" ;;
    esac
  done
}
list=$(for word in $filter; do case $word in @*) allowed "$word" ;; *) echo "?$word" ;; esac; done | sort -u | paste -sd,)
[ "$(tr ',' '\n' <<<"$list" | wc -l)" -gt 200 ] || { echo "systemd's group is not understood" >&2; exit 1; }
log=$(mktemp)
trap 'rm -f "$log"' EXIT
strace -f -qq --seccomp-bpf -e "trace=!$list" -e signal=none -o "$log" \
  "$bin/kvferry-bench" model --model llama-3-8b --tokens 256 --rounds 1 --pair tp1:tp2 >/dev/null
# rt_sigreturn and restart_syscall are the kernel's own; strace's "exited" lines are no calls.
if grep -vE '\+\+\+|resumed>|rt_sigreturn|restart_syscall' "$log" | grep -oE '^[0-9]+ +[a-z_0-9]+\(' | sort | uniq -c | grep .; then
  echo "not in SystemCallFilter=$filter: the calls above" >&2
  exit 1
fi
# That a call outside would be seen: strace tells of one that surely happens.
strace -f -qq --seccomp-bpf -e 'trace=!?read' -o "$log" "$bin/kvferryd" --version >/dev/null
grep -q 'mmap(' "$log"
echo "a hand-off stays within SystemCallFilter=$filter"
