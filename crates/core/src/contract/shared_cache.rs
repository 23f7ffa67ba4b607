//! The shared-cache contract for Bazel: which mode follows from a job's hints, whether it is the declared one, and what
//! is wrong with the endpoints. Pure; whether the endpoints answer is tried elsewhere.

use std::fmt;

use serde::de::{self, Deserialize, Deserializer};
use serde::ser::{Serialize, Serializer};
use url::{Host, Url};

use crate::contract::SharedCache;
use crate::text::{nearest, one_line};

/// The schemes that Bazel knows.
const SCHEMES: [&str; 4] = ["grpc", "grpcs", "http", "https"];

/// How a build uses a shared cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Only with the local cache of the machine.
    CompatibilityLocalOnly,
    /// With a shared cache.
    SharedCacheBacked,
    /// With a shared cache and a remote executor.
    ExecutorBacked,
}

impl Mode {
    /// Every mode, by its name.
    pub const ALL: [(&str, Self); 3] = [
        ("compatibility-local-only", Self::CompatibilityLocalOnly),
        ("shared-cache-backed", Self::SharedCacheBacked),
        ("executor-backed", Self::ExecutorBacked),
    ];

    pub fn as_str(self) -> &'static str {
        Self::ALL
            .into_iter()
            .find(|(_, mode)| *mode == self)
            .expect("every mode has a name")
            .0
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl<'de> Deserialize<'de> for Mode {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let names = Self::ALL.map(|(name, _)| name);
        let found = Self::ALL
            .into_iter()
            .find(|(name, _)| *name == text)
            .map(|(_, mode)| mode);
        found.ok_or_else(|| {
            let meant = nearest(&text, names)
                .map(|name| format!("; did you mean `{name}`?"))
                .unwrap_or_default();
            de::Error::custom(format!(
                "`{}` is no mode ({}){meant}",
                one_line(&text, 80),
                names.join(", ")
            ))
        })
    }
}

impl Serialize for Mode {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

/// The state of the runner's profile, from the hint `GF_FLYWHEEL_PROFILE_STATE`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ProfileState {
    Unattached,
    SharedCacheBacked,
    ExecutorBacked,
    LocalProof,
}

impl ProfileState {
    const ALL: [(&str, Self); 4] = [
        ("unattached", Self::Unattached),
        ("shared-cache-backed", Self::SharedCacheBacked),
        ("executor-backed", Self::ExecutorBacked),
        ("local-proof", Self::LocalProof),
    ];
}

impl SharedCache {
    /// The schemes that an endpoint may have.
    pub(crate) fn schemes(&self) -> Vec<String> {
        self.schemes
            .clone()
            .unwrap_or_else(|| SCHEMES.map(str::to_owned).into())
    }
}

/// The inputs of the rules.
#[derive(Clone, Debug, Default)]
pub struct Given {
    /// `BAZEL_REMOTE_CACHE`.
    pub cache: Option<String>,
    /// `BAZEL_REMOTE_EXECUTOR`.
    pub executor: Option<String>,
    /// `ATTIC_SERVER`.
    pub attic: Option<String>,
    /// The mode that an input declares, if the repository's file does not.
    pub mode: Option<Mode>,
    /// The runner's hint `GF_BAZEL_SUBSTRATE_MODE`.
    pub hinted_mode: Option<String>,
    /// `GF_FLYWHEEL_PROFILE_STATE`.
    pub state: Option<String>,
    /// The class of the builder, if it is known.
    pub class: Option<String>,
    /// Whether an unknown class, a missing endpoint and one that does not answer are errors too.
    pub strict: bool,
}

/// Something that breaks the contract, or may.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Finding {
    /// Whether this breaks the contract; if not, it is a warning.
    pub error: bool,
    /// The subject: `mode`, `cache`, `executor`, `attic`, `profile-state`, `class`.
    pub about: &'static str,
    /// What is wrong. Holds no credentials.
    pub text: String,
}

impl Finding {
    fn error(about: &'static str, text: impl Into<String>) -> Self {
        Self {
            error: true,
            about,
            text: text.into(),
        }
    }
}

/// An endpoint that is well formed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// `cache`, `executor` or `attic`.
    pub about: &'static str,
    /// The address, with its credentials.
    pub url: Url,
}

/// The result of the rules.
#[derive(Clone, Debug, Default)]
pub struct Judgement {
    /// The mode that the repository or an input declares.
    pub declared: Option<Mode>,
    /// What declares it.
    pub declared_by: &'static str,
    /// The mode that follows from the endpoints.
    pub actual: Option<Mode>,
    pub findings: Vec<Finding>,
    /// The endpoints that are well formed, and so can be tried.
    pub endpoints: Vec<Endpoint>,
}

impl Judgement {
    /// Whether the contract holds.
    pub fn holds(&self) -> bool {
        !self.findings.iter().any(|finding| finding.error)
    }

    /// Adds the problem of an endpoint that was tried, if it had one; it is an error only with `strict`.
    pub fn add_problem(&mut self, about: &'static str, problem: Option<String>, strict: bool) {
        self.findings.extend(problem.map(|text| Finding {
            error: strict,
            about,
            text,
        }));
    }
}

