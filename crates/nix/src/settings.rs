//! Composes `NIX_CONFIG` for the user's command from the runner's lines, ours and the user's.
//! Writes no configuration file, and never drops or reorders a given line.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::{Map, Value};

use crate::key::PublicKey;
use crate::tool::{Error, FEATURES, Flavour, Nix};
use flywheel_core::exit::UsageError;
use flywheel_core::secret::Secret;

/// Printing the settings opens no store, so this is ample.
const LIMIT: Duration = Duration::from_secs(20);

/// Bounds on downloads, so that a substituter that dies during a job costs seconds while a slow
/// link still works. Nix's defaults (300 s, five attempts, then a failed build) would cost minutes.
const DOWNLOAD_BOUNDS: [(&str, &str); 3] = [
    ("connect-timeout", "5"),
    ("stalled-download-timeout", "30"),
    ("fallback", "true"),
];

#[derive(Clone, Debug, Default)]
pub struct WantedSettings {
    /// The cache, if it is usable. An unreachable one is left out, so that no build waits for it.
    pub cache: Option<CacheSettings>,
    /// The include file with access tokens for fetchers.
    pub access_tokens: Option<PathBuf>,
    /// Lines that make the installation work (`build-users-group =`).
    pub repairs: Vec<String>,
    /// The user's lines (`extra-nix-config`). They come last and so override ours.
    pub extra: String,
    /// The settings in force before. A bound that is set there is left alone.
    pub before: Settings,
}

/// How Nix reaches the cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CacheSettings {
    /// What Nix reads: `<server>/<cache>`, or a proxy before it.
    pub substituter: String,
    /// The cache's own address.
    pub address: String,
    /// Whether later jobs find it at the same address, so that the machine's settings can name it.
    pub is_lasting: bool,
    /// How often a download is tried.
    pub attempts: u32,
    /// Its public key, without which Nix refuses every hit.
    pub public_key: Option<PublicKey>,
    /// The netrc with its token.
    pub netrc: Option<PathBuf>,
}

impl CacheSettings {
    fn is_behind_proxy(&self) -> bool {
        self.substituter != self.address
    }
}

/// Whether two URLs of stores mean the same one: a slash at the end and the order of the parameters make no difference.
pub(crate) fn is_same_store(one: &str, other: &str) -> bool {
    fn parts(url: &str) -> (&str, Vec<&str>) {
        let (address, parameters) = url.split_once('?').unwrap_or((url, ""));
        let mut parameters: Vec<&str> = parameters
            .split('&')
            .filter(|one| !one.is_empty())
            .collect();
        parameters.sort_unstable();
        (address.trim_end_matches('/'), parameters)
    }
    parts(one) == parts(other)
}

/// Whether this store is among those that are listed.
pub(crate) fn lists_store(list: &[String], url: &str) -> bool {
    list.iter().any(|listed| is_same_store(listed, url))
}

/// Returns `base` (the runner's `NIX_CONFIG`) unchanged, followed by our lines and then the user's.
pub fn compose(base: &str, wanted: &WantedSettings) -> String {
    let mut text = base.to_owned();
    let mut line = |line: &str| {
        if !text.is_empty() && !text.ends_with('\n') {
            text.push('\n');
        }
        text.push_str(line);
        text.push('\n');
    };
    // The user's command may use flakes even where the installation does not enable them.
    line(FEATURES);
    // Repairs come before the user's lines, which may override them.
    for repair in &wanted.repairs {
        line(repair);
    }
    if let Some(cache) = &wanted.cache {
        let listed = wanted.before.list("substituters");
        if cache.is_behind_proxy() && lists_store(&listed, &cache.address) {
            // Otherwise Nix would go round the proxy.
            let others = listed
                .iter()
                .filter(|url| !is_same_store(url, &cache.address));
            let others: Vec<&str> = others.map(String::as_str).collect();
            line(&format!("substituters = {}", others.join(" ")));
        }
        line(&format!("extra-substituters = {}", cache.substituter));
        if let Some(key) = &cache.public_key {
            line(&format!("extra-trusted-public-keys = {key}"));
        }
        if let Some(netrc) = &cache.netrc {
            line(&format!("netrc-file = {}", netrc.display()));
        }
        let attempts = cache.attempts.to_string();
        let bounds = DOWNLOAD_BOUNDS.into_iter();
        for (name, value) in bounds.chain([("download-attempts", attempts.as_str())]) {
            // A bound that the runner or the user has chosen stays.
            if !sets(base, name) && !wanted.before.is_set(name) {
                line(&format!("{name} = {value}"));
            }
        }
    }
    if let Some(file) = &wanted.access_tokens {
        // Unlike `include`, `!include` ignores a missing file, which a process that outlives the
        // job would meet.
        line(&format!("!include {}", file.display()));
    }
    let extra = wanted.extra.trim();
    if !extra.is_empty() {
        line(extra);
    }
    text
}

