#!/usr/bin/env bash
# Runs the demo on every kind of machine that people run it on, each a root of its own: it ends with "0 lost", or within
# five seconds with the obstacle, the remedy and exit code 69.
#
#   usage: scripts/machines.sh                       all machines
#          scripts/machines.sh NAME…                 some of them; `--list` names them
#          scripts/machines.sh --enter NAME [COMMAND…]   a shell, or a command, on one of them as its user
#          scripts/machines.sh --jobs N, --keep      how many at once; whether the logs of all stay
#          scripts/machines.sh --help                this text
#   env:   FLYWHEEL_BIN   the binary that is tried (default: the debug build)
#
# As root. The logs of machines that fail stay in target/machines.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
cd "$root"
umask 022
unset RUSTFLAGS CARGO_ENCODED_RUSTFLAGS
export PATH=$PATH:$HOME/.cargo/bin
# The folder of a Debian and its release. sid moves on, and is tried as it is today.
debians=('12=bookworm' '13=trixie' 'sid=sid')

case ${1-} in
  -h | --help)
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit
    ;;
esac

fail() {
  printf 'machines: %s\n' "$*" >&2
  exit 69
}

# The Debians without Nix that the machines are made of.
unpack_debians() {
  local pair name release into missing=() more state from
  for pair in "${debians[@]}"; do
    [ -x "$root/target/tools/debian-${pair%=*}/usr/bin/sudo" ] || missing+=("$pair")
  done
  [ ${#missing[@]} -gt 0 ] || return 0
  # shellcheck source=/dev/null
  . "$root/scripts/debian-packages.sh"
  for pair in "${missing[@]}"; do
    name=${pair%=*} release=${pair#*=} into=$root/target/tools/debian-${pair%=*}
    echo "machines: unpacking Debian $name into target/tools"
    more=()
    # For the workflow under act, and for the daemon that a socket starts.
    [ "$name" != 12 ] || more=(git)
    [ "$name" != 13 ] || more=(systemd)
    # shellcheck disable=SC2154 # The functions come with their folder and their mirror.
    state=$scratch/$release from=$mirror
    { fetch_lists "$release" "$state" "$from" &&
      download_packages "$state" bash dash coreutils busybox-static util-linux findutils grep sed mawk \
        sudo libpam-modules "${more[@]}"; } ||
      fail "$from lacks packages of $release ($(tail -n 1 "$state/errors")); name a mirror with FLYWHEEL_DEBIAN"
    unpack_packages "$state" "$into"
  done
  rm -rf "$scratch"
}

scripts/nix-versions.sh
scripts/nix-closure.sh
unpack_debians
if [ "${1-}" = --enter ]; then
  [ $# -ge 2 ] || fail 'name a machine'
  shift
  exec tests/machines/guest/by-hand.sh "$@"
fi
[ $# -gt 0 ] || set -- --all
exec cargo test --locked --quiet --test machines -- "$@" </dev/null
