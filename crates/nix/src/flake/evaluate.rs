//! The results of an evaluation: the names of a flake's outputs, and the derivation of each. One
//! call of Nix lists the names; the derivations come from a pool of workers (`pool.rs`).

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use thiserror::Error;

pub use crate::flake::pool::{EvalTask, Pool};

use crate::flake::Source;
use crate::flake::error::{error_text, location_in};
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
        let text = error_text(stderr);
        let location = location_in(&text, &source.path);
        Self::Evaluation { text, location }
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

/// The list of names, or that it depends on the commit.
#[derive(Debug, PartialEq, Eq)]
pub enum NameList {
    Found(Vec<OutputName>),
    /// Evaluating the list used something specific to the commit.
    Dependent,
}

/// Lists the outputs of a flake.
///
/// # Errors
/// When the flake does not evaluate so far, or the result is not a list of outputs.
pub async fn names(
    nix: &Nix,
    source: &Source,
    expressions: &Expressions,
    view: &SelfView,
    function: Option<&str>,
    arguments: &[String],
) -> Result<NameList, Error> {
    let mut call = expressions.list_args(view, function);
    call.extend(NO_EVAL_CACHE.map(str::to_owned));
    call.extend(arguments.iter().cloned());
    let call: Vec<&str> = call.iter().map(String::as_str).collect();
    let output = nix.run(&call, NAMES_LIMIT).await?;
    if output.status.success() {
        return read_names(&output.text())
            .map(NameList::Found)
            .map_err(Error::List);
    }
    // The list used a value of the commit, which is not an error of the flake.
    if output.stderr.contains(&expressions.abort_marker()) {
        return Ok(NameList::Dependent);
    }
    let text = error_text(&output.stderr);
    // A killed `nix eval` may print nothing.
    let text = if text.is_empty() {
        format!("`nix eval` ended: {}", output.status)
    } else {
        text
    };
    Err(Error::Names {
        location: location_in(&text, &source.path),
        text,
    })
}

/// Arguments that turn off Nix's evaluation cache, for which concurrent calls would contend.
pub(super) const NO_EVAL_CACHE: [&str; 3] = ["--option", "eval-cache", "false"];

fn read_names(text: &str) -> Result<Vec<OutputName>, String> {
    let value: Value = serde_json::from_str(text).map_err(|error| error.to_string())?;
    let list = value.as_array().ok_or("it is not a list")?;
    let mut labels = BTreeSet::new();
    let mut names = Vec::new();
    for (n, entry) in list.iter().enumerate() {
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
        // Labels name Check Runs and results, so they must be unique.
        if !labels.insert(label.clone()) {
            return Err(format!("two entries have the label `{label}`"));
        }
        names.push(OutputName { attr, label });
    }
    Ok(names)
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
        let names = read_names(r#"[{"attr":"x86_64-linux.\"a.b\"","label":"ab"},{"attr":["c"]}]"#)
            .expect("a list");
        assert_eq!(
            names[0],
            OutputName {
                attr: vec!["x86_64-linux".into(), "a.b".into()],
                label: "ab".into()
            }
        );
        assert_eq!(names[1].label, "c");
        for (text, problem) in [
            ("{}", "not a list"),
            (
                r#"[{"attr":"a","label":"x"},{"attr":"b","label":"x"}]"#,
                "two entries have the label `x`",
            ),
            (r#"[{"attr":"a..b"}]"#, "entry 1 has no valid `attr`"),
            (r#"[{"attr":"a","label":3}]"#, "entry 1 has a `label`"),
        ] {
            let found = read_names(text).expect_err(text);
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
