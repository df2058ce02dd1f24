#!/usr/bin/env bash
# Builds the image by its Containerfile and runs it as deploy/kubernetes does: two daemons as of two nodes of the
# DaemonSet and a hand-off between them, one as the sidecar's; read-only, without capabilities, with the manifests'
# configuration. No registry is asked: debian:12 and debian:12-slim are what debootstrap makes. Needs root,
# podman and Debian's archive; builds as long as make-packages.sh. Exits 77 where it cannot run.
#   deploy/test-image.sh
set -euo pipefail
cd "$(dirname "$0")/.."
. deploy/lib.sh
. deploy/debian-lib.sh

logs=build/image-logs
skip() {
  echo "SKIPPED: $*"
  exit 77
}
[ "$(id -u)" -eq 0 ] || skip "needs root, for debootstrap"
for program in debootstrap podman; do
  command -v "$program" >/dev/null || skip "no $program: deploy/install-packages.sh --systems"
done
# crun takes either version of control groups, not both beside each other.
if mountpoint -q /sys/fs/cgroup/unified; then
  exec unshare --mount sh -c 'umount /sys/fs/cgroup/unified && exec deploy/test-image.sh'
fi

work=$(mktemp -d -p "${TMPDIR:-/var/tmp}" kvferry-image.XXXXXX)
chmod 755 "$work"
# Nothing of ours is left in the machine's own storage.
podman=(podman --root "$work/storage" --runroot "$work/runroot" --storage-driver vfs --cgroup-manager cgroupfs)
# podman build leaves folders where it works.
mkdir "$work/tmp"
export TMPDIR=$work/tmp
cleanup() {
  end_step
  "${podman[@]}" rm --all --force --time 0 >/dev/null 2>&1 || true
  "${podman[@]}" unmount --all >/dev/null 2>&1 || true
  rm -rf --one-file-system "$work"
}
trap cleanup EXIT

make_bases() {
  clean_debian "$work/debian"
  tar -C "$work/debian" --numeric-owner -cf "$work/debian.tar" .
  for name in debian:12 debian:12-slim; do
    "${podman[@]}" import "$work/debian.tar" "docker.io/library/$name"
  done
}
# Compiled through ccache where this machine has it, so that the next time is shorter.
build_image() {
  local options=() cache
  if command -v ccache >/dev/null; then
    in_root "$work/debian" sh -c 'apt-get update -q && apt-get install -q ccache'
    tar -C "$work/debian" --numeric-owner -c . |
      "${podman[@]}" import --change "ENV CCACHE_DIR=/ccache" - localhost/builder
    cache=$(ccache --get-config cache_dir)
    mkdir -p "$cache"
    options=(--build-arg BUILDER=localhost/builder --volume "$cache:/ccache")
  fi
  "${podman[@]}" build --isolation chroot --pull=never "${options[@]}" \
    -f deploy/container/Containerfile -t kvferry:0.1.0 .
}
step "debian:12 by debootstrap" "$logs/debian.log" make_bases
step "the image (as long as a release build)" "$logs/build.log" build_image
rm -rf --one-file-system "$work/debian" "$work/debian.tar"
image() { "${podman[@]}" image inspect --format "$1" kvferry:0.1.0; }
echo "image: $(($(image '{{.Size}}') / 1048576)) MiB"
[ "$(image '{{.Config.User}}')" = 10464:10464 ]
[ "$(image '{{.Config.StopSignal}}')" = 15 ] || [ "$(image '{{.Config.StopSignal}}')" = SIGTERM ]

# As the containers of the manifests: their security context, their mounts, the host's network for the pod's. Limits
# that root without CAP_SYS_RESOURCE may set.
run() {
  "${podman[@]}" run --pull=never --network host --read-only --read-only-tmpfs=false --cap-drop all \
    --security-opt no-new-privileges --ulimit nofile=16384:16384 --ulimit nproc=16384:16384 "$@"
}
config=$work/kvferry.toml
sed -e 's|spiffe://example.org/kvferry/|spiffe://kvferry.test/|; s|10.244.0.0/16|127.0.0.0/8|' \
  deploy/kubernetes/base/kvferry.toml >"$config"
deploy/make-test-certs.sh "$work/certs" prefill decode >"$logs/certs.log" 2>&1
# secrets: root's, with the fsGroup.
for node in prefill decode; do
  mkdir "$work/tls-$node"
  install -g 10464 -m 0440 "$work/certs/$node.pem" "$work/tls-$node/tls.crt"
  install -g 10464 -m 0440 "$work/certs/$node.key" "$work/tls-$node/tls.key"
  install -g 10464 -m 0440 "$work/certs/ca.pem" "$work/tls-$node/ca.crt"
