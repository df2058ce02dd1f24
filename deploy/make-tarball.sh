#!/usr/bin/env bash
# Packs what runs on a machine that has nothing of ours: the daemon, its tools and the GPU programs,
# kvferry-rails on UCX 1.22 (with CUDA) from its PyPI wheel, and every library outside glibc. Needs
# Debian 12 and its packages (deploy/install-packages.sh --tarball), runs where glibc is as new.
#   --build-dir DIR     where to build (default: build/tarball)
#   --output DIR        where the tarball goes (default: build)
#   --without-kernels   allow a build without nvcc; its GPU programs then fail on a GPU
#   --no-build          pack what --build-dir holds already
set -euo pipefail
cd "$(dirname "$0")/.."
. deploy/lib.sh
. deploy/tarball-lib.sh

build=build/tarball output=build kernels=ON build_it=1
while [ $# -gt 0 ]; do
  case $1 in
    --build-dir) build=$2; shift ;;
    --output) output=$2; shift ;;
    --without-kernels) kernels=OFF ;;
    --no-build) build_it=0 ;;
    *) echo "make-tarball.sh: what is $1?" >&2; exit 64 ;;
  esac
  shift
done
logs=build/tarball-logs
mkdir -p "$logs" "$output"

programs=(kvferryd kvferry-rails kvferryctl kvferry-bench kvferry-gpu-bench gpu_ring_test)
# Compiled into the programs from headers alone: nothing of theirs is in lib, their licences apply.
header_packages=(catch2 libcli11-dev libexpected-dev nlohmann-json3-dev)

if [ "$kernels" = ON ] && ! command -v nvcc >/dev/null 2>&1 &&
  [ ! -x "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" ]; then
  echo "no nvcc on the path, in CUDA_HOME or in /usr/local/cuda: the tarball would have no GPU" >&2
  echo "kernels. Install a CUDA toolkit, or say --without-kernels." >&2
  exit 1
fi
step "installing packages" "$logs/packages.log" deploy/install-packages.sh --tarball
wheel=build/ucx-$ucx_wheel_version
if [ ! -e "$wheel/libucx/lib/libucp.so.0" ]; then
  step "fetching UCX $ucx_wheel_version" "$logs/ucx-wheel.log" \
    python3 -m pip install --quiet --no-deps --target "$wheel" "libucx-cu13==$ucx_wheel_version"
fi
if [ "$build_it" -eq 1 ]; then
  # The preset leaves tests out; here they are on for the two GPU programs among them.
  step "configuring" "$logs/configure.log" cmake --preset release -B "$build" \
    -DKVFERRY_TESTS=ON -DKVFERRY_CUDA="$kernels" -DCMAKE_PREFIX_PATH="$PWD/$wheel/libucx" \
    -DCMAKE_CXX_FLAGS="-ffile-prefix-map=$PWD/="
  step "building (a few minutes the first time)" "$logs/build.log" \
    cmake --build "$build" --target "${programs[@]}" kvferry_client_shared
fi

cached() { sed -n "s/^$1:[A-Z]*=//p" "$build/CMakeCache.txt"; }
[ -s "$build/kernels/device_copy.fatbin" ] && has_kernels=yes || has_kernels=no
if [ "$kernels" = ON ] && [ "$has_kernels" = no ]; then
  echo "$build was made without the GPU kernels; say --without-kernels if that is meant" >&2
  exit 1
fi
# The handshake compares UCX releases, and the one that counts is the one that is loaded: a rails
# process of another release's headers would be packed without anybody noticing.
if [ "$(realpath "$(cached ucx_DIR)")" != "$(realpath "$wheel/libucx/lib/cmake/ucx")" ]; then
  echo "$build was configured with UCX of $(cached ucx_DIR), not of $wheel" >&2
  exit 1
fi

name=kvferry-$(cached CMAKE_PROJECT_VERSION)-linux-$(uname -m)
stage=$(mktemp -d)
trap 'end_step; rm -rf "$stage"' EXIT
tree=$stage/$name
mkdir -p "$tree"/{bin,lib/gcc,lib/ucx,etc/ucx,share/licenses/kvferry}

echo "== collecting"
for program in "${programs[@]}"; do cp "$build/bin/$program" "$tree/bin/"; done
cp -P "$build"/lib/libkvferry.so* "$tree/lib/"
# UCX looks for modules in ucx/ beside libucs, and for its settings in ../etc/ucx.
for lib in ucp uct ucs ucm ucs_signal; do cp -L "$wheel/libucx/lib/lib$lib.so.0" "$tree/lib/"; done
for module in uct_cuda uct_cma ucm_cuda; do
  cp -L "$wheel/libucx/lib/ucx/lib$module.so.0" "$tree/lib/ucx/"
done
cp "$wheel"/libucx_cu13.libs/libcudart-*.so* "$tree/lib/"
cp "$wheel/libucx/etc/ucx/ucx.conf" "$tree/etc/ucx/"

