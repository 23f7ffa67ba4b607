#!/usr/bin/env bash
# Unpacks the versions of Nix that the matrix runs on into target/tools/nix-VERSION, each a small Debian of its own:
# the program with all that it links, bash, busybox and util-linux. Nothing is installed; what is there stays.
#
#   usage: scripts/nix-versions.sh
#   env:   FLYWHEEL_DEBIAN    the Debian mirror (default: the machine's own)
#          FLYWHEEL_SNAPSHOT  an archive with what the mirror has no longer, such as a snapshot of Debian's (default: none)
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
tools=$root/target/tools
# Version of Nix and the release of Debian that has it. sid moves on; the snapshot keeps what it had.
releases=(2.8.0=bookworm 2.26.3=trixie 2.34.8=sid 2.26.3-arm64=trixie)

fail() {
  printf 'nix-versions: %s\n' "$*" >&2
  exit 69
}

# shellcheck source=/dev/null
. "$root/scripts/debian-packages.sh"

# Downloads the closure of a version into STATE/cache/archives, from the mirror that is named.
download() {
  local version=$1 release=$2 state=$3 from=$4 exact
  fetch_lists "$release" "$state" "$from" || return 1
  exact=$(apt "$state" apt-cache madison nix-bin | awk '{print $3}' |
    grep -E "^${version//./\\.}([+-]|$)" | head -n 1) || return 1
  download_packages "$state" \
    "nix-bin=$exact" bash coreutils busybox-static util-linux libgcc-s1 findutils grep sed
}

for pair in "${releases[@]}"; do
  name=${pair%=*} release=${pair#*=}
  version=${name%-arm64} into=$tools/nix-$name
  [ ! -x "$into/usr/bin/nix" ] || continue
  echo "nix-versions: unpacking Nix $name of Debian $release into target/tools"
  # shellcheck disable=SC2034 # The functions read it.
  case $name in *-arm64) architectures=arm64 ;; *) architectures=amd64 ;; esac
  # shellcheck disable=SC2154 # The functions come with their folder and their mirror.
  state=$scratch/$release from=$mirror
  download "$version" "$release" "$state" "$from" ||
    { [ -n "$snapshot" ] && download "$version" "$release" "$state" "$snapshot"; } ||
    fail "$from${snapshot:+ and $snapshot} lack nix-bin $name of $release ($(tail -n 1 "$state/errors")); name a" \
      "mirror, or a snapshot of the day on which $release had it, with FLYWHEEL_DEBIAN or FLYWHEEL_SNAPSHOT"
  unpack_packages "$state" "$into"
  # The examples are built by a shell of this name, which the packages' own scripts would have made.
  case $name in *-arm64) ln -s bash "$into/usr/bin/sh" ;; esac
done

# No package makes this link: Debian's is the installer's.
for pair in "${releases[@]}"; do
  [ -e "$tools/nix-${pair%=*}/usr/bin/sh" ] || ln -s bash "$tools/nix-${pair%=*}/usr/bin/sh"
done
