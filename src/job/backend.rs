//! The three kinds of cache that a job can have behind it, and what differs between them.

use flywheel_cache::client::copy::StoreUrl;
use flywheel_cache::client::endpoint::Endpoint;
use flywheel_cache::server::Serving;

/// The cache behind a job.
#[derive(Debug)]
pub(crate) enum Backend {
    /// A server with Attic's protocol.
    Attic(Endpoint),
    /// Another kind of store, which `nix copy` writes to.
    Store(StoreUrl),
    /// Flywheel's own server, which runs as long as the job.
    Embedded {
        endpoint: Endpoint,
        serving: Serving,
    },
}

impl Backend {
    /// The address that goes into Nix's `substituters`.
    pub(crate) fn substituter(&self) -> String {
        match self {
            Self::Attic(endpoint) | Self::Embedded { endpoint, .. } => endpoint.substituter(),
            Self::Store(url) => url.as_str().to_owned(),
        }
    }

    /// Whether the address says that Nix takes paths without a signature from it (`?trusted=true`).
    pub(crate) fn is_trusted(&self) -> bool {
        match self {
            Self::Store(url) => url.is_trusted(),
            Self::Attic(_) | Self::Embedded { .. } => false,
        }
    }

    /// The address for messages, without credentials.
    pub(crate) fn address(&self) -> String {
        match self {
            Self::Attic(endpoint) | Self::Embedded { endpoint, .. } => endpoint.substituter(),
            Self::Store(url) => url.to_string(),
        }
    }

    /// The host of the netrc entry that the token goes into; `None` for a store that is not reached over HTTP.
    pub(crate) fn credential_host(&self) -> Option<&str> {
        match self {
            Self::Attic(endpoint) | Self::Embedded { endpoint, .. } => endpoint.server.host_str(),
            Self::Store(url) => url.http_host(),
        }
    }

    /// The address on a server that has Attic's protocol.
    pub(crate) fn endpoint(&self) -> Option<&Endpoint> {
        match self {
            Self::Attic(endpoint) | Self::Embedded { endpoint, .. } => Some(endpoint),
            Self::Store(_) => None,
        }
    }

    /// Stops the embedded cache.
    pub(crate) async fn stop(self) {
        match self {
            Self::Embedded { serving, .. } => serving.stop().await,
            Self::Attic(_) | Self::Store(_) => (),
        }
    }
}
