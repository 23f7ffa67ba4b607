//! What a token says about a job, as its issuer signed it. Decide by the ids and never by names: a name can change, and
//! somebody else can take it later. `sub` is only shown to people, because its owner can give it any format.

use thiserror::Error;

use super::Provider;
use super::compact::Fields;
use flywheel_core::trust::facts::{Doubt, Event, FactName, Job};

/// What is wrong with a claim.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ClaimError {
    #[error("it has no `{0}`")]
    Missing(&'static str),
    #[error("its `{name}` is not {wanted}")]
    Kind {
        name: &'static str,
        wanted: &'static str,
    },
}

/// A job that has proved by its token who it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    pub issuer: String,
    /// Never given to another repository or project.
    pub repository_id: String,
    /// That of the account or group that it belongs to: it changes with the owner.
    pub owner_id: String,
    /// The repository's name when the token was made. For messages.
    pub repository: String,
    /// The event's name as GitHub has it, or GitLab's source of the pipeline.
    pub event: String,
    /// The full ref. Some events have none.
    pub git_ref: Option<String>,
    /// Whether a rule protects the ref. `false` where the issuer does not say so.
    pub is_ref_protected: bool,
    pub sha: String,
    pub run_id: String,
    pub run_attempt: String,
    /// The file that holds the job, with its ref: that of a reusable workflow where one was called.
    pub job_workflow: Option<WorkflowRef>,
    /// Hosted by the provider, or not.
    pub runner_environment: Option<String>,
    /// For people.
    pub subject: String,
    /// The token's own name (`jti`).
    pub token_id: String,
    /// Whose names these are.
    provider: Provider,
}

/// A workflow's file at a ref, `OWNER/REPO/.github/workflows/FILE@REF`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkflowRef {
    pub file: String,
    pub git_ref: String,
}

impl WorkflowRef {
    /// Reads one. A file's name may hold `@`, a ref cannot end in one.
    pub fn parse(text: &str) -> Option<Self> {
        let (file, git_ref) = text.rsplit_once('@')?;
        let is_whole = !file.is_empty() && !git_ref.is_empty();
        is_whole.then(|| Self {
            file: file.to_owned(),
            git_ref: git_ref.to_owned(),
        })
    }
}

impl Identity {
    pub(super) fn read(
        provider: Provider,
        issuer: &str,
        claims: &Fields,
    ) -> Result<Self, ClaimError> {
        match provider {
            Provider::GitHub => Self::of_github(issuer, claims),
            Provider::GitLab => Self::of_gitlab(issuer, claims),
        }
    }

    /// GitHub's claims are texts, numbers among them.
    fn of_github(issuer: &str, claims: &Fields) -> Result<Self, ClaimError> {
        let owned = |name| claims.text(name).map(str::to_owned);
        Ok(Self {
            issuer: issuer.to_owned(),
            repository_id: number(claims, "repository_id")?,
            owner_id: number(claims, "repository_owner_id")?,
            repository: owned("repository")?,
            event: owned("event_name")?,
            git_ref: git_ref(claims, "ref")?,
            is_ref_protected: flag(claims, "ref_protected")?,
            sha: owned("sha")?,
            run_id: number(claims, "run_id")?,
            run_attempt: number(claims, "run_attempt")?,
            job_workflow: workflow(claims, "job_workflow_ref")?,
            runner_environment: claims.optional("runner_environment")?.map(str::to_owned),
            subject: owned("sub")?,
            token_id: owned("jti")?,
            provider: Provider::GitHub,
        })
    }

    fn of_gitlab(issuer: &str, claims: &Fields) -> Result<Self, ClaimError> {
        let owned = |name| claims.text(name).map(str::to_owned);
        Ok(Self {
            issuer: issuer.to_owned(),
            repository_id: number(claims, "project_id")?,
            owner_id: number(claims, "namespace_id")?,
            repository: owned("project_path")?,
            event: owned("pipeline_source")?,
            git_ref: git_ref(claims, "ref_path")?,
            is_ref_protected: flag(claims, "ref_protected")?,
            sha: owned("sha")?,
            run_id: number(claims, "pipeline_id")?,
            // A job that is run again gets another number.
            run_attempt: number(claims, "job_id")?,
            job_workflow: workflow(claims, "ci_config_ref_uri")?,
            runner_environment: claims.optional("runner_environment")?.map(str::to_owned),
            subject: owned("sub")?,
            token_id: owned("jti")?,
            provider: Provider::GitLab,
        })
    }

    /// The facts for the trust gate. No token names the default branch: whoever runs the server does, without
    /// `refs/heads/`.
    pub fn job(&self, default_branch: Option<&str>) -> Job {
        let event = match self.provider {
            Provider::GitHub => Event::from_name(&self.event),
            Provider::GitLab => Event::from_gitlab_source(&self.event),
        };
        Job {
            event: Ok(event),
            repository: Ok(self.repository.clone()),
            default_branch: default_branch
                .map(str::to_owned)
                .ok_or(Doubt::Missing(FactName::DefaultBranch)),
            git_ref: self.git_ref.clone().ok_or(Doubt::Missing(FactName::Ref)),
            ref_protected: self.is_ref_protected,
            // A push that removes its ref runs on the default branch's commit, and its token names that.
            removes_ref: Ok(false),
        }
    }

    /// The number of the pull request that the job runs for.
    pub fn pull_request(&self) -> Option<u64> {
        let number = self
            .git_ref
            .as_deref()?
            .strip_prefix("refs/pull/")?
            .strip_suffix("/merge")?;
        let is_plain = number.bytes().all(|byte| byte.is_ascii_digit());
        is_plain.then(|| number.parse().ok()).flatten()
    }
}

fn number(claims: &Fields, name: &'static str) -> Result<String, ClaimError> {
    let text = claims.text(name)?;
    if text.bytes().all(|byte| byte.is_ascii_digit()) && text.len() <= 20 {
        Ok(text.to_owned())
    } else {
        Err(ClaimError::Kind {
            name,
            wanted: "a number in a text",
        })
    }
}

fn flag(claims: &Fields, name: &'static str) -> Result<bool, ClaimError> {
    match claims.optional(name)? {
        None | Some("false") => Ok(false),
        Some("true") => Ok(true),
        Some(_) => Err(ClaimError::Kind {
            name,
            wanted: "`true` or `false`",
        }),
    }
}

fn git_ref(claims: &Fields, name: &'static str) -> Result<Option<String>, ClaimError> {
    match claims.optional(name)? {
        Some(text) if !text.starts_with("refs/") => Err(ClaimError::Kind {
            name,
            wanted: "a full ref, `refs/…`",
        }),
        other => Ok(other.map(str::to_owned)),
    }
}

fn workflow(claims: &Fields, name: &'static str) -> Result<Option<WorkflowRef>, ClaimError> {
    let Some(text) = claims.optional(name)? else {
        return Ok(None);
    };
    WorkflowRef::parse(text).map(Some).ok_or(ClaimError::Kind {
        name,
        wanted: "a file at a ref, `FILE@REF`",
    })
}
