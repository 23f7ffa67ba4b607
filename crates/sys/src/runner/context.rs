//! The facts of a GitHub job, from the environment and the event payload: the event, the repository, the ref. This
//! module reads and compares them. A fact that is missing, unreadable or contradictory stays in doubt; none is ever
//! guessed. `trust` decides what follows.

use std::path::PathBuf;

use url::Url;

use crate::runner::env::Env;
use crate::runner::event::{self, Payload, PayloadError};
use crate::runner::gitlab;
use flywheel_core::exit::{VerbError, named_file_error};
use flywheel_core::secret::Secret;
use flywheel_core::trust::facts::{Doubt, Event, Fact, FactName, Facts, Job, shown};

/// The default branch as the actions pass it, from `github.event.repository.default_branch`. The runner fills that in from
/// what the server sent it, and not from the file at `GITHUB_EVENT_PATH`, which every earlier step can write. Where the
/// binary is called by hand, it is missing.
const DEFAULT_BRANCH_OF_THE_EVENT: &str = "FLYWHEEL_EVENT_DEFAULT_BRANCH";

/// A recorded event. Each value that is given replaces the job's own.
#[derive(Clone, Debug, Default)]
pub struct Recorded {
    pub event_name: Option<String>,
    /// The file with the event's payload.
    pub event_path: Option<PathBuf>,
    /// The full ref. If it is given, all variables about the job's own ref are ignored.
    pub git_ref: Option<String>,
    /// Whether a rule protects that ref.
    pub ref_protected: Option<bool>,
    /// `owner/name`. Without it and outside of a job, the payload's repository is used.
    pub repository: Option<String>,
    /// The default branch, if the payload lacks it.
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

/// The facts of the job that this process belongs to.
pub fn facts(env: &Env) -> Facts {
    match ci_provider(env) {
        CiProvider::Local => Facts::Local,
        CiProvider::OtherCi(name) => Facts::OtherCi(name.to_owned()),
        CiProvider::GitLab => Facts::Job(Box::new(gitlab::job(env))),
        CiProvider::GitHub => {
            // A job without a readable payload is still a job: its facts are then in doubt.
            let claims = EnvClaims::from_env(env);
            let payload_file = claims.event_path.as_deref().map(event::read);
            Facts::Job(Box::new(claims.job(&payload(payload_file))))
        }
    }
}

/// `GITHUB_API_URL` is set and is no address. The value is not part of the message, since it can hold a password.
#[derive(Debug, thiserror::Error)]
#[error(
    "`GITHUB_API_URL` is not the address of an API, such as `https://github.example.org/api/v3`"
)]
pub struct ApiUrlError;

/// The URL of GitHub's API: `GITHUB_API_URL`, where GitHub Enterprise Server has its own, else the public one.
///
/// # Errors
/// When the variable is no URL of HTTP. The public API is no substitute then, because the token belongs to the server.
pub fn github_api(env: &Env) -> Result<Url, ApiUrlError> {
    let named = env.get("GITHUB_API_URL");
    let url = Url::parse(named.unwrap_or("https://api.github.com")).map_err(|_| ApiUrlError)?;
    let is_http = matches!(url.scheme(), "http" | "https");
    is_http.then_some(url).ok_or(ApiUrlError)
}

/// The repository that a CI's job belongs to, `owner/name`; `None` outside of CI.
pub fn repository(env: &Env) -> Option<String> {
    let named = ["GITHUB_REPOSITORY", "CI_PROJECT_PATH"];
    let found = named.into_iter().find_map(|name| env.get(name));
    found.filter(|_| in_ci(env)).map(str::to_owned)
}

/// Whether the job runs on a machine of GitHub's, which is made for one job and destroyed after it
/// (`RUNNER_ENVIRONMENT`, "Default environment variables" in GitHub's documentation).
pub fn is_hosted_runner(env: &Env) -> bool {
    env.get("RUNNER_ENVIRONMENT") == Some("github-hosted")
}

