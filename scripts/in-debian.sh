#!/usr/bin/env bash
# Runs a command in a clean clone of this checkout (its last commit) on a fresh Debian 12 that has this host's Rust
# and nothing else. There the proof of `dist/` finds the recorded C toolchain, whatever the host is, and the first
# steps of a new user can be tried.
#
#   usage: sudo scripts/in-debian.sh COMMAND…      from Debian or Ubuntu
#   such as: scripts/in-debian.sh scripts/test.sh
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
fail() {
  printf 'in-debian: %s\n' "$*" >&2
  exit 69
}

[ $# -gt 0 ] || fail "name the command to run"
[ "$(id -u)" = 0 ] || fail "this needs root, to make a Debian and to enter it"
command -v rustc >/dev/null || fail "\`rustc\` is not on PATH"
command -v debootstrap >/dev/null || { apt-get update -qq && apt-get install -y -qq --no-install-recommends debootstrap; }

work=$(mktemp -d "${TMPDIR:-/tmp}/debian.XXXXXX")
# The mounts below end with their namespace, so that only files are left to remove.
trap 'rm -rf --one-file-system "$work"' EXIT
trap 'exit 130' INT TERM
debian=$work/debian
debootstrap --variant=minbase bookworm "$debian" >"$work/log" || { cat "$work/log" && fail "debootstrap"; }
# With its updates and security fixes, as every Debian has, from the mirror that debootstrap chose.
mirror=$(sed -n 's/^deb \([^ ]*\) bookworm .*/\1/p' "$debian/etc/apt/sources.list")
cat >"$debian/etc/apt/sources.list" <<LIST
deb $mirror bookworm main
deb $mirror bookworm-updates main
deb ${mirror%/}-security bookworm-security main
LIST
cp /etc/resolv.conf "$debian/etc/resolv.conf"
# This host's certificate authorities, private ones included, in a place that Debian's own package does not overwrite.
install -D --mode=644 /etc/ssl/certs/ca-certificates.crt "$debian/etc/ssl/host.crt"
git clone --quiet "file://$root" "$debian/root/flywheel"

sysroot=$(rustc --print sysroot)
# shellcheck disable=SC2016 # The inner shell expands it.
unshare --mount --propagation private bash -euc '
  debian=$1 sysroot=$2
  shift 2
  mkdir -p "$debian$sysroot"
  mount --bind "$debian" "$debian"
  mount --bind -o ro "$sysroot" "$debian$sysroot"
  mount -t proc proc "$debian/proc"
  mount -t sysfs -o ro sysfs "$debian/sys"
  mount --rbind /dev "$debian/dev"
  # Not `chroot`: Nix enters its mount namespace anew, and would then be outside of the changed root.
  cd "$debian"
  mkdir .host
  pivot_root . .host
  umount --lazy /.host
  exec /usr/bin/env -i HOME=/root CI=true \
    PIP_CERT=/etc/ssl/host.crt SSL_CERT_FILE=/etc/ssl/host.crt CARGO_HTTP_CAINFO=/etc/ssl/host.crt \
    PATH="$sysroot/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin" \
    sh -c "cd /root/flywheel && exec \"\$@\"" sh "$@"
' bash "$debian" "$sysroot" "$@"
