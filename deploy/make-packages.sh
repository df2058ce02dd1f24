#!/usr/bin/env bash
# Builds the release and packs it: kvferryd, kvferry-tools, libkvferry0 and libkvferry-dev for the
# Debian release that this runs on. Then lintian reads them.
#   --build-dir DIR   where to build (default: build/package)
#   --output DIR      where the packages go (default: build/packages)
#   --no-lintian      for an image's builder
#   --no-build        pack what --build-dir holds already
set -euo pipefail
cd "$(dirname "$0")/.."
. deploy/lib.sh

build=build/package output=build/packages lint=1 build_it=1
while [ $# -gt 0 ]; do
  case $1 in
    --build-dir) build=$2; shift ;;
    --output) output=$2; shift ;;
    --no-lintian) lint=0 ;;
    --no-build) build_it=0 ;;
    *) echo "make-packages.sh: what is $1?" >&2; exit 64 ;;
  esac
  shift
done
logs=build/package-logs
mkdir -p "$output"

[ "$lint" -eq 0 ] && needs=--packages || needs=--lint
step "installing packages" "$logs/packages.log" deploy/install-packages.sh "$needs"
step "configuring" "$logs/configure.log" cmake --preset release -B "$build" \
  -DCMAKE_INSTALL_PREFIX=/usr -DCMAKE_INSTALL_LIBDIR="lib/$(dpkg-architecture -qDEB_HOST_MULTIARCH)" \
  -DCMAKE_CXX_FLAGS="-ffile-prefix-map=$PWD/="
[ "$build_it" -eq 0 ] || step "building (a few minutes the first time)" "$logs/build.log" \
  cmake --build "$build" --target kvferryd kvferry-rails kvferryctl kvferry-bench kvferry_client_shared
step "packing" "$logs/pack.log" cpack -G DEB --config "$build/CPackConfig.cmake" -B "$build/pack"
rm -f "$output"/{kvferryd,kvferry-tools,libkvferry0,libkvferry-dev}_*.deb
mv "$build"/pack/*.deb "$output/"
if [ "$lint" -eq 1 ]; then
  # Not asked of packages that go into no archive of Debian's: a bug number in the changelog. And CPack calls
  # ldconfig by scripts where the trigger, which is there too, would do.
  step "lintian" "$logs/lintian.log" \
    lintian --allow-root --tag-display-limit 0 --fail-on error,warning \
    --suppress-tags initial-upload-closes-no-bugs,maintscript-calls-ldconfig \
    "$output"/{kvferryd,kvferry-tools,libkvferry0,libkvferry-dev}_*.deb
fi
ls -l "$output"
