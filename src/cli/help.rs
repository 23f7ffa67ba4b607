//! What the help of every verb has in common: below its examples stand the exit codes.

use clap::Command;

use flywheel_core::exit::Exit;

/// The command with the exit codes in each verb's `--help`. The short help (`-h`) goes without them.
pub(super) fn with_exit_codes(command: Command) -> Command {
    let codes = exit_codes();
    let below = match command.get_after_help() {
        Some(examples) => format!("{examples}\n\n{codes}"),
        None => codes,
    };
    command
        .after_long_help(below)
        .mut_subcommands(with_exit_codes)
}

fn exit_codes() -> String {
    let rows = Exit::OWN.map(|(exit, meaning)| format!("\n  {:>3}  {meaning}", exit.code()));
    format!("Exit codes:{}\n\n{}", rows.concat(), Exit::OF_A_COMMAND)
}
