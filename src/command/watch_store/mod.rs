//! `flywheel watch-store`: publication for a job of many steps. `start` leaves a background process behind, which
//! watches and publishes; `status` shows what it is doing; `finish` drains, verifies and reports; `run` does all of
//! it in the foreground.

mod daemon;
mod ipc;
mod killed;
mod later_steps;
mod runtime_dir;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, ValueEnum};
use thiserror::Error;
use tokio::io::BufReader;
use tokio::net::UnixStream;
use tokio::process::Child;
use tokio::time::{Instant, interval, timeout, timeout_at};

use self::daemon::{Daemon, StatusCell};
use self::ipc::{ChildConfig, Finished, Request, StartEvent, Status, receive, send};
use self::runtime_dir::{RuntimeDir, job_processes, log_text};
use crate::inputs::value::{Deferred, Invalid, variant};
use crate::inputs::{Format, FormatInput, REQUIRED_IN_ACTION};
use crate::job::inputs::{JobInputs, Plan};
use crate::job::{self, JobReport, Prepared, Secrets, Session};
use crate::report::screen::Screen;
use flywheel_core::exit::{Exit, Explain, Failure, UsageError, VerbError};
use flywheel_core::progress::{Progress, Sink};
use flywheel_core::secret::Secret;
use flywheel_core::text;
use flywheel_nix::daemon_proxy::LastingLink;
use flywheel_sys::process::detached;
use flywheel_sys::process::signals::Signals;
use flywheel_sys::runner::env::{Env, current_folder, program_and_arguments};
use flywheel_sys::runner::files::Files;
use flywheel_sys::runner::workflow::{Level, Workflow, json_data};

/// Nix may have to be installed, which has its own limit of ten minutes.
const START_LIMIT: Duration = Duration::from_secs(630);
/// After the time to drain, the background process ends within this.
const END_LIMIT: Duration = Duration::from_secs(30);
/// How often a step that waits for the end logs how far the publication is.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(5);
/// A background process that is alive answers at once.
const STATUS_LIMIT: Duration = Duration::from_secs(5);
/// Tokens that the child gets through a pipe: the environment of a process that outlives the step holds none.
const TOKENS: [&str; 3] = ["ATTIC_TOKEN", "GITHUB_TOKEN", "ACTIONS_RUNTIME_TOKEN"];

/// Publish every store path of a job as it becomes valid, over many steps.
///
/// `start` returns at once and leaves a process behind; the settings for the later steps travel
/// through `GITHUB_ENV` and hold no token. `status` prints what it is doing. `finish`, in a last step
/// with `if: always()`, drains, verifies and reports. `run` does it all in the foreground until it
/// is interrupted. Without `finish` the runner kills the process at the job's end; what was left
/// stands in the journal, and the next job on the disk takes it up.
#[derive(Args, Debug)]
#[command(
    after_help = "Example:\n  flywheel watch-store start --push-cache auto\n  flywheel watch-store finish"
)]
pub(crate) struct Inputs {
    /// What to do; either this or `--mode`.
    #[arg(value_name = "TASK", value_parser = variant::<Task>())]
    task: Option<Task>,

    /// What to do; required, unless a command line has it as an argument.
    #[arg(
        long,
        value_name = "TASK",
        value_parser = Deferred(variant::<Task>()),
        group = REQUIRED_IN_ACTION
    )]
    mode: Option<Result<Task, Invalid>>,

    #[command(flatten)]
    format: FormatInput,

    /// The child that `start` leaves behind.
    #[arg(long, hide = true)]
    in_background: bool,

    #[command(flatten)]
    job: JobInputs,
}

impl Inputs {
    fn task(&self) -> Result<Task, UsageError> {
        // With a task as argument, `mode` does not matter, right or wrong: its variable may be meant for another step.
        match (self.task, &self.mode) {
            (Some(task), _) => Ok(task),
            (None, Some(mode)) => mode.clone().map_err(|invalid| invalid.of_input("mode")),
            (None, None) => Err(UsageError::new("mode", "is not given")
                .with_hint("Give `start`, `status`, `finish` or `run`.")),
        }
    }

    /// Whether a watch is to begin.
    pub(crate) fn is_watch(&self) -> bool {
        matches!(self.task(), Ok(Task::Start | Task::Run))
    }

