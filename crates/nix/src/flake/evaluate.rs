//! The results of an evaluation: the names of a flake's outputs, and the derivation of each. One
//! call of Nix lists the names; the derivations come from a pool of workers (`pool.rs`).

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use thiserror::Error;

pub use crate::flake::pool::{EvalTask, Pool};

use crate::flake::Source;
use crate::flake::error::{location_in, parse};
use crate::flake::expression::{
    AttributePath, Expressions, SelfView, TREE_ATTRIBUTES, attribute_path,
};
use crate::store_path::StorePath;
use crate::tool::{self, Nix};
use flywheel_core::exit::{Exit, Explain};
use flywheel_core::location::SourceLocation;
use flywheel_core::text::one_line;

/// Listing names may first import a large library.
const NAMES_LIMIT: Duration = Duration::from_secs(1800);
/// Maximum length of a label in characters; it becomes the name of a Check Run.
const LABEL_LIMIT: usize = 200;
/// Reading the metadata of a source that has been fetched is quick.
const INFORMATION_LIMIT: Duration = Duration::from_secs(120);

/// An output, by its path below the selected attribute and by its label for people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OutputName {
    /// Its path from the selected attribute.
    pub attr: AttributePath,
    /// Unique among the outputs of a run.
    pub label: String,
}

/// The derivation of an output.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Derivation {
    /// The full store path of the derivation.
    pub drv: String,
    /// The store paths of its outputs, by name. For a content-addressed derivation these are
    /// placeholders.
    pub outs: BTreeMap<String, String>,
    /// The system it is built on.
    pub system: Option<String>,
}

impl Derivation {
    /// The store paths of its outputs, if all are known before the build.
    pub fn paths(&self) -> Option<Vec<StorePath>> {
        self.outs.values().map(|path| path.parse().ok()).collect()
    }
}

/// Why an output has no derivation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EvalFailure {
    /// Nix could not evaluate it.
    Evaluation {
        /// Nix's message.
        text: String,
        /// The location, if it mentions a line of the flake.
        location: Option<SourceLocation>,
    },
    /// It was killed for using too much memory, even as the only worker.
    OutOfMemory {
        /// The memory it used when it was killed, in bytes.
        needed: u64,
        /// The memory it could use, in bytes.
        limit: u64,
    },
}

impl EvalFailure {
    /// Parses Nix's standard error.
    pub(super) fn from_stderr(stderr: &str, source: &Source) -> Self {
        let error = parse(stderr);
        Self::Evaluation {
            text: error.to_string(),
            location: location_in(&error, &source.path),
        }
    }
}

/// An event in the evaluation of an output, which its id identifies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EvalEvent {
    /// Its evaluation has begun, perhaps not for the first time.
    Begun(usize),
    /// Its derivation is known.
    Known {
        id: usize,
        facts: Derivation,
        /// Whether its evaluation used nothing specific to the commit, so that it may be
        /// remembered.
        independent: bool,
    },
    /// Its evaluation used something specific to the commit.
    Dependent(usize),
    /// Its evaluation failed.
    Failed(usize, EvalFailure),
}

#[derive(Debug, Error)]
pub enum Error {
    /// Nix did not run.
    #[error(transparent)]
    Nix(#[from] tool::Error),
    /// The flake or the attribute does not evaluate.
    #[error("the outputs cannot be listed: {}", one_line(.text, 600))]
    Names {
        /// Nix's message.
        text: String,
        /// The location, if it mentions a line of the flake.
        location: Option<SourceLocation>,
    },
    /// The result of the function is not a list of outputs.
    #[error("the list of outputs is invalid: {0}")]
    List(String),
}

impl Explain for Error {
    fn exit(&self) -> Exit {
        match self {
            Self::Nix(error) => error.exit(),
            Self::Names { .. } | Self::List(_) => Exit::Command(1),
        }
    }

    fn hint(&self) -> Option<String> {
        match self {
            Self::Nix(error) => error.hint(),
            Self::Names { .. } => Some("Look at `nix flake show`, and at the inputs `flake` and `flake-attr`.".into()),
            Self::List(_) => Some(
                "`flake-apply` must be a function from the selected attribute to a list of `{ attr, label }`: `attr` is a path below the attribute, as text or as a list of names, and `label` is a unique text."
                    .into(),
            ),
        }
    }
}

/// The outputs of a flake by their names.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Names {
    pub outputs: Vec<OutputName>,
    /// The systems that were not asked for. Nothing of their outputs was evaluated.
    pub not_looked_at: Vec<String>,
    /// Whether the outputs of a system could not be listed. One output with the system's name stands for them then; its
    /// own evaluation fails, with the reason.
    #[serde(skip)]
    pub is_partial: bool,
}

/// The list of names, or that it depends on the commit.
#[derive(Debug, PartialEq, Eq)]
pub enum NameList {
    Found(Names),
    /// Evaluating the list used something specific to the commit.
    Dependent,
}

