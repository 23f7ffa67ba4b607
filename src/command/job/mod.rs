//! What the verbs share that run a job or a part of one (`nix-job`, `watch-store`, `publish`): which cache,
//! Nix and the cache made ready, the settings, publication while the job runs, and what came of it.
//! No verb of its own: how a job begins and ends is each verb's story.

pub mod attach;
mod closed;
pub mod destination;
pub mod harvest;
pub mod inputs;
mod ours;
pub mod policy;
pub mod publication;
pub mod settings;
pub mod source;
pub mod stream;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use serde::{Deserialize, Serialize};
use tokio::time::timeout_at;
use tokio_util::sync::CancellationToken;

use self::attach::Cache;
use self::destination::Opening;
use self::harvest::Harvest;
use self::inputs::Plan;
use self::settings::{Ingredients, Settled};
use self::source::Source;
use self::stream::{Bound, From, JournalBook, Stream};
use crate::cache::destination::Target;
use crate::cache::inspect::Inspector;
use crate::command::Failure;
use crate::exit::{Exit, Explain};
use crate::http::{Clients as HttpClients, Roots};
use crate::nix::bootstrap::{self, Ready};
use crate::nix::effective_settings::EffectiveSettings;
use crate::nix::store::{self, Mark, Store, state_folder};
use crate::nix::store_path::StorePath;
use crate::nix::temp_roots::{self, TempRootWatcher};
use crate::nix::tool::{Nix, error_summary};
use crate::policy::Rule;
use crate::process::signals::Signals;
use crate::progress::Sink;
use crate::report::job::{CacheState, Job, Outcome, Trust};
use crate::report::publication::Publication;
use crate::report::screen::Screen;
use crate::report::{outputs, summary};
use crate::runner::context;
use crate::runner::env::Env;
use crate::runner::files::Files;
use crate::runner::workflow::{Level, Workflow};
use crate::secret::Secret;
use crate::trust::{Decision, decide};

/// Making Nix ready may include installing it.
const BOOTSTRAP_LIMIT: Duration = Duration::from_secs(600);
/// The flake's checks may build for long; a job's own limit is shorter.
const CHECK_LIMIT: Duration = Duration::from_secs(6 * 60 * 60);
/// What reading the store at the end may take before the publication goes on without it.
const HARVEST_LIMIT: Duration = Duration::from_secs(120);
/// After the first request to stop, publishing and verifying end here; GitHub kills 10 s after its
/// `SIGINT`, and we promise to be done in 6.
pub const STOPPED_LIMIT: Duration = Duration::from_millis(5200);

/// The secrets that the job hands us.
#[derive(Clone, Debug, Default)]
pub struct Secrets {
    /// The cache's token.
    pub attic: Option<Secret>,
    /// The fetchers' credential.
    pub github: Option<Secret>,
}

impl Secrets {
    /// Takes them from the environment, and has the runner mask them.
    pub fn masked(env: &Env, workflow: &Workflow) -> Self {
        let take = |name: &str| {
            let secret = env.get(name).and_then(Secret::new);
            secret.inspect(|secret| workflow.mask(secret))
        };
        Self {
            attic: take("ATTIC_TOKEN"),
            github: take("GITHUB_TOKEN"),
        }
    }
}

/// In a job the runner's own folder, which it empties itself; else the user's.
pub fn private_base(env: &Env) -> PathBuf {
    let named = ["RUNNER_TEMP", "XDG_RUNTIME_DIR", "TMPDIR"]
        .into_iter()
        .filter_map(|name| env.path(name));
    named
        .into_iter()
        .find(|folder| folder.is_dir())
        .unwrap_or_else(|| "/tmp".into())
}

/// Whether and why this job publishes.
pub fn judge(plan: &Plan, secrets: &Secrets, env: &Env) -> Decision {
    let has_token = secrets.attic.is_some()
        || matches!(plan.source, Source::Embedded { .. } | Source::Store(_));
    decide(&context::facts(env), &plan.request, has_token)
}

