//! `NIX_CONFIG` for the user's command: what the runner gave, what Flywheel adds, what the user adds.
//! Writes no configuration file, and never loses or reorders a line that it was given.

use std::path::PathBuf;
use std::time::Duration;

use serde_json::{Map, Value};

use crate::key::PublicKey;
use crate::tool::{Error, FEATURES, Flavour, Nix};
use flywheel_core::exit::UsageError;

/// Printing the settings needs no store.
const LIMIT: Duration = Duration::from_secs(20);

/// A substituter that dies in the middle of a job costs seconds, not minutes, and a slow link still
/// works: Nix's own defaults are no bound at all, 300 s, five attempts, and a failed build.
const DOWNLOAD_BOUNDS: [(&str, &str); 4] = [
    ("connect-timeout", "5"),
    ("stalled-download-timeout", "30"),
    ("download-attempts", "2"),
    ("fallback", "true"),
];

/// What the job's settings should say.
#[derive(Clone, Debug, Default)]
pub struct WantedSettings {
    /// The cache, if it can be used. A dead one is left out, so that no build waits for it.
    pub cache: Option<CacheSettings>,
    /// The include file with access tokens for fetchers.
    pub access_tokens: Option<PathBuf>,
    /// Lines that make the installation work (`build-users-group =`).
    pub repairs: Vec<String>,
    /// What the user adds himself (`extra-nix-config`); it comes last and has the last word.
    pub extra: String,
    /// The settings in force before; a bound that somebody has set is left alone.
    pub before: Settings,
}

/// The cache as Nix should know it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CacheSettings {
    /// `<server>/<cache>`.
    pub substituter: String,
    /// Its public key, without which Nix refuses every hit.
    pub public_key: Option<PublicKey>,
    /// The netrc with its token.
    pub netrc: Option<PathBuf>,
}

/// `base`, the runner's `NIX_CONFIG`, byte for byte, then our lines, then the user's.
pub fn compose(base: &str, wanted: &WantedSettings) -> String {
    let mut text = base.to_owned();
    let mut line = |line: &str| {
        if !text.is_empty() && !text.ends_with('\n') {
            text.push('\n');
        }
        text.push_str(line);
        text.push('\n');
    };
    line(FEATURES);
    for repair in &wanted.repairs {
        line(repair);
    }
    if let Some(cache) = &wanted.cache {
        line(&format!("extra-substituters = {}", cache.substituter));
        if let Some(key) = &cache.public_key {
            line(&format!("extra-trusted-public-keys = {key}"));
        }
        if let Some(netrc) = &cache.netrc {
            line(&format!("netrc-file = {}", netrc.display()));
        }
        for (name, value) in DOWNLOAD_BOUNDS {
            if !sets(base, name) && !wanted.before.is_set(name) {
                line(&format!("{name} = {value}"));
            }
        }
    }
    if let Some(file) = &wanted.access_tokens {
        // `!include` passes over a file that is gone, for a process that outlives the job.
        line(&format!("!include {}", file.display()));
    }
    let extra = wanted.extra.trim();
    if !extra.is_empty() {
        line(extra);
    }
    text
}

/// Whether a text of settings sets this one.
pub fn sets(text: &str, name: &str) -> bool {
    lines(text).any(|(_, words)| words.first() == Some(&name) && words.get(1) == Some(&"="))
}

/// The lines that are not empty, with their numbers, split into words as Nix does: comments away,
/// blanks, tabs and carriage returns between words.
fn lines(text: &str) -> impl Iterator<Item = (usize, Vec<&str>)> {
    let words = text.lines().map(|line| {
        line.split('#')
            .next()
            .unwrap_or_default()
            .split_whitespace()
            .collect()
    });
    (1..)
        .zip(words)
        .filter(|(_, words): &(usize, Vec<&str>)| !words.is_empty())
}

/// The numbers of the lines that Nix refuses, and with them every command: neither
/// `name = value` nor `include file`. The lines themselves may hold a secret.
pub fn malformed(text: &str) -> Vec<usize> {
    let is_good = |words: &[&str]| matches!(words, ["include" | "!include", _] | [_, "=", ..]);
    lines(text)
        .filter(|(_, words)| !is_good(words))
        .map(|(number, _)| number)
        .collect()
}

/// Checks the user's own lines before anything is touched.
///
/// # Errors
/// When Nix would refuse one of them.
pub fn check_extra(text: &str) -> Result<(), UsageError> {
    let Some(number) = malformed(text).first().copied() else {
        return Ok(());
    };
    Err(UsageError::new(
        "extra-nix-config",
        format!("has no `name = value` on line {number}"),
    )
    .with_hint("Write one setting a line, such as `max-jobs = 4`."))
}

/// The settings that Nix has in force. Holds access tokens: never to be printed as a whole.
#[derive(Clone, Default)]
pub struct Settings(Map<String, Value>);

impl Settings {
    /// Asks Nix, under the `NIX_CONFIG` that `nix` has.
    ///
    /// # Errors
    /// When Nix gives no answer.
    pub async fn read(nix: &Nix) -> Result<Self, Error> {
        // The command was renamed in 2.20; Lix renamed it in its first version.
        let renamed = nix.version.at_least(2, 20) || nix.version.flavour != Flavour::Nix;
        let arguments: &[&str] = if renamed {
            &["config", "show", "--json"]
        } else {
            &["show-config", "--json"]
        };
        let output = nix.run_checked(arguments, LIMIT).await?;
        let call = format!("nix {}", arguments[..arguments.len() - 1].join(" "));
        // What serde says could quote a value.
        serde_json::from_slice(&output.stdout)
            .map(Self)
            .map_err(|_| Error::UnexpectedOutput {
                call,
                problem: "not a JSON object".to_owned(),
            })
    }

