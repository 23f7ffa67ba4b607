#!/usr/bin/env bash
# Nix 2.8.0: for a store below another root (NIX_REMOTE=/dir, or the setting `store = /dir`), `nix store ping` answers
# "Store URL: local", the very word that it has for the usual store. Only the setting `store`, in `nix show-config`, names
# the folder. A tool that takes the answer for the place of the store reads the database below /nix/var/nix, finds
# nothing new in it, and reports that nothing was built.
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

loader=$(find root -name 'ld-linux-x86-64.so.2' | head -n 1)
libraries=$(find "$scratch/root" -type d -name 'x86_64-linux-gnu' | paste -sd:)
nix() {
  env -i HOME="$scratch/home" PATH=/usr/bin:/bin NIX_CONF_DIR="$scratch/etc" NIX_REMOTE="$scratch/elsewhere" \
    NIX_CONFIG=$'experimental-features = nix-command\nsubstituters =\nbuild-users-group =' \
    "$loader" --library-path "$libraries" root/usr/bin/nix "$@"
}
mkdir -p home etc

nix --version
pinged=$(nix store ping 2>&1 | grep '^Store URL:')
setting=$(nix show-config --json | python3 -c 'import json, sys; print(json.load(sys.stdin)["store"]["value"])')
echo "ping: $pinged"
echo "setting: store = ${setting/$scratch/DIR}"
[ -d "$scratch/elsewhere/nix/store" ]
[ "$pinged" = 'Store URL: local' ]
[ "$setting" = "$scratch/elsewhere" ]
