//! The store paths that this job's commands name to Nix's daemon, learned from a proxy in front of its socket. The proxy
//! is in the way of every command, so it is only used while another job is at work on the store.

use std::collections::BTreeSet;
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

/// How often the registry is read for a job that has come to the store.
const LOOK_INTERVAL: Duration = Duration::from_millis(500);
/// How often new names are recorded as this job's claims.
const CLAIM_INTERVAL: Duration = Duration::from_millis(100);

/// The proxy of one job, and the task that switches it on.
#[derive(Debug)]
pub(crate) struct DaemonNames {
    proxy: Arc<Mutex<DaemonProxy>>,
    link: PathBuf,
    _switching: AbortOnDropHandle<()>,
}

impl DaemonNames {
    /// Lets the job's commands go through the proxy from the moment at which another job is at work on the store.
    pub(super) async fn start(proxy: DaemonProxy, host: Arc<StoreHost>, sink: Sink) -> Self {
        let link = proxy.link().to_owned();
        let proxy = Arc::new(Mutex::new(proxy));
        // The first look is taken before the command begins, so that nothing of it is missed.
        let is_active = host.has_neighbours() && activate(&proxy, &sink).await;
        let switching = tokio::spawn(switch(Arc::clone(&proxy), host, is_active, sink));
        Self {
            proxy,
            link,
            _switching: AbortOnDropHandle::new(switching),
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

    /// Points the link to the daemon again, and ends the proxy.
    pub(super) async fn stop(&self) {
        self.proxy.lock().await.stop().await;
    }
}

async fn activate(proxy: &Mutex<DaemonProxy>, sink: &Sink) -> bool {
    match proxy.lock().await.activate().await {
        Ok(()) => true,
        Err(error) => {
            report(&error, sink);
            false
        }
    }
}

fn report(error: &ProxyError, sink: &Sink) {
    let hint = error.hint().map(|hint| format!(" {hint}"));
    let text = format!(
        "what this job names to Nix's daemon is not known, so its paths may be ambiguous: {error}.{}",
        hint.unwrap_or_default()
    );
    sink.degraded("publication", text);
}

/// Switches the proxy on when another job comes, and records what passes it as this job's claims.
async fn switch(
    proxy: Arc<Mutex<DaemonProxy>>,
    host: Arc<StoreHost>,
    mut is_active: bool,
    sink: Sink,
) {
    while !is_active {
        sleep(LOOK_INTERVAL).await;
        if host.has_neighbours() {
            is_active = activate(&proxy, &sink).await;
            if !is_active {
                return;
            }
        }
    }
    let mut claimed = BTreeSet::new();
    loop {
        let named = proxy.lock().await.named();
        let new = named
            .difference(&claimed)
            .filter(|path| !path.is_derivation());
        host.claim(new.map(StorePath::base_name));
        claimed = named;
        sleep(CLAIM_INTERVAL).await;
    }
}
