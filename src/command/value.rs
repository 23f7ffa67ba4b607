//! How the text of an input becomes a value: clap's value parsers and the text of a refusal.
//!
//! White space around a value means nothing, nor does the case of a word. An empty value never comes here:
//! `cli` takes it for one that was not given.

use std::ffi::OsStr;
use std::fmt::{self, Display};
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::str::FromStr;

use clap::builder::{PossibleValue, StringValueParser, TypedValueParser};
use clap::{Arg, Command, ValueEnum};

use crate::exit::{Explain as _, UsageError};
use crate::text::{nearest, one_line};

/// Why a value is refused. `cli` makes a `UsageError` of it, which knows the input's name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Invalid {
    problem: String,
    hint: Option<String>,
}

impl Invalid {
    /// `problem` is a fragment that goes behind "input `x`", such as "must be a size such as `20G`".
    pub fn new(problem: impl Into<String>) -> Self {
        Self {
            problem: problem.into(),
            hint: None,
        }
    }

    /// Adds the sentence on what to do.
    #[must_use]
    pub fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// The same as the error of an input.
    pub fn of_input(&self, input: &str) -> UsageError {
        let error = UsageError::new(input, &self.problem);
        match &self.hint {
            Some(hint) => error.with_hint(hint),
            None => error,
        }
    }
}

impl Display for Invalid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.problem)
    }
}

impl std::error::Error for Invalid {}

impl From<String> for Invalid {
    fn from(problem: String) -> Self {
        Self::new(problem)
    }
}

impl From<UsageError> for Invalid {
    fn from(error: UsageError) -> Self {
        Self {
            hint: error.hint(),
            problem: error.into_problem(),
        }
    }
}

/// A parser of anything that `read` reads.
pub fn value<T, E>(
    read: impl Fn(&str) -> Result<T, E> + Clone + Send + Sync + 'static,
) -> impl TypedValueParser<Value = T>
where
    T: Clone + Send + Sync + 'static,
    E: Into<Invalid> + 'static,
{
    StringValueParser::new().try_map(move |text| read(text.trim()).map_err(Into::<Invalid>::into))
}

/// A parser of any text.
pub fn text() -> impl TypedValueParser<Value = String> {
    StringValueParser::new().map(|text| text.trim().to_owned())
}

/// A parser of a name that messages show: one line, and not a long one.
pub fn name() -> impl TypedValueParser<Value = String> {
    StringValueParser::new().map(|text| one_line(text.trim(), 100))
}

/// A parser of the path of a file or a folder, which need not exist.
pub fn path() -> impl TypedValueParser<Value = PathBuf> {
    StringValueParser::new().map(|text| PathBuf::from(text.trim()))
}

/// A parser of a number within a range.
pub fn number<N>(range: RangeInclusive<N>) -> impl TypedValueParser<Value = N>
where
    N: FromStr + PartialOrd + Display + Clone + Send + Sync + 'static,
{
    value(move |text| number_in(text, &range))
}

/// A number within a range, for a parser that knows other words besides.
pub fn number_in<N>(text: &str, range: &RangeInclusive<N>) -> Result<N, Invalid>
where
    N: FromStr + PartialOrd + Display,
{
    match text.parse() {
        Ok(number) if range.contains(&number) => Ok(number),
        _ => Err(Invalid::new(format!(
            "must be a number from {} to {}, not `{}`",
            range.start(),
            range.end(),
            one_line(text, 40)
        ))),
    }
}

/// A parser of `true` and `false`. GitHub's booleans arrive as `true` or `True`.
pub fn boolean() -> OneOf<bool> {
    one_of(&[("true", true), ("false", false)])
}

/// A parser of the words of an enum.
pub fn word<E: ValueEnum + Send + Sync + 'static>() -> OneOf<E> {
    let variants = E::value_variants().iter();
    let words = variants.filter_map(|one| Some((one.to_possible_value()?, one.clone())));
    OneOf(words.collect())
}

/// A parser of the words of a type that knows nothing of command lines.
pub fn one_of<T: Clone>(words: &[(&'static str, T)]) -> OneOf<T> {
    let words = words.iter();
    OneOf(
        words
            .map(|(word, value)| (PossibleValue::new(*word), value.clone()))
            .collect(),
    )
}

/// A parser of one of a few words.
#[derive(Clone, Debug)]
pub struct OneOf<T>(Vec<(PossibleValue, T)>);

impl<T: Clone> OneOf<T> {
    fn read(&self, text: &str) -> Result<T, Invalid> {
        let words = || self.0.iter().map(|(word, _)| word.get_name());
        if let Some((_, value)) = self
            .0
            .iter()
            .find(|(word, _)| word.get_name().eq_ignore_ascii_case(text))
        {
            return Ok(value.clone());
        }
        let all: Vec<String> = words().map(|word| format!("`{word}`")).collect();
        let error = Invalid::new(format!(
            "must be {}, not `{}`",
            all.join(" or "),
            one_line(text, 80)
        ));
        Err(match nearest(text, words()) {
            Some(word) => error.with_hint(format!("Did you mean `{word}`?")),
            None => error,
        })
    }
}

impl<T: Clone + Send + Sync + 'static> TypedValueParser for OneOf<T> {
    type Value = T;

    fn parse_ref(
        &self,
        command: &Command,
        flag: Option<&Arg>,
        value: &OsStr,
    ) -> Result<T, clap::Error> {
        let words = self.clone();
        let parser = StringValueParser::new().try_map(move |text| words.read(text.trim()));
        parser.parse_ref(command, flag, value)
    }

    fn possible_values(&self) -> Option<Box<dyn Iterator<Item = PossibleValue> + '_>> {
        Some(Box::new(self.0.iter().map(|(word, _)| word.clone())))
    }
}
