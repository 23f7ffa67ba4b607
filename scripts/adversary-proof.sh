#!/usr/bin/env bash
# Puts faults back that were mended, one at a time, and has the adversary find each within its minute.
#
#   usage: scripts/adversary-proof.sh
#
# As root. Each patch in tests/fixtures/faults names in its first line the attack that finds it. It is applied to a
# copy of the commit, whose binary the tests of this tree then try.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
cd "$root"
copy=target/adversary
build=$root/target/adversary-build

rm -rf "$copy"
mkdir -p "$copy"
git archive HEAD | tar -x -C "$copy"
git -C "$copy" init --quiet

for patch in "$root"/tests/fixtures/faults/*.patch; do
  attack=$(head -n 1 "$patch" | cut -d : -f 1)
  name=$(basename "$patch" .patch)
  git -C "$copy" apply "$patch"
  (cd "$copy" && CARGO_TARGET_DIR=$build cargo build --locked --quiet)
  log=$build/$name.log
  echo "=== $name: to be found by $attack"
  # The time is that of all four attacks, and this is one.
  if FLYWHEEL_ADVERSARY=240 FLYWHEEL_BIN=$build/debug/flywheel scripts/suite.sh real "adversary::$attack" --retries 0 >"$log" 2>&1; then
    echo "adversary-proof: $name was not found; see $log" >&2
    exit 1
  fi
  grep -m 1 -A 1 'panicked at' "$log" | cut -c 1-300
  git -C "$copy" apply --reverse "$patch"
done
rm -rf "$copy"
echo 'adversary-proof: every fault was found'
