//! The log of `cache serve`: plain lines on stderr, as a server's log is read by people and `grep`. A thread of its own
//! writes them, so that a log that nobody reads, filled by strangers for instance, stops no client.

use std::io::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::{Instant, sleep, timeout_at};

use flywheel_core::progress::{Progress, Sink};
use flywheel_sys::runner::workflow::without_commands;

/// Lines that wait to be written; further ones are left out, and counted.
const LINES: usize = 1024;
/// How long the end of the server waits for its last lines.
const FLUSH_LIMIT: Duration = Duration::from_secs(1);
const FLUSH_PAUSE: Duration = Duration::from_millis(10);

enum Entry {
    Line(String),
    /// Everything before it has been written.
    Flushed(oneshot::Sender<()>),
}

#[derive(Clone)]
pub(super) struct Log {
    entries: SyncSender<Entry>,
    left_out: Arc<AtomicU64>,
}

impl Log {
    /// Starts the thread. It ends with the process, because a write to a full pipe may never end.
    pub(super) fn start() -> Self {
        let (entries, waiting) = sync_channel(LINES);
        let left_out = Arc::<AtomicU64>::default();
        let count = Arc::clone(&left_out);
        std::thread::spawn(move || write(&waiting, &count));
        Self { entries, left_out }
    }

    /// Where the server reports to. `quiet` leaves out all but the warnings.
    pub(super) fn sink(&self, quiet: bool) -> Sink {
        let log = self.clone();
        Sink::new(move |event| {
            let line = match event {
                Progress::Note(text) if !quiet => text,
                Progress::Degraded { area, text } => format!("warning: {area}: {text}"),
                _ => return,
            };
            let line = without_commands(&line);
            if log.entries.try_send(Entry::Line(line)).is_err() {
                log.left_out.fetch_add(1, Ordering::Relaxed);
            }
        })
    }

    /// Waits until all lines are written, for a moment.
    pub(super) async fn flush(&self) {
        let until = Instant::now() + FLUSH_LIMIT;
        let (sender, flushed) = oneshot::channel();
        let mut entry = Entry::Flushed(sender);
        while let Err(full) = self.entries.try_send(entry) {
            if Instant::now() > until {
                return;
            }
            entry = match full {
                std::sync::mpsc::TrySendError::Full(entry) => entry,
                std::sync::mpsc::TrySendError::Disconnected(_) => return,
            };
            sleep(FLUSH_PAUSE).await;
        }
        let _ = timeout_at(until, flushed).await;
    }
}

fn write(waiting: &Receiver<Entry>, left_out: &AtomicU64) {
    for entry in waiting {
        let missing = left_out.swap(0, Ordering::Relaxed);
        // A server goes on when the reader of its log is gone.
        if missing > 0 {
            let lines = flywheel_core::text::count(missing, "line");
            let text = "left out, because the log was not read";
            let _ = writeln!(std::io::stderr(), "warning: log: {lines} {text}");
        }
        match entry {
            Entry::Line(line) => {
                let _ = writeln!(std::io::stderr(), "{line}");
            }
            Entry::Flushed(sender) => {
                let _ = sender.send(());
            }
        }
    }
}