done
# daemon NAME NODE ADDRESS FOLDER INSIDE OPTIONS...: as in a pod of that address, with FOLDER mounted as INSIDE. What
# the environment overrides is what a pod has and this machine has not: eth0, and all of an address's ports.
daemon() {
  local name=$1 node=$2 address=$3 folder=$4 inside=$5
  shift 5
  # No environment has [[socket]].
  { cat "$config" && printf '[[socket]]\npath = "%s/kvferry.sock"\n' "$inside"; } >"$work/$name.toml"
  run --detach --name "$name" "$@" -e KVFERRY_PEER_ADVERTISE="$address:7400" -e KVFERRY_HTTP_ADDRESS="$address" \
    -e KVFERRY_PEER_LISTEN="$address:7400" -e KVFERRY_RAILS_DEVICES=lo -e KVFERRY_ARENA_BYTES=256MiB \
    -e KVFERRY_ADMIN_SOCKET="$inside/admin.sock" -e KVFERRY_MAPPED_SOCKET="$inside/arenas.sock" \
    --volume "$folder:$inside" --volume "$work/$name.toml:/etc/kvferry/kvferry.toml:ro" \
    --volume "$work/tls-$node:/etc/kvferry/tls:ro" kvferry:0.1.0 --config /etc/kvferry/kvferry.toml
}
# The startup probe of the manifests.
ready() {
  local name=$1 address=$2
  for _ in $(seq 120); do
    ! curl -sf "http://$address:9464/readyz" >/dev/null || return 0
    [ "$("${podman[@]}" inspect --format '{{.State.Running}}' "$name")" = true ] || break
    sleep 1
  done
  "${podman[@]}" logs "$name"
  echo "$name is not ready" >&2
  return 1
}
# stopped NAME: by SIGTERM, with status 0.
stopped() {
  "${podman[@]}" stop --time 45 "$1"
  [ "$("${podman[@]}" inspect --format '{{.State.ExitCode}}' "$1")" = 0 ]
}

daemonset() {
  # The init container, and the kubelet's subPath.
  mkdir -p "$work"/host-run-{prefill,decode}
  # Twice, as of a node that had a daemon before.
  for node in prefill prefill decode; do
    run --rm --user 0 --cap-add CHOWN --cap-add FOWNER --volume "$work/host-run-$node:/host-run" \
      --entrypoint install kvferry:0.1.0 -d -m 0750 -o 10464 -g 10464 /host-run/kvferry
  done
  daemon prefill prefill 127.0.0.2 "$work/host-run-prefill/kvferry" /run/kvferry --pid host
  daemon decode decode 127.0.0.3 "$work/host-run-decode/kvferry" /run/decode --pid host
  ready prefill 127.0.0.2
  ready decode 127.0.0.3
  "${podman[@]}" exec prefill kvferryctl health
  "${podman[@]}" exec prefill kvferryctl doctor || true
  # A worker's pod, which sees both nodes' folders here: each where its daemon has it, as daemons name their sockets.
  run --rm --pid host --user 1000:1000 --group-add 10464 --volume "$work/host-run-prefill/kvferry:/run/kvferry:ro" \
    --volume "$work/host-run-decode/kvferry:/run/decode:ro" --entrypoint kvferry-bench kvferry:0.1.0 \
    model --model llama-3-8b --tokens 512 --pair tp1:tp2 --rounds 1 \
    --sender-socket /run/kvferry/kvferry.sock --receiver-socket /run/decode/kvferry.sock
  "${podman[@]}" exec prefill kvferryctl peers
  curl -sf http://127.0.0.2:9464/metrics | grep '^kvferry_transfers_ended_total{role="send",outcome="done"} [1-9]'
  stopped decode
  stopped prefill
}
sidecar() {
  # An emptyDir under an fsGroup.
  mkdir "$work/empty"
  chgrp 10464 "$work/empty"
  chmod 2777 "$work/empty"
  daemon sidecar prefill 127.0.0.2 "$work/empty" /run/kvferry
  ready sidecar 127.0.0.2
  # Process 1 of its namespace, which the worker shares.
  [ "$("${podman[@]}" exec sidecar cat /proc/1/comm)" = kvferryd ]
  run --rm --pid container:sidecar --user 1000:1000 --group-add 10464 --volume "$work/empty:/run/kvferry:ro" \
    --entrypoint kvferry-bench kvferry:0.1.0 model --model llama-3-8b --tokens 512 --pair tp1:tp2 --rounds 1 \
    --sender-socket /run/kvferry/kvferry.sock --receiver-socket /run/kvferry/kvferry.sock
  stopped sidecar
}
step "two daemons as of the DaemonSet" "$logs/daemonset.log" daemonset
step "one as of the sidecar" "$logs/sidecar.log" sidecar
grep -h 'verified ' "$logs/daemonset.log" "$logs/sidecar.log"
# What the image's own configuration gives, without a manifest.
step "as podman run kvferry" "$logs/run.log" run --rm kvferry:0.1.0 --config /etc/kvferry/kvferry.toml --check-config
echo "kvferry image test: OK"
