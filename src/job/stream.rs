//! The publication of a job: streamed while the job runs, completed and drained at its end, then verified against
//! what the cache serves. Keeps the job's journal, and takes over what the journals of dead jobs left.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::report::publication::Publication;
use flywheel_cache::client::destination::Target;
use flywheel_cache::client::inspect::Inspector;
use flywheel_cache::client::journal::{Folder, Journal, Left};
use flywheel_cache::client::publish::{Final, Options, Outcome, Publisher, Recheck};
use flywheel_cache::client::verify::{self, Key, Mode, Verdict, Verification};
use flywheel_core::progress::Sink;
use flywheel_core::text::count;
use flywheel_core::trust::PublishPermit;
use flywheel_nix::path_info::PathInfo;
use flywheel_nix::store::Mark;
use flywheel_nix::store_path::StorePath;
use flywheel_nix::store_watcher::StoreWatcher;

use super::added_paths::AddedPaths;
use super::attach::Cache;
use super::closure_tracker::ClosureTracker;
use super::inputs::Plan;
use super::ownership::{Decision, Evidence, Ownership};
use super::policy::record_impurity;
use super::publication;

/// Batches from the watcher that may be queued for the feeder.
const BATCHES: usize = 256;
/// This share of the drain time is kept for verifying, which has more where publishing ends early.
const VERIFY_SHARE: f64 = 0.2;

/// A publication under way.
#[derive(Debug)]
pub(crate) struct Stream {
    to: Target,
    publisher: Arc<Publisher>,
    watcher: Option<StoreWatcher>,
    feeding: JoinHandle<Vec<PathInfo>>,
    journal: Journal,
    inspector: Arc<Inspector>,
    ownership: Arc<Ownership>,
    verify: verify::Options,
}

/// When an operation ends at the latest, and what ends it before.
#[derive(Clone, Debug)]
pub(crate) struct Deadline {
    pub(crate) at: Instant,
    pub(crate) cancel: CancellationToken,
}

/// Where the published paths come from.
#[derive(Debug)]
pub(crate) struct StreamInputs<'a> {
    /// Which paths are the job's.
    pub(super) ownership: &'a Arc<Ownership>,
    /// Looks into each path before it is sent.
    pub(crate) inspector: &'a Arc<Inspector>,
    /// Whether paths are published as they become valid, and not only at the job's end.
    pub(crate) at_once: bool,
    /// How many paths are published at once at most, if that is asked for.
    pub(crate) workers: Option<usize>,
    /// How far verification goes.
    pub(crate) verify: Mode,
}

/// The job's journal, and what dead jobs left for the same cache.
#[derive(Debug, Default)]
pub(crate) struct JobJournal {
    pub(crate) journal: Journal,
    left: Left,
}

impl JobJournal {
    /// Opens the journal of a job that may publish. One that cannot be kept is a warning, and the job goes on
    /// without it.
    pub(crate) fn open(plan: &Plan, mark: &Mark, sink: &Sink) -> Option<Self> {
        let (folder, cache) = (plan.journal.as_deref()?, plan.source.identity()?);
        let opened = Folder::open(folder).and_then(|folder| {
            let left = folder.left(&cache)?;
            Ok(Self {
                journal: folder.begin(&cache, mark.id())?,
                left,
            })
        });
        let warn = |error: &dyn std::error::Error| {
            let cause = error
                .source()
                .map(|cause| format!(": {cause}"))
                .unwrap_or_default();
            let text = format!(
                "{error}{cause}; what a killed job leaves is not taken up by the next (`journal`)"
            );
            sink.degraded("journal", text);
        };
        opened.inspect_err(|error| warn(error)).ok()
    }
}

impl Stream {
    /// Starts to publish what dead jobs left and what becomes valid from now on.
    pub(crate) fn start(
        permit: &PublishPermit,
        to: Target,
        cache: &Cache,
        inputs: &StreamInputs<'_>,
        journal: JobJournal,
        sink: &Sink,
    ) -> Self {
        let JobJournal { journal, left } = journal;
        let usual = Options::default();
        let max_uploads = inputs.workers.unwrap_or(usual.max_uploads);
        let verify = verify::Options {
            mode: inputs.verify,
            ..verify::Options::default()
        };
        let options = Options {
            recheck: Some(Recheck {
                key: cache.public_key.clone(),
                mode: verify.mode,
                seed: verify.seed,
                policy: verify.policy,
            }),
            initial_uploads: usual.initial_uploads.min(max_uploads),
            max_uploads,
            config: cache.probe.config.clone(),
            journal: journal.clone(),
            inspector: Some(Arc::clone(inputs.inspector)),
            ..usual
        };
        let publisher = Arc::new(Publisher::start(
            permit,
            Target::clone(&to),
            options,
            sink.clone(),
        ));
        let (send, receive) = mpsc::channel(BATCHES);
        // The watcher has a thread of its own, which may wait.
        let ownership = inputs.ownership;
        let watcher = ownership.store.watch(&ownership.mark, move |infos| {
            // The feeder is gone only when the publication is being taken down.
            let _ = send.blocking_send(infos);
        });
        let feeder = Feeder {
            publisher: Arc::clone(&publisher),
            ownership: Arc::clone(ownership),
            inspector: Arc::clone(inputs.inspector),
            at_once: inputs.at_once,
            journal: journal.clone(),
            sink: sink.clone(),
            closures: ClosureTracker::default(),
            seen: Vec::new(),
        };
        let feeding = tokio::spawn(feeder.feed(left, receive));
        let (inspector, ownership) = (Arc::clone(inputs.inspector), Arc::clone(ownership));
        Self {
            to,
            publisher,
            watcher,
            feeding,
            journal,
            inspector,
            ownership,
            verify,
        }
    }