    /// Checks everything, and keeps nothing of it.
    ///
    /// # Errors
    /// For the first input that is wrong.
    pub(crate) fn check(&self, env: &Env) -> Result<(), VerbError> {
        Plan::read(&self.job, env).map(drop)
    }
}

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Task {
    /// Leave a process behind that watches the store and publishes.
    Start,
    /// Print what that process is doing.
    Status,
    /// Drain, verify, report, and end that process.
    Finish,
    /// All of it in the foreground, until it is interrupted.
    Run,
}

/// Why `watch-store` failed.
#[derive(Debug, Error)]
pub(crate) enum Error {
    /// A watch runs in this job already.
    #[error("a watch already runs in this job")]
    Running,
    /// The background process could not be started, or ended before it was ready.
    #[error("the watch could not be started: {0}")]
    Start(String),
    /// The background process could not prepare.
    #[error("{text}")]
    Prepare {
        text: String,
        hint: Option<String>,
        /// Whether the host lacks something.
        is_host: bool,
    },
    /// The watch that was to be finished is not there, and publication was required.
    #[error("no watch runs in this job, so that nothing can be published")]
    NotRunning,
    #[error("the watch has ended without a report")]
    NoReport,
}

impl Explain for Error {
    fn exit(&self) -> Exit {
        match self {
            Self::Start(_) => Exit::Host,
            Self::Prepare { is_host, .. } if *is_host => Exit::Host,
            _ => Exit::Failed,
        }
    }

    fn hint(&self) -> Option<String> {
        match self {
            Self::Running => Some("Call `flywheel watch-store finish` first.".into()),
            Self::Prepare { hint, .. } => hint.clone(),
            Self::NotRunning | Self::NoReport => Some(
                "What it left stands in the journal: the next job on this disk takes it up.".into(),
            ),
            Self::Start(_) => None,
        }
    }
}

/// Runs the verb.
///
/// # Errors
/// For wrong input, before anything is touched; when there is no usable Nix.
pub(crate) async fn run(inputs: Inputs, env: &Env) -> Result<Exit, VerbError> {
    let task = inputs.task()?;
    let plan = Plan::read(&inputs.job, env)?;
    let ended = match task {
        Task::Start if inputs.in_background => Box::pin(in_background(&plan, env)).await,
        Task::Start => Box::pin(start(&plan, env)).await,
        Task::Status => status(env, inputs.format.format).await,
        Task::Finish => Box::pin(finish(&plan, inputs.job.drain.drain_timeout, env)).await,
        Task::Run => Box::pin(in_foreground(&plan, env)).await,
    };
    Ok(ended?)
}

/// Starts the background process, and returns once it is ready.
async fn start(plan: &Plan, env: &Env) -> Result<Exit, Failure> {
    let workflow = Workflow::new(env.in_github_actions());
    let secrets = Secrets::masked(env, &workflow);
    job::announce(plan, &job::judge(plan, &secrets, env), &workflow);
    let runtime_dir = RuntimeDir::from_env(env)?;
    if runtime_dir.connect().await.is_some() {
        return Err(Error::Running.into());
    }
    runtime_dir.lasting_link().repair().await;
    let mut signals = Signals::listen().map_err(not_started)?;
    let mut child = spawn(&runtime_dir, &secrets).await.map_err(not_started)?;
    let mut from = BufReader::new(child.stdout.take().expect("it was asked for"));
    let deadline = Instant::now() + START_LIMIT;
    loop {
        let event = tokio::select! {
            biased;
            _ = signals.next() => {
                // The child leads a session of its own, so the signal has not reached it.
                let _ = child.start_kill();
                return Ok(Exit::Command(130));
            }
            event = timeout_at(deadline, receive(&mut from)) => event.ok().flatten(),
        };
        match event {
            Some(StartEvent::Note(text)) => workflow.log(&text),
            Some(StartEvent::Degraded(area, text)) => {
                workflow.annotate(Level::Warning, &area, &text);
            }
            Some(StartEvent::Ready {
                secrets,
                variables,
                folder,
            }) => {
                for secret in secrets.iter().filter_map(|secret| Secret::new(secret)) {
                    workflow.mask(&secret);
                }
                later_steps::export(env, &workflow, &variables, folder.as_deref())?;
                return Ok(Exit::Ok);
            }
            Some(StartEvent::Failed {
                text,
                hint,
                is_host,
            }) => {
                return Err(Error::Prepare {
                    text,
                    hint,
                    is_host,
                }
                .into());
            }
            // The child has ended, or has been silent for too long; its log may have the reason.
            None => {
                let _ = child.start_kill();
                let log = log_text(runtime_dir.open_log());
                return Err(Error::Start(text::one_line(&log, 600)).into());
            }
        }
    }
}

