//! Checks of paths that the cache had already. One query covers a thousand of them, and the bodies of a few are read,
//! because a cache may list a path whose body is damaged. A path that is damaged, or lacks its narinfo, is sent again.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::sync::Semaphore;
use tokio::time::timeout;

use crate::client::destination::Target;
use crate::client::publish::plan::Id;
use crate::client::publish::work::{JobResult, PublisherTask};
use crate::client::verify::check::Check;
use crate::client::verify::{Key, Mode, Seed, sample};
use flywheel_core::retry::Policy;
use flywheel_nix::key::PublicKey;
use flywheel_nix::narinfo::NarInfo;
use flywheel_nix::store_path::StorePath;

/// Paths that are checked at the same time.
const WIDTH: usize = 16;
/// Narinfos that are asked for beside a query hold its result back for no longer than this.
const LOOK_LIMIT: Duration = Duration::from_secs(2);

/// How paths are checked that the cache had already.
#[derive(Clone, Debug)]
pub struct Recheck {
    /// The key that the job's Nix trusts for this cache.
    pub key: Option<PublicKey>,
    pub mode: Mode,
    /// Decides which paths are in the sample.
    pub seed: Seed,
    /// The tries of each look-up, and the waits between them.
    pub policy: Policy,
}

/// The narinfos that were looked up beside a query.
pub(super) type Looked = HashMap<Id, NarInfo>;

/// The sample, and what of it waits for the preflight: until then the cache's key is not known.
pub(super) struct Sample {
    /// The lowest ranks so far: those of the sample.
    ranks: BTreeSet<u64>,
    waiting: Vec<(Id, Option<NarInfo>)>,
    turns: Arc<Semaphore>,
}

impl Sample {
    pub(super) fn new() -> Self {
        Self {
            ranks: BTreeSet::new(),
            waiting: Vec::new(),
            turns: Arc::new(Semaphore::new(WIDTH)),
        }
    }

    pub(super) fn is_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Whether a path with this rank belongs to the sample, as far as can be known now: it is drawn while the job goes on,
    /// and which paths come later is not known.
    fn draws(&mut self, rank: u64) -> bool {
        self.ranks.insert(rank);
        if self.ranks.len() > sample::ALREADY_THERE {
            return self.ranks.pop_last() != Some(rank);
        }
        true
    }
}

impl PublisherTask {
    /// The paths of a query for which a check is likely, if they are there. They are looked up beside the query, because
    /// the job is waiting.
    pub(super) fn likely_checks(&self, ids: &[(Id, StorePath)]) -> Vec<(Id, StorePath)> {
        let Some(recheck) = self.options.recheck.as_ref().filter(|recheck| {
            recheck.mode == Mode::Sample && self.draining.is_some() && self.to.shows_progress()
        }) else {
            return Vec::new();
        };
        let mut ranked: Vec<_> = ids
            .iter()
            .filter(|(id, _)| self.plan.offered(*id).is_some() && self.plan.attempts(*id) == 0)
            .map(|(id, path)| (recheck.seed.rank(path), *id, path))
            .collect();
        ranked.sort_unstable();
        ranked.truncate(sample::ALREADY_THERE);
        ranked
            .into_iter()
            .map(|(_, id, path)| (id, path.clone()))
            .collect()
    }

    /// Draws those to check from the paths of a query that are there.
    pub(super) fn draw_checks(&mut self, there: &[Id], mut looked: Looked) {
        let Some(recheck) = self.options.recheck.clone() else {
            return;
        };
        // The lowest ranks first, so that none is drawn only to be displaced by another of the same query.
        let mut ranked: Vec<(u64, Id)> = there
            .iter()
            .filter(|id| self.plan.is_already_there(**id) && self.plan.offered(**id).is_some())
            .map(|id| (recheck.seed.rank(self.plan.path(*id)), *id))
            .collect();
        ranked.sort_unstable();
        for (rank, id) in ranked {
            let is_drawn = match recheck.mode {
                Mode::Full => true,
                Mode::Sample => self.sample.draws(rank),
                Mode::Off => false,
            };
            if is_drawn {
                self.sample.waiting.push((id, looked.remove(&id)));
            }
        }
    }

    /// Starts the checks that were drawn.
    pub(super) fn start_checks(&mut self) {
        let Some(recheck) = self.options.recheck.clone() else {
            return;
        };
        for (id, known) in std::mem::take(&mut self.sample.waiting) {
            let Some(info) = self.plan.offered(id).cloned() else {
                continue;
            };
            let (to, key) = (Target::clone(&self.to), self.key.clone());
            let (activity, policy) = (Arc::clone(&self.activity), recheck.policy);
            let turns = Arc::clone(&self.sample.turns);
            let fetches = recheck.mode == Mode::Full || recheck.seed.reads(&info);
            self.jobs.spawn(async move {
                let _turn = turns.acquire().await;
                let check = Check {
                    from: &*to,
                    policy,
                    key: &key,
                    activity: &activity,
                };
                let described = AtomicBool::new(false);
                let verdict = check.path(&info, fetches, known, &described).await;
                JobResult::Checked { id, verdict }
            });
        }
    }

    /// The key that the cache's signatures are checked with.
    pub(super) fn learn_key(&mut self, announced: Option<PublicKey>) {
        let given = self
            .options
            .recheck
            .as_ref()
            .and_then(|recheck| recheck.key.clone());
        self.key = Key::new(given, announced);
    }
}

/// The narinfos of these paths, as far as they come soon.
pub(super) async fn look_up(to: &Target, paths: Vec<(Id, StorePath)>) -> Looked {
    let looks = paths.into_iter().map(|(id, path)| async move {
        let found = timeout(LOOK_LIMIT, to.look_up(&path)).await;
        // Whatever went wrong is found out by the check itself.
        Some((id, found.ok()?.ok()??))
    });
    join_all(looks).await.into_iter().flatten().collect()
}