    /// Stops watching, offers all of `added_paths`, publishes what is left and verifies, all by `deadline`.
    pub(crate) async fn finish(
        self,
        added_paths: &AddedPaths,
        deadline: &Deadline,
        sink: &Sink,
    ) -> Publication {
        let Self {
            to,
            publisher,
            watcher,
            feeding,
            journal,
            inspector,
            ownership,
            verify: options,
        } = self;
        // Dropping the watcher joins its threads, one of which may be reading the database.
        let _ = tokio::task::spawn_blocking(move || drop(watcher)).await;
        // The feeder ends when the watcher is gone. Should it have panicked, nothing is missing: all is offered below.
        let seen = feeding.await.unwrap_or_default();
        let collected = collected_as_garbage(&ownership, seen).await;
        // The same order as in the feeder: what a kill cuts off from here on is in the journal.
        journal.seen(added_paths.wanted.iter().map(|info| &info.path));
        record_seen_impurity(&ownership, &inspector);
        publisher.offer(added_paths.wanted.clone()).await;
        let publisher =
            Arc::into_inner(publisher).expect("the feeder, its only other holder, has ended");
        let outcome = publisher
            .drain(publish_until(deadline), deadline.cancel.clone())
            .await;
        // The publisher itself has reported a standstill.
        if let Some(reason) = outcome.stopped.as_ref().filter(|_| !outcome.stalled) {
            sink.degraded("publication", reason.clone());
        }
        let options = options.following(outcome.key.clone(), outcome.stalled);
        let sent = outcome.sent().cloned().collect();
        let verification = verify::verify(to, sent, &options, deadline.at, &deadline.cancel).await;
        if verification.key == Key::Unknown && verification.good() > 0 {
            let text =
                "no signature was checked: neither `attic-public-key` nor the cache names a key";
            sink.degraded("publication", text);
        }
        record_settled(journal, &outcome, &verification);
        publication::summarize(
            &outcome,
            &verification,
            &added_paths.unreadable,
            &inspector.warned(),
            &collected,
        )
    }
}

/// Records it with the inspector when a process of the job was seen to evaluate impurely. To be called before a path
/// is offered: the process that adds the path has been seen by then.
fn record_seen_impurity(ownership: &Ownership, inspector: &Inspector) {
    if let Some(found) = ownership.temp_roots.impurity() {
        record_impurity(inspector, &found, "a Nix process of the job");
    }
}

/// The paths among those seen during the job that are not valid any more: the job, or another, has deleted them.
async fn collected_as_garbage(ownership: &Ownership, seen: Vec<PathInfo>) -> Vec<PathInfo> {
    let paths: Vec<StorePath> = seen.iter().map(|info| info.path.clone()).collect();
    // A store that cannot be read now has been reported as such.
    let Ok(valid) = ownership.store.infos(&paths).await else {
        return Vec::new();
    };
    let valid: HashSet<&StorePath> = valid.infos.iter().map(|info| &info.path).collect();
    let gone = seen.iter().filter(|info| !valid.contains(&info.path));
    gone.cloned().collect()
}

/// Settles in the journal what needs no more care; the next job takes up the rest.
fn record_settled(journal: Journal, outcome: &Outcome, verification: &Verification) {
    let skipped = outcome
        .paths
        .iter()
        .filter(|path| matches!(path.end, Final::Skipped(_) | Final::Withheld(_)));
    journal.settled(skipped.map(|path| &path.info.path));
    // The cache's word that it has a path is enough, unless a check could not be made.
    let there = outcome
        .already_there()
        .filter(|path| !matches!(path.checked, Some(Verdict::Unverified(_))));
    journal.settled(there.map(|path| &path.info.path));
    if verification.mode == Mode::Off {
        journal.settled(outcome.sent().map(|info| &info.path));
    }
    let good = verification
        .paths
        .iter()
        .filter(|(_, verdict)| matches!(verdict, Verdict::Good { .. }));
    journal.settled(good.map(|(info, _)| &info.path));
    journal.close();
}