/// Lists the outputs of a flake.
pub struct Listing<'a> {
    pub nix: &'a Nix,
    pub source: &'a Source,
    pub expressions: &'a Expressions,
    pub view: &'a SelfView,
    /// The user's function, in place of our own.
    pub function: Option<&'a str>,
    /// The systems whose outputs our own function lists; `None` for all.
    pub systems: Option<&'a [String]>,
    /// Further arguments of Nix.
    pub arguments: &'a [String],
}

impl Listing<'_> {
    /// Lists the outputs. Where those of one system of several cannot be listed, it hides no other.
    ///
    /// # Errors
    /// When the flake does not evaluate so far, or the result is not a list of outputs.
    pub async fn names(&self) -> Result<NameList, Error> {
        match self.names_of(self.systems).await {
            Err(error @ Error::Names { .. }) if self.function.is_none() => {
                self.names_by_system(error).await
            }
            listed => listed,
        }
    }

    /// Lists the outputs of each system by itself. `error`: why that failed for all at once.
    async fn names_by_system(&self, error: Error) -> Result<NameList, Error> {
        // While no system is asked for, only the names of the systems are evaluated.
        let Ok(NameList::Found(all)) = self.names_of(Some(&[])).await else {
            return Err(error);
        };
        let is_asked_for =
            |system: &String| self.systems.is_none_or(|systems| systems.contains(system));
        let (asked, not_looked_at): (Vec<String>, Vec<String>) =
            all.not_looked_at.into_iter().partition(is_asked_for);
        if asked.len() < 2 {
            return Err(error);
        }
        let mut names = Names {
            not_looked_at,
            ..Names::default()
        };
        for system in asked {
            match self.names_of(Some(std::slice::from_ref(&system))).await {
                Ok(NameList::Found(found)) => names.outputs.extend(found.outputs),
                Ok(NameList::Dependent) => return Ok(NameList::Dependent),
                Err(Error::Names { .. }) => {
                    names.is_partial = true;
                    names.outputs.push(OutputName {
                        attr: vec![system.clone()],
                        label: system,
                    });
                }
                Err(error) => return Err(error),
            }
        }
        Ok(NameList::Found(names))
    }

    async fn names_of(&self, systems: Option<&[String]>) -> Result<NameList, Error> {
        let mut call = self
            .expressions
            .list_args(self.view, self.function, systems);
        call.extend(NO_EVAL_CACHE.map(str::to_owned));
        call.extend(self.arguments.iter().cloned());
        let call: Vec<&str> = call.iter().map(String::as_str).collect();
        let output = self.nix.run(&call, NAMES_LIMIT).await?;
        if output.status.success() {
            return read_names(&output.text(), self.function.is_none())
                .map(NameList::Found)
                .map_err(Error::List);
        }
        // The list used a value of the commit, which is not an error of the flake.
        if output.stderr.contains(&self.expressions.abort_marker()) {
            return Ok(NameList::Dependent);
        }
        // A killed `nix eval` may print nothing.
        let stderr = if output.stderr.trim().is_empty() {
            format!("`nix eval` ended: {}", output.status)
        } else {
            output.stderr
        };
        let error = parse(&stderr);
        Err(Error::Names {
            location: location_in(&error, &self.source.path),
            text: error.to_string(),
        })
    }
}

/// Arguments that turn off Nix's evaluation cache, for which concurrent calls would contend.
pub(super) const NO_EVAL_CACHE: [&str; 3] = ["--option", "eval-cache", "false"];

/// `is_own`: whether our own function made the list, and may name systems that it did not look at.
fn read_names(text: &str, is_own: bool) -> Result<Names, String> {
    let value: Value = serde_json::from_str(text).map_err(|error| error.to_string())?;
    let list = value.as_array().ok_or("it is not a list")?;
    let mut labels = BTreeSet::new();
    let mut names = Names::default();
    for (n, entry) in list.iter().enumerate() {
        if let (true, Some(system)) = (is_own, entry["notLookedAt"].as_str()) {
            names.not_looked_at.push(system.to_owned());
            continue;
        }
        // A user's function may return a path as text or as a list of names.
        let attr = match &entry["attr"] {
            Value::String(text) => attribute_path(text),
            Value::Array(parts) => parts
                .iter()
                .map(|part| part.as_str().map(str::to_owned))
                .collect(),
            _ => None,
        };
        let attr = attr.ok_or_else(|| format!("entry {} has no valid `attr`", n + 1))?;
        // A label ends up in Check Runs and logs, so it has to be one line.
        let label = match &entry["label"] {
            Value::String(label) if !label.trim().is_empty() => one_line(label, LABEL_LIMIT),
            Value::Null => one_line(&attr.join("."), LABEL_LIMIT),
            _ => return Err(format!("entry {} has a `label` that is not text", n + 1)),
        };
        // Labels name Check Runs and results, so they must be unique. Those of our own list are names on one line, and
        // two names may be the same line.
        let label = if is_own {
            unique(&label, &labels)
        } else {
            label
        };
        if !labels.insert(label.clone()) {
            return Err(format!("two entries have the label `{label}`"));
        }
        names.outputs.push(OutputName { attr, label });
    }
    Ok(names)
}

