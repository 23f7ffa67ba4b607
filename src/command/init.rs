//! `flywheel init`: writes a workflow for the repository that it is called in, after asking about what it finds there.

mod questions;
mod repository;
mod workflow;

use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use clap::Args;

use self::questions::Questions;
use self::repository::{Found, Outputs};
use self::workflow::{Actions, BinaryCache, Runner, Work, Workflow};
use crate::inputs::value::{Invalid, path, value};
use crate::inputs::{BY_HAND, public_key};
use flywheel_core::exit::{Exit, UsageError, VerbError, named_file_error};
use flywheel_core::text::one_line;
use flywheel_sys::runner::env::Env;
use flywheel_sys::runner::workflow::data;

/// Where the workflow goes, below the repository.
const WORKFLOW: &str = ".github/workflows/flywheel.yml";
/// What stands for the standard output.
const STDOUT: &str = "-";

/// Write a GitHub workflow for this repository.
///
/// Looks at the repository: the flake's outputs, where there is Nix to ask; the runners and the cache of the workflows that
/// are there; the default branch. Asks on the terminal about each, with what was found as the answer that Enter gives.
/// Where there is no terminal, or with `--yes`, what was found is taken. Each line of the workflow says what it is for.
/// Writes this one file, and replaces none unless it is told so.
#[derive(Args, Debug)]
#[command(
    after_help = "Examples:\n  flywheel init\n  flywheel init --binary-cache https://cache.example.org/main --public-key main:… --yes\n  flywheel init --output - --yes"
)]
#[command(next_help_heading = BY_HAND)]
pub(crate) struct Inputs {
    /// A folder of the repository.
    #[arg(value_name = "FOLDER", default_value = ".", value_parser = path())]
    folder: PathBuf,

    /// Where Flywheel's actions are, such as `octo-org/flywheel@main` (default: as a workflow of the repository has it,
    /// else as the checkout is called that this program comes from).
    #[arg(long, value_name = "OWNER/NAME@REF", value_parser = value(Actions::parse))]
    actions: Option<Actions>,

    /// The labels of the runner, separated by commas, such as `ubuntu-24.04` or `self-hosted,nix` (default: those of a
    /// workflow of the repository, else `ubuntu-24.04`).
    #[arg(long, value_name = "LABELS", value_parser = value(Runner::parse))]
    runs_on: Option<Runner>,

    /// The binary cache: the address of an Attic cache such as `https://cache.example.org/main`; `github`, which keeps
    /// an embedded cache in GitHub's own; or `none` (default: as a workflow of the repository has it, else `github`).
    #[arg(long, value_name = "CACHE", value_parser = value(BinaryCache::parse))]
    binary_cache: Option<BinaryCache>,

    /// The public key of the cache, such as `main:…=` (default: the repository's variable `ATTIC_PUBLIC_KEY`).
    #[arg(long, value_name = "KEY", value_parser = value(key))]
    public_key: Option<String>,

    /// The file to write, or `-` for the standard output (default: `.github/workflows/flywheel.yml`).
    #[arg(long, value_name = "FILE", value_parser = path())]
    output: Option<PathBuf>,

    /// Replace the file if it is there, such as one that an earlier `flywheel init` wrote (default: it stays, and the call fails).
    #[arg(long)]
    force: bool,

    /// Ask nothing and take what was found, as it is for `--output -` in a script (default: ask where there is a terminal).
    #[arg(long)]
    yes: bool,
}

/// The key as it was given.
fn key(text: &str) -> Result<String, Invalid> {
    let hint = "Copy it from `attic cache info`, or from what `flywheel cache serve` prints.";
    match public_key(text) {
        Ok(_) => Ok(text.to_owned()),
        Err(problem) => Err(Invalid::new(problem).with_hint(hint)),
    }
}

