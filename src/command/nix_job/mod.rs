//! `flywheel nix-job`: makes Nix ready, attaches the cache, runs the command, publishes, verifies,
//! reports, and leaves nothing behind. This file is the story; its parts stand beside it, and those
//! that other verbs share in `src/job/`.

mod environment;
mod inputs;

use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

pub use self::inputs::Inputs;

use self::inputs::{Plan, Wanted};
use crate::job::added_paths::AddedPaths;
use crate::job::{self, JobReport, Prepared, Secrets, Work};
use crate::report::job::{JobResult, Outcome};
use crate::report::publication::Publication;
use crate::report::screen::Screen;
use flywheel_core::budget::{self, Observed};
use flywheel_core::exit::Failure;
use flywheel_core::exit::{Exit, UsageError};
use flywheel_core::secret::Secret;
use flywheel_nix::temp_roots;
use flywheel_sys::host::peak::{Span, Spent};
use flywheel_sys::host::private::PrivateFolder;
use flywheel_sys::process::signals::Signals;
use flywheel_sys::process::supervise::{CommandExit, Supervised};
use flywheel_sys::runner::env::Env;
use flywheel_sys::runner::files::Files;
use flywheel_sys::runner::workflow::{Level, Workflow};

/// Runs the verb.
///
/// # Errors
/// For wrong input, before anything is touched; when there is no Nix to be had, or the command
/// cannot be started. A command that fails is no error: its code is the exit code.
pub async fn run(inputs: Inputs, env: &Env) -> Result<Exit, Failure> {
    let plan = Plan::read(&inputs, env)?;
    let workflow = Workflow::new(env.in_github_actions());
    let secrets = Secrets::masked(env, &workflow);
    let decision = job::judge(&plan.job, &secrets, env);
    let screen = Screen::new(&workflow);
    // Before anything is made that would have to be removed.
    let mut signals = Signals::listen()
        .map_err(|error| UsageError::new("signals", format!("cannot be heard: {error}")))?;
    let private = PrivateFolder::create(&job::private_base(env))?;
    job::announce(&plan.job, &decision, &workflow);
    let work = Work {
        plan: &plan.job,
        env,
        secrets: &secrets,
        decision: &decision,
        sink: screen.sink(),
        screen: &screen,
        private: private.path(),
    };
    let ended = NixJob {
        plan: &plan,
        work,
        workflow,
    }
    .run(&mut signals)
    .await;
    screen.finish();
    if let Err(failure) = &ended {
        job::report_not_started(&**failure, env, "the command was not run");
    }
    ended
}

/// One job.
struct NixJob<'a> {
    plan: &'a Plan,
    work: Work<'a>,
    workflow: Workflow,
}

impl NixJob<'_> {
    async fn run(&self, signals: &mut Signals) -> Result<Exit, Failure> {
        let Some(prepared) = self.work.prepare(&self.workflow, signals).await? else {
            return Ok(self.cancelled_early());
        };
        let watch = self
            .work
            .watch(&prepared, temp_roots::JobScope::Descendants)
            .await;
        let span = Span::begin();
        let ended = self.command(&prepared, signals).await?;
        let spent = span.end().await;
        let published = Instant::now();
        if ended.code == 0 && ended.stopped.is_none() {
            self.work
                .check(&prepared, watch.as_ref(), &self.plan.folder, signals)
                .await;
        }
        let stopped = ended.stopped.map(|(_, at)| at);
        let folder = &self.plan.folder;
        let (added_paths, publication) = self
            .work
            .deliver_in_time(
                watch,
                &prepared.cache,
                folder,
                stopped,
                &CancellationToken::new(),
                signals,
            )
            .await;
        let job = self.told(
            &prepared,
            &ended,
            &spent,
            &added_paths,
            publication,
            published.elapsed(),
        );
        prepared.stop().await;
        JobReport::new(&job).emit(&self.workflow, &Files::from_env(self.work.env));
        Ok(Exit::Command(job.exit_code))
    }

    async fn command(
        &self,
        prepared: &Prepared,
        signals: &mut Signals,
    ) -> Result<CommandExit, Failure> {
        let ready = &prepared.ready;
        let environment = environment::impurity_in_command(
            self.work.env,
            &prepared.settings.config,
            ready.folder.as_deref(),
            &ready.variables(),
        );
        let path = environment.get(std::ffi::OsStr::new("PATH")).cloned();
        let mut command = match &self.plan.wanted {
            Wanted::Script(text) => {
                let file = self.work.private.join("command.sh");
                std::fs::write(&file, text).map_err(|error| {
                    UsageError::new("command", format!("cannot be written to a file: {error}"))
                })?;
                Supervised::script(&file, path.as_deref(), &self.plan.folder)
            }
            Wanted::Program(words) => {
                Supervised::program(words, path.as_deref(), &self.plan.folder)
            }
        };
        command.environment = environment;
        let word = Secret::random();
        if !self.plan.workflow_commands {
            self.workflow.stop_commands(&word);
        }
        self.work.screen.hold();
        let ended = command.run(signals).await;
        if !self.plan.workflow_commands {
            self.workflow.resume_commands(&word);
        }
        self.work.screen.release();
        Ok(ended?)
    }

    fn told(
        &self,
        prepared: &Prepared,
        ended: &CommandExit,
        spent: &Spent,
        added_paths: &AddedPaths,
        publication: Option<Publication>,
        publish: Duration,
    ) -> JobResult {
        let observed = Observed {
            killed_in_group: spent.killed_in_group,
            killed_on_machine: spent.killed_on_machine,
            failed: ended.code != 0,
            limit: spent.limit,
            peak: spent.peak,
        };
        let out_of_memory = budget::out_of_memory(&observed);
        let told = self.work.result(
            prepared,
            added_paths,
            publication,
            self.work.plan.require_publish,
        );
        let (outcome, exit_code) = match (ended.stopped, ended.code, &out_of_memory) {
            (Some(_), code, _) => (Outcome::Cancelled, code),
            (None, 0, _) => (told.outcome, told.exit_code),
            (None, code, Some(_)) => (Outcome::OutOfMemory, code),
            (None, code, None) => (Outcome::CommandFailed, code),
        };
        JobResult {
            outcome,
            exit_code,
            command: ended.lasted,
            publish,
            peak: spent.peak,
            limit: spent.limit,
            out_of_memory,
            heavy_lane: self.plan.heavy_lane.clone(),
            ..told
        }
    }

    /// The job was cancelled before the command began.
    fn cancelled_early(&self) -> Exit {
        let exit = Exit::Command(130);
        self.workflow.say(
            "flywheel: cancelled before the command began; nothing was run and nothing is lost",
        );
        if let Err(error) = job::set_outcome(self.work.env, Outcome::Cancelled, exit) {
            self.workflow.annotate(
                Level::Warning,
                "report",
                &format!("the outputs could not be written: {error}"),
            );
        }
        exit
    }
}
