//! `flywheel watch-store`: publication for a job of many steps. `start` leaves a process behind that
//! watches and publishes, `status` asks it, `finish` drains, verifies and reports; `run` is all of it in
//! the foreground.

mod keeper;
mod place;
mod talk;

use std::fs::File;
use std::io::IsTerminal as _;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};
use thiserror::Error;
use tokio::io::BufReader;
use tokio::net::UnixStream;
use tokio::time::{Instant, interval, timeout, timeout_at};

use self::keeper::{Board, Keeper, nix_folder, variables};
use self::place::{Place, mark};
use self::talk::{Ask, Begun, Finished, Hello, Status, hear, say};
use crate::command::Failure;
use crate::command::inputs::{Format, FormatInput, REQUIRED_IN_ACTION};
use crate::command::job::inputs::{JobInputs, Plan};
use crate::command::job::{self, Prepared, Secrets, Told, Work};
use crate::command::setup::quoted;
use crate::command::value::variant;
use crate::exit::{Exit, Explain, UsageError};
use crate::host::private::PrivateFolder;
use crate::process::detached;
use crate::process::signals::Signals;
use crate::progress::{Progress, Sink};
use crate::report::screen::Screen;
use crate::runner::env::{Env, current_folder, program_and_arguments};
use crate::runner::files::Files;
use crate::runner::workflow::{Level, Workflow, data};
use crate::secret::Secret;
use crate::text;

/// Nix may have to be installed, which has its own limit of ten minutes.
const START_LIMIT: Duration = Duration::from_secs(630);
/// After the time to drain, the background process ends within this.
const END_LIMIT: Duration = Duration::from_secs(30);
/// How often a step that waits for the end prints how far it is.
const TELL_EVERY: Duration = Duration::from_secs(5);
/// A background process answers at once, or is dead.
const STATUS_LIMIT: Duration = Duration::from_secs(5);
/// Tokens go to the child by a pipe, and stand in no environment of a process that outlives the step.
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
pub struct Inputs {
    /// What to do; either this or `--mode`.
    #[arg(value_name = "TASK", value_parser = variant::<Task>())]
    task: Option<Task>,

    /// What to do; required, unless a command line has it as an argument.
    #[arg(
        long,
        value_name = "TASK",
        value_parser = variant::<Task>(),
        group = REQUIRED_IN_ACTION
    )]
    mode: Option<Task>,

    #[command(flatten)]
    format: FormatInput,

    /// The child that `start` leaves behind.
    #[arg(long, hide = true)]
    in_background: bool,

    #[command(flatten)]
    job: JobInputs,
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

/// Why a task could not be done.
#[derive(Debug, Error)]
pub enum Error {
    /// There is one already.
    #[error("a watch runs already in this job")]
    Running,
    /// The background process could not be started, or ended before it was ready.
    #[error("the watch could not be started: {0}")]
    Start(String),
    /// The background process could not prepare.
    #[error("{text}")]
    Prepare {
        /// Why.
        text: String,
        /// What to do.
        hint: Option<String>,
        /// Whether the host lacks something.
        is_host: bool,
    },
    /// The watch that was to be finished is not there, and publication was required.
    #[error("no watch runs in this job, so that nothing can be published")]
    NotRunning,
    /// The watch ended without a report.
    #[error("the watch has ended without a report")]
    Silent,
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
            Self::NotRunning | Self::Silent => Some(
                "What it left stands in the journal: the next job on this disk takes it up.".into(),
            ),
            Self::Start(_) => None,
        }
    }
}

/// Runs the verb.
///
/// # Errors
/// For wrong input, before anything is touched; when there is no Nix to be had.
pub async fn run(inputs: Inputs, env: &Env) -> Result<Exit, Failure> {
    let task = inputs.task.or(inputs.mode).ok_or_else(|| {
        UsageError::new("mode", "is not given")
            .with_hint("Give `start`, `status`, `finish` or `run`.")
    })?;
    let plan = Plan::read(&inputs.job, env)?;
    match task {
        Task::Start if inputs.in_background => Box::pin(in_background(&plan, env)).await,
        Task::Start => Box::pin(start(&plan, env)).await,
        Task::Status => status(env, inputs.format.format).await,
        Task::Finish => Box::pin(finish(&plan, inputs.job.drain.drain_timeout, env)).await,
        Task::Run => Box::pin(in_foreground(&plan, env)).await,
    }
}

