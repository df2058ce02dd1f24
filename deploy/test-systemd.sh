#!/usr/bin/env bash
# The unit under a systemd that is process 1: a clean Debian 12 is booted, the packages of make-packages.sh are
# installed in it, and check/systemd-guest.sh does the rest. Needs root (debootstrap), systemd-nspawn, Debian's
# archive and PyPI (KVFERRY_OFFLINE=1: without a worker that holds a transfer). Exits 77 where it cannot run.
#   deploy/test-systemd.sh [--qemu] [PACKAGES]    default: build/packages
#     --qemu: boots Debian's own kernel in an emulated machine, six minutes for one or two; without it, a container.
#       A container shares this machine's kernel and limits, so locked memory and disks are looked at with --qemu alone.
set -euo pipefail
cd "$(dirname "$0")/.."
. deploy/lib.sh
. deploy/debian-lib.sh

skip() {
  echo "SKIPPED: $*"
  exit 77
}
how=nspawn programs=(debootstrap systemd-nspawn)
if [ "${1:-}" = --qemu ]; then
  how=qemu programs=(debootstrap qemu-system-x86_64 mke2fs)
  shift
fi
packages=${1:-build/packages}
logs=build/systemd-logs
[ "$(id -u)" -eq 0 ] || skip "needs root, for debootstrap"
for program in "${programs[@]}"; do
  command -v "$program" >/dev/null || skip "no $program: deploy/install-packages.sh --systems"
done
need_packages "$packages" kvferryd kvferry-tools

work=$(mktemp -d -p "${TMPDIR:-/var/tmp}" kvferry-systemd.XXXXXX)
trap 'end_step; rm -rf --one-file-system "$work"' EXIT
chmod 755 "$work"
root=$work/root

# Without our packages: systemd, a kernel for --qemu, a worker's Python, and what the packages depend on, since the
# guest has no network. Kept in build/ for a week, for packages that depend on the same.
make_guest() {
  local python=with-python depends kept
  [ "${KVFERRY_OFFLINE:-0}" != 1 ] || python=without-python
  depends=$(for package in "$packages"/{kvferryd,kvferry-tools}_*.deb; do
    dpkg-deb --field "$package" Depends
  done | sha256sum | cut -c1-12)
  kept=build/systemd-guest-$python-$depends.tar
  if [ -n "$(find "$kept" -mtime -7 2>/dev/null)" ]; then
    mkdir "$root"
    tar -C "$root" --numeric-owner -xf "$kept"
    return
  fi
  clean_debian "$root"
  mkdir "$root/packages"
  cp "$packages"/{kvferryd,kvferry-tools}_*.deb "$root/packages/"
  in_root "$root" sh -c 'apt-get update -q &&
    apt-get install -q systemd-sysv udev linux-image-cloud-amd64 initramfs-tools zstd procps curl python3-venv &&
    apt-get install -q --download-only /packages/*.deb'
  rm "$root"/packages/*
  [ "${KVFERRY_OFFLINE:-0}" = 1 ] || in_root "$root" sh -c \
    'python3 -m venv /opt/kvferry && /opt/kvferry/bin/pip install --quiet "grpcio>=1.60" "protobuf>=5.29,<7" numpy'
  rm -f build/systemd-guest*.tar
  # It has this machine's pip.conf and the like.
  (umask 077 && tar -C "$root" --numeric-owner -cf "$kept.new" .)
  mv "$kept.new" "$kept"
}

# What is tested, and the unit that does it; what that prints goes to $1.
fill_guest() {
  cp "$packages"/{kvferryd,kvferry-tools}_*.deb "$root/packages/"
  if [ -d "$root/opt/kvferry" ]; then
    deploy/test-python.sh --wheel
    cp build/python/dist/kvferry-*.whl "$root/packages/"
    in_root "$root" sh -c '/opt/kvferry/bin/pip install --quiet --no-deps --no-index /packages/kvferry-*.whl'
    cp deploy/check/systemd_worker.py "$root/opt/kvferry/"
  fi
  cp deploy/check/systemd-guest.sh "$root/"
  echo guest >"$root/etc/hostname"
  cat >"$root/etc/systemd/system/guest-test.service" <<END
[Unit]
Wants=multi-user.target
After=multi-user.target
SuccessAction=poweroff-force
FailureAction=poweroff-force
[Service]
Type=oneshot
ExecStart=/bin/bash /systemd-guest.sh
StandardOutput=$1
StandardError=$1
TTYPath=/dev/ttyS1
TimeoutStartSec=infinity
END
  mkdir -p "$root/etc/systemd/system/multi-user.target.wants"
  ln -s /etc/systemd/system/guest-test.service "$root/etc/systemd/system/multi-user.target.wants/"
}

boot_nspawn() {
  fill_guest file:/guest.log
  with_cgroup2 timeout --foreground 600 systemd-nspawn --quiet --register=no --keep-unit --private-network --boot \
    --console=pipe --directory="$root" </dev/null || true
  cp "$root/guest.log" "$logs/guest.log"
}
boot_qemu() {
  # The second serial port.
  fill_guest tty
  mke2fs -q -t ext4 -d "$root" "$work/disk" 6G
  # Emulated: in a virtual machine there may be a /dev/kvm that does not boot this kernel.
  timeout --foreground 3000 qemu-system-x86_64 -accel tcg,thread=multi -cpu max -smp 2 -m 2048 -nodefaults -no-reboot \
    -display none -serial "file:$logs/console.log" -serial "file:$logs/guest.raw" -nic none \
    -drive "file=$work/disk,format=raw,if=virtio,cache=unsafe" -device virtio-rng-pci \
    -kernel "$root/vmlinuz" -initrd "$root/initrd.img" \
    -append "root=/dev/vda rw console=ttyS0 panic=-1 quiet" </dev/null || true
  tr -d '\r' <"$logs/guest.raw" >"$logs/guest.log"
}
boot() {
  rm -f "$logs"/guest.*
  "boot_$how"
  cat "$logs/guest.log"
  grep -q '^guest: OK' "$logs/guest.log"
}
step "a clean Debian 12 with systemd" "$logs/debian.log" make_guest
step "booted by $how, installed, run" "$logs/boot.log" boot
grep '^guest' "$logs/guest.log"
[ -d "$root/opt/kvferry" ] || echo "SKIPPED: a worker's hand-off by the unit's daemon, whose Python comes from PyPI"
echo "kvferry systemd test: OK"
