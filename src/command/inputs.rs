//! Inputs that several verbs share, and how an action's strings become values.
//!
//! Every input is a flag and an environment variable `FLYWHEEL_<INPUT>`. An action passes what its
//! caller left out as the empty text, so empty always means "not given".

use std::convert::Infallible;
use std::fmt::{self, Display};
use std::ops::RangeInclusive;
use std::str::FromStr;

use clap::Args;
use url::Url;

use crate::exit::UsageError;
use crate::nix::cache_name::CacheName;
use crate::nix::key::PublicKey;
use crate::runner::env::Env;
use crate::text::{nearest, one_line};
use crate::trust::{PushCache, Request, TrustedRefs};

/// An input as it was typed; `None` when it was left out or empty.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Text(Option<String>);

impl Text {
    /// The text without surrounding white space, if there is any.
    pub fn get(&self) -> Option<&str> {
        self.0.as_deref()
    }
}

impl FromStr for Text {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        let text = text.trim();
        Ok(Self((!text.is_empty()).then(|| text.to_owned())))
    }
}

impl fmt::Display for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.get().unwrap_or_default())
    }
}

/// Reads a yes-or-no input; GitHub's booleans arrive as `true`, `True` or empty.
///
/// # Errors
/// For any other word, with the nearest good one.
pub fn switch(name: &str, input: &Text, default: bool) -> Result<bool, UsageError> {
    let words = [("true", true), ("false", false)];
    choice(name, input, &words).map(|value| value.unwrap_or(default))
}

/// Reads an input that is one of a few words; case does not matter.
///
/// # Errors
/// For any other word, with the nearest good one.
pub fn choice<T: Copy>(
    name: &str,
    input: &Text,
    words: &[(&str, T)],
) -> Result<Option<T>, UsageError> {
    let Some(text) = input.get() else {
        return Ok(None);
    };
    if let Some((_, value)) = words
        .iter()
        .find(|(word, _)| word.eq_ignore_ascii_case(text))
    {
        return Ok(Some(*value));
    }
    let all: Vec<String> = words.iter().map(|(word, _)| format!("`{word}`")).collect();
    let error = UsageError::new(
        name,
        format!("must be {}, not `{}`", all.join(" or "), one_line(text, 80)),
    );
    Err(match nearest(text, words.iter().map(|(word, _)| *word)) {
        Some(word) => error.with_hint(format!("Did you mean `{word}`?")),
        None => error,
    })
}

/// Reads a number within a range; none where the input is empty.
///
/// # Errors
/// For anything else, with the range.
pub fn number<N: FromStr + PartialOrd + Display>(
    name: &str,
    input: &Text,
    range: RangeInclusive<N>,
) -> Result<Option<N>, UsageError> {
    let Some(text) = input.get() else {
        return Ok(None);
    };
    match text.parse() {
        Ok(number) if range.contains(&number) => Ok(Some(number)),
        _ => {
            let (from, to) = range.into_inner();
            let shown = one_line(text, 40);
            Err(UsageError::new(
                name,
                format!("must be a number from {from} to {to}, not `{shown}`"),
            ))
        }
    }
}

/// The inputs that name a cache.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Cache")]
pub struct CacheInputs {
    /// Whether to use the cache at all: `true`, the default, or `false`.
    #[arg(
        long,
        value_name = "BOOL",
        default_value = "",
        hide_default_value = true
    )]
    pub attic_enabled: Text,

    /// The cache server's address, such as `https://attic.example.org/`. The default is the runner's
    /// hint `ATTIC_SERVER`; there is no baked-in server.
    #[arg(
        long,
        value_name = "URL",
        default_value = "",
        hide_default_value = true
    )]
    pub attic_server: Text,

    /// The cache's name on the server. The default is the hint `ATTIC_CACHE`, then `main`.
    #[arg(
        long,
        value_name = "NAME",
        default_value = "",
        hide_default_value = true
    )]
    pub attic_cache: Text,

    /// The cache's public key, such as `main:6NCHdD59X431…=`. The default is the hint
    /// `ATTIC_PUBLIC_KEY`. Without a key Nix refuses every hit.
    #[arg(
        long,
        value_name = "KEY",
        default_value = "",
        hide_default_value = true
    )]
    pub attic_public_key: Text,
}

