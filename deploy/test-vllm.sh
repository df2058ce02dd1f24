#!/usr/bin/env bash
# Runs the tests of the vLLM connector (client/python/tests/vllm_connector) with the pinned vLLM, whose
# scheduler runs without a GPU. Optional, as it fetches some 3 GB from PyPI; skipped (exit status
# 77), with the reason, where that cannot be installed. Environment as of test-python.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
. deploy/lib.sh

version=0.33.0
out=${KVFERRY_PYTHON_DIR:-$PWD/build/python}
python=${KVFERRY_PYTHON:-/usr/bin/python3}
export KVFERRY_BIN_DIR=${KVFERRY_BIN_DIR:-$PWD/build/dev/bin}
export PIP_DISABLE_PIP_VERSION_CHECK=1 HF_HUB_OFFLINE=1

install_vllm() {
  [ "$(cat "$out/vllm/stamp" 2>/dev/null)" != "$version" ] || return 0
  rm -rf "$out/vllm"
  "$python" -m venv "$out/vllm"
  "$out/vllm/bin/python" -m pip install --quiet --no-deps "vllm==$version"
  "$out/vllm/bin/python" -m pip install --quiet -r client/python/requirements-vllm.txt
  printf '%s\n' "$version" >"$out/vllm/stamp"
}
if ! step "installing vLLM $version (3 GB)" "$out/vllm.log" install_vllm; then
  echo "skipped: vllm==$version cannot be installed here, see $out/vllm.log"
  exit 77
fi
deploy/test-python.sh --wheel
"$out/vllm/bin/python" -m pip install --quiet --no-deps --force-reinstall "$out"/dist/kvferry-*.whl
"$out/vllm/bin/python" -m pytest -q -p no:cacheprovider -W ignore client/python/tests/vllm_connector
