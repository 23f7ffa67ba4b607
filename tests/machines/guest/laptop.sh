#!/bin/sh
# A shell on a laptop that has its builds published: afterwards nothing of that is left in it. As the user.
set -eu
eval "$(/fly/flywheel watch-store start --publish --embedded-cache /out/cache --extra-nix-config 'sandbox = false')"
[ -n "$NIX_CONFIG" ]
nix build --no-link path:hello
eval "$(/fly/flywheel watch-store finish)"
[ "${NIX_CONFIG-none}" = none ]
# The next command asks no cache that is gone.
nix --extra-experimental-features 'nix-command flakes' build --rebuild --no-link --option sandbox false path:hello#greeting
