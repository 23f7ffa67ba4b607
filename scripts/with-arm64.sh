#!/usr/bin/env bash
# Runs a command where the kernel starts arm64 programs too, in qemu-user, which by itself starts no arm64 child.
# No setting of the machine changes: the rule belongs to a user namespace of its own (Linux 6.7), and ends with it.
#
#   usage: scripts/with-arm64.sh COMMAND…
#   such as: scripts/with-arm64.sh dist/flywheel-aarch64-linux --version
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
qemu=$root/target/tools/bin/qemu-aarch64-static

fail() {
  printf 'with-arm64: %s\n' "$*" >&2
  exit 69
}

[ $# -gt 0 ] || fail 'name the command to run'
[ "$(uname -m)" != aarch64 ] || exec "$@"
[ -x "$qemu" ] || fail "\`qemu-aarch64-static\` is missing: scripts/bootstrap.sh tools unpacks it"

# The kernel opens qemu now (F), so that the rule holds in other roots too. The first bytes are those of an ELF file of
# 64 bits for this processor (0xb7), a program or a library.
rule=':arm64:M::\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00'
rule+=':\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff'
rule+=":$qemu:F"

# Only a process outside of the namespace can give it more than one user, as some tests need. This shell becomes the
# command, so that the command has its process ID, and no child.
({
  own=$(readlink /proc/self/ns/user)
  for _ in {1..500}; do
    [ "$(readlink "/proc/$$/ns/user")" = "$own" ] || break
    sleep 0.01
  done
  if [ "$(id -u)" = 0 ]; then
    for map in gid_map uid_map; do
      awk '{ print $1, $1, $3 }' "/proc/self/$map" >"/proc/$$/$map"
    done
  else
    echo deny >"/proc/$$/setgroups"
    echo "0 $(id -g) 1" >"/proc/$$/gid_map"
    echo "0 $(id -u) 1" >"/proc/$$/uid_map"
  fi
} >/dev/null </dev/null &)

# shellcheck disable=SC2016 # The inner shell expands it.
exec unshare --user --mount --propagation private bash -euc '
  rule=$1
  shift
  for _ in {1..1000}; do
    [ -z "$(cat /proc/self/uid_map)" ] || break
    sleep 0.01
  done
  # What is started before the namespace has users has no rights in it.
  exec bash -euc "
    mount -t binfmt_misc binfmt_misc /proc/sys/fs/binfmt_misc ||
      { echo \"with-arm64: this kernel has no binfmt_misc for a namespace (Linux 6.7)\" >&2 && exit 69; }
    printf %s \"\$1\" >/proc/sys/fs/binfmt_misc/register
    shift
    exec \"\$@\"
  " bash "$rule" "$@"
' bash "$rule" "$@"
