#!/bin/sh
# A shell, or a command, on a machine: as its user, in the environment of a job. `scripts/machines.sh --enter` calls it.
#
#   usage: by-hand.sh MACHINE [COMMAND…]
#   env:   FLYWHEEL_BIN   the binary that is /fly/flywheel there (default: the debug build)
set -eu
here=$(cd "$(dirname "$0")" && pwd -P)
machine=$1
shift
[ $# -gt 0 ] || set -- sh
out=$(mktemp -d)
code=0
unshare --mount --pid --fork --net --ipc --uts --kill-child --propagation private sh "$here/enter.sh" "$machine" \
  "${FLYWHEEL_BIN:-$here/../../../target/debug/flywheel}" "$out" /guest/run.sh hand "$@" || code=$?
rm -rf "$out"
exit "$code"
