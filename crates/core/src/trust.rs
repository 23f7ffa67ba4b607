//! The trust gate: decides from the facts of a job whether it may publish. Pure, failing closed, and the only maker of
//! the permit that the publisher requires. No I/O, no clock, no secret: it learns whether there is a token, never its
//! value.

pub mod facts;
mod reason;
mod refs;

pub use facts::{Doubt, Event, Facts, Job};
pub use reason::{Grounds, Refusal};
pub use refs::TrustedRefs;

/// The right to publish. Only this module can make one, because the field is private.
#[derive(Debug)]
pub struct PublishPermit {
    _private: (),
}

/// Whether a job with these facts may publish at all, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It may publish, if it is asked to and has a token.
    MayPublish(Grounds),
    /// It reads the cache and publishes nothing.
    ReadOnly(Refusal),
}

impl Verdict {
    /// The verdict in outputs and in `--format json`.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::MayPublish(_) => "may-publish",
            Self::ReadOnly(_) => "read-only",
        }
    }
}

/// The input `push-cache`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PushCache {
    /// Publish, and give a notice where the gate forbids it.
    Always,
    /// Publish where the gate allows it.
    Auto,
    /// Do not publish.
    #[default]
    Never,
}

/// What the user asks for.
#[derive(Clone, Debug, Default)]
pub struct Request {
    /// The input `push-cache`, which counts only in CI.
    pub push_cache: PushCache,
    /// The flag `--publish`, which a person gives.
    pub by_hand: bool,
    /// Refs that may publish besides the default branch.
    pub trusted_refs: TrustedRefs,
}

/// What goes to Attic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ToAttic {
    /// Everything that the job built.
    All,
    Nothing,
}

impl ToAttic {
    /// The value in outputs and in `--format json`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::All => "all",
            Self::Nothing => "none",
        }
    }
}

/// What a workflow with FlakeHub's own action should publish there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ToFlakeHub {
    /// A rolling release, from the default branch.
    Rolling,
    /// A release with the tag's version.
    Versioned,
    Nothing,
}

impl ToFlakeHub {
    /// The value in outputs and in `--format json`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Rolling => "rolling",
            Self::Versioned => "versioned",
            Self::Nothing => "none",
        }
    }
}

/// What is published where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PublicationPlan {
    /// The job's own cache.
    pub attic: ToAttic,
    /// Public distribution, which has credentials of its own and needs no token here.
    pub flakehub: ToFlakeHub,
}

/// What a job that may publish lacks to do so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lack {
    /// It was not asked to publish.
    Request,
    Token,
}

/// The gate's decision. Only `decide` makes one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    verdict: Verdict,
    lack: Option<Lack>,
    plan: PublicationPlan,
    refused: bool,
}

/// Judges a job by its facts, by `--publish` on a laptop, and by `trusted-refs`, as the table of `docs/trust.md` shows
/// it.
pub(crate) fn judge(facts: &Facts, request: &Request) -> Verdict {
    let judged = match facts {
        Facts::Local if request.by_hand => Ok(Grounds::AskedLocally),
        Facts::Local => Err(Refusal::NotAskedLocally),
        Facts::OtherCi(name) => Err(Refusal::OtherCi(name.clone())),
        Facts::Job(job) => judge_job(job, &request.trusted_refs),
    };
    judged.map_or_else(Verdict::ReadOnly, Verdict::MayPublish)
}

/// Judges a job, and decides what follows for this request.
pub fn decide(facts: &Facts, request: &Request, token_present: bool) -> Decision {
    let verdict = judge(facts, request);
    let allowed = matches!(verdict, Verdict::MayPublish(_));
    let asked = request.by_hand || request.push_cache != PushCache::Never;
    let lack = match (asked, token_present) {
        (false, _) => Some(Lack::Request),
        (true, false) => Some(Lack::Token),
        (true, true) => None,
    };
    let publishes = allowed && lack.is_none();
    let insisted =
        request.by_hand || (request.push_cache == PushCache::Always && *facts != Facts::Local);
    Decision {
        plan: PublicationPlan {
            attic: if publishes {
                ToAttic::All
            } else {
                ToAttic::Nothing
            },
            flakehub: flakehub(facts, &verdict),
        },
        // With `auto`, a verdict of read-only is expected, but a missing token is a mistake of the workflow.
        refused: !publishes && (insisted || (asked && allowed)),
        verdict,
        lack,
    }
}

impl Decision {
    /// Whether the job may publish at all, and why.
    pub fn verdict(&self) -> &Verdict {
        &self.verdict
    }

    /// Whether the job publishes: it may, it is asked to, and it has a token.
    pub fn publishes(&self) -> bool {
        matches!(self.verdict, Verdict::MayPublish(_)) && self.lack.is_none()
    }

    /// What is published where.
    pub fn plan(&self) -> PublicationPlan {
        self.plan
    }

    /// The permit, if the job publishes.
    pub fn permit(&self) -> Option<PublishPermit> {
        self.publishes().then_some(PublishPermit { _private: () })
    }

    /// Whether publication was asked for and will not happen. That is a notice with the reason, or with
    /// `require-publish` a failure.
    pub fn is_refused(&self) -> bool {
        self.refused
    }

