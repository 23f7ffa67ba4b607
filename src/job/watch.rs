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
use super::daemon_names::DaemonNames;
use super::not_watched::remedy;
use super::ownership::Ownership;
use super::policy;
use super::prepare::Prepared;
use super::store_host::StoreHost;
use super::stream::{Deadline, JobJournal, Stream, StreamInputs};
use crate::report::publication::{Missed, Publication};
use flywheel_cache::client::inspect::Inspector;
use flywheel_cache::client::journal::Journal;
use flywheel_core::policy::Rule;
use flywheel_core::trust::Verdict;
use flywheel_nix::daemon_proxy::{DaemonProxy, ProxyError};
use flywheel_nix::store::{self, Store};
use flywheel_nix::store_location::daemon_socket;
use flywheel_nix::store_path::StorePath;
use flywheel_nix::store_writers::other_writers;
use flywheel_nix::temp_roots::{JobScope, TempRootWatcher};
use flywheel_nix::tool::{Nix, error_summary};
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
    /// The journal of a job that does not publish, by which the others know of it.
    presence: Option<Journal>,
    /// The job's results, where it knows all of them by itself.
    results: Option<Vec<StorePath>>,
}

impl StoreWatch {
    pub(crate) fn store(&self) -> &Arc<Store> {
        &self.ownership.store
    }

    /// When the job's work began.
    pub(crate) fn begun(&self) -> SystemTime {
        self.begun
    }

    pub(super) fn ownership(&self) -> &Arc<Ownership> {
        &self.ownership
    }

    pub(super) fn stream(&self) -> Option<&Stream> {
        self.stream.as_ref()
    }

    /// The value of `NIX_DAEMON_SOCKET_PATH` for the job's commands, if they are to have one.
    pub(crate) fn daemon_link(&self) -> Option<&Path> {
        let names = self.ownership.daemon_names.as_ref()?;
        Some(names.link())
    }

    /// Nix with the job's settings, for calls whose additions are the job's.
    pub(crate) fn nix(&self, prepared: &Prepared) -> Nix {
        let link = self.daemon_link().and_then(Path::to_str);
        let nix = prepared.nix();
        match link {
            Some(link) => nix.with_variable("NIX_DAEMON_SOCKET_PATH", Some(link)),
            None => nix,
        }
    }

