//! What a run of `flake-checks` found out about each output, as plain data, and the modules that report it. The one
//! place of states and verdicts; never decides what failed.

pub mod board;
pub mod files;
pub mod options;
mod reachability;
pub mod runs;
pub mod summary;
pub mod text;

use std::time::Duration;

use serde::Serialize;

pub use crate::check_run::Conclusion;

use flywheel_core::location::SourceLocation;

/// An output that gets a verdict of its own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Output {
    /// What people call it, `x86_64-linux.hello`; unique in a run.
    pub label: String,
    /// Its whole attribute path, `checks.x86_64-linux.hello`.
    pub attribute: String,
    /// The system it is for, where that is known.
    pub system: Option<String>,
}

/// The state of an output, which only ever advances.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OutputState {
    /// Known by name.
    Queued,
    /// It is being evaluated to a derivation.
    Evaluating,
    /// It is being built.
    Building,
    Finished(Box<Verdict>),
}

/// Why an output ended as it did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Cause {
    /// It was built.
    Built,
    /// It evaluates, and was not to be built.
    Evaluated,
    /// A cache had all of it that this store lacked, with a valid signature of a key that the job trusts.
    AlreadyCached,
    /// A cache had all of it that this store lacked, and the job's settings take it without a signature.
    AlreadyCachedUnsigned,
    /// This store had it. Only the publication finds out whether the cache has it as well.
    AlreadyInStore,
    /// Nix could not evaluate it.
    Evaluation {
        /// Nix's own message.
        text: String,
        /// Where, when the error names a file of the flake.
        // Readers of the JSON file know the key as `place`.
        #[serde(rename = "place")]
        location: Option<SourceLocation>,
    },
    /// The evaluation was killed for its memory, also when it ran alone.
    OutOfMemory {
        /// The memory that it had when it was killed.
        needed_bytes: u64,
        /// The memory that it could have.
        limit_bytes: u64,
    },
    /// Its own build failed.
    Build,
    /// Its own build was killed at Nix's setting `timeout` or `max-silent-time`.
    TimedOut {
        /// The limit.
        seconds: u64,
        /// Whether it had printed nothing for so long, instead of having run for so long.
        of_silence: bool,
    },
    /// A build that it needs failed.
    Dependency {
        /// The derivation that failed.
        derivation: String,
    },
    /// What was fetched has another hash than the source gives.
    HashMismatch {
        /// The hash that the source gives.
        specified: String,
        /// The right one.
        got: String,
        /// The line that holds the wrong one.
        #[serde(rename = "place")]
        location: Option<SourceLocation>,
    },
    /// The run was cancelled.
    Cancelled,
}

impl Cause {
    /// The conclusion that follows from the cause. This is the only such rule, so that no two reports can disagree.
    pub(crate) fn conclusion(&self) -> Conclusion {
        match self {
            Self::Built | Self::Evaluated => Conclusion::Success,
            Self::AlreadyCached | Self::AlreadyCachedUnsigned | Self::AlreadyInStore => {
                Conclusion::Neutral
            }
            Self::Cancelled => Conclusion::Cancelled,
            Self::Evaluation { .. }
            | Self::OutOfMemory { .. }
            | Self::Build
            | Self::TimedOut { .. }
            | Self::Dependency { .. }
            | Self::HashMismatch { .. } => Conclusion::Failure,
        }
    }

    /// The source line to annotate, if there is one.
    pub fn location(&self) -> Option<&SourceLocation> {
        match self {
            Self::Evaluation { location, .. } | Self::HashMismatch { location, .. } => {
                location.as_ref()
            }
            _ => None,
        }
    }
}

/// What is known of an output that has ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Verdict {
    pub cause: Cause,
    /// Its derivation, when evaluation came that far.
    pub derivation: Option<String>,
    /// The store paths it made.
    pub out_paths: Vec<String>,
    /// The last lines of the log as Nix wrote them. They may hold escape sequences, which each report removes.
    pub log_tail: Vec<String>,
    /// When it began, in milliseconds since 1970.
    pub started_at_ms: u64,
    pub took: Duration,
    /// The command that builds the output by hand.
    pub reproduce: String,
}

impl Verdict {
    pub fn conclusion(&self) -> Conclusion {
        self.cause.conclusion()
    }
}
