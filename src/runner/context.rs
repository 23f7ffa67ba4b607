//! The job's facts: what started it, where, on which ref, as environment and event payload say.
//! Owns reading and comparing them; a fact that is missing, unreadable or told in two ways stays
//! in doubt, and none is ever guessed. What follows from them is decided by `trust`.

use std::path::{Path, PathBuf};

use url::Url;

use crate::exit::UsageError;
use crate::runner::env::Env;
use crate::runner::event::{self, Payload, PayloadError};
use crate::runner::facts::{Doubt, Event, Fact, FactName, Facts, Job, shown};
use crate::runner::gitlab;
use crate::secret::Secret;
use crate::text::one_line;

/// An event from elsewhere: each value that is given stands in for the job's own.
#[derive(Clone, Debug, Default)]
pub struct Recorded {
    /// The event's name.
    pub event_name: Option<String>,
    /// The file with its payload.
    pub event_path: Option<PathBuf>,
    /// The full ref. What the environment knows of its own ref no longer counts then.
    pub git_ref: Option<String>,
    /// Whether a rule protects that ref.
    pub ref_protected: Option<bool>,
    /// `owner/name`. Without it and outside of a job the payload's own word is taken.
    pub repository: Option<String>,
    /// The default branch, where the payload does not know it.
    pub default_branch: Option<String>,
}

impl Recorded {
    fn is_given(&self) -> bool {
        self.event_name.is_some()
            || self.event_path.is_some()
            || self.git_ref.is_some()
            || self.ref_protected.is_some()
            || self.repository.is_some()
            || self.default_branch.is_some()
    }
}

/// The facts of the job that this process is part of.
pub fn facts(env: &Env) -> Facts {
    match ci_provider(env) {
        CiProvider::Local => Facts::Local,
        CiProvider::OtherCi(name) => Facts::OtherCi(name.to_owned()),
        CiProvider::GitLab => Facts::Job(Box::new(gitlab::job(env))),
        CiProvider::GitHub => {
            let claims = EnvClaims::from_env(env);
            let read = claims.event_path.as_deref().map(event::read);
            Facts::Job(Box::new(claims.job(&payload(read))))
        }
    }
}

/// Where GitHub's API is: `GITHUB_API_URL`, else GitHub's own.
pub fn github_api(env: &Env) -> Url {
    let named = env
        .get("GITHUB_API_URL")
        .and_then(|text| Url::parse(text).ok());
    named.unwrap_or_else(|| Url::parse("https://api.github.com").expect("a constant that is a URL"))
}

/// The repository and the commit that this job's Check Runs belong to: of a pull request the head of its
/// branch, which is not the commit that the job has checked out. `None` outside of a job.
pub fn commit(env: &Env) -> Option<(String, String)> {
    let repository = env.get("GITHUB_REPOSITORY")?.to_owned();
    let of_branch = || {
        let payload = std::fs::read(env.path("GITHUB_EVENT_PATH")?).ok()?;
        let payload: serde_json::Value = serde_json::from_slice(&payload).ok()?;
        Some(payload["pull_request"]["head"]["sha"].as_str()?.to_owned())
    };
    let sha = match env.get("GITHUB_EVENT_NAME") {
        Some("pull_request" | "pull_request_target") => of_branch()?,
        _ => env.get("GITHUB_SHA")?.to_owned(),
    };
    let is_hash = sha.len() >= 40 && sha.bytes().all(|byte| byte.is_ascii_hexdigit());
    is_hash.then_some((repository, sha))
}

/// The facts of a recorded event; where nothing of one is given, those of this process's job.
///
/// # Errors
/// When the file named by `event_path` cannot be read at all. What it holds is a fact, good or in doubt.
pub fn recorded(env: &Env, recorded: &Recorded) -> Result<Facts, UsageError> {
    if !recorded.is_given() {
        return Ok(facts(env));
    }
    let claims = EnvClaims::from_env(env).or_recorded(recorded);
    let read = claims.event_path.as_deref().map(event::read);
    if let (Some(file), Some(Err(error))) = (&recorded.event_path, &read)
        && error.is_about_the_file()
    {
        return Err(unreadable_file(file, error));
    }
    Ok(Facts::Job(Box::new(claims.job(&payload(read)))))
}

fn unreadable_file(file: &Path, error: &PayloadError) -> UsageError {
    let name = one_line(&file.display().to_string(), 200);
    UsageError::new("event-path", format!("names `{name}`, which cannot be read: {error}"))
        .with_hint("Give the file with the event's payload, such as a copy of the file that `GITHUB_EVENT_PATH` names.")
}

/// Whether the job has a cache token. Its value stays where it is.
pub fn token_present(env: &Env) -> bool {
    env.get("ATTIC_TOKEN")
        .is_some_and(|text| Secret::new(text).is_some())
}

