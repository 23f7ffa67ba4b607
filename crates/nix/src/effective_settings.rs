//! Reads back which settings are in force, together with the store as it opens under them, and
//! compares both with what was wanted.
//!
//! A daemon applies restricted settings only for users it trusts and ignores them otherwise; older
//! versions do so silently. So both sides are queried: the client for its settings, the daemon for
//! its trust.

use std::path::PathBuf;
use std::time::Duration;

use crate::ping::{Opened, Ping, ping};
use crate::settings::{CacheSettings, Settings, is_same_store, lists_store};
use crate::tool::{Error, Flavour, Nix};
use flywheel_sys::host::home::Entry;

/// A daemon that takes longer than this to answer counts as dead.
const LIMIT: Duration = Duration::from_secs(20);
/// A substituter that no daemon lists as trusted. It appears in one `nix store ping` only, which
/// fetches no path.
const PROBE_URL: &str = "http://flywheel-trust-probe.invalid";

/// A wanted setting that is not in force, and how to change that.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IgnoredSetting {
    /// The setting: `extra-substituters`, `extra-trusted-public-keys` or `netrc-file`.
    pub setting: &'static str,
    pub reason: IgnoredReason,
    /// The exact line to add.
    pub line_to_add: String,
    /// The file to add it to; `None` where the line belongs into `NIX_CONFIG` or the input, which
    /// are no files.
    pub file: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IgnoredReason {
    /// A later line, usually one of `extra-nix-config`, replaces it.
    Overridden,
    /// The daemon does not trust this user.
    Untrusted,
}

/// A complete log line.
impl std::fmt::Display for IgnoredSetting {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            setting,
            line_to_add,
            ..
        } = self;
        match (self.reason, &self.file) {
            (IgnoredReason::Untrusted, file) => {
                let file = file
                    .as_ref()
                    .map(|file| format!(" to `{}`", file.display()))
                    .unwrap_or_default();
                write!(
                    f,
                    "`{setting}` is ignored: the Nix daemon does not trust this user; "
                )?;
                write!(
                    f,
                    "add `{line_to_add}`{file} on the runner and restart the daemon"
                )
            }
            (IgnoredReason::Overridden, _) => {
                write!(
                    f,
                    "`{setting}` is overridden by a later line; `extra-nix-config` needs `{line_to_add}`"
                )
            }
        }
    }
}

/// Nix's state under a job's settings.
#[derive(Debug)]
pub struct EffectiveSettings {
    /// All settings in force.
    pub settings: Settings,
    /// The store, if it opens.
    pub opened: Option<Opened>,
    /// The wanted settings that are not in force.
    pub ignored: Vec<IgnoredSetting>,
}

/// Queries Nix under the configuration that `compose` made for a job with this cache, and lists
/// which of the cache's settings are not in force. Pass the store as `opened` if it has been opened
/// under this configuration before.
///
/// # Errors
/// When Nix does not answer, for example because it rejects the configuration.
pub async fn read_effective(
    nix: &Nix,
    cache: Option<&CacheSettings>,
    opened: Option<Opened>,
) -> Result<EffectiveSettings, Error> {
    let opening = async {
        match opened {
            Some(opened) => Ok(Some(opened)),
            None => open_store(nix).await,
        }
    };
    // Calls of Nix cost more than everything else here, so both run at once.
    let (settings, opened) = tokio::join!(Settings::read(nix), opening);
    let (settings, opened) = (settings?, opened?);
    let mut ignored = Vec::new();
    if let Some(cache) = cache {
        ignored = overridden(&settings, cache);
        if let Some(opened) = &opened
            && is_untrusted(nix, opened).await?
        {
            let own = Settings::read(&with_system_config(nix))
                .await
                .unwrap_or_default();
            let mut more = untrusted(nix, opened, &own, cache);
            // One remedy per setting: while a later line overrides it, the daemon's trust would not
            // help.
            more.retain(|new| ignored.iter().all(|old| old.setting != new.setting));
            ignored.extend(more);
        }
    }
    Ok(EffectiveSettings {
        settings,
        opened,
        ignored,
    })
}