/// Applies every rule that needs no network.
pub fn judge(declared: &SharedCache, given: &Given) -> Judgement {
    let mut judgement = Judgement::default();
    let (mode, by) = match (declared.mode, given.mode) {
        (Some(mode), _) => (mode, "flywheel.yml"),
        (None, Some(mode)) => (mode, "the input `expected-mode`"),
        (None, None) => (Mode::SharedCacheBacked, "default"),
    };
    (judgement.declared, judgement.declared_by) = (Some(mode), by);
    let actual = match (&given.cache, &given.executor) {
        (None, _) => Mode::CompatibilityLocalOnly,
        (Some(_), None) => Mode::SharedCacheBacked,
        (Some(_), Some(_)) => Mode::ExecutorBacked,
    };
    judgement.actual = Some(actual);
    let mut found = Vec::new();
    if mode != actual {
        found.push(Finding::error(
            "mode",
            format!("declared is `{mode}` ({by}), but the endpoints make it `{actual}`"),
        ));
    }
    found.extend(hinted(given, mode));
    found.extend(state(given, actual));
    for (about, text) in [
        ("cache", &given.cache),
        ("executor", &given.executor),
        ("attic", &given.attic),
    ] {
        match text
            .as_ref()
            .map(|text| endpoint(about, text, declared, given))
        {
            Some(Ok(url)) => judgement.endpoints.push(Endpoint { about, url }),
            Some(Err(problem)) => found.push(Finding::error(about, problem)),
            None => {}
        }
    }
    found.extend(together(declared, given, &judgement.endpoints));
    if given.strict && given.class.is_none() {
        found.push(Finding::error(
            "class",
            "no capability class of the runner is known; give `class`",
        ));
    }
    if given.strict && given.cache.is_none() {
        found.push(Finding::error("cache", "`BAZEL_REMOTE_CACHE` is empty"));
    }
    judgement.findings = found;
    judgement
}

/// Checks the runner's hint of the mode.
fn hinted(given: &Given, mode: Mode) -> Option<Finding> {
    let hint = given.hinted_mode.as_deref()?;
    let known = Mode::ALL.into_iter().find(|(name, _)| *name == hint);
    match known {
        Some((_, hinted)) if hinted == mode => None,
        Some((name, _)) => Some(Finding::error(
            "mode",
            format!("declared is `{mode}`, but the runner's `GF_BAZEL_SUBSTRATE_MODE` is `{name}`"),
        )),
        None => {
            let meant = nearest(hint, Mode::ALL.map(|(name, _)| name));
            let meant = meant
                .map(|name| format!("; did you mean `{name}`?"))
                .unwrap_or_default();
            Some(Finding::error(
                "mode",
                format!(
                    "`GF_BAZEL_SUBSTRATE_MODE` is no mode: `{}`{meant}",
                    shown(hint)
                ),
            ))
        }
    }
}

fn state(given: &Given, actual: Mode) -> Option<Finding> {
    let text = given.state.as_deref()?;
    let error = |problem: String| Some(Finding::error("profile-state", problem));
    let Some((name, state)) = ProfileState::ALL
        .into_iter()
        .find(|(name, _)| *name == text)
    else {
        let names = ProfileState::ALL.map(|(name, _)| name);
        let meant = nearest(text, names)
            .map(|name| format!("; did you mean `{name}`?"))
            .unwrap_or_default();
        return error(format!(
            "`GF_FLYWHEEL_PROFILE_STATE` is unknown: `{}`{meant}",
            shown(text)
        ));
    };
    let fits = match state {
        ProfileState::Unattached => actual == Mode::CompatibilityLocalOnly,
        ProfileState::SharedCacheBacked => actual == Mode::SharedCacheBacked,
        ProfileState::ExecutorBacked => actual == Mode::ExecutorBacked,
        // A proof on the local machine: without endpoints, or with local ones.
        ProfileState::LocalProof => [&given.cache, &given.executor]
            .into_iter()
            .flatten()
            .all(|text| is_local(text)),
    };
    if fits {
        None
    } else {
        error(format!(
            "the profile state `{name}` contradicts the endpoints, which make it `{actual}`"
        ))
    }
}

fn is_local(text: &str) -> bool {
    parse(text).is_ok_and(|url| local(&url))
}

/// Checks the two Bazel endpoints against each other.
fn together(declared: &SharedCache, given: &Given, endpoints: &[Endpoint]) -> Option<Finding> {
    if given.executor.is_some() && given.cache.is_none() {
        return Some(Finding::error(
            "executor",
            "`BAZEL_REMOTE_EXECUTOR` is given without `BAZEL_REMOTE_CACHE`",
        ));
    }
    let address = |about: &str| {
        let url = &endpoints
            .iter()
            .find(|endpoint| endpoint.about == about)?
            .url;
        Some((
            url.host_str().map(str::to_lowercase),
            url.port_or_known_default(),
        ))
    };
    let differ = matches!((address("cache"), address("executor")), (Some(cache), Some(executor)) if cache != executor);
    (differ && !declared.allow_separate_executor.unwrap_or_default()).then(|| {
        Finding::error(
            "executor",
            "the executor is elsewhere than the cache, which `allow-separate-executor` has to allow",
        )
    })
}

