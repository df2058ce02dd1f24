#!/usr/bin/env bash
# Builds the Python package's wheel, installs it into a clean environment and runs its linter, type
# checker and tests with the daemons of a build. Needs PyPI; with KVFERRY_OFFLINE=1 it is skipped
# (exit status 77).
#   deploy/test-python.sh [--wheel]     --wheel: only builds the wheel
#   KVFERRY_BIN_DIR                     folder of kvferryd and kvferry-rails (build/dev/bin)
#   KVFERRY_FAKE_CUDA_LIBRARY           the fake CUDA driver (build/dev/lib/libkvferry-fake-cuda.so)
#   KVFERRY_PYTHON_DIR                  what is built goes here (build/python)
#   KVFERRY_PYTHON                      the interpreter; Debian's, which has python3-torch
set -euo pipefail
cd "$(dirname "$0")/.."
. deploy/lib.sh

if [ "${KVFERRY_OFFLINE:-0}" = 1 ]; then
  echo "skipped: KVFERRY_OFFLINE=1, and the package's tools come from PyPI"
  exit 77
fi
export KVFERRY_BIN_DIR=${KVFERRY_BIN_DIR:-$PWD/build/dev/bin}
export KVFERRY_FAKE_CUDA_LIBRARY=${KVFERRY_FAKE_CUDA_LIBRARY:-$PWD/build/dev/lib/libkvferry-fake-cuda.so}
export PIP_DISABLE_PIP_VERSION_CHECK=1
out=${KVFERRY_PYTHON_DIR:-$PWD/build/python}
python=${KVFERRY_PYTHON:-/usr/bin/python3}
package=client/python
mkdir -p "$out"

# make_venv FOLDER OPTIONS... -- PIP ARGUMENTS...: made anew unless it was made for the same before.
make_venv() {
  local folder=$1 options=()
  shift
  while [ "$1" != -- ]; do
    options+=("$1")
    shift
  done
  shift
  local stamp
  stamp="$(printf '%s ' "$python" "${options[@]}" "$@" | cat - "$package/requirements-tools.txt" | cksum)"
  [ "$(cat "$folder/stamp" 2>/dev/null)" != "$stamp" ] || return 0
  rm -rf "$folder"
  "$python" -m venv "${options[@]}" "$folder"
  "$folder/bin/python" -m pip install --quiet "$@"
  printf '%s\n' "$stamp" >"$folder/stamp"
}

build_wheel() {
  # From a copy, so that nothing is left among the sources.
  rm -rf "$out/tree" "$out/dist"
  mkdir -p "$out/tree/client"
  cp -r proto CMakeLists.txt "$out/tree"
  cp -r "$package" "$out/tree/client"
  "$out/tools/bin/python" -m pip wheel --quiet --no-deps --no-build-isolation \
    --wheel-dir "$out/dist" "$out/tree/$package"
}

step "tools from PyPI" "$out/tools.log" make_venv "$out/tools" -- -r "$package/requirements-tools.txt"
step "building the wheel" "$out/wheel.log" build_wheel
wheel=$(echo "$out"/dist/kvferry-*.whl)
echo "   $wheel"
[ "${1:-}" != --wheel ] || exit 0

echo "== ruff and mypy --strict"
"$out/tools/bin/ruff" check --no-cache "$package"
"$out/tools/bin/ruff" format --no-cache --check "$package"
(cd "$out/tree/$package" && "$out/tools/bin/mypy" --strict src/kvferry)

# torch is the system's, all else comes with the wheel.
make_clean() {
  make_venv "$out/clean" --system-site-packages -- pytest==9.2.0 "$wheel"
  "$out/clean/bin/python" -m pip install --quiet --no-deps --force-reinstall "$wheel"
}
step "installing it into a clean environment" "$out/clean.log" make_clean
echo "== pytest"
"$out/clean/bin/python" -c 'import kvferry, sys; sys.exit(not kvferry.__file__.startswith(sys.prefix))' ||
  { echo "kvferry is not the wheel's" >&2; exit 1; }
"$out/clean/bin/python" -m pytest -q -p no:cacheprovider --durations=5 "$package/tests"