# The programs and UCX get their way to lib as DT_RPATH, not DT_RUNPATH: only that is also followed
# for what Debian's libraries need of each other, and before LD_LIBRARY_PATH. Debian's are carried
# byte for byte. What UCX comes with would lead to its builder's directories and out of the tree.
# lib/gcc is not for libkvferry: an engine's process has a C++ library, maybe a newer one.
strip --strip-debug "$tree"/bin/* "$(realpath "$tree/lib/libkvferry.so")"
patchelf --force-rpath --set-rpath '$ORIGIN/../lib:$ORIGIN/../lib/gcc' "$tree"/bin/*
for lib in "$tree"/lib/libuc*.so.0 "$(realpath "$tree/lib/libkvferry.so")"; do
  patchelf --force-rpath --set-rpath '$ORIGIN' "$lib"
done
patchelf --force-rpath --set-rpath '$ORIGIN/..' "$tree"/lib/ucx/*

packages=("${header_packages[@]}")
while read -r soname _ path _; do
  soname=${soname##*/}
  into=lib
  ! is_listed "$soname" "${gcc_libraries[@]}" || into=lib/gcc
  if is_listed "$soname" "${system_libraries[@]}" || [ -e "$tree/$into/$soname" ]; then continue; fi
  case $path in
    /*) ;;
    *) echo "$soname is needed and not found" >&2; exit 1 ;;
  esac
  cp -L "$path" "$tree/$into/$soname"
  file=$(realpath "$path")
  # dpkg may know a file of /usr/lib by its name in /lib.
  package=$(dpkg -S "$file" 2>/dev/null || dpkg -S "${file#/usr}") ||
    { echo "$file belongs to no package: its licence is not known" >&2; exit 1; }
  packages+=("${package%%:*}")
done < <(ldd "$tree"/bin/* "$tree/lib/libkvferry.so" | grep '=>' | sort -u)
chmod u+w,a+r "$tree"/lib/*.so* "$tree"/lib/*/*.so*

for package in "${packages[@]}"; do
  mkdir -p "$tree/share/licenses/$package"
  cp -L "/usr/share/doc/$package/copyright" "$tree/share/licenses/$package/"
done
# Debian's copyright files point at these for the full text.
cp -rL /usr/share/common-licenses "$tree/share/licenses/"
cp LICENSE "$tree/share/licenses/kvferry/"
mkdir "$tree/share/licenses/ucx" "$tree/share/licenses/nvidia-cuda-runtime"
cp "$wheel"/libucx_cu13-*.dist-info/licenses/LICENSE "$tree/share/licenses/ucx/"
cat >"$tree/share/licenses/nvidia-cuda-runtime/NOTICE" <<END
lib/$(basename "$tree"/lib/libcudart-*) comes with UCX's wheel, unchanged. It is NVIDIA's, and may be
passed on as part of an application under the CUDA EULA: https://docs.nvidia.com/cuda/eula/
END

cp deploy/tarball/*.sh "$tree/"
# newest_tag TAG FILE...: the newest version of TAG that the files ask for.
newest_tag() {
  local tag=$1
  shift
  objdump -T "$@" 2>/dev/null | grep -F '*UND*' | grep -o "(\?${tag}_[0-9.]*" | sed 's/.*_//' |
    sort -uV | tail -n 1
}
without_gcc=("$tree"/bin/* "$tree"/lib/*.so* "$tree"/lib/ucx/*)
glibc=$(newest_tag GLIBC "${without_gcc[@]}" "$tree"/lib/gcc/*)
commit=$(git describe --always --dirty --abbrev=12 2>/dev/null || echo unknown)
sed -e "s/@NAME@/$name/" -e "s/@COMMIT@/$commit/" -e "s/@UCX@/$ucx_wheel_version/" \
  -e "s/@GLIBC@/$glibc/" -e "s/@GLIBC_WITHOUT_GCC@/$(newest_tag GLIBC "${without_gcc[@]}")/" \
  -e "s/@GLIBCXX@/$(newest_tag GLIBCXX "${without_gcc[@]}")/" -e "s/@KERNELS@/$has_kernels/" \
  deploy/tarball/README.in >"$tree/README"

tarball=$output/$name.tar.gz
echo "== packing"
tar -C "$stage" --sort=name --owner=0 --group=0 --numeric-owner --mtime="@$(git log -1 --format=%ct)" \
  -czf "$tarball" "$name"

echo "== checking what was packed"
mkdir "$stage/check"
tar -C "$stage/check" -xzf "$tarball"
check_tree "$stage/check/$name" "$PWD" "$stage" "$(realpath "$build")"
printf 'kvferry tarball: %s (%s, kernels: %s, glibc %s or newer)\n' "$tarball" \
  "$(du -h "$tarball" | cut -f1)" "$has_kernels" "$glibc"
