#!/usr/bin/env bash
# Runs one of the test suites under cargo-nextest, as the profiles in .config/nextest.toml have it.
#
#   usage: scripts/suite.sh fast [FILTER…]   no network, no Nix, seconds
#          scripts/suite.sh real [FILTER…]   real Nix, real act, real servers; as root, minutes
#          scripts/suite.sh arm64 [FILTER…]   the smoke part of the fast suite with the committed binary for arm64, in qemu
#   env:   FLYWHEEL_BIN   the binary that the real suite tries (default: the debug build)
#
# The last lines are nextest's summary. A test that passed only when it was tried again is listed there as FLAKY.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
cd "$root"

# A shell that `nohup` or `&` started ignores signals, and so does all that it starts; the tests send signals.
if [ -z "${FLYWHEEL_TEST_SIGNALS:-}" ]; then
  FLYWHEEL_TEST_SIGNALS=default exec env --default-signal "$root/scripts/suite.sh" "$@"
fi
unset FLYWHEEL_TEST_SIGNALS
exec </dev/null
# In some tests another user reads the files that the test made.
umask 022
# Nothing of the caller's own setup reaches the tests: no cache, no Nix settings, no compiler flags.
unset RUSTFLAGS CARGO_ENCODED_RUSTFLAGS ATTIC_TOKEN ATTIC_SERVER ATTIC_CACHE NIX_CONFIG
export PATH=$root/target/tools/bin:$PATH:$HOME/.cargo/bin

suite=${1-}
[ $# -eq 0 ] || shift
case $suite in
  fast)
    scripts/bootstrap.sh runner
    unset FLYWHEEL_BIN
    exec cargo nextest run --locked --workspace --lib --bins --test it "$@"
    ;;
  real)
    scripts/bootstrap.sh tools
    # Here and not in the tests, several of which would unpack at once.
    scripts/nix-versions.sh
    scripts/nix-closure.sh
    exec cargo nextest run --locked --profile real --test real --test it "$@"
    ;;
  arm64)
    # Only another processor needs qemu.
    if [ "$(uname -m)" = aarch64 ]; then scripts/bootstrap.sh runner; else scripts/bootstrap.sh tools; fi
    export FLYWHEEL_BIN=$root/dist/flywheel-aarch64-linux
    exec scripts/with-arm64.sh cargo nextest run --locked --profile arm64 --test it "$@"
    ;;
  *)
    echo 'usage: scripts/suite.sh fast|real|arm64 [FILTER…]' >&2
    exit 64
    ;;
esac
