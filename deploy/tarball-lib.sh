# What make-tarball.sh and test-tarball.sh both go by; sourced, not run.

# shellcheck disable=SC2034  # used by whoever sources this
ucx_wheel_version=1.22.0

# Of the machine that runs it: glibc and nothing else.
system_libraries=(
  linux-vdso.so.1 ld-linux-x86-64.so.2
  libc.so.6 libm.so.6 libdl.so.2 libpthread.so.0 librt.so.1 libresolv.so.2
)
# Of the GPU's driver. Only UCX's CUDA modules need them, and UCX does without a module that does
# not load; the daemon itself opens libcuda.so.1 by name.
driver_libraries=(libcuda.so.1 libnvidia-ml.so.1)

# Carried for machines with older ones, apart from the rest: they want a newer glibc than the rest.
gcc_libraries=(libstdc++.so.6 libgcc_s.so.1)

is_listed() {
  local what=$1 one
  shift
  for one in "$@"; do [ "$one" != "$what" ] || return 0; done
  return 1
}

# check_tree TREE PATH...: everything in TREE needs only what is in it or listed above, and is found
# there; and it holds none of the PATHs of the machine that built it. Says what is wrong.
check_tree() {
  local tree wrong=0 file needed rpath path line
  tree=$(realpath "$1")
  shift
  while read -r file; do
    readelf -h "$file" >/dev/null 2>&1 || continue
    while read -r needed; do
      [ ! -e "$tree/lib/$needed" ] && [ ! -e "$tree/lib/gcc/$needed" ] || continue
      is_listed "$needed" "${system_libraries[@]}" && continue
      case $file in
        "$tree"/lib/ucx/*) is_listed "$needed" "${driver_libraries[@]}" && continue ;;
      esac
      echo "${file#"$tree/"} needs $needed, which is neither here nor the system's" >&2
      wrong=1
    done < <(readelf -d "$file" | sed -n 's/.*(NEEDED).*\[\(.*\)\]/\1/p')
    while read -r rpath; do
      case $rpath in
        '$ORIGIN' | '$ORIGIN/..' | '$ORIGIN/../lib' | '$ORIGIN/../lib/gcc') ;;
        *) echo "${file#"$tree/"} looks for libraries in $rpath" >&2; wrong=1 ;;
      esac
    done < <(readelf -d "$file" | sed -n 's/.*(R\(UN\)\?PATH).*\[\(.*\)\]/\2/p' | tr ':' '\n')
    # What the loader makes of it. Libraries of Debian's find theirs only through a program.
    case $file in
      "$tree"/bin/* | "$tree"/lib/libkvferry.so* | "$tree"/lib/libuc* | "$tree"/lib/ucx/*) ;;
      *) continue ;;
    esac
    while read -r line; do
      needed=${line%% *}
      needed=${needed##*/}
      path=${line#*=> }
      path=$(realpath -m "${path%% (*}")
      case $path in "$tree"/*) continue ;; esac
      is_listed "$needed" "${system_libraries[@]}" && continue
      # A module or libkvferry is loaded into a process that has found these before.
      case $file in
        "$tree"/lib/*) is_listed "$needed" "${gcc_libraries[@]}" "${driver_libraries[@]}" && continue ;;
      esac
      echo "${file#"$tree/"} gets $needed from ${line#*=> }" >&2
      wrong=1
    done < <(env -u LD_LIBRARY_PATH ldd "$file" | sed 's/^[[:space:]]*//' | grep '=>')
  done < <(find "$tree" -type f)
  for path in "$@"; do
    if grep -rlF -- "$path" "$tree" >&2; then
      echo "these hold a path of the machine that built them: $path" >&2
      wrong=1
    fi
  done
  return "$wrong"
}