/// Runs the verb.
///
/// # Errors
/// For wrong input, a folder that is in no repository, a file that is there already, and a disk that fails.
pub(crate) async fn run(inputs: Inputs, env: &Env) -> Result<Exit, VerbError> {
    let root = repository::root(&inputs.folder)?;
    let file = inputs.output.clone().unwrap_or_else(|| root.join(WORKFLOW));
    if !inputs.force && file.as_os_str() != STDOUT && file.symlink_metadata().is_ok() {
        return Err(is_there(&file).into());
    }
    let found = repository::look(&root, env).await;
    let mut questions = Questions::new(inputs.yes);
    questions.say(&found.to_string());
    let workflow = decide(&inputs, &found, &mut questions)?;
    let text = workflow.to_string();
    if file.as_os_str() == STDOUT {
        data(text.trim_end());
    } else {
        write(&file, &text, inputs.force)?;
        data(&format!("wrote {}", file.display()));
    }
    questions.say(&workflow.next_steps());
    Ok(Exit::Ok)
}

/// What the flags say, then what the user answers.
fn decide(
    inputs: &Inputs,
    found: &Found,
    questions: &mut Questions,
) -> Result<Workflow, VerbError> {
    let actions = match (&inputs.actions, &found.actions) {
        (Some(actions), _) => actions.clone(),
        (None, Some(actions)) => questions.ask("Flywheel's actions", actions, Actions::parse)?,
        (None, None) => questions
            .require("Flywheel's actions, as OWNER/NAME@REF", Actions::parse)?
            .ok_or_else(|| {
                UsageError::new(
                    "actions",
                    "is needed: nothing here says which repository has Flywheel's actions",
                )
                .with_hint("Give it, such as `--actions octo-org/flywheel@main`.")
            })?,
    };
    let runs_on = match &inputs.runs_on {
        Some(runner) => runner.clone(),
        None => questions.ask("the runner's labels", &found.runner, Runner::parse)?,
    };
    let cache = match &inputs.binary_cache {
        Some(cache) => cache.clone(),
        None => questions.ask(
            "the binary cache (an address, `github` or `none`)",
            &found.cache,
            BinaryCache::parse,
        )?,
    };
    let public_key = match (&inputs.public_key, &cache) {
        (Some(_), BinaryCache::GitHub | BinaryCache::None) => {
            return Err(
                UsageError::new("public-key", "is the key of a cache with an address")
                    .with_hint("Leave it out, or name the cache by `--binary-cache`.")
                    .into(),
            );
        }
        (key, _) => key.clone(),
    };
    Ok(Workflow {
        actions,
        runs_on,
        cache,
        public_key,
        default_branch: found.default_branch.clone(),
        work: work(found),
    })
}

/// What the job is to do with such a repository.
fn work(found: &Found) -> Work {
    match &found.outputs {
        Outputs::Known(names) => ["checks", "packages"]
            .into_iter()
            .find(|known| names.iter().any(|name| name == known))
            .map_or(Work::Command("nix flake check"), Work::FlakeOutputs),
        Outputs::Unknown(_) => Work::FlakeOutputs("checks"),
        Outputs::NoFlake {
            has_default_nix: true,
        } => Work::Command("nix-build"),
        Outputs::NoFlake {
            has_default_nix: false,
        } => Work::Command("nix build nixpkgs#hello"),
    }
}

fn is_there(file: &Path) -> UsageError {
    let problem = format!(
        "is `{}`, which is there already",
        one_line(&file.to_string_lossy(), 200)
    );
    UsageError::new("output", problem)
        .with_hint("Give `--force` to replace it, or `--output -` to look at the new one first.")
}

/// Writes the whole file or none.
fn write(file: &Path, text: &str, replace: bool) -> Result<(), VerbError> {
    let failed = |error: io::Error| match error.kind() {
        io::ErrorKind::AlreadyExists => is_there(file).into(),
        _ => named_file_error(
            "output",
            file,
            "be written",
            error,
            "Name a file that you may write.",
        ),
    };
    let folder = match file.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    fs::create_dir_all(folder).map_err(failed)?;
    if replace {
        let mut new = tempfile::NamedTempFile::new_in(folder).map_err(failed)?;
        new.write_all(text.as_bytes()).map_err(failed)?;
        // A private file's mode is not what a checkout has.
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o644);
        new.as_file().set_permissions(mode).map_err(failed)?;
        new.persist(file).map_err(|error| failed(error.error))?;
        return Ok(());
    }
    let mut new = OpenOptions::new()
        .write(true)
        .create_new(true)
        .open(file)
        .map_err(failed)?;
    new.write_all(text.as_bytes()).map_err(|error| {
        // Half a workflow is worse than none.
        let _ = fs::remove_file(file);
        failed(error)
    })
}
