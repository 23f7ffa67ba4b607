#!/usr/bin/env bash
# The one test command: everything that must hold before a change goes in. CI runs exactly this.
# On a fresh Debian 12 with Rust, as root, it installs what is missing first.
#
# Every phase runs, also after one that failed, so that one run tells all there is to mend.
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
cd "$root" || exit 1
exec </dev/null
# What is ignored when a shell begins (as `nohup` and `&` have it) stays ignored in all that it starts, and the tests
# send signals.
if [ -z "${FLYWHEEL_TEST_SIGNALS:-}" ]; then
  FLYWHEEL_TEST_SIGNALS=default exec env --default-signal "$root/scripts/test.sh"
fi
unset FLYWHEEL_TEST_SIGNALS
# Some tests have another user read what they make.
umask 022
export PATH=$root/target/tools/bin:$PATH:$HOME/.cargo/bin
# The static build must be the only one with flags of its own, and the tests the only ones with a cache.
unset RUSTFLAGS CARGO_ENCODED_RUSTFLAGS FLYWHEEL_BIN ATTIC_TOKEN ATTIC_SERVER ATTIC_CACHE NIX_CONFIG

mkdir -p target
# More failures than these are no accident.
second_goes=3
results=$root/target/test-results.txt
: >"$results"
table=()
failed=0

phase() {
  local name=$1 started=$SECONDS verdict=ok
  shift
  printf '\n=== %s\n' "$name"
  "$@" || { verdict=FAILED && failed=1; }
  table+=("$(printf '%-44s %-6s %5d s' "$name" "$verdict" $((SECONDS - started)))")
  printf '=== %s: %s after %d s\n' "$name" "$verdict" $((SECONDS - started))
  [ "$verdict" = ok ]
}

# Cargo's own result lines are kept for the end. A few tests that fail, where all others have passed, get a second go
# by themselves: what passes then does not hold up a change, but is named at the end, for it is a defect, of the test
# at least.
# shellcheck disable=SC2329 # `phase` calls it.
suite() {
  local log=$root/target/test-log.txt failures failure passed
  cargo test --locked --no-fail-fast "$@" 2>&1 | tee "$log" && passed=yes || passed=
  grep '^test result:' "$log" >>"$results"
  [ -z "$passed" ] || return 0
  # A program that died has not told of all its tests; cargo says so.
  if grep -q "process didn't exit successfully" "$log"; then return 1; fi
  # Each list ends before a result; those of tests that run tests themselves are among them.
  mapfile -t failures < <(awk '
    /^failures:$/ { count = 0; listed = 1; next }
    listed && /^    [a-z0-9_:]+$/ { names[count++] = $1 }
    /^test result:/ { for (i = 0; listed && i < count; i++) print names[i]; listed = 0 }
  ' "$log" | sort -u)
  { [ ${#failures[@]} -gt 0 ] && [ ${#failures[@]} -le "$second_goes" ]; } || return 1
  printf '\n=== a second go: %s\n' "${failures[*]}"
  cargo test --locked --no-fail-fast "$@" --exact "${failures[@]}" 2>&1 | tee "$log.again" && passed=yes
  for failure in "${failures[@]}"; do
    if [ -n "$passed" ] || grep -qxF "test $failure ... ok" "$log.again"; then
      printf 'failed at first, passed alone: %s\n' "$failure"
    else
      printf 'failed twice: %s\n' "$failure"
    fi
  done >>"$results"
  [ -n "$passed" ]
}

# Timing, memory and whole stores are looked at here, so one test at a time.
# shellcheck disable=SC2329 # `phase` calls it.
real_suite() {
  FLYWHEEL_BIN=$root/dist/flywheel suite --test real -- --test-threads=1
}

phase 'tools' scripts/bootstrap.sh tools || exit 1
phase 'format' cargo fmt --all --check
phase 'clippy' cargo clippy --locked --quiet --workspace --all-targets -- -D warnings
phase 'fast suite' suite --workspace --lib --bins --test it --
phase 'linters' scripts/lint.sh
phase 'dist is what the sources build' scripts/dist-check.sh
phase 'real suite' real_suite

printf '\n=== summary\n'
printf '%s\n' "${table[@]}"
cat "$results"
exit "$failed"