/// Leaves the background process behind, once it is ready.
async fn start(plan: &Plan, env: &Env) -> Result<Exit, Failure> {
    let workflow = Workflow::new(env.in_github_actions());
    let secrets = Secrets::masked(env, &workflow);
    job::introduce(plan, &job::judge(plan, &secrets, env), &workflow);
    let place = Place::of(env)?;
    if place.connect().await.is_some() {
        return Err(Error::Running.into());
    }
    let broken = |error: std::io::Error| Error::Start(error.to_string());
    let mut signals = Signals::listen().map_err(broken)?;
    let (program, mut arguments) = program_and_arguments().map_err(broken)?;
    arguments.push("--in-background".into());
    let mut child = detached::start(
        &program,
        &arguments,
        &TOKENS,
        place.new_log().map_err(broken)?,
    )
    .map_err(broken)?;
    let mut to = child.stdin.take().expect("it was asked for");
    let mut from = BufReader::new(child.stdout.take().expect("it was asked for"));
    let expose = |secret: &Option<Secret>| secret.as_ref().map(|secret| secret.expose().to_owned());
    let hello = Hello {
        attic: expose(&secrets.attic),
        github: expose(&secrets.github),
        folder: current_folder().map_err(broken)?,
    };
    say(&mut to, &hello).await.map_err(broken)?;
    drop(to);
    let deadline = Instant::now() + START_LIMIT;
    loop {
        let begun = tokio::select! {
            biased;
            _ = signals.next() => {
                // It has a session of its own, so the signal did not reach it.
                let _ = child.start_kill();
                return Ok(Exit::Command(130));
            }
            begun = timeout_at(deadline, hear(&mut from)) => begun.ok().flatten(),
        };
        match begun {
            Some(Begun::Note(text)) => workflow.say(&text),
            Some(Begun::Degraded(area, text)) => workflow.annotate(Level::Warning, &area, &text),
            Some(Begun::Ready {
                secret,
                variables,
                folder,
            }) => {
                if let Some(secret) = secret.as_deref().and_then(Secret::new) {
                    workflow.mask(&secret);
                }
                hand_on(env, &workflow, &variables, folder.as_deref())?;
                return Ok(Exit::Ok);
            }
            Some(Begun::Failed {
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
            None => {
                let _ = child.start_kill();
                let log = std::fs::read_to_string(place.log()).unwrap_or_default();
                return Err(Error::Start(text::one_line(&log, 600)).into());
            }
        }
    }
}

/// Settings for the later steps, or for the shell that asked.
fn hand_on(
    env: &Env,
    workflow: &Workflow,
    variables: &[(String, String)],
    folder: Option<&std::path::Path>,
) -> Result<(), Failure> {
    let files = Files::from_env(env);
    let broken = |error: std::io::Error| {
        Error::Start(format!("the runner's files cannot be written: {error}"))
    };
    if workflow.in_job() {
        for (name, value) in variables {
            files.set_env(name, value).map_err(broken)?;
        }
        if let Some(folder) = folder {
            files.add_path(folder).map_err(broken)?;
        }
    } else if !std::io::stdout().is_terminal() {
        // For `eval "$(flywheel watch-store start)"`.
        let exports = variables
            .iter()
            .map(|(name, value)| format!("export {name}={}", quoted(value)));
        data(&exports.collect::<Vec<_>>().join("\n"));
    }
    workflow.say("flywheel: watching the store; `flywheel watch-store finish` ends it");
    Ok(())
}

/// The process that `start` leaves behind. Its log is its standard error.
async fn in_background(plan: &Plan, env: &Env) -> Result<Exit, Failure> {
    detached::leave_session();
    let hello: Option<Hello> = timeout(STATUS_LIMIT, hear(&mut BufReader::new(tokio::io::stdin())))
        .await
        .ok()
        .flatten();
    let hello = hello.ok_or_else(|| Error::Start("nobody said what to watch".into()))?;
    let secret = |text: &Option<String>| text.as_deref().and_then(Secret::new);
    let secrets = Secrets {
        attic: secret(&hello.attic),
        github: secret(&hello.github),
    };
    // The output is a log file, where workflow commands would be noise.
    let workflow = Workflow::new(false);
    let screen = Screen::new(&workflow);
    let begun = Sink::new(|event| match event {
        Progress::Note(text) => data(&json(&Begun::Note(text))),
        Progress::Degraded { area, text } => data(&json(&Begun::Degraded(area.to_owned(), text))),
        Progress::Moved { .. } => (),
    });
    let both = {
        let log = screen.sink();
        Sink::new(move |event: Progress| {
            begun.send(event.clone());
            log.send(event);
        })
    };
    let ready = async |prepared: &Prepared| {
        let own = prepared
            .cache
            .token
            .as_ref()
            .filter(|token| secrets.attic.as_ref() != Some(token));
        let word = Begun::Ready {
            secret: own.map(|token| token.expose().to_owned()),
            variables: variables(prepared),
            folder: nix_folder(prepared).map(Into::into),
        };
        data(&json(&word));
        // From here on its words would go nowhere.
        let _ = detached::let_go_of_output();
    };
    let ended = keep(
        plan,
        env,
        &secrets,
        hello.folder,
        &workflow,
        &screen,
        both,
        ready,
    )
    .await;
    if let Err(failure) = &ended {
        let is_host = failure.exit() == Exit::Host;
        data(&json(&Begun::Failed {
            text: failure.to_string(),
            hint: failure.hint(),
            is_host,
        }));
    }
    ended.map(|told| {
        told.tell(&workflow, &Files::default());
        Exit::Ok
    })
}

fn json(word: &Begun) -> String {
    serde_json::to_string(word).expect("texts and numbers are always JSON")
}

/// The same in the foreground, until it is interrupted or `finish` is called.
async fn in_foreground(plan: &Plan, env: &Env) -> Result<Exit, Failure> {
    let workflow = Workflow::new(env.in_github_actions());
    let secrets = Secrets::masked(env, &workflow);
    let screen = Screen::new(&workflow);
    job::introduce(plan, &job::judge(plan, &secrets, env), &workflow);
    let folder = current_folder().map_err(|error| Error::Start(error.to_string()))?;
    let ready = async |_: &Prepared| workflow.say("flywheel: watching the store");
    let told = keep(
        plan,
        env,
        &secrets,
        folder,
        &workflow,
        &screen,
        screen.sink(),
        ready,
    )
    .await;
    screen.finish();
    let told = told?;
    told.tell(&workflow, &Files::from_env(env));
    Ok(Exit::Command(told.exit_code))
}

#[expect(
    clippy::too_many_arguments,
    reason = "the two callers differ in each of them"
)]
async fn keep(
    plan: &Plan,
    env: &Env,
    secrets: &Secrets,
    folder: PathBuf,
    workflow: &Workflow,
    screen: &Screen,
    sink: Sink,
    ready: impl AsyncFnOnce(&Prepared),
) -> Result<Told, Failure> {
    let broken = |error: std::io::Error| Error::Start(error.to_string());
    let mut signals = Signals::listen().map_err(broken)?;
    let place = Place::of(env)?;
    let _held: File = place.hold().map_err(broken)?.ok_or(Error::Running)?;
    let listener = place.listen().map_err(broken)?;
    let private = PrivateFolder::create(&job::private_base(env))?;
    let decision = job::judge(plan, secrets, env);
    let board = Board::new(Status {
        state: "preparing".into(),
        pid: std::process::id(),
        trust: decision.verdict().word().to_owned(),
        publishes: decision.publishes(),
        reason: decision.reason(),
        ..Status::default()
    });
    let work = Work {
        plan,
        env,
        secrets,
        decision: &decision,
        sink: board.sink(sink),
        screen,
        private: private.path(),
    };
    let keeper = Keeper {
        work,
        workflow: workflow.clone(),
        board,
        folder,
        whose: mark(env),
    };
    let before = env.get("NIX_CONFIG").unwrap_or_default().to_owned();
    let ended = keeper
        .keep(
            listener,
            &mut signals,
            vec![("NIX_CONFIG".into(), before)],
            ready,
        )
        .await;
    drop(private);
    place.remove();
    ended
}

