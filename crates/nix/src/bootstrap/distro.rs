//! Installs Nix as Debian's package, with the system's package manager.

use std::path::Path;
use std::time::Duration;

use thiserror::Error;
use tokio::time::{Instant, MissedTickBehavior, interval};

use flywheel_core::progress::Sink;
use flywheel_core::text::one_line;
use flywheel_sys::process::capture::{CaptureError, Output, Tool};
use flywheel_sys::runner::env::Env;

/// Interval for log lines while a long step runs.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(5);
/// Wait this long for another installation on the machine, and retry downloads.
pub(super) const APT_OPTIONS: [&str; 4] =
    ["-o", "DPkg::Lock::Timeout=60", "-o", "Acquire::Retries=2"];
/// The folders that package scripts expect on `PATH`.
const SYSTEM_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Variables of the job that downloads may need; `apt` gets no others.
const PASSED_VARIABLES: [&str; 8] = [
    "http_proxy",
    "https_proxy",
    "no_proxy",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
    "HOME",
    "TMPDIR",
];

/// A step that did not succeed.
#[derive(Debug, Error)]
#[error("`{step}` {problem}")]
pub(super) struct StepError {
    /// The command.
    step: &'static str,
    /// Its message, on one line.
    pub(super) problem: String,
}

/// Installs Nix.
///
/// # Errors
/// When the package manager fails or takes too long.
pub(super) async fn install(
    apt: &Path,
    env: &Env,
    sink: &Sink,
    deadline: Instant,
) -> Result<(), StepError> {
    sink.note("Nix is not installed: installing Debian's package `nix-bin`");
    let update = ["update", "-q"].as_slice();
    let install = ["install", "-q", "-y", "--no-install-recommends", "nix-bin"].as_slice();
    // One broken source fails the update although the others may suffice, so only the second step
    // decides.
    // The package lists of a fresh container are often empty.
    let updated = step(
        "apt-get update",
        tool(apt, env).args(APT_OPTIONS).args(update),
        sink,
        deadline,
    )
    .await;
    if let Err(error) = &updated {
        sink.note(error.to_string());
    }
    step(
        "apt-get install nix-bin",
        tool(apt, env).args(APT_OPTIONS).args(install),
        sink,
        deadline,
    )
    .await
}

/// A call of a program of the package manager, in its environment.
pub(super) fn tool(program: &Path, env: &Env) -> Tool {
    // Package scripts need the system's folders even where the job's `PATH` lacks them.
    let path = env.get("PATH").map_or_else(
        || SYSTEM_PATH.to_owned(),
        |path| format!("{path}:{SYSTEM_PATH}"),
    );
    let kept = PASSED_VARIABLES
        .iter()
        .filter_map(|name| Some((name, env.get(name)?)));
    let tool = Tool::new(program)
        .envs(kept)
        .env("PATH", path)
        // Messages end up in our errors, so they should be in English.
        .env("LC_ALL", "C");
    tool.env("DEBIAN_FRONTEND", "noninteractive")
}

/// Runs one step and logs its progress.
pub(super) async fn step(
    name: &'static str,
    tool: Tool,
    sink: &Sink,
    deadline: Instant,
) -> Result<(), StepError> {
    let started = Instant::now();
    let mut progress = interval(PROGRESS_INTERVAL);
    progress.set_missed_tick_behavior(MissedTickBehavior::Delay);
    // The first tick fires at once; skip it.
    progress.tick().await;
    let mut run = std::pin::pin!(tool.run(deadline.saturating_duration_since(started)));
    let ended = loop {
        tokio::select! {
            ended = &mut run => break ended,
            _ = progress.tick() => sink.note(format!("`{name}` has run for {} s", started.elapsed().as_secs())),
        }
    };
    check_output(ended).map_err(|problem| StepError {
        step: name,
        problem,
    })
}

fn check_output(ended: Result<Output, CaptureError>) -> Result<(), String> {
    let output = ended.map_err(|error| match error {
        CaptureError::Deadline { limit, .. } => format!("did not end within {} s", limit.as_secs()),
        error => one_line(&error.to_string(), 300),
    })?;
    if output.status.success() {
        return Ok(());
    }
    // apt starts error lines with `E:`. Without any, its last line is the best guess.
    let marked: Vec<&str> = output
        .stderr
        .lines()
        .filter(|line| line.starts_with("E:"))
        .take(3)
        .collect();
    let reason = if marked.is_empty() {
        output.stderr.lines().last().unwrap_or_default().into()
    } else {
        marked.join(" ")
    };
    Err(format!("failed: {}", one_line(&reason, 300)))
}
