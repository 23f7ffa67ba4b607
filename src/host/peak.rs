//! The peak of memory use over a span of time, by looking often: the kernel's own peak counts
//! from the making of the control group, which may be long ago.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::task::JoinHandle;

use crate::host::memory::{Cgroup, Memory, of_descendants, without_cgroup};

/// How often to look: reading two small files costs some ten microseconds.
const SAMPLE_INTERVAL: Duration = Duration::from_millis(200);

/// A span of time whose memory is watched.
#[derive(Debug)]
pub struct Span {
    cgroup: Option<Cgroup>,
    before: Memory,
    seen: Arc<AtomicU64>,
    looking: JoinHandle<()>,
}

/// What happened over the span.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Spent {
    /// The limit of the control group in bytes.
    pub limit: Option<u64>,
    /// The peak in bytes: of the control group, or of our own descendants where there is none.
    pub peak: Option<u64>,
    /// Processes of the control group killed for memory during the span.
    pub killed_in_group: u64,
    /// The same over the whole machine.
    pub killed_on_machine: u64,
}

impl Span {
    /// Begins to watch.
    pub fn begin() -> Self {
        let cgroup = Cgroup::current();
        let before = read(cgroup.as_ref());
        let seen = Arc::new(AtomicU64::new(0));
        let looking = tokio::spawn(look(
            cgroup.clone(),
            before.limit.is_some(),
            Arc::clone(&seen),
        ));
        Self {
            cgroup,
            before,
            seen,
            looking,
        }
    }

    /// Ends the span and says what happened.
    pub async fn end(self) -> Spent {
        self.looking.abort();
        // It ends by being aborted, so there is nothing to learn from how.
        let _ = self.looking.await;
        let after = read(self.cgroup.as_ref());
        let seen = Some(self.seen.load(Ordering::Relaxed)).filter(|bytes| *bytes > 0);
        // The kernel's own peak is finer than looking, if it was reached within this span.
        let counted = after
            .peak
            .filter(|peak| after.limit.is_some() && Some(*peak) > self.before.peak);
        let grown = |after: Option<u64>, before: Option<u64>| {
            after.unwrap_or(0).saturating_sub(before.unwrap_or(0))
        };
        Spent {
            limit: after.limit,
            peak: counted.max(seen),
            killed_in_group: grown(after.killed_in_group, self.before.killed_in_group),
            killed_on_machine: grown(after.killed_on_machine, self.before.killed_on_machine),
        }
    }
}

fn read(cgroup: Option<&Cgroup>) -> Memory {
    cgroup.map_or_else(without_cgroup, Cgroup::read)
}

/// A group without a limit is the machine's or a session's: what it uses says nothing about the job.
async fn look(cgroup: Option<Cgroup>, limited: bool, seen: Arc<AtomicU64>) {
    let mut ticks = tokio::time::interval(SAMPLE_INTERVAL);
    loop {
        ticks.tick().await;
        let now = match &cgroup {
            Some(cgroup) if limited => cgroup.read().current.unwrap_or(0),
            _ => of_descendants(),
        };
        seen.fetch_max(now, Ordering::Relaxed);
    }
}
