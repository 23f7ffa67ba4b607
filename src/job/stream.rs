//! The publication of a job: streamed while the job runs, completed and drained at its end, then verified against
//! what the cache serves. Keeps the job's journal, and takes over what the journals of dead jobs left.

use std::collections::BTreeSet;
use std::error::Error as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

use crate::report::publication::Publication;
use flywheel_cache::client::destination::Target;
use flywheel_cache::client::inspect::Inspector;
use flywheel_cache::client::journal::{self, Closed, Folder, Journal, Left, Until};
use flywheel_cache::client::publish::{Final, Options, Outcome, Publisher};
use flywheel_cache::client::verify::{self, Key, Verdict, Verification};
use flywheel_core::progress::Sink;
use flywheel_core::text::count;
use flywheel_core::trust::PublishPermit;
use flywheel_nix::path_info::PathInfo;
use flywheel_nix::store::{Mark, Store};
use flywheel_nix::store_path::StorePath;
use flywheel_nix::store_watcher::StoreWatcher;
use flywheel_nix::temp_roots::TempRootWatcher;

use super::added_paths::AddedPaths;
use super::attach::Cache;
use super::closure_tracker::ClosureTracker;
use super::inputs::Plan;
use super::leftovers::{self, Evidence};
use super::ownership::OwnershipFilter;
use super::policy::record_impurity;
use super::publication;

/// Batches from the watcher that may be queued for the feeder.
const BATCHES: usize = 256;
/// This share of the drain time is kept for verifying, which has more where publishing ends early.
const VERIFY_SHARE: f64 = 0.2;

/// How long the journal may take to open. A folder on a disk that does not answer must not hold up the job.
const OPEN_LIMIT: Duration = Duration::from_secs(5);
/// What is added to the reason of a lost path that the journal has.
const KEPT: &str = "kept for the next job (journal)";

/// A publication under way.
#[derive(Debug)]
pub(crate) struct Stream {
    /// `None` where nothing can be sent, and the journal alone is kept.
    sending: Option<(Target, Arc<Publisher>)>,
    watcher: Option<StoreWatcher>,
    /// Ends with the paths of dead jobs that are still to be offered.
    feeding: JoinHandle<Vec<PathInfo>>,
    journal: Journal,
    inspector: Arc<Inspector>,
    temp_roots: Arc<TempRootWatcher>,
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
    pub(crate) store: &'a Arc<Store>,
    /// Paths that are registered after this moment may be the job's.
    pub(crate) mark: &'a Mark,
    /// The Nix processes that add paths, by which those of this job are known.
    pub(crate) temp_roots: &'a Arc<TempRootWatcher>,
    /// Looks into each path before it is sent.
    pub(crate) inspector: &'a Arc<Inspector>,
    /// Whether paths are published as they become valid, and not only at the job's end.
    pub(crate) at_once: bool,
    /// How many paths are published at once at most, if that is asked for.
    pub(crate) workers: Option<usize>,
}

/// The job's journal, and what dead jobs left for the same cache.
#[derive(Debug, Default)]
pub(crate) struct JobJournal {
    pub(crate) journal: Journal,
    left: Left,
}

impl JobJournal {
    /// Opens the journal of a job, before anything of it runs. One that cannot be kept is a warning where the job may
    /// publish, and the job goes on without it. A job that does not publish has one as well, by which the others know
    /// of it, and takes up nothing.
    /// `is_ci`: outside of CI, what was added to the store after a job was killed is more likely its user's own work,
    /// and not taken for the job's.
    pub(crate) async fn open(
        plan: &Plan,
        publishes: bool,
        is_ci: bool,
        mark: &Mark,
        sink: &Sink,
    ) -> Self {
        let Some(folder) = plan.journal.clone() else {
            return Self::default();
        };
        let cache = plan.source.identity().filter(|_| publishes);
        let (is_wanted, mark) = (cache.is_some(), mark.id());
        let opening = spawn_blocking(move || open_in(&folder, cache.as_deref(), mark));
        let problem = match timeout(OPEN_LIMIT, opening).await {
            Ok(Ok(Ok(mut opened))) => {
                if !is_ci {
                    opened.left.unaccounted.clear();
                }
                for (file, reason) in &opened.left.refused {
                    let text = format!("`{}` {reason}; it is not read", file.display());
                    sink.degraded("journal", text);
                }
                return opened;
            }
            Ok(Ok(Err(error))) => {
                let cause = error.source().map(|cause| format!(": {cause}"));
                format!("{error}{}", cause.unwrap_or_default())
            }
            Ok(Err(panicked)) => panicked.to_string(),
            Err(_) => "the journal's folder does not answer".to_owned(),
        };
        if is_wanted {
            let text = format!(
                "{problem}; what a killed job leaves is not taken up by the next (`journal`)"
            );
            sink.degraded("journal", text);
        }
        Self::default()
    }
}

