#!/bin/sh
# The judge of the demo, on a machine of its own: an ordinary build says what its outputs are, and an empty store then has
# to have the same from the cache that the demo left.
#
#   usage: judge.sh expect   writes each output with its NAR's hash into /out/expected
#          judge.sh judge    writes into /out/unserved what /out/cache does not serve just so
set -eu
. /shared/judge.sh
export PATH=/usr/sbin:/usr/bin HOME=/root

case $1 in
  expect)
    export NIX_CONFIG='experimental-features = nix-command flakes
sandbox = false
substituters ='
    nix build --no-link 'path:/fly/hello#greeting' 'path:/fly/hello#list' 'path:/fly/hello#default'
    nix eval --raw --apply 'all: builtins.concatStringsSep "\n" (map (one: one.outPath) (builtins.attrValues all))' \
      'path:/fly/hello#packages.x86_64-linux' >/out/paths
    echo >>/out/paths
    while read -r path; do echo "$path $(nix-store --query --hash "$path")"; done </out/paths >/out/expected
    ;;
  judge)
    mkdir -p /judge/home /judge/etc /judge/store
    : >/out/unserved
    serve_cache /out/cache /out/serve.log
    while read -r path hash; do
      fresh nix-store --realise "$path" >/dev/null 2>>/out/judge.log || true
      [ "$(fresh nix-store --query --hash "$path" 2>>/out/judge.log)" = "$hash" ] || echo "$path" >>/out/unserved
    done </out/expected
    ;;
esac
echo judged >/out/done
