//! Which environment variable each flag reads, and what counts as "not given".
//!
//! A composite action passes an input that its caller left out as an empty variable, so an empty value
//! never means anything, neither in a variable nor in a flag. clap knows no such rule: the command that it
//! parses with is built without the variables that are empty, and gets no flag that is empty.

use std::collections::BTreeSet;
use std::ffi::OsString;

use clap::builder::{FalseyValueParser, Resettable};
use clap::{Arg, ArgAction, Command};

use flywheel_sys::runner::env::Env;

/// What the variables of all verbs begin with.
const PREFIX: &str = "FLYWHEEL_";
/// Verbs that are no actions and whose flags (`dir`, `target`) are too general for an environment.
const PREFIXED_VERBS: [(&str, &str); 5] = [
    ("cache", "FLYWHEEL_CACHE_"),
    ("token", "FLYWHEEL_CACHE_TOKEN_"),
    ("use", "FLYWHEEL_CACHE_USE_"),
    ("login", "FLYWHEEL_CACHE_LOGIN_"),
    ("image", "FLYWHEEL_IMAGE_"),
];

/// Flags and variables that are there and empty.
#[derive(Debug, Default)]
pub(crate) struct Blank {
    flags: BTreeSet<String>,
    variables: BTreeSet<String>,
}

impl Blank {
    /// The empty variables of an environment.
    pub(crate) fn variables_of(env: &Env) -> Self {
        let blank = env
            .all()
            .filter(|(name, value)| name.starts_with(PREFIX) && is_blank(value));
        Self {
            variables: blank.map(|(name, _)| name.to_owned()).collect(),
            ..Self::default()
        }
    }

    /// Takes the flags out that are given with an empty value. Such a flag still hides its variable, as any
    /// flag does.
    pub(crate) fn take_flags(
        &mut self,
        root: &Command,
        arguments: impl IntoIterator<Item = OsString>,
    ) -> Vec<OsString> {
        let mut kept = Vec::new();
        // The flags of a verb and those of the verbs that it stands below, which may be global.
        let mut verbs = vec![root];
        let mut arguments = arguments.into_iter();
        while let Some(argument) = arguments.next() {
            let text = argument.to_str().unwrap_or_default();
            // What follows is a program and its arguments, which are the caller's.
            if text == "--" {
                kept.push(argument);
                kept.extend(arguments);
                break;
            }
            // An argument that may be left out, and is empty, counts as not given, too.
            if is_blank(&argument) && verbs.last().is_some_and(|verb| has_optional_argument(verb)) {
                continue;
            }
            let Some(flag) = text.strip_prefix("--") else {
                verbs.extend(verbs.last().and_then(|verb| verb.find_subcommand(text)));
                kept.push(argument);
                continue;
            };
            let (name, value) = match flag.split_once('=') {
                Some((name, value)) => (name, Some(OsString::from(value))),
                None => (flag, None),
            };
            let Some(known) = find(&verbs, name) else {
                kept.push(argument);
                continue;
            };
            // `--flake=.` and `--strict` are one argument each, `--flake .` is two.
            let is_one_argument = value.is_some() || known.is_require_equals_set();
            let value = if is_one_argument {
                value
            } else {
                arguments.next()
            };
            // A flag that takes several values stays, and misses one: the next word must not become an argument.
            let takes_several = known
                .get_num_args()
                .is_some_and(|count| count.max_values() > 1);
            if value.as_ref().is_some_and(is_blank) && !takes_several {
                self.flags.extend(known.get_long().map(str::to_owned));
                continue;
            }
            kept.push(argument);
            kept.extend(value.filter(|_| !is_one_argument));
        }
        kept
    }

    fn holds(&self, flag: &str, variable: &str) -> bool {
        self.flags.contains(flag) || self.variables.contains(variable)
    }
}

fn is_blank(value: &OsString) -> bool {
    value.to_str().is_some_and(|text| text.trim().is_empty())
}

fn has_optional_argument(verb: &Command) -> bool {
    let mut arguments = verb.get_positionals();
    arguments.any(|argument| !argument.is_required_set() && !argument.is_last_set())
}

/// The flag of this name that takes a value.
fn find<'a>(verbs: &[&'a Command], name: &str) -> Option<&'a Arg> {
    let flags = verbs.iter().flat_map(|verb| verb.get_arguments());
    let mut named = flags.filter(|flag| {
        flag.get_long() == Some(name)
            || flag
                .get_all_aliases()
                .is_some_and(|names| names.contains(&name))
    });
    named.find(|flag| flag.get_action().takes_values())
}

/// Gives every flag `--x-y` the variable `FLYWHEEL_X_Y`, but for those that are blank. A definition that
/// names a variable itself keeps it.
pub(crate) fn attach(command: Command, blank: &Blank) -> Command {
    attach_below(command, PREFIX, blank)
}

