//! What happens while Flywheel works, as events. Owns the events and the channel, never a screen:
//! `report/` draws them.

use std::sync::Arc;

/// Something a person who watches would like to know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Progress {
    /// A sentence for the log.
    Note(String),
    /// Acceleration or reporting is worse than it should be; the job goes on.
    Degraded {
        /// What is affected, in a word or two (`cache`, `publication`, `nix settings`).
        area: &'static str,
        /// What is wrong and what to do, one line, never a secret.
        text: String,
    },
    /// A publication has moved on.
    Moved {
        /// Paths that are settled: published, already there or failed.
        done: u64,
        /// Paths known so far.
        total: u64,
        /// NAR bytes sent so far.
        bytes: u64,
    },
}

/// Where events go. Cheap to clone; sending never blocks and never fails.
#[derive(Clone)]
pub struct Sink(Arc<dyn Fn(Progress) + Send + Sync>);

impl Sink {
    /// A sink that hands every event to `receive`.
    pub fn new(receive: impl Fn(Progress) + Send + Sync + 'static) -> Self {
        Self(Arc::new(receive))
    }

    /// A sink for those who do not care.
    pub fn silent() -> Self {
        Self::new(|_| ())
    }

    /// Hands an event on.
    pub fn send(&self, event: Progress) {
        (self.0)(event);
    }

    /// Says a sentence.
    pub fn note(&self, text: impl Into<String>) {
        self.send(Progress::Note(text.into()));
    }

    /// Says that something is worse than it should be.
    pub fn degraded(&self, area: &'static str, text: impl Into<String>) {
        self.send(Progress::Degraded {
            area,
            text: text.into(),
        });
    }
}

impl std::fmt::Debug for Sink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Sink")
    }
}
