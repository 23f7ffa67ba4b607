//! What a run of `flake-checks` found out of each output, as plain data. Owns the words of states and verdicts;
//! never asks GitHub and never decides what failed.

pub mod board;
pub mod files;
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

/// How far an output is. A later state never goes back to an earlier one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// Known by name.
    Queued,
    /// Its derivation is being asked for.
    Evaluating,
    /// It is being built.
    Building,
    /// It has ended.
    Finished(Box<Verdict>),
}

/// Why an output ended as it did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Cause {
    /// It was built.
    Built,
    /// It evaluates; nobody asked for more.
    Evaluated,
    /// The cache or the store had it.
    AlreadyCached,
    /// Nix could not evaluate it.
    Evaluation {
        /// Nix's own words.
        text: String,
        /// Where, when the error names a file of the flake.
        // Readers of the JSON file know the key as `place`.
        #[serde(rename = "place")]
        location: Option<SourceLocation>,
    },
    /// The evaluation was killed for its memory, alone too.
    OutOfMemory {
        /// What it had taken when it was killed.
        needed_bytes: u64,
        /// What it could have.
        limit_bytes: u64,
    },
    /// Its own build failed.
    Build,
    /// A build that it needs failed.
    Dependency {
        /// The derivation that failed.
        derivation: String,
    },
    /// What was fetched is not what the hash says.
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
    /// How an output of this cause ends. The one rule, so that no two reports can disagree.
    pub fn conclusion(&self) -> Conclusion {
        match self {
            Self::Built | Self::Evaluated => Conclusion::Success,
            Self::AlreadyCached => Conclusion::Neutral,
            Self::Cancelled => Conclusion::Cancelled,
            Self::Evaluation { .. }
            | Self::OutOfMemory { .. }
            | Self::Build
            | Self::Dependency { .. }
            | Self::HashMismatch { .. } => Conclusion::Failure,
        }
    }

    /// The source line to mark, where there is one.
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
    /// Why it ended so.
    pub cause: Cause,
    /// Its derivation, when evaluation came that far.
    pub derivation: Option<String>,
    /// The store paths it made.
    pub out_paths: Vec<String>,
    /// The last lines of the log, as Nix wrote them: made harmless only when they are shown.
    pub log_tail: Vec<String>,
    /// When it began, in seconds since 1970.
    pub started_at: u64,
    /// How long it took.
    pub took: Duration,
    /// The command that does the same by hand.
    pub reproduce: String,
}

impl Verdict {
    /// How it ended.
    pub fn conclusion(&self) -> Conclusion {
        self.cause.conclusion()
    }
}