    /// Why it publishes, or why not: a fragment of one line.
    pub fn reason(&self) -> String {
        match (&self.verdict, self.lack) {
            (Verdict::ReadOnly(refusal), _) => refusal.to_string(),
            (Verdict::MayPublish(grounds), None) => grounds.to_string(),
            (Verdict::MayPublish(grounds), Some(Lack::Request)) => {
                format!("{grounds}, but nobody asks for it: `push-cache` is `false`")
            }
            (Verdict::MayPublish(grounds), Some(Lack::Token)) => {
                format!("{grounds}, but there is no token: `ATTIC_TOKEN` is empty")
            }
        }
    }

    /// What would have to change for the job to publish, as a sentence. `None` if it publishes.
    pub fn remedy(&self) -> Option<String> {
        match (&self.verdict, self.lack) {
            (Verdict::ReadOnly(refusal), _) => Some(refusal.remedy()),
            (Verdict::MayPublish(_), None) => None,
            (Verdict::MayPublish(_), Some(Lack::Request)) => {
                Some("Set `push-cache` to `auto` or `true`.".into())
            }
            (Verdict::MayPublish(_), Some(Lack::Token)) => Some(
                "Pass a token that may push to the cache as `ATTIC_TOKEN` in the step's `env`."
                    .into(),
            ),
        }
    }
}

/// Judges a job of a CI. An event that is not named here is read-only.
fn judge_job(job: &Job, trusted: &TrustedRefs) -> Result<Grounds, Refusal> {
    let event = known(&job.event)?;
    match event {
        Event::Push | Event::Schedule | Event::WorkflowDispatch | Event::MergeGroup => {}
        Event::PullRequest => return Err(Refusal::PullRequest),
        // The push of the release's tag publishes already.
        Event::Release => return Err(Refusal::Release),
        // Its payload is made by a caller outside of the repository.
        Event::RepositoryDispatch => return Err(Refusal::RepositoryDispatch),
        Event::Other(name) => return Err(Refusal::NeverTrusted(name.clone())),
    }
    // Every fact has to be known, even one that does not matter for this event.
    known(&job.repository)?;
    let default_branch = known(&job.default_branch)?;
    let git_ref = known(&job.git_ref)?;
    // A push that removes its ref leaves no commit to vouch for.
    if *known(&job.removes_ref)? {
        return Err(Refusal::RefRemoved {
            git_ref: git_ref.clone(),
        });
    }
    // An empty name must not make `refs/heads/` the default branch.
    let on_default_branch =
        !default_branch.is_empty() && git_ref.strip_prefix("refs/heads/") == Some(default_branch);
    match event {
        Event::MergeGroup => judge_queue(git_ref, trusted),
        _ if on_default_branch => Ok(Grounds::DefaultBranch {
            event: event.clone(),
            branch: default_branch.clone(),
        }),
        // No `trusted-refs` opens another branch to a schedule: GitHub runs none there.
        Event::Schedule => Err(Refusal::OffDefaultBranch {
            git_ref: git_ref.clone(),
        }),
        _ => judge_named(event, git_ref, job.ref_protected, trusted),
    }
}

fn known<T>(fact: &Result<T, Doubt>) -> Result<&T, Refusal> {
    fact.as_ref()
        .map_err(|doubt| Refusal::InDoubt(doubt.clone()))
}

fn judge_queue(git_ref: &str, trusted: &TrustedRefs) -> Result<Grounds, Refusal> {
    let git_ref_owned = || git_ref.to_owned();
    // GitHub's own name for the branches of its queue.
    if !git_ref.starts_with("refs/heads/gh-readonly-queue/") {
        return Err(Refusal::NotAQueue {
            git_ref: git_ref_owned(),
        });
    }
    match trusted.naming(git_ref) {
        Some(pattern) => Ok(Grounds::TrustedRef {
            event: Event::MergeGroup,
            git_ref: git_ref_owned(),
            pattern,
        }),
        None => Err(Refusal::MergeGroup {
            git_ref: git_ref_owned(),
        }),
    }
}

fn judge_named(
    event: &Event,
    git_ref: &str,
    protected: bool,
    trusted: &TrustedRefs,
) -> Result<Grounds, Refusal> {
    let git_ref = git_ref.to_owned();
    match trusted.naming(&git_ref) {
        None => Err(Refusal::OtherRef { git_ref }),
        Some(pattern) if !protected && !git_ref.starts_with("refs/tags/") => {
            Err(Refusal::Unprotected { git_ref, pattern })
        }
        Some(pattern) => Ok(Grounds::TrustedRef {
            event: event.clone(),
            git_ref,
            pattern,
        }),
    }
}

/// What goes to FlakeHub: for a push to the default branch a rolling release, for a push of a tag `v*` that version.
fn flakehub(facts: &Facts, verdict: &Verdict) -> ToFlakeHub {
    let (Facts::Job(job), Verdict::MayPublish(grounds)) = (facts, verdict) else {
        return ToFlakeHub::Nothing;
    };
    match grounds {
        _ if job.event != Ok(Event::Push) => ToFlakeHub::Nothing,
        Grounds::DefaultBranch { .. } => ToFlakeHub::Rolling,
        Grounds::TrustedRef { git_ref, .. } if git_ref.starts_with("refs/tags/v") => {
            ToFlakeHub::Versioned
        }
        _ => ToFlakeHub::Nothing,
    }
}

#[cfg(test)]
mod tests;
