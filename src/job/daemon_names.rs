//! The store paths that this job's commands name to Nix's daemon, learned from a proxy in front of its socket: another
//! user cannot read the temporary roots of the daemon's workers. The proxy is there for the whole job, and not only
//! while another job is at work on the store, because nothing else shows a result that was valid before the job. Where
//! the proxy fails, the commands reach the daemon all the same.

use std::collections::BTreeSet;
use std::error::Error as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Mutex;
use tokio::time::sleep;
use tokio_util::task::AbortOnDropHandle;

use super::store_host::StoreHost;
use flywheel_core::exit::Explain as _;
use flywheel_core::progress::Sink;
use flywheel_nix::daemon_proxy::{DaemonProxy, ProxyError};
use flywheel_nix::store_path::StorePath;

/// How often new names are recorded as this job's claims.
const CLAIM_INTERVAL: Duration = Duration::from_millis(100);
/// By when another job has recorded what it has named.
pub(super) const CLAIM_LATENCY: Duration = CLAIM_INTERVAL.saturating_mul(3);

/// The proxy of one job, and the task that records what passes it as this job's claims.
#[derive(Debug)]
pub(crate) struct DaemonNames {
    proxy: Arc<Mutex<DaemonProxy>>,
    link: PathBuf,
    _claiming: AbortOnDropHandle<()>,
}

impl DaemonNames {
    /// Lets the job's commands go through the proxy.
    pub(super) async fn start(mut proxy: DaemonProxy, host: Arc<StoreHost>, sink: &Sink) -> Self {
        let link = proxy.link().to_owned();
        // Before the command begins, so that nothing of it is missed.
        if let Err(error) = proxy.activate().await {
            report(&error, sink);
        }
        let proxy = Arc::new(Mutex::new(proxy));
        let claiming = tokio::spawn(claim(Arc::clone(&proxy), host));
        Self {
            proxy,
            link,
            _claiming: AbortOnDropHandle::new(claiming),
        }
    }

    /// The value of `NIX_DAEMON_SOCKET_PATH` for the job's commands.
    pub(crate) fn link(&self) -> &PathBuf {
        &self.link
    }

    /// What the commands have named so far through the proxy, and more: it is to be compared with what was added.
    pub(super) async fn named(&self) -> BTreeSet<StorePath> {
        let proxy = self.proxy.lock().await;
        // Names that do not arrive in time make their paths ambiguous, which is reported for each of them.
        proxy.flush().await;
        proxy.named()
    }

    /// The derivations that the commands have asked the daemon to build, whether they had to be built or not.
    pub(super) async fn wanted(&self) -> BTreeSet<StorePath> {
        let proxy = self.proxy.lock().await;
        proxy.flush().await;
        proxy.wanted()
    }

    /// Whether every name that passed is known.
    pub(super) async fn is_complete(&self) -> bool {
        self.proxy.lock().await.is_complete()
    }

    /// Points the link to the daemon again, and ends the proxy.
    pub(super) async fn stop(&self) {
        self.proxy.lock().await.stop().await;
    }
}

fn report(error: &ProxyError, sink: &Sink) {
    let cause = error.source().map(|cause| format!(": {cause}"));
    let hint = error.hint().map(|hint| format!(" {hint}"));
    let text = format!(
        "what this job names to Nix's daemon is not known: a result that was in the store before is not published, and beside another job paths may be ambiguous: {error}{}.{}",
        cause.unwrap_or_default(),
        hint.unwrap_or_default()
    );
    sink.degraded("publication", text);
}

async fn claim(proxy: Arc<Mutex<DaemonProxy>>, host: Arc<StoreHost>) {
    let mut claimed = BTreeSet::new();
    loop {
        let named = proxy.lock().await.named();
        let new = named.difference(&claimed);
        host.claim(
            new.filter(|path| !path.is_derivation())
                .map(StorePath::base_name),
        );
        claimed = named;
        sleep(CLAIM_INTERVAL).await;
    }
}