/// Asks the background process to drain, verify and end, and reports.
async fn finish(plan: &Plan, drain_timeout: Option<Duration>, env: &Env) -> Result<Exit, Failure> {
    let workflow = Workflow::new(env.in_github_actions());
    let place = Place::of(env)?;
    let Some(stream) = place.connect().await else {
        place.leave();
        if plan.require_publish {
            return Err(Error::NotRunning.into());
        }
        let text = "no watch runs in this job: what one has left stands in the journal, for the next job on this disk";
        workflow.annotate(Level::Warning, "watch-store", text);
        return Ok(Exit::Ok);
    };
    let mut stream = BufReader::new(stream);
    let ask = Ask::Finish {
        drain_timeout: drain_timeout.map(|time| time.as_secs()),
        require_publish: plan.require_publish,
    };
    // The log is removed with the watch, so it is opened before.
    let log = File::open(place.log());
    say(&mut stream, &ask).await.map_err(|_| Error::Silent)?;
    let finished = wait(&mut stream, &place, &workflow).await?;
    let text = log.and_then(std::io::read_to_string).unwrap_or_default();
    tell_log(&workflow, &text);
    // It cleans up before it ends, and its end is the end of the connection.
    let _ = timeout(END_LIMIT, hear::<Ask>(&mut stream)).await;
    let files = Files::from_env(env);
    for (name, value) in &finished.variables {
        if let Err(error) = files.set_env(name, value) {
            workflow.annotate(
                Level::Warning,
                "watch-store",
                &format!("`{name}` could not be reset: {error}"),
            );
        }
    }
    finished.told.tell(&workflow, &files);
    Ok(Exit::Command(finished.told.exit_code))
}

