#!/usr/bin/env bash
# From a bare Debian 12 to a verified KV hand-off on this machine: installs packages, builds, starts
# two daemons with their workers, moves a Llama-3-8B-shaped KV cache (8,192 tokens, 1 GiB) over UCX
# TCP between different tensor-parallel degrees, checks every byte, prints speed, leaves nothing
# running. The last line on success begins with "kvferry quickstart: OK".
set -euo pipefail
cd "$(dirname "$0")/.."
. deploy/lib.sh

build=build/release
logs=build/quickstart
mkdir -p "$logs"

step "installing packages" "$logs/packages.log" deploy/install-packages.sh
step "configuring" "$logs/configure.log" cmake --preset release
step "building (a few minutes the first time)" "$logs/build.log" cmake --build --preset release

# Results of the two directions, for the last line.
summary=()
for pair in tp2:tp4 tp4:tp2; do
  printf '== Llama-3-8B, 8,192 tokens, %s over tcp\n' "$pair"
  "$build/bin/kvferry-bench" model --model llama-3-8b --tokens 8192 --pair "$pair" --path tcp \
    --rounds 3 --progress --show-metrics --json-file "$logs/${pair/:/-}.json"
  summary+=("$pair $(awk -F'[:,]' '/"gbps"/ { printf "%.2f", $2; exit }' "$logs/${pair/:/-}.json") GB/s")
done

if pgrep -f "$PWD/$build/bin/kvferry(d|-rails)" >/dev/null 2>&1; then
  echo "processes are left running:" >&2
  pgrep -af "$PWD/$build/bin/kvferry(d|-rails)" >&2
  exit 1
fi
printf 'kvferry quickstart: OK (%s; every byte verified)\n' "$(IFS=,; echo "${summary[*]}" | sed 's/,/, /g')"
