# What a developer does here. `just` shows this menu; CI calls the same scripts.

_menu:
    @"{{ just_executable() }}" --list --unsorted

# The fast suite: no network, no Nix, seconds
test-fast *filter:
    scripts/suite.sh fast {{ filter }}

# The real suite: real Nix, real act, real servers; as root, one test at a time
test-real *filter:
    scripts/suite.sh real {{ filter }}

# The smoke part of the fast suite with the committed binary for arm64, in qemu; as root
test-arm64 *filter:
    scripts/suite.sh arm64 {{ filter }}

# Jobs on every kind of store, judged by stock Nix, as root: all 1000 runs, or `--sample`, `--cell`, `--help`
matrix *options:
    scripts/matrix.sh {{ options }}

# The demo on every kind of machine, as root: all of them, some by NAME, or `--enter NAME` for a shell on one
machines *options:
    scripts/machines.sh {{ options }}

# Kill jobs at random moments with `kill -9`, 200 times each: nothing may be lost
kills number="200":
    FLYWHEEL_KILLS={{ number }} scripts/suite.sh real killed_at_any_moment

# Attack jobs, inputs, files and the embedded cache at random, as root: ten minutes, and kills beside
adversary seconds="600":
    FLYWHEEL_ADVERSARY={{ seconds }} scripts/suite.sh real adversary:: --retries 0 --no-capture
    FLYWHEEL_KILLS=$(({{ seconds }} / 6)) scripts/suite.sh real killed_at_any_moment --retries 0 --no-capture

# Put mended faults back, one at a time: the adversary has to find each within its minute
adversary-proof:
    scripts/adversary-proof.sh

# Jobs whose cache hangs, each with its half minute, as root
faults:
    scripts/suite.sh real --ignore-default-filter slow_cache::faults install::faults

# Measure beside Nix's own tools, in release, as root: `just bench publish`
bench name:
    cargo bench --locked --bench {{ name }}

# Everything that must hold before a change goes in
test:
    scripts/test.sh

# Formatting, clippy, workflows, actions, shell scripts
lint:
    cargo fmt --all --check
    cargo clippy --locked --workspace --all-targets -- -D warnings
    scripts/lint.sh

# Build the site of docs/ into target/site
site:
    scripts/bootstrap.sh runner
    target/tools/bin/mkdocs build --strict

# Sizes, comments, words and visibility of the code, with their goals
figures *options:
    scripts/bootstrap.sh runner
    target/tools/bin/python scripts/figures.py {{ options }}

# The pictures of the summaries in docs/pictures, as root; `--check` compares them with new ones
pictures *options:
    scripts/pictures.sh {{ options }}

# Build the static binaries into dist/, or one of them: `just dist x86_64`
dist *processor:
    scripts/dist.sh {{ processor }}

# Prove that dist/ is what the sources build, byte for byte, for both processors
dist-check:
    FLYWHEEL_PROVE_ARM64=1 scripts/dist-check.sh

# Build the example, publish it to an embedded cache, show the summary
demo:
    dist/flywheel nix-job --publish --extra-nix-config 'sandbox = false' --command 'nix build path:examples/hello'
    @echo "Its cache is a folder of yours. To serve it: flywheel cache serve --dir \"${XDG_DATA_HOME:-$HOME/.local/share}/flywheel/cache\""

# Exactly what CI runs
ci:
    .ci/run