/// The settings by which Nix reads a cache; none of them is of use when the cache is gone.
const OF_THE_CACHE: [&str; 4] = [
    "substituters",
    "extra-substituters",
    "extra-trusted-public-keys",
    "netrc-file",
];

/// Splits what `compose` has made of `base` for shells that may outlive the cache: the lines about the cache, and the
/// text with `!include FILE` in their place. Nix ignores such a line once the file is gone.
pub fn with_cache_in(file: &str, config: &str, base: &str) -> (String, String) {
    let (mut kept, mut of_cache) = (String::new(), String::new());
    // The base is the shell's own, and stays whole.
    let composed = config.strip_prefix(base).unwrap_or(config);
    kept.push_str(&config[..config.len() - composed.len()]);
    for line in composed.split_inclusive('\n') {
        let name = line.split_whitespace().next().unwrap_or_default();
        if !OF_THE_CACHE.contains(&name) {
            kept.push_str(line);
            continue;
        }
        // Settings that are not about the cache do not mind where they stand.
        if of_cache.is_empty() {
            kept.push_str(&format!("!include {file}\n"));
        }
        of_cache.push_str(line);
    }
    (kept, of_cache)
}

/// Whether this text assigns the setting `name`.
pub fn sets(text: &str, name: &str) -> bool {
    lines(text).any(|(_, words)| words.first() == Some(&name) && words.get(1) == Some(&"="))
}

/// The last value that this text assigns to the setting `name`, if it is one word.
pub fn word_in(text: &str, name: &str) -> Option<String> {
    let values = lines(text).filter_map(|(_, words)| match words[..] {
        [assigned, "=", value] if assigned == name => Some(value.to_owned()),
        _ => None,
    });
    values.last()
}

/// Splits the non-empty lines into words as Nix does (comments removed; blanks, tabs and carriage
/// returns separate words), and numbers them from 1.
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

/// Returns the numbers of the lines that are neither `name = value` nor `include file`. One such
/// line makes every command fail. The lines themselves are not returned, as they may hold a secret.
pub fn malformed(text: &str) -> Vec<usize> {
    // `name =` without a value is valid: it sets an empty value.
    let is_good = |words: &[&str]| matches!(words, ["include" | "!include", _] | [_, "=", ..]);
    lines(text)
        .filter(|(_, words)| !is_good(words))
        .map(|(number, _)| number)
        .collect()
}

/// Checks the user's lines before anything is changed.
///
/// # Errors
/// When Nix would reject one of them.
pub fn check_extra(text: &str) -> Result<(), UsageError> {
    let Some(number) = malformed(text).first().copied() else {
        return Ok(());
    };
    Err(UsageError::new(
        "extra-nix-config",
        format!("has no `name = value` on line {number}"),
    )
    .with_hint("Write one setting per line, such as `max-jobs = 4`."))
}

/// The settings in force. They include access tokens, so never print them as a whole.
#[derive(Clone, Default)]
pub struct Settings(Map<String, Value>);

impl Settings {
    /// Reads the settings under the `NIX_CONFIG` of `nix`.
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
        // serde's message could quote a value, which may be a secret.
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
            Value::Array(_) => Some(self.list(name).join(" ")),
            Value::Null => None,
            other => Some(other.to_string()),
        }
    }

    /// The words of a setting that is a list.
    pub fn list(&self, name: &str) -> Vec<String> {
        match self.value(name) {
            Some(Value::Array(list)) => list
                .iter()
                .filter_map(Value::as_str)
                .map(str::to_owned)
                .collect(),
            // Some versions print lists as text.
            Some(Value::String(text)) => text.split_whitespace().map(str::to_owned).collect(),
            _ => Vec::new(),
        }
    }

    /// The tokens for fetchers, by host or by a part of it (`github.com/owner`).
    pub fn access_tokens(&self) -> BTreeMap<String, Secret> {
        let pairs: Vec<(String, String)> = match self.value("access-tokens") {
            Some(Value::Object(map)) => map
                .iter()
                .filter_map(|(host, token)| Some((host.clone(), token.as_str()?.to_owned())))
                .collect(),
            // Some versions print such settings as text.
            _ => self
                .list("access-tokens")
                .iter()
                .filter_map(|word| word.split_once('='))
                .map(|(host, token)| (host.to_owned(), token.to_owned()))
                .collect(),
        };
        pairs
            .into_iter()
            .filter_map(|(host, token)| Some((host, Secret::new(&token)?)))
            .collect()
    }

    /// Whether the setting has a value other than its default.
    pub(crate) fn is_set(&self, name: &str) -> bool {
        self.value(name).is_some()
            && self.value(name) != self.0.get(name).and_then(|entry| entry.get("defaultValue"))
    }

    /// The netrc that Nix uses; the file need not exist.
    pub fn netrc_file(&self) -> Option<PathBuf> {
        self.text("netrc-file")
            .filter(|file| !file.is_empty())
            .map(PathBuf::from)
    }

    fn value(&self, name: &str) -> Option<&Value> {
        self.0.get(name)?.get("value")
    }
}

