//! Nix's settings for a job: the netrc, the access token and `NIX_CONFIG` are composed, written to the private folder,
//! and read back from Nix.

use std::path::{Path, PathBuf};

use flywheel_core::progress::Sink;
use flywheel_core::secret::Secret;
use flywheel_nix::bootstrap::Ready;
use flywheel_nix::effective_settings::{EffectiveSettings, read_effective};
use flywheel_nix::netrc;
use flywheel_nix::settings::{CacheSettings, Settings, WantedSettings, compose, malformed, sets};
use flywheel_sys::runner::env::Env;

use super::attach::Cache;
use super::backend::Backend;

/// What a job's settings are made of.
pub(crate) struct SettingsInputs<'a> {
    pub(crate) env: &'a Env,
    pub(crate) ready: &'a Ready,
    pub(crate) cache: &'a Cache,
    /// The token for fetchers from GitHub.
    pub(crate) github_token: Option<&'a Secret>,
    /// Whether the job publishes. A job that only reads a public cache needs no netrc.
    pub(crate) publishes: bool,
    /// The lines of the input `extra-nix-config`.
    pub(crate) extra: &'a str,
    /// The folder for secret files.
    pub(crate) private: &'a Path,
}

#[derive(Debug, Default)]
pub(crate) struct NixSettings {
    /// The job's `NIX_CONFIG`.
    pub(crate) config: String,
    /// The settings that are about the cache.
    cache: Option<CacheSettings>,
}

/// Composes the settings. A file that cannot be written is a warning, and its setting is left out.
pub(crate) async fn prepare(inputs: &SettingsInputs<'_>, sink: &Sink) -> NixSettings {
    let base = inputs.env.get("NIX_CONFIG").unwrap_or_default();
    for number in malformed(base) {
        sink.degraded(
            "nix settings",
            format!(
                "line {number} of the runner's `NIX_CONFIG` is malformed, and Nix refuses all of it"
            ),
        );
    }
    let before = match &inputs.ready.settings_before {
        Some(settings) => Ok(settings.clone()),
        None => Settings::read(&inputs.ready.nix).await,
    };
    let before = before.unwrap_or_else(|error| {
        sink.degraded(
            "nix settings",
            format!("the settings in force cannot be read: {error}"),
        );
        Settings::default()
    });
    let cache = inputs
        .cache
        .is_attached()
        .then(|| cache_settings(inputs, &before, sink))
        .flatten();
    let access_tokens = access_tokens(inputs, &before, sink);
    let wanted = WantedSettings {
        cache,
        access_tokens,
        repairs: inputs.ready.settings(),
        extra: inputs.extra.to_owned(),
        before,
    };
    NixSettings {
        config: compose(base, &wanted),
        cache: wanted.cache,
    }
}

/// Reads back from Nix what is in force, and warns of each setting that Nix ignores. `extra`: the lines of the input
/// `extra-nix-config`.
pub(crate) async fn report_ignored(
    ready: &Ready,
    settings: &NixSettings,
    extra: &str,
    sink: &Sink,
) -> Option<EffectiveSettings> {
    let nix = ready.nix.clone().with_config(&settings.config);
    // None of our lines changes how a local store opens, so what was found before holds, unless the user's lines
    // name another store.
    let may_change = sets(extra, "store") || extra.contains("include");
    let opened = ready
        .opened
        .clone()
        .filter(|opened| opened.is_local() && !may_change);
    match read_effective(&nix, settings.cache.as_ref(), opened).await {
        Ok(found) => {
            found
                .ignored
                .iter()
                .for_each(|one| sink.degraded("nix settings", one.to_string()));
            Some(found)
        }
        Err(error) => {
            sink.degraded(
                "nix settings",
                format!("what Nix uses cannot be read back: {error}"),
            );
            None
        }
    }
}

fn cache_settings(
    inputs: &SettingsInputs<'_>,
    before: &Settings,
    sink: &Sink,
) -> Option<CacheSettings> {
    // A job that only reads a public cache has no use for the token, so its command gets no file to read it from.
    let token = inputs
        .cache
        .token
        .as_ref()
        .filter(|_| inputs.publishes || !inputs.cache.probe.public);
    let backend = inputs.cache.backend.as_ref()?;
    let netrc = token
        .zip(backend.credential_host())
        .and_then(|(token, host)| {
            let existing = before.netrc_file().filter(|file| file.is_file());
            let file = match netrc::write(inputs.private, host, token, existing.as_deref()) {
                // A netrc of the user that cannot be read must not cost the job the credential of its own cache.
                Err(error @ netrc::WriteError::Existing { .. }) => {
                    sink.degraded(
                        "nix settings",
                        format!("credentials for other hosts are missing in this job: {error}"),
                    );
                    netrc::write(inputs.private, host, token, None)
                }
                file => file,
            };
            or_left_out("netrc", file, sink)
        });
    Some(CacheSettings {
        substituter: inputs.cache.substituter()?,
        address: backend.substituter(),
        // The embedded cache has a port of the system's, another one in each job.
        is_lasting: !matches!(backend, Backend::Embedded { .. }),
        attempts: attempts(inputs, backend),
        public_key: inputs.cache.public_key.clone(),
        netrc,
    })
}

/// How often Nix tries a download. From 2.31 or so on it waits a minute before the second try after a 429, whatever the
/// server asks for. A proxy before the cache lets no 429 through; without one, a try less costs a build at most.
fn attempts(inputs: &SettingsInputs<'_>, backend: &Backend) -> u32 {
    let waits = inputs.ready.nix.version.at_least(2, 31);
    let is_direct = inputs.cache.substituter().as_deref() == Some(&backend.substituter());
    if waits && is_direct && !matches!(backend, Backend::Embedded { .. }) {
        1
    } else {
        2
    }
}

fn access_tokens(inputs: &SettingsInputs<'_>, before: &Settings, sink: &Sink) -> Option<PathBuf> {
    // Nix's `access-tokens` are by host name; GitHub Enterprise Server has one of its own.
    let host = inputs
        .env
        .get("GITHUB_SERVER_URL")
        .and_then(|url| url.strip_prefix("https://"))
        .unwrap_or("github.com");
    let host = host.trim_end_matches('/');
    let token = inputs.github_token?;
    let present = before.access_tokens();
    if present.get(host).is_some_and(|other| other != token) {
        sink.note(format!(
            "Nix's `access-tokens` has another token for `{host}`; this job uses its own `GITHUB_TOKEN` (`access-tokens` in `extra-nix-config` goes before it)"
        ));
    }
    let file = netrc::write_access_token(inputs.private, host, token, &present);
    or_left_out("access token", file, sink)
}

fn or_left_out(
    what: &str,
    file: Result<PathBuf, netrc::WriteError>,
    sink: &Sink,
) -> Option<PathBuf> {
    file.map_err(|error| sink.degraded("nix settings", format!("the {what} is left out: {error}")))
        .ok()
}
