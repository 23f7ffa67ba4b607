//! `flywheel flake-checks`: evaluates a flake's outputs side by side, builds each as soon as it is evaluated, and gives
//! each a verdict of its own. This file has the order of events; the modules below it have the parts, and
//! `src/job/` those that other verbs share.

mod check_runs;
mod engine;
mod evaluation;
mod inputs;
mod lanes;
mod output;
mod report;
mod reporter;
mod systems;

use std::collections::BTreeSet;
use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use sha2::{Digest as _, Sha256};
use tokio_util::sync::CancellationToken;

pub(crate) use self::inputs::Inputs;

use self::engine::{Engine, RunEnd, SettingsFacts};
use self::evaluation::{FlakeEvaluation, lock_arguments};
use self::inputs::{Plan, Systems};
use self::output::OutputProgress;
use self::reporter::Reporter;
use self::systems::{native, tree};
use crate::job::added_paths::AddedPaths;
use crate::job::disk::WorkEnd;
use crate::job::{self, Prepared, STOPPED_LIMIT, Session, StoreWatch};
use crate::report::disk::DiskReport;
use crate::report::job::{JobResult, Outcome, Work};
use crate::report::publication::Publication;
use flywheel_core::disk::reports_full;
use flywheel_core::exit::{Exit, Failure, VerbError};
use flywheel_core::text::count;
use flywheel_github::checks::{Cause, Conclusion, Output, Verdict, board, summary};
use flywheel_nix::build::cache_trust::CacheTrust;
use flywheel_nix::flake::Source;
use flywheel_nix::flake::evaluate::OutputName;
use flywheel_nix::flake::expression::build_command;
use flywheel_nix::flake::system::is_system;
use flywheel_nix::kept_paths::KeptPaths;
use flywheel_nix::path_info::PathInfo;
use flywheel_nix::store::Store;
use flywheel_nix::store_path::StorePath;
use flywheel_nix::tool::Nix;
use flywheel_nix::{gc, temp_roots};
use flywheel_sys::host::peak::Span;
use flywheel_sys::process::signals::Signals;
use flywheel_sys::runner::env::Env;
use flywheel_sys::runner::workflow::Level;

/// Runs the verb.
///
/// # Errors
/// For wrong input, before anything is touched; when there is no usable Nix, or the flake's outputs cannot be listed.
/// An output that fails is no error, and shows in the exit code.
pub(crate) async fn run(inputs: Inputs, env: &Env) -> Result<Exit, VerbError> {
    let plan = Plan::read(&inputs, env)?;
    let (session, mut signals) = Session::begin(&plan.job, env)?;
    let flake_checks = FlakeChecks {
        plan: &plan,
        session,
    };
    let ended = Box::pin(flake_checks.run(&mut signals)).await;
    Ok(flake_checks.session.end(ended, "nothing was checked")?)
}

struct FlakeChecks<'a> {
    plan: &'a Plan,
    session: Session<'a>,
}

/// How a run of `flake-checks` ended.
struct RunResult {
    outs: Vec<OutputProgress>,
    /// Systems that were not asked for, and of whose outputs nothing was evaluated or built.
    not_looked_at: BTreeSet<String>,
    end: RunEnd,
    evaluation: Duration,
    build: Duration,
    /// How many outputs were taken from the evaluation memory.
    remembered: usize,
    /// Labels of outputs for which the evaluation memory held something else.
    wrong: Vec<String>,
}

