//! The stores that a job uses and that nothing is published from, because they can be neither watched nor read. Each is
//! named when the job begins, counted at its end, and fails it under `require-publish`.

use std::sync::{Mutex, MutexGuard};

use super::added_paths::AddedPaths;
use super::begin::Session;
use crate::report::publication::Missed;
use flywheel_nix::store::{self, Store};
use flywheel_nix::store_location::{is_same_store, relative_remote, shown};
use flywheel_nix::tool::Nix;

/// The stores that are not watched. It is shared, since they are found at several points of a job.
#[derive(Debug, Default)]
pub(crate) struct NotWatched(Mutex<Vec<Missed>>);

impl NotWatched {
    fn stores(&self) -> MutexGuard<'_, Vec<Missed>> {
        self.0
            .lock()
            .expect("nothing panics while it holds this lock")
    }
}

impl Session<'_> {
    /// Whether a store that is not watched keeps the job from what it was asked to do. A job that only reads from the
    /// cache misses nothing.
    fn is_to_publish(&self) -> bool {
        self.decision.is_refused() || self.decision.publishes()
    }

    /// The stores that are not watched, with the reasons.
    pub(crate) fn not_watched(&self) -> Vec<Missed> {
        self.not_watched.stores().clone()
    }

    /// Names a store that is not watched, once, with a warning. `remedy` is a sentence.
    fn record_not_watched(&self, store: &str, reason: &str, remedy: &str) {
        let mut stores = self.not_watched.stores();
        if stores.iter().any(|known| known.path == store) {
            return;
        }
        let text = format!("{store}: {reason}, so nothing in it is counted or published. {remedy}");
        self.sink.degraded("not watched", text.trim_end());
        if self.is_to_publish() {
            stores.push(Missed {
                path: store.to_owned(),
                reason: reason.to_owned(),
            });
        }
    }

    /// Names the stores that the command names for itself, unless they are the job's own. What is built in them cannot
    /// be watched from the start: often they do not exist yet.
    pub(super) fn record_named_stores(&self, nix: &Nix, own: &Store) {
        // A job that does not publish has nothing to miss in them.
        if !self.is_to_publish() {
            return;
        }
        // The command runs in a folder of its own, where a relative name is another store.
        let remote = relative_remote(nix);
        let named = self.plan.named_stores.iter().map(String::as_str);
        for named in named.chain(remote) {
            let is_own = own.location().is_ok_and(|own| {
                let folder = self.plan.destination.folder.as_path();
                is_same_store(nix, own, named, folder)
            });
            if !is_own {
                let reason = "the command uses it, and the job's own store alone is watched";
                let remedy = "Name it for the whole job: `NIX_REMOTE` in the environment, or `store` in `extra-nix-config`.";
                self.record_not_watched(&format!("`{}`", shown(named)), reason, remedy);
            }
        }
    }

    /// Names the job's own store, which could not be opened or marked.
    pub(super) fn record_unwatched_store(&self, error: &store::Error) {
        self.record_not_watched("the job's store", &error.to_string(), remedy(error));
    }

    /// Names the job's own store, which could not be read at the end.
    pub(super) fn record_unread_store(&self, problem: &str, remedy: &str) -> AddedPaths {
        let reason = format!("it could not be read at the end: {problem}");
        self.record_not_watched("the job's store", &reason, remedy);
        AddedPaths::default()
    }
}

/// What to do about a store that cannot be read, as a sentence.
pub(super) fn remedy(error: &store::Error) -> &'static str {
    match error {
        store::Error::Unwatched(why) => why.remedy(),
        _ => "Look at the store on the runner, with `nix store ping` and `nix path-info --all`.",
    }
}
