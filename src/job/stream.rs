//! The publication of a job: streamed while the job runs, completed and drained at its end, then
//! verified against what the cache serves; and the journal of it, with what dead jobs left.

use std::collections::BTreeMap;
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
use super::ownership::OwnershipFilter;
use super::policy::accuse;
use super::publication;

/// Batches of the watcher that may wait to be handed on.
const BATCHES: usize = 256;
/// The share of the time to drain that verifying gets for itself, at least.
const VERIFY_SHARE: f64 = 0.2;

/// A publication under way.
#[derive(Debug)]
pub struct Stream {
    to: Target,
    publisher: Arc<Publisher>,
    watcher: Option<StoreWatcher>,
    feeding: JoinHandle<()>,
    journal: Journal,
    inspector: Arc<Inspector>,
    clients: Arc<TempRootWatcher>,
}

/// How long it may take: until when, and what ends it before.
#[derive(Clone, Debug)]
pub struct Deadline {
    /// Until when.
    pub at: Instant,
    /// What ends it before.
    pub cancel: CancellationToken,
}

/// Where the paths come from.
#[derive(Debug)]
pub struct StreamInputs<'a> {
    /// The store.
    pub store: &'a Arc<Store>,
    /// The moment from which on paths are the job's.
    pub mark: &'a Mark,
    /// Whose they are.
    pub clients: &'a Arc<TempRootWatcher>,
    /// Who looks at each before it goes.
    pub inspector: &'a Arc<Inspector>,
    /// Whether they go as they come, and not only at the end.
    pub at_once: bool,
    /// How many go at once at most, if that is asked for.
    pub workers: Option<usize>,
}

/// The job's journal, and what dead jobs left for the same cache.
#[derive(Debug, Default)]
pub struct JobJournal {
    /// The job's own.
    pub journal: Journal,
    left: Left,
}

impl JobJournal {
    /// Opens it for a job that may publish; a journal that cannot be kept is said, and done without.
    pub fn open(plan: &Plan, mark: &Mark, sink: &Sink) -> Option<Self> {
        let (folder, cache) = (plan.journal.as_deref()?, plan.source.identity()?);
        let opened = Folder::open(folder).and_then(|folder| {
            let left = folder.left(&cache)?;
            Ok(Self {
                journal: folder.begin(&cache, mark.id())?,
                left,
            })
        });
        let tell = |error: &dyn std::error::Error| {
            let cause = error
                .source()
                .map(|cause| format!(": {cause}"))
                .unwrap_or_default();
            let text = format!(
                "{error}{cause}; what a killed job leaves is not taken up by the next (`journal`)"
            );
            sink.degraded("journal", text);
        };
        opened.inspect_err(|error| tell(error)).ok()
    }
}

impl Stream {
    /// Starts to publish what dead jobs left and what becomes valid from now on.
    pub fn start(
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
        let options = Options {
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
        let watcher = inputs.store.watch(inputs.mark, move |infos| {
            // The feeder is gone only when the publication is being taken down.
            let _ = send.blocking_send(infos);
        });
        let feeder = Feeder {
            publisher: Arc::clone(&publisher),
            store: Arc::clone(inputs.store),
            clients: Arc::clone(inputs.clients),
            inspector: Arc::clone(inputs.inspector),
            at_once: inputs.at_once,
            journal: journal.clone(),
            sink: sink.clone(),
            closures: ClosureTracker::default(),
        };
        let feeding = tokio::spawn(feeder.feed(left, receive));
        let (inspector, clients) = (Arc::clone(inputs.inspector), Arc::clone(inputs.clients));
        Self {
            to,
            publisher,
            watcher,
            feeding,
            journal,
            inspector,
            clients,
        }
    }

    /// Stops watching, offers the whole harvest, publishes what is left and verifies, within `bound`.
    pub async fn finish(
        self,
        cache: &Cache,
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
            clients,
        } = self;
        // Its threads are joined, which may wait for a reading of the database.
        let _ = tokio::task::spawn_blocking(move || drop(watcher)).await;
        // It ends when the watcher is gone; it panics only by our fault, and the harvest has everything.
        let _ = feeding.await;
        journal.seen(added_paths.wanted.iter().map(|info| &info.path));
        suspect(&clients, &inspector);
        publisher.offer(added_paths.wanted.clone()).await;
        let publisher =
            Arc::into_inner(publisher).expect("the feeder, its only other holder, has ended");
        let outcome = publisher
            .drain(before_verifying(deadline), deadline.cancel.clone())
            .await;
        if let Some(reason) = &outcome.stopped {
            sink.degraded("publication", reason.clone());
        }
        let options = verify::Options {
            key: cache.public_key.clone(),
            ..verify::Options::default()
        };
        let served = outcome.served().cloned().collect();
        let verification =
            verify::verify(to, served, &options, deadline.at, &deadline.cancel).await;
        if verification.key == Key::Unknown && verification.good() > 0 {
            let text =
                "no signature was checked: neither `attic-public-key` nor the cache names a key";
            sink.degraded("publication", text);
        }
        settle(journal, &outcome, &verification);
        publication::of(
            &outcome,
            &verification,
            &added_paths.unreadable,
            &inspector.warned(),
        )
    }
}