/// Spawns the background process, and sends it what it needs.
async fn spawn(runtime_dir: &RuntimeDir, secrets: &Secrets) -> std::io::Result<Child> {
    let (program, mut arguments) = program_and_arguments()?;
    arguments.push("--in-background".into());
    let mut child = detached::start(&program, &arguments, &TOKENS, runtime_dir.new_log()?)?;
    let mut to = child.stdin.take().expect("it was asked for");
    let expose = |secret: &Option<Secret>| secret.as_ref().map(|secret| secret.expose().to_owned());
    let config = ChildConfig {
        attic: expose(&secrets.attic),
        github: expose(&secrets.github),
        folder: current_folder()?,
    };
    send(&mut to, &config).await?;
    Ok(child)
}

#[expect(
    clippy::needless_pass_by_value,
    reason = "`map_err` passes the error by value"
)]
fn not_started(error: std::io::Error) -> Error {
    Error::Start(error.to_string())
}

/// The background process. Its log is its standard error.
async fn in_background(plan: &Plan, env: &Env) -> Result<Exit, Failure> {
    detached::start_session();
    let config: Option<ChildConfig> = timeout(
        STATUS_LIMIT,
        receive(&mut BufReader::new(tokio::io::stdin())),
    )
    .await
    .ok()
    .flatten();
    let config = config.ok_or_else(|| Error::Start("`start` sent it no settings".into()))?;
    let secret = |text: &Option<String>| text.as_deref().and_then(Secret::new);
    let secrets = Secrets {
        attic: secret(&config.attic),
        github: secret(&config.github),
    };
    // In a job, too, the log is plain text: the step that calls `finish` prints it.
    let workflow = Workflow::new(false);
    let screen = Screen::new(&workflow);
    let sink = to_start_and_log(screen.sink());
    let runtime_dir = RuntimeDir::from_env(env)?;
    // A shell may leave the settings unused, and another one knows nothing of them; a runner has all steps use them.
    let lasting_link = env.in_github_actions().then(|| runtime_dir.lasting_link());
    let settings = later_steps::Settings::new(runtime_dir);
    let ready = async |prepared: &Prepared, link: Option<&Path>| {
        let own = prepared
            .cache
            .token
            .as_ref()
            .filter(|token| secrets.attic.as_ref() != Some(token));
        let event = StartEvent::Ready {
            secrets: own
                .into_iter()
                .chain(prepared.cache.read_key())
                .map(|secret| secret.expose().to_owned())
                .collect(),
            variables: settings.variables(prepared, link, env),
            folder: prepared.ready.folder.clone(),
        };
        json_data(&json(&event));
        // `start` ends now, and with it the reader of this process's standard output.
        let _ = detached::close_stdout();
    };
    let parts = (secrets.clone(), workflow.clone(), screen);
    let ended = run_daemon(plan, env, parts, config.folder, sink, lasting_link, ready).await;
    if let Err(failure) = &ended {
        let is_host = failure.exit() == Exit::Host;
        json_data(&json(&StartEvent::Failed {
            text: failure.to_string(),
            hint: failure.hint(),
            is_host,
        }));
    }
    ended.map(|report| {
        report.emit(&workflow, &Files::default());
        Exit::Ok
    })
}

/// Sends notes and warnings to `start`, and every event to the log.
fn to_start_and_log(log: Sink) -> Sink {
    Sink::new(move |event: Progress| {
        match event.clone() {
            Progress::Note(text) => json_data(&json(&StartEvent::Note(text))),
            Progress::Degraded { area, text } => {
                json_data(&json(&StartEvent::Degraded(area.to_owned(), text)));
            }
            Progress::Moved { .. } => (),
        }
        log.send(event);
    })
}

fn json(event: &StartEvent) -> String {
    serde_json::to_string(event).expect("texts and numbers are always JSON")
}

/// The same in the foreground, until it is interrupted or `finish` is called.
async fn in_foreground(plan: &Plan, env: &Env) -> Result<Exit, Failure> {
    let workflow = Workflow::new(env.in_github_actions());
    let secrets = Secrets::masked(env, &workflow);
    let screen = Screen::new(&workflow);
    job::announce(plan, &job::judge(plan, &secrets, env), &workflow);
    let folder = current_folder().map_err(not_started)?;
    let ready = async |_: &Prepared, _: Option<&Path>| workflow.log("flywheel: watching the store");
    let parts = (secrets, workflow.clone(), screen.clone());
    let ended = run_daemon(plan, env, parts, folder, screen.sink(), None, ready).await;
    screen.finish();
    let report = ended?;
    report.emit(&workflow, &Files::from_env(env));
    Ok(Exit::Command(report.exit_code))
}

