//! One worker of the pool: its state, its output, and why it ends.

use std::collections::VecDeque;
use std::os::unix::process::ExitStatusExt as _;
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use serde::Deserialize;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::flake::evaluate::Derivation;
use crate::flake::pool::EvalTask;
use flywheel_sys::process::lines::{PartialLine, StreamedTool};

/// Time between SIGTERM and SIGKILL.
const GRACE: Duration = Duration::from_millis(500);
/// Pause between two reads. With hundreds of quick attributes per second, waking for every line
/// would slow the evaluation by a tenth.
const READ_INTERVAL: Duration = Duration::from_millis(5);
/// Bytes to keep of a worker's other output; the oldest are dropped.
const OUTPUT_LIMIT: usize = 256 * 1024;

/// A line traced by our expression, as `derivation_args` writes it.
#[derive(Deserialize)]
#[serde(untagged)]
pub(super) enum WorkerLine {
    Begun { b: usize },
    Done { d: usize, f: Derivation },
}

pub(super) enum WorkerEvent {
    Line(String),
    Ended(Option<ExitStatus>),
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum EndReason {
    /// It exceeded its share of memory; its remaining attributes go to others.
    Retired,
    /// All workers together exceeded the available memory.
    TooLarge,
    /// Another worker has stolen the rest of its list.
    Overtaken,
}

pub(super) struct Worker {
    pub(crate) process: u32,
    /// Its remaining attributes, without the current one.
    pub(crate) left: VecDeque<EvalTask>,
    pub(crate) current: Option<EvalTask>,
    pub(crate) done: usize,
    /// Whether it runs without other workers.
    pub(crate) alone: bool,
    pub(crate) started: Instant,
    pub(crate) first: Option<Instant>,
    pub(crate) held: u64,
    pub(crate) most: u64,
    pub(crate) output: String,
    pub(crate) ended: Option<EndReason>,
    pub(crate) stop: CancellationToken,
    pub(crate) kill: CancellationToken,
}

impl Worker {
    pub(crate) fn end(&mut self, reason: EndReason) {
        // The first reason decides what happens to the remaining tasks.
        self.ended.get_or_insert(reason);
        if reason == EndReason::TooLarge {
            // Skip the grace period, in which it would allocate more.
            self.kill.cancel();
        }
        self.stop.cancel();
    }
}

/// Appends a line and keeps only the end of a long output.
pub(super) fn keep_tail(output: &mut String, line: &str) {
    output.push_str(line);
    output.push('\n');
    if output.len() > OUTPUT_LIMIT {
        let cut = output.ceil_char_boundary(output.len() - OUTPUT_LIMIT / 2);
        output.drain(..cut);
    }
}

/// Whether it ran out of memory: killed by the kernel, or by its own message.
pub(super) fn is_for_memory(status: Option<ExitStatus>, output: &str) -> bool {
    let killed = status.is_some_and(|status| status.signal() == Some(9));
    let messages = [
        "std::bad_alloc",
        "Out of Memory",
        "out of memory",
        "Cannot allocate memory",
    ];
    killed
        // A flake may print such a text itself, so the exit status must agree.
        || (status.is_none_or(|status| !status.success())
            && messages.iter().any(|message| output.contains(message)))
}

/// Forwards a worker's lines until it ends or `stop` fires.
pub(super) async fn follow(
    mut tool: StreamedTool,
    id: usize,
    to_pool: mpsc::Sender<(usize, WorkerEvent)>,
    stop: CancellationToken,
    kill: CancellationToken,
) {
    let mut held = PartialLine::default();
    loop {
        let line = tokio::select! {
            biased;
            () = stop.cancelled() => {
                tool.stop(if kill.is_cancelled() { Duration::ZERO } else { GRACE }).await;
                // Sending fails only after the pool has ended.
                let _ = to_pool.send((id, WorkerEvent::Ended(None))).await;
                return;
            }
            line = tool.line(&mut held) => line,
        };
        match line {
            Ok(Some(line)) => {
                if to_pool.send((id, WorkerEvent::Line(line))).await.is_err() {
                    stop.cancel();
                }
                // Lines that have been read already are forwarded without a pause.
                if !tool.has_line() {
                    tokio::select! {
                        () = stop.cancelled() => (),
                        () = tokio::time::sleep(READ_INTERVAL) => (),
                    }
                }
            }
            Ok(None) | Err(_) => break,
        }
    }
    let status = tool.ended().await.ok();
    let _ = to_pool.send((id, WorkerEvent::Ended(status))).await;
}
