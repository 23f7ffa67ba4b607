#!/usr/bin/env bash
# The one test command: everything that must hold before a change goes in. CI runs exactly this.
# On a fresh Debian or Ubuntu, as root, it installs what is missing first. Rust alone it cannot install where the
# distribution has no `rustup`, as on Debian 12: then it says so at once.
#
#   usage: scripts/test.sh                  all of it
#          scripts/test.sh fast|dist|real   one part: what needs no Nix; the proof of dist/; what takes root
#
# Every phase runs, even after one that failed, so that one run shows everything there is to mend.
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
cd "$root" || exit 1
exec </dev/null
export PATH=$root/target/tools/bin:$PATH:$HOME/.cargo/bin

# Where rustup cannot fetch the toolchain that rust-toolchain.toml names, another of the same version does.
pinned=$(sed -n 's/^channel = "\(.*\)"$/\1/p' rust-toolchain.toml)
if command -v rustup >/dev/null && ! cargo --version >/dev/null 2>&1; then
  for toolchain in $(rustup toolchain list --quiet); do
    case $(RUSTUP_TOOLCHAIN=$toolchain rustc --version) in "rustc $pinned "*) export RUSTUP_TOOLCHAIN=$toolchain ;; esac
  done
fi

mkdir -p target
results=$root/target/test-results.txt
: >"$results"
table=()
failed=0
# What a phase adds to its row of the table.
remark=

phase() {
  local name=$1 started=$SECONDS verdict=ok
  remark=
  shift
  printf '\n=== %s\n' "$name"
  "$@" || { verdict=FAILED && failed=1; }
  table+=("$(printf '%-44s %-6s %5d s%s' "$name" "$verdict" $((SECONDS - started)) "${remark:+  $remark}")")
  printf '=== %s: %s after %d s\n' "$name" "$verdict" $((SECONDS - started))
  [ "$verdict" = ok ]
}

# Runs a suite, and keeps nextest's summary for the end: the counts, and the tests that failed or needed a second try.
# shellcheck disable=SC2329 # `phase` calls it.
suite() {
  local log=$root/target/test-log-$1.txt verdict=0
  # With colours the summary would not be found below.
  CARGO_TERM_COLOR=never scripts/suite.sh "$@" 2>&1 | tee "$log" || verdict=1
  {
    printf '\n=== %s suite\n' "$1"
    sed -n '/^ *Summary \[/,$p' "$log"
    if grep -q '^ *FLAKY ' "$log"; then echo 'A test that is FLAKY passed on its second try: a defect to look into, of the test at least.'; fi
  } >>"$results"
  return "$verdict"
}

# Keeps what is proved and what is not: a compiler that is no longer to be had fails nothing, and must be seen.
# shellcheck disable=SC2329 # `phase` calls it.
dist_check() {
  local log=$root/target/test-log-dist.txt verdict=0
  scripts/dist-check.sh 2>&1 | tee "$log" || verdict=1
  remark=$(sed -n 's/^dist-check: //p' "$log" | head -n 1)
  return "$verdict"
}

# Tries the binary that users get, through the launcher that starts it for them.
# shellcheck disable=SC2329 # `phase` calls it.
real_suite() {
  FLYWHEEL_BIN=$root/dist/flywheel suite real
}

# The same binary on every kind of store.
# shellcheck disable=SC2329 # `phase` calls it.
matrix_sample() {
  local log=$root/target/test-log-matrix.txt verdict=0
  FLYWHEEL_BIN=$root/dist/flywheel scripts/matrix.sh --sample 2>&1 | tee "$log" || verdict=1
  {
    printf '\n=== matrix\n'
    sed -n '/^Runs of each cell/,$p' "$log"
  } >>"$results"
  return "$verdict"
}

# And on every kind of machine.
# shellcheck disable=SC2329 # `phase` calls it.
machines() {
  local log=$root/target/test-log-machines.txt verdict=0
  FLYWHEEL_BIN=$root/dist/flywheel scripts/machines.sh 2>&1 | tee "$log" || verdict=1
  {
    printf '\n=== machines\n'
    sed -n '/^What became of a job/,$p' "$log"
  } >>"$results"
  return "$verdict"
}

part=${1:-all}
case $part in
  all | fast | dist | real) ;;
  *)
    echo 'usage: scripts/test.sh [fast|dist|real]' >&2
    exit 64
    ;;
esac

wanted() { [ "$part" = all ] || [ "$part" = "$1" ]; }

if [ "$part" = fast ]; then phase 'tools' scripts/bootstrap.sh runner || exit 1; fi
if [ "$part" = real ] || [ "$part" = all ]; then phase 'tools' scripts/bootstrap.sh tools || exit 1; fi
if wanted fast; then
  phase 'format' cargo fmt --all --check
  phase 'clippy' cargo clippy --locked --quiet --workspace --all-targets -- -D warnings
  phase 'fast suite' suite fast
  phase 'linters' scripts/lint.sh
fi
if wanted dist; then phase 'dist is what the sources build' dist_check; fi
if wanted real; then
  phase 'real suite' real_suite
  phase 'smoke tests on arm64' suite arm64
  phase 'matrix: each pair of values' matrix_sample
  phase 'machines' machines
fi

title='=== summary'
case ${table[*]} in *'NOT PROVED'*) title+=': dist/ is NOT PROVED, as its row has it' ;; esac
printf '\n%s\n' "$title"
printf '%s\n' "${table[@]}"
cat "$results"
exit "$failed"