async fn run_daemon(
    plan: &Plan,
    env: &Env,
    (secrets, workflow, screen): (Secrets, Workflow, Screen),
    folder: PathBuf,
    sink: Sink,
    lasting_link: Option<LastingLink>,
    ready: impl AsyncFnOnce(&Prepared, Option<&Path>),
) -> Result<JobReport, Failure> {
    let mut signals = Signals::listen().map_err(not_started)?;
    let runtime_dir = RuntimeDir::from_env(env)?;
    // Of two `start`s at the same time, the second finds the folder locked.
    let _lock: File = runtime_dir
        .lock_to_begin()
        .await
        .map_err(not_started)?
        .ok_or(Error::Running)?;
    // The socket is there before Nix is made ready, which may take minutes: `status` answers from the start.
    let listener = runtime_dir.listen().map_err(not_started)?;
    let status_cell = StatusCell::new(Status {
        state: "preparing".into(),
        pid: std::process::id(),
        ..Status::default()
    });
    let sink = status_cell.sink(sink);
    let session = Session::from_parts(plan, env, secrets, workflow, screen, sink)?
        .with_lasting_link(lasting_link.clone());
    {
        let mut status = status_cell.status();
        session
            .decision
            .verdict()
            .as_str()
            .clone_into(&mut status.trust);
        status.publishes = session.decision.publishes();
        status.reason = session.decision.reason();
    }
    let daemon = Daemon {
        session,
        status_cell,
        folder,
        processes: job_processes(env),
        lasting_link,
    };
    if env.get("NIX_CONFIG").is_none() {
        runtime_dir.note_unset_config().map_err(not_started)?;
    }
    let ended = daemon.run(listener, &mut signals, ready).await;
    runtime_dir.remove();
    ended
}

/// Asks the background process to drain, verify and end, and reports.
async fn finish(plan: &Plan, drain_timeout: Option<Duration>, env: &Env) -> Result<Exit, Failure> {
    let workflow = Workflow::new(env.in_github_actions());
    let runtime_dir = RuntimeDir::from_env(env)?;
    let Some(stream) = runtime_dir.connect().await else {
        if runtime_dir.has_killed_watch() {
            return finish_killed(plan, &runtime_dir, &workflow, env).await;
        }
        runtime_dir.remove_if_unused();
        if plan.require_publish {
            return Err(Error::NotRunning.into());
        }
        let text = "no watch runs in this job: what one has left stands in the journal, for the next job on this disk";
        workflow.annotate(Level::Warning, "watch-store", text);
        return Ok(Exit::Ok);
    };
    let mut stream = BufReader::new(stream);
    let ask = Request::Finish {
        drain_timeout: drain_timeout.map(|time| time.as_secs()),
        require_publish: plan.require_publish,
    };
    // Opened before the end, because the background process removes its log then.
    let log = runtime_dir.open_log();
    let finished = match send(&mut stream, &ask).await {
        Ok(()) => wait(&mut stream, &runtime_dir, &workflow).await?,
        Err(_) => None,
    };
    let Some(finished) = finished else {
        // It was killed while it finished; or it hangs, and is none to take anything from.
        if runtime_dir.has_killed_watch() {
            return finish_killed(plan, &runtime_dir, &workflow, env).await;
        }
        return Err(Error::NoReport.into());
    };
    print_log(&workflow, &log_text(log));
    // The background process cleans up before it ends; the connection ends with it.
    let _ = timeout(END_LIMIT, receive::<Request>(&mut stream)).await;
    later_steps::give_back(&finished.variables, &workflow, env);
    let files = Files::from_env(env);
    finished.report.emit(&workflow, &files);
    Ok(Exit::Command(finished.report.exit_code))
}

