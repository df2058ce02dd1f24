#!/usr/bin/env bash
# Builds kvferry and runs every test that needs no root and no second system. Options:
#   --quick   only the dev build and its tests (no sanitizers, no second UCX release)
set -euo pipefail
cd "$(dirname "$0")/.."
. deploy/lib.sh

quick=0
[ "${1:-}" != --quick ] || quick=1
logs=build/tests
mkdir -p "$logs"

step "installing packages" "$logs/packages.log" deploy/install-packages.sh --tests

echo "== formatting"
find client daemon deploy kernels proto tests \( -name '*.cc' -o -name '*.h' \) -print0 |
  xargs -0 clang-format-14 --dry-run --Werror

step "configuring dev" "$logs/dev-configure.log" cmake --preset dev
step "building dev" "$logs/dev-build.log" cmake --build --preset dev
echo "== tests: unit, model, simulator and process rings"
ctest --preset dev --no-tests=error
deploy/test-deploy.sh build/dev

if [ "$quick" -eq 0 ]; then
  for sanitizer in asan tsan; do
    step "configuring $sanitizer" "$logs/$sanitizer-configure.log" cmake --preset "$sanitizer"
    step "building $sanitizer" "$logs/$sanitizer-build.log" cmake --build --preset "$sanitizer"
    echo "== tests under $sanitizer"
    ctest --preset "$sanitizer" --no-tests=error -LE model
  done
  deploy/test-ucx-wheel.sh
  for engine in vllm sglang; do
    switch=KVFERRY_${engine^^}
    if [ "${!switch:-0}" = 1 ]; then
      deploy/test-engine.sh "$engine" || [ $? -eq 77 ]
    else
      echo "== $engine: skipped, its wheels are 3 GB; $switch=1 runs deploy/test-engine.sh $engine"
    fi
  done
  if command -v nvcc >/dev/null 2>&1 || [ -x /usr/local/cuda/bin/nvcc ]; then
    step "configuring with CUDA" "$logs/cuda-configure.log" \
      cmake -S . -B build/cuda -G Ninja -DKVFERRY_CUDA=ON -DKVFERRY_WERROR=ON -DKVFERRY_TESTS=OFF
    step "building the GPU kernels" "$logs/cuda-build.log" \
      cmake --build build/cuda --target kvferry_kernels
  fi
fi
echo "kvferry tests: OK"