/// What inputs and hints name of a cache. An input goes before the hint of the same name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedCache {
    /// Whether it is to be used at all.
    pub enabled: bool,
    /// The server that the input names.
    pub given: Option<Url>,
    /// The server that the hint names.
    pub hinted: Option<Url>,
    /// The cache's name there.
    pub name: CacheName,
    /// The key by which Nix is to trust it.
    pub key: Option<PublicKey>,
    /// Hints that are malformed and therefore not used: a sentence each.
    pub bad_hints: Vec<String>,
}

impl CacheInputs {
    /// What inputs and hints name.
    ///
    /// # Errors
    /// When an input is malformed. A hint that is malformed is not used, and said.
    pub fn named(&self, env: &Env) -> Result<NamedCache, UsageError> {
        let http = |text: &str| address(text, &["http", "https"]);
        // Inputs first and all of them, so that an error comes before any warning.
        let enabled = switch("attic-enabled", &self.attic_enabled, true)?;
        let given_server = given("attic-server", &self.attic_server, http)?;
        let name = given("attic-cache", &self.attic_cache, cache_name)?;
        let key = given("attic-public-key", &self.attic_public_key, public_key)?;
        let mut hints = Hints::of(env);
        Ok(NamedCache {
            enabled,
            given: given_server,
            hinted: hints.get("ATTIC_SERVER", http),
            name: name
                .or_else(|| hints.get("ATTIC_CACHE", cache_name))
                .unwrap_or_default(),
            key: key.or_else(|| hints.get("ATTIC_PUBLIC_KEY", public_key)),
            bad_hints: hints.bad,
        })
    }
}

/// A value given by input: malformed is an error.
///
/// # Errors
/// With the problem that `read` finds, a fragment that goes behind "input `x`".
pub fn given<T>(
    name: &str,
    input: &Text,
    read: impl Fn(&str) -> Result<T, String>,
) -> Result<Option<T>, UsageError> {
    input.get().map(&read).transpose().map_err(|problem| {
        UsageError::new(name, problem)
            .with_hint("Correct it, or leave it out to use the runner's own hint.")
    })
}

/// The runner's hints: malformed ones are not used, and said.
#[derive(Debug)]
pub struct Hints<'a> {
    env: &'a Env,
    /// A sentence about each malformed one.
    pub bad: Vec<String>,
}

impl<'a> Hints<'a> {
    /// The hints in this environment.
    pub fn of(env: &'a Env) -> Self {
        Self {
            env,
            bad: Vec::new(),
        }
    }

    /// The hint of this name, if there is one and it is well-formed.
    pub fn get<T>(&mut self, name: &str, read: impl Fn(&str) -> Result<T, String>) -> Option<T> {
        let text = self
            .env
            .get(name)
            .map(str::trim)
            .filter(|text| !text.is_empty())?;
        let bad = |problem: String| {
            self.bad.push(format!(
                "the runner's hint `{name}` is not used: it {problem}"
            ));
        };
        read(text).map_err(bad).ok()
    }
}

/// The inputs that ask for publication. The trust gate answers them.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Publication")]
pub struct GateInputs {
    /// Whether to publish: `true`, `auto` (when the trust gate allows it) or `false`, the default.
    #[arg(
        long,
        value_name = "WHEN",
        default_value = "",
        hide_default_value = true
    )]
    pub push_cache: Text,

    /// Asks for publication by hand, as in `flywheel nix-job --publish`; outside of CI nothing else
    /// does. The default is not to ask.
    #[arg(long)]
    pub publish: bool,

    /// Refs that may publish besides the default branch, separated by white space or commas, such as
    /// `refs/tags/v* refs/heads/release/*` (default: `refs/tags/v*`). `*` stops at a `/`, `**` does
    /// not. A branch must be protected, too.
    #[arg(
        long,
        value_name = "REFS",
        default_value = "",
        hide_default_value = true
    )]
    pub trusted_refs: Text,

    /// Whether a path that could not be published, or a verdict that forbids publishing, fails the
    /// step: `true` or `false`, the default.
    #[arg(
        long,
        value_name = "BOOL",
        default_value = "",
        hide_default_value = true
    )]
    pub require_publish: Text,
}

