#!/usr/bin/env bash
# Prints the record of the tools that decide the bytes of the static binary, one per line.
# Two hosts with the same record build the same binary.
set -euo pipefail

rustc --version
gcc --version | head -n 1
ld --version | head -n 1
if command -v dpkg-query >/dev/null && version=$(dpkg-query -W -f '${Version}' libc6-dev 2>/dev/null); then
  echo "libc6-dev $version"
else
  ldd --version | head -n 1
fi