async fn open_store(nix: &Nix) -> Result<Option<Opened>, Error> {
    Ok(match ping(nix, LIMIT).await? {
        Ping::Open(opened) => Some(opened),
        // Commands that need the store open it again and report the reason then.
        Ping::Failed(_) => None,
    })
}

/// Lists what is not in force on the client's side.
fn overridden(settings: &Settings, cache: &CacheSettings) -> Vec<IgnoredSetting> {
    let ignored = |setting, line: String| IgnoredSetting {
        setting,
        reason: IgnoredReason::Overridden,
        line_to_add: line,
        file: None,
    };
    let mut all = Vec::new();
    let listed = settings.list("substituters");
    // A later line may name the cache itself in place of the proxy before it.
    if ![&cache.substituter, &cache.address]
        .map(|url| lists_store(&listed, url))
        .contains(&true)
    {
        all.push(ignored(
            "extra-substituters",
            format!("extra-substituters = {}", cache.address),
        ));
    }
    let key = cache.public_key.as_ref().map(ToString::to_string);
    if let Some(key) = key.filter(|key| !settings.list("trusted-public-keys").contains(key)) {
        all.push(ignored(
            "extra-trusted-public-keys",
            format!("extra-trusted-public-keys = {key}"),
        ));
    }
    if let Some(netrc) = cache
        .netrc
        .as_ref()
        .filter(|netrc| settings.netrc_file().as_ref() != Some(netrc))
    {
        all.push(ignored(
            "netrc-file",
            format!("netrc-file = {}", netrc.display()),
        ));
    }
    all
}

/// Returns the opened store if it belongs to a daemon that does not trust this user.
///
/// # Errors
/// When Nix gives no answer.
pub async fn untrusted_store(nix: &Nix) -> Result<Option<Opened>, Error> {
    let Some(opened) = open_store(nix).await? else {
        return Ok(None);
    };
    Ok(is_untrusted(nix, &opened).await?.then_some(opened))
}

/// Whether this store belongs to a daemon that does not trust this user.
async fn is_untrusted(nix: &Nix, opened: &Opened) -> Result<bool, Error> {
    // Without a daemon there is no trust to check.
    if opened.is_local() {
        return Ok(false);
    }
    if let Some(trusted) = opened.trusted {
        return Ok(!trusted);
    }
    // Versions before 2.15 do not report trust. A daemon that trusts this user accepts any
    // substituter silently, and one that does not prints a warning.
    let config = format!(
        "{}\nextra-substituters = {PROBE_URL}\n",
        nix.config().trim_end()
    );
    let probed = ping(&nix.clone().with_config(&config), LIMIT).await?;
    Ok(matches!(&probed, Ping::Open(probed) if warns_of_ignoring(&probed.stderr, PROBE_URL)))
}

/// Looks for "ignoring untrusted substituter 'URL'", which all versions print.
fn warns_of_ignoring(stderr: &str, url: &str) -> bool {
    stderr
        .lines()
        .filter(|line| line.contains("ignoring untrusted substituter"))
        .any(|line| {
            line.split('\'')
                .nth(1)
                .is_some_and(|named| is_same_store(named, url))
        })
}

/// The same Nix with only the system's settings, which the daemon reads too.
fn with_system_config(nix: &Nix) -> Nix {
    // When this variable is unset (or empty, in some versions), Nix also reads the user's own file.
    nix.clone()
        .with_config("")
        .with_variable("NIX_USER_CONF_FILES", Some("/dev/null"))
}