/// What there is to say before anything is done.
pub fn introduce(plan: &Plan, decision: &Decision, workflow: &Workflow) {
    for hint in &plan.bad_hints {
        workflow.annotate(Level::Warning, "hint", hint);
    }
    workflow.say(&format!(
        "flywheel: trust: {}: {}",
        decision.verdict().word(),
        decision.reason()
    ));
    if decision.is_refused() {
        let remedy = decision
            .remedy()
            .map(|remedy| format!(". {remedy}"))
            .unwrap_or_default();
        workflow.annotate(
            Level::Notice,
            "not publishing",
            &format!("{}{remedy}", decision.reason()),
        );
    }
}

/// What a job's parts need.
pub struct Work<'a> {
    /// The checked inputs.
    pub plan: &'a Plan,
    /// The job's environment.
    pub env: &'a Env,
    /// Its secrets.
    pub secrets: &'a Secrets,
    /// Whether it publishes.
    pub decision: &'a Decision,
    /// Where it is told what happens.
    pub sink: Sink,
    /// What draws it, and keeps what was worse than it should be.
    pub screen: &'a Screen,
    /// Where secret files go.
    pub private: &'a Path,
}

/// Nix and the cache, ready.
pub struct Prepared {
    /// Nix.
    pub ready: Ready,
    /// The cache, attached or left out.
    pub cache: Cache,
    /// Where paths go, if the job publishes and there is somewhere.
    pub to: Option<Target>,
    /// The job's settings.
    pub settled: Settled,
    /// What Nix is like under them, once it has been asked and if it has answered.
    pub in_force: Option<EffectiveSettings>,
    /// How long it took.
    pub took: Duration,
}

impl Prepared {
    /// Nix with the job's settings.
    pub fn nix(&self) -> Nix {
        self.ready.nix.clone().with_config(&self.settled.config)
    }

    /// Opens the job's store.
    ///
    /// # Errors
    /// When Nix cannot.
    pub async fn open_store(&self) -> Result<Store, store::Error> {
        match self
            .in_force
            .as_ref()
            .and_then(|found| found.opened.as_ref())
        {
            Some(opened) => Store::from_opened(&self.nix(), opened).await,
            None => Store::open(&self.nix()).await,
        }
    }

    /// Ends what was started for this job: our own cache, a daemon.
    pub async fn stop(self) {
        self.cache.stop().await;
        self.ready.stop().await;
    }
}

/// The store before the job's work, and the publication that watches it.
#[derive(Debug)]
pub struct Watch {
    store: Arc<Store>,
    mark: Mark,
    clients: Arc<TempRootWatcher>,
    inspector: Arc<Inspector>,
    begun: SystemTime,
    stream: Option<Stream>,
    results: Vec<StorePath>,
}

impl Watch {
    /// The store.
    pub fn store(&self) -> &Arc<Store> {
        &self.store
    }

    /// Names paths that are the job's results whoever built them: their closure goes to the cache.
    pub fn add_results(&mut self, paths: impl IntoIterator<Item = StorePath>) {
        self.results.extend(paths);
    }
}

