//! The peak of memory use over a span of time, by sampling: the kernel's own peak counts from the creation of the
//! control group, which may be long ago.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::task::JoinHandle;

use crate::host::memory::{Cgroup, Memory, of_descendants, without_cgroup};

/// The time between two samples. A sample reads two small files, which costs some ten microseconds.
const SAMPLE_INTERVAL: Duration = Duration::from_millis(200);

/// A span of time during which memory use is sampled.
#[derive(Debug)]
pub struct Span {
    cgroup: Option<Cgroup>,
    before: Memory,
    highest: Arc<AtomicU64>,
    sampling: JoinHandle<()>,
}

/// The memory use of a span.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Spent {
    /// The limit of the control group in bytes.
    pub limit: Option<u64>,
    /// The peak in bytes: of the control group, or of this program's descendants where there is none.
    pub peak: Option<u64>,
    /// Processes of the control group that were killed for memory during the span.
    pub killed_in_group: u64,
    /// Processes of the whole machine that were killed for memory during the span.
    pub killed_on_machine: u64,
}

impl Span {
    pub fn begin() -> Self {
        let cgroup = Cgroup::current();
        let before = read(cgroup.as_ref());
        let highest = Arc::new(AtomicU64::new(0));
        let sampling = tokio::spawn(sample(
            cgroup.clone(),
            before.limit.is_some(),
            Arc::clone(&highest),
        ));
        Self {
            cgroup,
            before,
            highest,
            sampling,
        }
    }

    /// Ends the span and gives its memory use.
    pub async fn end(self) -> Spent {
        self.sampling.abort();
        // The task always ends by the abort, so its result means nothing.
        let _ = self.sampling.await;
        let after = read(self.cgroup.as_ref());
        let highest = Some(self.highest.load(Ordering::Relaxed)).filter(|bytes| *bytes > 0);
        // The kernel's own peak misses nothing. It counts only if it rose within this span.
        let counted = after
            .peak
            .filter(|peak| after.limit.is_some() && Some(*peak) > self.before.peak);
        let grown = |after: Option<u64>, before: Option<u64>| {
            after.unwrap_or(0).saturating_sub(before.unwrap_or(0))
        };
        Spent {
            limit: after.limit,
            peak: counted.max(highest),
            killed_in_group: grown(after.killed_in_group, self.before.killed_in_group),
            killed_on_machine: grown(after.killed_on_machine, self.before.killed_on_machine),
        }
    }
}

fn read(cgroup: Option<&Cgroup>) -> Memory {
    cgroup.map_or_else(without_cgroup, Cgroup::read)
}

/// A control group without a limit is usually that of the machine or of a session, and contains more than the job. Then
/// this program's descendants are counted instead.
async fn sample(cgroup: Option<Cgroup>, limited: bool, highest: Arc<AtomicU64>) {
    let mut ticks = tokio::time::interval(SAMPLE_INTERVAL);
    loop {
        ticks.tick().await;
        let now = match &cgroup {
            Some(cgroup) if limited => cgroup.read().current.unwrap_or(0),
            _ => of_descendants(),
        };
        highest.fetch_max(now, Ordering::Relaxed);
    }
}
