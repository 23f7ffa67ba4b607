//! The trust gate: from the facts of a job to a verdict. Pure, failing closed, and the only maker
//! of the permit that the publisher demands. No I/O, no clock, no secret: it learns whether there is
//! a token, never which.

pub mod facts;
mod reason;
mod refs;

pub use facts::{Doubt, Event, Facts, Job};
pub use reason::{Grounds, Refusal};
pub use refs::TrustedRefs;

/// The right to publish. There is no other maker of it than this module.
#[derive(Debug)]
pub struct PublishPermit {
    _private: (),
}

/// Whether a job with these facts may publish at all, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It may, if it is asked to and has a token.
    MayPublish(Grounds),
    /// It reads the cache and publishes nothing.
    ReadOnly(Refusal),
}

impl Verdict {
    /// The verdict as outputs and `--format json` have it.
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
    /// Publish, and say so if that cannot be.
    Always,
    /// Publish where the gate allows it.
    Auto,
    /// Do not publish.
    #[default]
    Never,
}

/// What the user asks of the gate.
#[derive(Clone, Debug, Default)]
pub struct Request {
    /// The input `push-cache`. It asks nothing outside of CI.
    pub push_cache: PushCache,
    /// `--publish`: asked by hand.
    pub by_hand: bool,
    /// The input `trusted-refs`.
    pub trusted_refs: TrustedRefs,
}

/// What goes to Attic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ToAttic {
    /// Everything that the job built.
    All,
    /// Nothing.
    Nothing,
}

impl ToAttic {
    /// The word of outputs and `--format json`.
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
    /// Nothing.
    Nothing,
}

impl ToFlakeHub {
    /// The word of outputs and `--format json`.
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
pub struct Plan {
    /// The job's own cache.
    pub attic: ToAttic,
    /// Public distribution, which has credentials of its own and asks for none here.
    pub flakehub: ToFlakeHub,
}

/// What a "may publish" lacks to become "publishes".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lack {
    /// Nobody asked for it.
    Request,
    /// There is no token.
    Token,
}

/// The gate's answer. Only `decide` makes one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    verdict: Verdict,
    lack: Option<Lack>,
    plan: Plan,
    refused: bool,
}

/// Judges a job by its facts alone: the table of `docs/trust.md`.
pub fn judge(facts: &Facts, request: &Request) -> Verdict {
    let judged = match facts {
        Facts::Local if request.by_hand => Ok(Grounds::AskedLocally),
        Facts::Local => Err(Refusal::NotAskedLocally),
        Facts::OtherCi(name) => Err(Refusal::OtherCi(name.clone())),
        Facts::Job(job) => judge_job(job, &request.trusted_refs),
    };
    judged.map_or_else(Verdict::ReadOnly, Verdict::MayPublish)
}

/// Judges a job, and says what follows for this request.
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
        plan: Plan {
            attic: if publishes {
                ToAttic::All
            } else {
                ToAttic::Nothing
            },
            flakehub: flakehub(facts, &verdict),
        },
        // `auto` takes the gate's no for an answer, but not that the token is missing.
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

    /// Whether it will: it may, it is asked to, and it has a token.
    pub fn publishes(&self) -> bool {
        matches!(self.verdict, Verdict::MayPublish(_)) && self.lack.is_none()
    }

    /// What is published where.
    pub fn plan(&self) -> Plan {
        self.plan
    }

    /// The permit, if the job publishes.
    pub fn permit(&self) -> Option<PublishPermit> {
        self.publishes().then_some(PublishPermit { _private: () })
    }

    /// Whether publication was asked for and will not happen: a notice with the reason, or a failure
    /// if `require-publish` says so.
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

    /// What would have to change for it to publish, as a sentence. `None` if it does.
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

/// What is not named here is read-only.
fn judge_job(job: &Job, trusted: &TrustedRefs) -> Result<Grounds, Refusal> {
    let event = known(&job.event)?;
    match event {
        Event::Push | Event::Schedule | Event::WorkflowDispatch | Event::MergeGroup => {}
        Event::PullRequest => return Err(Refusal::PullRequest),
        Event::Release => return Err(Refusal::Release),
        Event::RepositoryDispatch => return Err(Refusal::RepositoryDispatch),
        Event::Other(name) => return Err(Refusal::NeverTrusted(name.clone())),
    }
    // Every fact has to be there, also one that this event's row does not look at.
    known(&job.repository)?;
    let default_branch = known(&job.default_branch)?;
    let git_ref = known(&job.git_ref)?;
    if *known(&job.removes_ref)? {
        return Err(Refusal::RefRemoved {
            git_ref: git_ref.clone(),
        });
    }
    let on_default_branch =
        !default_branch.is_empty() && git_ref.strip_prefix("refs/heads/") == Some(default_branch);
    match event {
        Event::MergeGroup => judge_queue(git_ref, trusted),
        _ if on_default_branch => Ok(Grounds::DefaultBranch {
            event: event.clone(),
            branch: default_branch.clone(),
        }),
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

/// The publication policy: a push to the default branch is rolling, a push of a tag `v*` a version.
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