fn open_in(
    folder: &Path,
    cache: Option<&str>,
    mark: Option<i64>,
) -> Result<JobJournal, journal::Error> {
    let folder = Folder::open(folder)?;
    let left = match cache {
        Some(cache) => folder.left(cache)?,
        None => Left::default(),
    };
    Ok(JobJournal {
        journal: folder.begin(cache, mark, &left)?,
        left,
    })
}

impl Stream {
    /// Starts to publish what dead jobs left and what becomes valid from now on. Without a destination, what becomes
    /// valid is only recorded in the journal.
    pub(crate) fn start(
        permit: &PublishPermit,
        to: Option<Target>,
        cache: &Cache,
        inputs: &StreamInputs<'_>,
        journal: JobJournal,
        sink: &Sink,
    ) -> Self {
        let JobJournal { journal, left } = journal;
        let usual = Options::default();
        let max_uploads = inputs.workers.unwrap_or(usual.max_uploads);
        let options = Options {
            initial_uploads: usual.initial_uploads.min(max_uploads),
            max_uploads,
            config: cache.probe.config.clone(),
            journal: journal.clone(),
            inspector: Some(Arc::clone(inputs.inspector)),
            ..usual
        };
        let sending = to.map(|to| {
            let publisher = Publisher::start(permit, Target::clone(&to), options, sink.clone());
            (to, Arc::new(publisher))
        });
        let (send, receive) = mpsc::channel(BATCHES);
        // The watcher has a thread of its own, which may wait.
        let watcher = inputs.store.watch(inputs.mark, move |infos| {
            // The feeder is gone only when the publication is being taken down.
            let _ = send.blocking_send(infos);
        });
        let feeder = Feeder {
            publisher: sending.as_ref().map(|(_, publisher)| Arc::clone(publisher)),
            store: Arc::clone(inputs.store),
            mark: inputs.mark.clone(),
            temp_roots: Arc::clone(inputs.temp_roots),
            inspector: Arc::clone(inputs.inspector),
            at_once: inputs.at_once,
            journal: journal.clone(),
            sink: sink.clone(),
            closures: ClosureTracker::default(),
        };
        let feeding = tokio::spawn(feeder.feed(left, receive));
        let (inspector, temp_roots) = (Arc::clone(inputs.inspector), Arc::clone(inputs.temp_roots));
        Self {
            sending,
            watcher,
            feeding,
            journal,
            inspector,
            temp_roots,
        }
    }

