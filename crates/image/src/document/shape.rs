//! What a document may hold, and the check of a value against it.

use serde_json::{Map, Value};

use flywheel_core::text::{nearest, one_line};

/// The longest text that a field may hold, in characters.
pub(super) const TEXT_LIMIT: usize = 500;
/// The longest name, in characters: what registries, brokers and file systems all take as a part of theirs.
pub(super) const NAME_LIMIT: usize = 63;
/// The most items of a list.
pub(super) const LIST_LIMIT: usize = 100;
/// What a name looks like, as a regular expression. It can be a part of a repository's name at a registry and of a
/// file's name, and is matched by hand in [`is_name`].
pub(super) const NAME_PATTERN: &str = "^[a-z0-9]+([._-][a-z0-9]+)*$";

/// An object with fields. Fields that are not declared are refused.
#[derive(Debug)]
pub struct Record {
    /// The name of its contract, such as `BuildSpec`.
    pub name: &'static str,
    /// What it is, as a sentence.
    pub about: &'static str,
    pub fields: &'static [Field],
    /// What holds between its fields.
    pub rules: &'static [Rule],
}

/// What holds between fields of one record.
#[derive(Debug)]
pub enum Rule {
    /// Both are there, or neither.
    Together(&'static str, &'static str),
    /// A field is there if another one has one of these words.
    Needed {
        field: &'static str,
        by: &'static str,
        words: &'static [&'static str],
    },
}

/// A field of a record.
#[derive(Debug)]
pub struct Field {
    pub name: &'static str,
    pub shape: Shape,
    pub is_required: bool,
    /// What it means, as a sentence.
    pub about: &'static str,
}