/// Has the inspector know what the job's processes are seen to do. To be asked before a path is offered: the
/// process that adds it is there then.
fn suspect(clients: &TempRootWatcher, inspector: &Inspector) {
    if let Some(found) = clients.impurity() {
        accuse(inspector, &found, "a Nix process of the job");
    }
}

/// Writes down what needs no more care; the rest is the next job's.
fn settle(journal: Journal, outcome: &Outcome, verification: &Verification) {
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
    journal.close();
}

/// Hands paths on to the publisher.
struct Feeder {
    publisher: Arc<Publisher>,
    store: Arc<Store>,
    clients: Arc<TempRootWatcher>,
    inspector: Arc<Inspector>,
    at_once: bool,
    journal: Journal,
    sink: Sink,
    closures: ClosureTracker,
}

impl Feeder {
    /// What dead jobs left first, then what the watcher tells, with the closures that the publisher asks
    /// for; other jobs' paths and derivations stay behind.
    async fn feed(mut self, left: Left, mut batches: mpsc::Receiver<Vec<PathInfo>>) {
        if self.at_once {
            self.take_up(left).await;
        }
        let mut ours = OwnershipFilter::new(Arc::clone(&self.clients));
        loop {
            let infos = tokio::select! {
                infos = batches.recv() => infos,
                () = ours.due() => Some(Vec::new()),
            };
            let Some(infos) = infos else { return };
            let built = infos.into_iter().filter(|info| !info.path.is_derivation());
            let found = ours.of(built.collect(), Instant::now());
            self.journal.seen(found.iter().map(|info| &info.path));
            if self.at_once && !found.is_empty() {
                suspect(&self.clients, &self.inspector);
                self.offer(found).await;
            }
        }
    }

    async fn offer(&mut self, infos: Vec<PathInfo>) {
        let (mut offers, open) = self.closures.split_ready(infos);
        if !open.is_empty() {
            let open: Vec<StorePath> = open.into_iter().map(|info| info.path).collect();
            // A closure that cannot be had now is part of the harvest at the end.
            if let Ok(found) = self.store.closure(&open).await {
                self.closures.add(&found.infos);
                offers.extend(found.infos);
            }
        }
        if !offers.is_empty() {
            self.publisher.offer(offers).await;
        }
    }

    /// Offers what dead jobs left and is still valid. Their journals go once ours has it all.
    async fn take_up(&mut self, left: Left) {
        if left.is_empty() {
            return;
        }
        let mut since: BTreeMap<StorePath, Option<u64>> = left
            .seen
            .iter()
            .map(|(path, since)| (path.clone(), Some(*since)))
            .collect();
        for (mark, expected) in &left.expected {
            // What was expected counts if it was really added, by whomever that job's process shared the work with.
            let Ok(added) = self.store.added_since(&Mark::after_id(*mark)).await else {
                return;
            };
            let meant = added
                .infos
                .into_iter()
                .filter(|info| expected.binary_search(&info.path).is_ok());
            for info in meant {
                since.entry(info.path).or_default();
            }
        }
        let all: Vec<StorePath> = since.keys().cloned().collect();
        let Ok(valid) = self.store.infos(&all).await else {
            return;
        };
        let since = |path| since.get(path).copied().flatten();
        let carried: Vec<_> = valid
            .infos
            .iter()
            .map(|info| (&info.path, since(&info.path)))
            .collect();
        self.journal.carried(&carried);
        left.taken_up();
        if !valid.infos.is_empty() {
            self.sink.note(format!(
                "flywheel: {} of earlier jobs taken up",
                count(valid.infos.len() as u64, "path")
            ));
            self.offer(valid.infos).await;
        }
    }
}

fn before_verifying(deadline: &Deadline) -> Instant {
    let left = deadline.at.saturating_duration_since(Instant::now());
    deadline.at - left.mul_f64(VERIFY_SHARE).min(Duration::from_secs(30))
}
