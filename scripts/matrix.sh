#!/usr/bin/env bash
# Runs jobs on every kind of store, shape and version of Nix, and has stock Nix judge what their caches are worth.
#
#   usage: scripts/matrix.sh                                 all 1000 runs
#          scripts/matrix.sh --sample                        the cells in which each pair of values meets
#          scripts/matrix.sh --cell 2.34.8/bare/twelve --seed 7   one run again; `*` stands for any value
#          scripts/matrix.sh --help                          every option
#   env:   FLYWHEEL_BIN   the binary that is tried (default: the debug build)
#
# As root: each run has a root, a /nix, processes and a network of its own. The logs of runs that fail stay in
# target/matrix, with all results in results.jsonl.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
cd "$root"
exec </dev/null
umask 022
unset RUSTFLAGS CARGO_ENCODED_RUSTFLAGS
export PATH=$PATH:$HOME/.cargo/bin

[ $# -gt 0 ] || set -- --all
scripts/nix-versions.sh
exec cargo test --locked --quiet --test matrix -- "$@"