/// What the value of a field may be.
#[derive(Debug)]
pub enum Shape {
    /// Any text of one line that is not empty.
    Text,
    /// A name of lower-case letters and digits, with single `.`, `_` or `-` in between.
    Name,
    /// One of a few words.
    Choice(&'static [&'static str]),
    /// A whole number within bounds.
    Whole(u32, u32),
    /// A number above zero, up to a bound.
    Positive(u32),
    /// `true` or `false`.
    Flag,
    Record(&'static Record),
    /// A list of such values.
    List(&'static Shape),
}

/// Why a value does not fit.
#[derive(Debug)]
pub(super) struct Fault {
    /// The path of the field, with dots and, in lists, positions; `None` for the whole value.
    pub(super) field: Option<String>,
    pub(super) problem: String,
    pub(super) hint: Option<String>,
}

impl Record {
    /// Checks a value and everything in it.
    pub(super) fn check(&self, value: &Value) -> Result<(), Fault> {
        self.check_at("", value)
    }

    fn check_at(&self, at: &str, value: &Value) -> Result<(), Fault> {
        let Some(object) = value.as_object() else {
            let found = shown(value);
            return Err(fault(at, format!("must have fields, but is {found}")));
        };
        // A misspelt field comes before a missing one, since it is often the same.
        self.check_names(at, object)?;
        for field in self.fields {
            let at = join(at, field.name);
            match object.get(field.name) {
                None if field.is_required => {
                    let mut missing = fault(&at, "is missing");
                    missing.hint = Some(field.about.to_owned());
                    return Err(missing);
                }
                None => {}
                Some(value) => field.shape.check(&at, value)?,
            }
        }
        let mut rules = self.rules.iter();
        rules.try_for_each(|rule| rule.check(at, object))
    }

    fn check_names(&self, at: &str, object: &Map<String, Value>) -> Result<(), Fault> {
        let known = || self.fields.iter().map(|field| field.name);
        let Some(strange) = object.keys().find(|key| known().all(|name| name != *key)) else {
            return Ok(());
        };
        let mut fault = fault(&join(at, strange), "is no field here");
        fault.hint = Some(match nearest(strange, known()) {
            Some(name) => format!("Did you mean `{name}`?"),
            None => format!("The fields here are {}.", quoted(known())),
        });
        Err(fault)
    }
}

impl Rule {
    fn check(&self, at: &str, object: &Map<String, Value>) -> Result<(), Fault> {
        let missing = |name: &str, why: String| {
            let mut fault = fault(&join(at, name), "is missing");
            fault.hint = Some(why);
            Err(fault)
        };
        match self {
            Self::Together(one, other) => {
                for (there, missed) in [(one, other), (other, one)] {
                    if object.contains_key(*there) && !object.contains_key(*missed) {
                        return missing(missed, format!("It stands together with `{there}`."));
                    }
                }
                Ok(())
            }
            Self::Needed { field, by, words } => {
                let word = object.get(*by).and_then(Value::as_str);
                match word.filter(|word| words.contains(word)) {
                    Some(word) if !object.contains_key(*field) => {
                        missing(field, format!("`{by}` is `{word}`, which needs it."))
                    }
                    _ => Ok(()),
                }
            }
        }
    }
}

impl Shape {
    fn check(&self, at: &str, value: &Value) -> Result<(), Fault> {
        let expect = |fits: bool, expected: String| {
            if fits {
                return Ok(());
            }
            Err(fault(
                at,
                format!("must be {expected}, not {}", shown(value)),
            ))
        };
        let text = value.as_str();
        match self {
            Self::Text => {
                let expected = format!("a line of text of at most {TEXT_LIMIT} characters");
                expect(text.is_some_and(is_line), expected)
            }
            Self::Name => expect(
                text.is_some_and(is_name),
                format!(
                    "a name of lower-case letters and digits with single `.`, `_` or `-` in between, at most {NAME_LIMIT} characters"
                ),
            ),
            Self::Choice(words) => {
                let fits = text.is_some_and(|text| words.contains(&text));
                let checked = expect(fits, format!("one of {}", quoted(words.iter().copied())));
                checked.map_err(|mut fault| {
                    let near = text.and_then(|text| nearest(text, words.iter().copied()));
                    fault.hint = near.map(|word| format!("Did you mean `{word}`?"));
                    fault
                })
            }
            Self::Whole(least, most) => {
                let range = f64::from(*least)..=f64::from(*most);
                let number = value.as_f64().filter(|number| number.fract() == 0.0);
                let fits = number.is_some_and(|number| range.contains(&number));
                expect(fits, format!("a whole number from {least} to {most}"))
            }
            Self::Positive(most) => {
                let fits = value.as_f64();
                let fits = fits.is_some_and(|number| number > 0.0 && number <= f64::from(*most));
                expect(fits, format!("a number above 0 and up to {most}"))
            }
            Self::Flag => expect(value.is_boolean(), "`true` or `false`".into()),
            Self::Record(record) => record.check_at(at, value),
            Self::List(shape) => {
                let items = value.as_array().filter(|items| items.len() <= LIST_LIMIT);
                expect(
                    items.is_some(),
                    format!("a list of at most {LIST_LIMIT} items"),
                )?;
                let mut items = items.into_iter().flatten().enumerate();
                items.try_for_each(|(index, item)| shape.check(&format!("{at}[{index}]"), item))
            }
        }
    }
}

/// Whether a text is one line, not empty, and of a sane length.
fn is_line(text: &str) -> bool {
    !text.trim().is_empty()
        && text.chars().count() <= TEXT_LIMIT
        && !text.chars().any(char::is_control)
}

/// Whether a text matches [`NAME_PATTERN`] and is not too long.
pub(crate) fn is_name(text: &str) -> bool {
    let is_word = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    let mut words = text.split(['.', '_', '-']);
    text.len() <= NAME_LIMIT && words.all(|word| !word.is_empty() && word.chars().all(is_word))
}

fn fault(at: &str, problem: impl Into<String>) -> Fault {
    Fault {
        field: (!at.is_empty()).then(|| one_line(at, 200)),
        problem: problem.into(),
        hint: None,
    }
}

fn join(at: &str, name: &str) -> String {
    if at.is_empty() {
        name.to_owned()
    } else {
        format!("{at}.{name}")
    }
}

/// A value as messages show it. Of a text that is long only the beginning.
fn shown(value: &Value) -> String {
    match value {
        Value::Array(_) => "a list".into(),
        Value::Object(_) => "an object".into(),
        other => format!("`{}`", one_line(&other.to_string(), 80)),
    }
}

pub(super) fn quoted<'a>(words: impl Iterator<Item = &'a str>) -> String {
    let words: Vec<String> = words.map(|word| format!("`{word}`")).collect();
    words.join(", ")
}