impl GateInputs {
    /// What is asked of the trust gate.
    ///
    /// # Errors
    /// For a word that `push-cache` does not know, or a pattern that `trusted-refs` cannot hold.
    pub fn request(&self) -> Result<Request, UsageError> {
        Ok(Request {
            push_cache: push_cache(&self.push_cache)?,
            by_hand: self.publish,
            trusted_refs: TrustedRefs::parse(self.trusted_refs.get().unwrap_or_default())?,
        })
    }

    /// Whether publication that was asked for and does not happen fails the step.
    ///
    /// # Errors
    /// For a word that is neither `true` nor `false`.
    pub fn must_publish(&self) -> Result<bool, UsageError> {
        switch("require-publish", &self.require_publish, false)
    }
}

/// Reads the input `push-cache`.
///
/// # Errors
/// For a word that it does not know.
pub fn push_cache(input: &Text) -> Result<PushCache, UsageError> {
    let words = [
        ("auto", PushCache::Auto),
        ("true", PushCache::Always),
        ("false", PushCache::Never),
    ];
    Ok(choice("push-cache", input, &words)?.unwrap_or_default())
}

/// The address of a server. What is wrong does not quote the text: it may hold a password.
///
/// # Errors
/// When it is not a whole URL of one of these schemes, or carries what every later step would see.
pub fn address(text: &str, schemes: &[&str]) -> Result<Url, String> {
    if text.contains("${") {
        return Err("holds a literal `${…}`, which nothing expands".into());
    }
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
    Ok(url)
}

/// A cache's name.
///
/// # Errors
/// When it is none.
pub fn cache_name(text: &str) -> Result<CacheName, String> {
    text.parse().map_err(|_| {
        "must be the name of a cache (a letter or digit, then letters, digits, `-`, `_`, `+`, 50 in all)".into()
    })
}

/// A public key. What is wrong does not quote the text: a secret key is easily taken for the public one.
///
/// # Errors
/// When it is not one.
pub fn public_key(text: &str) -> Result<PublicKey, String> {
    text.parse()
        .map_err(|_| "is no public key (`<name>:<base64 of 32 bytes>`)".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(text: &str) -> Text {
        text.parse().expect("infallible")
    }

    #[test]
    fn an_empty_input_is_one_that_was_not_given() {
        assert!(switch("x", &text(" "), true).expect("default"));
        assert!(!switch("x", &text("False"), true).expect("word"));
    }

    #[test]
    fn a_slip_of_the_finger_gets_a_hint() {
        use crate::exit::Explain as _;
        let error = switch("attic-enabled", &text("ture"), true).expect_err("no such word");
        assert_eq!(
            error.to_string(),
            "input `attic-enabled` must be `true` or `false`, not `ture`"
        );
        assert_eq!(error.hint().as_deref(), Some("Did you mean `true`?"));
    }

    #[test]
    fn a_hint_that_is_malformed_is_said_and_an_input_is_an_error() {
        let env = Env::from_pairs([
            ("ATTIC_SERVER", "https://u:sesame@h/"),
            ("ATTIC_CACHE", "a/b"),
        ]);
        let named = CacheInputs::default()
            .named(&env)
            .expect("hints never fail");
        assert_eq!(
            (named.hinted, named.name.as_str(), named.bad_hints.len()),
            (None, "main", 2)
        );
        assert!(
            named.bad_hints.iter().all(|text| !text.contains("sesame")),
            "{:?}",
            named.bad_hints
        );
        let error = CacheInputs {
            attic_cache: text("a/b"),
            ..Default::default()
        }
        .named(&env)
        .expect_err("no name");
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
