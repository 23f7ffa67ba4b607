//! `flywheel nix-job`: makes Nix ready, attaches the cache, runs the command, publishes, verifies, reports, and leaves
//! nothing behind. This file has the order of events; `src/job/` has the parts that other verbs share.

mod environment;
mod inputs;

use std::path::Path;
use std::time::Instant;

use tokio_util::sync::CancellationToken;

pub(crate) use self::inputs::Inputs;

use self::inputs::{Plan, Wanted};
use crate::job::added_paths::AddedPaths;
use crate::job::disk::WorkEnd;
use crate::job::failed_builds::LogSearch;
use crate::job::{self, JobReport, Prepared, Session, StoreWatch};
use crate::report::disk::DiskReport;
use crate::report::job::{JobResult, Outcome};
use crate::report::publication::Publication;
use flywheel_core::budget::{self, Observed};
use flywheel_core::disk::reports_full;
use flywheel_core::exit::{Exit, Failure, VerbError};
use flywheel_nix::path_info::PathInfo;
use flywheel_nix::temp_roots;
use flywheel_sys::host::peak::{Span, Spent};
use flywheel_sys::process::signals::Signals;
use flywheel_sys::process::supervise::{CommandExit, Shell, SuperviseError, Supervised};
use flywheel_sys::runner::env::Env;
use flywheel_sys::runner::files::Files;
use flywheel_sys::runner::guard::StoppedCommands;
use flywheel_sys::runner::workflow::Level;

/// Runs the verb.
///
/// # Errors
/// For wrong input, before anything is touched; when there is no usable Nix, or the command cannot be started. A
/// command that fails is no error: its code is the exit code.
pub(crate) async fn run(inputs: Inputs, env: &Env) -> Result<Exit, VerbError> {
    let plan = Plan::read(&inputs, env)?;
    let (session, mut signals) = Session::begin(&plan.job, env)?;
    let nix_job = NixJob {
        plan: &plan,
        session,
    };
    let ended = nix_job.run(&mut signals).await;
    Ok(nix_job.session.end(ended, "the command was not run")?)
}

struct NixJob<'a> {
    plan: &'a Plan,
    session: Session<'a>,
}

/// How the command ended, if it could be started, and what has the runner obey commands again.
type Ran = (Result<CommandExit, SuperviseError>, Option<StoppedCommands>);

