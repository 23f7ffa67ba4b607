//! Inputs that several verbs share, each declared once, and the runner's hints that stand in for them.

pub(crate) mod nix;
pub(crate) mod parse;
pub(crate) mod roots;
pub(crate) mod units;
pub(crate) mod value;
pub(crate) mod variables;

use std::time::Duration;

use clap::{ArgAction, Args, ValueEnum};
use url::Url;

use crate::inputs::value::{Invalid, boolean, name, one_of, text, value, variant};
use flywheel_cache::client::verify::Mode;
use flywheel_core::text::one_line;
use flywheel_core::trust::{PushCache, Request, TrustedRefs};
use flywheel_nix::cache_name::CacheName;
use flywheel_nix::key::PublicKey;
use flywheel_sys::runner::env::Env;

/// The help heading of flags that people give by hand: an action has no input for them.
pub(crate) const BY_HAND: &str = "By hand";
/// The group of the flag that the callers of an action must give, although a command line has another way
/// to the same end.
pub(crate) const REQUIRED_IN_ACTION: &str = "required-in-action";

/// How long publishing and verifying may take at the end, unless an input names another time.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(300);
/// No publication that takes longer than a day is waited for; GitHub ends jobs after six hours.
const DRAIN_LIMIT: Duration = Duration::from_secs(24 * 60 * 60);

/// How a verb prints its result.
#[derive(Args, Clone, Debug)]
pub(crate) struct FormatInput {
    /// How to print the result on stdout.
    #[arg(
        long,
        value_name = "FORMAT",
        value_parser = variant::<Format>(),
        default_value = "text",
        help_heading = BY_HAND
    )]
    pub(crate) format: Format,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// Lines for people.
    Text,
    /// One JSON document for programs.
    Json,
}

/// The time for the end of a job.
#[derive(Args, Clone, Debug)]
pub(crate) struct DrainInput {
    /// How long publishing and verifying may take at the end, such as `10m`; a bare number counts
    /// seconds. Where nothing moves for 30 s they end before that (default: `300`).
    #[arg(long, value_name = "TIME", value_parser = value(drain_timeout))]
    pub(crate) drain_timeout: Option<Duration>,
}

impl DrainInput {
    /// The time that holds.
    pub(crate) fn or_default(&self) -> Duration {
        self.drain_timeout.unwrap_or(DRAIN_TIMEOUT)
    }
}

fn drain_timeout(text: &str) -> Result<Duration, Invalid> {
    let time = units::duration(text)?;
    if (Duration::from_secs(1)..=DRAIN_LIMIT).contains(&time) {
        return Ok(time);
    }
    let problem = format!(
        "must be from one second to one day, not `{}`",
        one_line(text, 40)
    );
    Err(Invalid::new(problem).with_hint("Give seconds, or a time such as `10m`."))
}

/// How far verification goes.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Publication")]
pub(crate) struct VerifyInput {
    /// How far verification goes. `full` looks up every path in the cache and reads every body, also of paths that were
    /// there already. `sample` looks up every path that was sent, and reads the bodies of all of them up to 256 MiB, above
    /// that a random sample over all sizes; of the paths that were there already it reads four bodies. `off` looks up
    /// nothing. A path that the cache has damaged is sent anew.
    #[arg(
        long,
        value_name = "HOW",
        value_parser = one_of(&VERIFY),
        default_value = "sample"
    )]
    pub(crate) verify: Mode,
}

/// What the input `verify` can be.
const VERIFY: [(&str, Mode); 3] = [
    ("full", Mode::Full),
    ("sample", Mode::Sample),
    ("off", Mode::Off),
];

/// The runners to move to when memory runs out.
#[derive(Args, Clone, Debug)]
pub(crate) struct HeavyLaneInput {
    /// The label of the runners to move to when memory runs out, such as `nix-heavy`; the report names
    /// it (default: none).
    #[arg(long, value_name = "LABEL", value_parser = name())]
    pub(crate) heavy_lane: Option<String>,
}

/// The flake to evaluate.
#[derive(Args, Clone, Debug)]
pub(crate) struct FlakeInput {
    /// The flake to evaluate, such as `./services` or `github:owner/repo` (default: `.`; the canary
    /// evaluates `.` only if it has a `flake.nix`).
    #[arg(long, value_name = "REF", value_parser = text())]
    pub(crate) flake: Option<String>,
}

