#!/usr/bin/env bash
# What deploy ships beside the programs, tested: unit, manual, completions, install rules, manifests, rules and
# dashboard with a Prometheus of its own, scripts. Needs no root and no systemd as process 1.
#   deploy/test-deploy.sh [BUILD]    a build directory with the programs (default: build/dev)
# Packages in a clean Debian are deploy/test-packages.sh, a command of its own.
set -euo pipefail
cd "$(dirname "$0")/.."
. deploy/lib.sh

build=${1:-build/dev}
logs=build/tests
venv=build/deploy-venv
stage=$(mktemp -d)
trap 'end_step; rm -rf "$stage"' EXIT

if ! cmp -s deploy/check/requirements.txt "$venv/installed"; then
  step "Python packages of the checks" "$logs/deploy-venv.log" \
    sh -c "python3 -m venv '$venv' && '$venv/bin/pip' install --quiet -r deploy/check/requirements.txt"
  cp deploy/check/requirements.txt "$venv/installed"
fi

echo "== scripts and YAML"
find deploy tests .ci -name '*.sh' -print0 | xargs -0 shellcheck --severity=warning --shell=bash
shellcheck --severity=warning .ci/run deploy/debian/kvferryd/{postinst,prerm,postrm} deploy/completion/*.bash
yamllint --strict -c deploy/check/yamllint.yaml deploy/prometheus deploy/kubernetes
for file in deploy/completion/_*; do zsh -n "$file"; done

echo "== the installed tree"
prefix=$stage/usr
step "installing" "$logs/deploy-install.log" cmake --install "$build" --prefix "$prefix" --strip
for file in bin/kvferryd libexec/kvferry/kvferry-rails bin/kvferryctl bin/kvferry-bench etc/kvferry/kvferry.toml \
  lib/systemd/system/kvferryd.service lib/sysusers.d/kvferry.conf include/kvferry/client.h \
  share/man/man8/kvferryd.8 share/man/man5/kvferry.toml.5 share/man/man1/kvferryctl.1 \
  etc/kvferry/conf.d/README share/doc/kvferryd/examples/tcp.toml share/bash-completion/completions/kvferryctl \
  share/zsh/vendor-completions/_kvferryctl; do
  [ -s "$prefix/$file" ] || { echo "not installed: $file" >&2; exit 1; }
done
# The daemon finds its rails process where it is installed, and takes the installed configuration.
"$prefix/bin/kvferryd" --config "$prefix/etc/kvferry/kvferry.toml" --check-config
printf '[engine]\nlease = "7s"\n' >"$prefix/etc/kvferry/conf.d/10-test.toml"
"$prefix/bin/kvferryd" --config "$prefix/etc/kvferry/kvferry.toml" --print-config |
  grep '^lease = "7s"  # file .*/conf.d/10-test.toml:2$' >/dev/null
rm "$prefix/etc/kvferry/conf.d/10-test.toml"
lib=$(dirname "$(find "$prefix" -name libkvferry.so.0)")
step "a project that finds it by CMake" "$logs/deploy-consumer.log" \
  sh -c "cmake -S deploy/check/consumer -B '$stage/consumer' -DCMAKE_PREFIX_PATH='$prefix' &&
    cmake --build '$stage/consumer'"
"$stage/consumer/consumer" | grep UNAVAILABLE >/dev/null
# And one by pkg-config, after the tree has been moved: nothing in it is absolute.
mv "$prefix" "$stage/moved"
lib=${lib/"$prefix"/"$stage/moved"}
read -ra flags < <(PKG_CONFIG_PATH=$lib/pkgconfig pkg-config --cflags --libs kvferry)
g++ -std=c++20 deploy/check/consumer/main.cc -o "$stage/by-pkg-config" "${flags[@]}"
LD_LIBRARY_PATH=$lib "$stage/by-pkg-config" | grep UNAVAILABLE >/dev/null
mv "$stage/moved" "$prefix"

echo "== the unit"
unit=$stage/kvferryd.service
sed "s|@KVFERRY_BIN_DIR@|$prefix/bin|; s|@KVFERRY_CONFIG_DIR@|$prefix/etc/kvferry|" \
  deploy/systemd/kvferryd.service.in >"$unit"
# Pages are looked for as installed ones.
MANPATH=$prefix/share/man systemd-analyze verify --man=yes "$unit"
# 3.0 and above is what systemd calls medium. What is left is memory of workers and GPUs.
systemd-analyze security --offline=true --threshold=30 --no-pager "$unit" | tail -n 1
mkdir -p "$stage/root/etc"
systemd-sysusers --root="$stage/root" - <deploy/systemd/kvferry.sysusers
grep -q '^kvferry:' "$stage/root/etc/passwd"
grep -q '^kvferry:' "$stage/root/etc/group"
deploy/check/notify.py "$build/bin" "$unit"
deploy/check/system-calls.sh "$build/bin" "$unit"

echo "== what could not be written is no success"
for command in 'kvferryd --print-default-config' 'kvferryd --print-config' 'kvferryd --check-config' \
  'kvferryd --version' 'kvferryd --help' 'kvferryctl --version' 'kvferryctl --help' 'kvferryctl plan --help'; do
  read -ra words <<<"$command"
  status=0
  "$build/bin/${words[0]}" "${words[@]:1}" >/dev/full 2>"$stage/told" || status=$?
  [ "$status" -eq 74 ] && grep -q 'standard output could not be written' "$stage/told" ||
    { echo "$command >/dev/full: status $status, not 74" >&2; exit 1; }
done

echo "== manual and completions"
mandoc -Tlint -W warning deploy/man/*.[158]
deploy/check/command_line.py "$build/bin"

echo "== Kubernetes and the image"
if kubectl kustomize --help >/dev/null 2>&1; then
  "$venv/bin/python" deploy/check/kubernetes.py "$build/bin"
else
  echo "SKIPPED: no kubectl, so the manifests are only linted"
fi
"$venv/bin/hadolint" --config deploy/check/hadolint.yaml deploy/container/Containerfile

echo "== rails' ports"
# Loaded twice in a network of its own: it replaces itself. nft is in sbin.
if PATH=$PATH:/usr/sbin unshare --map-root-user --net nft list tables >/dev/null 2>&1; then
  PATH=$PATH:/usr/sbin unshare --map-root-user --net sh -ec '
    nft -f deploy/nftables/kvferry.nft
    nft -f deploy/nftables/kvferry.nft
    [ "$(nft list chain inet kvferry input | grep -c drop)" -eq 3 ]'
else
  echo "SKIPPED: no network namespace with nftables here"
fi
range=$(sed -n 's/^port_range = "\(.*\)"/\1/p' deploy/kubernetes/base/kvferry.toml)
grep -q "7400, $range }" deploy/nftables/kvferry.nft

echo "== monitoring"
promtool check rules deploy/prometheus/rules.yaml
promtool check config deploy/prometheus/prometheus.yaml
(cd deploy/prometheus && promtool test rules rules-test.yaml)
"$venv/bin/python" deploy/check/monitoring.py "$build/bin" "$stage/dashboard.png"
[ -s "$stage/dashboard.png" ]
echo "kvferry deploy tests: OK"
