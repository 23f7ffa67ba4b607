//! The facts of a job, each known or in doubt. This module owns the types; `context` reads the facts, and `trust`
//! decides what follows from them.

use std::fmt;

use thiserror::Error;

use crate::text::one_line;

/// A fact, or the reason why it is in doubt.
pub type Fact<T> = Result<T, Doubt>;

/// Where this program runs, and the facts of the job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Facts {
    /// No CI: a person's machine.
    Local,
    /// The name of a CI that Flywheel cannot read facts from.
    OtherCi(String),
    /// A job with an event, real or recorded.
    Job(Box<Job>),
}

/// The facts of one job. They do not depend on the CI, so a module for each CI can fill them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Job {
    pub event: Fact<Event>,
    /// `owner/name` of the repository that the job runs for.
    pub repository: Fact<String>,
    /// That repository's default branch, without `refs/heads/`.
    pub default_branch: Fact<String>,
    /// The full ref that the job runs on.
    pub git_ref: Fact<String>,
    /// Whether the CI reports that a rule protects that ref. `false` without a report.
    pub ref_protected: bool,
    /// Whether the event removed that ref.
    pub removes_ref: Fact<bool>,
}

/// What started a job. Names are compared byte for byte.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Commits or tags were pushed.
    Push,
    Schedule,
    /// A person, or a program with write access, started the workflow by hand.
    WorkflowDispatch,
    /// The merge queue tests a merge.
    MergeGroup,
    /// A pull request, from a fork or not.
    PullRequest,
    /// A release was created or changed.
    Release,
    /// A program started the workflow, with data of its own.
    RepositoryDispatch,
    /// Any other event, by name.
    Other(String),
}

impl Event {
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

    /// GitLab's source of a pipeline as one of the events that all CIs share. A pipeline that carries variables or code
    /// from its caller counts as a `repository_dispatch`.
    pub fn from_gitlab_source(source: &str) -> Self {
        match source {
            "push" => Self::Push,
            "schedule" => Self::Schedule,
            // A person started the pipeline on GitLab's pages, as with GitHub's event for workflows.
            "web" => Self::WorkflowDispatch,
            "api" | "trigger" => Self::RepositoryDispatch,
            "merge_request_event" | "external_pull_request_event" => Self::PullRequest,
            // The prefix keeps GitLab's other sources from having the name of another CI's event by chance.
            other => Self::Other(format!("gitlab:{other}")),
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

/// Names a fact in messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FactName {
    Event,
    /// The event payload as a whole.
    Payload,
    Repository,
    DefaultBranch,
    Ref,
    /// The commit that a push left its ref at.
    After,
}

impl FactName {
    /// The variables and options that the fact comes from: in a job, and for a recorded event.
    pub(crate) fn source(self) -> &'static str {
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
    /// No source has the fact.
    #[error("{0} is not known: it must come from {source}", source = .0.source())]
    Missing(FactName),
    /// The value cannot be such a fact.
    #[error("{name} is unreadable: {why}")]
    Unreadable {
        name: FactName,
        /// The fault, as a sentence fragment.
        why: String,
    },
    /// Two sources have different values.
    #[error("{name} is in doubt: {one}, but {other}")]
    Disagree {
        name: FactName,
        /// One source and its value, as a clause.
        one: String,
        /// The other source and its value, as a clause.
        other: String,
    },
}

impl Doubt {
    /// What to do about it, as a sentence.
    pub(crate) fn remedy(&self) -> String {
        match self {
            Self::Missing(_) => "Supply that fact: Flywheel never guesses one.".into(),
            Self::Unreadable { name, .. } | Self::Disagree { name, .. } => {
                format!("Check {}.", name.source())
            }
        }
    }
}

/// Makes text from outside safe for a message: one short line, without anything that the runner takes for a command (it
/// searches for `##[` anywhere in a line) and without backticks, which would end the quotation.
pub fn shown(text: &str) -> String {
    one_line(text, 120).replace("##[", "# #[").replace('`', "'")
}