    /// A setting's value as text, `None` if this Nix does not know it. Lists are joined by spaces.
    pub fn text(&self, name: &str) -> Option<String> {
        match self.value(name)? {
            Value::String(text) => Some(text.clone()),
            Value::Array(_) => Some(self.words(name).join(" ")),
            Value::Null => None,
            other => Some(other.to_string()),
        }
    }

    /// The words of a setting that is a list.
    pub fn words(&self, name: &str) -> Vec<String> {
        match self.value(name) {
            Some(Value::Array(list)) => list
                .iter()
                .filter_map(Value::as_str)
                .map(str::to_owned)
                .collect(),
            Some(Value::String(text)) => text.split_whitespace().map(str::to_owned).collect(),
            _ => Vec::new(),
        }
    }

    /// Whether somebody has given it a value other than its default.
    pub fn is_set(&self, name: &str) -> bool {
        self.value(name).is_some()
            && self.value(name) != self.0.get(name).and_then(|entry| entry.get("defaultValue"))
    }

    /// The netrc in use, whether it exists or not.
    pub fn netrc_file(&self) -> Option<PathBuf> {
        self.text("netrc-file")
            .filter(|file| !file.is_empty())
            .map(PathBuf::from)
    }

    fn value(&self, name: &str) -> Option<&Value> {
        self.0.get(name)?.get("value")
    }
}

/// Names only: values may be secrets.
impl std::fmt::Debug for Settings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Settings({})", self.0.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "main:47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=";

    fn wanted() -> WantedSettings {
        WantedSettings {
            cache: Some(CacheSettings {
                substituter: "https://cache.example/main".to_owned(),
                public_key: Some(KEY.parse().expect("a key")),
                netrc: Some("/private/netrc".into()),
            }),
            access_tokens: Some("/private/access-tokens.conf".into()),
            repairs: vec!["build-users-group =".to_owned()],
            extra: "max-jobs = 4\r\n".to_owned(),
            before: Settings::default(),
        }
    }

    fn settings(json: &str) -> Settings {
        Settings(serde_json::from_str(json).expect("an object"))
    }

    #[test]
    fn every_line_of_the_runner_stays_and_the_user_has_the_last_word() {
        let base = "# the runner's\r\nsubstituters = https://a\ncores = 2 # no newline at the end";
        let expected = format!(
            "{base}\nextra-experimental-features = nix-command flakes\nbuild-users-group =\n\
             extra-substituters = https://cache.example/main\nextra-trusted-public-keys = {KEY}\n\
             netrc-file = /private/netrc\nconnect-timeout = 5\nstalled-download-timeout = 30\n\
             download-attempts = 2\nfallback = true\n!include /private/access-tokens.conf\nmax-jobs = 4\n"
        );
        assert_eq!(compose(base, &wanted()), expected);
    }

    #[test]
    fn without_a_cache_nothing_but_the_command_line_changes() {
        assert_eq!(
            compose("", &WantedSettings::default()),
            "extra-experimental-features = nix-command flakes\n"
        );
    }

    #[test]
    fn bounds_that_somebody_has_set_are_left_alone() {
        let before = settings(
            r#"{"download-attempts":{"value":7,"defaultValue":5},"fallback":{"value":false,"defaultValue":false}}"#,
        );
        let text = compose(
            "connect-timeout=9\nconnect-timeout = 60",
            &WantedSettings { before, ..wanted() },
        );
        assert!(
            !text.contains("connect-timeout = 5") && !text.contains("download-attempts"),
            "{text}"
        );
        assert!(
            text.contains("fallback = true") && text.contains("stalled-download-timeout = 30"),
            "{text}"
        );
        let looser = compose(
            "",
            &WantedSettings {
                extra: "connect-timeout = 60".to_owned(),
                ..wanted()
            },
        );
        assert!(
            looser.find("connect-timeout = 5") < looser.find("connect-timeout = 60"),
            "the last one counts"
        );
    }

    #[test]
    fn lines_that_nix_refuses_are_found_by_number() {
        let text = "cores = 2\r\n\n# garbage\ngarbage\nx=1\n= 3\ninclude a\n!include a\ninclude\nempty =\nextra-x http://x";
        assert_eq!(malformed(text), [4, 5, 6, 9, 11]);
        assert!(check_extra("max-jobs = 4").is_ok());
        let error = check_extra("max-jobs = 4\nmax-jobs: 3").expect_err("no equals sign");
        assert_eq!(
            error.to_string(),
            "input `extra-nix-config` has no `name = value` on line 2"
        );
    }

    #[test]
    fn settings_are_read_and_not_printed() {
        let settings = settings(
            r#"{"substituters":{"value":["https://a","https://b"],"defaultValue":["https://a"]},
                "netrc-file":{"value":"/etc/nix/netrc"},"access-tokens":{"value":{"github.com":"s3cr3t"}}}"#,
        );
        assert_eq!(settings.words("substituters"), ["https://a", "https://b"]);
        assert!(settings.is_set("substituters") && !settings.is_set("connect-timeout"));
        assert_eq!(settings.netrc_file(), Some("/etc/nix/netrc".into()));
        assert_eq!(settings.text("no-such-setting"), None);
        assert!(!format!("{settings:?}").contains("s3cr3t"));
    }
}
