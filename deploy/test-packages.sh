#!/usr/bin/env bash
# Installs the packages of make-packages.sh in a clean Debian 12 (debootstrap) as the image does it, and runs them
# there as the image's user: the daemon serves, kvferry-bench verifies a hand-off, an engine's project is built
# with libkvferry-dev; then they are purged. In another clean one what README.md says of trying it is run as it
# stands there. Needs root, Debian's archive and PyPI (KVFERRY_OFFLINE=1: without the README); some minutes.
#   deploy/test-packages.sh [PACKAGES]    default: build/packages
set -euo pipefail
cd "$(dirname "$0")/.."
. deploy/lib.sh
. deploy/debian-lib.sh

packages=${1:-build/packages}
logs=build/package-logs
[ "$(id -u)" -eq 0 ] || { echo "test-packages.sh needs root, for debootstrap" >&2; exit 1; }
command -v debootstrap >/dev/null || { echo "no debootstrap: deploy/install-packages.sh --lint" >&2; exit 1; }
need_packages "$packages" kvferryd kvferry-tools libkvferry0 libkvferry-dev

work=$(mktemp -d -p "${TMPDIR:-/var/tmp}" kvferry-packages.XXXXXX)
trap 'end_step; rm -rf --one-file-system "$work"' EXIT
chmod 755 "$work"
root=$work/root
step "a clean Debian 12" "$logs/debootstrap.log" clean_debian "$root"
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
sh /install.sh /packages
echo "image: $(du -sxm --exclude=packages --exclude=consumer / | cut -f 1) MiB"
[ "$(stat -c %U:%G /run/kvferry)" = kvferry:kvferry ]
test -L /etc/systemd/system/multi-user.target.wants/kvferryd.service
chroot --userspec=10464:10464 / sh /as-user.sh
# Without the image's steps: the package makes its user, and a changed configuration survives an upgrade.
apt-get purge -q kvferryd
test ! -e /etc/kvferry/kvferry.toml
test ! -e /etc/systemd/system/multi-user.target.wants/kvferryd.service
userdel kvferry
apt-get update -q
apt-get install -q /packages/kvferryd_*.deb
getent passwd kvferry | grep -q nologin
[ "$(id -u kvferry)" -lt 1000 ]
echo '# changed' >>/etc/kvferry/kvferry.toml
printf '[engine]\nlease = "7s"\n' >/etc/kvferry/conf.d/10-own.toml
dpkg -i --force-confold /packages/kvferryd_*.deb
tail -n 1 /etc/kvferry/kvferry.toml | grep -q changed
kvferryd --config /etc/kvferry/kvferry.toml --print-config | grep '^lease = "7s"  # file /etc/kvferry/conf.d/10-own.toml:2' >/dev/null
dpkg -S /etc/kvferry/conf.d
rm /etc/kvferry/conf.d/10-own.toml
# The library: an engine's machine, and one that builds an engine.
apt-get install -q /packages/libkvferry0_*.deb
ldconfig -p | grep -q libkvferry.so.0
apt-get install -q /packages/libkvferry-dev_*.deb g++ cmake make pkg-config
cmake -S /consumer -B /consumer/build
cmake --build /consumer/build
/consumer/build/consumer | grep -q UNAVAILABLE
g++ -std=c++20 /consumer/main.cc -o /consumer/by-pkg-config $(pkg-config --cflags --libs kvferry)
/consumer/by-pkg-config | grep -q UNAVAILABLE
apt-get purge -q kvferryd kvferry-tools libkvferry-dev libkvferry0
[ -z "$(find /usr /etc /lib -name '*kvferry*' -not -path '*/systemd/deb-systemd*')" ]
END
step "installed, run, purged (a few minutes)" "$logs/packages-test.log" in_root "$root" /bin/sh /test.sh
grep -E '^image: |verified ' "$logs/packages-test.log"

if [ "${KVFERRY_OFFLINE:-0}" = 1 ]; then
  echo "SKIPPED: what README.md says of trying it, which takes Python packages from PyPI"
else
  root=$work/readme
  step "a clean Debian 12" "$logs/debootstrap.log" clean_debian "$root"
  # This tree as it is checked out, and the packages where the README has them.
  mkdir -p "$root/kvferry/build/packages"
  git ls-files -z -- proto client/python deploy CMakeLists.txt | xargs -0 cp --parents -t "$root/kvferry"
  cp "$packages"/*.deb "$root/kvferry/build/packages/"
  readme_commands deploy/README.md "Trying it on one machine" >"$root/try.sh"
  # What its last command shows, held against what must be there: one daemon sent and the other received.
  cat >>"$root/try.sh" <<'END'
curl -s localhost:9464/metrics | grep '^kvferry_transfers_ended_total{role="send",outcome="done"} 1$'
curl -s localhost:9465/metrics | grep '^kvferry_transfers_ended_total{role="receive",outcome="done"} 1$'
END
  step "as README.md says (a few minutes)" "$logs/readme-test.log" \
    in_root "$root" bash -c 'apt-get update -q && cd /kvferry && timeout 600 bash -eux /try.sh'
  tail -n 1 "$logs/readme-test.log"
fi
echo "kvferry package test: OK"
