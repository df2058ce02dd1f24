#!/usr/bin/env bash
# Installs what building and testing kvferry needs on Debian 12. Does nothing where all is there.
#   deploy/install-packages.sh [--tests|--tarball|--packages|--lint|--systems]
#     --tests: also what only the tests need; --tarball: and what only packing a tarball needs;
#     --packages: what building Debian packages needs; --lint: and what checking them needs;
#     --systems: what test-systemd.sh and test-image.sh need
set -euo pipefail

packages=(
  g++ cmake ninja-build pkg-config git ca-certificates
  libabsl-dev libgrpc++-dev protobuf-compiler protobuf-compiler-grpc libprotobuf-dev
  libucx-dev libspdlog-dev libcli11-dev prometheus-cpp-dev libcivetweb-dev
  libtomlplusplus-dev libxxhash-dev libhwloc-dev libseccomp-dev libsystemd-dev libssl-dev libexpected-dev
  nlohmann-json3-dev zlib1g-dev libcurl4-openssl-dev
)
tests=(openssl catch2 librapidcheck-dev libbenchmark-dev ccache clang-14 libclang-rt-14-dev clang-format-14 llvm-14 spin procps python3 python3-venv python3-pip python3-torch)
# What reads the files of deploy, and what the monitoring is tried with. Debian's prometheus starts a
# server of its own where systemd runs.
tests+=(systemd shellcheck yamllint man-db mandoc zsh prometheus strace nftables)
packing=(dpkg-dev file gzip)
systems=(debootstrap systemd-container qemu-system-x86 e2fsprogs podman crun curl openssl python3-venv)

case ${1:-} in
  '') ;;
  --tests) packages+=("${tests[@]}") ;;
  --tarball) packages+=("${tests[@]}" binutils patchelf) ;;
  --packages) packages+=("${packing[@]}") ;;
  --lint) packages+=("${packing[@]}" lintian debootstrap) ;;
  --systems) packages=("${systems[@]}") ;;
  *) echo "install-packages.sh: what is $1?" >&2; exit 64 ;;
esac

missing=()
for package in "${packages[@]}"; do
  dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
done
if [ "${#missing[@]}" -eq 0 ]; then
  echo "packages: all ${#packages[@]} are installed"
  exit 0
fi
if [ "$(id -u)" -ne 0 ]; then
  echo "packages missing; run as root: apt-get install ${missing[*]}" >&2
  exit 1
fi
echo "packages: installing ${#missing[@]}: ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
apt-get update -q
apt-get install -q -y --no-install-recommends "${missing[@]}"
