//! Verifies that the cache serves what was published: looks each path up at the read endpoint, compares it with the
//! store's own facts, checks its signature, and reads the bodies, all of them or a sample.
//! It never repairs anything, and never exceeds its deadline.

pub(crate) mod check;
mod coverage;
pub(crate) mod sample;

use std::collections::HashSet;
use std::convert::Infallible;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures_util::{StreamExt as _, stream};
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

pub use self::coverage::{Coverage, Mode};
pub use self::sample::Seed;

use self::check::{Activity, Check};
use crate::client::destination::{Destination, Target};
use flywheel_core::retry::Policy;
use flywheel_nix::key::PublicKey;
use flywheel_nix::path_info::PathInfo;

/// Concurrent look-ups. Each is a small file, and with a distant server mostly waiting: 500 of them at 50 ms each take
/// less than a second at this width.
const LOOKUPS: usize = 32;
/// In a sample, all bodies are read up to this size of their NARs together, in bytes: about as many as a job's network
/// carries in a second or two, because they travel compressed.
const BUDGET: u64 = 256 * 1024 * 1024;
/// A server that sends nothing for this long has stalled.
const IDLE: Duration = Duration::from_secs(30);
/// The same after uploads have stalled: the job has waited for this server long enough.
const IDLE_AFTER_STALL: Duration = Duration::from_secs(2);

/// The settings of a verification.
#[derive(Clone, Debug)]
pub struct Options {
    /// The key that signatures are checked with. If it is unknown, the cache is asked for the one that it announces.
    pub key: Key,
    pub mode: Mode,
    /// Decides which bodies are in a sample.
    pub seed: Seed,
    /// In a sample, the size of all NARs, in bytes, from which on not every body is read.
    pub budget: u64,
    /// Concurrent look-ups.
    pub lookups: usize,
    /// The tries of each look-up, and the waits between them.
    pub policy: Policy,
    /// A server that sends nothing for this long has stalled, and verification ends.
    pub idle: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            key: Key::Unknown,
            mode: Mode::Sample,
            seed: Seed::random(),
            budget: BUDGET,
            lookups: LOOKUPS,
            policy: POLICY,
            idle: IDLE,
        }
    }
}

impl Options {
    /// The same after a publication: with the key that it found, and with less patience for a server on which it stalled.
    #[must_use]
    pub fn following(self, key: Key, stalled: bool) -> Self {
        Self {
            key,
            idle: if stalled {
                self.idle.min(IDLE_AFTER_STALL)
            } else {
                self.idle
            },
            ..self
        }
    }
}

/// The tries of each look-up, and the waits between them.
pub(crate) const POLICY: Policy = Policy {
    attempts: 4,
    base: Duration::from_millis(250),
    cap: Duration::from_secs(5),
};

/// The key that signatures are checked with.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Key {
    /// The key that the job's Nix trusts for this cache, from the caller.
    Given(PublicKey),
    /// From the cache itself, which proves less.
    Announced(PublicKey),
    /// No key is known, so no signature is checked.
    #[default]
    Unknown,
}

impl Key {
    /// The given key, or else the announced one.
    #[must_use]
    pub fn new(given: Option<PublicKey>, announced: Option<PublicKey>) -> Self {
        given
            .map(Self::Given)
            .or(announced.map(Self::Announced))
            .unwrap_or_default()
    }
}

/// The result of looking up one path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The cache serves the path as the store has it.
    Good {
        /// Whether the body was unpacked and hashed, too.
        body: bool,
    },
    /// The cache serves something else, or nothing; holds the reason.
    Bad(String),
    /// The path could not be looked up; holds the reason.
    Unverified(String),
}

/// The result of a verification.
#[derive(Clone, Debug)]
pub struct Verification {
    /// In the order in which the paths were given.
    pub paths: Vec<(PathInfo, Verdict)>,
    pub key: Key,
    pub mode: Mode,
    pub seed: Seed,
}

impl Verification {
    /// The number of paths with a good verdict.
    pub fn good(&self) -> u64 {
        self.paths
            .iter()
            .filter(|(_, verdict)| matches!(verdict, Verdict::Good { .. }))
            .count() as u64
    }

    /// The number of bodies that were read, or that could not be because of what the cache serves.
    pub fn bodies_read(&self) -> u64 {
        self.paths
            .iter()
            .filter(|(_, verdict)| {
                matches!(verdict, Verdict::Good { body: true } | Verdict::Bad(_))
            })
            .count() as u64
    }
}