    /// Stops watching, offers all of `added_paths`, publishes what is left and verifies, all by `deadline`.
    /// `is_complete`: whether the store could be read at the end.
    pub(crate) async fn finish(
        self,
        cache: &Cache,
        (added_paths, is_complete): (&AddedPaths, bool),
        deadline: &Deadline,
        sink: &Sink,
    ) -> Publication {
        let Self {
            sending,
            watcher,
            feeding,
            journal,
            inspector,
            temp_roots,
        } = self;
        // Dropping the watcher joins its threads, one of which may be reading the database.
        let _ = tokio::task::spawn_blocking(move || drop(watcher)).await;
        // The feeder ends when the watcher is gone. Should it have panicked, nothing is missing: all is offered below.
        let held = feeding.await.unwrap_or_default();
        // The same order as in the feeder: what a kill cuts off from here on is in the journal.
        journal.seen(added_paths.wanted.iter().map(|info| &info.path));
        record_seen_impurity(&temp_roots, &inspector);
        let mut publication = match sending {
            Some((to, publisher)) => {
                publisher.offer(held).await;
                publisher.offer(added_paths.wanted.clone()).await;
                let publisher = Arc::into_inner(publisher)
                    .expect("the feeder, its only other holder, has ended");
                let (outcome, verification) = drain(publisher, to, cache, deadline, sink).await;
                record_settled(&journal, &outcome, &verification);
                publication::summarize(
                    &outcome,
                    &verification,
                    &added_paths.unreadable,
                    &inspector.warned(),
                )
            }
            None => {
                let reason = cache.refusal().unwrap_or_default();
                publication::all_lost(&added_paths.wanted, &reason)
            }
        };
        // A job that could not read the store leaves its mark to the next one, which can.
        let closed = if is_complete {
            journal.close()
        } else {
            journal.leave()
        };
        report_kept(&closed, &mut publication, sink);
        publication
    }
}

/// Publishes what is left, and verifies it.
async fn drain(
    publisher: Publisher,
    to: Target,
    cache: &Cache,
    deadline: &Deadline,
    sink: &Sink,
) -> (Outcome, Verification) {
    let outcome = publisher
        .drain(publish_until(deadline), deadline.cancel.clone())
        .await;
    if let Some(reason) = &outcome.stopped {
        sink.degraded("publication", reason.clone());
    }
    let options = verify::Options {
        key: cache.public_key.clone(),
        ..verify::Options::default()
    };
    let served = outcome.served().cloned().collect();
    let verification = verify::verify(to, served, &options, deadline.at, &deadline.cancel).await;
    if verification.key == Key::Unknown && verification.good() > 0 {
        let text = "no signature was checked: neither `attic-public-key` nor the cache names a key";
        sink.degraded("publication", text);
    }
    (outcome, verification)
}

/// Adds to the lost paths that the journal has them, and warns of a journal that lacks some.
fn report_kept(closed: &Closed, publication: &mut Publication, sink: &Sink) {
    if let Some(problem) = &closed.problem {
        let text = format!("{problem}; what it lacks is not taken up by the next job (`journal`)");
        sink.degraded("journal", text);
    }
    if closed.kept.is_empty() {
        return;
    }
    let kept: BTreeSet<String> = closed.kept.iter().map(ToString::to_string).collect();
    for missed in &mut publication.lost {
        if kept.contains(&missed.path) {
            missed.reason = format!("{}; {KEPT}", missed.reason);
        }
    }
    sink.degraded(
        "publication",
        format!("{} {KEPT}", count(kept.len() as u64, "path")),
    );
}

/// Records it with the inspector when a process of the job was seen to evaluate impurely. To be called before a path
/// is offered: the process that adds the path has been seen by then.
fn record_seen_impurity(temp_roots: &TempRootWatcher, inspector: &Inspector) {
    if let Some(found) = temp_roots.impurity() {
        record_impurity(inspector, &found, "a Nix process of the job");
    }
}

/// Settles in the journal what needs no more care; the next job takes up the rest.
fn record_settled(journal: &Journal, outcome: &Outcome, verification: &Verification) {
    let skipped = outcome
        .paths
        .iter()
        .filter(|path| matches!(path.end, Final::Skipped(_) | Final::Withheld(_)));
    journal.settled(skipped.map(|path| &path.info.path));
    let good = verification
        .paths
        .iter()
        .filter(|(_, verdict)| matches!(verdict, Verdict::Good { .. }));
    journal.settled(good.map(|(info, _)| &info.path));
}

/// Feeds the publisher with the paths that become valid.
struct Feeder {
    publisher: Option<Arc<Publisher>>,
    store: Arc<Store>,
    mark: Mark,
    temp_roots: Arc<TempRootWatcher>,
    inspector: Arc<Inspector>,
    at_once: bool,
    journal: Journal,
    sink: Sink,
    closures: ClosureTracker,
}

