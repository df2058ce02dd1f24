#!/usr/bin/env bash
# Explores the protocol models with Spin, two configurations at a time.
#
#   run.sh [--quick|--full] [--output DIR] [NAME...]
#
# --quick (the default) runs the configurations marked quick in configurations.txt, --full all of
# them; NAMEs choose single ones of either. Everything is written below DIR (default: a fresh
# temporary directory, removed when all is well): DIR/NAME holds the model, Spin's output and, where
# an assertion failed, trail.txt with the actions that led there.
#
# Exit code: 0 when every V_* configuration fails and every other one holds, 1 when not, 64 for wrong
# usage, 77 (skipped) without spin or gcc.
# Environment: JOBS (2), TIMEOUT_S for one configuration (300), MEMORY_MIB for one (8000).
set -u -o pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

usage() {
  sed -n 4p "${BASH_SOURCE[0]}" | sed 's/^# \{0,1\}//' >&2
  exit 64
}

# explore DIR MODEL NAME [-DX...]: one configuration; prints its line, "bad" in front if it did not
# end as its name demands.
explore() {
  local dir=$1/$3 model=$2 name=$3
  shift 3
  mkdir -p "$dir" && cd "$dir" || return 1
  if [ "$model" = leg ]; then
    python3 "$here/gen.py" "$here/leg.pml.in" model.pml "${@#-D}" || return 1
  else
    # Spin wants an alternative to begin its own line.
    gcc -E -P -xc "$@" "$here/$model.pml" | sed 's/ :: d_step/\n :: d_step/g' > model.pml || return 1
  fi
  local begin=$SECONDS verdict=bad why states
  if ! spin -a model.pml > spin.txt 2>&1; then
    why="spin: $(head -n 1 spin.txt)"
  elif ! gcc "$PAN_OPTIMISE" -w -DSAFETY -DHC4 "-DMEMLIM=${MEMORY_MIB:-8000}" -DVECTORSZ=2048 \
      -o pan pan.c > gcc.txt 2>&1; then
    why="gcc: $(head -n 1 gcc.txt)"
  else
    timeout "${TIMEOUT_S:-300}" ./pan -m200000 > pan.txt 2>&1
    local rc=$?
    states=$(awk '/states, stored/ {print $1; exit}' pan.txt)
    why=$(grep -m 1 '^pan:[0-9]*: \|^error: \|^pan: reached' pan.txt | sed 's/^pan:[0-9]*: //')
    [ "$rc" = 124 ] && why="ended after ${TIMEOUT_S:-300} s"
    if [ -f model.pml.trail ]; then
      # Only what the model's printf says.
      spin -t model.pml 2>/dev/null | grep -v ' = \|process\|proc \|spin:' > trail.txt
    fi
    # A search that was cut short proves nothing, in neither direction.
    case $name in
      V_*) [[ $why == 'assertion violated'* ]] && grep -q 'errors: 1$' pan.txt && verdict=ok ;;
      *) [ "$rc" = 0 ] && [ -z "$why" ] && grep -q 'errors: 0$' pan.txt && verdict=ok ;;
    esac
    rm -f pan pan.? # the rest is small and worth keeping
  fi
  printf '%-3s %-8s %-14s %10s states %4d s  %s\n' "$verdict" "$model" "$name" "${states:-?}" \
    $((SECONDS - begin)) "${why:-holds}"
}

ring=quick
output=
names=()
if [ "${1:-}" = --explore ]; then
  shift
  explore "$@"
  exit
fi
while [ $# -gt 0 ]; do
  case $1 in
    --quick) ring=quick ;;
    --full) ring=full ;;
    --output) [ $# -ge 2 ] || usage; output=$2; shift ;;
    -*) usage ;;
    *) names+=("$1") ;;
  esac
  shift
done

for tool in spin gcc python3; do
  if ! command -v "$tool" > /dev/null; then
    echo "protocol models skipped: $tool is not installed"
    exit 77
  fi
done

kept=1
if [ -z "$output" ]; then
  output=$(mktemp -d "${TMPDIR:-/tmp}/kvferry-models.XXXXXX") || exit 1
  kept=0
fi
mkdir -p "$output" && output=$(cd "$output" && pwd) || exit 1

chosen() {
  local ring_of model name rest
  while read -r ring_of model name rest; do
    case $ring_of in quick | full) ;; *) continue ;; esac
    if [ ${#names[@]} -gt 0 ]; then
      [[ " ${names[*]} " == *" $name "* ]] || continue
    elif [ "$ring" = quick ] && [ "$ring_of" = full ]; then
      continue
    fi
    echo "$model $name${rest:+ $rest}" # xargs joins lines that end in a blank
  done < "$here/configurations.txt"
}

chosen > "$output/chosen.txt"
count=$(wc -l < "$output/chosen.txt")
if [ "$count" = 0 ] || { [ ${#names[@]} -gt 0 ] && [ "$count" != ${#names[@]} ]; }; then
  echo "no such configuration: ${names[*]}" >&2
  [ "$kept" = 1 ] || rm -rf "$output"
  exit 64
fi
# A fast compilation suits short searches, fast code long ones.
[ "$ring" = quick ] && : "${PAN_OPTIMISE:=-O0}"
export PAN_OPTIMISE="${PAN_OPTIMISE:--O2}"
xargs -P "${JOBS:-2}" -L 1 "$here/run.sh" --explore "$output" \
  < "$output/chosen.txt" | tee "$output/results.txt"

good=$(grep -c '^ok ' "$output/results.txt")
echo "$good of $count configurations as they should be, ${SECONDS} s"
if [ "$good" != "$count" ]; then
  grep -v '^ok ' "$output/results.txt" | sed 's/^/not as it should be: /'
  echo "see $output"
  exit 1
fi
[ "$kept" = 1 ] || rm -rf "$output"