impl Work<'_> {
    /// Makes Nix and the cache ready side by side, and the settings after them, which are then read back.
    ///
    /// # Errors
    /// When there is no Nix to be had. A cache that fails is left out.
    pub async fn make_ready(&self, workflow: &Workflow) -> Result<Prepared, Failure> {
        let mut prepared = self.make_ready_unread(workflow).await?;
        prepared.in_force = self.read_back(&prepared).await;
        Ok(prepared)
    }

    /// The same without reading the settings back, for who has other things to ask Nix meanwhile.
    async fn make_ready_unread(&self, workflow: &Workflow) -> Result<Prepared, Failure> {
        let begun = Instant::now();
        let sink = self.sink.clone();
        let (plan, token) = (self.plan, self.secrets.attic.as_ref());
        let attaching = async {
            let roots = Roots {
                files: self.env.path("NIX_SSL_CERT_FILE").into_iter().collect(),
            };
            let http = HttpClients::new(&roots)?;
            let cache =
                attach::attach(&plan.source, plan.public_key.as_ref(), token, &http, &sink).await;
            Ok::<_, Failure>((http, cache))
        };
        let bootstrapping =
            async { Ok(Box::pin(bootstrap::ready(self.env, &sink, BOOTSTRAP_LIMIT)).await?) };
        // Nix is asked first: the system's certificates are read while it answers.
        let (ready, (http, mut cache)) = tokio::try_join!(bootstrapping, attaching)?;
        if let Some(secret) = &cache.token {
            workflow.mask(secret);
        }
        let mut settled = self.settle(&ready, &cache, &sink).await;
        let nix = ready.nix.clone().with_config(&settled.config);
        let opening = Opening {
            env: self.env,
            nix: &nix,
            http: &http,
            private: self.private,
        };
        opening.ping(&mut cache, &sink).await;
        if cache.store.is_some() && !cache.is_attached() {
            settled = self.settle(&ready, &cache, &sink).await;
        }
        let opened = if self.decision.publishes() {
            opening.open(&cache, &plan.way, &sink).await
        } else {
            Ok(None)
        };
        let to = opened.unwrap_or_else(|reason| {
            workflow.annotate(
                Level::Notice,
                "not publishing",
                &format!("publication is skipped: {reason}"),
            );
            cache.skipped = Some(reason);
            None
        });
        sink.note(format!(
            "flywheel: {} at {}",
            ready.nix.version,
            ready.nix.program.display()
        ));
        if let Some(address) = cache.address().filter(|_| cache.is_attached()) {
            sink.note(format!("flywheel: cache {address} attached"));
        }
        Ok(Prepared {
            ready,
            cache,
            to,
            settled,
            in_force: None,
            took: begun.elapsed(),
        })
    }

    async fn settle(&self, ready: &Ready, cache: &Cache, sink: &Sink) -> Settled {
        let ingredients = Ingredients {
            env: self.env,
            ready,
            cache,
            github_token: self.secrets.github.as_ref(),
            publishes: self.decision.publishes(),
            extra: &self.plan.extra_nix_config,
            private: self.private,
        };
        settings::settle(&ingredients, sink).await
    }

    /// Asks Nix what it makes of the job's settings; what it does not follow is said.
    pub async fn read_back(&self, prepared: &Prepared) -> Option<EffectiveSettings> {
        settings::say_ignored(
            &prepared.ready,
            &prepared.settled,
            &self.plan.extra_nix_config,
            &self.sink,
        )
        .await
    }

    /// Makes ready in a group of the log. `None` when the job was cancelled meanwhile.
    ///
    /// # Errors
    /// As `make_ready`.
    pub async fn prepare(
        &self,
        workflow: &Workflow,
        signals: &mut Signals,
    ) -> Result<Option<Prepared>, Failure> {
        in_group(workflow, signals, self.make_ready(workflow)).await
    }

    /// The same for who reads the settings back beside other questions.
    ///
    /// # Errors
    /// As `make_ready`.
    pub async fn prepare_unread(
        &self,
        workflow: &Workflow,
        signals: &mut Signals,
    ) -> Result<Option<Prepared>, Failure> {
        in_group(workflow, signals, self.make_ready_unread(workflow)).await
    }

    /// Marks the store, and starts to publish if the gate allows it.
    pub async fn watch(&self, prepared: &Prepared, whose: temp_roots::JobScope) -> Option<Watch> {
        let sink = self.sink.clone();
        let nix = prepared.nix();
        let opened = async {
            let store = prepared.open_store().await?;
            // Before the mark: a process that was gone by now cannot have added what comes after it.
            let clients = TempRootWatcher::start(&state_folder(&nix), whose);
            let mark = store.mark().await?;
            Ok::<_, store::Error>((store, Arc::new(clients), mark))
        };
        let (store, clients, mark) = match opened.await {
            Ok(opened) => opened,
            Err(error) => {
                sink.degraded(
                    "publication",
                    format!(
                        "the store cannot be read, so nothing is counted or published: {error}"
                    ),
                );
                return None;
            }
        };
        let permit = self.decision.permit().zip(prepared.to.clone());
        let journal = permit
            .as_ref()
            .and_then(|_| JournalBook::open(self.plan, &mark, &sink))
            .unwrap_or_default();
        let written = journal.journal.clone();
        let store = Arc::new(store);
        clients.subscribe(move |paths| {
            written.expected(paths.iter().filter(|path| !path.is_derivation()));
        });
        let inspector = self.inspector(prepared, &store);
        let at_once = !self.demands_check();
        let workers = self.plan.publish_workers;
        let from = From {
            store: &store,
            mark: &mark,
            clients: &clients,
            inspector: &inspector,
            at_once,
            workers,
        };
        let stream = permit
            .map(|(permit, to)| Stream::start(&permit, to, &prepared.cache, &from, journal, &sink));
        Some(Watch {
            store,
            mark,
            clients,
            inspector,
            begun: SystemTime::now(),
            stream,
            results: Vec::new(),
        })
    }

    /// Whether nothing may go before the flake's checks have passed.
    pub fn demands_check(&self) -> bool {
        self.plan.require_flake_check
            && self.plan.policy.looks_at(Rule::Unchecked)
            && self.decision.publishes()
    }

    /// Who looks at the job's paths before they go.
    fn inspector(&self, prepared: &Prepared, store: &Arc<Store>) -> Arc<Inspector> {
        let secrets = [
            ("ATTIC_TOKEN", self.secrets.attic.as_ref()),
            ("GITHUB_TOKEN", self.secrets.github.as_ref()),
        ];
        let secrets = [
            &secrets[..],
            &[("the cache's token", prepared.cache.token.as_ref())],
        ]
        .concat();
        let inspector = self.plan.policy.inspector(
            self.env,
            &secrets,
            &[&prepared.settled.config],
            Some(Arc::clone(store)),
        );
        if let Some(found) = &self.plan.impurity {
            policy::accuse(&inspector, found, "the command");
        }
        if self.demands_check() {
            inspector.accuse(
                Rule::Unchecked,
                "`nix flake check` has not passed in this job".to_owned(),
            );
        }
        inspector
    }

    /// Runs `nix flake check` in `folder`, where the policy demands it and the job has ended well; from then on
    /// what the job built may go. Its failure is said, and withholds everything.
    pub async fn check(
        &self,
        prepared: &Prepared,
        watch: Option<&Watch>,
        folder: &Path,
        signals: &mut Signals,
    ) {
        let Some(watch) = watch.filter(|_| self.demands_check()) else {
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
            Ok(()) => watch.inspector.acquit(Rule::Unchecked),
            Err(problem) => self.sink.degraded(
                "policy",
                format!("`nix flake check` did not pass: {problem}"),
            ),
        }
    }

    /// Reads what the job brought into the store, `folder`'s result links included, publishes what is
    /// left of it and verifies, within `bound`.
    pub async fn deliver(
        &self,
        watch: Watch,
        cache: &Cache,
        folder: &Path,
        bound: &Bound,
    ) -> (Harvest, Option<Publication>) {
        let sink = self.sink.clone();
        let Watch {
            store,
            mark,
            clients,
            begun,
            stream,
            results,
            ..
        } = watch;
        let reaping = Harvest::reap(&store, &clients, &mark, (folder, begun), results);
        let limit = bound
            .deadline
            .min(tokio::time::Instant::now() + HARVEST_LIMIT);
        let harvest = match timeout_at(limit, reaping)
            .await
            .map_err(|_| "there was no time left".to_owned())
        {
            Ok(Ok(harvest)) => harvest,
            Ok(Err(error)) => unread(&error.to_string(), &sink),
            Err(problem) => unread(&problem, &sink),
        };
        for path in &harvest.unclear {
            let text = "was left out: another job was at work in this store, and whose it is cannot be read";
            sink.degraded("publication", format!("{path} {text}"));
        }
        let publication = match (stream, self.decision.publishes()) {
            (Some(stream), _) => Some(stream.finish(cache, &harvest, bound, &sink).await),
            (None, true) => cache
                .refusal()
                .map(|reason| publication::of_nothing(&harvest.wanted, &reason)),
            (None, false) => None,
        };
        (harvest, publication)
    }

    /// Delivers within the time there is: until a moment after `stopped`, when the job was asked to end, else within
    /// `drain-timeout`. A request to stop that comes now ends it by `cancel`, which others may wait for too: what is
    /// under way gets no more time than the runner gives.
    pub async fn deliver_in_time(
        &self,
        watch: Option<Watch>,
        cache: &Cache,
        folder: &Path,
        stopped: Option<Instant>,
        cancel: &CancellationToken,
        signals: &mut Signals,
    ) -> (Harvest, Option<Publication>) {
        let Some(watch) = watch else {
            return (Harvest::default(), None);
        };
        let deadline = match stopped {
            Some(at) => at + STOPPED_LIMIT,
            None => Instant::now() + self.plan.drain_timeout,
        };
        let bound = Bound {
            deadline: deadline.into(),
            cancel: cancel.clone(),
        };
        let mut delivering = Box::pin(self.deliver(watch, cache, folder, &bound));
        loop {
            tokio::select! {
                biased;
                done = &mut delivering => return done,
                stop = signals.next() => {
                    self.sink.note(format!("flywheel: {stop:?}: publishing ends now; what is left is listed"));
                    bound.cancel.cancel();
                }
            }
        }
    }

    /// Whether everything that was asked to be published was.
    pub fn is_whole(&self, publication: Option<&Publication>) -> bool {
        let asked = self.decision.is_refused() || self.decision.publishes();
        publication.map_or(!asked, Publication::is_whole)
    }

    /// What there is to tell of a job that ended well; what is not known here is left empty.
    /// `require_publish`: whether a loss fails the step.
    pub fn told(
        &self,
        prepared: &Prepared,
        harvest: &Harvest,
        publication: Option<Publication>,
        require_publish: bool,
    ) -> Job {
        let lost = require_publish && !self.is_whole(publication.as_ref());
        let withheld = self.plan.policy.fails
            && publication
                .as_ref()
                .is_some_and(|found| !found.withheld.is_empty());
        let outcome = match (lost, withheld) {
            (true, _) => Outcome::NotPublished,
            (false, true) => Outcome::Withheld,
            (false, false) => Outcome::Success,
        };
        Job {
            outcome,
            exit_code: u8::from(outcome != Outcome::Success),
            nix: format!(
                "{} at {}",
                prepared.ready.nix.version,
                prepared.ready.nix.program.display()
            ),
            trust: Trust {
                verdict: self.decision.verdict().word(),
                publishes: self.decision.publishes(),
                attic: self.decision.plan().attic.word(),
                flakehub: self.decision.plan().flakehub.word(),
                reason: self.decision.reason(),
            },
            cache: prepared.cache.address(),
            cache_state: prepared.cache.state.clone(),
            degraded: self.screen.degraded(),
            built: harvest.built,
            substituted: harvest.substituted,
            added: harvest.added,
            publication,
            unpublished: self.unpublished(&prepared.cache),
            bootstrap: prepared.took,
            command: Duration::ZERO,
            publish: Duration::ZERO,
            peak: None,
            limit: None,
            out_of_memory: None,
            heavy_lane: None,
        }
    }

    /// Why nothing is published, where nothing is.
    fn unpublished(&self, cache: &Cache) -> String {
        match (self.decision.publishes(), &cache.state) {
            (true, CacheState::NotNamed) => "no cache is named (`attic-server`)".to_owned(),
            (true, CacheState::Off) => "the cache is switched off (`attic-enabled`)".to_owned(),
            (true, _) if cache.skipped.is_some() => {
                format!(
                    "publication was skipped: {}",
                    cache.skipped.as_deref().unwrap_or_default()
                )
            }
            (true, _) => "the store could not be read".to_owned(),
            (false, _) => self.decision.reason(),
        }
    }
}

