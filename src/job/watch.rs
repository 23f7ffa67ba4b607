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
use super::ownership::Ownership;
use super::prepare::Prepared;
use super::store_host::StoreHost;
use super::stream::{Deadline, JobJournal, Stream, StreamInputs};
use super::{policy, publication};
use crate::report::publication::{Missed, Publication};
use flywheel_cache::client::inspect::Inspector;
use flywheel_core::policy::Rule;
use flywheel_core::progress::Sink;
use flywheel_core::trust::Verdict;
use flywheel_nix::store::{self, Store, state_folder};
use flywheel_nix::store_path::StorePath;
use flywheel_nix::temp_roots::{JobScope, TempRootWatcher};
use flywheel_nix::tool::error_summary;
use flywheel_sys::host::job_registry::JobRecord;
use flywheel_sys::process::signals::Signals;
use flywheel_sys::runner::context;

/// The flake's checks may build for long; the job's own limit is shorter.
const CHECK_LIMIT: Duration = Duration::from_secs(6 * 60 * 60);
/// What reading the store at the end may take before the publication goes on without it.
const COLLECT_LIMIT: Duration = Duration::from_secs(120);

/// The store as it was before the job's work, and the publication that watches it.
#[derive(Debug)]
pub(crate) struct StoreWatch {
    ownership: Arc<Ownership>,
    inspector: Arc<Inspector>,
    begun: SystemTime,
    stream: Option<Stream>,
    results: Vec<StorePath>,
}

impl StoreWatch {
    pub(crate) fn store(&self) -> &Arc<Store> {
        &self.ownership.store
    }

    /// Names paths that are the job's results whichever process built them: their closure goes to the cache.
    pub(crate) fn add_results(&mut self, paths: impl IntoIterator<Item = StorePath>) {
        self.results.extend(paths);
    }
}

impl Session<'_> {
    /// Marks the store, and starts to publish if the trust gate allows it. `processes` are those of the job. `None`
    /// when the store cannot be read.
    pub(crate) async fn watch(
        &self,
        prepared: &Prepared,
        processes: JobScope,
    ) -> Option<StoreWatch> {
        let ownership = match self.open_marked(prepared, processes).await {
            Ok(opened) => Arc::new(opened),
            Err(error) => {
                let text = format!(
                    "the store cannot be read, so nothing is counted or published: {error}"
                );
                self.sink.degraded("publication", text);
                return None;
            }
        };
        let permit = self.decision.permit().zip(prepared.to.clone());
        let journal = permit
            .as_ref()
            .and_then(|_| JobJournal::open(self.plan, &ownership.mark, &self.sink))
            .unwrap_or_default();
        // A path goes into the journal before it is valid: a job that is killed then leaves its name to the next. The
        // jobs beside this one learn of it at the same time.
        let (written, host) = (journal.journal.clone(), Arc::clone(&ownership.host));
        ownership.temp_roots.subscribe(move |paths| {
            let wanted = || paths.iter().filter(|path| !path.is_derivation());
            written.expected(wanted());
            host.claim(wanted().map(StorePath::base_name));
        });
        let inspector = self.inspector(prepared, &ownership.store);
        let inputs = StreamInputs {
            ownership: &ownership,
            inspector: &inspector,
            // A path that may yet be withheld must not be sent: a cache takes nothing back.
            at_once: !self.requires_flake_check(),
            workers: self.plan.publish_workers,
            verify: self.plan.verify,
        };
        let stream = permit.map(|(permit, to)| {
            Stream::start(&permit, to, &prepared.cache, &inputs, journal, &self.sink)
        });
        Some(StoreWatch {
            ownership,
            inspector,
            begun: SystemTime::now(),
            stream,
            results: Vec::new(),
        })
    }

    /// Opens the store, and marks it: what is registered later may be the job's.
    async fn open_marked(
        &self,
        prepared: &Prepared,
        processes: JobScope,
    ) -> Result<Ownership, store::Error> {
        let store = prepared.open_store().await?;
        let state = state_folder(&prepared.nix());
        let own = JobRecord {
            repository: context::repository(self.env),
            trusted: matches!(self.decision.verdict(), Verdict::MayPublish(_)),
            store: state.display().to_string(),
        };
        // A job enters the registry before it adds a path, so that whoever sees the path finds the job.
        let host = StoreHost::enter(
            self.plan.registry().as_deref(),
            own,
            self.plan.shared_host,
            context::is_hosted_runner(self.env),
            &self.sink,
        );
        // Before the mark: a process that was gone by now cannot have added what comes after it.
        let temp_roots = TempRootWatcher::start(&state, processes);
        let mark = store.mark().await?;
        let keys = prepared.in_force.iter().flat_map(|found| {
            let keys = found.settings.list("trusted-public-keys");
            keys.into_iter().filter_map(|key| key.parse().ok())
        });
        Ok(Ownership {
            store: Arc::new(store),
            mark,
            temp_roots: Arc::new(temp_roots),
            host: Arc::new(host),
            trusted_keys: keys.collect(),
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
            ownership,
            begun,
            stream,
            results,
            ..
        } = watch;
        let collecting = AddedPaths::collect(&ownership, (folder, begun), results);
        let limit = deadline.at.min(tokio::time::Instant::now() + COLLECT_LIMIT);
        let added_paths = match timeout_at(limit, collecting).await {
            Ok(Ok(added_paths)) => added_paths,
            Ok(Err(error)) => unread(&error.to_string(), sink),
            Err(_) => unread("the deadline was over (`drain-timeout`)", sink),
        };
        let mut publication = match (stream, self.decision.publishes()) {
            (Some(stream), _) => Some(stream.finish(&added_paths, deadline, sink).await),
            // The job was to publish, but its cache takes nothing: each path is lost, and named.
            (None, true) => cache
                .refusal()
                .map(|reason| publication::all_lost(&added_paths.wanted, &reason)),
            (None, false) => None,
        };
        if let Some(publication) = &mut publication {
            let ambiguous = added_paths.ambiguous.iter().map(|(path, doubt)| Missed {
                path: path.to_string(),
                reason: doubt.to_string(),
            });
            publication.ambiguous.extend(ambiguous);
        }
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

fn unread(problem: &str, sink: &Sink) -> AddedPaths {
    sink.degraded(
        "publication",
        format!("the store could not be read at the end: {problem}"),
    );
    AddedPaths::default()
}
