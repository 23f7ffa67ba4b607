//! Exit codes, and the trait by which an error gives its exit code and a hint.

use std::error::Error;
use std::fmt;

use crate::secret::without_credentials;
use crate::text::one_line;

/// Characters of a problem that are shown.
const PROBLEM_LIMIT: usize = 2000;

/// The exit codes of Flywheel itself. `nix-job` otherwise ends with the command's own code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    Ok,
    /// The task could not be done, or `require-publish` was not met.
    Failed,
    /// Bad input; nothing was touched. `EX_USAGE` of `sysexits.h`.
    Usage,
    /// The host lacks something that Flywheel cannot replace. `EX_UNAVAILABLE`.
    Host,
    /// A bug in Flywheel. `EX_SOFTWARE`.
    Bug,
    /// The exit code of the user's command.
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

/// An error with an exit code and a hint.
///
/// `Display` gives the problem as one lowercase fragment; the hint names the input or setting to change.
pub trait Explain: Error + Send + Sync + 'static {
    /// The exit code with which this error ends the program.
    fn exit(&self) -> Exit {
        Exit::Failed
    }

    /// What to do about the error, as a full sentence without `help:`.
    fn hint(&self) -> Option<String> {
        None
    }
}

/// How a verb fails: any error that can explain itself.
pub type Failure = Box<dyn Explain>;

impl<E: Explain> From<E> for Failure {
    fn from(error: E) -> Self {
        Box::new(error)
    }
}

/// Bad input, found before anything was touched.
#[derive(Debug)]
pub struct UsageError {
    input: String,
    problem: String,
    hint: Option<String>,
}

impl UsageError {
    /// `input` is the name as the user wrote it (`attic-server`), `problem` a fragment such as
    /// "must be an http or https URL, not `foo`". What it quotes may be anything: credentials in a
    /// URL are taken out, and it becomes one line of a bounded length.
    pub fn new(input: impl Into<String>, problem: impl AsRef<str>) -> Self {
        Self {
            input: input.into(),
            problem: one_line(&without_credentials(problem.as_ref()), PROBLEM_LIMIT),
            hint: None,
        }
    }

    /// What is wrong, without the input's name.
    pub fn into_problem(self) -> String {
        self.problem
    }

    /// Adds a hint: a sentence about what to do.
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
