//! Attaches the cache of a job: probes a server, starts the embedded cache, and leaves out a cache that does not
//! work.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use url::Url;

use crate::report::job::CacheState;
use flywheel_cache::client::endpoint::Endpoint;
use flywheel_cache::client::probe::{self, Layer, Probe};
use flywheel_cache::client::read_proxy::ReadProxy;
use flywheel_cache::server::{Options, Server, Serving, listen};
use flywheel_core::progress::{Progress, Sink};
use flywheel_core::secret::Secret;
use flywheel_nix::cache_name::CacheName;
use flywheel_nix::key::PublicKey;
use flywheel_sys::http::{Clients, Names};

use super::backend::Backend;
use super::source::Source;

/// The cache of a job, and what probing it found.
#[derive(Debug)]
pub(crate) struct Cache {
    /// `None` where no cache was named, or none could be started.
    pub(crate) backend: Option<Backend>,
    /// Why publication is skipped, if Attic's own client was to publish and cannot be had.
    pub(crate) skipped: Option<String>,
    pub(crate) state: CacheState,
    pub(crate) probe: Probe,
    /// The token for this cache.
    pub(crate) token: Option<Secret>,
    /// The key that Nix should trust.
    pub(crate) public_key: Option<PublicKey>,
    /// What Nix reads the cache through, if it does not read it itself.
    pub(super) reading: Option<ReadProxy>,
}

impl Cache {
    /// Whether Nix reads from this cache.
    pub(crate) fn is_attached(&self) -> bool {
        self.state == CacheState::Attached
    }

    /// The address for messages, without credentials.
    pub(crate) fn address(&self) -> Option<String> {
        self.backend.as_ref().map(Backend::address)
    }

    /// The address that goes into Nix's `substituters`.
    pub(super) fn substituter(&self) -> Option<String> {
        match &self.reading {
            Some(proxy) => Some(proxy.substituter()),
            None => self.backend.as_ref().map(Backend::substituter),
        }
    }

    /// What must not appear in a log, because it lets its reader read the cache as this job.
    pub(crate) fn read_key(&self) -> Option<&Secret> {
        self.reading.as_ref().map(ReadProxy::key)
    }

    /// How much of the job's time reads have taken that failed.
    pub(super) fn spent_on_reads(&self) -> Duration {
        self.reading
            .as_ref()
            .map(ReadProxy::spent)
            .unwrap_or_default()
    }

    /// Whether it was left out because its certificate, or something else of TLS, was refused.
    pub(super) fn is_left_out_by_tls(&self) -> bool {
        let failed = self.probe.failed.as_ref();
        !self.is_attached() && failed.is_some_and(|(layer, _)| *layer == Layer::Tls)
    }

    /// The address on a server that has Attic's protocol.
    pub(crate) fn endpoint(&self) -> Option<&Endpoint> {
        self.backend.as_ref().and_then(Backend::endpoint)
    }

    /// Why nothing can be published, if the cache was to be used and was left out, or takes no paths.
    pub(crate) fn refusal(&self) -> Option<String> {
        match &self.state {
            CacheState::LeftOut { layer, text } => {
                Some(format!("the cache was left out (layer `{layer}`): {text}"))
            }
            CacheState::Attached | CacheState::Off | CacheState::NotNamed => self
                .skipped
                .as_ref()
                .map(|reason| format!("publication was skipped: {reason}")),
        }
    }

    fn none(state: CacheState) -> Self {
        Self {
            backend: None,
            skipped: None,
            state,
            probe: Probe::default(),
            token: None,
            public_key: None,
            reading: None,
        }
    }

    /// Stops the embedded cache, and what Nix reads another one through.
    pub(crate) async fn stop(self) {
        if let Some(proxy) = self.reading {
            proxy.stop().await;
        }
        if let Some(backend) = self.backend {
            backend.stop().await;
        }
    }
}

/// Attaches the cache that `source` names. Never fails and never hangs: a cache that does not work is left out. What is
/// wrong is in what it returns, for [`report`].
pub(crate) async fn attach(
    source: &Source,
    key: Option<&PublicKey>,
    token: Option<&Secret>,
    clients: &Clients,
    sink: &Sink,
) -> Cache {
    match source {
        Source::Off => Cache::none(CacheState::Off),
        Source::NotNamed => Cache::none(CacheState::NotNamed),
        // Whether it opens is seen later, once there is a Nix to open it with.
        Source::Store(url) => Cache {
            backend: Some(Backend::Store(url.clone())),
            // Nix sends a token by the netrc, which is for HTTP alone.
            token: token.filter(|_| url.http_host().is_some()).cloned(),
            public_key: key.cloned(),
            ..Cache::none(CacheState::Attached)
        },
        Source::Server(endpoint) => {
            let backend = Backend::Attic(endpoint.clone());
            probe_server(backend, endpoint, key.cloned(), token.cloned(), clients).await
        }
        Source::Embedded { folder, cache } => match embed(folder, cache, sink).await {
            // The embedded cache is probed like a remote one, so that a fault of it shows here and not in the build.
            Ok(embedded) => {
                let Embedded {
                    serving,
                    endpoint,
                    key,
                    token,
                } = embedded;
                let backend = Backend::Embedded {
                    endpoint: endpoint.clone(),
                    serving,
                };
                probe_server(backend, &endpoint, Some(key), token, clients).await
            }
            Err(text) => Cache::none(CacheState::LeftOut {
                layer: "cache",
                text,
            }),
        },
    }
}

