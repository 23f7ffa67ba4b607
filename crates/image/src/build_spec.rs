//! `.build-spec.ncl`, `.json`, `.toml` or `.yml` in a build's context: what its author asks for. It goes before any
//! history and any guess.

use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::document::{DocumentError, Field, Format, Record, Rule, Shape};

/// What the file is called, without its ending.
pub const STEM: &str = ".build-spec";

/// A size by name, or a need, or only a time.
#[derive(Clone, Debug, Default, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct BuildSpec {
    pub runner_type: Option<String>,
    pub cpu: Option<u32>,
    pub memory_gb: Option<f64>,
    pub time_budget_min: Option<u32>,
}

/// What the file may hold.
pub const BUILD_SPEC: Record = Record {
    name: "BuildSpec",
    about: "What a build needs, as its author knows it.",
    fields: &[
        Field {
            name: "runner_type",
            shape: Shape::Name,
            is_required: false,
            about: "The size of the runner, such as cax21. It goes before cpu and memory_gb.",
        },
        Field {
            name: "cpu",
            shape: Shape::Whole(1, 1024),
            is_required: false,
            about: "The number of processors that the build needs. It stands together with memory_gb.",
        },
        Field {
            name: "memory_gb",
            shape: Shape::Positive(65_536),
            is_required: false,
            about: "The memory in GB that the build needs. It stands together with cpu.",
        },
        Field {
            name: "time_budget_min",
            shape: Shape::Whole(1, 1440),
            is_required: false,
            about: "The minutes after which the build is ended.",
        },
    ],
    rules: &[Rule::Together("cpu", "memory_gb")],
};

/// The file of a context, by the names of the files in it.
///
/// # Errors
/// When there are several, since each would be a reason to pass over the others.
pub fn file_of<'a>(
    context: &Path,
    names: impl IntoIterator<Item = &'a str>,
) -> Result<Option<(PathBuf, Format)>, DocumentError> {
    let mut found: Vec<&str> = names
        .into_iter()
        .filter(|name| format_of(name).is_some())
        .collect();
    found.sort_unstable();
    match found.as_slice() {
        [] => Ok(None),
        [name] => Ok(format_of(name).map(|format| (context.join(name), format))),
        several => Err(DocumentError::of_document(
            &several.join(", "),
            "stand beside each other in the context",
        )
        .with_hint("Keep one of them.")),
    }
}

fn format_of(name: &str) -> Option<Format> {
    let ending = name.strip_prefix(STEM)?.strip_prefix('.')?;
    let known = Format::ENDINGS.iter().find(|(known, _)| *known == ending);
    known.map(|(_, format)| *format)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::document::read;

    fn spec(format: Format, text: &str) -> Result<BuildSpec, DocumentError> {
        read(".build-spec", format, text, &BUILD_SPEC)
    }

    #[test]
    fn the_three_native_formats_mean_the_same() {
        let expected = BuildSpec {
            cpu: Some(4),
            memory_gb: Some(6.5),
            time_budget_min: Some(30),
            runner_type: None,
        };
        for (format, text) in [
            (
                Format::Json,
                r#"{"cpu": 4.0, "memory_gb": 6.5, "time_budget_min": 30}"#,
            ),
            (
                Format::Toml,
                "cpu = 4\nmemory_gb = 6.5\ntime_budget_min = 30\n",
            ),
            (
                Format::Yaml,
                "# a need\ncpu: 4\nmemory_gb: 6.5\ntime_budget_min: 30\n",
            ),
        ] {
            assert_eq!(spec(format, text), Ok(expected.clone()), "{format:?}");
        }
    }

    #[test]
    fn what_is_wrong_is_named_by_its_field() {
        for (text, says) in [
            (
                r#"{"runner_typ": "cax21"}"#,
                ".build-spec: `runner_typ` is no field here",
            ),
            (
                r#"{"cpu": 0, "memory_gb": 4}"#,
                ".build-spec: `cpu` must be a whole number from 1 to 1024, not `0`",
            ),
            (r#"{"cpu": 2}"#, ".build-spec: `memory_gb` is missing"),
            (r#"{"memory_gb": 2}"#, ".build-spec: `cpu` is missing"),
            (r"[]", ".build-spec: must have fields, but is a list"),
            (
                r#"{"runner_type": null}"#,
                ".build-spec: `runner_type` must be a name of lower-case letters and digits with single `.`, `_` or `-` in between, at most 63 characters, not `null`",
            ),
        ] {
            let error = spec(Format::Json, text).expect_err(text);
            assert_eq!(error.to_string(), says);
        }
        let error = spec(Format::Json, r#"{"runner_typ": "cax21"}"#).expect_err("it is refused");
        assert_eq!(error.hint.as_deref(), Some("Did you mean `runner_type`?"));
    }

    #[test]
    fn one_file_is_found_and_several_are_refused() {
        let folder = Path::new("ctx");
        let of = |names: &[&str]| file_of(folder, names.iter().copied());
        assert_eq!(
            of(&["Dockerfile", ".build-spec", ".build-spec.txt"]),
            Ok(None)
        );
        for (name, format) in [
            (".build-spec.ncl", Format::Nickel),
            (".build-spec.json", Format::Json),
            (".build-spec.toml", Format::Toml),
            (".build-spec.yml", Format::Yaml),
        ] {
            assert_eq!(of(&["a", name]), Ok(Some((folder.join(name), format))));
        }
        let error = of(&[".build-spec.toml", ".build-spec.json"]).expect_err("it is refused");
        assert_eq!(
            error.to_string(),
            ".build-spec.json, .build-spec.toml: stand beside each other in the context"
        );
    }
}
