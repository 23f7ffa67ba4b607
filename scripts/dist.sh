#!/usr/bin/env bash
# Builds what `dist/` holds beside the launcher: the static binaries, their sums, the record of what built them.
#
#   usage: scripts/dist.sh [x86_64|aarch64]   (default: both)
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
cd "$root/dist"
case ${1-both} in
  both) wanted=(x86_64 aarch64) ;;
  x86_64 | aarch64) wanted=("$1") ;;
  *) echo 'usage: scripts/dist.sh [x86_64|aarch64]' >&2 && exit 64 ;;
esac

declare -A built
for processor in "${wanted[@]}"; do
  name=flywheel-$processor-linux
  if [ "$processor" = aarch64 ]; then
    built[aarch64]=$("$root/scripts/arm64-toolchain.sh" scripts/build-static.sh aarch64)
  else
    built[$processor]=$("$root/scripts/build-static.sh" "$processor")
  fi
  # Moved into place, because a binary that is running cannot be written over.
  install -m 755 "${built[$processor]}" ".$name.new"
  mv -f ".$name.new" "$name"
  printf 'dist/%s: %s bytes\n' "$name" "$(stat -c %s "$name")"
done

"$root/scripts/dist-sums.sh"
for processor in x86_64 aarch64; do
  name=flywheel-$processor-linux
  if [ -n "${built[$processor]-}" ]; then
    printf '# %s\nsources %s\n' "$name" "$(cat "${built[$processor]}.sources")"
    "$root/scripts/toolchain.sh" "$processor"
  else
    # The record of a binary that stays. It ends where the next begins.
    sed -n "/^# $name\$/,/^# /{/^# $name\$/p; /^#/!p}" BUILT-WITH
  fi
done >.BUILT-WITH.new
mv -f .BUILT-WITH.new BUILT-WITH
./flywheel --version
