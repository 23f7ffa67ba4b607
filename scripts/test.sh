#!/usr/bin/env bash
# The one test command: everything that must hold before a change goes in. CI runs exactly this.
# On a fresh Debian 12 with Rust, as root, it installs what is missing first.
#
# Every phase runs, also after one that failed, so that one run tells all there is to mend.
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
cd "$root" || exit 1
exec </dev/null
export PATH=$root/target/tools/bin:$PATH:$HOME/.cargo/bin
# The static build must be the only one with flags of its own, and the tests the only ones with a cache.
unset RUSTFLAGS CARGO_ENCODED_RUSTFLAGS FLYWHEEL_BIN ATTIC_TOKEN ATTIC_SERVER ATTIC_CACHE NIX_CONFIG

mkdir -p target
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

# Cargo's own result lines are kept for the end.
# shellcheck disable=SC2329 # `phase` calls it.
suite() {
  local log=$root/target/test-log.txt status=0
  cargo test --locked "$@" 2>&1 | tee "$log" || status=1
  grep '^test result:' "$log" >>"$results"
  return "$status"
}

# Timing, memory and whole stores are looked at here, so one test at a time.
# shellcheck disable=SC2329 # `phase` calls it.
real_suite() {
  FLYWHEEL_BIN=$root/dist/flywheel suite --test real -- --test-threads=1
}

phase 'tools' scripts/bootstrap.sh tools || exit 1
phase 'format' cargo fmt --check
phase 'clippy' cargo clippy --locked --quiet --all-targets -- -D warnings
phase 'fast suite' suite --lib --test it
phase 'linters' scripts/lint.sh
phase 'dist is what the sources build' scripts/dist-check.sh
phase 'real suite' real_suite

printf '\n=== summary\n'
printf '%s\n' "${table[@]}"
cat "$results"
exit "$failed"
