#!/usr/bin/env bash
# Builds the rails process against the second UCX release that is supported (1.22, from its PyPI
# wheel) and runs the process ring with it; its CUDA module runs over the fake driver. The rest of
# the daemon does not link UCX.
set -euo pipefail
cd "$(dirname "$0")/.."
. deploy/lib.sh

version=1.22.0
prefix=build/ucx-$version
logs=build/tests
if [ ! -e "$prefix/libucx/lib/libucp.so.0" ]; then
  step "fetching UCX $version" "$logs/ucx-wheel.log" \
    python3 -m pip install --quiet --no-deps --target "$prefix" "libucx-cu13==$version"
fi
step "configuring with UCX $version" "$logs/ucx122-configure.log" \
  cmake -S . -B build/ucx122 -G Ninja -DKVFERRY_WERROR=ON -DKVFERRY_CUDA=OFF -DKVFERRY_TESTS=OFF \
  -DCMAKE_BUILD_TYPE=RelWithDebInfo -DCMAKE_PREFIX_PATH="$PWD/$prefix/libucx"
step "building kvferry-rails with UCX $version" "$logs/ucx122-build.log" \
  cmake --build build/ucx122 --target kvferry-rails
echo "== process ring with UCX $version"
rails=$PWD/build/ucx122/bin/kvferry-rails
KVFERRY_RAILS_BINARY=$rails KVFERRY_CUDA_RAILS=$rails \
  KVFERRY_CUDA_RAILS_DRIVER=$PWD/build/dev/lib/driver-for-ucx/libcuda.so.1 \
  ctest --preset dev -L proc -LE python --no-tests=error
