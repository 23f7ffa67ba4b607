//! `flywheel man`: a man page for the program and for each verb, from the program's own definitions.

use std::fs;
use std::path::PathBuf;

use clap::Args;

use crate::cli;
use crate::inputs::value::path;
use flywheel_core::exit::{Exit, VerbError, named_file_error};
use flywheel_sys::runner::env::Env;
use flywheel_sys::runner::workflow::Workflow;

/// Write the man pages into a folder: `flywheel.1`, and one for each verb, such as `flywheel-nix-job.1`.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  flywheel man ~/.local/share/man/man1")]
pub(crate) struct Inputs {
    /// The folder, which is made if it is not there.
    #[arg(value_name = "FOLDER", value_parser = path())]
    folder: PathBuf,
}

/// Runs the verb.
///
/// # Errors
/// When the folder cannot be written to.
pub(crate) async fn run(inputs: Inputs, env: &Env) -> Result<Exit, VerbError> {
    let folder = &inputs.folder;
    fs::create_dir_all(folder)
        .and_then(|()| clap_mangen::generate_to(cli::command(), folder))
        .map_err(|error| {
            let hint =
                "Name a folder that this user can write to, such as `~/.local/share/man/man1`.";
            named_file_error("FOLDER", folder, "be written to", error, hint)
        })?;
    let text = format!("the man pages are in `{}`", folder.display());
    Workflow::new(env.in_github_actions()).log(&text);
    Ok(Exit::Ok)
}