impl FlakeChecks<'_> {
    async fn run(&self, signals: &mut Signals) -> Result<Exit, Failure> {
        let Some(mut prepared) = self.session.prepare_unread(signals).await? else {
            return Ok(self.cancelled_early());
        };
        let ended = self.run_prepared(&mut prepared, signals).await;
        prepared.stop().await;
        ended
    }

    async fn run_prepared(
        &self,
        prepared: &mut Prepared,
        signals: &mut Signals,
    ) -> Result<Exit, Failure> {
        let check_runs = check_runs::start(self.plan, &self.session);
        let mut reporter = Reporter::new(&self.session.workflow, check_runs);
        let Some(opened) = self.open(prepared, signals).await else {
            let at = Instant::now() + STOPPED_LIMIT;
            reporter
                .close(check_runs::cancelled(), at, &CancellationToken::new())
                .await;
            return Ok(self.cancelled_early());
        };
        let flake_evaluation = match opened {
            Ok(flake_evaluation) => flake_evaluation,
            Err(failure) => return self.give_up(reporter, failure).await,
        };
        let prepared = &*prepared;
        let (mut watch, store, nix) = match self.watch(prepared).await {
            Ok(watched) => watched,
            Err(failure) => return self.give_up(reporter, failure).await,
        };
        let span = Span::begin();
        let disks = self
            .session
            .watch_disks(prepared, watch.as_ref(), self.session.private());
        // Not through the link of the job's commands: what is kept here is named to no proxy.
        let kept = Arc::new(KeptPaths::new(&prepared.nix(), &self.session.sink));
        let ran = self
            .check(
                flake_evaluation,
                (prepared, nix),
                (store, Arc::clone(&kept)),
                &mut reporter,
                signals,
            )
            .await;
        let failed = ran.as_ref().is_ok_and(RunResult::has_failed);
        let is_stopped = ran
            .as_ref()
            .is_ok_and(|ran| matches!(ran.end, RunEnd::Stopped(..)));
        let (disk, freed) = disks.end(WorkEnd::new(is_stopped, failed), signals).await;
        let ran = match ran {
            Ok(ran) => ran,
            Err(failure) => {
                kept.end().await;
                return self.give_up(reporter, failure).await;
            }
        };
        let disk = disk.judged(failed, ran.reports_full_disk());
        let spent = span.end().await;
        if let Some(watch) = &mut watch {
            let results = paths_in_store(&ran, watch.store());
            watch.set_results(results);
        }
        let job = self
            .publish(
                prepared,
                watch,
                reporter,
                (&ran, &kept, (&disk, &freed)),
                signals,
            )
            .await;
        let job = JobResult {
            peak: spent.peak,
            limit: spent.limit,
            disk,
            ..job
        };
        self.report(&job, &ran);
        Ok(Exit::Command(job.exit_code))
    }

    /// Watches the store, which is opened also where it cannot be watched. Gives the Nix whose additions are the job's.
    async fn watch(
        &self,
        prepared: &Prepared,
    ) -> Result<(Option<StoreWatch>, Arc<Store>, Nix), Failure> {
        let watching = self
            .session
            .watch(prepared, temp_roots::JobScope::Descendants);
        let Some(watch) = watching.await else {
            let store = prepared.open_store().await?;
            return Ok((None, Arc::new(store), prepared.nix()));
        };
        let (store, nix) = (Arc::clone(watch.store()), watch.nix(prepared));
        Ok((Some(watch), store, nix))
    }

    /// Opens the flake, and reads the job's settings back beside it. `None` when a signal came first.
    async fn open(
        &self,
        prepared: &mut Prepared,
        signals: &mut Signals,
    ) -> Option<Result<FlakeEvaluation, Failure>> {
        let nix = prepared.nix();
        let (plan, session) = (self.plan, &self.session);
        // Opening the flake evaluates impurely, though only to learn about its source. It has to end before the job's
        // processes are watched, because what they evaluate impurely is not published.
        let arguments = lock_arguments(&plan.arguments);
        let find = Source::find(&nix, &plan.flake, &arguments);
        let (found, in_force) = tokio::select! {
            biased;
            _ = signals.next() => return None,
            found = async { tokio::join!(find, session.read_back(prepared)) } => found,
        };
        prepared.in_force = in_force;
        let source = match found {
            Ok(source) => source,
            Err(error) => return Some(Err(error.into())),
        };
        let systems = self.systems(self.settings(prepared).native.as_ref());
        let open = FlakeEvaluation::open(plan, &nix, source, systems, session);
        tokio::select! {
            biased;
            _ = signals.next() => None,
            opened = open => Some(Ok(opened)),
        }
    }

    /// What the settings in force say; nothing where they could not be read.
    fn settings(&self, prepared: &Prepared) -> SettingsFacts {
        let in_force = prepared.in_force.as_ref().map(|found| &found.settings);
        SettingsFacts {
            native: in_force.and_then(native),
            caches: in_force.map(CacheTrust::from_settings).unwrap_or_default(),
        }
    }

    /// The systems that are asked for; `None` for all.
    fn systems(&self, native: Option<&BTreeSet<String>>) -> Option<Vec<String>> {
        let asked: BTreeSet<String> = match &self.plan.systems {
            Systems::All => return None,
            Systems::These(systems) => systems.iter().cloned().collect(),
            Systems::Auto => native?.clone(),
        };
        Some(asked.into_iter().collect())
    }

    /// Publishes what was built, ends the Check Runs, and collects the store's garbage where that is asked for.
    async fn publish(
        &self,
        prepared: &Prepared,
        watch: Option<StoreWatch>,
        reporter: Reporter,
        (ran, kept, (disk, freed)): (&RunResult, &KeptPaths, (&DiskReport, &[PathInfo])),
        signals: &mut Signals,
    ) -> JobResult {
        let began = Instant::now();
        let mut stopped = match ran.end {
            RunEnd::Stopped(_, at) => Some(at),
            RunEnd::Complete | RunEnd::FailedFast => None,
        };
        if ran.end == RunEnd::Complete && ran.failures() == 0 {
            let folder = Path::new(&self.plan.flake);
            let checked =
                self.session
                    .run_flake_check(prepared, watch.as_ref(), folder, signals.next());
            stopped = checked.await.map(|_| Instant::now());
        }
        let finishing = self.finish(prepared, watch, reporter, (ran, stopped), signals);
        let ((mut added_paths, publication), stats) = finishing.await;
        added_paths.count_freed(freed);
        self.log_check_runs(stats);
        kept.end().await;
        // Last of all: the publisher reads the paths from the store until it has ended.
        tokio::select! {
            biased;
            _ = signals.next() => self.session.sink.note("flywheel: the store is not collected: the job was asked to stop"),
            () = self.collect(prepared, ran) => (),
        }
        let job = self.result(prepared, (ran, disk), &added_paths, publication);
        JobResult {
            publish: began.elapsed(),
            ..job
        }
    }

    /// Publishes what was built and ends the Check Runs, side by side: neither waits for the other's server.
    async fn finish(
        &self,
        prepared: &Prepared,
        watch: Option<StoreWatch>,
        reporter: Reporter,
        (ran, stopped): (&RunResult, Option<Instant>),
        signals: &mut Signals,
    ) -> (
        (AddedPaths, Option<Publication>),
        Option<board::ReportStats>,
    ) {
        let cancel = CancellationToken::new();
        let mut closing = pin!(reporter.close(
            check_runs::aggregate(ran),
            check_runs::deadline(ran),
            &cancel
        ));
        let mut stats = None;
        let published = {
            // No result links are looked for: those in the flake's folder are other tools'.
            let folder = self.session.private();
            let mut publishing = pin!(self.session.deliver_in_time(
                watch,
                &prepared.cache,
                folder,
                stopped,
                &cancel,
                &mut *signals
            ));
            loop {
                tokio::select! {
                    published = &mut publishing => break published,
                    all = &mut closing, if stats.is_none() => stats = Some(all),
                }
            }
        };
        let stats = match stats {
            Some(stats) => stats,
            // Until here publishing has handled the signals; from here on they end the Check Runs.
            None => loop {
                tokio::select! {
                    biased;
                    all = &mut closing => break all,
                    _ = signals.next() => cancel.cancel(),
                }
            },
        };
        (published, stats)
    }

    /// Ends a run without anything to check: the aggregate Check Run shows why.
    async fn give_up(&self, reporter: Reporter, failure: Failure) -> Result<Exit, Failure> {
        let at = Instant::now() + STOPPED_LIMIT;
        reporter
            .close(
                check_runs::for_failure(&*failure),
                at,
                &CancellationToken::new(),
            )
            .await;
        Err(failure)
    }

    /// Lists the outputs, evaluates them to derivations, and builds these.
    async fn check(
        &self,
        mut flake_evaluation: FlakeEvaluation,
        (prepared, nix): (&Prepared, Nix),
        (store, kept): (Arc<Store>, Arc<KeptPaths>),
        reporter: &mut Reporter,
        signals: &mut Signals,
    ) -> Result<RunResult, Failure> {
        let began = Instant::now();
        let naming = async {
            let source = flake_evaluation.keep_source(self.plan, &nix, &store, &kept);
            source.await;
            flake_evaluation.names(self.plan, &nix).await
        };
        let all = tokio::select! {
            biased;
            stop = signals.next() => return Ok(RunResult::nothing(RunEnd::Stopped(stop, Instant::now()))),
            names = naming => names?,
        };
        let settings = self.settings(prepared);
        let systems = self.systems(settings.native.as_ref());
        // Our own list names only what is asked for; that of a function of the user's may name more.
        let (names, others): (Vec<OutputName>, Vec<OutputName>) = all
            .outputs
            .iter()
            .cloned()
            .partition(|name| self.wants(name, systems.as_deref()));
        let others = others.iter().filter_map(|name| self.system_of(name));
        let not_looked_at: BTreeSet<String> =
            all.not_looked_at.iter().cloned().chain(others).collect();
        if !not_looked_at.is_empty() {
            self.session.workflow.log(&format!(
                "flywheel: {}",
                summary::not_looked_at(&not_looked_at)
            ));
        }
        let outs: Vec<OutputProgress> = names.iter().map(|name| self.out(name)).collect();
        let outputs: Vec<Output> = outs.iter().map(|out| out.output.clone()).collect();
        self.session.workflow.log(&format!(
            "flywheel: {} of {}",
            count(outs.len() as u64, "output"),
            self.plan.flake
        ));
        if outs.is_empty() {
            let text = format!(
                "`{}` has no outputs for the systems asked for",
                self.plan.installable()
            );
            self.session
                .workflow
                .annotate(Level::Warning, "nothing to check", &text);
        }
        reporter.announce(&outputs);
        let tree = tree(&flake_evaluation.source, self.session.env);
        let known = flake_evaluation.known(self.plan, &names);
        let remembered = known.len();
        let cancel = CancellationToken::new();
        let evaluation = flake_evaluation.start(self.plan, &nix, cancel);
        let (mut engine, steps) = Engine::new(
            self.plan,
            nix,
            (store, kept),
            tree,
            reporter,
            outs,
            settings,
        );
        let end = engine.run(known, evaluation, steps, signals).await;
        let evaluated = engine.evaluated.unwrap_or_else(Instant::now);
        let outs = std::mem::take(&mut engine.outs);
        // All names are remembered, also those that a function of the user's lists and this run does not check.
        let wrong = flake_evaluation.remember(&outs, all, &self.session.sink);
        Ok(RunResult {
            outs,
            not_looked_at,
            end,
            evaluation: evaluated - began,
            build: evaluated.elapsed(),
            remembered,
            wrong,
        })
    }

    /// Whether the output is of one of these systems, if it is of any.
    fn wants(&self, name: &OutputName, systems: Option<&[String]>) -> bool {
        let system = self.system_of(name);
        systems
            .zip(system)
            .is_none_or(|(systems, system)| systems.contains(&system))
    }

    fn system_of(&self, name: &OutputName) -> Option<String> {
        let mut path = self.plan.attribute.iter().chain(&name.attr);
        path.find(|name| is_system(name)).cloned()
    }

    fn out(&self, name: &OutputName) -> OutputProgress {
        let attribute: Vec<String> = self
            .plan
            .attribute
            .iter()
            .chain(&name.attr)
            .cloned()
            .collect();
        let output = Output {
            label: name.label.clone(),
            attribute: attribute.join("."),
            system: attribute.iter().find(|name| is_system(name)).cloned(),
        };
        let reproduce = build_command(&self.plan.flake, &attribute);
        OutputProgress::new(name.clone(), output, reproduce)
    }

    fn result(
        &self,
        prepared: &Prepared,
        (ran, disk): (&RunResult, &DiskReport),
        added_paths: &AddedPaths,
        publication: Option<Publication>,
    ) -> JobResult {
        let result = self.session.result(
            prepared,
            added_paths,
            publication,
            self.session.plan.require_publish,
        );
        let (outcome, exit_code) = match (ran.end, ran.failures() > 0 || !ran.wrong.is_empty()) {
            (RunEnd::Stopped(..), _) => (Outcome::Cancelled, 130),
            (RunEnd::FailedFast, _) | (RunEnd::Complete, true) if disk.full.is_some() => {
                (Outcome::DiskFull, 1)
            }
            (RunEnd::FailedFast, _) | (RunEnd::Complete, true) => (Outcome::CommandFailed, 1),
            (RunEnd::Complete, false) => (result.outcome, result.exit_code),
        };
        let command = ran.evaluation + ran.build;
        JobResult {
            work: Work::Outputs,
            outcome,
            exit_code,
            command,
            heavy_lane: self.plan.heavy_lane.clone(),
            ..result
        }
    }

    /// Collects the store's garbage, and keeps the derivations of this run from it.
    async fn collect(&self, prepared: &Prepared, ran: &RunResult) {
        // A run that was cut short does not know every derivation that has to be kept.
        if !self.plan.gc || ran.end != RunEnd::Complete {
            return;
        }
        let nix = prepared.nix();
        let derivations: Vec<StorePath> =
            ran.outs.iter().filter_map(|out| out.drv.clone()).collect();
        let name = Sha256::digest(format!("{}\n{}", self.plan.installable(), self.origin()));
        let name = hex::encode(&name[..10]);
        let user = self.session.env.get("USER");
        let kept = match prepared.open_store().await {
            Ok(store) => gc::set_roots(&store.state(), user, &name, &derivations)
                .map_err(|error| error.to_string()),
            Err(error) => Err(error.to_string()),
        };
        let collected = match kept {
            Ok(()) => gc::collect(&nix).await.map_err(|error| error.to_string()),
            Err(problem) => Err(format!("the derivations cannot be kept: {problem}")),
        };
        match collected {
            Ok(collected) => self
                .session
                .sink
                .note(format!("flywheel: the store was collected: {collected}")),
            Err(problem) => self
                .session
                .sink
                .degraded("gc", format!("the store was not collected: {problem}")),
        }
    }

    /// The repository or the folder, which sets this run's flake apart from others on the host.
    fn origin(&self) -> String {
        let repository = self.session.env.get("GITHUB_REPOSITORY").map(str::to_owned);
        let here = || {
            Path::new(".")
                .canonicalize()
                .map(|folder| folder.display().to_string())
        };
        repository.unwrap_or_else(|| here().unwrap_or_default())
    }

    /// Reports a run that was cancelled before there was anything to check.
    fn cancelled_early(&self) -> Exit {
        let exit = Exit::Command(130);
        self.session
            .workflow
            .log("flywheel: cancelled before anything was evaluated; nothing is lost");
        if let Err(error) = job::set_outcome(self.session.env, Outcome::Cancelled, exit) {
            self.session.workflow.annotate(
                Level::Warning,
                "report",
                &format!("the outputs could not be written: {error}"),
            );
        }
        exit
    }
}

