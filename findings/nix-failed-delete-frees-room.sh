#!/usr/bin/env bash
# Nix 2.8.0: `nix-store --delete` of a path that is alive fails, deletes nothing, and yet frees 8 MB: any collection first
# takes away the file `db/reserved`, which Nix keeps so that a full disk leaves it room to collect garbage, and only the next
# process that opens the store puts it back. Whoever watches the free room to see whether an attempt has freed anything,
# or to decide whether one is needed, sees room that the next build does not have.
set -euo pipefail

package=nix-bin version=2.8.0
scratch=$(mktemp -d)
trap 'chmod -R u+w "$scratch"; rm -rf "$scratch"' EXIT
cd "$scratch"

# The package with all that it links, unpacked and not installed.
mkdir -p lists/partial cache/archives/partial root
: >status
apt=(apt-get -qq -o Dir::State::Lists="$scratch/lists" -o Dir::Cache="$scratch/cache"
  -o Dir::State::status="$scratch/status" -o APT::Sandbox::User="$(id -un)")
"${apt[@]}" update
exact=$(apt-cache -o Dir::State::Lists="$scratch/lists" -o Dir::Cache="$scratch/cache" madison "$package" |
  awk '{print $3}' | grep -E "^$version([+-]|\$)" | head -n 1)
[ -n "$exact" ] || { echo "no $package $version in the machine's package sources" >&2 && exit 69; }
"${apt[@]}" install --download-only --no-install-recommends --yes "$package=$exact"
for deb in cache/archives/*.deb; do dpkg-deb -x "$deb" root; done

# A store of its own, with one path that a root keeps.
libraries=$(find "$scratch/root" -name '*.so*' -printf '%h\n' | sort -u | paste -sd:)
nix() {
  env -i HOME="$scratch" PATH=/usr/bin:/bin LD_LIBRARY_PATH="$libraries" NIX_STORE_DIR="$scratch/store" \
    NIX_STATE_DIR="$scratch/var" NIX_CONF_DIR="$scratch/etc" NIX_CONFIG='build-users-group =' \
    "$scratch/root/usr/bin/$1" "${@:2}"
}
reserve() { if [ -e var/db/reserved ]; then stat -c %s var/db/reserved; else echo none; fi; }

echo "version: $(nix nix-store --version)"
echo kept >kept
path=$(nix nix-store --add kept)
mkdir -p var/gcroots && ln -s "$path" var/gcroots/kept
before=$(reserve)
status=0
nix nix-store --delete "$path" 2>message || status=$?
after=$(reserve)
[ -e "$path" ]
nix nix-store --query --hash "$path" >/dev/null
again=$(reserve)

sed "s|$scratch|…|g; s/^/says: /" message
echo "exit $status; reserved: $before before it, $after after it, $again once the store was opened again"
[ "$status $before $after $again" = "1 8388608 none 8388608" ] || { echo "this has changed" >&2 && exit 1; }