/// Looks every path up at the read endpoint, until `deadline` or `cancel`. Paths that were not looked up by then are
/// unverified.
///
/// The work runs on a worker thread of the runtime, where responses arrive, whichever thread calls this.
pub async fn verify(
    from: impl Into<Target>,
    paths: Vec<PathInfo>,
    options: &Options,
    deadline: Instant,
    cancel: &CancellationToken,
) -> Verification {
    let (mode, seed) = (options.mode, options.seed);
    if paths.is_empty() || mode == Mode::Off {
        return Verification {
            paths: Vec::new(),
            key: options.key.clone(),
            mode,
            seed,
        };
    }
    let (from, options, cancel) = (from.into(), options.clone(), cancel.clone());
    let work =
        tokio::spawn(async move { look_up_all(&*from, paths, &options, deadline, &cancel).await });
    match AbortOnDropHandle::new(work).await {
        Ok(verification) => verification,
        // The task is never aborted while this waits for it, so the error is a panic.
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

async fn look_up_all(
    from: &dyn Destination,
    paths: Vec<PathInfo>,
    options: &Options,
    deadline: Instant,
    cancel: &CancellationToken,
) -> Verification {
    let activity = Activity::default();
    let stalled = CancellationToken::new();
    let watching = async {
        // Another program's transfers show no progress, and have limits of their own.
        if from.shows_progress() {
            activity.stalled(options.idle).await;
            stalled.cancel();
        }
        std::future::pending::<Infallible>().await
    };
    let work = async {
        let key = key(from, options, deadline, cancel, &stalled).await;
        activity.on_answer();
        let check = Check {
            from,
            policy: options.policy,
            key: &key,
            activity: &activity,
        };
        let limits = Limits {
            deadline,
            cancel,
            stalled: &stalled,
        };
        let verdicts = verdicts(&check, &paths, options, &limits).await;
        (verdicts, key)
    };
    let (verdicts, key) = tokio::select! {
        done = work => done,
        never = watching => match never {},
    };
    Verification {
        paths: paths.into_iter().zip(verdicts).collect(),
        key,
        mode: options.mode,
        seed: options.seed,
    }
}

/// What ends all checks.
struct Limits<'a> {
    deadline: Instant,
    cancel: &'a CancellationToken,
    stalled: &'a CancellationToken,
}

async fn verdicts(
    check: &Check<'_>,
    paths: &[PathInfo],
    options: &Options,
    limits: &Limits<'_>,
) -> Vec<Verdict> {
    let read: HashSet<usize> = match options.mode {
        Mode::Full => (0..paths.len()).collect(),
        _ => sample::draw(paths, options.seed, options.budget)
            .into_iter()
            .collect(),
    };
    // All look-ups share one deadline, so a server that hangs costs it once and not for each path.
    let checks: Vec<_> = paths
        .iter()
        .enumerate()
        .map(|(n, info)| {
            let fetches = read.contains(&n);
            async move {
                let described = AtomicBool::new(false);
                let unverified = |reason: &str| {
                    // In a sample, a body for which there was no time is one that was not drawn. Its path is described
                    // and signed.
                    if options.mode == Mode::Sample && described.load(Ordering::Relaxed) {
                        Verdict::Good { body: false }
                    } else {
                        Verdict::Unverified(reason.to_owned())
                    }
                };
                tokio::select! {
                    biased;
                    () = limits.cancel.cancelled() => unverified("verification was cancelled"),
                    () = limits.stalled.cancelled() => Verdict::Unverified(format!(
                        "verification stalled: nothing came from the cache for {} s",
                        options.idle.as_secs()
                    )),
                    verdict = timeout_at(limits.deadline, check.path(info, fetches, None, &described)) => {
                        verdict.unwrap_or_else(|_| unverified("the time for verification was over"))
                    }
                }
            }
        })
        .collect();
    // `buffered` keeps the order, so that each verdict belongs to its path.
    let width = check.from.concurrency().unwrap_or(options.lookups).max(1);
    stream::iter(checks).buffered(width).collect().await
}

async fn key(
    from: &dyn Destination,
    options: &Options,
    deadline: Instant,
    cancel: &CancellationToken,
    stalled: &CancellationToken,
) -> Key {
    if options.key != Key::Unknown {
        return options.key.clone();
    }
    let config = tokio::select! {
        () = cancel.cancelled() => None,
        () = stalled.cancelled() => None,
        config = timeout_at(deadline, from.describe()) => config.ok().and_then(Result::ok),
    };
    Key::new(None, config.and_then(|config| config.public_key))
}

#[cfg(test)]
mod tests;
