//! The publication of a job: streamed while the job runs, completed and drained at its end, then verified against
//! what the cache serves. Keeps the job's journal, and takes over what the journals of dead jobs left.

use std::collections::{BTreeSet, HashSet};
use std::error::Error as _;
use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

use crate::report::publication::Publication;
use flywheel_cache::client::destination::Target;
use flywheel_cache::client::inspect::Inspector;
use flywheel_cache::client::journal::{self, Closed, Folder, Journal, Left, Until};
use flywheel_cache::client::publish::{Options, Outcome, Publisher, Recheck};
use flywheel_cache::client::verify::{self, Key, Mode, Verification};
use flywheel_core::progress::Sink;
use flywheel_core::text::count;
use flywheel_core::trust::PublishPermit;
use flywheel_nix::path_info::PathInfo;
use flywheel_nix::store::{Mark, Store};
use flywheel_nix::store_path::StorePath;
use flywheel_nix::store_watcher::StoreWatcher;

use super::added_paths::AddedPaths;
use super::attach::Cache;
use super::closure_tracker::ClosureTracker;
use super::inputs::Plan;
use super::leftovers;
use super::ownership::{Evidence, Ownership, Registered};
use super::policy::record_impurity;
use super::publication::{self, StoreAtEnd};

/// Batches from the watcher that may be queued for the feeder.
const BATCHES: usize = 256;
/// This share of the drain time is kept for verifying, which has more where publishing ends early.
const VERIFY_SHARE: f64 = 0.2;

/// What is left of the 35 s that a hanging cache may cost is for publishing: this long without an answer, less what failed
/// reads have taken before …
const IDLE_AFTER_READS: Duration = Duration::from_secs(28);
/// … and at least this.
const LEAST_IDLE: Duration = Duration::from_secs(3);
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
    feeding: JoinHandle<Fed>,
    journal: Journal,
    inspector: Arc<Inspector>,
    ownership: Arc<Ownership>,
    verify: verify::Options,
}

/// What is known of the publication while it is under way.
#[derive(Clone, Debug)]
pub(super) struct Published {
    pub(super) to: Target,
    /// It ends with the publication.
    pub(super) publisher: Weak<Publisher>,
    pub(super) journal: Journal,
    pub(super) verify: verify::Options,
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
    /// How much of what the cache serves is checked.
    pub(crate) verify: Mode,
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
        (mark, store): (&Mark, &Store),
        sink: &Sink,
    ) -> Self {
        let Some(folder) = plan.journal.clone() else {
            return Self::default();
        };
        let cache = plan.source.identity().filter(|_| publishes);
        // Where it cannot be read, the mark is believed as it stands.
        let marked = store.path_at(mark).await.unwrap_or_default();
        let (is_wanted, mark, state) = (cache.is_some(), mark.id(), store.state());
        let opening = spawn_blocking(move || {
            let folder = Folder::open(&folder, &state, marked)?;
            open_in(&folder, cache.as_deref(), mark)
        });
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
                "{problem}; what a killed job leaves is not taken up by the next (input `journal`)"
            );
            sink.degraded("journal", text);
        }
        Self::default()
    }
}