impl Feeder {
    /// Offers what dead jobs left, then what the watcher reports, each path with its closure. Derivations and the
    /// paths of other jobs are left out. Returns what may be offered at the job's end only.
    async fn feed(
        mut self,
        left: Left,
        mut batches: mpsc::Receiver<Vec<PathInfo>>,
    ) -> Vec<PathInfo> {
        let mut held = self.adopt_leftovers(left).await;
        if self.at_once {
            self.offer(std::mem::take(&mut held)).await;
        } else if !held.is_empty() {
            let paths: Vec<StorePath> = held.iter().map(|info| info.path.clone()).collect();
            // The publisher takes closures only. One that cannot be read now stays in the journal.
            held = match self.store.closure(&paths).await {
                Ok(found) => found.infos,
                Err(_) => Vec::new(),
            };
        }
        let mut filter = OwnershipFilter::new(Arc::clone(&self.temp_roots));
        loop {
            let infos = tokio::select! {
                infos = batches.recv() => infos,
                // Held paths are decided on even if no new path becomes valid.
                () = filter.due() => Some(Vec::new()),
            };
            let Some(infos) = infos else { return held };
            let found = filter.accept(infos, Instant::now());
            // The journal has a path before the publisher does: a job that is killed in between loses nothing.
            self.journal.seen(found.iter().map(|info| &info.path));
            if self.at_once && !found.is_empty() {
                record_seen_impurity(&self.temp_roots, &self.inspector);
                self.offer(found).await;
            }
        }
    }

    async fn offer(&mut self, infos: Vec<PathInfo>) {
        let Some(publisher) = self.publisher.clone() else {
            return;
        };
        let (mut offers, open) = self.closures.split_ready(infos);
        if !open.is_empty() {
            let open: Vec<StorePath> = open.into_iter().map(|info| info.path).collect();
            // A closure that cannot be read now is read again when the added paths are collected at the end.
            if let Ok(found) = self.store.closure(&open).await {
                self.closures.add(&found.infos);
                offers.extend(found.infos);
            }
        }
        if !offers.is_empty() {
            publisher.offer(offers).await;
        }
    }

    /// Finds what dead jobs left and is still valid. Their journals are removed once ours has it all; they stay where
    /// nothing can be sent.
    async fn adopt_leftovers(&mut self, left: Left) -> Vec<PathInfo> {
        if left.is_empty() {
            return Vec::new();
        }
        let stays = |why: &str| {
            let text = format!("what earlier jobs left stays for the next job: {why}");
            self.sink.degraded("journal", text);
            Vec::new()
        };
        if self.publisher.is_none() {
            return stays("nothing can be sent");
        }
        let found = match leftovers::find(&self.store, &left, &self.mark).await {
            Ok(found) => found,
            Err(error) => return stays(&error.to_string()),
        };
        let carried: Vec<_> = found
            .iter()
            .map(|leftover| (&leftover.info.path, leftover.since))
            .collect();
        if let Err(problem) = self.journal.carried(&carried) {
            return stays(&problem);
        }
        let is_open = |until: Until| !until.heir;
        if left
            .unaccounted
            .iter()
            .any(|job| job.until.is_some_and(is_open))
        {
            let text = "a job of another kind began after one that was killed: what the killed one's processes added \
                        since then is not told apart, and not taken up";
            self.sink.degraded("journal", text);
        }
        // `carried` has synced our journal, so the old ones may go now, and not earlier.
        left.taken_up();
        if !found.is_empty() {
            let unnamed = found
                .iter()
                .filter(|leftover| leftover.evidence == Evidence::Unaccounted);
            self.sink.note(format!(
                "flywheel: {} of earlier jobs taken up, {} of them not named in a journal",
                count(found.len() as u64, "path"),
                unnamed.count()
            ));
        }
        found.into_iter().map(|leftover| leftover.info).collect()
    }
}

fn publish_until(deadline: &Deadline) -> Instant {
    // Of a long drain time, half a minute is enough for verifying.
    let left = deadline.at.saturating_duration_since(Instant::now());
    deadline.at - left.mul_f64(VERIFY_SHARE).min(Duration::from_secs(30))
}
