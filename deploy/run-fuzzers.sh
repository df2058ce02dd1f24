#!/usr/bin/env bash
# Builds the fuzzers (preset fuzz: clang, libFuzzer, sanitizers) and runs them one after the other,
# each for so many seconds, from its corpus in tests/fuzz/corpus. What is new is put into
# build/fuzz/found/NAME; an input that breaks something lies there as crash-*, timeout-* or oom-*.
#   deploy/run-fuzzers.sh SECONDS [NAME ...]
#   deploy/run-fuzzers.sh --merge NAME ...   takes what was found, as far as it is new and small,
#                                            into tests/fuzz/corpus/NAME
set -euo pipefail
cd "$(dirname "$0")/.."
. deploy/lib.sh

usage() {
  sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
  exit 64
}
[ $# -ge 1 ] || usage
what=$1
shift
names=("$@")
corpus=tests/fuzz/corpus
found=build/fuzz/found
# An input that is kept is small: the corpora are replayed by every run of the unit tests.
kept_bytes=1024
kept_inputs=60

all_names() {
  local path
  for path in build/fuzz/bin/fuzz_*; do
    case $path in
      */fuzz_seeds | */fuzz_\*) ;;
      *) basename "$path" | sed 's/^fuzz_//' ;;
    esac
  done
}

export ASAN_OPTIONS=detect_stack_use_after_return=1:strict_string_checks=1
export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1

if [ "$what" = --merge ]; then
  [ "${#names[@]}" -gt 0 ] || usage
  for name in "${names[@]}"; do
    merged=$(mktemp -d)
    small=$(mktemp -d)
    # Smallest first, so that a large input is taken only for what no small one reaches.
    find "$corpus/$name" "$found/$name" -type f -size "-$((kept_bytes + 1))c" ! -name 'crash-*' \
      ! -name 'timeout-*' ! -name 'oom-*' -exec cp {} "$small" \;
    "build/fuzz/bin/fuzz_$name" -merge=1 "$merged" "$small" >/dev/null 2>&1
    # Those that have names stay; of the others as many as fit.
    find "$merged" -type f -printf '%s %p\n' | sort -n |
      awk -v n="$kept_inputs" '{size[NR] = $2} END {step = NR > n ? NR / n : 1;
        for (i = 1; i <= NR; i += step) print size[int(i)]}' |
      while read -r path; do
        cmp -s "$path" "$corpus/$name/$(basename "$path")" || cp "$path" "$corpus/$name/"
      done
    rm -rf "$merged" "$small"
    printf '%-14s %s inputs, %s\n' "$name" "$(find "$corpus/$name" -type f | wc -l)" \
      "$(du -sh --apparent-size "$corpus/$name" | cut -f1)"
  done
  exit 0
fi

[[ $what =~ ^[0-9]+$ ]] || usage
targets=("${names[@]/#/fuzz_}")
[ "${#names[@]}" -gt 0 ] || targets=(fuzzers)
step "configuring" build/tests/fuzz-configure.log cmake --preset fuzz
step "building" build/tests/fuzz-build.log cmake --build build/fuzz --target "${targets[@]}"
[ "${#names[@]}" -gt 0 ] || mapfile -t names < <(all_names)

status=0
for name in "${names[@]}"; do
  mkdir -p "$found/$name"
  log=$found/$name.log
  options=(-max_total_time="$what" -timeout=20 -rss_limit_mb=2048 -max_len=4096 -len_control=20
    -print_final_stats=1 -artifact_prefix="$found/$name/")
  result=ok
  "build/fuzz/bin/fuzz_$name" "${options[@]}" "$found/$name" "$corpus/$name" >"$log" 2>&1 || {
    result=BROKEN
    status=1
  }
  printf '%-14s %-6s %12s executions  coverage %s\n' "$name" "$result" \
    "$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")" \
    "$(grep -oE 'cov: [0-9]+ ft: [0-9]+' "$log" | tail -n 1)"
  [ "$result" = ok ] || grep -E 'broken|ERROR|runtime error|SUMMARY|Test unit written' "$log" | head -n 8
done
exit "$status"