async fn in_group(
    workflow: &Workflow,
    signals: &mut Signals,
    making: impl Future<Output = Result<Prepared, Failure>>,
) -> Result<Option<Prepared>, Failure> {
    workflow.group("flywheel: prepare");
    let prepared = tokio::select! {
        biased;
        _ = signals.next() => Ok(None),
        prepared = Box::pin(making) => prepared.map(Some),
    };
    workflow.end_group();
    prepared
}

/// Says in the summary and the outputs that a job did not come to its work. The error itself is said by whoever ends
/// the program. `what`: what did not happen.
pub fn tell_not_started(failure: &dyn Explain, env: &Env, what: &str) {
    let hint = failure.hint().unwrap_or_default();
    let text = format!("### ❌ Flywheel: {what}\n\n{failure}\n\n{hint}\n");
    // A report that cannot be written changes nothing.
    let _ = set_outcome(env, Outcome::NotStarted, failure.exit());
    let _ = Files::from_env(env).add_summary(&text);
}

/// The two outputs that say how a job ended.
///
/// # Errors
/// When the runner's file cannot be written.
pub fn set_outcome(env: &Env, outcome: Outcome, exit: Exit) -> std::io::Result<()> {
    let files = Files::from_env(env);
    files.set_output("outcome", outcome.word())?;
    files.set_output("exit-code", &exit.code().to_string())
}

