//! The reasons why a job may or may not publish, each as one sentence for people. Pure.

use std::fmt;

use crate::trust::facts::{Doubt, Event, shown};

/// Why a job may publish.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Grounds {
    /// It runs on the default branch, for an event that is trusted there.
    DefaultBranch {
        /// What started it.
        event: Event,
        /// Without `refs/heads/`.
        branch: String,
    },
    /// `trusted-refs` names its ref.
    TrustedRef {
        /// What started it.
        event: Event,
        /// The full ref.
        git_ref: String,
        /// The pattern that names the ref.
        pattern: String,
    },
    /// A person asked for it on their own machine.
    AskedLocally,
}

impl fmt::Display for Grounds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::DefaultBranch { event, branch } => {
                write!(f, "`{event}` on the default branch `{}`", shown(branch))
            }
            Self::TrustedRef {
                event,
                git_ref,
                pattern,
            } => {
                write!(
                    f,
                    "`{event}` on `{}`, which `trusted-refs` names (`{}`)",
                    shown(git_ref),
                    shown(pattern)
                )
            }
            Self::AskedLocally => {
                f.write_str("local: publish only when asked, and `--publish` asks")
            }
        }
    }
}

/// Why a job is read-only.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// A person's machine, and `--publish` was not given.
    NotAskedLocally,
    /// A CI of which no facts can be read.
    OtherCi(String),
    /// A fact is missing or unreadable, or two sources disagree about it.
    InDoubt(Doubt),
    /// A pull request, from a fork or not.
    PullRequest,
    /// A release: the push of its tag publishes.
    Release,
    /// A dispatch from outside, which carries the data of its caller.
    RepositoryDispatch,
    /// Any other event, by its name.
    NeverTrusted(String),
    /// The push removed its ref.
    RefRemoved {
        /// The full ref.
        git_ref: String,
    },
    /// A merge queue that `trusted-refs` does not name.
    MergeGroup {
        /// The queue's ref.
        git_ref: String,
    },
    /// A merge queue's event on a ref that is no queue's.
    NotAQueue {
        /// The full ref.
        git_ref: String,
    },
    /// An event that is trusted only on the default branch, on another ref.
    OffDefaultBranch {
        /// The full ref.
        git_ref: String,
    },
    /// A ref that is neither the default branch nor named by `trusted-refs`.
    OtherRef {
        /// The full ref.
        git_ref: String,
    },
    /// A branch that `trusted-refs` names, but no rule protects.
    Unprotected {
        /// The full ref.
        git_ref: String,
        /// The pattern that names the ref.
        pattern: String,
    },
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotAskedLocally => f.write_str("local: publish only when asked (`--publish`)"),
            Self::OtherCi(name) => write!(
                f,
                "the facts of a job of {} cannot be read yet",
                shown(name)
            ),
            Self::InDoubt(doubt) => write!(f, "{doubt}"),
            Self::PullRequest => f.write_str(
                "a pull request reads and never publishes, and no setting can change it",
            ),
            Self::Release => f.write_str("`release` does not publish: the push of its tag does"),
            Self::RepositoryDispatch => {
                f.write_str("`repository_dispatch` carries its caller's data")
            }
            Self::NeverTrusted(name) => {
                write!(
                    f,
                    "`{}` never publishes, and no setting can change it: {}",
                    shown(name),
                    hazard(name)
                )
            }
            Self::RefRemoved { git_ref } => write!(f, "the push removed `{}`", shown(git_ref)),
            Self::MergeGroup { git_ref } => {
                write!(
                    f,
                    "the merge queue's ref `{}` is not named by `trusted-refs`",
                    shown(git_ref)
                )
            }
            Self::NotAQueue { git_ref } => write!(
                f,
                "`merge_group` on `{}`, which is no queue's ref",
                shown(git_ref)
            ),
            Self::OffDefaultBranch { git_ref } => {
                write!(
                    f,
                    "`schedule` on `{}`, which is not the default branch",
                    shown(git_ref)
                )
            }
            Self::OtherRef { git_ref } => {
                write!(
                    f,
                    "`{}` is neither the default branch nor named by `trusted-refs`",
                    shown(git_ref)
                )
            }
            Self::Unprotected { git_ref, pattern } => {
                let (git_ref, pattern) = (shown(git_ref), shown(pattern));
                write!(
                    f,
                    "`trusted-refs` names `{git_ref}` (`{pattern}`), but no rule protects that branch"
                )
            }
        }
    }
}

impl Refusal {
    /// What would have to change, as a sentence.
    pub(crate) fn remedy(&self) -> String {
        match self {
            Self::NotAskedLocally => "Say `--publish`.".into(),
            Self::OtherCi(_) => {
                "Nothing yet: this version reads the facts of GitHub's and GitLab's jobs.".into()
            }
            Self::InDoubt(doubt) => doubt.remedy(),
            Self::PullRequest | Self::NeverTrusted(_) => {
                "Nothing: no setting can change it.".into()
            }
            Self::Release => "Run the job on the push of the tag as well.".into(),
            Self::RepositoryDispatch => {
                "Use `workflow_dispatch`, which needs write access and carries a ref.".into()
            }
            Self::RefRemoved { .. } | Self::NotAQueue { .. } => {
                "Nothing: there is no commit to vouch for.".into()
            }
            Self::MergeGroup { .. } => {
                "Name the queue in `trusted-refs`, such as `refs/heads/gh-readonly-queue/main/*`."
                    .into()
            }
            Self::OffDefaultBranch { .. } => "Run the schedule on the default branch.".into(),
            Self::OtherRef { git_ref } if git_ref.starts_with("refs/heads/") => {
                "Name the branch in `trusted-refs`, and have a rule protect it.".into()
            }
            Self::OtherRef { git_ref } if git_ref.starts_with("refs/tags/") => {
                "Name the tag in `trusted-refs`.".into()
            }
            Self::OtherRef { .. } => "Nothing: only branches and tags can publish.".into(),
            Self::Unprotected { .. } => {
                "Have a rule protect the branch in the repository's settings.".into()
            }
        }
    }
}

/// Why an event is never trusted, as a fragment.
fn hazard(event: &str) -> &'static str {
    match event {
        "pull_request_target" => {
            "it runs with secrets on the default branch, for a pull request of anybody"
        }
        "workflow_run" => {
            "what it follows may be the run of a fork's pull request, from a branch of any name"
        }
        "pull_request_review" | "pull_request_review_comment" | "pull_request_review_thread" => {
            "it belongs to a pull request"
        }
        "issue_comment" | "issues" | "discussion" | "discussion_comment" | "fork" | "watch" => {
            "anybody can cause it, and it runs on the default branch"
        }
        "check_run" | "check_suite" | "status" => {
            "it follows a commit of any branch, and runs on the default branch"
        }
        _ => "it is not among the events that do",
    }
}