/// Waits for the end, prints now and then how far it is, and hands a request to stop on. The time is
/// bounded by the background process; should it hang, the runner's own limit holds.
async fn wait(
    stream: &mut BufReader<UnixStream>,
    place: &Place,
    workflow: &Workflow,
) -> Result<Finished, Error> {
    let mut signals = Signals::listen().map_err(|error| Error::Start(error.to_string()))?;
    let mut ticks = interval(TELL_EVERY);
    ticks.tick().await;
    let mut hurried = None;
    let (mut reading, mut writing) = stream.get_mut().split();
    let mut reading = BufReader::new(&mut reading);
    let mut hearing = Box::pin(hear::<Finished>(&mut reading));
    loop {
        tokio::select! {
            biased;
            finished = &mut hearing => return finished.ok_or(Error::Silent),
            _ = signals.next(), if hurried.is_none() => {
                hurried = Some(Instant::now() + job::STOPPED_LIMIT);
                let _ = say(&mut writing, &Ask::Hurry).await;
            }
            () = tokio::time::sleep_until(hurried.unwrap_or_else(Instant::now)), if hurried.is_some() => {
                return Err(Error::Silent);
            }
            _ = ticks.tick() => {
                if let Some(status) = ask_status(place).await {
                    workflow.say(&format!("publishing: {} of {} paths", status.settled, status.known));
                }
            }
        }
    }
}

/// The log of the background process; its lines are prefixed, so that none is a workflow command.
fn tell_log(workflow: &Workflow, log: &str) {
    if !log.trim().is_empty() {
        workflow.group("flywheel: what the watch said");
        for line in log.lines() {
            workflow.say(&format!("watch-store: {line}"));
        }
        workflow.end_group();
    }
}

async fn ask_status(place: &Place) -> Option<Status> {
    let mut stream = BufReader::new(place.connect().await?);
    say(&mut stream, &Ask::Status).await.ok()?;
    timeout(STATUS_LIMIT, hear(&mut stream)).await.ok()?
}

/// Says what the background process is doing.
async fn status(env: &Env, format: Format) -> Result<Exit, Failure> {
    let place = Place::of(env)?;
    let status = ask_status(&place).await;
    if status.is_none() {
        place.leave();
    }
    let status = status.unwrap_or_else(|| Status {
        state: "none".into(),
        ..Status::default()
    });
    if format == Format::Json {
        data(&serde_json::to_string_pretty(&status).expect("texts and numbers are always JSON"));
        return Ok(Exit::Ok);
    }
    let workflow = Workflow::new(env.in_github_actions());
    if status.state == "none" {
        workflow.say("no watch runs in this job");
        return Ok(Exit::Ok);
    }
    let cache = status.cache.as_deref().unwrap_or("no cache");
    let since = text::duration(Duration::from_secs(status.seconds));
    workflow.say(&format!(
        "{} for {since}, process {}, {cache}",
        status.state, status.pid
    ));
    workflow.say(&format!("trust: {} ({})", status.trust, status.reason));
    let (settled, known) = (status.settled, text::count(status.known, "path"));
    workflow.say(&format!(
        "{settled} of {known} settled, {} sent",
        text::bytes(status.bytes)
    ));
    for line in &status.degraded {
        workflow.say(&format!("degraded: {line}"));
    }
    Ok(Exit::Ok)
}