    /// Names the paths that are the job's results, all of them, whichever process built them: their closure goes to the
    /// cache. What its processes name then tells nothing more.
    pub(crate) fn set_results(&mut self, paths: impl IntoIterator<Item = StorePath>) {
        self.results = Some(paths.into_iter().collect());
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
        let ownership = match self.open_marked(prepared, processes).await {
            Ok(opened) => Arc::new(opened),
            Err(error) => {
                self.record_unwatched_store(&error);
                return None;
            }
        };
        self.record_named_stores(&prepared.nix(), &ownership.store);
        // Also where the cache is away: what cannot be sent now is the next job's to send.
        let permit = self
            .decision
            .permit()
            .filter(|_| self.plan.source.identity().is_some());
        let (publishes, is_ci) = (permit.is_some(), context::in_ci(self.env));
        let mark = &ownership.mark;
        let journal = JobJournal::open(self.plan, publishes, is_ci, mark, &self.sink).await;
        let presence = permit.is_none().then(|| journal.journal.clone());
        // A path goes into the journal before it is valid: a job that is killed then leaves its name to the next. The
        // jobs beside this one learn of it at the same time.
        let written = permit.is_some().then(|| journal.journal.clone());
        let host = Arc::clone(&ownership.host);
        ownership.temp_roots.subscribe(move |paths| {
            let wanted = || paths.iter().filter(|path| !path.is_derivation());
            if let Some(journal) = &written {
                journal.expected(wanted());
            }
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
        let stream = permit.map(|permit| {
            let to = prepared.to.clone();
            Stream::start(&permit, to, &prepared.cache, &inputs, journal, &self.sink)
        });
        Some(StoreWatch {
            ownership,
            inspector,
            begun: SystemTime::now(),
            stream,
            presence,
            results: None,
        })
    }

    /// Opens the store, and marks it: what is registered later may be the job's.
    async fn open_marked(
        &self,
        prepared: &Prepared,
        processes: JobScope,
    ) -> Result<Ownership, store::Error> {
        let store = prepared.open_store().await?;
        store.location().map_err(Clone::clone)?;
        let state = store.state();
        let own = JobRecord {
            repository: context::repository(self.env),
            trusted: matches!(self.decision.verdict(), Verdict::MayPublish(_)),
            store: state.display().to_string(),
        };
        // A job enters the registry before it adds a path, so that a job that sees the path finds it.
        let host = StoreHost::enter(
            self.plan.registry().as_deref(),
            own,
            self.plan.shared_host,
            context::is_hosted_runner(self.env),
            &self.sink,
        );
        // Before the mark: a process that was gone by now cannot have added what comes after it.
        let processes_are_ours = processes == JobScope::Descendants;
        let temp_roots = TempRootWatcher::start(&state, processes);
        let mark = store.mark().await?;
        let keys = prepared.in_force.iter().flat_map(|found| {
            let keys = found.settings.list("trusted-public-keys");
            keys.into_iter().filter_map(|key| key.parse().ok())
        });
        let host = Arc::new(host);
        let daemon_names = match self.daemon_proxy(prepared, processes_are_ours) {
            Some(proxy) => Some(DaemonNames::start(proxy, Arc::clone(&host), &self.sink).await),
            None => None,
        };
        let in_force = prepared.in_force.as_ref();
        let writers = in_force.and_then(|found| {
            let (opened, user) = (found.opened.as_ref()?, self.env.get("USER"));
            other_writers(store.folder(), opened, &found.settings, user)
        });
        Ok(Ownership {
            writers,
            store: Arc::new(store),
            mark,
            temp_roots: Arc::new(temp_roots),
            host,
            trusted_keys: keys.collect(),
            daemon_names,
        })
    }

    /// The link in front of the daemon's socket, where the job's commands get it and reach the store through a daemon.
    /// Root's commands do not, and a proxy of root's would lend its rights to every client.
    fn daemon_proxy(&self, prepared: &Prepared, starts_commands: bool) -> Option<DaemonProxy> {
        let opened = prepared.in_force.as_ref()?.opened.as_ref()?;
        let is_user = !rustix::process::geteuid().is_root();
        let have_commands_link = starts_commands || self.lasting_link.is_some();
        if !is_user || !have_commands_link || opened.url != "daemon" {
            return None;
        }
        let socket = daemon_socket(&prepared.nix());
        let prepare = |socket: &Path, folder: &Path| {
            DaemonProxy::prepare(socket, folder, self.env, self.sink.clone())
        };
        let proxy = match &self.lasting_link {
            Some(link) => link
                .make(&socket)
                .map_err(ProxyError::Link)
                .and_then(|daemon| prepare(&daemon, link.folder())),
            None => prepare(&socket, self.private()),
        };
        let failed = |error: &ProxyError| {
            let text = format!("{error}; beside another job, paths of this one may be ambiguous");
            self.sink.degraded("publication", text);
        };
        proxy.inspect_err(failed).ok()
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
    /// Ends early when `stop` is ready, and returns what that gave: the time for publishing is short from then on.
    pub(crate) async fn run_flake_check<T>(
        &self,
        prepared: &Prepared,
        watch: Option<&StoreWatch>,
        folder: &Path,
        stop: impl Future<Output = T>,
    ) -> Option<T> {
        let watch = watch.filter(|_| self.requires_flake_check())?;
        self.sink
            .note("flywheel: `nix flake check` (`require-flake-check`)");
        let nix = watch.nix(prepared);
        let flake = folder.to_string_lossy();
        let arguments = ["flake", "check", &flake];
        let checking = nix.run(&arguments, CHECK_LIMIT);
        let (ended, stopped) = tokio::select! {
            biased;
            stopped = stop => (Err("it was cancelled".to_owned()), Some(stopped)),
            output = checking => match output {
                Ok(output) if output.status.success() => (Ok(()), None),
                Ok(output) => (Err(error_summary(&output.stderr)), None),
                Err(error) => (Err(error.to_string()), None),
            },
        };
        match ended {
            Ok(()) => watch.inspector.clear_violation(Rule::Unchecked),
            Err(problem) => self.sink.degraded(
                "policy",
                format!("`nix flake check` did not pass: {problem}"),
            ),
        }
        stopped
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
            presence,
            results,
            ..
        } = watch;
        let knows_results = results.is_some();
        let results = results.unwrap_or_default();
        let collecting = AddedPaths::collect(&ownership, (folder, begun), results);
        let limit = deadline.at.min(tokio::time::Instant::now() + COLLECT_LIMIT);
        let (mut added_paths, is_complete) = match timeout_at(limit, collecting).await {
            Ok(Ok(added_paths)) => (added_paths, true),
            Ok(Err(error)) => (
                self.record_unread_store(&error.to_string(), remedy(&error)),
                false,
            ),
            Err(_) => (
                self.record_unread_store("the deadline was over", "Raise `drain-timeout`."),
                false,
            ),
        };
        if knows_results {
            // Nix's own calls are short, and some end before it can be read what they named.
            added_paths.unread_processes = 0;
        }
        let mut publication = match stream {
            Some(stream) => {
                let added_paths = (&added_paths, is_complete);
                Some(stream.finish(cache, added_paths, deadline, sink).await)
            }
            // The job does not publish, or no cache is named.
            None => None,
        };
        if let Some(publication) = &mut publication {
            let ambiguous = added_paths.ambiguous.iter().map(|(path, doubt)| Missed {
                path: path.to_string(),
                reason: doubt.to_string(),
            });
            publication.ambiguous.extend(ambiguous);
        }
        if let Some(presence) = presence {
            presence.close();
        }
        if let Some(names) = &ownership.daemon_names {
            names.stop().await;
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
