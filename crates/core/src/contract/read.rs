//! Reads a contract file, `flywheel.yml`, on top of the built-in contract, and reports what is wrong with it by file,
//! line and key. Takes text; never opens a file.

use std::fmt;

use serde_saphyr::Error as Yaml;
use thiserror::Error;

use crate::contract::Contract;
use crate::exit::{Exit, Explain};
use crate::text::{nearest, one_line};

/// What is wrong with a contract file.
#[derive(Debug, Error, PartialEq, Eq)]
pub struct ContractError {
    /// The file's name.
    pub(crate) file: String,
    /// The line, from 1; `None` if the whole file is wrong.
    pub(crate) line: Option<u64>,
    /// The key that is wrong, if it is one.
    pub(crate) key: Option<String>,
    /// What is wrong, as a fragment.
    pub(crate) problem: String,
    /// The nearest known key, or what else to do.
    pub(crate) hint: Option<String>,
}

impl fmt::Display for ContractError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.file)?;
        self.line.iter().try_for_each(|line| write!(f, ":{line}"))?;
        match &self.key {
            Some(key) => write!(f, ": `{key}`: {}", self.problem),
            None => write!(f, ": {}", self.problem),
        }
    }
}

impl Explain for ContractError {
    fn exit(&self) -> Exit {
        Exit::Usage
    }

    fn hint(&self) -> Option<String> {
        self.hint.clone()
    }
}

/// The contract of a repository with this file, on top of the built-in contract.
///
/// # Errors
/// For the first thing that is wrong with it.
pub fn contract(file: &str, text: &str) -> Result<Contract, ContractError> {
    let mut contract = Contract::built_in();
    // A YAML document without content is `null`, which is no mapping and would be refused.
    let is_blank = text
        .lines()
        .map(str::trim)
        .all(|line| line.is_empty() || line.starts_with('#') || line == "---");
    if !is_blank {
        let over: Contract =
            serde_saphyr::from_str(text).map_err(|error| explain(file, text, &error))?;
        contract.overlay(over);
    }
    Reader {
        file,
        text,
        contract: &contract,
    }
    .check()?;
    Ok(contract)
}

/// A YAML document as JSON, for files in a format of others.
///
/// # Errors
/// When it is no YAML.
pub fn document(file: &str, text: &str) -> Result<serde_json::Value, ContractError> {
    serde_saphyr::from_str(text).map_err(|error| explain(file, text, &error))
}

fn explain(file: &str, text: &str, error: &Yaml) -> ContractError {
    let error = error.without_snippet();
    let line = error
        .location()
        .map(|location| location.line())
        .filter(|line| *line > 0);
    let base = ContractError {
        file: file.to_owned(),
        line,
        key: None,
        problem: String::new(),
        hint: None,
    };
    match error {
        Yaml::SerdeUnknownField {
            field, expected, ..
        } => ContractError {
            key: Some(field.clone()),
            problem: "there is no such key here".into(),
            hint: Some(match nearest(field, expected.iter().copied()) {
                Some(name) => format!("Did you mean `{name}`?"),
                None => format!("The keys here are {}.", expected.join(", ")),
            }),
            ..base
        },
        other => {
            let message = other.to_string();
            let message = message
                .lines()
                .next()
                .unwrap_or_default()
                .trim_start_matches("error: ");
            // The library puts the location before or after its message, which would then name it twice.
            let places = error.location().map(|at| (at.line(), at.column()));
            let problem = places.and_then(|(line, column)| {
                let behind = message.strip_suffix(&format!(" at line {line}, column {column}"));
                behind.or_else(|| message.strip_prefix(&format!("line {line} column {column}: ")))
            });
            let problem = problem.unwrap_or(message);
            ContractError {
                key: line.and_then(|line| key_at(text, line)),
                problem: one_line(problem, 300),
                ..base
            }
        }
    }
}

/// The key on a line.
fn key_at(text: &str, line: u64) -> Option<String> {
    let line = text
        .lines()
        .nth(usize::try_from(line).ok()?.checked_sub(1)?)?;
    let key = line
        .trim_start_matches([' ', '-'])
        .split_once(':')?
        .0
        .trim_matches(['"', '\'', ' ']);
    (!key.is_empty()).then(|| one_line(key, 80))
}

/// Checks what a file has in several places against each other.
struct Reader<'a> {
    file: &'a str,
    text: &'a str,
    contract: &'a Contract,
}