fn attach_below(command: Command, prefix: &str, blank: &Blank) -> Command {
    let command = command.mut_args(|flag| with_variable(flag, prefix, blank));
    command.mut_subcommands(|verb| {
        let mut prefixed = PREFIXED_VERBS.iter();
        let own = prefixed.find(|(name, _)| verb.get_name() == *name);
        let prefix = own.map_or(prefix, |(_, own)| own);
        attach_below(verb, prefix, blank)
    })
}

fn with_variable(flag: Arg, prefix: &str, blank: &Blank) -> Arg {
    let Some(long) = flag.get_long().filter(|_| !flag.is_hide_set()) else {
        return flag;
    };
    let variable = match flag.get_env() {
        Some(named) => named.to_string_lossy().into_owned(),
        None => format!("{prefix}{}", long.to_uppercase().replace('-', "_")),
    };
    let flag = if blank.holds(long, &variable) {
        flag.env(Resettable::Reset)
    } else {
        // A value may be long, or hold a password.
        flag.env(variable).hide_env_values(true)
    };
    match flag.get_action() {
        // An environment has no switch that just stands there: `0`, `false` and `no` turn one off.
        ArgAction::SetTrue => flag.value_parser(FalseyValueParser::new()),
        _ => flag,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn command() -> Command {
        let value = |name: &'static str| Arg::new(name).long(name);
        let switch = value("strict")
            .num_args(0..=1)
            .require_equals(true)
            .default_missing_value("true");
        Command::new("x")
            .subcommand(
                Command::new("run")
                    .arg(value("server-name"))
                    .arg(switch)
                    .arg(value("publish").action(ArgAction::SetTrue))
                    .arg(Arg::new("program").last(true).num_args(0..)),
            )
            .subcommand(Command::new("cache").arg(value("dir")))
            .subcommand(
                Command::new("watch")
                    .arg(Arg::new("task"))
                    .arg(value("files").num_args(1..)),
            )
    }

    fn kept(arguments: &[&str]) -> (Vec<String>, Vec<String>) {
        let mut blank = Blank::default();
        let kept = blank.take_flags(&command(), arguments.iter().map(OsString::from));
        let text = |argument: OsString| argument.into_string().expect("UTF-8");
        (
            kept.into_iter().map(text).collect(),
            blank.flags.into_iter().collect(),
        )
    }

    #[test]
    fn an_empty_flag_counts_as_not_given() {
        for blank in [
            &["run", "--server-name", ""][..],
            &["run", "--server-name", " \n"],
            &["run", "--server-name="],
        ] {
            assert_eq!(
                kept(blank),
                (vec!["run".to_owned()], vec!["server-name".to_owned()])
            );
        }
    }

    #[test]
    fn an_empty_argument_that_may_be_left_out_counts_as_not_given() {
        assert_eq!(kept(&["watch", " "]).0, ["watch"]);
    }

    #[test]
    fn whatever_is_no_empty_flag_stays() {
        for whole in [
            &["watch", "--files", "", "x"][..],
            &["run", "--server-name", "x", "--publish", ""],
            &["run", "--server-name", "--dir", ""],
            &["run", "--strict", ""],
            &["run", "--unknown", ""],
            &["run", "--", "--server-name", ""],
            &["run", "--server-name"],
        ] {
            assert_eq!(
                kept(whole),
                (
                    whole
                        .to_vec()
                        .iter()
                        .map(|word| (*word).to_owned())
                        .collect(),
                    vec![]
                )
            );
        }
    }

    #[test]
    fn a_flag_has_the_variable_of_its_name_unless_it_is_empty() {
        let env = Env::from_pairs([("FLYWHEEL_SERVER_NAME", " "), ("FLYWHEEL_STRICT", "x")]);
        let variables = |blank: &Blank, verb: &str| -> Vec<String> {
            let command = attach(command(), blank);
            let verb = command.find_subcommand(verb).expect("a verb");
            let variables = verb.get_arguments().filter_map(Arg::get_env);
            variables
                .map(|name| name.to_string_lossy().into_owned())
                .collect()
        };
        assert_eq!(
            variables(&Blank::default(), "run"),
            [
                "FLYWHEEL_SERVER_NAME",
                "FLYWHEEL_STRICT",
                "FLYWHEEL_PUBLISH"
            ]
        );
        assert_eq!(
            variables(&Blank::variables_of(&env), "run"),
            ["FLYWHEEL_STRICT", "FLYWHEEL_PUBLISH"]
        );
        assert_eq!(
            variables(&Blank::default(), "cache"),
            ["FLYWHEEL_CACHE_DIR"]
        );
    }
}
