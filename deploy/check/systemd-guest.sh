#!/usr/bin/env bash
# What deploy/test-systemd.sh has its guest do, as root under a systemd that is process 1; /packages holds the
# packages, /opt/kvferry a worker's Python. The last line of success is "guest: OK".
set -euo pipefail
export DEBIAN_FRONTEND=noninteractive
unit=kvferryd.service
say() { echo "guest, $(cut -d. -f1 /proc/uptime) s: $*"; }
fail() {
  say "FAILED: $*"
  systemctl status --no-pager --lines=0 "$unit" || true
  journalctl --no-pager --lines=40 --unit="$unit" || true
  exit 1
}
trap 'fail "line $LINENO: $BASH_COMMAND"' ERR
show() { systemctl show --value --property="$1" "${2:-$unit}"; }
# wait_for WHAT SECONDS COMMAND...: until it succeeds.
wait_for() {
  local what=$1 limit=$((SECONDS + $2))
  shift 2
  until "$@" >/dev/null 2>&1; do
    [ "$SECONDS" -lt "$limit" ] || fail "$what"
    sleep 0.1
  done
}
is_active() { [ "$(show ActiveState)" = active ] && [ "$(show SubState)" = running ]; }
still_the_same() { is_active && [ "$(show MainPID)" = "$main" ]; }
restarted_from() { is_active && [ "$(show MainPID)" != "$1" ]; }

say "installing, under $(systemctl --version | head -n 1)"
apt-get install -q /packages/*.deb >/tmp/install.log 2>&1 || { tail -n 20 /tmp/install.log; fail "apt-get install"; }
systemctl is-enabled --quiet "$unit"
is_active || fail "the installation has not started it"
[ "$(show Result)" = success ]
say "active (running) by sd_notify: $(show StatusText)"
[ "$(show Type)" = notify ]
[ -n "$(show StatusText)" ]
[ "$(show WatchdogUSec)" = 30s ]
old=$(show WatchdogTimestampMonotonic)
# Half of WatchdogSec= at most between two.
pinged() { [ "$(show WatchdogTimestampMonotonic)" -gt "$old" ]; }
wait_for "no ping of the watchdog" 20 pinged
curl -sf localhost:9464/readyz >/dev/null

main=$(show MainPID)
rails=$(pgrep -P "$main" kvferry-rails)
[ "$(stat -c %U:%G:%a /run/kvferry)" = kvferry:kvferry:750 ]
[ "$(stat -c %U:%G:%a /run/kvferry/kvferry.sock)" = kvferry:kvferry:660 ]
# The package's user stands; sysusers.d, which counts without packages, asks for the same one.
[ -z "$(systemd-sysusers --dry-run /usr/lib/sysusers.d/kvferry.conf 2>&1)" ] || fail "sysusers wants another user"

say "confined: $(systemd-analyze security --no-pager "$unit" | tail -n 1 | grep -o 'exposure.*: [0-9.]*')"
systemd-analyze security --no-pager --threshold=30 "$unit" >/dev/null
field() { sed -n "s/^$2:[[:space:]]*//p" "/proc/$1/status"; }
for pid in $main $rails; do
  [ "$(field "$pid" Uid | cut -f 1)" = "$(id -u kvferry)" ]
  [ "$(field "$pid" CapEff)" = 0000000000000000 ]
  [ "$(field "$pid" CapBnd)" = 0000000000000000 ]
  [ "$(field "$pid" NoNewPrivs)" = 1 ]
  [ "$(field "$pid" Seccomp)" = 2 ]
done
# kvferry-rails puts its own filter upon the unit's.
[ "$(field "$rails" Seccomp_filters)" -gt "$(field "$main" Seccomp_filters)" ]
# In a container of a machine without that capability limits cannot be raised.
sys_resource=$((1 << 24))
[ $((0x$(field 1 CapEff) & sys_resource)) -eq 0 ] || grep -q '^Max locked memory *unlimited' "/proc/$main/limits"
grep -q '^Max core file size *0 *0 ' "/proc/$main/limits"
# Even root finds these closed in the daemon's view of the files and devices.
inside() { nsenter --target "$main" --mount -- "$@"; }
for path in /etc /usr /var /boot /sys/fs/cgroup /proc/sys/vm; do
  if inside touch "$path/kvferry-test" 2>/dev/null; then fail "$path may be written"; fi
done
inside touch /run/kvferry/test
rm /run/kvferry/test
for file in /root/test /tmp/test; do
  touch "$file"
  if inside test -e "$file"; then fail "$file is seen"; fi
done
# Root of another control group may read a disk, where there is one; in the unit's it may not.
in_group() { bash -c 'echo $$ >"/sys/fs/cgroup$0/cgroup.procs" && exec "$@"' "$(show ControlGroup)" "$@"; }
in_group head -c 1 /dev/null
if [ -b /dev/vda ]; then
  head -c 1 /dev/vda >/dev/null
  if in_group head -c 1 /dev/vda >/dev/null 2>&1; then fail "devices are open"; fi
fi

say "good and bad reloads"
drop=/etc/kvferry/conf.d/10-test.toml
write_drop() { printf "$@" >"$drop"; chmod 644 "$drop"; }
write_drop '[node]\nid = "node-a"\n[peer]\nlisten = "127.0.0.1:7400"\n[[peers]]\nidentity = "node-b"\naddresses = ["127.0.0.1:7401"]\n[drain]\nlimit = "4s"\n'
systemctl reload "$unit"
still_the_same
kvferryctl config | grep -E '^drain\.limit +"?4s' >/dev/null
cp "$drop" /tmp/good.toml
echo 'lease = "7s' >>"$drop"
if systemctl reload "$unit" 2>/dev/null; then fail "a reload of a bad configuration succeeds"; fi
still_the_same
journalctl --no-pager --unit="$unit" | grep '10-test.toml:' >/dev/null || fail "the journal does not tell what is wrong"
curl -s localhost:9464/metrics | grep '^kvferry_config_last_reload_successful 0' >/dev/null
cp /tmp/good.toml "$drop"
systemctl reload "$unit"

