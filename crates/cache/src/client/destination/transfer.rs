//! What is reported of one transfer, the same for every destination.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// More bytes than this fit into no kernel's buffers on the way to a server, so that it must have read some.
const BUFFERED: u64 = 16 * 1024 * 1024;

/// Counts the NAR bytes of one upload as they are sent, and of all uploads together.
#[derive(Clone, Debug, Default)]
pub struct ByteCounter {
    own: Arc<AtomicU64>,
    all: Arc<AtomicU64>,
    /// Of all uploads together, those bytes that show that the server is at work.
    progress: Arc<AtomicU64>,
    /// Whether the first bytes of this upload show nothing.
    is_doubtful: bool,
}

impl ByteCounter {
    /// A counter for another upload that adds to the same total.
    #[must_use]
    pub(crate) fn next(&self) -> Self {
        Self {
            own: Arc::default(),
            all: Arc::clone(&self.all),
            progress: Arc::clone(&self.progress),
            is_doubtful: false,
        }
    }

    /// As [`Self::next`], for an upload to a server that has left another one without a response: the kernel's buffers
    /// take a small body whether or not the server reads it.
    #[must_use]
    pub(crate) fn next_doubtful(&self) -> Self {
        Self {
            is_doubtful: true,
            ..self.next()
        }
    }

    /// NAR bytes of this upload's current try.
    pub(crate) fn sent(&self) -> u64 {
        self.own.load(Ordering::Relaxed)
    }

    /// NAR bytes of all uploads and all their tries.
    pub(crate) fn total(&self) -> u64 {
        self.all.load(Ordering::Relaxed)
    }

    /// A number that rises while the server takes bytes.
    pub(crate) fn progress(&self) -> u64 {
        self.progress.load(Ordering::Relaxed)
    }

    /// Restarts the count of this upload, for another try. The total keeps the bytes: they did travel.
    pub(in crate::client) fn reset(&self) {
        self.own.store(0, Ordering::Relaxed);
    }

    pub(in crate::client) fn add(&self, bytes: u64) {
        // No other memory depends on these counts, so no ordering is needed.
        let own = self.own.fetch_add(bytes, Ordering::Relaxed) + bytes;
        self.all.fetch_add(bytes, Ordering::Relaxed);
        if !self.is_doubtful || own > BUFFERED {
            self.progress.fetch_add(bytes, Ordering::Relaxed);
        }
    }
}

/// What the server did with an upload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Uploaded {
    Stored,
    /// The server had the NAR already, from another path or cache.
    Deduplicated,
}

/// The result of checking a NAR body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BodyCheck {
    /// The body is the NAR that the narinfo promises.
    Good,
    /// The body is another one, unreadable or missing; holds the reason.
    Bad(String),
    /// The body broke off before its end, which another try may reach; holds the reason.
    BrokenOff(String),
    /// The body has a compression that cannot be unpacked here; holds the reason.
    Unsupported(String),
}
