//! How messages name an input: as the workflow's author, the author of a GitLab job or the user of a shell gives it.
//!
//! Messages are written for a workflow: `` input `attic-server` ``, `` `attic-server` ``, `` `reclaim: true` ``. Whatever
//! prints one outside of GitHub passes it through `localized`, the one place that knows other spellings. A name without a
//! hyphen could be any word, so that it counts only behind "input" or before a value.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::OnceLock;

/// The names of the verb that runs. Set once, at the start; without it, as in unit tests, messages stay as they are.
static NAMES: OnceLock<InputNames> = OnceLock::new();

/// Where a message is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    GitLab,
    Shell,
}

/// How an input is spelled where its message is read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Spelling {
    /// `--attic-server`
    Flag(String),
    /// `FLYWHEEL_ATTIC_SERVER`
    Variable(String),
}

impl Spelling {
    fn with_value(&self, value: &str) -> String {
        match self {
            Self::Flag(flag) if value.contains(' ') => format!("{flag} '{value}'"),
            Self::Flag(flag) => format!("{flag} {value}"),
            Self::Variable(variable) => format!("{variable}={value}"),
        }
    }

    fn bare(&self) -> &str {
        match self {
            Self::Flag(name) | Self::Variable(name) => name,
        }
    }
}

/// The spellings of a verb's inputs.
#[derive(Debug)]
pub struct InputNames {
    place: Place,
    spellings: BTreeMap<String, Spelling>,
}

impl InputNames {
    pub fn new(place: Place, spellings: impl IntoIterator<Item = (String, Spelling)>) -> Self {
        Self {
            place,
            spellings: spellings.into_iter().collect(),
        }
    }

    /// Has every later message use these names.
    pub fn use_for_messages(self) {
        // A second call would come from the same command line.
        let _ = NAMES.set(self);
    }

    /// The message in the words of its place.
    fn localize(&self, message: &str) -> String {
        let environment = match self.place {
            Place::GitLab => "among the job's variables",
            Place::Shell => "in the environment",
        };
        let message = message.replace("in the step's `env`", environment);
        let mut said = String::with_capacity(message.len());
        let mut rest = message.as_str();
        while let Some((before, quoted, after)) = next_quoted(rest) {
            said.push_str(before);
            match self.spelled(quoted, before) {
                Some(spelled) => {
                    said.truncate(without_noun(&said).len());
                    said.push_str(&format!("`{spelled}`"));
                }
                // What takes the place of a flag has its name in capitals.
                None if has_noun(before) && is_in_capitals(quoted) => {
                    said.truncate(without_noun(&said).len());
                    said.push_str(&format!("argument `{quoted}`"));
                }
                None => said.push_str(&format!("`{quoted}`")),
            }
            rest = after;
        }
        said.push_str(rest);
        said
    }

    /// What stands in the place of a quoted text, if that is an input.
    fn spelled(&self, quoted: &str, before: &str) -> Option<String> {
        let (name, value) = match quoted.split_once(": ") {
            Some((name, value)) => (name, Some(value)),
            None => (quoted, None),
        };
        if !has_noun(before) && value.is_none() && !name.contains('-') {
            return None;
        }
        let spelling = self.spellings.get(name)?;
        Some(match value {
            Some(value) => spelling.with_value(value),
            None => spelling.bare().to_owned(),
        })
    }
}

/// The text before the first pair of backticks, what they hold, and what comes after.
fn next_quoted(text: &str) -> Option<(&str, &str, &str)> {
    let (before, rest) = text.split_once('`')?;
    let (quoted, after) = rest.split_once('`')?;
    Some((before, quoted, after))
}

fn has_noun(before: &str) -> bool {
    without_noun(before).len() < before.len()
}

fn is_in_capitals(name: &str) -> bool {
    !name.is_empty() && name.chars().all(|c| c.is_ascii_uppercase() || c == '-')
}

/// The text without the noun for an input at its end: a flag and a variable say by their looks what they are.
fn without_noun(text: &str) -> &str {
    let nouns = ["the inputs ", "the input ", "inputs ", "input "];
    let mut found = nouns.iter().filter_map(|noun| text.strip_suffix(noun));
    let shorter = found.next().unwrap_or(text);
    let ends_a_word = shorter.ends_with(|c: char| c.is_alphanumeric());
    if ends_a_word { text } else { shorter }
}

/// A message for whoever reads it outside of GitHub.
pub(crate) fn localized(message: &str) -> Cow<'_, str> {
    match NAMES.get() {
        Some(names) => names.localize(message).into(),
        None => message.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(place: Place) -> InputNames {
        let spelled = |name: &str| match place {
            Place::Shell => Spelling::Flag(format!("--{name}")),
            Place::GitLab => {
                let variable = name.to_uppercase().replace('-', "_");
                Spelling::Variable(format!("FLYWHEEL_{variable}"))
            }
        };
        let all = ["attic-server", "journal", "reclaim", "command"];
        InputNames::new(place, all.map(|name| (name.to_owned(), spelled(name))))
    }

    #[test]
    fn an_input_is_named_as_it_is_given_here() {
        for (message, shell, gitlab) in [
            (
                "input `attic-server` must be a URL",
                "`--attic-server` must be a URL",
                "`FLYWHEEL_ATTIC_SERVER` must be a URL",
            ),
            (
                "Look at the inputs `journal` and `attic-server`.",
                "Look at `--journal` and `--attic-server`.",
                "Look at `FLYWHEEL_JOURNAL` and `FLYWHEEL_ATTIC_SERVER`.",
            ),
            (
                "Set `reclaim: true`, or `command: nix build .#x`.",
                "Set `--reclaim true`, or `--command 'nix build .#x'`.",
                "Set `FLYWHEEL_RECLAIM=true`, or `FLYWHEEL_COMMAND=nix build .#x`.",
            ),
            (
                "input `ADDRESS` lacks a name",
                "argument `ADDRESS` lacks a name",
                "argument `ADDRESS` lacks a name",
            ),
            (
                "Pass `ATTIC_TOKEN` in the step's `env`.",
                "Pass `ATTIC_TOKEN` in the environment.",
                "Pass `ATTIC_TOKEN` among the job's variables.",
            ),
        ] {
            assert_eq!(names(Place::Shell).localize(message), shell);
            assert_eq!(names(Place::GitLab).localize(message), gitlab);
        }
    }

    #[test]
    fn other_words_stay() {
        for message in [
            "the branch `journal`",
            "input `attic-cache` of another verb",
            "a disinput `journal`",
            "one ` alone, and `attic-server",
            "``attic-server``",
        ] {
            assert_eq!(names(Place::Shell).localize(message), message);
        }
    }
}
