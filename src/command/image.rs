//! `flywheel image`: what the image lane decides before it builds: sizes, cache namespaces, and the schemas of the
//! documents that it reads. Builds nothing.

mod plan;
mod schema;
mod sizing;

use std::path::PathBuf;

use clap::{Args, Subcommand};

use crate::inputs::value::{Invalid, name, path, value};
use crate::job::inputs::state_folder;
use flywheel_core::exit::{Exit, UsageError, VerbError, named_file_error};
use flywheel_core::text::one_line;
use flywheel_image::directives::is_workspace;
use flywheel_image::history::{HistoryError, HistoryFile};
use flywheel_sys::runner::env::Env;

/// Plan builds of container images: how large a runner, which caches, and why.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  flywheel image plan services/web --workspace web")]
pub(crate) struct Inputs {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    Plan(Box<plan::Plan>),
    Schema(schema::Schema),
    Sizing(sizing::Sizing),
}

/// The history of builds, and what of it is meant.
#[derive(Args, Clone, Debug)]
struct HistoryInput {
    /// The folder with the history of builds, such as `/var/lib/flywheel/image` (default:
    /// `~/.local/state/flywheel/image`).
    #[arg(long, value_name = "DIR", value_parser = path())]
    history: Option<PathBuf>,
}

/// The stage that is built.
#[derive(Args, Clone, Debug)]
struct TargetInput {
    /// The stage of the Dockerfile that is built, such as `final` (default: the last one).
    #[arg(long, value_name = "STAGE", value_parser = name())]
    target: Option<String>,
}

/// The workspace, where no document names it.
#[derive(Args, Clone, Debug)]
struct WorkspaceInput {
    /// The workspace that the build belongs to, such as `web`: its history and its caches (default: the one that
    /// `--directives` names, then the name of the context's folder).
    #[arg(long, value_name = "NAME", value_parser = value(workspace))]
    workspace: Option<String>,
}

fn workspace(text: &str) -> Result<String, Invalid> {
    if is_workspace(text) {
        return Ok(text.to_owned());
    }
    Err(Invalid::new(format!(
        "must be a name of lower-case letters and digits with single `.`, `_` or `-` in between, not `{}`",
        one_line(text, 80)
    )))
}

impl HistoryInput {
    /// The file of a workspace.
    ///
    /// # Errors
    /// When no folder is named, and the user has none.
    fn file(&self, workspace: &str, env: &Env) -> Result<HistoryFile, UsageError> {
        let default = || state_folder(env).map(|state| state.join("image"));
        let folder = self.history.clone().or_else(default);
        let folder = folder.ok_or_else(|| {
            UsageError::new(
                "history",
                "is needed: there is no home folder to have a default in",
            )
            .with_hint("Name a folder for the history of builds.")
        })?;
        Ok(HistoryFile::new(&folder, workspace))
    }
}

/// The error of a verb that is about a history which cannot be used.
fn unusable(error: HistoryError) -> VerbError {
    let hint = "Name a folder that this user can read and write.";
    named_file_error("history", &error.file, error.failed, error.source, hint)
}

/// Runs the verb.
///
/// # Errors
/// When an input or a document is wrong.
pub(crate) async fn run(inputs: Inputs, env: &Env) -> Result<Exit, VerbError> {
    match inputs.task {
        Task::Plan(plan) => plan::run(*plan, env).await,
        Task::Schema(schema) => schema::run(&schema),
        Task::Sizing(sizing) => sizing::run(sizing, env),
    }
}
