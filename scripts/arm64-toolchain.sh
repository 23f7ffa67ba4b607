#!/usr/bin/env bash
# Runs a command where Debian 12's cross compilers for arm64 are: a folder with Debian's own rustc, gcc and glibc, that
# is a root of its own, so that any x86_64 Linux with apt-get builds the same binary. Nothing is installed.
#
#   usage: scripts/arm64-toolchain.sh COMMAND…
#   such as: scripts/arm64-toolchain.sh scripts/build-static.sh aarch64
#   env:   FLYWHEEL_DIST_TARGET   the folder to build in, if it is not in this checkout
#          FLYWHEEL_DEBIAN, FLYWHEEL_SNAPSHOT   as scripts/debian-packages.sh has them
#
# The packages are those that `dist/BUILT-WITH` records. Where they are no longer to be had, the newest of Debian 12 are
# taken; `scripts/toolchain.sh aarch64` prints which were.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
tools=$root/target/tools/arm64
# What decides the bytes of the binary; the name of LLVM's package changes with its version.
decisive='rustc-web|libllvm[0-9]+|libstd-rust-web-dev:arm64|gcc-12-aarch64-linux-gnu|binutils-aarch64-linux-gnu'
decisive+='|libgcc-12-dev-arm64-cross|libc6-dev-arm64-cross|linux-libc-dev-arm64-cross'

fail() {
  printf 'arm64-toolchain: %s\n' "$*" >&2
  exit 69
}

recorded=$(sed -n '/^# flywheel-aarch64-linux$/,/^# /p' "$root/dist/BUILT-WITH" | grep -E "^($decisive) " || true)

# Downloads the compilers; each line of the last argument is a package and the version to take of it.
download() {
  local state=$1 from=$2 versions=$3 exact library
  fetch_lists bookworm "$state" "$from" security || return 1
  mapfile -t exact < <(sed '/^libstd/d; s/ /=/' <<<"$versions")
  download_packages "$state" ${versions:+"${exact[@]}"} \
    rustc-web cargo-web gcc gcc-aarch64-linux-gnu libc6-dev libc6-dev-arm64-cross bash coreutils sed || return 1
  # The library for arm64 without what it would need to run there.
  library=$(sed -n '/^libstd/s/ /=/p' <<<"$versions")
  (cd "$state/cache/archives" && apt "$state" apt-get download "${library:-libstd-rust-web-dev:arm64}") 2>"$state/errors" >&2
}

# Prints what was downloaded of what decides the bytes.
record() {
  local deb
  for deb in "$1"/cache/archives/*.deb; do
    # shellcheck disable=SC2016 # They are dpkg's variables.
    dpkg-deb --show --showformat '${Package}:${Architecture} ${Version}\n' "$deb"
  done | sed -E 's/^([^ ]*):(amd64|all) /\1 /' | grep -E "^($decisive) " | LC_ALL=C sort
}

# shellcheck disable=SC2034,SC2154 # The sourced script reads the one, and makes the others.
unpack() {
  local state
  # shellcheck source=/dev/null
  . "$root/scripts/debian-packages.sh"
  state=$scratch/bookworm architectures=amd64,arm64
  echo "arm64-toolchain: unpacking the cross compilers of Debian bookworm into target/tools" >&2
  if [ -n "$recorded" ] && { download "$state" "$mirror" "$recorded" ||
    { [ -n "$snapshot" ] && download "$state" "$snapshot" "$recorded"; }; }; then
    :
  elif [ -e "$tools/packages" ]; then
    # The newest, of an earlier run.
    return
  else
    download "$state" "$mirror" '' || fail "$mirror lacks the cross compilers of bookworm" \
      "($(tail -n 1 "$state/errors")); name a mirror with FLYWHEEL_DEBIAN"
  fi
  record "$state" >"$scratch/packages"
  unpack_packages "$state" "$tools"
  # What the packages' own scripts would have linked.
  ln -s bash "$tools/usr/bin/sh"
  ln -s gcc "$tools/usr/bin/cc"
  mv "$scratch/packages" "$tools/packages"
  rm -rf "$scratch"
}

[ "$(uname -m)" = x86_64 ] || fail 'the cross compilers run on x86_64'
if [ ! -e "$tools/packages" ] || { [ -n "$recorded" ] && [ "$recorded" != "$(cat "$tools/packages")" ]; }; then unpack; fi
[ $# -gt 0 ] || exit 0

# Cargo inside cannot download, but has what this host's Cargo did.
(cd "$root" && cargo fetch --quiet --locked)
export FLYWHEEL_DIST_TARGET=${FLYWHEEL_DIST_TARGET:-$root/target/dist}
mkdir -p "$FLYWHEEL_DIST_TARGET"
cargo_home=${CARGO_HOME:-$HOME/.cargo}
as_root=()
[ "$(id -u)" = 0 ] || as_root=(--map-root-user)
new=$(mktemp -d)
trap 'rmdir "$new"' EXIT
trap 'exit 130' INT TERM
# The checkout, the folder to build in and the downloads have the same names inside. The mounts end with their namespace.
# shellcheck disable=SC2016 # The inner shell expands it.
unshare "${as_root[@]}" --mount --propagation private bash -euc '
  new=$1 tools=$2 root=$3 out=$4 cargo_home=$5
  shift 5
  mount -t tmpfs -o mode=755 tmpfs "$new"
  cd "$new"
  mkdir usr dev proc
  mkdir -m 1777 tmp
  for folder in bin sbin lib lib64; do ln -s "usr/$folder" "$folder"; done
  mount --rbind "$tools/usr" usr
  mount --rbind /dev dev
  mount --rbind /proc proc
  for folder in "$root" "$out"; do
    mkdir -p "$new$folder"
    mount --rbind "$folder" "$new$folder"
  done
  for part in registry git; do
    [ -e "$cargo_home/$part" ] || continue
    mkdir -p "$new$cargo_home/$part"
    mount --rbind "$(readlink -f "$cargo_home/$part")" "$new$cargo_home/$part"
  done
  if [ -e "$cargo_home/config.toml" ]; then cp "$cargo_home/config.toml" "$new$cargo_home/config.toml"; fi
  exec chroot "$new" /usr/bin/env -i HOME=/tmp PATH=/usr/bin CARGO_HOME="$cargo_home" CARGO_NET_OFFLINE=true \
    FLYWHEEL_DIST_TARGET="$out" bash -c "cd \"\$1\" && shift && exec \"\$@\"" bash "$root" "$@"
' bash "$new" "$tools" "$root" "$FLYWHEEL_DIST_TARGET" "$cargo_home" "$@"
