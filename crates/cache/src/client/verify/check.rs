//! One path's check: its narinfo against the store's own facts, its signature, and its body as the cache serves it.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::{Instant, sleep};

use crate::client::destination::{Action, BodyCheck, ByteCounter, Destination, Error};
use crate::client::verify::{Key, Verdict};
use flywheel_core::retry::Policy;
use flywheel_nix::narinfo::NarInfo;
use flywheel_nix::path_info::PathInfo;

/// Counts what comes from the server, over all checks together.
#[derive(Debug, Default)]
pub(crate) struct Activity {
    bytes: ByteCounter,
    answers: AtomicU64,
}

impl Activity {
    /// A number that rises with each byte of a body and with each answer.
    pub(crate) fn count(&self) -> u64 {
        self.bytes.progress() + self.answers.load(Ordering::Relaxed)
    }

    pub(crate) fn on_answer(&self) {
        self.answers.fetch_add(1, Ordering::Relaxed);
    }

    /// Ends when nothing has come for this long.
    pub(crate) async fn stalled(&self, idle: Duration) {
        let (mut seen, mut since) = (self.count(), Instant::now());
        loop {
            let left = idle.saturating_sub(since.elapsed());
            if left.is_zero() {
                return;
            }
            // The counters cannot wake this task, so they are read now and then.
            sleep(left.min(Duration::from_secs(1))).await;
            let count = self.count();
            if count != seen {
                (seen, since) = (count, Instant::now());
            }
        }
    }
}

/// Checks paths.
pub(crate) struct Check<'a> {
    pub(crate) from: &'a dyn Destination,
    /// The tries of each look-up, and the waits between them.
    pub(crate) policy: Policy,
    pub(crate) key: &'a Key,
    pub(crate) activity: &'a Activity,
}

/// Why a try has failed.
enum Failed {
    LookUp(Error),
    /// The narinfo is there and good, and its body could not be fetched.
    Body(Error),
    /// The body broke off; holds the reason.
    BrokenOff(String),
}

impl Check<'_> {
    /// Checks a path. `known` is its narinfo, if it has been looked up already; `described` becomes true once the narinfo
    /// is known to be good.
    pub(crate) async fn path(
        &self,
        info: &PathInfo,
        fetches: bool,
        mut known: Option<NarInfo>,
        described: &AtomicBool,
    ) -> Verdict {
        let mut tries = 0;
        loop {
            tries += 1;
            let (verdict, after) = match self.once(info, fetches, known.take(), described).await {
                // A cache with several replicas may need a moment until all of them have the path.
                Ok(None) => (Verdict::Bad("the cache does not serve it".to_owned()), None),
                Ok(Some(verdict)) => return verdict,
                Err(Failed::BrokenOff(reason)) => (Verdict::Bad(reason), None),
                Err(Failed::LookUp(error) | Failed::Body(error))
                    if error.action() == Action::Stop =>
                {
                    // A token may push without the right to read, so this is not held against the cache.
                    return Verdict::Unverified(format!("it may not be read: {error}"));
                }
                Err(Failed::LookUp(error)) => match error.action() {
                    Action::Retry { after, .. } => (Verdict::Unverified(error.to_string()), after),
                    _ => return Verdict::Bad(error.to_string()),
                },
                Err(Failed::Body(error)) => match error.action() {
                    Action::Retry { after, .. } => (without_body(&error), after),
                    _ => return Verdict::Bad(error.to_string()),
                },
            };
            match self.policy.wait(tries, after) {
                Some(wait) => sleep(wait).await,
                None => return verdict,
            }
        }
    }

    /// `None` if the cache lacks the path.
    async fn once(
        &self,
        info: &PathInfo,
        fetches: bool,
        known: Option<NarInfo>,
        described: &AtomicBool,
    ) -> Result<Option<Verdict>, Failed> {
        let served = match known {
            Some(served) => served,
            None => match self
                .answered(self.from.look_up(&info.path).await)
                .map_err(Failed::LookUp)?
            {
                Some(served) => served,
                None => return Ok(None),
            },
        };
        // The body is fetched only if its description is right.
        if let Some(difference) = difference(info, &served, self.key) {
            return Ok(Some(Verdict::Bad(difference)));
        }
        described.store(true, Ordering::Relaxed);
        if !fetches {
            return Ok(Some(Verdict::Good { body: false }));
        }
        let body = self.from.check_body(&served, &self.activity.bytes).await;
        Ok(Some(match self.answered(body).map_err(Failed::Body)? {
            BodyCheck::Good => Verdict::Good { body: true },
            BodyCheck::Bad(reason) => Verdict::Bad(reason),
            BodyCheck::BrokenOff(reason) => return Err(Failed::BrokenOff(reason)),
            // The narinfo was good, and nothing is known against the body.
            BodyCheck::Unsupported(_) => Verdict::Good { body: false },
        }))
    }

    fn answered<T>(&self, result: Result<T, Error>) -> Result<T, Error> {
        if !matches!(result, Err(Error::Unreachable { .. })) {
            self.activity.on_answer();
        }
        result
    }
}

/// The verdict on a path that is described well, if no later try brings its body.
fn without_body(error: &Error) -> Verdict {
    match error {
        // The server has just described the NAR, so that it is up: it lacks the body, or a part of it. Attic answers 500
        // for a chunk that its storage has lost, and 503 (`IncompleteNar`) for one that its database has lost.
        Error::Busy {
            status: 500 | 503, ..
        } => Verdict::Bad(format!(
            "its narinfo is there, but its NAR cannot be fetched: {error}"
        )),
        error => Verdict::Unverified(error.to_string()),
    }
}

/// The first difference between what the cache serves and what the store has, if any.
fn difference(info: &PathInfo, served: &NarInfo, key: &Key) -> Option<String> {
    if served.path != info.path {
        return Some(format!("the cache serves `{}` in its place", served.path));
    }
    if served.nar_hash != info.nar_hash {
        return Some(format!(
            "the cache serves NAR hash {} instead of {}",
            served.nar_hash, info.nar_hash
        ));
    }
    if served.nar_size != info.nar_size {
        return Some(format!(
            "the cache serves NAR size {} instead of {}",
            served.nar_size, info.nar_size
        ));
    }
    // As sets: a server may store the references in another order.
    let sorted = |paths: &[flywheel_nix::store_path::StorePath]| {
        let mut paths = paths.to_vec();
        paths.sort_unstable();
        paths.dedup();
        paths
    };
    if sorted(&served.references) != sorted(&info.references) {
        return Some("the cache serves other references than the store has".to_owned());
    }
    match key {
        Key::Given(key) | Key::Announced(key) if !served.signed_by(key) => {
            let names = served
                .signatures
                .iter()
                .filter_map(|signature| signature.split(':').next());
            let names: Vec<&str> = names.collect();
            Some(match names.as_slice() {
                [] => "the cache serves it without a signature".to_owned(),
                names if names.contains(&key.name()) => {
                    format!(
                        "its signature by `{}` is not one of the given key, so that Nix refuses it",
                        key.name()
                    )
                }
                names => format!(
                    "it is signed by `{}` and not by `{}`",
                    names.join("`, `"),
                    key.name()
                ),
            })
        }
        _ => None,
    }
}
