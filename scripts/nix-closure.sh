#!/usr/bin/env bash
# Makes a closure of Nix as upstream has it, of Debian's Nix 2.34.8: the program, glibc with its loader, and each other
# library as a store path, relinked so that it runs where there is nothing else. Stock Nix signs it and copies it to two
# binary caches; a release archive has it in upstream's layout. What is there stays.
#
#   usage: scripts/nix-closure.sh
#   makes: target/tools/nix-closure/xz, zstd       two caches for `file://`, or for any server of plain files
#          target/tools/nix-closure/key.pub        the public key of both
#          target/tools/nix-closure/path           the store path of Nix
#          target/tools/nix-closure/store-paths    all store paths of the closure
#          target/tools/nix-closure/nix-2.34.8-x86_64-linux.tar.xz
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
version=2.34.8
debian=$root/target/tools/nix-$version
into=$root/target/tools/nix-closure
libraries=$debian/usr/lib/x86_64-linux-gnu
loader=ld-linux-x86-64.so.2

fail() {
  printf 'nix-closure: %s\n' "$*" >&2
  exit 69
}

[ ! -e "$into/path" ] || exit 0
[ -x "$debian/usr/bin/nix" ] || "$root/scripts/nix-versions.sh"
for tool in patchelf xz; do
  command -v "$tool" >/dev/null || fail "\`$tool\` is missing: scripts/bootstrap.sh tools installs it"
done

echo "nix-closure: making a closure of Nix $version in target/tools"
scratch=$(mktemp -d)
trap 'chmod -R u+w "$scratch"; rm -rf "$scratch"' EXIT
store=$scratch/root/nix/store
mkdir -p "$store"

# Debian's Nix on any host, through its own loader, without settings of the host's.
nix() {
  env -i HOME="$scratch" PATH=/usr/bin:/bin NIX_CONF_DIR="$scratch" NIX_CONFIG='extra-experimental-features = nix-command
build-users-group =
substituters =' "$debian/usr/lib64/$loader" --library-path "$libraries:$debian/usr/lib" --argv0 "$1" "$debian/usr/bin/nix" "${@:2}"
}

# The files that belong to glibc are built as one, and are one store path.
is_glibc() {
  case $1 in
    ld-linux* | libc.so.6 | libm.so.6 | libdl.so.2 | libpthread.so.0 | librt.so.1 | libresolv.so.2 | libanl.so.1 | libutil.so.1 | libmvec.so.1) return 0 ;;
    *) return 1 ;;
  esac
}

# Prints a store path's name, whose hash is that of the standard input, in letters that Nix knows.
store_name() {
  printf '%s-%s\n' "$(sha256sum | head -c 32 | tr e z)" "$1"
}

# Finds a library by the name that others need.
library() {
  local found
  for found in "$libraries/$1" "$debian/usr/lib/$1"; do
    [ ! -e "$found" ] || { readlink -f "$found" && return; }
  done
  fail "Debian's Nix $version needs $1, which is not in $debian"
}

declare -A made
registration=$scratch/registration

# Registers a store path with its references.
register() {
  local path=/nix/store/$1
  shift
  printf '%s\n\n%d\n' "$path" $# >>"$registration"
  [ $# -eq 0 ] || printf '/nix/store/%s\n' "$@" >>"$registration"
}

# Puts the path that has a library into `found`, and makes it first if need be: those that it needs come before it.
found=
add_library() {
  local soname=$1 file needed needs=() name
  if is_glibc "$soname"; then
    found=$glibc
    return
  fi
  found=${made[$soname]-}
  [ -z "$found" ] || return 0
  file=$(library "$soname")
  collect "$file"
  read -ra needs <<<"$collected"
  name=$({ sha256sum <"$file" && echo "${needs[@]}"; } | store_name "$soname")
  install -D -m 644 "$file" "$store/$name/lib/$soname"
  patchelf --set-rpath "$(rpath "${needs[@]}")" "$store/$name/lib/$soname"
  register "$name" "${needs[@]}"
  made[$soname]=$name
  found=$name
}

# Puts the paths that a file needs into `collected`, sorted.
collected=
collect() {
  local needed all=()
  for needed in $(patchelf --print-needed "$1"); do
    add_library "$needed"
    all+=("$found")
  done
  collected=$(printf '%s\n' "${all[@]}" | sort -u | tr '\n' ' ')
}

rpath() {
  [ $# -eq 0 ] || printf '/nix/store/%s/lib\n' "$@" | paste -sd:
}

glibc=$(sha256sum <"$(library libc.so.6)" | store_name glibc)
for soname in "$loader" libc.so.6 libm.so.6 libdl.so.2 libpthread.so.0 librt.so.1 libresolv.so.2 libnss_dns.so.2; do
  install -D -m 755 "$(library "$soname")" "$store/$glibc/lib/$soname"
done
register "$glibc"

collect "$debian/usr/bin/nix"
read -ra needs <<<"$collected"
name=$({ sha256sum <"$debian/usr/bin/nix" && echo "${needs[@]}"; } | store_name "nix-$version")
mkdir -p "$store/$name/bin"
install -m 755 "$debian/usr/bin/nix" "$store/$name/bin/nix"
for link in "$debian"/usr/bin/nix-*; do ln -s nix "$store/$name/bin/${link##*/}"; done
patchelf --set-interpreter "/nix/store/$glibc/lib/$loader" --set-rpath "$(rpath "${needs[@]}")" "$store/$name/bin/nix"
register "$name" "${needs[@]}"

chroot="local?root=$scratch/root"
nix nix-store --store "$chroot" --register-validity <"$registration"
nix nix-store --generate-binary-cache-key flywheel-test-1 "$scratch/key" "$scratch/key.pub"
rm -rf "$into"
for compression in xz zstd; do
  nix nix copy --store "$chroot" --to "file://$scratch/new/$compression?secret-key=$scratch/key&compression=$compression" \
    "/nix/store/$name" 2>"$scratch/errors" || fail "$(tail -n 3 "$scratch/errors")"
done

archive=nix-$version-x86_64-linux
mkdir -p "$scratch/$archive"
mv "$store" "$scratch/$archive/store"
rm -rf "$scratch/$archive/store/.links"
printf '/nix/store/%s\n' "$glibc" "${made[@]}" "$name" | sort >"$scratch/new/store-paths"
nix nix-store --store "$chroot" --dump-db >"$scratch/$archive/.reginfo"
tar -C "$scratch" --sort=name --owner=0 --group=0 --numeric-owner -c "$archive" | xz -T0 -3 >"$scratch/new/$archive.tar.xz"

cp "$scratch/key.pub" "$scratch/new/key.pub"
echo "/nix/store/$name" >"$scratch/new/path"
# The folder counts only when it is whole.
mv "$scratch/new" "$into.new"
mv "$into.new" "$into"
