//! Whether a job's Nix reads its cache through the proxy (`flywheel_cache::client::read_proxy`), which bounds what a cache
//! can cost. Where Nix would not reach the proxy, Nix reads the cache itself, within the bounds of its own settings.

use std::time::Duration;

use flywheel_cache::client::read_proxy::{ReadProxy, Upstream};
use flywheel_core::progress::Sink;
use flywheel_core::secret::Secret;
use flywheel_nix::bootstrap::Ready;
use flywheel_nix::netrc;
use flywheel_nix::ping::Opened;
use flywheel_nix::settings::sets;
use flywheel_sys::http::Clients;

use super::attach::Cache;
use super::backend::Backend;

/// How long a daemon has to come to the proxy.
const TRIAL_LIMIT: Duration = Duration::from_secs(10);
/// A name that no store path has; a hash of 32 digits goes before it.
const TRIAL_NAME: &str = "flywheel-reads-through-the-proxy";
/// The digits of Nix's base 32.
const DIGITS: &[u8; 32] = b"0123456789abcdfghijklmnpqrsvwxyz";

/// What it takes to decide it.
pub(super) struct ReadInputs<'a> {
    pub(super) ready: &'a Ready,
    pub(super) http: &'a Clients,
    /// The runner's `NIX_CONFIG`.
    pub(super) base: &'a str,
    /// The lines of the input `extra-nix-config`.
    pub(super) extra: &'a str,
    /// Whether steps read the cache that may outlive this process.
    pub(super) is_for_later_steps: bool,
}

/// Starts the proxy. `None` where Nix has to read the cache itself.
pub(super) async fn start(
    inputs: &ReadInputs<'_>,
    cache: &Cache,
    sink: &Sink,
) -> Option<ReadProxy> {
    let upstream = upstream(inputs, cache)?;
    // Older ones do not go on without a cache that is gone: they end by a signal.
    if inputs.is_for_later_steps && !inputs.ready.nix.version.at_least(2, 26) {
        sink.note(
            "Nix reads the cache itself: this version would not survive the end of the watch"
                .to_owned(),
        );
        return None;
    }
    let client = inputs.http.streaming.clone();
    let proxy = match ReadProxy::start(upstream, client, sink.clone()).await {
        Ok(proxy) => proxy,
        Err(error) => {
            sink.note(format!("Nix reads the cache without a proxy: {error}"));
            return None;
        }
    };
    // Nix would look for the proxy beyond the proxy of the network.
    let address = proxy.substituter().parse().ok()?;
    if inputs.http.direct.is_proxied(&address) {
        proxy.stop().await;
        sink.note("Nix reads the cache without a proxy of Flywheel's: `http_proxy` is set, and `no_proxy` does not list 127.0.0.1".to_owned());
        return None;
    }
    if !is_read_by_client(inputs) && !is_reached(inputs, &proxy).await {
        proxy.stop().await;
        sink.note("Nix's daemon reads the cache itself: it does not trust this user, or has a loopback of its own".to_owned());
        return None;
    }
    Some(proxy)
}

fn upstream(inputs: &ReadInputs<'_>, cache: &Cache) -> Option<Upstream> {
    if !cache.is_attached() {
        return None;
    }
    let token = cache.token.clone().filter(|_| !cache.probe.public);
    match cache.backend.as_ref()? {
        Backend::Attic(endpoint) => Upstream::new(&endpoint.substituter(), token),
        // Whoever had the port after this process could give any path.
        Backend::Store(url) if url.is_trusted() => None,
        // Nothing has probed it, so that it is not known which roots its certificate needs.
        Backend::Store(_) if sets(inputs.extra, "ssl-cert-file") => None,
        // The user's own netrc may have a credential for it, which Nix would send.
        Backend::Store(url) if token.is_none() && has_credential(inputs, url.http_host()?) => None,
        Backend::Store(url) => Upstream::new(url.as_str(), token),
        // It is in this process.
        Backend::Embedded { .. } => None,
    }
}

fn has_credential(inputs: &ReadInputs<'_>, host: &str) -> bool {
    let Some(settings) = &inputs.ready.settings_before else {
        return true;
    };
    if sets(inputs.extra, "netrc-file") || inputs.extra.contains("include") {
        return true;
    }
    let file = settings.netrc_file();
    file.is_some_and(|file| netrc::may_name(&file, host))
}

/// Whether the job's own processes open the store and read from caches, and no daemon does it for them.
fn is_read_by_client(inputs: &ReadInputs<'_>) -> bool {
    let is_local = inputs.ready.opened.as_ref().is_some_and(Opened::is_local);
    is_local && !sets(inputs.extra, "store") && !inputs.extra.contains("include")
}

/// Has a daemon look for a path in the proxy: whether it comes there depends on its trust in this user, on where it runs,
/// and on its own settings, none of which can be relied on to be known.
async fn is_reached(inputs: &ReadInputs<'_>, proxy: &ReadProxy) -> bool {
    let lines = [
        inputs.base.to_owned(),
        inputs.ready.settings().join("\n"),
        inputs.extra.to_owned(),
        // No other cache is asked.
        format!("substituters = {}", proxy.substituter()),
    ];
    let nix = inputs.ready.nix.clone().with_config(&lines.join("\n"));
    let secret = Secret::random();
    let digits = secret
        .expose()
        .bytes()
        .map(|byte| char::from(DIGITS[usize::from(byte % 32)]));
    let path = format!("/nix/store/{}-{TRIAL_NAME}", digits.collect::<String>());
    // It fails in any case, because no cache has the path.
    let _ = nix
        .run(&["build", "--dry-run", "--no-link", &path], TRIAL_LIMIT)
        .await;
    proxy.was_asked()
}
