#!/usr/bin/env bash
# Runs the tests of the Python package's connector for an engine with the pinned release of that
# engine, which is imported, and drives it, without a GPU. Optional, as it fetches some 3 GB from
# PyPI; skipped (exit status 77), with the reason, where that cannot be installed. Environment as of
# test-python.sh.
#   deploy/test-engine.sh vllm|sglang
set -euo pipefail
cd "$(dirname "$0")/.."
. deploy/lib.sh

engine=${1:-}
case $engine in
  vllm)
    packages=(vllm==0.33.0)
    tests=client/python/tests/vllm_connector ;;
  sglang)
    # torchvision names another patch release of torch, of which nothing is used.
    packages=(sglang==0.5.23 torchvision==0.29.2)
    tests=client/python/tests/sglang_backend ;;
  *)
    echo "usage: deploy/test-engine.sh vllm|sglang" >&2
    exit 2 ;;
esac
requirements=client/python/requirements-$engine.txt
out=${KVFERRY_PYTHON_DIR:-$PWD/build/python}
python=${KVFERRY_PYTHON:-/usr/bin/python3}
export KVFERRY_BIN_DIR=${KVFERRY_BIN_DIR:-$PWD/build/dev/bin}
export KVFERRY_FAKE_CUDA_LIBRARY=${KVFERRY_FAKE_CUDA_LIBRARY:-$PWD/build/dev/lib/libkvferry-fake-cuda.so}
export PIP_DISABLE_PIP_VERSION_CHECK=1 HF_HUB_OFFLINE=1

if [ "${KVFERRY_OFFLINE:-0}" = 1 ]; then
  echo "skipped: KVFERRY_OFFLINE=1, and $engine comes from PyPI"
  exit 77
fi

install_engine() {
  local stamp
  stamp="$(printf '%s ' "$python" "${packages[@]}" | cat - "$requirements" | cksum)"
  [ "$(cat "$out/$engine/stamp" 2>/dev/null)" != "$stamp" ] || return 0
  # Each command's status counts: `set -e` does not hold in what is tried by `if`.
  rm -rf "${out:?}/$engine" &&
    "$python" -m venv "$out/$engine" &&
    "$out/$engine/bin/python" -m pip install --quiet --no-deps "${packages[@]}" &&
    "$out/$engine/bin/python" -m pip install --quiet -r "$requirements" &&
    printf '%s\n' "$stamp" >"$out/$engine/stamp"
}
if ! step "installing $engine (3 GB)" "$out/$engine.log" install_engine; then
  echo "skipped: ${packages[*]} cannot be installed here, see $out/$engine.log"
  exit 77
fi
deploy/test-python.sh --wheel
"$out/$engine/bin/python" -m pip install --quiet --no-deps --force-reinstall "$out"/dist/kvferry-*.whl
"$out/$engine/bin/python" -m pytest -q -p no:cacheprovider -W ignore "$tests"
