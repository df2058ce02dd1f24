# A clean Debian 12 in a folder, for the tests that want one; sourced, not run. Needs root.

# clean_debian ROOT: Debian's smallest system, with the package sources that this machine has. What debootstrap
# made is kept in build/ for a week.
clean_debian() {
  local root=$1 kept=build/clean-debian.tar mirror file
  # mktemp's own mode would keep other users out.
  mkdir -p "$root" build
  chmod 755 "$root"
  if [ -z "$(find "$kept" -mtime -7 2>/dev/null)" ]; then
    mirror=$(sed -n 's/^URIs: *//p' /etc/apt/sources.list.d/debian.sources 2>/dev/null | head -n 1)
    # What it has mounted and started goes with it.
    unshare --mount --pid --fork --kill-child debootstrap --variant=minbase --include=ca-certificates \
      bookworm "$root" "${mirror:-http://deb.debian.org/debian}"
    rm -rf "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/*
    tar -C "$root" --numeric-owner -cf "$kept.new" .
    mv "$kept.new" "$kept"
  else
    tar -C "$root" --numeric-owner -xf "$kept"
  fi
  # Debian and PyPI as this machine reaches them.
  local sources=/etc/apt/sources.list.d/debian.sources
  grep -qs bookworm "$sources" || sources=
  for file in $sources /etc/apt/apt.conf.d/*proxy* /etc/apt/apt.conf.d/99* \
    /etc/pip.conf /etc/resolv.conf /etc/hosts /etc/ssl/certs/ca-certificates.crt; do
    [ ! -f "$file" ] || cp -L "$file" "$root$file"
  done
  [ -z "$sources" ] || rm -f "$root/etc/apt/sources.list"
  echo 'APT::Get::Assume-Yes "true"; APT::Install-Recommends "false";' >"$root/etc/apt/apt.conf.d/90unasked"
}

# in_root ROOT COMMAND...: runs it there as root; it sees neither this machine's processes nor its mounts, and what
# it leaves running ends with it.
in_root() {
  # /sys: UCX looks for network devices there.
  unshare --mount --pid --fork --kill-child bash -c '
    set -e
    root=$1
    shift
    mount -t proc proc "$root/proc" 2>/dev/null || mount --rbind /proc "$root/proc"
    mount --rbind /dev "$root/dev"
    mount --rbind /sys "$root/sys"
    export DEBIAN_FRONTEND=noninteractive PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
    exec chroot "$root" "$@"' in_root "$@"
}

# with_cgroup2 COMMAND...: what runs containers or systemd sees control groups of version 2 alone, also on a machine
# that has those of version 1 beside them.
with_cgroup2() {
  if [ "$(stat -fc %T /sys/fs/cgroup)" = cgroup2fs ]; then
    "$@"
  else
    unshare --mount bash -c 'umount -R /sys/fs/cgroup && mount -t cgroup2 none /sys/fs/cgroup && exec "$@"' \
      with_cgroup2 "$@"
  fi
}

# need_packages FOLDER PACKAGE...: each of them is there, or says which is not.
need_packages() {
  local folder=$1 package
  shift
  for package in "$@"; do
    compgen -G "$folder/${package}_*.deb" >/dev/null ||
      { echo "no $package in $folder: deploy/make-packages.sh" >&2; return 1; }
  done
}

# readme_commands FILE SECTION: the shell blocks of that section, to be run as they stand. Blocks that begin with
# "# with systemd" are left out.
readme_commands() {
  awk -v section="## $2" '
    /^## / { inside = $0 == section }
    /^```/ { block = inside && $0 == "```sh"; first = 1; skip = 0; next }
    block { if (first && /^# with systemd/) skip = 1; first = 0; if (!skip) print }' "$1"
}