enum CiProvider {
    Local,
    OtherCi(&'static str),
    GitHub,
    GitLab,
}

/// Markers by which other CI systems name themselves. `CI` alone names none: people, containers and
/// test runs set it, too, and there `--publish` is asked by hand as on any laptop.
const OTHER_CI: [(&str, &str); 7] = [
    ("JENKINS_URL", "Jenkins"),
    ("BUILDKITE", "Buildkite"),
    ("CIRCLECI", "CircleCI"),
    ("TRAVIS", "Travis CI"),
    ("TF_BUILD", "Azure Pipelines"),
    ("TEAMCITY_VERSION", "TeamCity"),
    ("DRONE", "Drone"),
];

/// Whoever shows a sign of a CI is in one, and has to show facts.
fn ci_provider(env: &Env) -> CiProvider {
    const GITHUB: [&str; 4] = [
        "GITHUB_ACTIONS",
        "GITHUB_EVENT_NAME",
        "GITHUB_EVENT_PATH",
        "GITHUB_REF",
    ];
    let github = GITHUB.iter().any(|name| env.get(name).is_some());
    let other = OTHER_CI
        .iter()
        .find(|(marker, _)| env.get(marker).is_some());
    if env.get("GITLAB_CI").is_some() {
        // Which of the two would be guessing.
        if github {
            CiProvider::OtherCi("GitLab and GitHub at once")
        } else {
            CiProvider::GitLab
        }
    } else if let Some((_, name)) = other {
        CiProvider::OtherCi(name)
    } else if github {
        CiProvider::GitHub
    } else {
        CiProvider::Local
    }
}

/// Whether this process is part of a CI's job.
pub fn in_ci(env: &Env) -> bool {
    !matches!(ci_provider(env), CiProvider::Local)
}

/// A payload, or why there is none.
fn payload(read: Option<Result<Payload, PayloadError>>) -> Fact<Payload> {
    read.ok_or(Doubt::Missing(FactName::Payload))?
        .map_err(|error| Doubt::Unreadable {
            name: FactName::Payload,
            why: error.to_string(),
        })
}

/// What the environment says, before anything is compared.
#[derive(Default)]
struct EnvClaims {
    event_name: Option<String>,
    event_path: Option<PathBuf>,
    git_ref: Option<String>,
    ref_type: Option<String>,
    ref_protected: bool,
    repository: Option<String>,
    default_branch: Option<String>,
    /// The payload's word on the repository is enough: there is no environment to compare it with.
    payload_names_repository: bool,
}

impl EnvClaims {
    fn from_env(env: &Env) -> Self {
        let text = |name| env.get(name).map(str::to_owned);
        Self {
            event_name: text("GITHUB_EVENT_NAME"),
            event_path: env.path("GITHUB_EVENT_PATH"),
            git_ref: text("GITHUB_REF"),
            ref_type: text("GITHUB_REF_TYPE"),
            ref_protected: env.get("GITHUB_REF_PROTECTED") == Some("true"),
            repository: text("GITHUB_REPOSITORY"),
            default_branch: None,
            payload_names_repository: false,
        }
    }

    fn or_recorded(mut self, recorded: &Recorded) -> Self {
        if recorded.git_ref.is_some() {
            self.git_ref.clone_from(&recorded.git_ref);
            (self.ref_type, self.ref_protected) = (None, false);
        }
        self.ref_protected = recorded.ref_protected.unwrap_or(self.ref_protected);
        self.event_name = recorded.event_name.clone().or(self.event_name);
        self.event_path = recorded.event_path.clone().or(self.event_path);
        self.repository = recorded.repository.clone().or(self.repository);
        self.default_branch.clone_from(&recorded.default_branch);
        self.payload_names_repository = recorded.event_path.is_some() && self.repository.is_none();
        self
    }

    fn job(&self, payload: &Fact<Payload>) -> Job {
        let event = self.event(payload);
        Job {
            repository: self.repository(payload),
            default_branch: self.default_branch(payload),
            git_ref: self.git_ref(event.as_ref().ok(), payload),
            ref_protected: self.ref_protected,
            removes_ref: removes_ref(event.as_ref().ok(), payload),
            event,
        }
    }

    /// The environment names the event; the payload must not look like another's.
    fn event(&self, payload: &Fact<Payload>) -> Fact<Event> {
        let event = Event::from_name(
            self.event_name
                .as_deref()
                .ok_or(Doubt::Missing(FactName::Event))?,
        );
        let own: &[&str] = match event {
            Event::Push | Event::Schedule | Event::WorkflowDispatch => &[],
            Event::MergeGroup => &["action", "merge_group"],
            // No other event gains anything by its payload.
            _ => return Ok(event),
        };
        let marks = payload
            .as_ref()
            .map(|payload| payload.marks.as_slice())
            .unwrap_or_default();
        match marks.iter().find(|mark| !own.contains(mark)) {
            None => Ok(event),
            Some(mark) => Err(Doubt::Disagree {
                name: FactName::Event,
                one: format!("the environment says `{event}`"),
                other: format!("the payload has `{mark}`, which belongs to other events"),
            }),
        }
    }

