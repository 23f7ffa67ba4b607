#!/usr/bin/env bash
# Builds what `dist/` holds beside the launcher: the static binary, its sum, the record of what built it.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
name=flywheel-x86_64-linux

built=$("$root/scripts/build-static.sh")
# Moved into place, because a binary that is running cannot be written over.
install -m 755 "$built" "$root/dist/.$name.new"
mv -f "$root/dist/.$name.new" "$root/dist/$name"
cd "$root/dist"
sha256sum "$name" >SHA256SUMS
"$root/scripts/toolchain.sh" >BUILT-WITH
printf 'dist/%s: %s bytes, %s\n' "$name" "$(stat -c %s "$name")" "$(./flywheel --version)"
