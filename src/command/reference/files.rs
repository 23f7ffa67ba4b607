//! What is written where, and when it goes: the part of the reference about files.

use std::fmt::Write as _;

use crate::report::canary::METRICS;

/// Each place, what is there, and when it goes. `UID` stands for the number of the job's user. The folders for state, cache
/// and data follow `XDG_STATE_HOME`, `XDG_CACHE_HOME` and `XDG_DATA_HOME`.
const FILES: [(&str, &str, &str); 13] = [
    (
        "`flywheel-UID/` in `$RUNNER_TEMP`, elsewhere in `$XDG_RUNTIME_DIR`, `$TMPDIR` or `/tmp`",
        "Of a run: the netrc, Nix's settings, sockets, sometimes a bundle of certificates (0700).",
        "With the run, on every way out. What a killed one left, the next run removes.",
    ),
    (
        "`flywheel-UID/watch-…/` there",
        "Of `watch-store`: the control socket, the log, the settings of later steps.",
        "With `finish`, or when the process ends.",
    ),
    (
        "`flywheel-UID/home` there",
        "A home for a job that has none, or none that can be written to.",
        "Never by itself.",
    ),
    (
        "`~/.local/state/flywheel/journal/` (input `journal`)",
        "A file for each job with the paths that it has to publish, and in `jobs/` the registry of the host's jobs.",
        "With the job, if nothing is left to send. Otherwise by the job that takes it up, or after 14 days.",
    ),
    (
        "`~/.local/state/flywheel/image/` (input `history`)",
        "What builds of images used, and what was approved: a file for each workspace.",
        "Never by itself. A file keeps the newest 1000 runs.",
    ),
    (
        "`~/.cache/flywheel/evaluation/` (input `evaluation-memory-folder`)",
        "What outputs of flakes evaluate to.",
        "Never by itself; it can be deleted at any time.",
    ),
    (
        "`~/.cache/flywheel/release/`, elsewhere `$RUNNER_TEMP/flywheel/release/`",
        "Binaries that the launcher has taken from a release, by their sums (0700).",
        "A month after its last use, when another one is taken.",
    ),
    (
        "`~/.local/share/flywheel/cache/` (input `embedded-cache`)",
        "The embedded cache: NARs, narinfos, its signing key, its tokens.",
        "By the limits of `cache serve` and `cache gc`.",
    ),
    (
        "`$RUNNER_TOOL_CACHE/flywheel-UID/rootless/`, elsewhere `~/.local/state/flywheel/rootless/`",
        "The store of a user who can have none at `/nix`.",
        "Never by itself: `chmod -R u+w FOLDER && rm -rf FOLDER`.",
    ),
    (
        "`~/.config/flywheel/login/netrc` (0600 in a folder 0700)",
        "The tokens that `flywheel cache login` keeps.",
        "With `flywheel cache login ADDRESS --undo`.",
    ),
    (
        "`/nix/`, with `/nix/var/flywheel/installed.json`",
        "A Nix that was installed, and the list of what that put there.",
        "With `flywheel setup --undo`.",
    ),
    (
        "`$GITHUB_OUTPUT`, `$GITHUB_ENV`, `$GITHUB_PATH`, `$GITHUB_STEP_SUMMARY`",
        "Outputs, settings for later steps, the summary. No secret.",
        "With the job, by the runner.",
    ),
    (
        "what an input names: `junit`, `json-lines`, `metrics-file`, `bazelrc`",
        "The report that the input asks for.",
        "Never by itself.",
    ),
];

/// The sections about files and metrics.
pub(super) fn page() -> String {
    let mut text = "## Files\n\nWhat is written where, and when it goes. No service is installed, no file of a shell is \
                    changed, and Nix's own `nix.conf` is written to by `flywheel cache use --write` alone.\n\n| where | what | until when |\n|---|---|---|\n"
        .to_owned();
    for (place, what, until) in FILES {
        let _ = writeln!(text, "| {place} | {what} | {until} |");
    }
    text.push_str(
        "\n## Metrics\n\nWhat `validate-builders` writes to `metrics-file` and sends to `pushgateway`, in Prometheus's text \
         format. Each has the labels `class` and `lane`.\n\n| metric | meaning |\n|---|---|\n",
    );
    for (name, help) in METRICS {
        let _ = writeln!(text, "| `{name}` | {help} |");
    }
    text
}