    fn repository(&self, payload: &Fact<Payload>) -> Fact<String> {
        let payload = payload.as_ref().map_err(Clone::clone)?;
        let claimed = if self.payload_names_repository {
            payload.repository.as_ref()
        } else {
            self.repository.as_ref()
        };
        let claimed = claimed.ok_or(Doubt::Missing(FactName::Repository))?;
        let whole = claimed.split('/').count() == 2
            && claimed.split('/').all(|part| !part.is_empty())
            && is_plain(claimed);
        if !whole {
            return Err(unreadable(FactName::Repository, claimed, "`owner/name`"));
        }
        // GitHub ignores case in names. We do not: it writes both in one way.
        agree(FactName::Repository, claimed, payload.repository.as_deref())
    }

    fn default_branch(&self, payload: &Fact<Payload>) -> Fact<String> {
        let payload = payload.as_ref().map_err(Clone::clone)?;
        let claimed = payload
            .default_branch
            .as_deref()
            .or(self.default_branch.as_deref());
        let claimed = claimed
            .filter(|name| !name.is_empty())
            .ok_or(Doubt::Missing(FactName::DefaultBranch))?;
        match self.default_branch.as_deref() {
            _ if !is_plain(claimed) => Err(unreadable(
                FactName::DefaultBranch,
                claimed,
                "a branch name",
            )),
            Some(other) if other != claimed => {
                Err(disagree(FactName::DefaultBranch, other, claimed))
            }
            _ => Ok(claimed.to_owned()),
        }
    }

    fn git_ref(&self, event: Option<&Event>, payload: &Fact<Payload>) -> Fact<String> {
        let claimed = self
            .git_ref
            .as_deref()
            .ok_or(Doubt::Missing(FactName::Ref))?;
        if !claimed.starts_with("refs/") || !is_plain(claimed) {
            return Err(unreadable(
                FactName::Ref,
                claimed,
                "a full ref such as `refs/heads/main`",
            ));
        }
        let of_its_kind = match self.ref_type.as_deref() {
            Some("branch") => !claimed.starts_with("refs/tags/"),
            Some("tag") => claimed.starts_with("refs/tags/"),
            Some(_) => false,
            None => true,
        };
        if !of_its_kind {
            return Err(Doubt::Disagree {
                name: FactName::Ref,
                one: format!("`GITHUB_REF` says `{}`", shown(claimed)),
                other: format!(
                    "`GITHUB_REF_TYPE` says `{}`",
                    shown(self.ref_type.as_deref().unwrap_or_default())
                ),
            });
        }
        let payload = payload.as_ref().map_err(Clone::clone)?;
        match event {
            Some(Event::Push | Event::WorkflowDispatch) => {
                agree(FactName::Ref, claimed, payload.git_ref.as_deref())
            }
            Some(Event::MergeGroup) => agree(FactName::Ref, claimed, payload.queue_ref.as_deref()),
            Some(Event::Schedule) => agree(
                FactName::Ref,
                claimed,
                payload.git_ref.as_deref().or(Some(claimed)),
            ),
            // Other events' payloads name other refs, or mean something else by it.
            _ => Ok(claimed.to_owned()),
        }
    }
}

/// Of `deleted` and `after` a push must have one at least, and none may say that the ref is gone.
fn removes_ref(event: Option<&Event>, payload: &Fact<Payload>) -> Fact<bool> {
    let payload = payload.as_ref().map_err(Clone::clone)?;
    let gone = payload.after.as_deref().map(is_no_object).transpose()?;
    match (payload.deleted, gone) {
        (None, None) if event == Some(&Event::Push) => Err(Doubt::Missing(FactName::After)),
        (deleted, gone) => Ok(deleted == Some(true) || gone == Some(true)),
    }
}

/// Whether an object id is the one of no object: all zeros.
fn is_no_object(id: &str) -> Fact<bool> {
    let is_id = matches!(id.len(), 40 | 64) && id.bytes().all(|digit| digit.is_ascii_hexdigit());
    if is_id {
        Ok(id.bytes().all(|digit| digit == b'0'))
    } else {
        Err(unreadable(FactName::After, id, "an object id"))
    }
}

fn agree(name: FactName, claimed: &str, payload: Option<&str>) -> Fact<String> {
    match payload {
        Some(same) if same == claimed => Ok(claimed.to_owned()),
        Some(other) => Err(disagree(name, claimed, other)),
        None => Err(Doubt::Missing(name)),
    }
}

fn disagree(name: FactName, claimed: &str, payload: &str) -> Doubt {
    Doubt::Disagree {
        name,
        one: format!("the environment says `{}`", shown(claimed)),
        other: format!("the payload says `{}`", shown(payload)),
    }
}

fn unreadable(name: FactName, claimed: &str, expected: &str) -> Doubt {
    Doubt::Unreadable {
        name,
        why: format!("`{}` is not {expected}", shown(claimed)),
    }
}

/// Whether a name holds only what git lets a ref hold (git-check-ref-format), so that it can be shown as it is.
fn is_plain(name: &str) -> bool {
    !name
        .chars()
        .any(|c| c.is_control() || c.is_whitespace() || "~^:?*[\\`".contains(c))
}

#[cfg(test)]
mod tests;