fn endpoint(about: &str, text: &str, declared: &SharedCache, given: &Given) -> Result<Url, String> {
    let (name, schemes) = match about {
        "cache" => ("BAZEL_REMOTE_CACHE", declared.schemes()),
        "executor" => ("BAZEL_REMOTE_EXECUTOR", declared.schemes()),
        _ => ("ATTIC_SERVER", ["http", "https"].map(str::to_owned).into()),
    };
    if text.contains("${") {
        return Err(format!(
            "`{name}` holds a literal `${{…}}`: nothing expands variables there, and Bazel's rc files do not either"
        ));
    }
    let scheme = text
        .split_once("://")
        .map(|(scheme, _)| scheme.to_ascii_lowercase());
    if !scheme
        .as_ref()
        .is_some_and(|scheme| schemes.contains(scheme))
    {
        let has = scheme.map_or("none".to_owned(), |scheme| format!("`{}`", shown(&scheme)));
        return Err(format!(
            "`{name}` must begin with {}, and its scheme is {has}",
            schemes.join(", ")
        ));
    }
    let url = parse(text).map_err(|problem| format!("`{name}` is no address: {problem}"))?;
    let proof = given.state.as_deref() == Some("local-proof");
    if local(&url) && !declared.allow_localhost.unwrap_or_default() {
        let advice = if proof {
            " (a `local-proof` needs it too)"
        } else {
            ""
        };
        return Err(format!(
            "`{name}` is on the machine itself, which `allow-localhost` has to allow{advice}"
        ));
    }
    Ok(url)
}

fn parse(text: &str) -> Result<Url, String> {
    let url = Url::parse(text).map_err(|error| error.to_string())?;
    if url.host_str().is_none_or(str::is_empty) {
        Err("it names no host".to_owned())
    } else {
        Ok(url)
    }
}

/// Whether the host is `localhost`, `127.0.0.0/8`, `::1`, `0.0.0.0` or `::`. For other schemes than the web's, `url`
/// leaves a host as text, so it is parsed here.
fn local(url: &Url) -> bool {
    let host = url
        .host_str()
        .unwrap_or_default()
        .trim_start_matches('[')
        .trim_end_matches(']');
    let host = host.trim_end_matches('.').to_ascii_lowercase();
    let address = match Host::parse(url.host_str().unwrap_or_default()) {
        Ok(Host::Ipv4(address)) => Some(address.into()),
        Ok(Host::Ipv6(address)) => Some(std::net::IpAddr::from(address).to_canonical()),
        _ => host.parse::<std::net::IpAddr>().ok(),
    };
    let named = host == "localhost" || host.ends_with(".localhost");
    named || address.is_some_and(|address| address.is_loopback() || address.is_unspecified())
}

/// An address for people: scheme, host, port and path, without user, password, query and fragment.
pub fn redact(text: &str) -> String {
    let Ok(url) = parse(text) else {
        return "(not an address)".to_owned();
    };
    let port = url
        .port()
        .map(|port| format!(":{port}"))
        .unwrap_or_default();
    let path = if url.path() == "/" { "" } else { url.path() };
    one_line(
        &format!(
            "{}://{}{port}{path}",
            url.scheme(),
            url.host_str().unwrap_or_default()
        ),
        200,
    )
}

/// A value of the environment for a message. One that may hold a password is not shown.
fn shown(text: &str) -> String {
    if text.contains('@') {
        "…".to_owned()
    } else {
        one_line(text, 80)
    }
}

/// The lines of a `.bazelrc` for this mode. `upload`: whether the caller asked for uploads and the trust gate allows
/// them. Addresses are written without credentials, which must not go to the disk.
pub fn bazelrc(mode: Mode, cache: Option<&str>, executor: Option<&str>, upload: bool) -> String {
    let mut lines = vec![format!("# {mode}")];
    if mode == Mode::CompatibilityLocalOnly {
        lines.push("build --remote_cache=".to_owned());
    } else {
        lines.extend(cache.map(|cache| format!("build --remote_cache={}", redact(cache))));
        lines.push(format!("build --remote_upload_local_results={upload}"));
        // With a disk cache, a build could pass without the remote cache having worked.
        lines.push("build --disk_cache=".to_owned());
        // A cache may evict an output while it still has the action's result. Bazel 7 ends such a build with exit code 39,
        // unless it may begin again. Known since Bazel 6.2.
        lines.push("build --experimental_remote_cache_eviction_retries=5".to_owned());
    }
    if mode == Mode::ExecutorBacked {
        lines.extend(
            executor.map(|executor| format!("build --remote_executor={}", redact(executor))),
        );
    }
    lines.push(String::new());
    lines.join("\n")
}

#[cfg(test)]
mod tests;
