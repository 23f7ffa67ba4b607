//! What is known of a job, each fact good or in doubt. Owns the types; how they are read is
//! `context`'s part, what follows from them `trust`'s.

use std::fmt;

use thiserror::Error;

use crate::text::one_line;

/// A fact, or why it is in doubt.
pub type Fact<T> = Result<T, Doubt>;

/// Where this program runs, and what is known of the job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Facts {
    /// No CI at all: a person's machine.
    Local,
    /// A CI whose facts cannot be read; holds its name.
    OtherCi(String),
    /// A job with an event, or the record of one.
    Job(Box<Job>),
}

/// The facts of one job. They name no CI, so that any reader can fill them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Job {
    /// What started it.
    pub event: Fact<Event>,
    /// `owner/name` of the repository that it runs for.
    pub repository: Fact<String>,
    /// That repository's default branch, without `refs/heads/`.
    pub default_branch: Fact<String>,
    /// The full ref that it runs on.
    pub git_ref: Fact<String>,
    /// Whether the CI says that a rule protects that ref. `false` if nobody says so.
    pub ref_protected: bool,
    /// Whether the event removed that ref.
    pub removes_ref: Fact<bool>,
}

/// What started a job. Names are compared byte for byte.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Commits or tags were pushed.
    Push,
    /// A time came.
    Schedule,
    /// A person (or a program with write access) asked for it.
    WorkflowDispatch,
    /// The merge queue tries a merge.
    MergeGroup,
    /// A pull request, from a fork or not.
    PullRequest,
    /// A release was made or changed.
    Release,
    /// A program asked for it, with data of its own.
    RepositoryDispatch,
    /// Any other, by its name.
    Other(String),
}

impl Event {
    /// The event of that name.
    pub fn from_name(name: &str) -> Self {
        match name {
            "push" => Self::Push,
            "schedule" => Self::Schedule,
            "workflow_dispatch" => Self::WorkflowDispatch,
            "merge_group" => Self::MergeGroup,
            "pull_request" => Self::PullRequest,
            "release" => Self::Release,
            "repository_dispatch" => Self::RepositoryDispatch,
            other => Self::Other(other.to_owned()),
        }
    }
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Push => "push",
            Self::Schedule => "schedule",
            Self::WorkflowDispatch => "workflow_dispatch",
            Self::MergeGroup => "merge_group",
            Self::PullRequest => "pull_request",
            Self::Release => "release",
            Self::RepositoryDispatch => "repository_dispatch",
            Self::Other(name) => return f.write_str(&shown(name)),
        })
    }
}

/// The facts by name, for messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FactName {
    /// What started the job.
    Event,
    /// The event payload as a whole.
    Payload,
    /// The repository.
    Repository,
    /// Its default branch.
    DefaultBranch,
    /// The ref.
    Ref,
    /// What a push left its ref at.
    After,
}

impl FactName {
    /// Where the fact comes from: in a job, and for a recorded event.
    pub fn source(self) -> &'static str {
        match self {
            Self::Event => {
                "`GITHUB_EVENT_NAME` (GitLab: `CI_PIPELINE_SOURCE`; for a recorded event `--event-name`)"
            }
            Self::Payload => "`GITHUB_EVENT_PATH` (for a recorded event `--event-path`)",
            Self::Repository => {
                "`GITHUB_REPOSITORY` (for a recorded event `--repository`) and the payload (GitLab: `CI_PROJECT_PATH`)"
            }
            Self::DefaultBranch => {
                "`repository.default_branch` of the payload (GitLab: `CI_DEFAULT_BRANCH`)"
            }
            Self::Ref => {
                "`GITHUB_REF` (for a recorded event `--ref`) and the payload (GitLab: `CI_COMMIT_REF_NAME`, `CI_COMMIT_REF_PROTECTED`, and `CI_COMMIT_BRANCH` or `CI_COMMIT_TAG`)"
            }
            Self::After => "`after` or `deleted` of the payload (GitLab: `CI_COMMIT_SHA`)",
        }
    }
}

impl fmt::Display for FactName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Event => "the event",
            Self::Payload => "the event payload",
            Self::Repository => "the repository",
            Self::DefaultBranch => "the default branch",
            Self::Ref => "the ref",
            Self::After => "what the push left behind",
        })
    }
}

/// Why a fact is in doubt.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Doubt {
    /// Nobody tells it.
    #[error("{0} is not known: {source} must tell it", source = .0.source())]
    Missing(FactName),
    /// What is told is none.
    #[error("{name} is unreadable: {why}")]
    Unreadable {
        /// Of which fact.
        name: FactName,
        /// What is wrong with it, in a fragment.
        why: String,
    },
    /// It is told in two ways.
    #[error("{name} is in doubt: {one}, but {other}")]
    Disagree {
        /// Of which fact.
        name: FactName,
        /// Who says what.
        one: String,
        /// Who says what else.
        other: String,
    },
}

impl Doubt {
    /// What to look at, as a sentence.
    pub fn remedy(&self) -> String {
        match self {
            Self::Missing(_) => "Supply that fact: none is ever guessed.".into(),
            Self::Unreadable { name, .. } | Self::Disagree { name, .. } => {
                format!("Look at {}.", name.source())
            }
        }
    }
}

/// Text from outside for a message: one line, short, and nothing that the runner takes for a command
/// (it looks for `##[` anywhere in a line) or that ends our quotes.
pub fn shown(text: &str) -> String {
    one_line(text, 120).replace("##[", "# #[").replace('`', "'")
}