impl Reader<'_> {
    fn check(&self) -> Result<(), ContractError> {
        self.lanes()?;
        for placement in &self.contract.placement {
            self.cache("where", &placement.cache)?;
        }
        for (_, row) in self.contract.exposure.iter() {
            for (cache, _) in row.iter() {
                self.cache("exposure", cache)?;
            }
        }
        Ok(())
    }

    fn lanes(&self) -> Result<(), ContractError> {
        let mut seen: Vec<(String, &str)> = Vec::new();
        for (class, _, lane) in self.contract.lanes() {
            let label = lane.label.to_lowercase();
            if label == "self-hosted" {
                let problem = format!(
                    "a lane of `{class}` must have a label of its own, not bare `self-hosted`"
                );
                return Err(self.error(
                    "label",
                    &lane.label,
                    problem,
                    "Name what the lane is, such as `nix-heavy`.".into(),
                ));
            }
            if let Some((_, other)) = seen.iter().find(|(known, _)| *known == label) {
                let problem = format!(
                    "the lane `{}` stands in `{other}` and in `{class}`",
                    lane.label
                );
                return Err(self.error(
                    "label",
                    &lane.label,
                    problem,
                    "A label belongs to one class.".into(),
                ));
            }
            seen.push((label, class));
        }
        Ok(())
    }

    fn cache(&self, key: &str, name: &str) -> Result<(), ContractError> {
        if self.contract.caches.get(name).is_some() {
            return Ok(());
        }
        let known: Vec<&str> = self.contract.caches.iter().map(|(name, _)| name).collect();
        let hint = match nearest(name, known.iter().copied()) {
            Some(name) => format!("Did you mean `{name}`?"),
            None => format!("The caches are {}.", known.join(", ")),
        };
        Err(self.error(
            key,
            name,
            format!("there is no cache `{}`", one_line(name, 80)),
            hint,
        ))
    }

    /// The line is the last one with the name: the file's own, if it has one.
    fn error(&self, key: &str, name: &str, problem: String, hint: String) -> ContractError {
        let holds = |line: &str| {
            let parts = line.split(|c: char| c.is_whitespace() || "{}[],:\"'".contains(c));
            parts.into_iter().any(|found| found == name)
        };
        let line = self
            .text
            .lines()
            .enumerate()
            .filter(|(_, line)| holds(line))
            .last();
        ContractError {
            file: self.file.to_owned(),
            line: line.map(|(index, _)| index as u64 + 1),
            key: Some(key.to_owned()),
            problem,
            hint: Some(hint),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, expected: &str) {
        let error = contract("flywheel.yml", text).expect_err("is wrong");
        let hint = error.hint().unwrap_or_default();
        assert_eq!(format!("{error}\nhelp: {hint}"), expected);
    }

    #[test]
    fn a_wrong_key_is_named_with_its_line_and_the_nearest_one() {
        check(
            "version: 1\nclasses:\n  nix-builder:\n    lanes:\n      - label: a\n        memroy: 8GiB\n",
            "flywheel.yml:6: `memroy`: there is no such key here\nhelp: Did you mean `memory`?",
        );
        check(
            "clases: {}\n",
            "flywheel.yml:1: `clases`: there is no such key here\nhelp: Did you mean `classes`?",
        );
    }

    #[test]
    fn a_wrong_value_is_named_with_its_line_and_key() {
        check(
            "classes:\n  kernel:\n    memory: 8GB\n",
            "flywheel.yml:3: `memory`: `8GB` is no size; write it as `8GiB` or `512MiB`\nhelp: ",
        );
        check(
            "classes:\n  kernel:\n    provides: [dokcer]\n",
            "flywheel.yml:3: `provides`: `dokcer` is nothing that a lane provides; did you mean `docker`?\nhelp: ",
        );
        check(
            "placement:\n  - what: x\n    where: atic\n",
            "flywheel.yml:3: `where`: there is no cache `atic`\nhelp: Did you mean `attic`?",
        );
        check(
            "classes:\n  general:\n    lanes:\n      - label: self-hosted\n",
            "flywheel.yml:4: `label`: a lane of `general` must have a label of its own, not bare `self-hosted`\n\
             help: Name what the lane is, such as `nix-heavy`.",
        );
        assert_eq!(
            contract("f", "classes: [").expect_err("no YAML").line,
            Some(1)
        );
        assert_eq!(
            contract("f", "classes: {}\nclasses: {}\n")
                .expect_err("twice")
                .line,
            Some(2)
        );
        assert_eq!(
            contract("f", "version: 2\n")
                .expect_err("new")
                .key
                .as_deref(),
            Some("version")
        );
    }

    #[test]
    fn a_file_that_says_nothing_changes_nothing() {
        let built_in = serde_json::to_string(&Contract::built_in()).expect("JSON");
        for text in ["", "# nothing\n", "---\n", "version: 1\n", "classes: {}\n"] {
            let read = contract("flywheel.yml", text).expect("a contract");
            let mut read = serde_json::to_value(&read).expect("JSON");
            read["version"] = 1.into();
            assert_eq!(
                read,
                serde_json::from_str::<serde_json::Value>(&built_in).expect("JSON"),
                "{text}"
            );
        }
    }

    #[test]
    fn null_takes_a_class_away_and_lists_are_taken_whole() {
        let read = contract(
            "f",
            "classes:\n  kernel: ~\n  general: {lanes: [{label: mine}]}\n  new: {}\n",
        )
        .expect("one");
        assert!(read.class("kernel").is_none() && read.class("new").is_some());
        assert_eq!(
            read.class("general").map(|class| class.lanes().len()),
            Some(1)
        );
        assert!(
            read.class("general")
                .is_some_and(|class| class.image.is_none() && class.used_for.is_some())
        );
    }
}
