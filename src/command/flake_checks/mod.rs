//! `flywheel flake-checks`: evaluates a flake's outputs side by side, builds them as they appear, and gives each a
//! verdict of its own. This file is the story; its parts stand beside it, and those that other verbs share in
//! `command/job/`.

mod check_runs;
mod engine;
mod evaluation;
mod inputs;
mod lanes;
mod output;
mod reporter;

use std::collections::BTreeSet;
use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use sha2::{Digest as _, Sha256};
use tokio_util::sync::CancellationToken;

pub use self::inputs::Inputs;

use self::engine::{Engine, RunEnd};
use self::evaluation::FlakeEvaluation;
use self::inputs::{Plan, Systems};
use self::output::{OutputProgress, Tree};
use self::reporter::Reporter;
use crate::command::Failure;
use crate::command::job::added_paths::AddedPaths;
use crate::command::job::{self, JobReport, Prepared, STOPPED_LIMIT, Session, StoreWatch};
use crate::exit::Exit;
use crate::host::peak::Span;
use crate::nix::flake::Source;
use crate::nix::flake::evaluate::Name;
use crate::nix::settings::Settings;
use crate::nix::store::Store;
use crate::nix::store_path::StorePath;
use crate::nix::{clients, collect};
use crate::process::signals::Signals;
use crate::report::checks::text::annotation;
use crate::report::checks::{Cause, Conclusion, Output, board, files, summary};
use crate::report::job::{JobResult, Outcome};
use crate::report::publication::Publication;
use crate::runner::env::Env;
use crate::runner::files::Files;
use crate::runner::workflow::Level;
use crate::text::{count, one_line};

/// Runs the verb.
///
/// # Errors
/// For wrong input, before anything is touched; when there is no Nix to be had, or the flake's outputs cannot be
/// listed. An output that fails is no error: the exit code says so.
pub async fn run(inputs: Inputs, env: &Env) -> Result<Exit, Failure> {
    let plan = Plan::read(&inputs, env)?;
    let (session, mut signals) = Session::begin(&plan.job, env)?;
    let flake_checks = FlakeChecks {
        plan: &plan,
        session,
    };
    let ended = flake_checks.run(&mut signals).await;
    flake_checks.session.end(ended, "nothing was checked")
}

/// One run.
struct FlakeChecks<'a> {
    plan: &'a Plan,
    session: Session<'a>,
}