/// The class of a builder.
#[derive(Args, Clone, Debug)]
pub(crate) struct ClassInput {
    /// The class of this builder in the contract, such as `general`, `container` or `kernel` (default:
    /// `nix-builder` for the canary; `cache-contract` knows none without it).
    #[arg(long, value_name = "NAME", value_parser = text())]
    pub(crate) class: Option<String>,
}

/// Bazel's remote cache. `setup` takes only an address that is well formed; the checks report one that is
/// not, so that the text is kept as it is.
#[derive(Args, Clone, Debug)]
pub(crate) struct BazelCacheInput {
    /// The Bazel remote cache, a URL of `grpc`, `grpcs`, `http` or `https` such as
    /// `grpcs://bazel-cache.example.org:9092` (default: the runner's hint `BAZEL_REMOTE_CACHE`).
    #[arg(long, value_name = "URL", value_parser = text())]
    pub(crate) bazel_remote_cache: Option<String>,
}

/// The inputs that name a cache, and whether to use it.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Cache")]
pub(crate) struct CacheInputs {
    /// Whether to use a cache at all; `false` switches off `cache` and `embedded-cache`, too.
    #[arg(
        long,
        value_name = "BOOL",
        action = ArgAction::Set,
        value_parser = boolean(),
        default_value = "true"
    )]
    pub(crate) attic_enabled: bool,

    #[command(flatten)]
    pub(crate) server: ServerInputs,
}

/// The inputs that name a cache.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Cache")]
pub(crate) struct ServerInputs {
    /// The cache server's address, such as `https://attic.example.org/` (default: the runner's hint
    /// `ATTIC_SERVER`; without both there is no cache server).
    #[arg(long, value_name = "URL", value_parser = value(|text| http_address(text).map_err(or_hint)))]
    pub(crate) attic_server: Option<Address>,

    /// The cache's name on the server, such as `team` (default: the runner's hint `ATTIC_CACHE`, then `main`).
    #[arg(long, value_name = "NAME", value_parser = value(|text| cache_name(text).map_err(or_hint)))]
    pub(crate) attic_cache: Option<CacheName>,

    /// The cache's public key, such as `main:6NCHdD59X431…=`; without a key Nix refuses every hit
    /// (default: the runner's hint `ATTIC_PUBLIC_KEY`).
    #[arg(long, value_name = "KEY", value_parser = value(|text| public_key(text).map_err(or_hint)))]
    pub(crate) attic_public_key: Option<PublicKey>,
}

/// A malformed input that has a hint in the environment beside it.
pub(crate) fn or_hint(problem: String) -> Invalid {
    Invalid::new(problem).with_hint("Correct it, or leave it out to use the runner's own hint.")
}

/// The address of a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Address {
    /// As it was written: what is exported to later steps is not changed by parsing.
    pub(crate) text: String,
    /// As it was understood.
    pub(crate) url: Url,
}

/// What inputs and hints name of a cache. An input goes before the hint of the same name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NamedCache {
    /// Whether it is to be used at all.
    pub(crate) enabled: bool,
    /// The server that the input names.
    pub(crate) given: Option<Url>,
    /// The server that the hint names.
    pub(crate) hinted: Option<Url>,
    /// The cache's name there; `None` where only a malformed hint names it. Then no cache is used: the default's name
    /// would be another cache's.
    pub(crate) name: Option<CacheName>,
    /// The key by which Nix is to trust it.
    pub(crate) key: Option<PublicKey>,
    /// Hints that are malformed and therefore not used: a sentence each.
    pub(crate) bad_hints: Vec<String>,
}

impl CacheInputs {
    /// What inputs and hints name. A malformed hint is not used, and is among `bad_hints`.
    pub(crate) fn resolve(&self, env: &Env) -> NamedCache {
        let mut hints = Hints::from_env(env);
        let ServerInputs {
            attic_server,
            attic_cache,
            attic_public_key,
        } = self.server.clone();
        NamedCache {
            enabled: self.attic_enabled,
            // Both are kept: the embedded cache comes between an input and a hint.
            given: attic_server.map(|server| server.url),
            hinted: hints
                .get("ATTIC_SERVER", http_address)
                .map(|server| server.url),
            // A hint that an input overrides is not read, so it is no bad hint either.
            name: attic_cache.or_else(|| hints.cache_name()),
            key: attic_public_key.or_else(|| hints.get("ATTIC_PUBLIC_KEY", public_key)),
            bad_hints: hints.bad,
        }
    }
}

