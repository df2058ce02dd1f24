#!/usr/bin/env bash
# Runs compare.py in the environment of make-venv.sh (which it makes if need be), in a network of
# its own with nothing but loopback: Mooncake listens on all addresses and asks nobody for a
# password. Arguments are compare.py's; TCP_CONGESTION_CONTROL=cubic chooses that for this network.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
venv=${PEERS_VENV:-$here/../../../build/peers-venv}
[ -x "$venv/bin/python" ] || "$here/make-venv.sh" "$venv" >&2

namespace=(unshare --net)
[ "$(id -u)" -eq 0 ] || namespace=(unshare --map-root-user --net)
if ! "${namespace[@]}" true 2>/dev/null; then
  echo "run.sh: no network namespace can be made here; Mooncake would listen to everybody" >&2
  exit 1
fi
# shellcheck disable=SC2016  # the inner shell expands it
# exec: a signal to this process reaches compare.py, which ends what it has started.
exec "${namespace[@]}" sh -c 'ip link set lo up || exit 1
  [ -z "${TCP_CONGESTION_CONTROL:-}" ] ||
    echo "$TCP_CONGESTION_CONTROL" >/proc/sys/net/ipv4/tcp_congestion_control || exit 1
  exec "$0" "$@"' \
  "$venv/bin/python" "$here/compare.py" "$@"