/// Lists the settings that a daemon ignores for an untrusted user, unless its own configuration has
/// them.
fn untrusted(
    nix: &Nix,
    opened: &Opened,
    own: &Settings,
    cache: &CacheSettings,
) -> Vec<IgnoredSetting> {
    let file = system_file(nix);
    let ignored = |setting, line: String| IgnoredSetting {
        setting,
        reason: IgnoredReason::Untrusted,
        line_to_add: line,
        file: Some(file.clone()),
    };
    let mut all = Vec::new();
    // Use the daemon's own warning, since its settings may live on another machine.
    if warns_of_ignoring(&opened.stderr, &cache.substituter) {
        all.push(ignored("extra-substituters", trusting(cache)));
    }
    let key = cache.public_key.as_ref().map(ToString::to_string);
    if let Some(key) = key.filter(|key| !own.list("trusted-public-keys").contains(key)) {
        all.push(ignored(
            "extra-trusted-public-keys",
            format!("extra-trusted-public-keys = {key}"),
        ));
    }
    // The netrc has a new path in every job, so no fixed line could name it; only trust helps.
    if cache.netrc.is_some() {
        all.push(ignored(
            "netrc-file",
            format!("extra-trusted-users = {}", user()),
        ));
    }
    all
}

/// The line by which a daemon takes the cache from this user. No fixed line could name an address that is another one in
/// each job; only trust helps.
fn trusting(cache: &CacheSettings) -> String {
    if cache.is_lasting {
        format!("extra-trusted-substituters = {}", cache.address)
    } else {
        format!("extra-trusted-users = {}", user())
    }
}

/// The file in which the machine's owner configures the daemon.
fn system_file(nix: &Nix) -> PathBuf {
    let folder = nix.variable("NIX_CONF_DIR").unwrap_or("/etc/nix");
    // Determinate's daemon writes `nix.conf` itself and includes this one.
    let name = if nix.version.flavour == Flavour::Determinate {
        "nix.custom.conf"
    } else {
        "nix.conf"
    };
    PathBuf::from(folder).join(name)
}

/// This user's name, or the number where there is no name.
fn user() -> String {
    let named = Entry::of_this_user().map(|entry| entry.name);
    named.unwrap_or_else(|| rustix::process::geteuid().as_raw().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_daemons_refusal_is_understood_in_all_versions() {
        let old = "warning: ignoring untrusted substituter 'http://c/main'\nStore URL: daemon";
        let new = "warning: ignoring untrusted substituter 'http://c/main', you are not a trusted user.\nRun `man nix.conf`";
        for stderr in [old, new] {
            assert!(
                warns_of_ignoring(stderr, "http://c/main/")
                    && !warns_of_ignoring(stderr, "http://c/other"),
                "{stderr}"
            );
        }
    }

    #[test]
    fn no_address_is_advised_that_is_another_one_in_the_next_job() {
        let cache = |is_lasting| CacheSettings {
            substituter: "http://127.0.0.1:39183/main".into(),
            address: "http://127.0.0.1:39183/main".into(),
            is_lasting,
            attempts: 1,
            public_key: None,
            netrc: None,
        };
        let lasting = trusting(&cache(true));
        assert_eq!(
            lasting,
            "extra-trusted-substituters = http://127.0.0.1:39183/main"
        );
        assert_eq!(
            trusting(&cache(false)),
            format!("extra-trusted-users = {}", user())
        );
    }

    #[test]
    fn what_to_do_is_one_line() {
        let ignored = IgnoredSetting {
            setting: "extra-trusted-public-keys",
            reason: IgnoredReason::Untrusted,
            line_to_add: "extra-trusted-public-keys = main:x".to_owned(),
            file: Some("/etc/nix/nix.conf".into()),
        };
        assert_eq!(
            ignored.to_string(),
            "`extra-trusted-public-keys` is ignored: the Nix daemon does not trust this user; add \
             `extra-trusted-public-keys = main:x` to `/etc/nix/nix.conf` on the runner and restart the daemon"
        );
    }
}
