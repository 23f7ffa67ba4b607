//! Which job a Nix process belongs to: by its ancestors, its environment or its user, as `/proc` shows them while it
//! lives.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use rustix::process::geteuid;

use super::JobScope;
use flywheel_core::policy::{Impurity, impurity_in_arguments, impurity_in_settings};

/// Ancestors to follow from a process. `/proc` is not read atomically, so a reused process id could
/// otherwise form a loop.
const DEPTH_LIMIT: usize = 4096;

/// Which job a process belongs to, as far as it still lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ProcessOwner {
    ThisJob,
    OtherJob,
    /// A daemon worker that does not show its client.
    Unattributed,
    Exited,
}

impl ProcessOwner {
    pub(super) fn of_process(pid: u32, job: &JobScope) -> Self {
        // An exited process, or a zombie, has no command line.
        let Some(arguments) = arguments(pid) else {
            return Self::Exited;
        };
        // A daemon worker belongs to the same job as its client.
        let client = match daemon_client(&arguments) {
            DaemonClient::NotADaemon => pid,
            DaemonClient::Shown(client) => client,
            DaemonClient::NotShown => return Self::Unattributed,
        };
        let us = std::process::id();
        // Flywheel's own descendants count, with or without the mark.
        let is_ours = match job {
            JobScope::Descendants => with_ancestors(client).any(|pid| pid == us),
            JobScope::Marked(mark) => {
                with_ancestors(client).any(|pid| pid == us || has_variable(pid, mark))
            }
            JobScope::User => fs::metadata(format!("/proc/{client}"))
                .is_ok_and(|found| found.uid() == geteuid().as_raw()),
        };
        if is_ours {
            Self::ThisJob
        } else {
            Self::OtherJob
        }
    }
}

/// How a process, or the client it serves, requests impure evaluation: by its arguments, or by the
/// settings in its environment.
pub(super) fn impurity_of(pid: u32) -> Option<Impurity> {
    let own = arguments(pid)?;
    let client = match daemon_client(&own) {
        DaemonClient::Shown(client) => Some(client),
        DaemonClient::NotShown | DaemonClient::NotADaemon => None,
    };
    let words = match client {
        Some(client) => arguments(client)?,
        None => own,
    };
    let environment =
        fs::read(format!("/proc/{}/environ", client.unwrap_or(pid))).unwrap_or_default();
    let config = environment
        .split(|byte| *byte == 0)
        .find_map(|pair| pair.strip_prefix(b"NIX_CONFIG="));
    impurity_in_arguments(&words)
        .or_else(|| impurity_in_settings(&String::from_utf8_lossy(config?)))
}

fn arguments(pid: u32) -> Option<Vec<String>> {
    let bytes = fs::read(format!("/proc/{pid}/cmdline"))
        .ok()
        .filter(|bytes| !bytes.is_empty())?;
    Some(
        bytes
            .split(|byte| *byte == 0)
            .map(|word| String::from_utf8_lossy(word).into_owned())
            .collect(),
    )
}

/// What a process shows of the client that it serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum DaemonClient {
    NotADaemon,
    /// The client's process id.
    Shown(u32),
    NotShown,
}

/// `nix-daemon 1234` is the process that serves client 1234 (`nix/src/nix/daemon.cc`, `daemonLoop`).
fn daemon_client(arguments: &[String]) -> DaemonClient {
    let name = arguments
        .first()
        .and_then(|name| Path::new(name).file_name()?.to_str());
    let argument = arguments
        .get(1)
        .map_or("", |argument| argument.trim_end_matches('\0'));
    let shown = match argument.parse() {
        // The client is in another process namespace, where the daemon sees no id.
        Ok(0) | Err(_) => DaemonClient::NotShown,
        Ok(client) => DaemonClient::Shown(client),
    };
    // The daemon writes the number over its own first argument, within that argument's length: a bare
    // `nix-daemon` has no room for it.
    match name {
        Some("nix-daemon") => shown,
        Some("nix") if argument == "daemon" || shown != DaemonClient::NotShown => shown,
        _ => DaemonClient::NotADaemon,
    }
}

/// Whether a process was started with this `NAME=value`. The environment of another user's process
/// cannot be read and counts as empty.
fn has_variable(pid: u32, variable: &str) -> bool {
    let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
    environment
        .split(|byte| *byte == 0)
        .any(|pair| pair == variable.as_bytes())
}

fn with_ancestors(pid: u32) -> impl Iterator<Item = u32> {
    let parent = |pid: &u32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The command name in parentheses may itself contain spaces and parentheses (`proc(5)`).
        stat.rsplit_once(')')?
            .1
            .split_whitespace()
            .nth(1)?
            .parse::<u32>()
            .ok()
            .filter(|parent| *parent > 0)
    };
    std::iter::successors(Some(pid), parent).take(DEPTH_LIMIT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_daemons_process_names_its_client() {
        let words = |words: &[&str]| {
            words
                .iter()
                .map(|word| (*word).to_owned())
                .collect::<Vec<_>>()
        };
        for (arguments, shown) in [
            (&["nix-daemon", "4242", ""][..], DaemonClient::Shown(4242)),
            (&["nix-daemon", "--daemon", ""], DaemonClient::NotShown),
            (
                &["nix-daemon", "0\0\0\0\0\0\0\0", ""],
                DaemonClient::NotShown,
            ),
            (&["nix-daemon", ""], DaemonClient::NotShown),
            (&["nix", "daemon", ""], DaemonClient::NotShown),
            (&["nix", "1234", ""], DaemonClient::Shown(1234)),
            (&["nix", "build", ""], DaemonClient::NotADaemon),
        ] {
            assert_eq!(daemon_client(&words(arguments)), shown, "{arguments:?}");
        }
        let us = std::process::id();
        assert!(with_ancestors(us).any(|pid| pid == us));
        assert!(!with_ancestors(1).any(|pid| pid == us));
    }

    #[test]
    fn a_mark_is_found_on_a_process_or_above_it() {
        let inherited = fs::read("/proc/self/environ").expect("our own");
        let variable = inherited
            .split(|byte| *byte == 0)
            .next()
            .expect("one at least");
        let variable = String::from_utf8_lossy(variable).into_owned();
        // Pid 1 cannot have the mark that follows.
        assert!(has_variable(std::process::id(), &variable), "{variable}");
        assert!(!has_variable(1, "RUNNER_TRACKING_ID=github_of_nobody"));
        assert_eq!(
            ProcessOwner::of_process(
                1,
                &JobScope::Marked("RUNNER_TRACKING_ID=github_of_nobody".into())
            ),
            ProcessOwner::OtherJob
        );
        assert_eq!(
            ProcessOwner::of_process(std::process::id(), &JobScope::User),
            ProcessOwner::ThisJob
        );
    }
}
