//! What `nix-job` takes, and the plan that follows: everything is checked here, before anything is touched.

use std::ffi::OsString;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use clap::{ArgAction, Args};

use crate::inputs::value::{boolean, path, text};
use crate::inputs::{HeavyLaneInput, REQUIRED_IN_ACTION};
use crate::job::inputs::{self as job, JobInputs};
use flywheel_core::exit::{UsageError, VerbError, named_file_error};
use flywheel_core::policy::{Impurity, impurity_in_arguments, impurity_in_command};
use flywheel_nix::command_stores::{stores_in_script, stores_in_words};
use flywheel_sys::runner::env::Env;

/// Run a command with Nix ready and a binary cache attached, and publish what it built.
///
/// The command's output passes through untouched and its exit code is the step's. A cache problem
/// never fails or stalls the job. The token for the cache is taken from `ATTIC_TOKEN` in the
/// environment, never from a flag.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  flywheel nix-job --publish --command 'nix build .#default'
  flywheel nix-job --attic-server https://attic.example.org/ -- nix flake check")]
pub(crate) struct Inputs {
    /// The command, as shell text of one or several lines (bash with `-e -o pipefail`; `sh` with `-e` where
    /// there is no bash), such as `nix build .#default`. Required, unless a command line has a program
    /// behind `--`.
    #[arg(long, value_name = "TEXT", value_parser = text(), group = REQUIRED_IN_ACTION)]
    command: Option<String>,

    /// The folder that the command runs in, such as `services/api`.
    #[arg(long, value_name = "DIR", value_parser = path(), default_value = ".")]
    working_directory: PathBuf,

    /// Whether the runner obeys workflow commands (`::notice::` …) that the command prints. With `false`
    /// a build log cannot inject any, on stdout or stderr.
    #[arg(
        long,
        value_name = "BOOL",
        action = ArgAction::Set,
        value_parser = boolean(),
        default_value = "false"
    )]
    workflow_commands: bool,

    #[command(flatten)]
    heavy_lane: HeavyLaneInput,

    #[command(flatten)]
    job: JobInputs,

    /// The command as a program and its arguments, run without a shell.
    #[arg(last = true, value_name = "PROGRAM")]
    program: Vec<OsString>,
}

/// What to run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Wanted {
    /// Text for a shell.
    Script(String),
    /// A program and its arguments.
    Program(Vec<OsString>),
}

impl Wanted {
    fn impurity(&self) -> Option<Impurity> {
        match self {
            Self::Script(text) => impurity_in_command(text),
            Self::Program(words) => impurity_in_arguments(&texts(words)),
        }
    }

    /// The stores that the command names for itself.
    fn stores(&self) -> Vec<String> {
        match self {
            Self::Script(text) => stores_in_script(text),
            Self::Program(words) => stores_in_words(&texts(words)),
        }
    }
}

fn texts(words: &[OsString]) -> Vec<String> {
    let words = words.iter();
    words
        .map(|word| word.to_string_lossy().into_owned())
        .collect()
}

/// Checked inputs.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub(crate) job: job::Plan,
    pub(crate) wanted: Wanted,
    pub(crate) folder: PathBuf,
    pub(crate) heavy_lane: Option<String>,
    pub(crate) workflow_commands: bool,
}

impl Inputs {
    /// Checks everything, and keeps nothing of it.
    ///
    /// # Errors
    /// For the first input that is wrong.
    pub(crate) fn check(&self, env: &Env) -> Result<(), VerbError> {
        Plan::read(self, env).map(drop)
    }
}

impl Plan {
    /// Checks everything.
    ///
    /// # Errors
    /// For the first input that is wrong; nothing has been touched then.
    pub(crate) fn read(inputs: &Inputs, env: &Env) -> Result<Self, VerbError> {
        let folder = folder(&inputs.working_directory)?;
        let mut job = job::Plan::read(&inputs.job, env)?;
        job.destination.folder.clone_from(&folder);
        let wanted = wanted(inputs)?;
        job.impurity = wanted.impurity();
        job.named_stores = wanted.stores();
        Ok(Self {
            job,
            wanted,
            folder,
            heavy_lane: inputs.heavy_lane.heavy_lane.clone(),
            workflow_commands: inputs.workflow_commands,
        })
    }
}

fn wanted(inputs: &Inputs) -> Result<Wanted, UsageError> {
    match (&inputs.command, inputs.program.is_empty()) {
        (Some(text), true) => Ok(Wanted::Script(format!("{text}\n"))),
        (None, false) => Ok(Wanted::Program(inputs.program.clone())),
        (Some(_), false) => Err(UsageError::new(
            "command",
            "and a program behind `--` are given both",
        )
        .with_hint("Give the command once, one way or the other.")),
        (None, true) => Err(UsageError::new("command", "is empty")
            .with_hint("Give the command to run, such as `command: nix build .#default`.")),
    }
}

fn folder(asked: &Path) -> Result<PathBuf, VerbError> {
    let found = asked.canonicalize().and_then(|folder| {
        let is_folder = std::fs::metadata(&folder)?.is_dir();
        is_folder
            .then_some(folder)
            .ok_or_else(|| ErrorKind::NotADirectory.into())
    });
    found.map_err(|error| {
        let hint =
            "Give a folder of the checkout, and check the repository out in an earlier step.";
        named_file_error("working-directory", asked, "be entered", error, hint)
    })
}