say "a restart keeps the folder"
folder=$(stat -c %i /run/kvferry)
systemctl restart "$unit"
restarted_from "$main"
[ "$(stat -c %i /run/kvferry)" = "$folder" ]

say "kvferryctl doctor: $(runuser -u kvferry -- kvferryctl doctor | grep -c '^PROBLEM' || true) problems"
say "a hand-off between two daemons of kvferry-bench"
runuser -u kvferry -- kvferry-bench model --model llama-3-8b --tokens 256 --pair tp1:tp2 --rounds 1 --path tcp | grep 'verified'
if [ -x /opt/kvferry/bin/python ]; then
  say "a hand-off from the unit's daemon to a second one"
  useradd --groups kvferry worker
  mkdir /etc/kvferry-b
  cat >/etc/kvferry-b/kvferry.toml <<'END'
config_version = 1
[node]
id = "node-b"
[[socket]]
path = "/run/kvferry-b/kvferry.sock"
[admin]
socket = "/run/kvferry-b/admin.sock"
[mapped]
socket = "/run/kvferry-b/arenas.sock"
[http]
port = 9465
[peer]
listen = "127.0.0.1:7401"
[[peers]]
identity = "node-a"
addresses = ["127.0.0.1:7400"]
END
  # The unit itself under another name, with another configuration.
  sed -e 's|/etc/kvferry/|/etc/kvferry-b/|; s|^RuntimeDirectory=kvferry$|RuntimeDirectory=kvferry-b|' \
    -e '/^User=/i Environment=KVFERRY_ADMIN_SOCKET=/run/kvferry-b/admin.sock' \
    "/lib/systemd/system/$unit" >/run/systemd/system/kvferryd-b.service
  systemctl daemon-reload
  systemctl start kvferryd-b
  systemctl reload kvferryd-b
  worker() { runuser -u worker -- /opt/kvferry/bin/python /opt/kvferry/systemd_worker.py "$@"; }
  worker move /run/kvferry/kvferry.sock /run/kvferry-b/kvferry.sock
  curl -s localhost:9464/metrics | grep '^kvferry_transfers_ended_total{role="send",outcome="done"} 1$'

  say "a stop lets what runs go on for drain.limit"
  worker hold /run/kvferry/kvferry.sock >/tmp/held 2>&1 &
  wait_for "no transfer is held" 60 grep -q held /tmp/held
  systemctl stop --no-block "$unit"
  draining() { [ "$(show ActiveState)" = deactivating ] && show StatusText | grep -q drain; }
  began=$(date +%s%N)
  wait_for "it does not tell that it drains" 10 draining
  say "it says: $(show StatusText)"
  stopped() { [ "$(show ActiveState)" = inactive ]; }
  wait_for "it does not stop" 60 stopped
  took=$((($(date +%s%N) - began) / 1000000))
  [ "$took" -ge 3000 ] || fail "it stopped after $took ms, with a transfer open and drain.limit of 4 s"
  [ "$(show Result)" = success ]
  [ "$(show ExecMainStatus)" = 0 ]
  say "stopped after $took ms; the worker heard: $(tail -n 1 /tmp/held | cut -c 1-200)"
  [ ! -e /run/kvferry ] || fail "a stop keeps the folder"
  systemctl start "$unit"
fi
say "without transfers a stop is at once"
began=$(date +%s%N)
systemctl stop "$unit"
took=$((($(date +%s%N) - began) / 1000000))
[ "$took" -lt 3000 ] || fail "a stop took $took ms"
systemctl start "$unit"

say "killed, it is started again; kvferry-rails alone, too"
main=$(show MainPID)
rails=$(pgrep -P "$main" kvferry-rails)
kill -KILL "$rails"
new_rails() { pgrep -P "$main" kvferry-rails | grep -vx "$rails"; }
wait_for "no new kvferry-rails" 30 new_rails
still_the_same
kill -KILL "$main"
wait_for "it is not started again" 60 restarted_from "$main"
[ "$(show NRestarts)" = 1 ]
[ "$(pgrep -c kvferry-rails)" -le "$(pgrep -c -x kvferryd)" ] || fail "an old kvferry-rails is left"

say "one that stands still is ended by the watchdog"
mkdir -p "/run/systemd/system/$unit.d"
printf '[Service]\nWatchdogSec=3s\nTimeoutAbortSec=3s\n' >"/run/systemd/system/$unit.d/watchdog.conf"
systemctl daemon-reload
systemctl restart "$unit"
main=$(show MainPID)
kill -STOP "$main"
wait_for "the watchdog does not bite" 60 restarted_from "$main"
journalctl --no-pager --unit="$unit" | grep 'Watchdog timeout' >/dev/null
rm -r "/run/systemd/system/$unit.d"
systemctl daemon-reload
systemctl restart "$unit"

say "an upgrade restarts it, a purge ends it"
main=$(show MainPID)
dpkg -i /packages/kvferryd_*.deb >/tmp/install.log 2>&1
wait_for "not restarted by an upgrade" 60 restarted_from "$main"
tail -n 4 "$drop" | grep -q 'limit = "4s"'
systemctl stop kvferryd-b 2>/dev/null || true
apt-get purge -q kvferryd >/tmp/install.log 2>&1
if pgrep -x kvferryd; then fail "a daemon is left after the purge"; fi
[ ! -e /run/kvferry ]
trap - ERR
echo "guest: OK"
