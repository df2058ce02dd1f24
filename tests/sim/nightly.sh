#!/usr/bin/env bash
# Runs many seeds of the simulator in pieces, on all processors, and says what came out.
#
#   nightly.sh BUILD_DIR [FIRST..LAST] [JOBS]
#
# Without a range: 1..100000. Each piece has 1,000 seeds and fails, too, if something that all runs
# together should have met never happened. Exit status 0: every seed passed.
set -euo pipefail

build=${1:?usage: nightly.sh BUILD_DIR [FIRST..LAST] [JOBS]}
range=${2:-1..100000}
jobs=${3:-$(nproc)}
first=${range%%..*}
last=${range##*..}
sim=$build/bin/kvferry_sim
[[ -x $sim ]] || { echo "nightly.sh: no $sim: build kvferry_sim first" >&2; exit 64; }
[[ $first =~ ^[0-9]+$ && $last =~ ^[0-9]+$ && $first -le $last ]] || {
  echo "nightly.sh: '$range' is no FIRST..LAST" >&2
  exit 64
}

out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
start=$SECONDS

piece() {  # one piece: its output, and its exit status if that is not 0
  local from=$1 to=$2
  "$sim" --seeds "$from..$to" >"$out/$from" 2>"$out/$from.err" || echo "$?" >"$out/$from.rc"
}
export -f piece
export sim out

for ((at = first; at <= last; at += 1000)); do
  echo "$at $((at + 999 < last ? at + 999 : last))"
done | xargs -P "$jobs" -L 1 bash -c 'piece "$0" "$1"'

runs=$(awk '/ runs, / { sum += $1 } END { print sum + 0 }' "$out"/[0-9]*)
bad=$(find "$out" -name '*.rc' | wc -l)
echo "seeds $first..$last: $runs runs in $((SECONDS - start)) s by $jobs processes, $bad pieces failed"
if ((bad > 0)); then
  cat "$out"/*.err
  exit 1
fi
# What never happened in a piece fails it; here is what happened in all of them.
find "$out" -type f -name '*[0-9]' -print0 |
  xargs -0 awk 'match($0, /^  [^0-9].* [0-9]+$/) { count = $NF; $NF = ""; sum[$0] += count }
     END { for (name in sum) printf "  %-30s %d\n", name, sum[name] }' | sort
[[ $runs -eq $((last - first + 1)) ]]
