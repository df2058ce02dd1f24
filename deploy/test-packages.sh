#!/usr/bin/env bash
# Installs the packages of make-packages.sh in a clean Debian 12 (debootstrap) as the image does it, and runs them
# there as the image's user: the daemon serves, kvferry-bench verifies a hand-off, an engine's project is built
# with libkvferry-dev; then they are purged. Needs root and Debian's archive; some minutes.
#   deploy/test-packages.sh [PACKAGES]    default: build/packages
set -euo pipefail
cd "$(dirname "$0")/.."
. deploy/lib.sh

packages=${1:-build/packages}
logs=build/package-logs
[ "$(id -u)" -eq 0 ] || { echo "test-packages.sh needs root, for debootstrap" >&2; exit 1; }
command -v debootstrap >/dev/null || { echo "no debootstrap: deploy/install-packages.sh --lint" >&2; exit 1; }
for package in kvferryd kvferry-tools libkvferry0 libkvferry-dev; do
  compgen -G "$packages/${package}_*.deb" >/dev/null || { echo "no $package in $packages" >&2; exit 1; }
done

root=$(mktemp -d)
trap 'rm -rf --one-file-system "$root"' EXIT
# mktemp's own mode would keep the image's user out of its root.
chmod 755 "$root"
# Debian as this machine reaches it.
mirror=$(sed -n 's/^URIs: *//p' /etc/apt/sources.list.d/debian.sources 2>/dev/null | head -n 1)
step "a clean Debian 12" "$logs/debootstrap.log" \
  debootstrap --variant=minbase --include=ca-certificates bookworm "$root" "${mirror:-http://deb.debian.org/debian}"
for file in /etc/apt/apt.conf.d/*proxy* /etc/apt/apt.conf.d/99* /etc/resolv.conf /etc/hosts; do
  [ ! -f "$file" ] || cp -L "$file" "$root$file"
done
cp -L /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/ca-certificates.crt"
mkdir -p "$root/packages" "$root/consumer"
cp "$packages"/*.deb "$root/packages/"
cp deploy/container/install.sh "$root/"
cp deploy/check/consumer/* "$root/consumer/"

cat >"$root/as-user.sh" <<'END'
set -eu
# As in a container: the image's command, with what a pod would set.
kvferryd --config /etc/kvferry/kvferry.toml --check-config
kvferryd --config /etc/kvferry/kvferry.toml &
daemon=$!
for _ in $(seq 300); do
  kvferryctl health >/dev/null 2>&1 && break
  kill -0 "$daemon"
  sleep 0.1
done
kvferryctl health
kvferryctl status
kvferryctl rails | grep -q tcp
kvferry-bench model --model llama-3-8b --tokens 512 --pair tp1:tp2 --rounds 1 --path tcp
kill "$daemon"
wait "$daemon"
END
cat >"$root/test.sh" <<'END'
set -eux
export DEBIAN_FRONTEND=noninteractive PATH=/usr/sbin:/usr/bin:/sbin:/bin
sh /install.sh /packages
echo "image: $(du -sxm --exclude=packages --exclude=consumer / | cut -f 1) MiB"
[ "$(stat -c %U:%G /run/kvferry)" = kvferry:kvferry ]
test -L /etc/systemd/system/multi-user.target.wants/kvferryd.service
chroot --userspec=10464:10464 / sh /as-user.sh
# Without the image's steps: the package makes its user, and a changed configuration survives an upgrade.
apt-get purge -q -y kvferryd
test ! -e /etc/kvferry/kvferry.toml
test ! -e /etc/systemd/system/multi-user.target.wants/kvferryd.service
userdel kvferry
apt-get update -q
apt-get install -q -y --no-install-recommends /packages/kvferryd_*.deb
getent passwd kvferry | grep -q nologin
[ "$(id -u kvferry)" -lt 1000 ]
echo '# changed' >>/etc/kvferry/kvferry.toml
printf '[engine]\nlease = "7s"\n' >/etc/kvferry/conf.d/10-own.toml
dpkg -i --force-confold /packages/kvferryd_*.deb
tail -n 1 /etc/kvferry/kvferry.toml | grep -q changed
kvferryd --config /etc/kvferry/kvferry.toml --print-config | grep -q '^lease = "7s"  # file /etc/kvferry/conf.d/10-own.toml:2'
dpkg -S /etc/kvferry/conf.d
rm /etc/kvferry/conf.d/10-own.toml
# The library: an engine's machine, and one that builds an engine.
apt-get install -q -y --no-install-recommends /packages/libkvferry0_*.deb
ldconfig -p | grep -q libkvferry.so.0
apt-get install -q -y --no-install-recommends /packages/libkvferry-dev_*.deb g++ cmake make pkg-config
cmake -S /consumer -B /consumer/build
cmake --build /consumer/build
/consumer/build/consumer | grep -q UNAVAILABLE
g++ -std=c++20 /consumer/main.cc -o /consumer/by-pkg-config $(pkg-config --cflags --libs kvferry)
/consumer/by-pkg-config | grep -q UNAVAILABLE
apt-get purge -q -y kvferryd kvferry-tools libkvferry-dev libkvferry0
[ -z "$(find /usr /etc /lib -name '*kvferry*' -not -path '*/systemd/deb-systemd*')" ]
END
step "installed, run, purged (a few minutes)" "$logs/packages-test.log" \
  unshare --mount --pid --fork --kill-child bash -c '
    set -e
    mount -t proc proc "$1/proc" 2>/dev/null || mount --rbind /proc "$1/proc"
    mount --rbind /dev "$1/dev"
    # UCX looks for network devices there.
    mount --rbind /sys "$1/sys"
    exec chroot "$1" /bin/sh /test.sh' bash "$root"
grep -E '^image: |verified ' "$logs/packages-test.log"
echo "kvferry package test: OK"