/// What a run came to.
struct RunResult {
    outs: Vec<OutputProgress>,
    end: RunEnd,
    evaluation: Duration,
    build: Duration,
    /// How many outputs were remembered.
    remembered: usize,
    /// What the evaluation memory had wrong, by label.
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
        let nix = prepared.nix();
        let mut reporter = Reporter::new(
            &self.session.workflow,
            check_runs::start(self.plan, &self.session),
        );
        // What is asked of Nix impurely, about the source alone, is asked before the job's processes are watched.
        let open = FlakeEvaluation::open(self.plan, &nix, self.session.env, &self.session.sink);
        let opened = tokio::select! {
            biased;
            _ = signals.next() => None,
            found = async { tokio::join!(open, self.session.read_back(prepared)) } => Some(found),
        };
        let (flake_evaluation, in_force) = match opened {
            Some((Ok(flake_evaluation), in_force)) => (flake_evaluation, in_force),
            Some((Err(failure), _)) => return self.give_up(reporter, failure).await,
            None => {
                let at = Instant::now() + STOPPED_LIMIT;
                reporter
                    .close(check_runs::cancelled(), at, &CancellationToken::new())
                    .await;
                return Ok(self.cancelled_early());
            }
        };
        prepared.in_force = in_force;
        let prepared = &*prepared;
        let mut watch = self
            .session
            .watch(prepared, clients::Job::Descendants)
            .await;
        let store = match &watch {
            Some(watch) => Arc::clone(watch.store()),
            None => match prepared.open_store().await {
                Ok(store) => Arc::new(store),
                Err(error) => return self.give_up(reporter, error.into()).await,
            },
        };
        let span = Span::begin();
        let ran = match self
            .check(flake_evaluation, prepared, store, &mut reporter, signals)
            .await
        {
            Ok(ran) => ran,
            Err(failure) => return self.give_up(reporter, failure).await,
        };
        let spent = span.end().await;
        let published = Instant::now();
        if let Some(watch) = &mut watch {
            watch.add_results(paths_in_store(&ran));
        }
        if ran.end == RunEnd::Complete && verdict(&ran).1 == 0 {
            self.session
                .run_flake_check(
                    prepared,
                    watch.as_ref(),
                    Path::new(&self.plan.flake),
                    signals,
                )
                .await;
        }
        let ((added_paths, publication), told) =
            self.finish(prepared, watch, reporter, &ran, signals).await;
        self.log_check_runs(told);
        tokio::select! {
            biased;
            _ = signals.next() => self.session.sink.note("flywheel: the store is not collected: asked to stop"),
            () = self.collect(prepared, &ran) => (),
        }
        let job = self.result(prepared, &ran, &added_paths, publication);
        let job = JobResult {
            publish: published.elapsed(),
            peak: spent.peak,
            limit: spent.limit,
            ..job
        };
        self.tell(&job, &ran);
        Ok(Exit::Command(job.exit_code))
    }

    /// Publishes what was built and ends the Check Runs, side by side: neither waits for the other's server.
    async fn finish(
        &self,
        prepared: &Prepared,
        watch: Option<StoreWatch>,
        reporter: Reporter,
        ran: &RunResult,
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
        let mut told = None;
        let stopped = match ran.end {
            RunEnd::Stopped(_, at) => Some(at),
            RunEnd::Complete | RunEnd::FailedFast => None,
        };
        let published = {
            // Links of other tools are no results of this run.
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
                    all = &mut closing, if told.is_none() => told = Some(all),
                }
            }
        };
        let told = match told {
            Some(told) => told,
            None => loop {
                tokio::select! {
                    biased;
                    all = &mut closing => break all,
                    _ = signals.next() => cancel.cancel(),
                }
            },
        };
        (published, told)
    }

    /// There is nothing to check: the Check Run that stands for all says why.
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

    /// Names, derivations, builds.
    async fn check(
        &self,
        mut flake_evaluation: FlakeEvaluation,
        prepared: &Prepared,
        store: Arc<Store>,
        reporter: &mut Reporter,
        signals: &mut Signals,
    ) -> Result<RunResult, Failure> {
        let began = Instant::now();
        let nix = prepared.nix();
        let all = tokio::select! {
            biased;
            stop = signals.next() => return Ok(RunResult::nothing(RunEnd::Stopped(stop, Instant::now()))),
            names = flake_evaluation.names(self.plan, &nix) => names?,
        };
        let native = prepared
            .in_force
            .as_ref()
            .and_then(|found| native(&found.settings));
        let names: Vec<Name> = all
            .iter()
            .filter(|name| self.wants(name, native.as_ref()))
            .cloned()
            .collect();
        let outs: Vec<OutputProgress> = names.iter().map(|name| self.out(name)).collect();
        let outputs: Vec<Output> = outs.iter().map(|out| out.output.clone()).collect();
        self.session.workflow.say(&format!(
            "flywheel: {} of {}",
            count(outs.len() as u64, "output"),
            self.plan.flake
        ));
        if outs.is_empty() {
            let text = format!(
                "`{}` has no outputs for the systems asked for",
                self.plan.installable(&[])
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
        let (mut engine, steps) = Engine::new(self.plan, nix, store, tree, reporter, outs, native);
        let end = engine.run(known, evaluation, steps, signals).await;
        let evaluated = engine.evaluated.unwrap_or_else(Instant::now);
        let outs = std::mem::take(&mut engine.outs);
        let wrong = flake_evaluation.remember(&outs, all, &self.session.sink);
        Ok(RunResult {
            outs,
            end,
            evaluation: evaluated - began,
            build: evaluated.elapsed(),
            remembered,
            wrong,
        })
    }

    fn wants(&self, name: &Name, native: Option<&BTreeSet<String>>) -> bool {
        let mut path = self.plan.attribute.iter().chain(&name.attr);
        let Some(system) = path.find(|name| is_system(name)) else {
            return true;
        };
        match &self.plan.systems {
            Systems::All => true,
            Systems::These(systems) => systems.contains(system),
            Systems::Auto => native.is_none_or(|native| native.contains(system)),
        }
    }

    fn out(&self, name: &Name) -> OutputProgress {
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
        OutputProgress::new(name.clone(), output, self.plan.installable(&name.attr))
    }

    fn result(
        &self,
        prepared: &Prepared,
        ran: &RunResult,
        added_paths: &AddedPaths,
        publication: Option<Publication>,
    ) -> JobResult {
        let result = self.session.result(
            prepared,
            added_paths,
            publication,
            self.session.plan.require_publish,
        );
        let (_, failed) = verdict(ran);
        let (outcome, exit_code) = match (ran.end, failed > 0 || !ran.wrong.is_empty()) {
            (RunEnd::Stopped(..), _) => (Outcome::Cancelled, 130),
            (RunEnd::FailedFast, _) | (RunEnd::Complete, true) => (Outcome::CommandFailed, 1),
            (RunEnd::Complete, false) => (result.outcome, result.exit_code),
        };
        let command = ran.evaluation + ran.build;
        JobResult {
            outcome,
            exit_code,
            command,
            heavy_lane: self.plan.heavy_lane.clone(),
            ..result
        }
    }

    /// Keeps the derivations of this run, and removes what else nothing needs.
    async fn collect(&self, prepared: &Prepared, ran: &RunResult) {
        if !self.plan.gc || ran.end != RunEnd::Complete {
            return;
        }
        let nix = prepared.nix();
        let derivations: Vec<StorePath> =
            ran.outs.iter().filter_map(|out| out.drv.clone()).collect();
        let name = Sha256::digest(format!(
            "{}\n{}",
            self.plan.installable(&[]),
            self.location()
        ));
        let name: String = name[..10]
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        let kept = collect::keep(&nix, self.session.env.get("USER"), &name, &derivations);
        let collected = match kept {
            Ok(()) => collect::collect(&nix)
                .await
                .map_err(|error| error.to_string()),
            Err(error) => Err(format!("the derivations cannot be kept: {error}")),
        };
        match collected {
            Ok(said) => self
                .session
                .sink
                .note(format!("flywheel: the store was collected: {said}")),
            Err(problem) => self
                .session
                .sink
                .degraded("gc", format!("the store was not collected: {problem}")),
        }
    }

    /// What tells this run's flake from that of another repository on the host.
    fn location(&self) -> String {
        let repository = self.session.env.get("GITHUB_REPOSITORY").map(str::to_owned);
        let here = || {
            Path::new(".")
                .canonicalize()
                .map(|folder| folder.display().to_string())
        };
        repository.unwrap_or_else(|| here().unwrap_or_default())
    }

    fn log_check_runs(&self, told: Option<board::ReportStats>) {
        let Some(told) = told else { return };
        self.session.workflow.say(&format!(
            "flywheel: {} shown, in {}",
            count(told.shown as u64, "Check Run"),
            count(told.requests as u64, "request")
        ));
        if !told.missing.is_empty() {
            let names = one_line(&told.missing.join(", "), 500);
            let text = format!(
                "{} could not be shown: {names}. The summary has them.",
                told.missing.len()
            );
            self.session.sink.degraded("check runs", text);
        }
    }

    fn tell(&self, job: &JobResult, ran: &RunResult) {
        for label in &ran.wrong {
            let text = format!(
                "what was remembered of `{label}` is not what it evaluates to; the memory is corrected. Please report it: this must not happen"
            );
            self.session
                .workflow
                .annotate(Level::Error, "evaluation memory", &text);
        }
        let ended = ran.ended();
        let files = Files::from_env(self.session.env);
        self.mark_lines(&ended);
        self.write_files(&ended);
        self.session
            .workflow
            .say(&format!("flywheel: {}", summary::closing_line(&ended)));
        let of_run = [
            ("evaluation-seconds", ran.evaluation),
            ("build-seconds", ran.build),
        ];
        let of_run = of_run.map(|(name, time)| (name, format!("{:.3}", time.as_secs_f64())));
        let of = |conclusion| {
            ended
                .iter()
                .filter(|(_, verdict)| verdict.conclusion() == conclusion)
                .count()
                .to_string()
        };
        let counts = [
            ("outputs", ended.len().to_string()),
            ("succeeded", of(Conclusion::Success)),
            ("failed", of(Conclusion::Failure)),
            ("cached", of(Conclusion::Neutral)),
            ("cancelled", of(Conclusion::Cancelled)),
            ("remembered", ran.remembered.to_string()),
        ];
        let mut written = files.add_summary(&summary::render(&ended));
        for (name, value) in counts.into_iter().chain(of_run) {
            written = written.and_then(|()| files.set_output(name, &value));
        }
        if let Err(error) = written {
            self.session.workflow.annotate(
                Level::Warning,
                "report",
                &format!("the report could not be written: {error}"),
            );
        }
        JobReport::new(job).emit(&self.session.workflow, &files);
    }

    /// Marks the lines of the sources that are wrong. GitHub shows ten of them.
    fn mark_lines(&self, ended: &[summary::Ended<'_>]) {
        for (output, verdict) in ended {
            if let (Some(location), Some(text)) = (verdict.cause.location(), annotation(verdict)) {
                let title = one_line(&output.label, 100);
                self.session.workflow.annotate_line(
                    Level::Error,
                    &title,
                    &text,
                    &location.file,
                    location.line,
                    location.column,
                );
            }
        }
    }

    /// Writes the files that other tools read. That one cannot be written is said, and changes nothing.
    fn write_files(&self, ended: &[summary::Ended<'_>]) {
        let junit = self
            .plan
            .junit
            .as_ref()
            .map(|file| (file, files::junit(&self.plan.check_name, ended)));
        let lines = self
            .plan
            .json_lines
            .as_ref()
            .map(|file| (file, files::json_lines(ended)));
        for (file, text) in junit.into_iter().chain(lines) {
            if let Err(error) = std::fs::write(file, text) {
                let text = format!("`{}` could not be written: {error}", file.display());
                self.session
                    .workflow
                    .annotate(Level::Warning, "report", &text);
            }
        }
    }

    /// The run was cancelled before there was anything to check.
    fn cancelled_early(&self) -> Exit {
        let exit = Exit::Command(130);
        self.session
            .workflow
            .say("flywheel: cancelled before anything was evaluated; nothing is lost");
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
            end,
            evaluation: Duration::ZERO,
            build: Duration::ZERO,
            remembered: 0,
            wrong: Vec::new(),
        }
    }
}

/// How many outputs have ended, and how many of them failed.
fn verdict(ran: &RunResult) -> (usize, usize) {
    let failed = ran.outs.iter().filter_map(|out| out.verdict.as_ref());
    let failed = failed
        .filter(|verdict| verdict.conclusion() == Conclusion::Failure)
        .count();
    (ran.outs.len(), failed)
}

/// Whether its paths may be in this store.
fn is_there(out: &OutputProgress) -> bool {
    let cause = out.verdict.as_ref().map(|verdict| &verdict.cause);
    matches!(cause, Some(Cause::Built | Cause::AlreadyCached))
}

/// The paths of the outputs that succeeded, as far as they are in this store.
fn paths_in_store(ran: &RunResult) -> Vec<StorePath> {
    let there = ran.outs.iter().filter(|out| is_there(out));
    let paths = there.filter_map(OutputProgress::paths).flatten();
    paths
        .filter(|path| path.to_path().symlink_metadata().is_ok())
        .collect()
}

/// Whether a name of an attribute path names a system.
fn is_system(name: &str) -> bool {
    const KERNELS: [&str; 9] = [
        "linux", "darwin", "freebsd", "netbsd", "openbsd", "windows", "cygwin", "none", "wasi",
    ];
    name.rsplit_once('-').is_some_and(|(cpu, kernel)| {
        let cpu = !cpu.is_empty()
            && cpu
                .chars()
                .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_');
        cpu && KERNELS.iter().any(|name| kernel.starts_with(name))
    })
}

/// The systems that this machine and its builders build; `None` where Nix does not say.
fn native(settings: &Settings) -> Option<BTreeSet<String>> {
    let mut systems: BTreeSet<String> = settings.words("extra-platforms").into_iter().collect();
    systems.insert(settings.text("system")?);
    // `ssh://host x86_64-linux,aarch64-linux key 4 …; …`, or a file of such lines behind `@` (nix.conf(5)).
    let builders = settings.text("builders").unwrap_or_default();
    let text = match builders.strip_prefix('@') {
        Some(file) => std::fs::read_to_string(file.trim()).unwrap_or_default(),
        None => builders,
    };
    let machines = text
        .split([';', '\n'])
        .map(|line| line.split('#').next().unwrap_or_default());
    let listed = machines.filter_map(|machine| machine.split_whitespace().nth(1));
    systems.extend(
        listed
            .flat_map(|list| list.split(','))
            .filter(|word| is_system(word))
            .map(str::to_owned),
    );
    Some(systems)
}

/// Where the flake's files are in the repository: a `path:` flake's tree begins at its own folder.
fn tree(source: &Source, env: &Env) -> Tree {
    let is_path = source.locked.get("type").is_some_and(|kind| kind == "path");
    let workspace = env
        .path("GITHUB_WORKSPACE")
        .or_else(|| Path::new(".").canonicalize().ok());
    let prefix = workspace.filter(|_| is_path).and_then(|workspace| {
        let folder = source
            .resolved
            .strip_prefix("path:")?
            .split('?')
            .next()?
            .to_owned();
        let below = Path::new(&folder).canonicalize().ok()?;
        Some(
            below
                .strip_prefix(workspace.canonicalize().ok()?)
                .ok()?
                .to_string_lossy()
                .into_owned(),
        )
    });
    Tree {
        store: source.path.clone(),
        prefix: prefix.unwrap_or_default(),
    }
}
