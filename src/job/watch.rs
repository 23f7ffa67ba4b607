//! The store under watch while a job works: marked before, published from as paths become
//! valid if the trust gate allows it, and read through once more at the end.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use tokio::time::timeout_at;
use tokio_util::sync::CancellationToken;

use super::added_paths::AddedPaths;
use super::attach::Cache;
use super::begin::{STOPPED_LIMIT, Session};
use super::not_watched::remedy;
use super::prepare::Prepared;
use super::stream::{Deadline, JobJournal, Stream, StreamInputs};
use super::{policy, publication};
use crate::report::publication::Publication;
use flywheel_cache::client::inspect::Inspector;
use flywheel_core::policy::Rule;
use flywheel_nix::store::{self, Mark, Store};
use flywheel_nix::store_path::StorePath;
use flywheel_nix::temp_roots::{JobScope, TempRootWatcher};
use flywheel_nix::tool::error_summary;
use flywheel_sys::process::signals::Signals;

/// The flake's checks may build for long; the job's own limit is shorter.
const CHECK_LIMIT: Duration = Duration::from_secs(6 * 60 * 60);
/// What reading the store at the end may take before the publication goes on without it.
const COLLECT_LIMIT: Duration = Duration::from_secs(120);

/// The store as it was before the job's work, and the publication that watches it.
#[derive(Debug)]
pub(crate) struct StoreWatch {
    store: Arc<Store>,
    mark: Mark,
    temp_roots: Arc<TempRootWatcher>,
    inspector: Arc<Inspector>,
    begun: SystemTime,
    stream: Option<Stream>,
    results: Vec<StorePath>,
}

impl StoreWatch {
    pub(crate) fn store(&self) -> &Arc<Store> {
        &self.store
    }

    /// Names paths that are the job's results whichever process built them: their closure goes to the cache.
    pub(crate) fn add_results(&mut self, paths: impl IntoIterator<Item = StorePath>) {
        self.results.extend(paths);
    }
}

