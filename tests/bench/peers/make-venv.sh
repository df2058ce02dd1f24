#!/usr/bin/env bash
# Makes a Python environment with the transfer libraries that kvferry is measured beside. They are
# run for figures only: nothing of kvferry, its tests or its CI needs them.
#   tests/bench/peers/make-venv.sh [DIRECTORY]      default: build/peers-venv
set -euo pipefail
cd "$(dirname "$0")/../../.."

directory=${1:-build/peers-venv}
[ -x "$directory/bin/python" ] || python3 -m venv "$directory"
pip=("$directory/bin/pip" --disable-pip-version-check install --quiet)
"${pip[@]}" 'numpy==2.4.6'
# Without their dependency on torch (2.7 GB), which they load only for tensors. nixl picks one of
# the wheels by CUDA's major version; without CUDA it is nixl-cu13.
"${pip[@]}" --no-deps 'nixl==1.5.1' 'nixl-cu13==1.5.1'
"${pip[@]}" 'mooncake-transfer-engine-non-cuda==0.3.13.post1'
"$directory/bin/pip" --disable-pip-version-check list --format=freeze |
  grep -E '^(nixl|nixl-cu13|mooncake-transfer-engine-non-cuda|numpy)=='
