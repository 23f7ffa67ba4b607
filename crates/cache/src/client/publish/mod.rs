//! The publisher: accepts paths while the build runs, and drains at its end. It never decides whether to publish:
//! starting it requires a permit.
//!
//! One task owns all state and never waits for the network: queries and uploads are jobs of their own, bounded in
//! number, and all of them end before the publisher does.

mod concurrency;
mod outcome;
mod plan;
mod upstream;
mod work;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

pub use self::outcome::{Counts, Final, Outcome, PathOutcome, Served, Skip, Withheld};
pub use self::work::Recheck;

pub use self::upstream::Upstream;
use self::work::PublisherTask;
use crate::client::attic::StallTimeout;
use crate::client::destination::{CacheConfig, Target};
use crate::client::inspect::Inspector;
use crate::client::journal::Journal;
use flywheel_core::progress::Sink;
use flywheel_core::retry::Policy;
use flywheel_core::trust::PublishPermit;
use flywheel_nix::path_info::PathInfo;
use flywheel_nix::store_path::STORE_DIR;

/// Offers in the channel. The task receives them at once, so it is never full for long.
const OFFERS: usize = 64;

/// The publisher's settings. The default is meant for a job.
#[derive(Clone, Debug)]
pub struct Options {
    /// Paths that an upstream cache has signed are not published.
    pub upstream: Upstream,
    /// The cache's description, if the probe has already fetched it.
    pub config: Option<CacheConfig>,
    /// The folder of the store paths on disk, which for a chroot store is not `/nix/store`.
    pub store: PathBuf,
    /// The tries of each path, and the waits between them.
    pub policy: Policy,
    /// The limit of concurrent uploads at the start.
    pub initial_uploads: usize,
    /// The highest limit of concurrent uploads.
    pub max_uploads: usize,
    /// The limit of concurrent large uploads, so that small ones are not held up.
    pub large_uploads: usize,
    /// After this long without a new path, the cache is queried for the offered ones.
    pub debounce: Duration,
    /// After this long the cache is queried even while more paths are offered.
    pub max_delay: Duration,
    /// The longest wait between two checks of an unavailable server.
    pub max_check_interval: Duration,
    /// During the drain, publishing is given up when the server has been unavailable for this long.
    pub give_up_after: Duration,
    /// Records the planned and uploaded paths.
    pub journal: Journal,
    /// Applies the publication policy to each path before it is sent.
    pub inspector: Option<Arc<Inspector>>,
    /// Checks paths that the cache had already, and has them sent anew if they are damaged.
    pub recheck: Option<Recheck>,
    /// During the drain, publishing is given up when nothing moves for this long.
    pub stall: StallTimeout,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            upstream: Upstream::default(),
            config: None,
            store: STORE_DIR.into(),
            // A server that fails every third time loses one path in thousands at eight tries.
            policy: Policy {
                attempts: 8,
                ..Policy::CACHE
            },
            initial_uploads: 4,
            max_uploads: 16,
            large_uploads: 2,
            // While a build adds paths without a pause, the store watcher reports them in batches that are farther
            // apart than `debounce`, so each batch is one query. `max_delay` is for callers that offer without a pause.
            debounce: Duration::from_millis(5),
            max_delay: Duration::from_millis(200),
            max_check_interval: Duration::from_secs(5),
            give_up_after: Duration::from_secs(60),
            journal: Journal::default(),
            inspector: None,
            recheck: None,
            stall: StallTimeout::default(),
        }
    }
}

enum Command {
    Offer(Vec<PathInfo>),
    StallAfter(Duration),
    Served(oneshot::Sender<Vec<Served>>),
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
    /// Starts the task. It checks at once, in the background, whether the token may push.
    #[must_use]
    pub fn start(
        _permit: &PublishPermit,
        to: impl Into<Target>,
        options: Options,
        sink: Sink,
    ) -> Self {
        let (commands, receiver) = mpsc::channel(OFFERS);
        let task = tokio::spawn(Box::pin(
            PublisherTask::new(to.into(), options, sink).run(receiver),
        ));
        Self {
            commands,
            task: AbortOnDropHandle::new(task),
        }
    }

    /// Adds paths to publish, at any time. Offering a path again changes nothing. A path is sent only after everything
    /// that it refers to is in the cache, signed upstream or sent: so offer complete closures, in one call or in
    /// several, in any order.
    pub async fn offer(&self, infos: Vec<PathInfo>) {
        // The task has gone only after a panic, which `drain` reports.
        let _ = self.commands.send(Command::Offer(infos)).await;
    }

    /// From now on, nothing may stand still or be unavailable for longer than this: for a server that has cost the job its
    /// time already.
    pub async fn stall_after(&self, idle: Duration) {
        // As in `offer`.
        let _ = self.commands.send(Command::StallAfter(idle)).await;
    }

    /// The offered paths that are settled well by now: sent, there already, or signed upstream.
    pub async fn served(&self) -> Vec<Served> {
        let (answer, served) = oneshot::channel();
        // As in `offer`.
        let _ = self.commands.send(Command::Served(answer)).await;
        served.await.unwrap_or_default()
    }

    /// Publishes the remaining paths, small ones first, until `deadline`; `cancel` ends it at once. The outcome has
    /// every path that was offered.
    pub async fn drain(self, deadline: Instant, cancel: CancellationToken) -> Outcome {
        // As in `offer`.
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
mod repair_tests;
#[cfg(test)]
mod stall_tests;
#[cfg(test)]
mod tests;