/// Feeds the publisher with the paths that become valid.
struct Feeder {
    publisher: Arc<Publisher>,
    ownership: Arc<Ownership>,
    inspector: Arc<Inspector>,
    at_once: bool,
    journal: Journal,
    sink: Sink,
    closures: ClosureTracker,
    /// Everything that was found to be the job's.
    seen: Vec<PathInfo>,
}

impl Feeder {
    /// Offers what dead jobs left, then what the watcher reports, each path with its closure, and returns what was the
    /// job's. Derivations and what may be another job's are left out; all paths are decided on once more at the end.
    async fn feed(
        mut self,
        left: Left,
        mut batches: mpsc::Receiver<Vec<PathInfo>>,
    ) -> Vec<PathInfo> {
        if self.at_once {
            self.adopt_leftovers(left).await;
        }
        while let Some(infos) = batches.recv().await {
            // Evidence that cannot be read now is read again when the added paths are collected at the end.
            let Ok(evidence) = self.ownership.evidence(&[]).await else {
                continue;
            };
            let is_own = |info: &PathInfo| evidence.decide(info) == Decision::Publish;
            let found: Vec<PathInfo> = infos.into_iter().filter(is_own).collect();
            // The journal has a path before the publisher does: a job that is killed in between loses nothing.
            self.journal.seen(found.iter().map(|info| &info.path));
            self.seen.extend(found.iter().cloned());
            if self.at_once && !found.is_empty() {
                record_seen_impurity(&self.ownership, &self.inspector);
                self.offer(found, Some(&evidence)).await;
            }
        }
        self.seen
    }

    /// Offers these paths with their closures. On a shared host, `evidence` keeps back what may be forged, with
    /// everything that refers to it.
    async fn offer(&mut self, infos: Vec<PathInfo>, evidence: Option<&Evidence>) {
        let (mut offers, open) = self.closures.split_ready(infos);
        if !open.is_empty() {
            let open: Vec<StorePath> = open.into_iter().map(|info| info.path).collect();
            // A closure that cannot be read now is read again when the added paths are collected at the end.
            if let Ok(found) = self.ownership.store.closure(&open).await {
                let mut closure = found.infos;
                closure.retain(|info| !self.closures.is_given(&info.path));
                if let Some(evidence) = evidence {
                    let is_given = |path: &StorePath| self.closures.is_given(path);
                    (closure, _) = evidence.divide(closure, is_given);
                }
                self.closures.add(&closure);
                offers.extend(closure);
            }
        }
        if !offers.is_empty() {
            self.publisher.offer(offers).await;
        }
    }

    /// Offers what dead jobs left and is still valid. Their journals are removed once ours has it all.
    async fn adopt_leftovers(&mut self, left: Left) {
        if left.is_empty() {
            return;
        }
        let mut since: BTreeMap<StorePath, Option<u64>> = left
            .seen
            .iter()
            .map(|(path, since)| (path.clone(), Some(*since)))
            .collect();
        for (mark, expected) in &left.expected {
            // An expected path counts if it was really added, even if another process ended up adding it.
            let Ok(added) = self
                .ownership
                .store
                .added_since(&Mark::after_id(*mark))
                .await
            else {
                return;
            };
            let arrived = added
                .infos
                .into_iter()
                .filter(|info| expected.binary_search(&info.path).is_ok());
            for info in arrived {
                since.entry(info.path).or_default();
            }
        }
        let all: Vec<StorePath> = since.keys().cloned().collect();
        let Ok(valid) = self.ownership.store.infos(&all).await else {
            return;
        };
        let since = |path| since.get(path).copied().flatten();
        let carried: Vec<_> = valid
            .infos
            .iter()
            .map(|info| (&info.path, since(&info.path)))
            .collect();
        self.journal.carried(&carried);
        // `carried` has synced our journal, so the old ones may go now, and not earlier.
        left.taken_up();
        if !valid.infos.is_empty() {
            self.sink.note(format!(
                "flywheel: {} of earlier jobs taken up",
                count(valid.infos.len() as u64, "path")
            ));
            self.offer(valid.infos, None).await;
        }
    }
}

fn publish_until(deadline: &Deadline) -> Instant {
    // Of a long drain time, half a minute is enough for verifying.
    let left = deadline.at.saturating_duration_since(Instant::now());
    deadline.at - left.mul_f64(VERIFY_SHARE).min(Duration::from_secs(30))
}
