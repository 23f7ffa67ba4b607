//! Exit codes, and how an error explains itself to a person. Owns no error of its own.

use std::error::Error;
use std::fmt;

/// The exit codes that Flywheel itself gives. `nix-job` otherwise ends with the command's own code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// Everything that was asked for was done.
    Ok,
    /// What was asked for could not be done (or `require-publish` was not met).
    Failed,
    /// Bad input: nothing was touched. `EX_USAGE` of `sysexits.h`.
    Usage,
    /// The host lacks something that Flywheel cannot make up for. `EX_UNAVAILABLE`.
    Host,
    /// A fault of Flywheel's own. `EX_SOFTWARE`.
    Bug,
    /// The user's command ended with this code.
    Command(u8),
}

impl Exit {
    /// Every exit code of Flywheel's own, with its meaning.
    pub const OWN: [(Self, &str); 6] = [
        (Self::Ok, "Everything was done that the call was for."),
        (
            Self::Failed,
            "It could not be done; or `require-publish` or another required condition was not met.",
        ),
        (
            Self::Usage,
            "An input is wrong. Nothing has been touched, and the message names the input.",
        ),
        (
            Self::Host,
            "The host lacks something that Flywheel cannot make up for.",
        ),
        (Self::Bug, "A fault of Flywheel's own: please report it."),
        (Self::Command(130), "A signal stopped the job."),
    ];

    /// The process exit status, 0 to 255.
    pub fn code(self) -> u8 {
        match self {
            Self::Ok => 0,
            Self::Failed => 1,
            Self::Usage => 64,
            Self::Host => 69,
            Self::Bug => 70,
            Self::Command(code) => code,
        }
    }
}

/// An error that knows its exit code and what its reader can do about it.
///
/// `Display` says what is wrong in one lowercase fragment; the hint names the input or setting to change.
pub trait Explain: Error + Send + Sync + 'static {
    /// The exit code that this error ends the program with.
    fn exit(&self) -> Exit {
        Exit::Failed
    }

    /// What to do about it, as a full sentence without `help:`.
    fn hint(&self) -> Option<String> {
        None
    }
}

/// Bad input, found before anything was touched: names the input, what was expected, what to do.
#[derive(Debug)]
pub struct UsageError {
    input: String,
    problem: String,
    hint: Option<String>,
}

impl UsageError {
    /// `input` is the name as the user wrote it (`attic-server`), `problem` a fragment such as
    /// "must be an http or https URL, not `foo`".
    pub fn new(input: impl Into<String>, problem: impl Into<String>) -> Self {
        Self {
            input: input.into(),
            problem: problem.into(),
            hint: None,
        }
    }

    /// What is wrong, without the input's name.
    pub fn into_problem(self) -> String {
        self.problem
    }

    /// Adds the sentence that says what to do.
    #[must_use]
    pub fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

impl fmt::Display for UsageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "input `{}` {}", self.input, self.problem)
    }
}

impl Error for UsageError {}

impl Explain for UsageError {
    fn exit(&self) -> Exit {
        Exit::Usage
    }

    fn hint(&self) -> Option<String> {
        self.hint.clone()
    }
}
