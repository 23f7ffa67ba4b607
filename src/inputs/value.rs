//! How the text of an input becomes a value: clap's value parsers and the text of a refusal.
//!
//! White space around a value means nothing, nor does the case of a word. An empty value never comes here:
//! `variables` takes it for one that was not given.

use std::ffi::OsStr;
use std::fmt::{self, Display};
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::str::FromStr;

use clap::builder::{OsStringValueParser, PossibleValue, StringValueParser, TypedValueParser};
use clap::{Arg, Command, ValueEnum};

use flywheel_core::exit::UsageError;
use flywheel_core::text::{nearest, one_line};

/// Why a value is refused. `parse` makes a `UsageError` of it, which knows the input's name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Invalid {
    problem: String,
    hint: Option<String>,
}

impl Invalid {
    /// `problem` is a fragment that goes behind "input `x`", such as "must be a size such as `20G`".
    pub(crate) fn new(problem: impl Into<String>) -> Self {
        Self {
            problem: problem.into(),
            hint: None,
        }
    }

    /// Adds the sentence on what to do.
    #[must_use]
    pub(crate) fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// The same as the error of an input.
    pub(crate) fn of_input(&self, input: &str) -> UsageError {
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
        // A rule that knows its input's name has put it in; `parse` does it again, for all alike.
        let (problem, hint) = error.into_parts();
        Self { problem, hint }
    }
}

/// A parser of anything that `read` reads.
pub(crate) fn value<T, E>(
    read: impl Fn(&str) -> Result<T, E> + Clone + Send + Sync + 'static,
) -> impl TypedValueParser<Value = T>
where
    T: Clone + Send + Sync + 'static,
    E: Into<Invalid> + 'static,
{
    StringValueParser::new().try_map(move |text| read(text.trim()).map_err(Into::<Invalid>::into))
}

/// A parser of any text.
pub(crate) fn text() -> impl TypedValueParser<Value = String> {
    StringValueParser::new().map(|text| text.trim().to_owned())
}

/// A parser of a name that messages show: one line, and not a long one.
pub(crate) fn name() -> impl TypedValueParser<Value = String> {
    StringValueParser::new().map(|text| one_line(text.trim(), 100))
}

/// A parser of the path of a file or a folder, which need not exist.
pub(crate) fn path() -> impl TypedValueParser<Value = PathBuf> {
    OsStringValueParser::new().map(|text| match text.to_str() {
        Some(text) => PathBuf::from(text.trim()),
        // A file's name need not be UTF-8.
        None => PathBuf::from(text),
    })
}

/// A parser of a number within a range.
pub(crate) fn number<N>(range: RangeInclusive<N>) -> impl TypedValueParser<Value = N>
where
    N: FromStr + PartialOrd + Display + Clone + Send + Sync + 'static,
{
    value(move |text| number_in(text, &range))
}

/// A number within a range, for a parser that takes other values besides.
pub(crate) fn number_in<N>(text: &str, range: &RangeInclusive<N>) -> Result<N, Invalid>
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
pub(crate) fn boolean() -> OneOf<bool> {
    one_of(&[("true", true), ("false", false)])
}

/// A parser of the variants of an enum.
pub(crate) fn variant<E: ValueEnum + Send + Sync + 'static>() -> OneOf<E> {
    let variants = E::value_variants().iter();
    let values = variants.filter_map(|one| Some((one.to_possible_value()?, one.clone())));
    OneOf(values.collect())
}

