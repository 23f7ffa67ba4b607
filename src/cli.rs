//! The command line: which verbs there are, and what becomes of a wrong one. What each verb takes stands
//! with the verb, and the definition there is the only one: variables, defaults, parsing, the inputs of the
//! actions and `docs/reference.md` follow from it.

mod variables;

use std::error::Error as _;
use std::ffi::OsString;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Command, CommandFactory as _, FromArgMatches as _, Parser, Subcommand};

use self::variables::{Blank, attach};
use crate::command::value::Invalid;
use crate::command::{
    Failure, cache, cache_contract, contract, explain, flake_checks, nix_job, publish, scan, setup,
    validate_builders, watch_store,
};
use crate::exit::{Exit, UsageError};
use crate::runner::env::Env;

/// The name under which users call this program.
const PROGRAM: &str = "flywheel";

/// Nix CI for GitHub workflows: every store path is published, or named with the reason why not.
#[derive(Debug, Parser)]
#[command(
    name = PROGRAM,
    version,
    max_term_width = 100,
    disable_help_subcommand = true
)]
pub struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    NixJob(Box<nix_job::Inputs>),
    FlakeChecks(Box<flake_checks::Inputs>),
    Publish(publish::Inputs),
    WatchStore(Box<watch_store::Inputs>),
    Cache(cache::Inputs),
    Explain(explain::Inputs),
    ValidateBuilders(Box<validate_builders::Inputs>),
    Contract(contract::Inputs),
    CacheContract(cache_contract::Inputs),
    Scan(scan::Inputs),
    Setup(setup::Inputs),
}

/// Why a command line is not obeyed.
#[derive(Debug)]
pub enum Refusal {
    /// A value is wrong.
    Usage(UsageError),
    /// Flags or verbs are wrong, or help or the version were asked for: clap prints it.
    Clap(clap::Error),
}

/// Every verb with its flags, and with the variable that each of them reads.
pub fn command() -> Command {
    attach(Cli::command(), &Blank::default())
}

impl Cli {
    /// Reads the arguments behind the program's name, and the variables that flags have.
    ///
    /// # Errors
    /// For the first value that is wrong, or for a wrong command line.
    pub fn read(arguments: Vec<OsString>, env: &Env) -> Result<Self, Refusal> {
        let matches = matches(Cli::command(), arguments, env)?;
        Self::from_arg_matches(&matches).map_err(refusal)
    }

    /// Runs the verb that was asked for.
    ///
    /// # Errors
    /// Whatever the verb fails with.
    pub async fn run(self, env: &Env) -> Result<Exit, Failure> {
        match self.verb {
            Verb::NixJob(inputs) => nix_job::run(*inputs, env).await,
            Verb::FlakeChecks(inputs) => flake_checks::run(*inputs, env).await,
            Verb::Publish(inputs) => publish::run(inputs, env).await,
            Verb::WatchStore(inputs) => watch_store::run(*inputs, env).await,
            Verb::Cache(inputs) => cache::run(inputs, env).await,
            Verb::Explain(inputs) => explain::run(inputs, env).await,
            Verb::ValidateBuilders(inputs) => validate_builders::run(*inputs, env).await,
            Verb::Contract(inputs) => contract::run(inputs, env).await,
            Verb::CacheContract(inputs) => cache_contract::run(inputs, env).await,
            Verb::Scan(inputs) => scan::run(inputs, env).await,
            Verb::Setup(inputs) => setup::run(inputs, env).await,
        }
    }
}

fn matches(
    command: Command,
    arguments: impl IntoIterator<Item = OsString>,
    env: &Env,
) -> Result<clap::ArgMatches, Refusal> {
    let mut blank = Blank::variables_of(env);
    let arguments = blank.take_flags(&command, arguments);
    // Usage lines name the launcher and not the file behind it, which is called after its platform.
    let arguments: Vec<OsString> = [PROGRAM.into()].into_iter().chain(arguments).collect();
    let parsed = attach(command.clone(), &blank).try_get_matches_from(&arguments);
    parsed.map_err(|error| match error.kind() {
        // The help names every variable, those that are empty just now included.
        ErrorKind::DisplayHelp => {
            let whole = attach(command, &Blank::default()).try_get_matches_from(&arguments);
            Refusal::Clap(whole.err().unwrap_or(error))
        }
        _ => refusal(error),
    })
}

/// The same error in our words, if it is about a value. clap's own would quote the value, which may be a
/// secret.
fn refusal(error: clap::Error) -> Refusal {
    let invalid = error.source().and_then(|source| source.downcast_ref());
    let invalid: Option<&Invalid> = invalid;
    match (invalid, error.get(ContextKind::InvalidArg)) {
        (Some(invalid), Some(ContextValue::String(shown))) => {
            Refusal::Usage(invalid.of_input(input_name(shown)))
        }
        _ => Refusal::Clap(error),
    }
}

/// The name of an input as clap shows it: `--strict[=<BOOL>]`, `--flake <REF>` or `[WORD]`.
fn input_name(shown: &str) -> &str {
    let name = shown.trim_start_matches(['-', '[', '<']);
    name.split([' ', '[', ']', '<', '>', '='])
        .next()
        .unwrap_or(name)
}

#[cfg(test)]
pub(crate) mod tests {
    use clap::Args;

    use super::*;

    #[derive(Parser)]
    struct Group<T: Args> {
        #[command(flatten)]
        inputs: T,
    }

    /// A group of inputs as the command line gives it, each with its value; environments count for nothing.
    pub(crate) fn read<T: Args>(inputs: &[(&str, &str)]) -> Result<T, UsageError> {
        let arguments = inputs
            .iter()
            .map(|(name, value)| OsString::from(format!("--{name}={value}")));
        let matches =
            matches(Group::<T>::command(), arguments, &Env::default()).map_err(|refusal| {
                match refusal {
                    Refusal::Usage(error) => error,
                    Refusal::Clap(error) => panic!("{error}"),
                }
            })?;
        let group = Group::<T>::from_arg_matches(&matches).expect("the command is the group's own");
        Ok(group.inputs)
    }

    #[test]
    fn the_definitions_are_sound() {
        command().debug_assert();
    }

    #[test]
    fn the_name_of_an_input_is_read_from_what_clap_shows() {
        for (shown, name) in [
            ("--flake <REF>", "flake"),
            ("--strict[=<BOOL>]", "strict"),
            ("[WORD]", "WORD"),
            ("<PATH>...", "PATH"),
        ] {
            assert_eq!(input_name(shown), name);
        }
    }
}
