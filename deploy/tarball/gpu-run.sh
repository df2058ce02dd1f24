#!/usr/bin/env bash
# All that wants a GPU, one step after the other, with the programs beside this script; a step that
# fails does not stop the next. Leaves one directory: what each step printed (NAME.json or NAME.txt,
# errors in NAME.log) and summary.txt with a verdict on each step and each limit. Exits 0 only if
# all passed.
#   --results DIR         where to (default: kvferry-gpu-DATE in the current directory)
#   --receiver-device N   hand-offs go from GPU 0 to GPU N (default: within GPU 0)
#   --quick               little data: to see that all of it runs; its figures mean nothing
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd -P)
bin=$here/bin

results=kvferry-gpu-$(date +%Y%m%d-%H%M%S) receiver=0
tokens=8192 rounds=5 fragment_bytes=$((512 << 20)) kernel_options=()
while [ $# -gt 0 ]; do
  case $1 in
    --results) results=${2:?--results DIR}; shift ;;
    --receiver-device) receiver=${2:?--receiver-device N}; shift ;;
    --quick)
      tokens=64 rounds=1 fragment_bytes=$((1 << 20))
      kernel_options=(--mib 1 --rounds 1 --launches 1)
      ;;
    -h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) echo "gpu-run.sh: what is $1? (--help)" >&2; exit 64 ;;
  esac
  shift
done
mkdir -p "$results" || exit 1
results=$(cd "$results" && pwd -P)
summary=$results/summary.txt
failed=()
: >"$summary"

say() { printf '%s\n' "$*" | tee -a "$summary"; }

# run FILE COMMAND...: a step named as FILE is, without its ending; FILE gets its output.
run() {
  local file=$results/$1 step=${1%.*} status=0 why
  shift
  printf -- '-- %s\n' "$step"
  "$@" >"$file" 2>"$results/$step.log" || status=$?
  if [ "$status" -eq 0 ]; then
    say "passed  $step"
    return
  fi
  why=$(cat "$file" "$results/$step.log" | grep . | tail -n 1)
  say "FAILED  $step (status $status) $why"
  failed+=("$step")
  return "$status"
}

# Without a daemon of the machine's own there is no worker socket; that says nothing of its GPUs.
doctor() {
  { "$bin/kvferryctl" doctor --json ${KVFERRY_CUDA_DRIVER:+--cuda-driver "$KVFERRY_CUDA_DRIVER"} || true; } |
    awk '{ print } /"check":/ { check = $0 } /"grade": "problem"/ && check !~ /"worker socket"/ { bad = 1 }
    /"problems":/ { seen = 1 } END { exit bad || !seen }'
}

# kernel_limits FILE: one line for each size and kernel, against a plain copy in the same memory.
kernel_limits() {
  awk '
    function verdict(kernel,  least, what) {
      least = size >= 4096 ? 0.8 : 0.6
      what = sprintf("%s of %d B: %.2f of copy_d2d, at least %.1f", kernel, size, $2, least)
      print ($2 >= least ? "passed  " : "FAILED  ") what
      lines++
    }
    BEGIN { FS = "[:,] *" }
    /"fragment_bytes":/ { size = $2 }
    /"[a-z0-9_]+": [{]/ { entry = $1; gsub(/[ "]/, "", entry) }
    /"ratio":/ && (entry == "gather" || entry == "scatter") && size >= 512 { verdict(entry) }
    END { if (!lines) print "FAILED  no kernel was measured" }' "$1"
}

# speed FILE: the median and the worst of a hand-off.
speed() {
  awk -F'[:,] *' '/"gbps":/ { gbps = $2 } /"p99_ms":/ { p99 = $2 }
    END { printf "%.2f GB/s, p99 %.1f ms\n", gbps, p99 }' "$1"
}

say "kvferry on $(uname -srm), $(date -u +%Y-%m-%dT%H:%M:%SZ)"
sed -n 1,2p "$here/README" | tee -a "$summary"
if command -v nvidia-smi >/dev/null 2>&1; then
  nvidia-smi -L 2>&1 | tee -a "$summary"
  { nvidia-smi; nvidia-smi topo -m; } >"$results/nvidia-smi.txt" 2>&1
else
  say "no nvidia-smi"
fi
[ "$rounds" -gt 1 ] || say "quick: the figures mean nothing"

run doctor.json doctor
run gpu_ring_test.txt env KVFERRY_BIN="$bin" "$bin/gpu_ring_test"

if run kernels.json "$bin/kvferry-gpu-bench" --json "${kernel_options[@]}"; then
  while IFS= read -r line; do
    say "$line"
    case $line in FAILED*) failed+=("limit: ${line#FAILED  }") ;; esac
  done < <(kernel_limits "$results/kernels.json")
else
  say "FAILED  the kernels' limits: nothing was measured"
fi

# hand_off NAME OPTION...: over each path, between GPU pools; every byte is verified.
hand_off() {
  local name=$1 path step
  shift
  for path in tcp shm local; do
    step=$name-$path
    run "$step.json" "$bin/kvferry-bench" "$@" --memory cuda --receiver-device "$receiver" \
      --path "$path" --rounds "$rounds" --json && say "        $(speed "$results/$step.json")"
  done
}
hand_off deepseek-r1-tp2-tp1 model --model deepseek-r1 --tokens "$tokens" --pair tp2:tp1
hand_off llama-3-70b-tp2-tp4 model --model llama-3-70b --tokens "$tokens" --pair tp2:tp4
hand_off llama-3-70b-tp4-tp2 model --model llama-3-70b --tokens "$tokens" --pair tp4:tp2
for size in 512 4096 65536; do
  hand_off "fragments-$size" fragments --fragment-bytes "$size" --fragments $((fragment_bytes / size))
done

# A GPU's own memory, lent by one daemon and written by the other. auto: fabric memory where it works.
for kind in auto device_vmm cuda_malloc; do
  run "mapped-$kind.json" "$bin/kvferry-bench" model --model llama-3-70b --tokens "$tokens" \
    --pair tp2:tp4 --memory cuda --receiver-device "$receiver" --path shm --rounds "$rounds" --json \
    --set mapped.host_bytes=0 --set mapped.device_bytes=64MiB --set "mapped.device_kind=$kind" \
    --set arena.device_share=0.5 && say "        $(speed "$results/mapped-$kind.json")"
done

if [ "${#failed[@]}" -gt 0 ]; then
  say "kvferry gpu-run: FAILED, ${#failed[@]} in all:"
  for step in "${failed[@]}"; do say "  $step"; done
  say "results: $results"
  exit 1
fi
say "results: $results"
say "kvferry gpu-run: OK"
