//! Finds out whether the store opens, which one it is, and what Nix warns about while opening it.
//! One cheap call, `nix store ping` (an alias of `nix store info` in newer versions).

use std::time::Duration;

use crate::tool::{Error, Nix, error_summary};

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ping {
    Open(Opened),
    Failed(PingFailure),
}

/// Facts about a store that opens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Opened {
    /// `local`, `daemon`, or a URL. It does not show where a local store is: `store_location` does.
    pub url: String,
    /// Whether the daemon trusts this user; `None` for versions that do not report it (before
    /// 2.15).
    pub(crate) trusted: Option<bool>,
    /// The build users' group that the settings name but the system lacks.
    pub(crate) missing_group: Option<String>,
    /// Everything Nix printed on standard error, such as warnings about ignored settings.
    pub(crate) stderr: String,
}

impl Opened {
    /// Whether this process opens the store's files by itself, without a daemon.
    pub fn is_local(&self) -> bool {
        // Since 2.33 or so, parameters are printed as well: `local://?root=/dir`.
        self.url == "local" || self.url.starts_with("local:") || self.url.starts_with("local?")
    }
}

/// Why a store does not open, as far as Flywheel treats the reasons differently. Each holds Nix's
/// message on one line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PingFailure {
    /// The daemon's socket is missing or nothing listens on it.
    NoDaemon(String),
    /// There is no daemon, and the store's files belong to another user.
    PermissionDenied(String),
    Other(String),
}

impl PingFailure {
    /// Nix's message, on one line.
    pub fn text(&self) -> &str {
        match self {
            Self::NoDaemon(text) | Self::PermissionDenied(text) | Self::Other(text) => text,
        }
    }
}

/// Opens the store once.
///
/// # Errors
/// When Nix cannot be started or does not answer within `limit`.
pub async fn ping(nix: &Nix, limit: Duration) -> Result<Ping, Error> {
    let output = nix.ping_store(&[], limit).await?;
    if output.status.success() {
        // Nix 2.8 prints everything on standard error; newer versions use both streams.
        Ok(Ping::Open(read(&output.text(), &output.stderr)))
    } else {
        Ok(Ping::Failed(ping_failure(&output.stderr)))
    }
}

fn read(stdout: &str, stderr: &str) -> Opened {
    let field = |name: &str| {
        let mut lines = stdout.lines().chain(stderr.lines());
        lines
            .find_map(|line| line.strip_prefix(name))
            .map(|value| value.trim().to_owned())
    };
    // Versions differ in printing `1` or `true`.
    let trusted = field("Trusted:").map(|value| value == "1" || value == "true");
    let url = field("Store URL:").unwrap_or_default();
    Opened {
        url,
        trusted,
        missing_group: missing_group(stderr),
        stderr: stderr.to_owned(),
    }
}

/// Parses "the group 'nixbld' specified in 'build-users-group' does not exist".
fn missing_group(stderr: &str) -> Option<String> {
    let line = stderr
        .lines()
        .find(|line| line.contains("'build-users-group' does not exist"))?;
    // The group's name is the first text in quotes.
    line.split('\'').nth(1).map(str::to_owned)
}

fn ping_failure(stderr: &str) -> PingFailure {
    let text = error_summary(stderr);
    if stderr.contains("cannot connect to") {
        PingFailure::NoDaemon(text)
    } else if stderr.contains("Permission denied") || stderr.contains("Operation not permitted") {
        // Nix prints "big-lock: Permission denied" for a store that root owns; 2.8 may fail on a
        // profile folder before that.
        PingFailure::PermissionDenied(text)
    } else {
        PingFailure::Other(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_and_new_versions_are_understood() {
        let old = read(
            "",
            "warning: the group 'nixbld' specified in 'build-users-group' does not exist\nStore URL: local\nVersion: 2.8.0\n",
        );
        assert_eq!((old.url.as_str(), old.trusted), ("local", None));
        assert_eq!(old.missing_group.as_deref(), Some("nixbld"));
        let new = read(
            "Store URL: daemon\nVersion: 2.26.3\nTrusted: 0\n",
            "warning: 'ping' is a deprecated alias\n",
        );
        assert_eq!(
            (new.url.as_str(), new.trusted, new.missing_group),
            ("daemon", Some(false), None)
        );
    }

    #[test]
    fn reasons_are_told_apart() {
        let dead = "error: cannot connect to socket at '/nix/var/nix/daemon-socket/socket': Connection refused";
        assert!(matches!(ping_failure(dead), PingFailure::NoDaemon(_)));
        let locked = "error: opening lock file '/nix/var/nix/db/big-lock': Permission denied";
        assert!(matches!(
            ping_failure(locked),
            PingFailure::PermissionDenied(_)
        ));
        assert_eq!(
            ping_failure("error: database is corrupt\n"),
            PingFailure::Other("database is corrupt".to_owned())
        );
    }
}
