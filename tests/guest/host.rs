//! The host's side of a guest, for the matrix and the machines: which binary is tried, and a command with a deadline.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

const POLL_INTERVAL: Duration = Duration::from_millis(20);

pub(crate) fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The binary itself: `FLYWHEEL_BIN`, or the one beside it where that is the launcher; else the debug build.
pub(crate) fn binary() -> PathBuf {
    let named = std::env::var_os("FLYWHEEL_BIN").map_or_else(
        || PathBuf::from(env!("CARGO_BIN_EXE_flywheel")),
        PathBuf::from,
    );
    if std::fs::read(&named).is_ok_and(|bytes| bytes.starts_with(b"#!")) {
        return named.with_file_name("flywheel-x86_64-linux");
    }
    named
}

/// Runs `unshare` to its end, or ends it after so long. `what` it runs is named where it did not end well.
pub(crate) fn finish(command: &mut Command, deadline: Duration, what: &str) -> Result<(), String> {
    let mut child = command
        .spawn()
        .unwrap_or_else(|error| panic!("`unshare`: {error}; apt-get install util-linux"));
    let end = Instant::now() + deadline;
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return match status.success() {
                true => Ok(()),
                false => Err(format!("the {what} ended with {status}")),
            };
        }
        if Instant::now() > end {
            child.kill().unwrap();
            child.wait().unwrap();
            return Err(format!("not over after {} s", deadline.as_secs()));
        }
        std::thread::sleep(POLL_INTERVAL);
    }
}
