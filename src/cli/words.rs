//! The names of the verb's inputs for messages that are read outside of GitHub: in a GitLab job as variables, in a shell as
//! flags. What was given in the other way is named as it was given.

use std::ffi::OsString;

use clap::{Arg, Command};

use flywheel_sys::runner::env::Env;
use flywheel_sys::runner::input_names::{InputNames, Place, Spelling};

/// The names for these arguments and variables; none in a job on GitHub, for which messages are written.
pub(super) fn input_names(root: &Command, arguments: &[OsString], env: &Env) -> Option<InputNames> {
    let place = match env.get("GITLAB_CI") {
        _ if env.in_github_actions() => return None,
        Some(_) => Place::GitLab,
        None => Place::Shell,
    };
    let own: Vec<&str> = arguments
        .iter()
        .take_while(|argument| *argument != "--")
        .filter_map(|argument| argument.to_str())
        .collect();
    let mut verbs = vec![root];
    for word in &own {
        verbs.extend(verbs.last().and_then(|verb| verb.find_subcommand(word)));
    }
    let inputs = verbs.iter().flat_map(|verb| verb.get_arguments());
    let inputs = inputs.filter(|input| !input.is_hide_set());
    let spellings = inputs.filter_map(|input| {
        let (name, spelling) = spelled(input, place, &own, env)?;
        Some((name, spelling))
    });
    Some(InputNames::new(place, spellings))
}

fn spelled(input: &Arg, place: Place, own: &[&str], env: &Env) -> Option<(String, Spelling)> {
    let name = input.get_long()?;
    let flag = format!("--{name}");
    let is_flag_given = own
        .iter()
        .any(|word| *word == flag || word.starts_with(&format!("{flag}=")));
    let variable = input.get_env().and_then(|variable| variable.to_str());
    let is_variable_given = variable.is_some_and(|variable| {
        env.get(variable)
            .is_some_and(|value| !value.trim().is_empty())
    });
    let spelling = match (variable, place) {
        (Some(variable), Place::Shell) if is_variable_given && !is_flag_given => {
            Spelling::Variable(variable.to_owned())
        }
        (Some(variable), Place::GitLab) if !is_flag_given => {
            Spelling::Variable(variable.to_owned())
        }
        _ => Spelling::Flag(flag),
    };
    Some((name.to_owned(), spelling))
}
