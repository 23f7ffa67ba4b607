#!/usr/bin/env bash
# Writes `SHA256SUMS` of a folder anew: the sums of the binaries that are in it, and, of what a release alone has, the
# sums that are recorded already, because the launcher takes those binaries from the release and compares them.
#
#   usage: scripts/dist-sums.sh [FOLDER]   (default: dist)
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
cd "${1:-$root/dist}"
shopt -s nullglob
{
  binaries=(flywheel-*-linux flywheel-*-darwin)
  if [ ${#binaries[@]} -gt 0 ]; then sha256sum "${binaries[@]}"; fi
  if [ -f SHA256SUMS ]; then
    while read -r sum name; do
      [ -e "$name" ] || printf '%s  %s\n' "$sum" "$name"
    done <SHA256SUMS
  fi
} | LC_ALL=C sort -k 2 >.SHA256SUMS.new
mv -f .SHA256SUMS.new SHA256SUMS