async fn probe_server(
    backend: Backend,
    endpoint: &Endpoint,
    key: Option<PublicKey>,
    token: Option<Secret>,
    clients: &Clients,
) -> Cache {
    let names = Names::default();
    let probe = probe::probe(
        endpoint,
        token.as_ref(),
        &clients.api,
        &names,
        probe::DEADLINE,
    )
    .await;
    let state = match &probe.failed {
        None => CacheState::Attached,
        Some((layer, text)) => CacheState::LeftOut {
            layer: layer.as_str(),
            text: text.clone(),
        },
    };
    Cache {
        backend: Some(backend),
        probe,
        token,
        public_key: key,
        ..Cache::none(state)
    }
}

/// Warns of what keeps Nix from using the cache.
pub(super) fn report(cache: &Cache, sink: &Sink) {
    if let CacheState::LeftOut { layer, text } = &cache.state {
        sink.degraded(
            "cache",
            format!("left out, the layer `{layer}` failed: {text}"),
        );
        return;
    }
    if !cache.is_attached() {
        return;
    }
    let announced = cache
        .probe
        .config
        .as_ref()
        .and_then(|config| config.public_key.as_ref());
    match (&cache.public_key, announced) {
        // Nix takes what such a store serves as it is.
        (None, _) if cache.backend.as_ref().is_some_and(Backend::is_trusted) => (),
        (None, announced) => {
            let line = announced
                .map(|key| format!(" (`attic-public-key: {key}` is what the cache announces)"));
            let line = line.unwrap_or_default();
            sink.degraded(
                "cache",
                format!("no `attic-public-key` is set, so Nix refuses every hit and builds instead: set it{line}"),
            );
        }
        (Some(given), Some(announced)) if given != announced => {
            sink.degraded(
                "cache",
                format!("signs with `{announced}`, but `attic-public-key` is `{given}`: Nix refuses its hits"),
            );
        }
        _ => (),
    }
    let foreign_hosts = match (&cache.probe.config, cache.endpoint()) {
        (Some(config), Some(endpoint)) => config.foreign_hosts(endpoint),
        _ => Vec::new(),
    };
    for host in foreign_hosts {
        sink.note(format!(
            "the cache names {host}; Flywheel stays on the address that you gave"
        ));
    }
}

/// The embedded cache with what is needed to use it.
struct Embedded {
    serving: Serving,
    endpoint: Endpoint,
    key: PublicKey,
    token: Option<Secret>,
}

async fn embed(folder: &Path, cache: &CacheName, sink: &Sink) -> Result<Embedded, String> {
    let warnings = sink.clone();
    let options = Options {
        caches: vec![cache.clone()],
        // A line for each upload is for a server's log.
        log: Sink::new(move |event| {
            if let Progress::Degraded { area, text } = event {
                warnings.degraded(area, text);
            }
        }),
        ..Options::default()
    };
    let server = Server::open(folder, options)
        .await
        .map_err(|error| format!("the embedded cache: {error}"))?;
    if server.is_guest() {
        sink.note(format!(
            "another process serves `{}`; this job uses it through that one, and takes it over if that one ends",
            folder.display()
        ));
    }
    // Port 0 takes a free port: several jobs may run on one machine, each with a server of its own.
    let listener = listen(SocketAddr::from(([127, 0, 0, 1], 0)))
        .map_err(|error| format!("the embedded cache: {error}"))?;
    let serving = server
        .serve(listener)
        .map_err(|error| format!("the embedded cache: {error}"))?;
    let token = serving.write_token().cloned();
    let key = serving
        .public_key(cache.as_str())
        .cloned()
        .ok_or("the embedded cache has no key")?;
    let url = Url::parse(&serving.url()).map_err(|error| error.to_string())?;
    Ok(Embedded {
        serving,
        endpoint: Endpoint::new(url, cache.clone()),
        key,
        token,
    })
}