impl NixJob<'_> {
    async fn run(&self, signals: &mut Signals) -> Result<Exit, Failure> {
        let Some(prepared) = self.session.prepare(signals).await? else {
            return Ok(self.cancelled_early());
        };
        let watch = self
            .session
            .watch(&prepared, temp_roots::JobScope::Descendants)
            .await;
        let span = Span::begin();
        let (ran, (disk, freed)) = self
            .command_on_disks(&prepared, watch.as_ref(), signals)
            .await;
        let (ended, stopped_commands) = ran?;
        // It waits for the runner to read the command's last lines, while the job goes on.
        let is_over = ended
            .as_ref()
            .map_or(true, |ended| ended.orphans_alive == 0);
        let resuming = tokio::spawn(async move {
            if let Some(stopped) = stopped_commands {
                stopped.resume(is_over).await;
            }
        });
        let ended = match ended {
            Ok(ended) => ended,
            Err(error) => {
                // The error is an annotation.
                let _ = resuming.await;
                return Err(error.into());
            }
        };
        let spent = span.end().await;
        let publish_began = Instant::now();
        let folder = &self.plan.folder;
        let mut stopped = ended.stopped.map(|(_, at)| at);
        // A command that failed or was stopped leaves the required check undone, and so its paths withheld.
        if ended.code == 0 && stopped.is_none() {
            let checked =
                self.session
                    .run_flake_check(&prepared, watch.as_ref(), folder, signals.next());
            stopped = checked.await.map(|_| Instant::now());
        }
        let search = watch
            .as_ref()
            .filter(|_| ended.code != 0 && stopped.is_none())
            .and_then(|watch| LogSearch::new(watch, &prepared));
        let (mut added_paths, publication) = self
            .session
            .deliver_in_time(
                watch,
                &prepared.cache,
                folder,
                stopped,
                &CancellationToken::new(),
                signals,
            )
            .await;
        let publish = publish_began.elapsed();
        let failed_builds = match search {
            Some(search) => search.failed(&added_paths, &freed).await,
            None => Vec::new(),
        };
        added_paths.count_freed(&freed);
        let tails = failed_builds.iter().flat_map(|build| &build.log_tail);
        let disk = disk.judged(
            ended.code != 0 && ended.stopped.is_none(),
            tails.into_iter().any(|line| reports_full(line)),
        );
        let job = JobResult {
            publish,
            failed_builds,
            ..self.result(&prepared, &ended, (&spent, disk), &added_paths, publication)
        };
        prepared.stop().await;
        // It fails only with a panic, which has been reported.
        let _ = resuming.await;
        JobReport::new(&job).emit(&self.session.workflow, &Files::from_env(self.session.env));
        Ok(Exit::Command(job.exit_code))
    }

    /// Runs the command while the disks are watched.
    async fn command_on_disks(
        &self,
        prepared: &Prepared,
        watch: Option<&StoreWatch>,
        signals: &mut Signals,
    ) -> (Result<Ran, Failure>, (DiskReport, Vec<PathInfo>)) {
        let folder = &self.plan.folder;
        let disks = self.session.watch_disks(prepared, watch, folder);
        let link = watch.and_then(StoreWatch::daemon_link);
        let ran = self.command(prepared, link, signals).await;
        let end = match &ran {
            Ok((Ok(ended), _)) => WorkEnd::new(ended.stopped.is_some(), ended.code != 0),
            _ => WorkEnd::Succeeded,
        };
        (ran, disks.end(end, signals).await)
    }

    async fn command(
        &self,
        prepared: &Prepared,
        daemon_link: Option<&Path>,
        signals: &mut Signals,
    ) -> Result<Ran, Failure> {
        let ready = &prepared.ready;
        let mut environment = environment::for_command(
            self.session.env,
            &prepared.settings.config,
            ready.folder.as_deref(),
            &ready.variables(),
        );
        if let Some(link) = daemon_link {
            environment.insert("NIX_DAEMON_SOCKET_PATH".into(), link.into());
        }
        let path = environment.get(std::ffi::OsStr::new("PATH")).cloned();
        let mut command = match &self.plan.wanted {
            Wanted::Script(text) => {
                let file = self.session.write_private("command.sh", text)?;
                let shell = Shell::find(path.as_deref(), &self.plan.folder);
                let note = format!("flywheel: the command runs under {shell}");
                self.session.sink.note(note);
                Supervised::script(&shell, &file, &self.plan.folder)
            }
            Wanted::Program(words) => {
                Supervised::program(words, path.as_deref(), &self.plan.folder)
            }
        };
        command.environment = environment;
        // Progress lines would fall into the middle of the command's own output.
        self.session.screen.hold();
        let stopped_commands = if self.plan.workflow_commands {
            None
        } else {
            self.session.workflow.stop_commands().await
        };
        let ended = command.run(signals).await;
        self.session.screen.release();
        Ok((ended, stopped_commands))
    }

    fn result(
        &self,
        prepared: &Prepared,
        ended: &CommandExit,
        (spent, disk): (&Spent, DiskReport),
        added_paths: &AddedPaths,
        publication: Option<Publication>,
    ) -> JobResult {
        let observed = Observed {
            killed_in_group: spent.killed_in_group,
            killed_on_machine: spent.killed_on_machine,
            failed: ended.code != 0,
            limit: spent.limit,
            peak: spent.peak,
        };
        let out_of_memory = budget::out_of_memory(&observed);
        let result = self.session.result(
            prepared,
            added_paths,
            publication,
            self.session.plan.require_publish,
        );
        let (outcome, exit_code) = match (ended.stopped, ended.code) {
            // A stopped command exits with the signal's code, which is no failure of its own.
            (Some(_), code) => (Outcome::Cancelled, code),
            (None, 0) => (result.outcome, result.exit_code),
            (None, code) if out_of_memory.is_some() => (Outcome::OutOfMemory, code),
            (None, code) if disk.full.is_some() => (Outcome::DiskFull, code),
            (None, code) => (Outcome::CommandFailed, code),
        };
        JobResult {
            outcome,
            exit_code,
            command: ended.lasted,
            peak: spent.peak,
            limit: spent.limit,
            out_of_memory,
            heavy_lane: self.plan.heavy_lane.clone(),
            disk,
            ..result
        }
    }

    /// Reports a job that was cancelled before the command began.
    fn cancelled_early(&self) -> Exit {
        let exit = Exit::Command(130);
        self.session.workflow.log(
            "flywheel: cancelled before the command began; nothing was run and nothing is lost",
        );
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
