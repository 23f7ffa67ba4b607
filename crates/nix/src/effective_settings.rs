//! What Nix makes of the settings it was given: read back, with the store as it opens under them, and compared with
//! what was wanted.
//!
//! A daemon obeys restricted settings only from users it trusts, and otherwise ignores them, older
//! versions without a word. So both sides are asked: the client for its view, the daemon for its trust.

use std::path::PathBuf;
use std::time::Duration;

use crate::ping::{Opened, Ping, ping};
use crate::settings::{CacheSettings, Settings};
use crate::tool::{Error, Flavour, Nix};

/// A daemon that needs longer to say a word is taken for dead.
const LIMIT: Duration = Duration::from_secs(20);
/// A substituter that no daemon lists as trusted; nothing ever asks it for a path.
const PROBE_URL: &str = "http://flywheel-trust-probe.invalid";

/// A setting that Nix does not follow, and what would make it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IgnoredSetting {
    /// Which: `extra-substituters`, `extra-trusted-public-keys`, `netrc-file`.
    pub setting: &'static str,
    /// Why.
    pub reason: IgnoredReason,
    /// The exact line to add, or to take away if the reason is `Overridden`.
    pub line_to_add: String,
    /// The file to add it to; `NIX_CONFIG` and the input are not files, then it is `None`.
    pub file: Option<PathBuf>,
}

/// Why Nix does not follow a setting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IgnoredReason {
    /// A later line, most often one of `extra-nix-config`, sets it anew.
    Overridden,
    /// The daemon does not trust this user.
    Untrusted,
}

/// For a log line, complete.
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
                    "`{setting}` is overridden by a later line; `extra-nix-config` should have `{line_to_add}`"
                )
            }
        }
    }
}

/// What Nix is like under a job's settings.
#[derive(Debug)]
pub struct EffectiveSettings {
    /// All its settings.
    pub settings: Settings,
    /// The store, if it opens.
    pub opened: Option<Opened>,
    /// Those of the wanted settings that it does not follow.
    pub ignored: Vec<IgnoredSetting>,
}

/// Asks Nix under its configuration, which `compose` made for a job with this cache, and which of the cache's settings
/// it follows. `opened`: the store as it opens under this configuration, if that is known already.
///
/// # Errors
/// When Nix gives no answer; one that refuses its configuration altogether is among them.
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
        // Whoever needs the store asks again, and says why it stays shut.
        Ping::Failed(_) => None,
    })
}

/// What the client itself does not have in force.
fn overridden(settings: &Settings, cache: &CacheSettings) -> Vec<IgnoredSetting> {
    let ignored = |setting, line: String| IgnoredSetting {
        setting,
        reason: IgnoredReason::Overridden,
        line_to_add: line,
        file: None,
    };
    let mut all = Vec::new();
    if !lists_url(&settings.words("substituters"), &cache.substituter) {
        all.push(ignored(
            "extra-substituters",
            format!("extra-substituters = {}", cache.substituter),
        ));
    }
    let key = cache.public_key.as_ref().map(ToString::to_string);
    if let Some(key) = key.filter(|key| !settings.words("trusted-public-keys").contains(key)) {
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

/// The store as it opened, if it is a daemon's that does not trust this user.
///
/// # Errors
/// When Nix gives no answer.
pub async fn untrusted_store(nix: &Nix) -> Result<Option<Opened>, Error> {
    let Some(opened) = open_store(nix).await? else {
        return Ok(None);
    };
    Ok(is_untrusted(nix, &opened).await?.then_some(opened))
}

/// Whether the store that opened like this is a daemon's that does not trust this user.
async fn is_untrusted(nix: &Nix, opened: &Opened) -> Result<bool, Error> {
    if opened.url == "local" {
        return Ok(false);
    }
    if let Some(trusted) = opened.trusted {
        return Ok(!trusted);
    }
    // Versions before 2.15 do not say: a daemon that trusts us takes any substituter without a word.
    let config = format!(
        "{}\nextra-substituters = {PROBE_URL}\n",
        nix.config().trim_end()
    );
    let probed = ping(&nix.clone().with_config(&config), LIMIT).await?;
    Ok(matches!(&probed, Ping::Open(probed) if warns_of_ignoring(&probed.stderr, PROBE_URL)))
}

/// "ignoring untrusted substituter 'URL'", in all versions.
fn warns_of_ignoring(stderr: &str, url: &str) -> bool {
    let url = url.trim_end_matches('/');
    stderr
        .lines()
        .filter(|line| line.contains("ignoring untrusted substituter"))
        .any(|line| {
            line.split('\'')
                .nth(1)
                .is_some_and(|named| named.trim_end_matches('/') == url)
        })
}

/// The same Nix, with the system's settings alone: those that the daemon has too.
fn with_system_config(nix: &Nix) -> Nix {
    // Without this variable, or with an empty one on some versions, the user's own file would count.
    nix.clone()
        .with_config("")
        .with_variable("NIX_USER_CONF_FILES", Some("/dev/null"))
}

/// What a daemon that does not trust this user ignores, unless its own settings say the same.
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
    // The daemon's own word counts: its settings may be another machine's.
    if warns_of_ignoring(&opened.stderr, &cache.substituter) {
        all.push(ignored(
            "extra-substituters",
            format!("extra-trusted-substituters = {}", cache.substituter),
        ));
    }
    let key = cache.public_key.as_ref().map(ToString::to_string);
    if let Some(key) = key.filter(|key| !own.words("trusted-public-keys").contains(key)) {
        all.push(ignored(
            "extra-trusted-public-keys",
            format!("extra-trusted-public-keys = {key}"),
        ));
    }
    // The netrc is another one in every job, so that nothing but trust helps.
    if cache.netrc.is_some() {
        all.push(ignored(
            "netrc-file",
            format!("extra-trusted-users = {}", user()),
        ));
    }
    all
}

/// The file in which the machine's owner sets what the daemon does.
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

/// This user as the daemon knows him: by name, or by number if he has none.
fn user() -> String {
    let id = rustix::process::geteuid().as_raw().to_string();
    let users = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
    let named = users.lines().find_map(|line| {
        let mut fields = line.split(':');
        let (name, number) = (fields.next()?, fields.nth(1)?);
        (number == id).then(|| name.to_owned())
    });
    named.unwrap_or(id)
}

fn lists_url(list: &[String], url: &str) -> bool {
    list.iter()
        .any(|listed| listed.trim_end_matches('/') == url.trim_end_matches('/'))
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