impl RunResult {
    fn failures(&self) -> usize {
        let verdicts = self.outs.iter().filter_map(|out| out.verdict.as_ref());
        verdicts
            .filter(|verdict| verdict.conclusion() == Conclusion::Failure)
            .count()
    }

    /// Whether outputs failed of themselves.
    fn has_failed(&self) -> bool {
        self.failures() > 0 && !matches!(self.end, RunEnd::Stopped(..))
    }

    /// Whether the log of an output that failed says that a disk is full.
    fn reports_full_disk(&self) -> bool {
        let verdicts = self.outs.iter().filter_map(|out| out.verdict.as_ref());
        let mut failed = verdicts.filter(|verdict| verdict.conclusion() == Conclusion::Failure);
        let reports = |verdict: &Verdict| {
            let evaluation = match &verdict.cause {
                Cause::Evaluation { text, .. } => Some(text),
                _ => None,
            };
            let mut texts = verdict.log_tail.iter().chain(evaluation);
            texts.any(|text| reports_full(text))
        };
        failed.any(reports)
    }

    /// The outputs with their verdicts.
    fn ended(&self) -> Vec<summary::Ended<'_>> {
        self.outs
            .iter()
            .filter_map(|out| Some((&out.output, out.verdict.as_ref()?)))
            .collect()
    }

    fn nothing(end: RunEnd) -> Self {
        Self {
            outs: Vec::new(),
            not_looked_at: BTreeSet::new(),
            end,
            evaluation: Duration::ZERO,
            build: Duration::ZERO,
            remembered: 0,
            wrong: Vec::new(),
        }
    }
}

/// Whether the paths of an output may be in this store.
fn is_there(out: &OutputProgress) -> bool {
    let cause = out.verdict.as_ref().map(|verdict| &verdict.cause);
    matches!(
        cause,
        Some(
            Cause::Built
                | Cause::AlreadyCached
                | Cause::AlreadyCachedUnsigned
                | Cause::AlreadyInStore
        )
    )
}

/// The paths of the outputs that succeeded, as far as they are in this store.
fn paths_in_store(ran: &RunResult, store: &Store) -> Vec<StorePath> {
    let there = ran.outs.iter().filter(|out| is_there(out));
    let paths = there.filter_map(OutputProgress::paths).flatten();
    paths
        .filter(|path| store.file_of(path).symlink_metadata().is_ok())
        .collect()
}
