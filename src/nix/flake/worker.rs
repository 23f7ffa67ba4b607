//! One worker of the pool: what is known of it, what it says, and why it ends.

use std::collections::VecDeque;
use std::os::unix::process::ExitStatusExt as _;
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use serde::Deserialize;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::nix::flake::evaluate::Facts;
use crate::nix::flake::pool::Task;
use crate::process::lines::{PartialLine, StreamedTool};

/// A worker that is asked to end has this long before it is killed.
const GRACE: Duration = Duration::from_millis(500);
/// Between two readings: hundreds of quick attributes a second would cost the evaluation itself a tenth if each line
/// woke somebody.
const PAUSE: Duration = Duration::from_millis(5);
/// What is kept of what a worker says beside the facts, in bytes: the last.
const SAID: usize = 256 * 1024;

/// One of our lines.
#[derive(Deserialize)]
#[serde(untagged)]
pub(super) enum Said {
    Begun { b: usize },
    Done { d: usize, f: Facts },
}

/// What is heard of a worker.
pub(super) enum Heard {
    Line(String),
    Ended(Option<ExitStatus>),
}

/// Why a worker was ended by us.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Ended {
    /// It has more than its share; what it has not done goes to others.
    Retired,
    /// All together have more than there is.
    TooLarge,
    /// Others do what it has left.
    Overtaken,
}

pub(super) struct Worker {
    pub process: u32,
    /// What it has still to do, without the one that it is at.
    pub left: VecDeque<Task>,
    pub current: Option<Task>,
    pub done: usize,
    /// It has all memory for itself.
    pub alone: bool,
    pub started: Instant,
    pub first: Option<Instant>,
    pub held: u64,
    pub most: u64,
    pub said: String,
    pub ended: Option<Ended>,
    pub stop: CancellationToken,
    pub kill: CancellationToken,
}

impl Worker {
    pub fn end(&mut self, why: Ended) {
        self.ended.get_or_insert(why);
        if why == Ended::TooLarge {
            // It would take more while it is asked.
            self.kill.cancel();
        }
        self.stop.cancel();
    }
}

/// Keeps the last of what was said.
pub(super) fn keep(said: &mut String, line: &str) {
    said.push_str(line);
    said.push('\n');
    if said.len() > SAID {
        let cut = said.ceil_char_boundary(said.len() - SAID / 2);
        said.drain(..cut);
    }
}

/// Whether it died for memory: killed by others than us, or by its own word.
pub(super) fn is_for_memory(status: Option<ExitStatus>, said: &str) -> bool {
    let killed = status.is_some_and(|status| status.signal() == Some(9));
    let word = [
        "std::bad_alloc",
        "Out of Memory",
        "out of memory",
        "Cannot allocate memory",
    ];
    killed
        || (status.is_none_or(|status| !status.success())
            && word.iter().any(|word| said.contains(word)))
}

/// Hands on what a worker says, until it has ended or is to end.
pub(super) async fn follow(
    mut tool: StreamedTool,
    id: usize,
    heard: mpsc::Sender<(usize, Heard)>,
    stop: CancellationToken,
    kill: CancellationToken,
) {
    let mut held = PartialLine::default();
    loop {
        let line = tokio::select! {
            biased;
            () = stop.cancelled() => {
                tool.stop(if kill.is_cancelled() { Duration::ZERO } else { GRACE }).await;
                // Nobody listens any more when the pool has ended.
                let _ = heard.send((id, Heard::Ended(None))).await;
                return;
            }
            line = tool.line(&mut held) => line,
        };
        match line {
            Ok(Some(line)) => {
                if heard.send((id, Heard::Line(line))).await.is_err() {
                    stop.cancel();
                }
                if !tool.has_line() {
                    tokio::select! {
                        () = stop.cancelled() => (),
                        () = tokio::time::sleep(PAUSE) => (),
                    }
                }
            }
            Ok(None) | Err(_) => break,
        }
    }
    let status = tool.ended().await.ok();
    let _ = heard.send((id, Heard::Ended(status))).await;
}
