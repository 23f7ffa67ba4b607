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
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
snapshot=${FLYWHEEL_SNAPSHOT-}
# Version of Nix and the release of Debian that has it. sid moves on; the snapshot keeps what it had.
releases=(2.8.0=bookworm 2.26.3=trixie 2.34.8=sid)

fail() {
  printf 'nix-versions: %s\n' "$*" >&2
  exit 69
}

command -v apt-get >/dev/null || fail "\`apt-get\` is missing; the matrix unpacks Debian packages with it"
[ -e "$keyring" ] || fail "$keyring is missing: apt-get install debian-archive-keyring"

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
# shellcheck disable=SC2016 # They are apt's variables.
mirror=$(apt-get indextargets --format '$(LABEL) $(REPO_URI)' 'Created-By: Packages' | sed -n 's/^Debian //p' | head -n 1)
mirror=${FLYWHEEL_DEBIAN:-$mirror}
[ -n "$mirror" ] || fail "apt names no mirror of Debian's; name one with FLYWHEEL_DEBIAN"

# apt-get on the lists of one release alone, as if no package were installed, so that it takes the whole closure.
apt() {
  local state=$1
  shift
  apt-get -qq -o APT::Sandbox::User="$(id -un)" -o APT::Architecture=amd64 -o APT::Architectures=amd64 \
    -o Dir::Etc::SourceList="$state/sources.list" -o Dir::Etc::SourceParts=/dev/null \
    -o Dir::State::Lists="$state/lists" -o Dir::Cache="$state/cache" -o Dir::State::status="$state/status" \
    -o Acquire::Check-Valid-Until=false -o Acquire::http::Timeout=20 -o Acquire::https::Timeout=20 "$@" </dev/null
}

# Downloads the closure of a version into STATE/cache/archives, from the mirror that is named.
download() {
  local version=$1 release=$2 state=$3 from=$4 exact
  rm -rf "$state"
  mkdir -p "$state"/{lists,cache}/partial
  # Beside this file apt has its lock.
  : >"$state/status"
  echo "deb [signed-by=$keyring] $from $release main" >"$state/sources.list"
  apt "$state" update >/dev/null 2>"$state/errors" || return 1
  exact=$(apt-cache -o Dir::Etc::SourceList="$state/sources.list" -o Dir::Etc::SourceParts=/dev/null \
    -o Dir::State::Lists="$state/lists" -o Dir::Cache="$state/cache" madison nix-bin | awk '{print $3}' |
    grep -E "^${version//./\\.}([+-]|$)" | head -n 1) || return 1
  apt "$state" install --download-only --no-install-recommends --yes \
    "nix-bin=$exact" bash coreutils busybox-static util-linux libgcc-s1 findutils grep sed >/dev/null 2>"$state/errors"
}

for pair in "${releases[@]}"; do
  version=${pair%=*} release=${pair#*=}
  into=$tools/nix-$version fresh=$tools/nix-$version.new
  [ ! -x "$into/usr/bin/nix" ] || continue
  echo "nix-versions: unpacking Nix $version of Debian $release into target/tools"
  state=$scratch/$release
  download "$version" "$release" "$state" "$mirror" ||
    { [ -n "$snapshot" ] && download "$version" "$release" "$state" "$snapshot"; } ||
    fail "$mirror${snapshot:+ and $snapshot} lack nix-bin $version of $release ($(tail -n 1 "$state/errors")); name a" \
      "mirror, or a snapshot of the day on which $release had it, with FLYWHEEL_DEBIAN or FLYWHEEL_SNAPSHOT"
  # The folder counts only when it is whole.
  rm -rf "$fresh"
  mkdir -p "$fresh"
  for deb in "$state"/cache/archives/*.deb; do dpkg-deb -x "$deb" "$fresh"; done
  # Packages of before the merge of / and /usr put some of their files beside it.
  for folder in bin sbin lib lib64; do
    if [ -d "$fresh/$folder" ] && [ ! -L "$fresh/$folder" ]; then
      mkdir -p "$fresh/usr/$folder"
      cp -a "$fresh/$folder/." "$fresh/usr/$folder/"
      rm -rf "${fresh:?}/$folder"
    fi
  done
  rm -rf "$into"
  mv "$fresh" "$into"
done

# No package makes this link: Debian's is the installer's.
for pair in "${releases[@]}"; do
  [ -e "$tools/nix-${pair%=*}/usr/bin/sh" ] || ln -s bash "$tools/nix-${pair%=*}/usr/bin/sh"
done