impl Session<'_> {
    /// Marks the store, and starts to publish if the trust gate allows it. `processes` are those of the job. `None`
    /// when the store cannot be read, which is recorded.
    pub(crate) async fn watch(
        &self,
        prepared: &Prepared,
        processes: JobScope,
    ) -> Option<StoreWatch> {
        let (store, temp_roots, mark) = match open_marked(prepared, processes).await {
            Ok(opened) => opened,
            Err(error) => {
                self.record_unwatched_store(&error);
                return None;
            }
        };
        self.record_named_stores(&prepared.nix(), &store);
        let permit = self.decision.permit().zip(prepared.to.clone());
        let journal = permit
            .as_ref()
            .and_then(|_| JobJournal::open(self.plan, &mark, &self.sink))
            .unwrap_or_default();
        // A path goes into the journal before it is valid: a job that is killed then leaves its name to the next.
        let written = journal.journal.clone();
        temp_roots.subscribe(move |paths| {
            written.expected(paths.iter().filter(|path| !path.is_derivation()));
        });
        let inspector = self.inspector(prepared, &store);
        let inputs = StreamInputs {
            store: &store,
            mark: &mark,
            temp_roots: &temp_roots,
            inspector: &inspector,
            // A path that may yet be withheld must not be sent: a cache takes nothing back.
            at_once: !self.requires_flake_check(),
            workers: self.plan.publish_workers,
        };
        let stream = permit.map(|(permit, to)| {
            Stream::start(&permit, to, &prepared.cache, &inputs, journal, &self.sink)
        });
        Some(StoreWatch {
            store,
            mark,
            temp_roots,
            inspector,
            begun: SystemTime::now(),
            stream,
            results: Vec::new(),
        })
    }

    /// Whether nothing may be published before the flake's checks have passed.
    pub(crate) fn requires_flake_check(&self) -> bool {
        self.plan.require_flake_check
            && self.plan.policy.looks_at(Rule::Unchecked)
            && self.decision.publishes()
    }

    /// Makes the inspector of the job's paths, which knows the secrets of this session.
    fn inspector(&self, prepared: &Prepared, store: &Arc<Store>) -> Arc<Inspector> {
        let secrets = [
            ("ATTIC_TOKEN", self.secrets.attic.as_ref()),
            ("GITHUB_TOKEN", self.secrets.github.as_ref()),
            // The embedded cache makes a token of its own.
            ("the cache's token", prepared.cache.token.as_ref()),
        ];
        let inspector = self.plan.policy.inspector(
            self.env,
            &secrets,
            &[&prepared.settings.config],
            Some(Arc::clone(store)),
        );
        if let Some(found) = &self.plan.impurity {
            policy::record_impurity(&inspector, found, "the command");
        }
        if self.requires_flake_check() {
            inspector.record_violation(
                Rule::Unchecked,
                "`nix flake check` has not passed in this job".to_owned(),
            );
        }
        inspector
    }

    /// Runs `nix flake check` in `folder`, where the policy requires it; once it has passed, what the job built may
    /// be published. A failure is a warning, and withholds everything. To be called when the job has ended well.
    pub(crate) async fn run_flake_check(
        &self,
        prepared: &Prepared,
        watch: Option<&StoreWatch>,
        folder: &Path,
        signals: &mut Signals,
    ) {
        let Some(watch) = watch.filter(|_| self.requires_flake_check()) else {
            return;
        };
        self.sink
            .note("flywheel: `nix flake check` (`require-flake-check`)");
        let nix = prepared.nix();
        let flake = folder.to_string_lossy();
        let arguments = ["flake", "check", &flake];
        let checking = nix.run(&arguments, CHECK_LIMIT);
        let ended = tokio::select! {
            biased;
            _ = signals.next() => Err("it was cancelled".to_owned()),
            output = checking => match output {
                Ok(output) if output.status.success() => Ok(()),
                Ok(output) => Err(error_summary(&output.stderr)),
                Err(error) => Err(error.to_string()),
            },
        };
        match ended {
            Ok(()) => watch.inspector.clear_violation(Rule::Unchecked),
            Err(problem) => self.sink.degraded(
                "policy",
                format!("`nix flake check` did not pass: {problem}"),
            ),
        }
    }

    /// Collects what the job added to the store, the result links in `folder` included, publishes what is left of it
    /// and verifies, all by `deadline`.
    pub(crate) async fn deliver(
        &self,
        watch: StoreWatch,
        cache: &Cache,
        folder: &Path,
        deadline: &Deadline,
    ) -> (AddedPaths, Option<Publication>) {
        let sink = &self.sink;
        let StoreWatch {
            store,
            mark,
            temp_roots,
            begun,
            stream,
            results,
            ..
        } = watch;
        let collecting = AddedPaths::collect(&store, &temp_roots, &mark, (folder, begun), results);
        let limit = deadline.at.min(tokio::time::Instant::now() + COLLECT_LIMIT);
        let added_paths = match timeout_at(limit, collecting).await {
            Ok(Ok(added_paths)) => added_paths,
            Ok(Err(error)) => self.record_unread_store(&error.to_string(), remedy(&error)),
            Err(_) => self.record_unread_store("the deadline was over", "Raise `drain-timeout`."),
        };
        for path in &added_paths.ambiguous {
            let text = "was left out: another job was at work in this store, and which of the two added it cannot be read";
            sink.degraded("publication", format!("{path} {text}"));
        }
        let publication = match (stream, self.decision.publishes()) {
            (Some(stream), _) => Some(stream.finish(cache, &added_paths, deadline, sink).await),
            // The job was to publish, but its cache takes nothing: each path is lost, and named.
            (None, true) => cache
                .refusal()
                .map(|reason| publication::all_lost(&added_paths.wanted, &reason)),
            (None, false) => None,
        };
        (added_paths, publication)
    }

    /// Delivers within the time that is left: `STOPPED_LIMIT` from `stopped` on, when the job was asked to stop, else
    /// `drain-timeout`. A request to stop that comes now cancels `cancel`, which other tasks may wait for too.
    pub(crate) async fn deliver_in_time(
        &self,
        watch: Option<StoreWatch>,
        cache: &Cache,
        folder: &Path,
        stopped: Option<Instant>,
        cancel: &CancellationToken,
        signals: &mut Signals,
    ) -> (AddedPaths, Option<Publication>) {
        let Some(watch) = watch else {
            return (AddedPaths::default(), None);
        };
        let at = match stopped {
            Some(at) => at + STOPPED_LIMIT,
            None => Instant::now() + self.plan.drain_timeout,
        };
        let deadline = Deadline {
            at: at.into(),
            cancel: cancel.clone(),
        };
        let mut delivering = Box::pin(self.deliver(watch, cache, folder, &deadline));
        loop {
            tokio::select! {
                biased;
                done = &mut delivering => return done,
                stop = signals.next() => {
                    self.sink.note(format!("flywheel: {stop:?}: the job is cancelled and publishing stops; paths that are left are listed"));
                    deadline.cancel.cancel();
                }
            }
        }
    }
}

async fn open_marked(
    prepared: &Prepared,
    processes: JobScope,
) -> Result<(Arc<Store>, Arc<TempRootWatcher>, Mark), store::Error> {
    let store = prepared.open_store().await?;
    store.location().map_err(Clone::clone)?;
    // Before the mark: a process that was gone by now cannot have added what comes after it.
    let temp_roots = TempRootWatcher::start(&store.state(), processes);
    let mark = store.mark().await?;
    Ok((Arc::new(store), Arc::new(temp_roots), mark))
}
