//! The binary: hands the command line to its verb and ends with the exit code.
//!
//! The groups below are layers, the lowest first. `tests/it/house/layers.rs` reads them here.

// Shared by the verbs: what a run reports, and what it is given. Each by itself.
mod inputs;
mod report;

// What the verbs that run a job or a part of one share.
mod job;

// The front door. Its modules may use each other.
mod cli;
mod command;

use std::io::Write as _;
use std::num::NonZero;
use std::process::ExitCode;
use std::time::Duration;

use crate::cli::Cli;
use crate::inputs::parse::Refusal;
use flywheel_core::exit::{Exit, VerbError};
use flywheel_core::text::shorten;
use flywheel_sys::host::{priority, private};
use flywheel_sys::process::core_dump;
use flywheel_sys::runner::env::{Env, arguments};
use flywheel_sys::runner::workflow::{Level, Workflow, without_commands};

/// Blocking work that is still under way at the end gets this long.
const LAST_GRACE: Duration = Duration::from_millis(300);
/// Characters of an error of clap's that are shown.
const CLAP_LIMIT: usize = 4000;

fn main() -> ExitCode {
    remove_private_folders_on_panic();
    let env = Env::from_process();
    let in_job = env.in_github_actions();
    let arguments = arguments();
    cli::name_inputs(&arguments, &env);
    let cli = match Cli::read(arguments, &env) {
        Ok(cli) => cli,
        Err(Refusal::Usage(error)) => {
            return ExitCode::from(explain(&VerbError::from(error), in_job).code());
        }
        Err(Refusal::Clap(error)) => {
            // Help and version are errors to clap, and go to stdout with code 0.
            if error.use_stderr() {
                // clap quotes what was given as it stands, line breaks included.
                let text = shorten(&error.render().to_string(), CLAP_LIMIT);
                let lines: Vec<String> = text.lines().map(without_commands).collect();
                // A closed stderr is no reason to fail otherwise.
                let _ = writeln!(std::io::stderr(), "{}", lines.join("\n"));
                return ExitCode::from(Exit::Usage.code());
            }
            // A closed stdout is no reason to fail.
            let _ = error.print();
            return ExitCode::from(Exit::Ok.code());
        }
    };
    let env = match cli.environment(env) {
        Ok(env) => env,
        Err(failure) => return ExitCode::from(explain(&failure, in_job).code()),
    };
    // Before anything starts a thread, and while the user's own files in `/proc` still belong to him.
    if let Err(failure) = cli.enter_rootless_store(&env) {
        return ExitCode::from(explain(&failure, in_job).code());
    }
    core_dump::forbid(cli.reach());
    // The job's own work comes first, so these threads yield to it. The main thread, which starts the job's
    // command, keeps its priority.
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    // Two at least, since a slow disk may hold one up (`host::inline_blocking`).
    let workers = std::thread::available_parallelism()
        .map_or(1, NonZero::get)
        .max(2);
    let runtime = runtime
        .worker_threads(workers)
        .enable_all()
        .on_thread_start(priority::lower_priority)
        .build();
    let ended = match runtime {
        Ok(runtime) => {
            let ended = runtime.block_on(cli.run(&env));
            // A thread that still reads a slow disk must not hold the end back.
            runtime.shutdown_timeout(LAST_GRACE);
            ended
        }
        Err(error) => {
            Workflow::new(in_job).annotate(
                Level::Error,
                "flywheel",
                &format!("the program's threads cannot be started: {error}"),
            );
            return ExitCode::from(Exit::Host.code());
        }
    };
    let exit = ended.unwrap_or_else(|failure| explain(&failure, in_job));
    ExitCode::from(exit.code())
}

/// A release build aborts on a panic, without running a destructor.
fn remove_private_folders_on_panic() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        private::remove_all();
        report(panic);
    }));
}

fn explain(failure: &VerbError, in_job: bool) -> Exit {
    let error = failure.as_error();
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(source) = cause {
        text.push_str(": ");
        text.push_str(&source.to_string());
        cause = source.source();
    }
    if let Some(hint) = failure.hint() {
        text.push_str("\nhelp: ");
        text.push_str(&hint);
    }
    Workflow::new(in_job).annotate(Level::Error, "flywheel", &text);
    failure.exit()
}
