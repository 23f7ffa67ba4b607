//! Documents that users write, in JSON, TOML or YAML: what a document may hold is declared once, as a [`Record`]. The
//! check, the published JSON Schema and the Nickel contract all follow from that declaration. Opens no file.

mod contract;
mod json_schema;
mod shape;
mod strict_json;

use std::fmt;
use std::path::Path;

use serde::de::DeserializeOwned;
use serde_json::Value;
use thiserror::Error;

pub use self::contract::{nickel_contract, nickel_definitions};
pub use self::json_schema::json_schema;
pub(crate) use self::shape::is_name;
pub use self::shape::{Field, Record, Rule, Shape};
use self::strict_json::StrictJson;
use flywheel_core::exit::UsageError;
use flywheel_core::text::one_line;

/// The largest document, in bytes. A person writes far less.
pub const SIZE_LIMIT: u64 = 1 << 20;

/// The language that a document is written in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Json,
    Toml,
    Yaml,
    /// Nickel, which only the user's own `nickel` can evaluate.
    Nickel,
}

impl Format {
    /// The endings of file names, in the order in which they are looked for.
    pub const ENDINGS: [(&str, Self); 5] = [
        ("ncl", Self::Nickel),
        ("json", Self::Json),
        ("toml", Self::Toml),
        ("yml", Self::Yaml),
        ("yaml", Self::Yaml),
    ];

    /// The format that the ending of a file's name stands for.
    pub fn of(file: &Path) -> Option<Self> {
        let ending = file.extension()?.to_str()?;
        let known = Self::ENDINGS.iter().find(|(name, _)| *name == ending);
        known.map(|(_, format)| *format)
    }
}

/// What is wrong with a document.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub struct DocumentError {
    /// The document's name.
    pub file: String,
    /// The field that is wrong, such as `cache_policy.disposition`; `None` if the document as a whole is wrong.
    pub field: Option<String>,
    /// What is wrong, as a fragment.
    pub problem: String,
    /// What to do, as a sentence.
    pub hint: Option<String>,
}

impl DocumentError {
    pub(crate) fn of_document(file: &str, problem: impl Into<String>) -> Self {
        Self {
            file: file.to_owned(),
            field: None,
            problem: problem.into(),
            hint: None,
        }
    }

    pub(crate) fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// The same as the error of the input that names the document, or the folder that it lies in.
    pub fn of_input(&self, input: &str) -> UsageError {
        let error = UsageError::new(input, format!("names a document that is wrong: {self}"));
        match &self.hint {
            Some(hint) => error.with_hint(hint),
            None => error,
        }
    }
}

impl fmt::Display for DocumentError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.field {
            Some(field) => write!(f, "{}: `{field}` {}", self.file, self.problem),
            None => write!(f, "{}: {}", self.file, self.problem),
        }
    }
}

/// The value of a document, checked against its declaration.
///
/// # Errors
/// When the text is not in the format, or is not what the record allows: the error names the field.
pub fn read<T: DeserializeOwned>(
    file: &str,
    format: Format,
    text: &str,
    record: &Record,
) -> Result<T, DocumentError> {
    accept(file, &parse(file, format, text)?, record)
}

/// The value of a document that has been parsed already.
///
/// # Errors
/// When the value is not what the record allows: the error names the field.
pub fn accept<T: DeserializeOwned>(
    file: &str,
    value: &Value,
    record: &Record,
) -> Result<T, DocumentError> {
    record.check(value).map_err(|fault| DocumentError {
        file: file.to_owned(),
        field: fault.field,
        problem: fault.problem,
        hint: fault.hint,
    })?;
    // A record that declares something else than its type would end here; a test compares the two.
    T::deserialize(with_whole_numbers(value.clone()))
        .map_err(|error| DocumentError::of_document(file, error.to_string()))
}

/// `4.0` is a whole number to JSON Schema and to Nickel, but not to serde.
fn with_whole_numbers(value: Value) -> Value {
    match value {
        Value::Array(items) => items.into_iter().map(with_whole_numbers).collect(),
        Value::Object(fields) => fields
            .into_iter()
            .map(|(name, value)| (name, with_whole_numbers(value)))
            .collect(),
        Value::Number(number) => match number.as_f64() {
            Some(float) if float.fract() == 0.0 && float.abs() < f64::from(u32::MAX) => {
                Value::from(float as i64)
            }
            _ => Value::Number(number),
        },
        other => other,
    }
}

fn parse(file: &str, format: Format, text: &str) -> Result<Value, DocumentError> {
    let wrong = |language: &str, error: &dyn fmt::Display| {
        let error = error.to_string();
        let first = error.lines().next().unwrap_or_default();
        let problem = format!("is no {language}: {}", one_line(first, 300));
        DocumentError::of_document(file, problem)
    };
    match format {
        Format::Json => serde_json::from_str(text)
            .map(|StrictJson(value)| value)
            .map_err(|error| wrong("JSON", &error)),
        Format::Toml => toml::from_str(text).map_err(|error| wrong("TOML", &error)),
        Format::Yaml => {
            serde_saphyr::from_str(text).map_err(|error| wrong("YAML", &error.without_snippet()))
        }
        Format::Nickel => Err(DocumentError::of_document(
            file,
            "is Nickel, which is evaluated by `nickel` first",
        )),
    }
}

#[cfg(test)]
mod tests;
