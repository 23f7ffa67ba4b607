//! The publisher: takes paths while the build runs, and drains at its end. Never decides whether
//! to publish: it cannot be started without a permit.
//!
//! One task owns all state and never waits for the network: questions and uploads are jobs of
//! their own, bounded in number, and all of them are ended before the publisher is.

mod concurrency;
mod outcome;
mod plan;
mod work;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

pub use self::outcome::{Counts, Final, Outcome, Settled, Skip, Withheld};

use self::work::Work;
use crate::client::attic::CacheConfig;
use crate::client::destination::Target;
use crate::client::inspect::Inspector;
use crate::client::journal::Journal;
use flywheel_core::progress::Sink;
use flywheel_core::retry::Policy;
use flywheel_core::trust::PublishPermit;
use flywheel_nix::path_info::PathInfo;
use flywheel_nix::store_path::STORE_DIR;

/// Offers that may wait; the task takes them at once, so that this is never full for long.
const OFFERS: usize = 64;

/// How the publisher goes about it. The default is right for a job.
#[derive(Clone, Debug)]
pub struct Options {
    /// Keys of caches upstream, by name: what they have signed is not published. The cache's own
    /// list is added.
    pub upstream_keys: Vec<String>,
    /// What the cache says of itself, where the probe has asked already.
    pub config: Option<CacheConfig>,
    /// The folder where store paths lie on disk, which for a chroot store is not `/nix/store`.
    pub store: PathBuf,
    /// Tries of each path, and the waits between.
    pub policy: Policy,
    /// Uploads at once in the beginning.
    pub uploads: usize,
    /// Uploads at once at most.
    pub most_uploads: usize,
    /// Large uploads at once, so that small ones flow beside them.
    pub large_uploads: usize,
    /// Without a new path for this long, the cache is asked about those that came.
    pub quiet: Duration,
    /// After this long it is asked in any case.
    pub longest: Duration,
    /// How long a server that is away is left alone between two looks at it, at most.
    pub revisit: Duration,
    /// When nothing but a server that is away is waited for, it is waited for this long.
    pub give_up: Duration,
    /// Where it is written down what was planned and sent.
    pub journal: Journal,
    /// Who looks at each path before it goes, if anybody does.
    pub inspector: Option<Arc<Inspector>>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            upstream_keys: vec!["cache.nixos.org-1".to_owned()],
            config: None,
            store: STORE_DIR.into(),
            // A server that fails every third time loses one path in thousands at eight tries.
            policy: Policy {
                attempts: 8,
                ..Policy::CACHE
            },
            uploads: 4,
            most_uploads: 16,
            large_uploads: 2,
            // The watcher tells of a build that never pauses at a pace slower than `quiet`, so that each of its
            // batches is asked about by itself; `longest` is for whoever offers without a pause.
            quiet: Duration::from_millis(5),
            longest: Duration::from_millis(200),
            revisit: Duration::from_secs(5),
            give_up: Duration::from_secs(60),
            journal: Journal::default(),
            inspector: None,
        }
    }
}

enum Command {
    Offer(Vec<PathInfo>),
    Drain {
        deadline: Instant,
        cancel: CancellationToken,
    },
}

/// A running publisher. Dropping it ends it at once; draining is how it should end.
#[derive(Debug)]
pub struct Publisher {
    commands: mpsc::Sender<Command>,
    task: AbortOnDropHandle<Outcome>,
}

impl Publisher {
    /// Starts: the cache is asked at once whether we may push, while the build goes on.
    #[must_use]
    pub fn start(
        _permit: &PublishPermit,
        to: impl Into<Target>,
        options: Options,
        sink: Sink,
    ) -> Self {
        let (commands, receiver) = mpsc::channel(OFFERS);
        let task = tokio::spawn(Box::pin(Work::new(to.into(), options, sink).run(receiver)));
        Self {
            commands,
            task: AbortOnDropHandle::new(task),
        }
    }

    /// Hands paths on, at any time. Offering a path again changes nothing. A path goes only when
    /// everything it refers to is in the cache, signed upstream or sent: so offer closures, in
    /// one call or in several, in any order.
    pub async fn offer(&self, infos: Vec<PathInfo>) {
        // It is gone only after a panic, which `drain` reports.
        let _ = self.commands.send(Command::Offer(infos)).await;
    }

    /// Publishes what is left, small paths first, until `deadline`; `cancel` ends it at once.
    /// Every path that was offered is in the outcome.
    pub async fn drain(self, deadline: Instant, cancel: CancellationToken) -> Outcome {
        // As above.
        let _ = self
            .commands
            .send(Command::Drain { deadline, cancel })
            .await;
        self.task.await.unwrap_or_else(|error| Outcome {
            stopped: Some(format!(
                "a fault in Flywheel itself ended the publisher ({error})"
            )),
            ..Outcome::default()
        })
    }
}

#[cfg(test)]
mod tests;