/// The runner's hints. A malformed one is not used, and is among `bad`.
#[derive(Debug)]
pub(crate) struct Hints<'a> {
    env: &'a Env,
    /// A sentence about each malformed one.
    pub(crate) bad: Vec<String>,
}

impl<'a> Hints<'a> {
    /// The hints in this environment.
    pub(crate) fn from_env(env: &'a Env) -> Self {
        Self {
            env,
            bad: Vec::new(),
        }
    }

    /// The name of a cache on its server, by default `main`; `None` if the hint is malformed.
    pub(crate) fn cache_name(&mut self) -> Option<CacheName> {
        let bad_before = self.bad.len();
        let named = self.get("ATTIC_CACHE", cache_name);
        if let Some(bad) = self.bad.get_mut(bad_before) {
            bad.push_str(", so no cache is used: give its name as `attic-cache`");
            return None;
        }
        Some(named.unwrap_or_default())
    }

    /// The hint of this name, if there is one and it is well-formed.
    pub(crate) fn get<T>(
        &mut self,
        name: &str,
        read: impl Fn(&str) -> Result<T, String>,
    ) -> Option<T> {
        let text = self
            .env
            .get(name)
            .map(str::trim)
            .filter(|text| !text.is_empty())?;
        // A job must not fail for what its runner's administrator mistyped.
        let bad = |problem: String| {
            self.bad.push(format!(
                "the runner's hint `{name}` is not used: it {problem}"
            ));
        };
        read(text).map_err(bad).ok()
    }
}

/// The inputs that the trust gate judges a publication by.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Publication")]
pub(crate) struct TrustInputs {
    /// Whether to publish, or for Bazel to upload results. `true` and `auto` do if the trust gate
    /// allows it, which it never does for a pull request. With `true`, `nix-job` and its like show
    /// a refusal as a notice.
    #[arg(
        long,
        value_name = "WHEN",
        value_parser = one_of(&PUSH_CACHE),
        default_value = "false"
    )]
    pub(crate) push_cache: PushCache,

    #[command(flatten)]
    refs: TrustedRefsInput,
}

/// The refs that may publish.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Publication")]
pub(crate) struct TrustedRefsInput {
    /// Refs that may publish besides the default branch, separated by white space or commas, such as
    /// `refs/tags/v* refs/heads/release/*`. `*` stops at a `/`, `**` does not; a pattern that no
    /// ref can match is refused. A branch must be protected, too.
    #[arg(
        long,
        value_name = "REFS",
        value_parser = value(TrustedRefs::parse),
        default_value = "refs/tags/v*"
    )]
    pub(crate) trusted_refs: TrustedRefs,
}

/// What the input `push-cache` can be.
const PUSH_CACHE: [(&str, PushCache); 3] = [
    ("auto", PushCache::Auto),
    ("true", PushCache::Always),
    ("false", PushCache::Never),
];

impl TrustInputs {
    /// What is asked of the trust gate.
    pub(crate) fn request(&self) -> Request {
        Request {
            push_cache: self.push_cache,
            by_hand: false,
            trusted_refs: self.refs.trusted_refs.clone(),
        }
    }
}

/// The inputs of publication, with the way to ask for it outside of a workflow.
#[derive(Args, Clone, Debug)]
pub(crate) struct RequestInputs {
    #[command(flatten)]
    trust: TrustInputs,

    /// Publish from a laptop, as in `flywheel nix-job --publish`: outside of CI nothing is
    /// published without it (default: do not publish).
    #[arg(long, help_heading = BY_HAND)]
    publish: bool,
}

impl RequestInputs {
    /// What is asked of the trust gate.
    pub(crate) fn request(&self) -> Request {
        Request {
            by_hand: self.publish,
            ..self.trust.request()
        }
    }
}

/// The inputs of publication, with what a refusal or a loss does to the step.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Publication")]
pub(crate) struct GateInputs {
    #[command(flatten)]
    asked: RequestInputs,

    /// Whether the step fails if a path is not published, or if publishing is not allowed.
    #[arg(
        long,
        value_name = "BOOL",
        action = ArgAction::Set,
        value_parser = boolean(),
        default_value = "false"
    )]
    pub(crate) require_publish: bool,
}

impl GateInputs {
    /// What is asked of the trust gate.
    pub(crate) fn request(&self) -> Request {
        self.asked.request()
    }
}

