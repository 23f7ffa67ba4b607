//! Finds processes that a finished command has left behind, by group and by descent, and ends them.

use std::time::Duration;

use rustix::process::{
    Pid, Signal, WaitOptions, getpid, kill_process, kill_process_group, test_kill_process, waitpid,
};
use tokio::time::{Instant, sleep};

use crate::process::own;

/// The time between `SIGTERM` and `SIGKILL` for left-over processes.
const GRACE: Duration = Duration::from_millis(500);
const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// Makes this process the parent of its descendants' orphans, so that even those that have left the command's process
/// group can be found.
pub(crate) fn adopt() {
    // Linux alone has this, since 3.4. Without it only the group is found, which is most of them.
    #[cfg(target_os = "linux")]
    let _ = rustix::process::set_child_subreaper(Some(getpid()));
}

/// What a finished command had left behind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ended {
    pub(crate) found: usize,
    /// Those that could not be ended, such as another user's.
    pub(crate) alive: usize,
}

/// Ends the rest of `group` and all adopted processes, except those that this program started for itself.
pub(crate) async fn end(group: Option<Pid>) -> Ended {
    let mut left = leftovers(group);
    if left.is_empty() {
        return Ended::default();
    }
    let found = left.len();
    signal(group, &left, Signal::TERM);
    let deadline = Instant::now() + GRACE;
    while !left.is_empty() && Instant::now() < deadline {
        sleep(POLL_INTERVAL).await;
        reap(&left);
        left = leftovers(group);
    }
    // Killing a process makes its children ours, so the search is repeated until nothing is left.
    let deadline = Instant::now() + GRACE;
    while !left.is_empty() && Instant::now() < deadline {
        signal(group, &left, Signal::KILL);
        sleep(POLL_INTERVAL).await;
        reap(&left);
        left = leftovers(group);
    }
    Ended {
        found,
        alive: left.len(),
    }
}

fn signal(group: Option<Pid>, left: &[Pid], signal: Signal) {
    if let Some(group) = group {
        // It fails for a group that is already gone.
        let _ = kill_process_group(group, signal);
    }
    for pid in left {
        let _ = kill_process(*pid, signal);
    }
}

/// Reaps only these processes: the runtime reaps the children that it started, and needs their exit status.
fn reap(pids: &[Pid]) {
    for pid in pids {
        let _ = waitpid(Some(*pid), WaitOptions::NOHANG);
    }
}

/// The living processes of the group, and the children that this program did not start.
fn leftovers(group: Option<Pid>) -> Vec<Pid> {
    let started = own::started();
    let us = getpid().as_raw_nonzero().get();
    let group = group.map(|pid| pid.as_raw_nonzero().get());
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let left = pids
        .filter(|pid| *pid != us && !u32::try_from(*pid).is_ok_and(|pid| started.contains(&pid)));
    left.filter_map(|pid| {
        let stat = Stat::read(pid)?;
        let ours = Some(stat.group) == group || stat.parent == us;
        (ours && !stat.dead).then(|| Pid::from_raw(pid)).flatten()
    })
    // A process that cannot be signalled, such as another user's, cannot be ended either.
    .filter(|pid| test_kill_process(*pid).is_ok())
    .collect()
}

/// The fields of `/proc/PID/stat` that matter here (`proc_pid_stat(5)`).
struct Stat {
    parent: i32,
    group: i32,
    dead: bool,
}

impl Stat {
    fn read(pid: i32) -> Option<Self> {
        Self::parse(&std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
    }

    fn parse(text: &str) -> Option<Self> {
        // The name is in parentheses and may itself contain parentheses, so the last one ends it.
        let (_, rest) = text.rsplit_once(')')?;
        let mut words = rest.split_whitespace();
        let dead = matches!(words.next()?, "Z" | "X");
        Some(Self {
            parent: words.next()?.parse().ok()?,
            group: words.next()?.parse().ok()?,
            dead,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_parentheses_does_not_confuse() {
        let stat = Stat::parse("12 (a) b) c) S 7 12 12 0 -1").expect("well formed");
        assert_eq!((stat.parent, stat.group, stat.dead), (7, 12, false));
    }
}
