//! The command line: which verbs there are, and what becomes of a wrong one. What each verb takes stands
//! with the verb, and the definition there is the only one: variables, defaults, parsing, the inputs of the
//! actions and `docs/reference.md` follow from it.

pub mod definitions;
mod variables;

use std::error::Error as _;
use std::ffi::OsString;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Command, CommandFactory as _, FromArgMatches as _, Parser, Subcommand};

use self::variables::{Blank, attach};
use crate::command::value::Invalid;
use crate::command::{
    cache, cache_contract, contract, explain, flake_checks, nix_job, publish, reference, scan,
    setup, validate_builders, watch_store,
};
use flywheel_core::exit::{Exit, Failure, UsageError};
use flywheel_sys::runner::env::Env;

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
    Reference(reference::Inputs),
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
            Verb::Reference(inputs) => reference::run(inputs).await,
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

/// The error of an input, if a value is wrong. clap's own would quote the value, which may be a
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
    use clap::builder::PossibleValue;

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

    /// Values of every kind that an input can have.
    const SAMPLES: [&str; 13] = [
        "1",
        "true",
        "x",
        "127.0.0.1:1",
        "https://host.example/",
        "main:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY=",
        "/nix/store/fvchs9i3c9f4d6lcsm7q2ybxwpbnz4yc-hello",
        "x86_64-linux",
        "refs/heads/main",
        "cache",
        "secret = warn",
        "1GiB",
        "secret hello-* a reason",
    ];

    #[test]
    fn each_value_arrives_as_the_type_of_its_field() {
        // clap compares the types only when a value is taken out, and panics then.
        let mut verbs = vec![(Vec::new(), command())];
        while let Some((name, verb)) = verbs.pop() {
            for below in verb.get_subcommands() {
                verbs.push((
                    [&name[..], &[below.get_name().to_owned()]].concat(),
                    below.clone(),
                ));
            }
            let flags = verb.get_arguments().filter(|flag| !flag.is_hide_set());
            for flag in flags.filter(|flag| flag.get_action().takes_values()) {
                let Some(long) = flag.get_long() else {
                    continue;
                };
                let required = match name.first().map(String::as_str) {
                    Some("publish" | "scan") => &["x"][..],
                    Some("cache") if long != "dir" => &["--dir=x"],
                    _ => &[],
                };
                let named = flag.get_possible_values();
                let named = named.iter().map(PossibleValue::get_name);
                let read = |value: &str| {
                    let flag = format!("--{long}={value}");
                    let arguments = name
                        .iter()
                        .map(String::as_str)
                        .chain(required.iter().copied());
                    let arguments = arguments.chain([flag.as_str()]).map(OsString::from);
                    Cli::read(arguments.collect(), &Env::default()).is_ok()
                };
                let mut values = named.chain(SAMPLES);
                assert!(values.any(read), "no sample is good for {name:?} --{long}");
            }
        }
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