fn open_in(
    folder: &Folder,
    cache: Option<&str>,
    mark: Option<i64>,
) -> Result<JobJournal, journal::Error> {
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
            upstream: inputs.ownership.upstream(),
            journal: journal.clone(),
            inspector: Some(Arc::clone(inputs.inspector)),
            store: inputs.ownership.store.folder().to_owned(),
            ..usual
        };
        let sending = to.map(|to| {
            let publisher = Publisher::start(permit, Target::clone(&to), options, sink.clone());
            (to, Arc::new(publisher))
        });
        let (send, receive) = mpsc::channel(BATCHES);
        // The watcher has a thread of its own, which may wait.
        let ownership = inputs.ownership;
        let watcher = ownership.store.watch(&ownership.mark, move |infos| {
            // The feeder is gone only when the publication is being taken down.
            let _ = send.blocking_send(infos);
        });
        let feeder = Feeder {
            publisher: sending.as_ref().map(|(_, publisher)| Arc::clone(publisher)),
            ownership: Arc::clone(ownership),
            inspector: Arc::clone(inputs.inspector),
            at_once: inputs.at_once,
            journal: journal.clone(),
            sink: sink.clone(),
            closures: ClosureTracker::default(),
            unclaimed: Vec::new(),
            fed: Fed::default(),
        };
        let feeding = tokio::spawn(feeder.feed(left, receive));
        let (inspector, ownership) = (Arc::clone(inputs.inspector), Arc::clone(ownership));
        Self {
            sending,
            watcher,
            feeding,
            journal,
            inspector,
            ownership,
            verify,
        }
    }

    /// What is known of what is published; `None` where nothing can be sent.
    pub(super) fn published(&self) -> Option<Published> {
        let (to, publisher) = self.sending.as_ref()?;
        Some(Published {
            to: Target::clone(to),
            publisher: Arc::downgrade(publisher),
            journal: self.journal.clone(),
            verify: self.verify.clone(),
        })
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
            ownership,
            verify: options,
        } = self;
        // Ending the watch joins its threads, one of which may be reading the database.
        let ended = spawn_blocking(move || {
            let mut watcher = watcher;
            if let Some(watcher) = &mut watcher {
                watcher.end();
            }
            watcher
        });
        let watcher = ended.await.ok().flatten();
        // The feeder ends when the watcher is gone. Should it have panicked, nothing is missing: all is offered below.
        let fed = feeding.await.unwrap_or_default();
        let at_end = store_at_end(&ownership, watcher.as_ref(), &fed.seen, added_paths).await;
        // The same order as in the feeder: what a kill cuts off from here on is in the journal.
        journal.seen(added_paths.wanted.iter().map(|info| &info.path));
        record_seen_impurity(&ownership, &inspector);
        let mut publication = match sending {
            Some((to, publisher)) => {
                publisher.offer(fed.held).await;
                publisher.offer(added_paths.wanted.clone()).await;
                let spent = cache.spent_on_reads();
                // Reads that failed for a moment are no reason to be impatient now.
                if spent >= LEAST_IDLE {
                    let idle = IDLE_AFTER_READS.saturating_sub(spent).max(LEAST_IDLE);
                    publisher.stall_after(idle).await;
                }
                let publisher = Arc::into_inner(publisher)
                    .expect("the feeder, its only other holder, has ended");
                let (outcome, verification) = drain(publisher, to, options, deadline, sink).await;
                journal.settled(publication::settled(&outcome, &verification));
                publication::summarize(
                    &outcome,
                    &verification,
                    &added_paths.unreadable,
                    &inspector.warned(),
                    &at_end,
                )
            }
            None => {
                let reason = cache.refusal().unwrap_or_default();
                publication::all_lost(&added_paths.wanted, &ownership.upstream(), &reason)
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
    options: verify::Options,
    deadline: &Deadline,
    sink: &Sink,
) -> (Outcome, Verification) {
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
        let text = "no signature was checked: neither `attic-public-key` nor the cache names a key";
        sink.degraded("publication", text);
    }
    (outcome, verification)
}