/// Does what the watch would have done, had it not been killed.
async fn finish_killed(
    plan: &Plan,
    runtime_dir: &RuntimeDir,
    workflow: &Workflow,
    env: &Env,
) -> Result<Exit, Failure> {
    print_log(workflow, &log_text(runtime_dir.open_log()));
    let lasting_link = runtime_dir.lasting_link();
    lasting_link.repair().await;
    let ended = Box::pin(killed::finish(plan, env)).await;
    let unset = || ("NIX_CONFIG".to_owned(), String::new());
    let mut before: Vec<_> = runtime_dir
        .had_unset_config()
        .then(unset)
        .into_iter()
        .collect();
    before.extend(later_steps::socket_after_killed(&lasting_link, env));
    if !before.is_empty() {
        later_steps::give_back(&before, workflow, env);
    }
    runtime_dir.remove_if_unused();
    ended
}

/// Waits for the end, logs from time to time how far the publication is, and passes a signal on. The background
/// process bounds the time; should it hang, the runner's own limit holds. `None` when it has ended without a report.
async fn wait(
    stream: &mut BufReader<UnixStream>,
    runtime_dir: &RuntimeDir,
    workflow: &Workflow,
) -> Result<Option<Finished>, Error> {
    let mut signals = Signals::listen().map_err(|error| Error::Start(error.to_string()))?;
    let mut ticks = interval(PROGRESS_INTERVAL);
    // The first tick of an interval comes at once, and there is no progress to log yet.
    ticks.tick().await;
    let mut give_up_at = None;
    let (mut reading, mut writing) = stream.get_mut().split();
    let mut reading = BufReader::new(&mut reading);
    let mut receiving = Box::pin(receive::<Finished>(&mut reading));
    loop {
        tokio::select! {
            biased;
            finished = &mut receiving => return match (finished, give_up_at) {
                (None, Some(_)) => Err(Error::NoReport),
                (finished, _) => Ok(finished),
            },
            _ = signals.next(), if give_up_at.is_none() => {
                // The background process has this long to stop and to send its report.
                give_up_at = Some(Instant::now() + job::STOPPED_LIMIT);
                let _ = send(&mut writing, &Request::Cancel).await;
            }
            () = tokio::time::sleep_until(give_up_at.unwrap_or_else(Instant::now)), if give_up_at.is_some() => {
                return Err(Error::NoReport);
            }
            _ = ticks.tick() => {
                if let Some(status) = request_status(runtime_dir).await {
                    workflow.log(&format!("publishing: {} of {} paths", status.settled, status.known));
                }
            }
        }
    }
}

/// Prints the background process's log. The prefix keeps a line of it from being a workflow command.
fn print_log(workflow: &Workflow, log: &str) {
    if !log.trim().is_empty() {
        workflow.group("flywheel: the log of the watch");
        for line in log.lines() {
            workflow.log(&format!("watch-store: {line}"));
        }
        workflow.end_group();
    }
}

async fn request_status(runtime_dir: &RuntimeDir) -> Option<Status> {
    let mut stream = BufReader::new(runtime_dir.connect().await?);
    send(&mut stream, &Request::Status).await.ok()?;
    timeout(STATUS_LIMIT, receive(&mut stream)).await.ok()?
}

/// Prints what the background process is doing.
async fn status(env: &Env, format: Format) -> Result<Exit, Failure> {
    let runtime_dir = RuntimeDir::from_env(env)?;
    let status = request_status(&runtime_dir).await;
    if status.is_none() {
        runtime_dir.lasting_link().repair().await;
    }
    // What a killed watch has left is for `finish`.
    if status.is_none() && !runtime_dir.has_killed_watch() {
        runtime_dir.remove_if_unused();
    }
    let status = status.unwrap_or_else(|| Status {
        state: "none".into(),
        ..Status::default()
    });
    if format == Format::Json {
        json_data(
            &serde_json::to_string_pretty(&status).expect("texts and numbers are always JSON"),
        );
        return Ok(Exit::Ok);
    }
    let workflow = Workflow::new(env.in_github_actions());
    if status.state == "none" {
        workflow.log("no watch runs in this job");
        return Ok(Exit::Ok);
    }
    let cache = status.cache.as_deref().unwrap_or("no cache");
    let since = text::duration(Duration::from_secs(status.seconds));
    workflow.log(&format!(
        "{} for {since}, process {}, {cache}",
        status.state, status.pid
    ));
    workflow.log(&format!("trust: {} ({})", status.trust, status.reason));
    let (settled, known) = (status.settled, text::count(status.known, "path"));
    workflow.log(&format!(
        "{settled} of {known} settled, {} sent",
        text::bytes(status.bytes)
    ));
    for line in &status.degraded {
        workflow.log(&format!("degraded: {line}"));
    }
    Ok(Exit::Ok)
}