/// Prints the number of settings only, since values may be secrets.
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
                address: "https://cache.example/main".to_owned(),
                is_lasting: true,
                attempts: 2,
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
    fn a_shell_that_outlives_the_cache_names_it_through_a_file() {
        let cache = CacheSettings {
            substituter: "http://127.0.0.1:1/main".into(),
            address: "http://127.0.0.1:1/main".into(),
            is_lasting: false,
            attempts: 2,
            public_key: None,
            netrc: Some("/n/netrc".into()),
        };
        let wanted = WantedSettings {
            cache: Some(cache),
            extra: "cores = 3".into(),
            ..WantedSettings::default()
        };
        let base = "netrc-file = /own";
        let (kept, of_cache) = with_cache_in("/f", &compose(base, &wanted), base);
        assert_eq!(
            of_cache,
            "extra-substituters = http://127.0.0.1:1/main\nnetrc-file = /n/netrc\n"
        );
        assert!(kept.starts_with("netrc-file = /own\n"), "{kept}");
        assert!(kept.contains(FEATURES) && kept.contains("\n!include /f\n"));
        assert!(kept.ends_with("cores = 3\n") && !kept.contains("127.0.0.1"));
        // Without a cache there is nothing to include.
        let config = compose("", &WantedSettings::default());
        assert_eq!(with_cache_in("/f", &config, ""), (config, String::new()));
    }

    #[test]
    fn every_line_of_the_runner_stays_and_the_user_has_the_last_word() {
        let base = "# the runner's\r\nsubstituters = https://a\ncores = 2 # no newline at the end";
        let expected = format!(
            "{base}\nextra-experimental-features = nix-command flakes\nbuild-users-group =\n\
             extra-substituters = https://cache.example/main\nextra-trusted-public-keys = {KEY}\n\
             netrc-file = /private/netrc\nconnect-timeout = 5\nstalled-download-timeout = 30\n\
             fallback = true\ndownload-attempts = 2\n!include /private/access-tokens.conf\nmax-jobs = 4\n"
        );
        assert_eq!(compose(base, &wanted()), expected);
    }

    #[test]
    fn a_cache_that_is_read_through_a_proxy_is_read_in_no_other_way() {
        let mut wanted = wanted();
        wanted.before = settings(
            r#"{"substituters":{"value":["https://a?x=1","https://cache.example/main/"],"defaultValue":["https://a"]}}"#,
        );
        if let Some(cache) = &mut wanted.cache {
            cache.substituter = "http://127.0.0.1:1/k/main".to_owned();
        }
        let text = compose("", &wanted);
        assert!(
            text.contains(
                "\nsubstituters = https://a?x=1\nextra-substituters = http://127.0.0.1:1/k/main\n"
            ),
            "{text}"
        );
    }

    #[test]
    fn urls_of_stores_are_compared_by_what_they_mean() {
        let url = "https://h/main?trusted=true&priority=10";
        assert!(is_same_store(
            url,
            "https://h/main/?priority=10&trusted=true"
        ));
        for other in ["https://h/main", "https://h/other?trusted=true&priority=10"] {
            assert!(!is_same_store(url, other), "{other}");
        }
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
        assert_eq!(
            word_in("x = 1\nx = 2 # last\ny = 3", "x").as_deref(),
            Some("2")
        );
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
        assert_eq!(settings.list("substituters"), ["https://a", "https://b"]);
        assert!(settings.is_set("substituters") && !settings.is_set("connect-timeout"));
        assert_eq!(settings.netrc_file(), Some("/etc/nix/netrc".into()));
        assert_eq!(settings.text("no-such-setting"), None);
        assert!(!format!("{settings:?}").contains("s3cr3t"));
        assert_eq!(settings.access_tokens()["github.com"].expose(), "s3cr3t");
    }
}
