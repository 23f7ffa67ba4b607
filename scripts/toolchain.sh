#!/usr/bin/env bash
# Prints the record of the tools that decide the bytes of a static binary, one per line.
# Two hosts with the same record build the same binary.
#
#   usage: scripts/toolchain.sh [x86_64|aarch64]   (default: x86_64)
set -euo pipefail

if [ "${1:-x86_64}" = aarch64 ]; then
  # The compilers are Debian's packages in a folder of their own.
  exec cat "$(dirname "${BASH_SOURCE[0]}")/../target/tools/arm64/packages"
fi
rustc --version
gcc --version | head -n 1
ld --version | head -n 1
if command -v dpkg-query >/dev/null && version=$(dpkg-query -W -f '${Version}' libc6-dev 2>/dev/null); then
  echo "libc6-dev $version"
else
  ldd --version | head -n 1
fi