/// The repository and the commit that this job's Check Runs belong to. For a pull request that is the head of its
/// branch, because the job has checked out a merge commit. `None` outside of a job.
pub fn commit(env: &Env) -> Option<(String, String)> {
    let repository = env.get("GITHUB_REPOSITORY")?.to_owned();
    let of_branch = || {
        let payload = event::read_bounded(&env.path("GITHUB_EVENT_PATH")?).ok()?;
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

/// The facts of a recorded event; without any recorded value, those of this process's job.
///
/// # Errors
/// When the file `event_path` cannot be read at all. Bad content only puts facts in doubt.
pub fn recorded(env: &Env, recorded: &Recorded) -> Result<Facts, VerbError> {
    if !recorded.is_given() {
        return Ok(facts(env));
    }
    let claims = EnvClaims::from_env(env).or_recorded(recorded);
    let payload_file = claims.event_path.as_deref().map(event::read);
    // A file that the user named is an input, and its absence a usage error. The job's own file is only a fact.
    if let (Some(file), Some(Err(error))) = (&recorded.event_path, &payload_file)
        && let Some(error) = error.of_the_file()
    {
        let hint = "Give the file with the event's payload, such as a copy of the file that `GITHUB_EVENT_PATH` names.";
        return Err(named_file_error("event-path", file, "be read", error, hint));
    }
    Ok(Facts::Job(Box::new(claims.job(&payload(payload_file)))))
}

/// Whether the job has a cache token. The token's value is not returned.
pub fn token_present(env: &Env) -> bool {
    cache_token(env).is_some()
}

/// The cache's token, in `ATTIC_TOKEN`. The text of an embedded cache's tokens file, or a line of it, is taken for the
/// token in it: the file is what people have at hand.
pub fn cache_token(env: &Env) -> Option<Secret> {
    token_in_text(env.get("ATTIC_TOKEN")?)
}

/// The token that a text is, or has in a line of a tokens file.
pub fn token_in_text(text: &str) -> Option<Secret> {
    let text = Secret::new(text)?;
    // A token that may write may read as well.
    let found = ["write", "read"].iter().find_map(|scope| {
        let mut lines = text.expose().lines();
        lines.find_map(|line| token_in(line, scope))
    });
    match found {
        Some(token) => Secret::new(token),
        None => Some(text),
    }
}

/// The token of a line of such a file, if the line has this scope.
fn token_in<'a>(line: &'a str, scope: &str) -> Option<&'a str> {
    let line = line.split('#').next().unwrap_or_default();
    let mut words = line.split_whitespace();
    let has_scope = words.next() == Some(scope);
    // Of a token that is stored as a hash, the file does not have the token.
    words
        .next()
        .filter(|token| has_scope && !token.starts_with("sha256:"))
}