/// An address of HTTP.
///
/// # Errors
/// As `address`.
pub(crate) fn http_address(text: &str) -> Result<Address, String> {
    address(text, &["http", "https"])
}

/// The address of a server. What is wrong does not quote the text: it may hold a password.
///
/// # Errors
/// When it is not a whole URL of one of these schemes, or carries what every later step would see.
pub(crate) fn address(text: &str, schemes: &[&str]) -> Result<Address, String> {
    // Nothing expands a template on its way here, and a URL may hold one.
    if text.contains("${") {
        return Err("holds a literal `${…}`, which nothing expands".into());
    }
    // `Url` drops line breaks silently, but the text itself is exported and printed.
    if text.contains(|c: char| c.is_whitespace() || c.is_control()) {
        return Err("must not hold white space".into());
    }
    let url = Url::parse(text).map_err(|error| format!("is not a URL ({error})"))?;
    if !schemes.contains(&url.scheme()) || url.host_str().is_none_or(str::is_empty) {
        return Err(format!(
            "must be a URL of {} with a host",
            schemes.join(", ")
        ));
    }
    if !url.username().is_empty() || url.password().is_some() || url.query().is_some() {
        return Err(
            "must not carry a user, password or query: every later step would see it".into(),
        );
    }
    Ok(Address {
        text: text.to_owned(),
        url,
    })
}

/// A cache's name.
///
/// # Errors
/// When it is none.
pub(crate) fn cache_name(text: &str) -> Result<CacheName, String> {
    text.parse().map_err(|_| {
        "must be the name of a cache (a letter or digit, then letters, digits, `-`, `_`, `+`, 50 in all)".into()
    })
}

/// A public key. What is wrong does not quote the text: a secret key is easily taken for the public one.
///
/// # Errors
/// When it is not one.
pub(crate) fn public_key(text: &str) -> Result<PublicKey, String> {
    text.parse()
        .map_err(|_| "is no public key (`<name>:<base64 of 32 bytes>`)".into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inputs::parse::tests::read;

    #[test]
    fn an_empty_input_is_one_that_was_not_given() {
        let read = |value| read::<CacheInputs>(&[("attic-enabled", value)]);
        assert!(read(" ").expect("default").attic_enabled);
        assert!(!read("False").expect("a word").attic_enabled);
    }

    #[test]
    fn a_slip_of_the_finger_gets_a_hint() {
        let error = read::<CacheInputs>(&[("attic-enabled", "ture")]).expect_err("no such word");
        assert_eq!(
            error.to_string(),
            "input `attic-enabled` must be `true` or `false`, not `ture`"
        );
        assert_eq!(
            error.into_parts().1.as_deref(),
            Some("Did you mean `true`?")
        );
    }

    #[test]
    fn a_hint_that_is_malformed_is_said_and_an_input_is_an_error() {
        let env = Env::from_pairs([
            ("ATTIC_SERVER", "https://u:sesame@h/"),
            ("ATTIC_CACHE", "a/b"),
        ]);
        let named = read::<CacheInputs>(&[]).expect("no input").resolve(&env);
        assert_eq!(
            (named.hinted, named.name, named.bad_hints.len()),
            (None, None, 2)
        );
        assert!(
            named.bad_hints.iter().all(|text| !text.contains("sesame")),
            "{:?}",
            named.bad_hints
        );
        let error = read::<CacheInputs>(&[("attic-cache", "a/b")]).expect_err("no name");
        assert!(
            error
                .to_string()
                .starts_with("input `attic-cache` must be the name of a cache"),
            "{error}"
        );
    }

    #[test]
    fn an_address_is_whole_and_holds_no_secret() {
        let all = ["grpc", "grpcs", "http", "https"];
        for good in [
            "grpc://cache.example:9092",
            "grpcs://cache.example",
            "http://127.0.0.1:8080/x",
            "https://[::1]/",
        ] {
            assert!(address(good, &all).is_ok(), "{good}");
        }
        for bad in [
            "cache.example:9092",
            "grpc://",
            "ftp://x/",
            "https://u:sesame@x/",
            "grpc://${HOST}:1",
            "unix:/x",
            "http://x/?token=sesame",
            "http://x/\n::error::sesame",
        ] {
            let problem = address(bad, &all).expect_err(bad);
            assert!(!problem.contains("sesame"), "{problem}");
        }
        assert!(address("grpc://x:1", &["http", "https"]).is_err());
    }
}
