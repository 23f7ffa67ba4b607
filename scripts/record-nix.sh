#!/usr/bin/env bash
# Records what real Nix answers to the calls that `nix-job` makes, on each version that is unpacked, for the scripted
# `nix` of the fast suite (tests/fixtures/nix).
#
#   usage: scripts/record-nix.sh        as root
#
# The store is one below another root, whose place is written as @STORE@. Of a setting only its value is kept, one a line.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
cd "$root"
scripts/nix-versions.sh
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/guest" "$work/out"
cat >"$work/guest/record.sh" <<'GUEST'
set -eu
export HOME=/root NIX_REMOTE=/area/store
export NIX_CONFIG='extra-experimental-features = nix-command flakes'
nix --version >/out/version
case $(cat /out/version) in
  *' 2.8.'*) nix show-config --json >/out/settings ;;
  *) nix config show --json >/out/settings ;;
esac
nix store ping >/out/ping 2>/out/ping-errors
GUEST

for version in 2.8.0 2.26.3 2.34.8; do
  unshare --mount --pid --ipc --net --fork --kill-child --propagation private env NETWORK=own \
    sh tests/matrix/guest/enter.sh "$root/target/tools/nix-$version" /bin/true "$work/guest" "$work/out" \
    /bin/bash /guest/record.sh
  into=tests/fixtures/nix/$version
  mkdir -p "$into"
  sed -i 's#/area/store#@STORE@#g' "$work/out/version" "$work/out/settings" "$work/out/ping" "$work/out/ping-errors"
  cp "$work/out/version" "$work/out/ping" "$work/out/ping-errors" "$into"
  python3 - "$work/out/settings" >"$into/settings" <<'PYTHON'
import json, sys

settings = json.load(open(sys.argv[1]))
lines = [f"{json.dumps(name)}: {json.dumps({'value': one['value']})}" for name, one in sorted(settings.items())]
print("{\n" + ",\n".join(lines) + "\n}")
PYTHON
  echo "record-nix: $into"
done
