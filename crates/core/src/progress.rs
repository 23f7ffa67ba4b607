//! Progress events. This module owns the events and their channel; `report/` displays them.

use std::sync::Arc;

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Progress {
    /// A sentence for the log.
    Note(String),
    /// Acceleration or reporting works less well than it should. The job goes on.
    Degraded {
        /// The affected part: `cache`, `publication`, `nix settings`.
        area: &'static str,
        /// The cause and a hint in one line, never a secret.
        text: String,
    },
    /// Publishing has advanced.
    Moved {
        /// Settled paths: published, already there or failed.
        done: u64,
        /// Paths known so far.
        total: u64,
        /// NAR bytes sent so far.
        bytes: u64,
    },
}

/// Receives events. Cheap to clone; sending never blocks and never fails.
#[derive(Clone)]
pub struct Sink(Arc<dyn Fn(Progress) + Send + Sync>);

impl Sink {
    /// Every event is passed to `receive`.
    pub fn new(receive: impl Fn(Progress) + Send + Sync + 'static) -> Self {
        Self(Arc::new(receive))
    }

    /// A sink that drops all events.
    pub fn silent() -> Self {
        Self::new(|_| ())
    }

    pub fn send(&self, event: Progress) {
        (self.0)(event);
    }

    pub fn note(&self, text: impl Into<String>) {
        self.send(Progress::Note(text.into()));
    }

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
