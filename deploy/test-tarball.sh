#!/usr/bin/env bash
# Proves that a tarball of make-tarball.sh needs nothing of ours: runs it in a root directory that
# holds glibc, a shell with the few tools that its scripts call, /proc, /dev, /sys and /tmp.
#   deploy/test-tarball.sh TARBALL
# Needs root, or user namespaces for everybody (unshare --map-root-user); no network, no GPU. Where
# there is a GPU it is not seen: its driver is not in that root.
set -euo pipefail
cd "$(dirname "$0")/.."
. deploy/tarball-lib.sh
tarball=${1:?deploy/test-tarball.sh TARBALL}
tools=(bash sh env awk cat date dirname grep mkdir readlink rm sed sleep sort tail tee uname)

namespaces=(--mount --pid --fork --kill-child)
[ "$(id -u)" -eq 0 ] || namespaces+=(--map-root-user)
if ! unshare "${namespaces[@]}" true 2>/dev/null; then
  echo "test-tarball.sh needs root or user namespaces: unshare ${namespaces[*]} is refused" >&2
  exit 1
fi

root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
mkdir -p "$root"/{bin,usr,opt,proc,dev,sys,tmp,etc}
ln -s ../bin "$root/usr/bin"
tar -C "$root/opt" -xzf "$tarball"
tree=$(cd "$root/opt" && echo *)

echo "== what each file needs"
check_tree "$root/opt/$tree" "$PWD"

# Libraries go where they are on this machine: that is where its loader looks.
carry() {
  mkdir -p "$root$(dirname "$1")"
  cp -L "$1" "$root$1"
}
for tool in "${tools[@]}"; do cp -L "$(command -v "$tool")" "$root/bin/$tool"; done
while read -r path; do
  soname=${path##*/}
  if ! is_listed "$soname" "${system_libraries[@]}" && [ -n "$(find "$root/opt" -name "$soname")" ]; then
    echo "a tool of this machine needs $soname, which the tarball carries: nothing would be proved" >&2
    exit 1
  fi
  carry "$path"
done < <(ldd "${tools[@]/#/$root/bin/}" | grep -o '/[^ ]*' | grep '\.so' | sort -u)
# The rest of glibc, as the loader of this machine knows it.
for soname in "${system_libraries[@]}"; do
  path=$(ldconfig -p 2>/dev/null | awk -v name="$soname" '$1 == name && /x86-64/ { print $NF; exit }' || true)
  [ -z "$path" ] || [ -e "$root$path" ] || carry "$path"
done

cp client/ctl/examples/{prefill,decode}.json "$root/tmp/"
cat >"$root/test.sh" <<'END'
set -eu
cd /
here=/opt/$1
step() { printf '== %s\n' "$*"; }

step "the daemon starts"
"$here/bin/kvferryd" --version
step "a plan"
"$here/bin/kvferryctl" plan --sender /tmp/prefill.json --receiver /tmp/decode.json | tail -n 3

step "UCX is the tarball's, with its modules"
"$here/bin/kvferry-bench" model --model llama-3-8b --tokens 1024 --path tcp >/tmp/bench 2>&1 &
bench=$! modules=
while kill -0 "$bench" 2>/dev/null && [ -z "$modules" ]; do
  sleep 0.2
  modules=$(cat /proc/[0-9]*/maps 2>/dev/null | grep -o '/[^ ]*libuct_.*' | sort -u || true)
done
wait "$bench" || { cat /tmp/bench; exit 1; }
case $modules in
  "$here"/lib/ucx/libuct_*) echo "$modules" ;;
  *) echo "no module of UCX was loaded: $modules"; exit 1 ;;
esac

step "quickstart"
"$here/quickstart.sh" 1024 2>/dev/null
step "the GPU tests skip without a GPU"
status=0
"$here/bin/gpu_ring_test" || status=$?
[ "$status" -eq 77 ] || { echo "exit status $status, not 77"; exit 1; }

step "gpu-run.sh fails without a GPU, after all its steps"
status=0
"$here/gpu-run.sh" --quick --results /tmp/results >/tmp/gpu-run 2>&1 || status=$?
tail -n 4 /tmp/gpu-run
[ "$status" -eq 1 ] || { cat /tmp/gpu-run; echo "exit status $status, not 1"; exit 1; }
grep -q '^passed  doctor' /tmp/results/summary.txt
grep -q '^FAILED  fragments-65536-local' /tmp/results/summary.txt
END

unshare "${namespaces[@]}" bash -c '
  set -e
  mount --rbind /dev "$1/dev"
  mount --rbind /sys "$1/sys"
  # Not allowed in some containers: then theirs, which shows more processes and is as good.
  mount -t proc proc "$1/proc" 2>/dev/null || mount --rbind /proc "$1/proc"
  exec chroot "$1" /bin/env -i PATH=/bin HOME=/ /bin/bash /test.sh "$2"' bash "$root" "$tree"
echo "kvferry tarball test: OK"
