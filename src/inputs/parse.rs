//! Parses a command line with the variables of its flags, and turns clap's error about a value into one that names the
//! input.

use std::error::Error as _;
use std::ffi::OsString;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{ArgMatches, Command};

use crate::inputs::value::Invalid;
use crate::inputs::variables::{Blank, attach};
use flywheel_core::exit::UsageError;
use flywheel_sys::runner::env::Env;

/// The name under which users call this program.
pub(crate) const PROGRAM: &str = "flywheel";

/// Why a command line is not obeyed.
#[derive(Debug)]
pub(crate) enum Refusal {
    /// A value is wrong.
    Usage(UsageError),
    /// A wrong flag or verb, or a call for the help or the version; clap prints the text.
    Clap(clap::Error),
}

/// Parses the arguments behind the program's name, and the variables of their flags.
///
/// # Errors
/// For the first value that is wrong, or for a wrong command line.
pub(crate) fn matches(
    command: Command,
    arguments: impl IntoIterator<Item = OsString>,
    env: &Env,
) -> Result<ArgMatches, Refusal> {
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
        _ => help(&command, &arguments).map_or_else(|| refusal(error), Refusal::Clap),
    })
}

/// The help, where it is asked for behind a wrong value, which clap reports first.
fn help(command: &Command, arguments: &[OsString]) -> Option<clap::Error> {
    let own = arguments.iter().take_while(|argument| *argument != "--");
    let flag = own
        .clone()
        .find(|flag| *flag == "--help" || *flag == "-h")?;
    // The help of the whole program would hide that there is no such verb.
    let is_verb = |word: &str| word.starts_with('-') || command.find_subcommand(word).is_some();
    let first = arguments.get(1).and_then(|word| word.to_str());
    if !first.is_some_and(is_verb) {
        return None;
    }
    let (mut verb, mut call) = (command, vec![OsString::from(PROGRAM)]);
    for name in own {
        if let Some(below) = name.to_str().and_then(|name| verb.find_subcommand(name)) {
            verb = below;
            call.push(name.clone());
        }
    }
    call.push(flag.clone());
    let whole = attach(command.clone(), &Blank::default());
    whole.try_get_matches_from(call).err()
}

/// The error of an input, if a value is wrong. clap's own would quote the value, which may be a
/// secret.
pub(crate) fn refusal(error: clap::Error) -> Refusal {
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
    use clap::{Args, CommandFactory as _, FromArgMatches as _, Parser};

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
