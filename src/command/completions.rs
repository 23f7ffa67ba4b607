//! `flywheel completions`: a shell's completions of verbs, flags and words, from the program's own definitions.

use clap::{Args, ValueEnum};
use clap_complete::Shell;

use crate::cli;
use crate::inputs::parse::PROGRAM;
use crate::inputs::value::variant;
use flywheel_core::exit::{Exit, VerbError};
use flywheel_sys::runner::workflow::shell_data;

/// Print the completions for a shell, which completes verbs, flags and the words that a flag takes.
#[derive(Args, Debug)]
#[command(
    after_help = "Examples:\n  flywheel completions bash > ~/.local/share/bash-completion/completions/flywheel\n  flywheel completions fish > ~/.config/fish/completions/flywheel.fish"
)]
pub(crate) struct Inputs {
    /// The shell.
    #[arg(value_name = "SHELL", value_parser = variant::<For>())]
    shell: For,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum For {
    Bash,
    Zsh,
    Fish,
}

/// Runs the verb.
///
/// # Errors
/// Never; it has the form that all verbs have.
pub(crate) async fn run(inputs: Inputs) -> Result<Exit, VerbError> {
    let shell = match inputs.shell {
        For::Bash => Shell::Bash,
        For::Zsh => Shell::Zsh,
        For::Fish => Shell::Fish,
    };
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut cli::command(), PROGRAM, &mut script);
    shell_data(String::from_utf8_lossy(&script).trim_end());
    Ok(Exit::Ok)
}
