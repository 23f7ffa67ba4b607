//! What `nix-job` takes, and the plan that follows: everything is checked here, before anything is touched.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::Args;

use crate::command::inputs::{Text, switch};
use crate::command::job::inputs::{self as job, JobInputs};
use crate::exit::UsageError;
use crate::policy::{Impurity, of_arguments, of_command};
use crate::runner::env::Env;
use crate::text::one_line;

/// Runs a command with Nix ready and a binary cache attached, publishes what it built, and says so.
///
/// The command's output passes through untouched and its exit code is the step's. A cache problem
/// never fails or stalls the job. The token for the cache is taken from `ATTIC_TOKEN` in the
/// environment, never from a flag.
///
/// Examples:
///   flywheel nix-job --publish --command 'nix build .#default'
///   flywheel nix-job --attic-server https://attic.example.org/ -- nix flake check
#[derive(Args, Debug)]
#[command(verbatim_doc_comment)]
pub struct Inputs {
    /// The command, as shell text of one or several lines (bash with `-e -o pipefail`), such as
    /// `nix build .#default`. Either this or a program behind `--`.
    #[arg(
        long,
        value_name = "TEXT",
        default_value = "",
        hide_default_value = true
    )]
    pub command: Text,

    /// The folder that the command runs in, such as `services/api` (default: the current one).
    #[arg(
        long,
        value_name = "DIR",
        default_value = "",
        hide_default_value = true
    )]
    pub working_directory: Text,

    /// The runner label to name when memory runs out, such as `nix-heavy` (default: none).
    #[arg(
        long,
        value_name = "LABEL",
        default_value = "",
        hide_default_value = true
    )]
    pub heavy_lane: Text,

    /// Whether the runner obeys workflow commands (`::notice::` …) that the command prints, such as
    /// `true` (default: `false`, so that a build log cannot inject any).
    #[arg(
        long,
        value_name = "BOOL",
        default_value = "",
        hide_default_value = true
    )]
    pub workflow_commands: Text,

    #[command(flatten)]
    pub(super) job: JobInputs,

    /// The command as a program and its arguments, run without a shell.
    #[arg(last = true, value_name = "PROGRAM")]
    pub program: Vec<OsString>,
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
            Self::Script(text) => of_command(text),
            Self::Program(words) => {
                let words: Vec<String> = words
                    .iter()
                    .map(|word| word.to_string_lossy().into_owned())
                    .collect();
                of_arguments(&words)
            }
        }
    }
}

/// Checked inputs.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub job: job::Plan,
    pub wanted: Wanted,
    pub folder: PathBuf,
    pub heavy_lane: Option<String>,
    pub workflow_commands: bool,
}

impl Plan {
    /// Checks everything.
    ///
    /// # Errors
    /// For the first input that is wrong; nothing has been touched then.
    pub fn read(inputs: &Inputs, env: &Env) -> Result<Self, UsageError> {
        let folder = folder(&inputs.working_directory)?;
        let mut job = job::Plan::read(&inputs.job, env)?;
        job.way.folder.clone_from(&folder);
        let wanted = wanted(inputs)?;
        job.impurity = wanted.impurity();
        Ok(Self {
            job,
            wanted,
            folder,
            heavy_lane: inputs.heavy_lane.get().map(|lane| one_line(lane, 100)),
            workflow_commands: switch("workflow-commands", &inputs.workflow_commands, false)?,
        })
    }
}

fn wanted(inputs: &Inputs) -> Result<Wanted, UsageError> {
    match (inputs.command.get(), inputs.program.is_empty()) {
        (Some(text), true) => Ok(Wanted::Script(format!("{text}\n"))),
        (None, false) => Ok(Wanted::Program(inputs.program.clone())),
        (Some(_), false) => Err(UsageError::new(
            "command",
            "and a program behind `--` are given both",
        )
        .with_hint("Give the command once, one way or the other.")),
        (None, true) => Err(UsageError::new("command", "is empty")
            .with_hint("Say what to run, such as `command: nix build .#default`.")),
    }
}

fn folder(input: &Text) -> Result<PathBuf, UsageError> {
    let asked = Path::new(input.get().unwrap_or("."));
    let error = |problem: &str| {
        UsageError::new(
            "working-directory",
            format!("{problem}: `{}`", one_line(&asked.to_string_lossy(), 200)),
        )
        .with_hint(
            "Give a folder of the checkout, and check the repository out in an earlier step.",
        )
    };
    let folder = asked.canonicalize().map_err(|_| error("is not there"))?;
    if folder.is_dir() {
        Ok(folder)
    } else {
        Err(error("is no folder"))
    }
}
