#!/usr/bin/env bash
# Installs what is missing on a fresh Debian or Ubuntu; does nothing where all is there. Rust comes from the distribution's
# package `rustup`, if it has one; where it has none, the first line says what to install.
#
#   usage: scripts/bootstrap.sh nix      Nix and the static busybox that the example flakes build with
#          scripts/bootstrap.sh runner   cargo-nextest, act and the linters; needs root only where Python's venv, curl,
#                                wget or busybox is missing
#          scripts/bootstrap.sh tools    all of the above, and what else the tests and linters need
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
tools=$root/target/tools
what=${1:-nix}

fail() {
  printf 'bootstrap: %s\n' "$*" >&2
  exit 69
}

as_root() {
  if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi
}

missing=()
# Notes a package as missing unless the command that it brings is there.
need() {
  command -v "$1" >/dev/null 2>&1 || missing+=("$2")
}

# Before anything that takes time.
if [ "$what" != nix ]; then
  for part in cargo cargo-clippy rustfmt; do
    command -v "$part" >/dev/null && continue
    if apt-cache show rustup >/dev/null 2>&1; then
      missing+=(rustup)
      break
    fi
    fail "\`$part\` is missing: install Rust with clippy and rustfmt by rustup (https://rustup.rs), and run this again"
  done
fi
if [ "$what" != runner ]; then
  need nix nix-bin
  need busybox busybox-static
  need git git
  [ -e /etc/ssl/certs/ca-certificates.crt ] || missing+=(ca-certificates)
fi
if [ "$what" = tools ]; then
  need gcc gcc
  need readelf binutils
  need unshare util-linux
  need make make
  need patchelf patchelf
  need strace strace
  need xz xz-utils
  need openssl openssl
  [ -e /usr/include/stdlib.h ] || missing+=(libc6-dev)
fi
if [ "$what" != nix ]; then
  python3 -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv)
  # What the launcher takes a release's binary with, and what the release's steps call.
  need curl curl
  need wget wget
  if [ "$what" = runner ]; then
    need busybox busybox-static
    need git git
  fi
fi

if [ ${#missing[@]} -gt 0 ]; then
  command -v apt-get >/dev/null || fail "install these first (there is no apt-get here): ${missing[*]}"
  echo "bootstrap: installing ${missing[*]}"
  export DEBIAN_FRONTEND=noninteractive
  as_root apt-get update -qq </dev/null
  as_root apt-get install -y -qq --no-install-recommends "${missing[@]}" </dev/null >/dev/null
fi

[ "$what" != nix ] || exit 0

# Fetches the toolchain that rust-toolchain.toml names, where rustup has just been installed.
cargo --version >/dev/null || fail "\`cargo\` does not run: see what it says above"

# The environment is made anew when the list changes. The copy of the list is written last, so that an installation
# that broke off halfway does not count.
if ! cmp --silent "$root/scripts/tools.txt" "$tools/installed.txt"; then
  echo "bootstrap: installing cargo-nextest, act and the linters into target/tools"
  rm -rf "$tools"
  # The shell may remember the Python that was in that folder.
  hash -r
  python3 -m venv "$tools"
  "$tools/bin/python" -m pip install --quiet --no-input --no-deps --only-binary :all: -r "$root/scripts/tools.txt"
  cp "$root/scripts/tools.txt" "$tools/installed.txt"
fi

[ "$what" = tools ] || exit 0

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
refreshed=

# apt-get without output, run as this user; options come before the verb.
apt() {
  command -v apt-get >/dev/null || fail "\`apt-get\` is missing; the tests unpack Debian packages with it"
  apt-get -qq -o APT::Sandbox::User="$(id -un)" "$@" </dev/null >/dev/null
}

# Downloads packages and unpacks them into the folder that comes first: nothing is installed, no service starts.
# Options for apt-get come before the packages.
unpack() {
  local into=$1 deb
  shift
  mkdir -p "$into" "$scratch/debs"
  (cd "$scratch/debs" && apt download "$@")
  for deb in "$scratch"/debs/*.deb; do
    dpkg-deb -x "$deb" "$into"
    rm "$deb"
  done
}

refresh() {
  [ -n "$refreshed" ] || as_root apt-get update -qq </dev/null
  refreshed=1
}

# Of Debian's `prometheus` only promtool is wanted.
if [ ! -x "$tools/bin/promtool" ]; then
  echo "bootstrap: unpacking promtool into target/tools"
  refresh
  unpack "$scratch/prometheus" prometheus
  install -m 755 "$scratch/prometheus/usr/bin/promtool" "$tools/bin/promtool"
fi

# Of Debian's `qemu-user-static` only what runs arm64 programs.
if [ ! -x "$tools/bin/qemu-aarch64-static" ]; then
  echo "bootstrap: unpacking qemu for arm64 into target/tools"
  refresh
  unpack "$scratch/qemu" qemu-user-static
  install -m 755 "$scratch/qemu/usr/bin/qemu-aarch64-static" "$tools/bin/qemu-aarch64-static"
fi

# The kernel headers and the Docker that the canary of those classes is tried with. What is not Debian brings
# its own, as GitHub's hosted runners do.
mirror=
if command -v apt-get >/dev/null; then
  # shellcheck disable=SC2016 # They are apt's variables.
  mirror=$(apt-get indextargets --format '$(LABEL) $(REPO_URI)' 'Created-By: Packages' | sed -n 's/^Debian //p' | head -n 1)
fi
if [ -z "$mirror" ]; then
  [ -e "/lib/modules/$(uname -r)/build/Makefile" ] || fail "the headers of the running kernel are missing"
  command -v dockerd >/dev/null || fail "\`dockerd\` is missing; install Docker with its buildx"
  exit 0
fi

if [ ! -d "$tools/kernel" ]; then
  echo "bootstrap: unpacking kernel headers into target/tools"
  refresh
  needed() { apt-cache depends --important "$1" | sed -n 's/^ *Depends: \(linux-[^ ]*\)$/\1/p'; }
  headers=$(needed linux-headers-amd64)
  mapfile -t packages < <(needed "$headers")
  unpack "$scratch/kernel" "$headers" "${packages[@]}"
  mv "$scratch/kernel" "$tools/kernel"
fi

# Docker with its buildx is first in Debian 13, and runs on Debian 12 beside the runc of that.
if [ ! -d "$tools/docker" ]; then
  echo "bootstrap: unpacking Docker into target/tools"
  refresh
  unpack "$scratch/docker" runc
  mkdir -p "$scratch"/apt/{lists,cache}/partial
  echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror trixie main" >"$scratch/apt/sources.list"
  trixie=(
    -o Dir::Etc::SourceList="$scratch/apt/sources.list"
    -o Dir::Etc::SourceParts=/dev/null
    -o Dir::State::Lists="$scratch/apt/lists"
    -o Dir::Cache="$scratch/apt/cache"
  )
  apt "${trixie[@]}" update
  unpack "$scratch/docker" "${trixie[@]}" docker.io docker-cli docker-buildx containerd
  mv "$scratch/docker" "$tools/docker"
fi