fn withheld_level(job: &Job) -> Level {
    if job.outcome == Outcome::Withheld {
        Level::Error
    } else {
        Level::Warning
    }
}

fn unread(problem: &str, sink: &Sink) -> Harvest {
    sink.degraded(
        "publication",
        format!("the store could not be read at the end: {problem}"),
    );
    Harvest::default()
}

/// Everything that is said at a job's end, so that another process may say it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Told {
    annotations: Vec<(Level, String, String)>,
    lines: Vec<String>,
    summary: String,
    outputs: Vec<(String, String)>,
    /// The step's exit code.
    pub exit_code: u8,
}

impl Told {
    /// What there is to say of a job.
    pub fn of(job: &Job) -> Self {
        let mut annotations = Vec::new();
        if let Some(found) = &job.out_of_memory {
            annotations.push((
                Level::Error,
                "out of memory".to_owned(),
                found.text(job.heavy_lane.as_deref()),
            ));
        }
        let level = if job.outcome == Outcome::NotPublished {
            Level::Error
        } else {
            Level::Warning
        };
        if let Some(publication) = &job.publication {
            for (title, missed) in [
                ("lost", &publication.lost),
                ("not verified", &publication.unverified),
            ] {
                let named = missed
                    .iter()
                    .map(|one| format!("{}: {}", one.path, one.reason));
                annotations.extend(named.map(|text| (level, title.to_owned(), text)));
            }
        }
        for (title, missed, level) in [
            (
                "withheld",
                job.publication.as_ref().map(|found| &found.withheld),
                withheld_level(job),
            ),
            (
                "policy",
                job.publication.as_ref().map(|found| &found.warned),
                Level::Warning,
            ),
        ] {
            let named = missed
                .into_iter()
                .flatten()
                .map(|one| format!("{}: {}", one.path, one.reason));
            annotations.extend(named.map(|text| (level, title.to_owned(), text)));
        }
        Self {
            annotations,
            lines: vec![
                format!("flywheel: {}", job.clocks()),
                format!("flywheel: {}", job.closing_line()),
            ],
            summary: summary::of_job(job),
            outputs: outputs::of_job(job)
                .into_iter()
                .map(|(name, value)| (name.to_owned(), value))
                .collect(),
            exit_code: job.exit_code,
        }
    }

    /// A job that was cancelled before it began: there is nothing to say.
    pub fn cancelled() -> Self {
        Self {
            exit_code: 130,
            ..Self::default()
        }
    }

    /// Says it all. A report that cannot be written never changes how the job ends.
    pub fn tell(&self, workflow: &Workflow, files: &Files) {
        for (level, title, text) in &self.annotations {
            workflow.annotate(*level, title, text);
        }
        for line in &self.lines {
            workflow.say(line);
        }
        let mut written = files.add_summary(&self.summary);
        for (name, value) in &self.outputs {
            written = written.and_then(|()| files.set_output(name, value));
        }
        if let Err(error) = written {
            workflow.annotate(
                Level::Warning,
                "report",
                &format!("the report could not be written: {error}"),
            );
        }
    }
}
