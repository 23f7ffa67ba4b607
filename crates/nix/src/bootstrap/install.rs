//! Installs Nix where there is none, as Debian's package, with the system's package manager.

use std::path::PathBuf;
use std::time::Duration;

use tokio::time::{Instant, MissedTickBehavior, interval};

use crate::bootstrap::{Error, Host};
use crate::tool;
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

/// Installs Nix.
///
/// # Errors
/// When this process is not root, the system is not Debian-like, or the package manager fails or
/// takes too long.
pub(super) async fn install(
    host: &Host,
    env: &Env,
    sink: &Sink,
    deadline: Instant,
) -> Result<(), Error> {
    if !host.is_root() {
        return Err(Error::Missing("that needs root"));
    }
    let apt =
        program("apt-get", host, env).ok_or(Error::Missing("this system has no `apt-get`"))?;
    sink.note("Nix is not installed: installing Debian's package `nix-bin`");
    let update = ["update", "-q"].as_slice();
    let install = ["install", "-q", "-y", "--no-install-recommends", "nix-bin"].as_slice();
    // One broken source fails the update although the others may suffice, so only the second step
    // decides.
    // The package lists of a fresh container are often empty.
    let updated = step(
        "apt-get update",
        tool(&apt, env).args(APT_OPTIONS).args(update),
        sink,
        deadline,
    )
    .await;
    if let Err(Error::Install { problem, .. }) = &updated {
        sink.note(format!("`apt-get update` {problem}"));
    }
    step(
        "apt-get install nix-bin",
        tool(&apt, env).args(APT_OPTIONS).args(install),
        sink,
        deadline,
    )
    .await
}

/// A program of the package manager.
pub(super) fn program(name: &str, host: &Host, env: &Env) -> Option<PathBuf> {
    let beside = || {
        host.system
            .iter()
            .map(|folder| folder.join(name))
            .find(|file| file.is_file())
    };
    tool::on_path(env, name).or_else(beside)
}

/// A call of such a program, in its environment.
pub(super) fn tool(program: &std::path::Path, env: &Env) -> Tool {
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
) -> Result<(), Error> {
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
    check_output(ended).map_err(|problem| Error::Install {
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
