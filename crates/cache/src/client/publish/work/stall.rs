//! When the publication stands still: nothing was taken and nothing answered for a time, while the job waits. It does not
//! matter then how long the job would be ready to wait.
//!
//! Bytes alone prove little: the kernels' buffers take a small body whether or not the server reads it. So once an upload
//! was left without a response, only responses count, and bytes of uploads that had begun before.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::time::{Instant, timeout};

use crate::client::destination::{ByteCounter, Error};
use crate::client::publish::plan::Id;
use crate::client::publish::work::{Health, JobResult, PublisherTask};

/// A server that is storing what it has received is asked this often whether it is still there.
const ALIVE_FOR: Duration = Duration::from_secs(10);
/// It has this long to answer. With `StallTimeout::idle` that makes less than the 35 s that a hanging server may cost.
const ALIVE_WITHIN: Duration = Duration::from_secs(4);
/// How often the counters are read, at least.
const INTERVAL: Duration = Duration::from_secs(1);

/// Whether a server that takes its time is there.
enum Liveness {
    Unknown,
    Asked,
    SeenAt(Instant),
    Gone,
}

/// An upload under way.
pub(super) struct Upload {
    counter: ByteCounter,
    size: u64,
    /// Whether the policy's look into the path is over. Until then nothing can be sent.
    pub(super) begun: Arc<AtomicBool>,
    /// When the last byte was seen to have been sent.
    whole_since: Option<Instant>,
}

/// What was seen to move.
pub(super) struct StallWatch {
    uploads: HashMap<Id, Upload>,
    /// The sum of the counters.
    seen: u64,
    /// When something moved.
    since: Instant,
    /// Whether the last upload that ended was left without a response.
    is_suspect: bool,
    liveness: Liveness,
}

impl StallWatch {
    pub(super) fn new() -> Self {
        Self {
            uploads: HashMap::new(),
            seen: 0,
            since: Instant::now(),
            is_suspect: false,
            liveness: Liveness::Unknown,
        }
    }

    /// The counter of a new upload, and what it sets once it begins to send.
    pub(super) fn begin(
        &mut self,
        id: Id,
        size: u64,
        all: &ByteCounter,
    ) -> (ByteCounter, Arc<AtomicBool>) {
        let counter = if self.is_suspect {
            all.next_doubtful()
        } else {
            all.next()
        };
        let begun = Arc::new(AtomicBool::new(false));
        let upload = Upload {
            counter: counter.clone(),
            size,
            begun: Arc::clone(&begun),
            whole_since: None,
        };
        self.uploads.insert(id, upload);
        (counter, begun)
    }

    /// An upload has ended, with this error if it failed; `waited`: whether it took as long as a server may take.
    pub(super) fn end(&mut self, id: Id, error: Option<&Error>, waited: bool) {
        self.uploads.remove(&id);
        match error {
            Some(Error::Unreachable { .. }) => self.is_suspect |= waited,
            // The server has no part in it.
            Some(Error::Local(_) | Error::Facts(_)) => self.since = Instant::now(),
            _ => {
                self.is_suspect = false;
                self.on_answer();
            }
        }
    }

    /// The policy withholds the path, so that nothing of it was sent.
    pub(super) fn withdraw(&mut self, id: Id) {
        self.uploads.remove(&id);
        self.since = Instant::now();
    }

    /// The server has answered something that it is not asked again and again.
    pub(super) fn on_answer(&mut self) {
        self.since = Instant::now();
    }

    pub(super) fn on_liveness(&mut self, answers: bool) {
        self.liveness = if answers {
            Liveness::SeenAt(Instant::now())
        } else {
            Liveness::Gone
        };
    }

    fn read(&mut self, count: u64, now: Instant) {
        if count != self.seen {
            (self.seen, self.since) = (count, now);
        }
        for upload in self.uploads.values_mut() {
            if upload.counter.sent() < upload.size {
                // A try may begin again from the start.
                upload.whole_since = None;
            } else {
                upload.whole_since.get_or_insert(now);
            }
        }
        // Looking into a path is our own work.
        if self
            .uploads
            .values()
            .any(|upload| !upload.begun.load(Ordering::Relaxed))
        {
            self.since = now;
        }
    }
}

impl PublisherTask {
    /// When to call [`Self::has_stalled`] again.
    pub(super) fn stall_check_due(&self) -> Option<Instant> {
        let interval = INTERVAL.min(self.options.stall.idle / 10);
        (self.draining.is_some() && self.to.shows_progress()).then(|| Instant::now() + interval)
    }

    /// Whether nothing has moved for too long, while the job waits for nothing else.
    pub(super) fn has_stalled(&mut self) -> bool {
        let Some(drain_began) = self.drain_began.filter(|_| self.to.shows_progress()) else {
            return false;
        };
        let now = Instant::now();
        let count = self.counter.progress() + self.activity.count();
        self.stall.read(count, now);
        let since = self.stall.since.max(drain_began).max(self.own_wait());
        if now < since + self.options.stall.idle {
            return false;
        }
        // A server that compresses and stores a NAR before it responds is slow.
        let limits = self.options.stall;
        let is_storing = self.stall.uploads.values().any(|upload| {
            upload
                .whole_since
                .is_some_and(|whole| now < whole + limits.after_last_byte(upload.size))
        });
        if !is_storing {
            return true;
        }
        match self.stall.liveness {
            Liveness::Gone => true,
            Liveness::Asked => false,
            Liveness::SeenAt(at) if now < at + ALIVE_FOR.min(limits.idle) => false,
            Liveness::SeenAt(_) | Liveness::Unknown => {
                self.stall.liveness = Liveness::Asked;
                let (to, within) = (self.to.clone(), ALIVE_WITHIN.min(limits.idle));
                self.jobs.spawn(async move {
                    let answer = timeout(within, to.answers()).await;
                    JobResult::Liveness(matches!(answer, Ok(Ok(()))))
                });
                false
            }
        }
    }

    /// Until when we wait of our own accord: a server that asked for a pause is not one that stands still. Without a
    /// response to the last upload that does not count, or each new try would be a reason to wait for longer.
    fn own_wait(&self) -> Instant {
        let waits = self.stall.uploads.is_empty()
            && !self.stall.is_suspect
            && matches!(self.health, Health::Available);
        let resumed = self.backing_off.first().map(|(until, ..)| *until);
        resumed
            .max(self.hold_until)
            .filter(|_| waits)
            .unwrap_or(self.began)
    }

    /// Gives publishing up, because nothing moves.
    pub(super) fn on_stall(&mut self) -> String {
        let text = format!(
            "publishing stalled: the cache has neither taken a byte nor answered for {} s",
            self.options.stall.idle.as_secs()
        );
        self.sink.degraded(
            "publication",
            format!(
                "{text}; the job does not wait for it any longer ({})",
                self.to.address()
            ),
        );
        text
    }
}
