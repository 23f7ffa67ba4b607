//! Finds processes by a variable in their environment, and waits with a limit.

use std::fs;
use std::process::{Child, ExitStatus};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// The pause between two checks of a condition.
const LOOK_AGAIN: Duration = Duration::from_millis(10);

#[derive(Clone, Debug)]
pub struct Process {
    pub id: i32,
    /// Its arguments, joined by spaces.
    pub command_line: String,
}

/// The living processes that have `variable` (`NAME=value`) in their environment.
pub fn with_variable(variable: &str) -> Vec<Process> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Some(id) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse::<i32>().ok())
        else {
            continue;
        };
        // A process that has just ended has no environment any more, and a zombie has an empty one.
        let Ok(environment) = fs::read(entry.path().join("environ")) else {
            continue;
        };
        if environment
            .split(|byte| *byte == 0)
            .any(|pair| pair == variable.as_bytes())
        {
            let arguments = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let command_line = String::from_utf8_lossy(&arguments)
                .replace('\0', " ")
                .trim()
                .to_owned();
            found.push(Process { id, command_line });
        }
    }
    found
}

/// Sends a signal; a process that is gone already is fine.
pub fn signal(id: i32, signal: Signal) {
    if let Some(pid) = Pid::from_raw(id) {
        let _ = kill_process(pid, signal);
    }
}

/// Kills every process that has `variable` in its environment, and returns them.
pub fn kill_with_variable(variable: &str) -> Vec<Process> {
    let found = with_variable(variable);
    for process in &found {
        signal(process.id, Signal::KILL);
    }
    found
}

/// Polls `condition` until the limit; whether it came true.
pub fn wait_until(limit: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + limit;
    loop {
        if condition() {
            return true;
        }
        if Instant::now() >= deadline {
            return false;
        }
        std::thread::park_timeout(LOOK_AGAIN);
    }
}

/// How a child ended, if it did so within the limit.
pub fn ended(child: &mut Child, limit: Duration) -> Option<ExitStatus> {
    let mut status = None;
    wait_until(limit, || {
        status = child.try_wait().unwrap();
        status.is_some()
    });
    status
}