/// A parser for a type without `ValueEnum`: each value by its name.
pub(crate) fn one_of<T: Clone>(values: &[(&'static str, T)]) -> OneOf<T> {
    let values = values.iter();
    OneOf(
        values
            .map(|(name, value)| (PossibleValue::new(*name), value.clone()))
            .collect(),
    )
}

/// A parser of one of a few values, by their names.
#[derive(Clone, Debug)]
pub(crate) struct OneOf<T>(Vec<(PossibleValue, T)>);

impl<T: Clone> OneOf<T> {
    fn read(&self, text: &str) -> Result<T, Invalid> {
        let names = || self.0.iter().map(|(name, _)| name.get_name());
        if let Some((_, value)) = self
            .0
            .iter()
            .find(|(name, _)| name.get_name().eq_ignore_ascii_case(text))
        {
            return Ok(value.clone());
        }
        let all: Vec<String> = names().map(|name| format!("`{name}`")).collect();
        let all = match all.split_last() {
            Some((last, [])) => last.clone(),
            Some((last, others)) => format!("{} or {last}", others.join(", ")),
            None => String::new(),
        };
        let error = Invalid::new(format!("must be {all}, not `{}`", one_line(text, 80)));
        Err(match nearest(text, names()) {
            Some(name) => error.with_hint(format!("Did you mean `{name}`?")),
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
        // clap's own parser of names knows no white space around them, and its error no hint of ours.
        let values = self.clone();
        let parser = StringValueParser::new().try_map(move |text| values.read(text.trim()));
        parser.parse_ref(command, flag, value)
    }

    fn possible_values(&self) -> Option<Box<dyn Iterator<Item = PossibleValue> + '_>> {
        Some(Box::new(self.0.iter().map(|(name, _)| name.clone())))
    }
}

/// A parser of one of a few values that keeps a refusal as its value: for a flag that another argument overrules, so
/// that a variable without a use does not end the run.
#[derive(Clone, Debug)]
pub(crate) struct Deferred<T>(pub(crate) OneOf<T>);

impl<T: Clone + Send + Sync + 'static> TypedValueParser for Deferred<T> {
    type Value = Result<T, Invalid>;

    fn parse_ref(
        &self,
        command: &Command,
        flag: Option<&Arg>,
        value: &OsStr,
    ) -> Result<Self::Value, clap::Error> {
        let values = self.0.clone();
        let parser = StringValueParser::new().map(move |text| values.read(text.trim()));
        parser.parse_ref(command, flag, value)
    }

    fn possible_values(&self) -> Option<Box<dyn Iterator<Item = PossibleValue> + '_>> {
        self.0.possible_values()
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    #[command(no_binary_name = true)]
    struct Inputs {
        #[arg(long, value_parser = number(1..=8_u32))]
        level: Option<u32>,
        #[arg(long, value_parser = name())]
        label: Option<String>,
        #[arg(long, value_parser = one_of(&[("on", 1_u32), ("off", 2), ("verify", 3)]))]
        how: Option<u32>,
        #[arg(long, value_parser = path())]
        dir: Option<PathBuf>,
    }

    fn read(flag: &str) -> Result<Inputs, Invalid> {
        Inputs::try_parse_from([flag]).map_err(|error| {
            let source = std::error::Error::source(&error);
            let invalid = source.and_then(|source| source.downcast_ref::<Invalid>());
            invalid.expect("a value is wrong").clone()
        })
    }

    #[test]
    fn white_space_and_case_mean_nothing() {
        assert_eq!(read("--level= 8 ").expect("a number").level, Some(8));
        assert_eq!(read("--how=\tVerify\n").expect("a name").how, Some(3));
        let label = read("--label= a\nb ").expect("any text").label;
        assert_eq!(label.as_deref(), Some("a b"));
    }

    #[test]
    fn the_name_of_a_folder_need_not_be_text() {
        use std::os::unix::ffi::OsStringExt as _;
        let name = std::ffi::OsString::from_vec(vec![b'd', 0xff]);
        let mut flag = std::ffi::OsString::from("--dir=");
        flag.push(&name);
        let inputs = Inputs::try_parse_from([flag]).expect("any name");
        assert_eq!(inputs.dir, Some(PathBuf::from(name)));
    }

    #[test]
    fn what_is_not_allowed_gets_what_is() {
        let range = Invalid::new("must be a number from 1 to 8, not `9`");
        assert_eq!(read("--level=9").expect_err("too high"), range);
        let values = Invalid::new("must be `on`, `off` or `verify`, not `verfy`")
            .with_hint("Did you mean `verify`?");
        assert_eq!(read("--how=verfy").expect_err("a slip"), values);
    }
}
