//! What the command line defines, as plain data: `flywheel reference` prints it, and `docs/reference.md` and the files
//! of the actions follow from it.

use clap::{Arg, Command};
use serde::Serialize;

use crate::inputs::{BY_HAND, REQUIRED_IN_ACTION};
use crate::report::outputs::{self, Output};

/// A verb, or a verb of a verb.
#[derive(Debug, Serialize)]
pub(crate) struct Verb {
    /// Such as `cache serve`.
    pub(crate) name: String,
    pub(crate) about: String,
    pub(crate) inputs: Vec<Input>,
    /// The step outputs; none for a verb that is not an action.
    pub(crate) outputs: Vec<Output>,
}

/// A flag, or an argument without one.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Input {
    /// Without the dashes; of an argument what stands for it.
    pub(crate) name: String,
    pub(crate) is_flag: bool,
    pub(crate) value_name: Option<String>,
    pub(crate) variable: Option<String>,
    pub(crate) help: String,
    pub(crate) default: Option<String>,
    /// The words that are allowed, if there are only a few, each with its meaning.
    pub(crate) allowed: Vec<(String, Option<String>)>,
    pub(crate) is_required: bool,
    /// Whether the action has no input for it.
    pub(crate) is_by_hand: bool,
    pub(crate) is_required_in_action: bool,
    /// The names that it had before and that still work.
    pub(crate) former_names: Vec<String>,
    /// The type that its text is parsed to.
    pub(crate) parsed_to: String,
}

/// Every verb that the help shows.
pub(crate) fn verbs(program: &Command) -> Vec<Verb> {
    let mut verbs = Vec::new();
    collect(program, "", &[], &mut verbs);
    verbs
}

fn collect(command: &Command, name: &str, global: &[Input], verbs: &mut Vec<Verb>) {
    let own = command.get_arguments().filter(|arg| !arg.is_hide_set());
    let own: Vec<(bool, Input)> = own
        .map(|arg| (arg.is_global_set(), input(command, arg)))
        .collect();
    let global: Vec<Input> = own
        .iter()
        .filter(|(is_global, _)| *is_global)
        .map(|(_, input)| input.clone())
        .chain(global.iter().cloned())
        .collect();
    if !name.is_empty() {
        let inherited = global
            .iter()
            .filter(|one| own.iter().all(|(_, own)| own.name != one.name));
        let inputs = own.iter().map(|(_, input)| input).chain(inherited);
        let about = command.get_long_about().or(command.get_about());
        let examples = command.get_after_help().map(ToString::to_string);
        verbs.push(Verb {
            name: name.to_owned(),
            about: [about.map(ToString::to_string), examples]
                .into_iter()
                .flatten()
                .collect::<Vec<_>>()
                .join("\n\n"),
            inputs: inputs.cloned().collect(),
            outputs: outputs::of_verb(name),
        });
    }
    for below in command.get_subcommands().filter(|one| !one.is_hide_set()) {
        let name = format!("{name} {}", below.get_name());
        collect(below, name.trim(), &global, verbs);
    }
}

fn input(command: &Command, arg: &Arg) -> Input {
    // clap fills such a group in when it builds the command.
    let mut built = command.clone();
    built.build();
    let mut groups = built.get_groups();
    let is_required_in_action = groups.any(|group| {
        group.get_id() == REQUIRED_IN_ACTION && group.get_args().any(|id| id == arg.get_id())
    });
    let takes_values = arg.get_action().takes_values();
    let value_name = arg
        .get_value_names()
        .and_then(|names| names.first())
        .map(ToString::to_string);
    let defaults = arg.get_default_values().iter();
    let default = defaults
        .map(|value| value.to_string_lossy().into_owned())
        .next();
    let words = arg.get_possible_values();
    let help = arg.get_long_help().or(arg.get_help());
    Input {
        name: match arg.get_long() {
            Some(long) => long.to_owned(),
            None => value_name.clone().unwrap_or_default(),
        },
        is_flag: arg.get_long().is_some(),
        value_name: value_name.filter(|_| takes_values),
        variable: arg
            .get_env()
            .map(|name| name.to_string_lossy().into_owned()),
        help: sentence(&help.map(ToString::to_string).unwrap_or_default()),
        default: default.filter(|_| takes_values),
        allowed: words
            .iter()
            .filter(|_| takes_values)
            .map(|word| {
                (
                    word.get_name().to_owned(),
                    word.get_help().map(ToString::to_string),
                )
            })
            .collect(),
        is_required: arg.is_required_set(),
        is_by_hand: arg.get_help_heading() == Some(BY_HAND),
        is_required_in_action,
        former_names: arg
            .get_aliases()
            .unwrap_or_default()
            .into_iter()
            .map(str::to_owned)
            .collect(),
        parsed_to: format!("{:?}", arg.get_value_parser().type_id()),
    }
}

/// clap takes the full stop of a doc comment's last sentence away.
fn sentence(help: &str) -> String {
    let help = help.split_whitespace().collect::<Vec<_>>().join(" ");
    if help.ends_with(['.', '!', '?']) {
        help
    } else {
        format!("{help}.")
    }
}