/// Adds to the lost paths that the journal has them, and warns of a journal that lacks some.
fn report_kept(closed: &Closed, publication: &mut Publication, sink: &Sink) {
    if let Some(problem) = &closed.problem {
        let text =
            format!("{problem}; what it lacks is not taken up by the next job (input `journal`)");
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
fn record_seen_impurity(ownership: &Ownership, inspector: &Inspector) {
    if let Some(found) = ownership.temp_roots.impurity() {
        record_impurity(inspector, &found, "a Nix process of the job");
    }
}

/// Finds out what has become of the paths that the job added: which the job, or another, has deleted, and which cannot
/// be substituted. A store that cannot be read now has been reported as such.
async fn store_at_end(
    ownership: &Ownership,
    watcher: Option<&StoreWatcher>,
    seen: &[PathInfo],
    added_paths: &AddedPaths,
) -> StoreAtEnd {
    let store = &ownership.store;
    let mut at_end = StoreAtEnd {
        floating: store
            .floating(&added_paths.wanted)
            .await
            .unwrap_or_default(),
        unread_processes: added_paths.unread_processes,
        upstream: ownership.upstream(),
        ..StoreAtEnd::default()
    };
    if let Some(watcher) = watcher {
        let unread = store.unseen(&ownership.mark, watcher).await;
        at_end.unread = unread.unwrap_or_default();
    }
    let mut named: BTreeSet<StorePath> = ownership.temp_roots.named().into_iter().collect();
    if at_end.unread > 0
        && let Some(names) = &ownership.daemon_names
    {
        named.extend(names.named().await);
    }
    named.retain(|path| !path.is_derivation());
    let seen_paths = seen.iter().map(|info| info.path.clone());
    let asked: Vec<StorePath> = named.iter().cloned().chain(seen_paths).collect();
    let Ok(valid) = store.infos(&asked).await else {
        return at_end;
    };
    let valid: HashSet<&StorePath> = valid.infos.iter().map(|info| &info.path).collect();
    named.retain(|path| !valid.contains(path) && seen.iter().all(|info| info.path != *path));
    // More names than paths would be a list of what was never built.
    if named.len() as u64 <= at_end.unread {
        at_end.named = named.into_iter().collect();
    }
    let gone = seen.iter().filter(|info| !valid.contains(&info.path));
    at_end.deleted = gone.cloned().collect();
    at_end
}

/// Feeds the publisher with the paths that become valid.
struct Feeder {
    publisher: Option<Arc<Publisher>>,
    ownership: Arc<Ownership>,
    inspector: Arc<Inspector>,
    at_once: bool,
    journal: Journal,
    sink: Sink,
    closures: ClosureTracker,
    /// Paths that this job has not named; the claim of another job may be on its way.
    unclaimed: Vec<PathInfo>,
    fed: Fed,
}

/// What the feeder leaves for the job's end.
#[derive(Debug, Default)]
struct Fed {
    /// Paths of dead jobs, with their closures, that may be offered at the end only.
    held: Vec<PathInfo>,
    /// Everything that was found to be the job's.
    seen: Vec<PathInfo>,
}

impl Feeder {
    /// Offers what dead jobs left, then what the watcher reports, each path with its closure, and returns what is
    /// left for the end. Derivations and what may be another job's are left out; all paths are decided on once more at the end.
    async fn feed(mut self, left: Left, mut batches: mpsc::Receiver<Vec<PathInfo>>) -> Fed {
        let left = self.adopt_leftovers(left).await;
        if self.at_once {
            self.offer(left, None).await;
        } else if !left.is_empty() {
            let paths: Vec<StorePath> = left.iter().map(|info| info.path.clone()).collect();
            // The publisher takes closures only. One that cannot be read now stays in the journal.
            if let Ok(found) = self.ownership.store.closure(&paths).await {
                self.fed.held = found.infos;
            }
        }
        while let Some(infos) = batches.recv().await {
            // Evidence that cannot be read now is read again when the added paths are collected at the end.
            let Ok(evidence) = self.ownership.evidence(&[]).await else {
                continue;
            };
            let (found, unclaimed) = evidence.split_own(infos);
            self.unclaimed.extend(unclaimed);
            // The journal has a path before the publisher does: a job that is killed in between loses nothing.
            self.journal.seen(found.iter().map(|info| &info.path));
            self.fed.seen.extend(found.iter().cloned());
            if self.at_once && !found.is_empty() {
                record_seen_impurity(&self.ownership, &self.inspector);
                self.offer(found, Some(&evidence)).await;
            }
        }
        self.settle_unclaimed().await;
        self.fed
    }

    /// Takes for the job's what nobody has claimed by its end.
    async fn settle_unclaimed(&mut self) {
        let infos = std::mem::take(&mut self.unclaimed);
        if !infos.is_empty()
            && let Ok(evidence) = self.ownership.evidence(&[]).await
        {
            let (mut found, unclaimed) = evidence.split_own(infos);
            found.extend(unclaimed);
            self.journal.seen(found.iter().map(|info| &info.path));
            self.fed.seen.extend(found);
        }
    }

    /// Offers these paths with their closures. On a shared host, `evidence` keeps back what may be forged, with
    /// everything that refers to it.
    async fn offer(&mut self, infos: Vec<PathInfo>, evidence: Option<&Evidence>) {
        let Some(publisher) = self.publisher.clone() else {
            return;
        };
        let reported: HashSet<StorePath> = infos.iter().map(|info| info.path.clone()).collect();
        let (mut offers, open) = self.closures.split_ready(infos);
        if !open.is_empty() {
            let open: Vec<StorePath> = open.into_iter().map(|info| info.path).collect();
            // A closure that cannot be read now is read again when the added paths are collected at the end.
            if let Ok(found) = self.ownership.store.closure(&open).await {
                let mut closure = found.infos;
                closure.retain(|info| !self.closures.is_given(&info.path));
                if let Some(evidence) = evidence {
                    let is_given = |path: &StorePath| self.closures.is_given(path);
                    // Of these only the ones that were just reported are known to be new.
                    let registered = |path: &StorePath| match reported.contains(path) {
                        true => Registered::AfterMark,
                        false => Registered::BeforeMark,
                    };
                    (closure, _) = evidence.divide(closure, registered, is_given);
                }
                self.closures.add(&closure);
                offers.extend(closure);
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
        let leftovers::Leftovers {
            taken: found,
            doubtful,
        } = match leftovers::find(&self.ownership, &left).await {
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
        for leftover in &doubtful {
            let path = &leftover.info.path;
            let text = format!("{path} of an earlier job is ambiguous, and not taken up");
            self.sink.degraded("journal", text);
        }
        // `carried` has synced our journal, so the old ones may go now, and not earlier.
        left.taken_up();
        if !found.is_empty() {
            let unnamed = found
                .iter()
                .filter(|leftover| leftover.evidence == leftovers::Evidence::Unaccounted);
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