/// The label with a number behind it, if it is taken.
fn unique(label: &str, taken: &BTreeSet<String>) -> String {
    let mut free = label.to_owned();
    let mut number = 1;
    while taken.contains(&free) {
        number += 1;
        free = format!("{label} ({number})");
    }
    free
}

/// The two ways in which a flake may see itself when its evaluation may be remembered.
#[derive(Clone, Debug)]
pub struct SelfViews {
    /// The attributes with their real values.
    pub real: SelfView,
    /// The same attributes, each of which aborts the evaluation when used.
    pub abort_on_use: SelfView,
}

/// Reads the source information that Nix gives to the flake. Returns `None` if it no longer matches
/// `source` or cannot be read; the evaluation is then not remembered.
pub async fn views(nix: &Nix, source: &Source, expressions: &Expressions) -> Option<SelfViews> {
    let args = expressions.source_info_args();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let printed = nix.run_checked(&args, INFORMATION_LIMIT).await.ok()?;
    let mut values: BTreeMap<String, Value> = serde_json::from_slice(&printed.stdout).ok()?;
    // The working tree has changed since `source` was resolved.
    if values.get("narHash").and_then(Value::as_str) != Some(&source.nar_hash) {
        return None;
    }
    // These stay usable: they are the same for every commit with this tree.
    values.retain(|name, _| !TREE_ATTRIBUTES.contains(&name.as_str()));
    let abort_on_use = SelfView::AbortOnUse(values.keys().cloned().collect());
    Some(SelfViews {
        real: SelfView::Real(values),
        abort_on_use,
    })
}

/// Whether an evaluation with these arguments may be remembered: none of them changes the inputs.
pub fn allows_memory(arguments: &[String]) -> bool {
    let mut args = arguments.iter();
    while let Some(arg) = args.next() {
        match arg.as_str() {
            // Takes a name and a value.
            "--option" => {
                let name = args.next().map_or("", String::as_str);
                args.next();
                // These change what an evaluation can see or where its results go.
                if matches!(name, "pure-eval" | "restrict-eval" | "eval-store") {
                    return false;
                }
            }
            "--show-trace"
            | "-L"
            | "--print-build-logs"
            | "-v"
            | "--verbose"
            | "--offline"
            | "--accept-flake-config" => (),
            _ => return false,
        }
    }
    true
}

/// Returns the lines of the settings that can change the result of an evaluation, for the key of
/// the evaluation memory.
pub fn evaluation_settings(config: &str) -> String {
    // Settings such as `max-jobs` change how something is built, not what.
    let matters = |line: &&str| {
        [
            "allow",
            "restrict-eval",
            "system",
            "eval-system",
            "nix-path",
            "store",
        ]
        .iter()
        .any(|name| line.trim_start().starts_with(name))
    };
    config
        .lines()
        .filter(matters)
        .collect::<Vec<_>>()
        .join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_read_and_wrong_ones_named() {
        let text =
            r#"[{"attr":"x86_64-linux.\"a.b\"","label":"ab"},{"notLookedAt":"x"},{"attr":["c"]}]"#;
        let listed = read_names(text, true).expect("a list");
        assert_eq!(listed.not_looked_at, ["x"]);
        let names = listed.outputs;
        assert_eq!(
            names[0],
            OutputName {
                attr: vec!["x86_64-linux".into(), "a.b".into()],
                label: "ab".into()
            }
        );
        assert_eq!(names[1].label, "c");
        let text = r#"[{"attr":["a"],"label":"x."},{"attr":["b"],"label":"x. "},{"attr":["c"],"label":"x.\n"}]"#;
        let listed = read_names(text, true).expect("a list").outputs;
        let labels: Vec<&str> = listed.iter().map(|name| name.label.as_str()).collect();
        assert_eq!(labels, ["x.", "x. (2)", "x. (3)"]);
        for (text, problem) in [
            ("{}", "not a list"),
            (
                r#"[{"attr":"a","label":"x"},{"attr":"b","label":"x"}]"#,
                "two entries have the label `x`",
            ),
            (r#"[{"attr":"a..b"}]"#, "entry 1 has no valid `attr`"),
            (r#"[{"attr":"a","label":3}]"#, "entry 1 has a `label`"),
            (r#"[{"notLookedAt":"x"}]"#, "entry 1 has no valid `attr`"),
        ] {
            let found = read_names(text, false).expect_err(text);
            assert!(found.contains(problem), "{found}");
        }
    }

    #[test]
    fn arguments_that_change_the_inputs_are_not_remembered() {
        let may = |text: &str| {
            allows_memory(
                &text
                    .split_whitespace()
                    .map(str::to_owned)
                    .collect::<Vec<_>>(),
            )
        };
        assert!(may("") && may("--option cores 3 --show-trace"));
        for no in [
            "--impure",
            "--override-input a b",
            "--option pure-eval false",
            "--update-input x",
            "--what",
        ] {
            assert!(!may(no), "{no}");
        }
    }
}