enum CiProvider {
    Local,
    OtherCi(&'static str),
    GitHub,
    GitLab,
}

/// Variables that other CI systems set. `CI` alone proves nothing: people, containers and test runs set it, too, and
/// their `--publish` is as deliberate as on any laptop.
const OTHER_CI: [(&str, &str); 7] = [
    ("JENKINS_URL", "Jenkins"),
    ("BUILDKITE", "Buildkite"),
    ("CIRCLECI", "CircleCI"),
    ("TRAVIS", "Travis CI"),
    ("TF_BUILD", "Azure Pipelines"),
    ("TEAMCITY_VERSION", "TeamCity"),
    ("DRONE", "Drone"),
];

/// A single variable of a CI is enough to count as that CI. The facts are then required, so that a job cannot pass for
/// a person's machine.
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
        // Choosing one of the two would be a guess.
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

/// Whether this process belongs to a job of any CI.
pub fn in_ci(env: &Env) -> bool {
    !matches!(ci_provider(env), CiProvider::Local)
}

/// The payload, or the reason why there is none.
fn payload(read: Option<Result<Payload, PayloadError>>) -> Fact<Payload> {
    read.ok_or(Doubt::Missing(FactName::Payload))?
        .map_err(|error| Doubt::Unreadable {
            name: FactName::Payload,
            why: error.to_string(),
        })
}

/// What the environment claims about the job, before it is compared with the payload.
#[derive(Default)]
struct EnvClaims {
    event_name: Option<String>,
    event_path: Option<PathBuf>,
    git_ref: Option<String>,
    ref_type: Option<String>,
    ref_protected: bool,
    repository: Option<String>,
    default_branch: Option<String>,
    /// The payload alone names the repository: a recorded event has no environment to compare it with.
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
            default_branch: text(DEFAULT_BRANCH_OF_THE_EVENT),
            payload_names_repository: false,
        }
    }

    fn or_recorded(mut self, recorded: &Recorded) -> Self {
        if recorded.git_ref.is_some() {
            self.git_ref.clone_from(&recorded.git_ref);
            // Both describe the job's own ref.
            (self.ref_type, self.ref_protected) = (None, false);
        }
        self.ref_protected = recorded.ref_protected.unwrap_or(self.ref_protected);
        self.event_name = recorded.event_name.clone().or(self.event_name);
        self.event_path = recorded.event_path.clone().or(self.event_path);
        self.repository = recorded.repository.clone().or(self.repository);
        // A recorded payload is another event's than the job's own.
        if recorded.event_path.is_some() || recorded.default_branch.is_some() {
            self.default_branch.clone_from(&recorded.default_branch);
        }
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

    /// The environment names the event; the payload must not have fields of other events.
    fn event(&self, payload: &Fact<Payload>) -> Fact<Event> {
        let event = Event::from_name(
            self.event_name
                .as_deref()
                .ok_or(Doubt::Missing(FactName::Event))?,
        );
        let own: &[&str] = match event {
            Event::Push | Event::Schedule | Event::WorkflowDispatch => &[],
            Event::MergeGroup => &["action", "merge_group"],
            // No other event may publish, so a false payload gains nothing.
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
        // Exactly one slash, with text on both sides.
        let whole = claimed.split('/').count() == 2
            && claimed.split('/').all(|part| !part.is_empty())
            && is_plain(claimed);
        if !whole {
            return Err(unreadable(FactName::Repository, claimed, "`owner/name`"));
        }
        // GitHub ignores case in names, but writes both in the same case, so they are compared exactly.
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
        // A recorded default branch fills a gap in the payload, but must not contradict it.
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
        // A second source for the kind of ref, which has to agree with the prefix.
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
            // The payload of a schedule may lack the ref; one that is there has to agree.
            Some(Event::Schedule) => agree(
                FactName::Ref,
                claimed,
                payload.git_ref.as_deref().or(Some(claimed)),
            ),
            // The payloads of other events have no such field, or one with another meaning.
            _ => Ok(claimed.to_owned()),
        }
    }
}

/// Whether the event removed its ref. The payload of a push must have at least one of `deleted` and `after`; either can
/// show the removal.
fn removes_ref(event: Option<&Event>, payload: &Fact<Payload>) -> Fact<bool> {
    let payload = payload.as_ref().map_err(Clone::clone)?;
    let gone = payload.after.as_deref().map(is_no_object).transpose()?;
    match (payload.deleted, gone) {
        (None, None) if event == Some(&Event::Push) => Err(Doubt::Missing(FactName::After)),
        (deleted, gone) => Ok(deleted == Some(true) || gone == Some(true)),
    }
}

/// Whether an object id is all zeros, which is the id of no object.
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

/// Whether a name has only the characters that git allows in a ref (git-check-ref-format), so that it can be shown as
/// it is.
fn is_plain(name: &str) -> bool {
    !name
        .chars()
        .any(|c| c.is_control() || c.is_whitespace() || "~^:?*[\\`".contains(c))
}

#[cfg(test)]
mod tests;
