//! Probes a cache within a deadline, layer by layer: whether it can be used, and if not, which layer failed and what to
//! do. It never hangs, repeats only a request that failed by chance, and never sends the token to a public cache.

use std::net::SocketAddr;
use std::time::Duration;

use reqwest::header::{AUTHORIZATION, HeaderValue, LOCATION};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout_at};
use url::Url;

use crate::client::destination::{CacheConfig, Error};
use crate::client::endpoint::Endpoint;
use flywheel_core::secret::Secret;
use flywheel_nix::store_path::STORE_DIR;
use flywheel_sys::http::{self, Names};

/// The wait before the second try.
const RETRY_DELAY: Duration = Duration::from_millis(250);

/// The timeout for all layers together. The job's command waits for the probe.
pub const DEADLINE: Duration = Duration::from_secs(3);
/// The largest response that is read, in bytes.
const RESPONSE_LIMIT: usize = 256 * 1024;

/// The layers that have to work, from the lowest to the highest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Layer {
    /// The host's name has an address.
    Name,
    /// The port accepts a connection.
    Connect,
    /// The TLS handshake, certificate included.
    Tls,
    /// The server responds, and like a cache.
    Http,
    /// The cache may be read, with the token or without.
    Authorised,
    /// The cache exists, and is for this store folder.
    Cache,
}

impl Layer {
    /// The layer's name in outputs and messages.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Name => "name",
            Self::Connect => "connect",
            Self::Tls => "tls",
            Self::Http => "http",
            Self::Authorised => "authorisation",
            Self::Cache => "cache",
        }
    }
}

impl From<http::Layer> for Layer {
    fn from(layer: http::Layer) -> Self {
        match layer {
            http::Layer::Name => Self::Name,
            http::Layer::Connect => Self::Connect,
            http::Layer::Tls => Self::Tls,
            http::Layer::Http => Self::Http,
        }
    }
}

/// The result of a probe.
#[derive(Clone, Debug, Default)]
pub struct Probe {
    /// The layers that work, each with the time since the start of the probe after which this was known.
    pub layers: Vec<(Layer, Duration)>,
    /// Whether Nix can read from the cache. If not, the cache is left out of Nix's settings.
    pub usable: bool,
    /// The layer that failed, and a sentence with the cause and a hint.
    pub failed: Option<(Layer, String)>,
    /// When the result was known, since the start of the probe.
    pub took: Duration,
    /// Whether the cache can be read without a token, so that Nix needs no netrc.
    pub public: bool,
    /// The cache's description, if the server has Attic's protocol and the token may read it.
    pub config: Option<CacheConfig>,
    /// Whether a cache server responds, so that publishing can be tried: a token may have the right to push without
    /// the right to read.
    pub answers: bool,
}

/// Probes a cache: first without the token, then with it if that is refused.
pub async fn probe(
    endpoint: &Endpoint,
    token: Option<&Secret>,
    client: &reqwest::Client,
    names: &Names,
    limit: Duration,
) -> Probe {
    let began = Instant::now();
    let deadline = began + limit;
    let prober = Prober {
        endpoint,
        client,
        deadline,
        limit,
    };
    // The name and the connection are tried separately for their times, and to find the failing layer when the server
    // does not respond. Only the request decides: behind a proxy this host may have no name and no route for the
    // server.
    let (connected, anonymous) = tokio::join!(
        connect(&endpoint.server, names, began, deadline),
        prober.info(None)
    );
    let mut probe = Probe {
        layers: connected,
        ..Probe::default()
    };
    let info = match (anonymous, token) {
        // 404, too: a server may hide a private cache from requests without a token.
        (Err(Failure::Answer(401 | 403 | 404, _)), Some(token)) => prober.info(Some(token)).await,
        (answer, _) => {
            probe.public = answer.is_ok();
            answer
        }
    };
    if !matches!(info, Err(Failure::Request(..))) {
        add_lower_layers(&mut probe.layers, &endpoint.server, began.elapsed());
        probe.answers = true;
    }
    probe.took = began.elapsed();
    match info.map_err(|failure| prober.explain(failure, token.is_some(), &probe.layers)) {
        Err((layer, text)) => {
            // A failure below this layer means that the response was none of a cache: a web page, or a redirect.
            probe.answers &= layer >= Layer::Authorised;
            probe.failed = Some((layer, text));
        }
        Ok(()) => {
            let known = began.elapsed();
            probe
                .layers
                .extend([(Layer::Authorised, known), (Layer::Cache, known)]);
            probe.usable = true;
            // A public cache needs no token, so it gets none.
            probe.config = prober.config(token.filter(|_| !probe.public)).await;
        }
    }
    probe
}

/// Tries the layers up to the connection.
async fn connect(
    server: &Url,
    names: &Names,
    began: Instant,
    deadline: Instant,
) -> Vec<(Layer, Duration)> {
    let mut layers = Vec::new();
    let (Some(host), Some(port)) = (server.host_str(), server.port_or_known_default()) else {
        return layers;
    };
    let Ok(Ok(addresses)) = timeout_at(deadline, names.lookup(host)).await else {
        return layers;
    };
    layers.push((Layer::Name, began.elapsed()));
    // One address that accepts is enough.
    for address in addresses {
        let connected =
            timeout_at(deadline, TcpStream::connect(SocketAddr::new(address, port))).await;
        if matches!(connected, Ok(Ok(_))) {
            layers.push((Layer::Connect, began.elapsed()));
            break;
        }
    }
    layers
}

/// A response proves that all layers below it work, whatever [`connect`] found.
fn add_lower_layers(layers: &mut Vec<(Layer, Duration)>, server: &Url, now: Duration) {
    let tls = server.scheme() == "https";
    for layer in [Layer::Name, Layer::Connect, Layer::Tls, Layer::Http] {
        if (layer != Layer::Tls || tls) && !layers.iter().any(|(known, _)| *known == layer) {
            layers.push((layer, now));
        }
    }
}

/// Why a request failed.
enum Failure {
    /// No response: the layer, if it is known, and the cause.
    Request(Option<Layer>, String),
    /// A response with this status, and its message.
    Answer(u16, String),
    /// A success that does not come from a cache, and what it is instead.
    Foreign(Layer, String),
}

struct Prober<'a> {
    endpoint: &'a Endpoint,
    client: &'a reqwest::Client,
    deadline: Instant,
    limit: Duration,
}

impl Prober<'_> {
    /// Checks `nix-cache-info`, which every Nix cache serves.
    async fn info(&self, token: Option<&Secret>) -> Result<(), Failure> {
        let text = self
            .get_with_retry(self.endpoint.read("nix-cache-info"), token)
            .await?;
        let text = String::from_utf8_lossy(&text);
        let store = text
            .lines()
            .find_map(|line| line.strip_prefix("StoreDir:"))
            .map(str::trim);
        match store {
            Some(STORE_DIR) => Ok(()),
            Some(other) => {
                let text = format!(
                    "it serves `{}` and not `{STORE_DIR}`",
                    flywheel_core::text::one_line(other, 80)
                );
                Err(Failure::Foreign(Layer::Cache, text))
            }
            // Such as the login page of something in front of the cache.
            None if text.trim_start().starts_with('<') => Err(Failure::Foreign(
                Layer::Http,
                "it answers with a web page".to_owned(),
            )),
            None => Err(Failure::Foreign(
                Layer::Http,
                "its `nix-cache-info` names no `StoreDir`".to_owned(),
            )),
        }
    }

    /// Attic's description of the cache. `None` for a plain Nix cache, and for a token that may only push.
    async fn config(&self, token: Option<&Secret>) -> Option<CacheConfig> {
        let text = self.get(self.endpoint.config(), token).await.ok()?;
        serde_json::from_slice(&text)
            .ok()
            .map(CacheConfig::from_json)
    }

    /// Repeats a request that failed by chance: one bad response must not cost the job its cache.
    async fn get_with_retry(&self, url: Url, token: Option<&Secret>) -> Result<Vec<u8>, Failure> {
        let first = self.get(url.clone(), token).await;
        // Overload, server errors and broken connections pass; refusals and wrong addresses do not.
        let by_chance = match &first {
            Err(Failure::Answer(status, _)) => matches!(status, 429 | 500..),
            Err(Failure::Request(layer, _)) => *layer == Some(Layer::Http),
            _ => false,
        };
        if !by_chance || Instant::now() + RETRY_DELAY >= self.deadline {
            return first;
        }
        tokio::time::sleep(RETRY_DELAY).await;
        self.get(url, token).await
    }

    async fn get(&self, url: Url, token: Option<&Secret>) -> Result<Vec<u8>, Failure> {
        let timed_out = || Failure::Request(None, String::new());
        let mut request = self.client.get(url);
        if let Some(token) = token {
            let text = zeroize::Zeroizing::new(format!("Bearer {}", token.expose()));
            // Counts as a refusal by the server, so that the hint is about the token.
            let mut value = HeaderValue::from_str(&text).map_err(|_| {
                Failure::Answer(
                    401,
                    "the token holds characters that cannot be sent".to_owned(),
                )
            })?;
            // Keeps the token out of debug output.
            value.set_sensitive(true);
            request = request.header(AUTHORIZATION, value);
        }
        let broken = |error: reqwest::Error| {
            Failure::Request(Some(http::layer(&error).into()), http::chain(error))
        };
        let mut response = timeout_at(self.deadline, request.send())
            .await
            .map_err(|_| timed_out())?
            .map_err(broken)?;
        let (status, headers) = (response.status(), response.headers().clone());
        let mut body = Vec::new();
        while body.len() < RESPONSE_LIMIT {
            match timeout_at(self.deadline, response.chunk())
                .await
                .map_err(|_| timed_out())?
                .map_err(broken)?
            {
                Some(chunk) => body.extend_from_slice(&chunk),
                None => break,
            }
        }
        if status.is_success() {
            return Ok(body);
        }
        if let Some(target) = headers.get(LOCATION).filter(|_| status.is_redirection()) {
            let target = target
                .to_str()
                .ok()
                .and_then(|text| self.endpoint.server.join(text).ok());
            let shown =
                target.map_or_else(|| "another address".to_owned(), |url| http::redact(&url));
            return Err(Failure::Foreign(
                Layer::Http,
                format!(
                    "it redirects to {}",
                    flywheel_core::text::one_line(&shown, 120)
                ),
            ));
        }
        Err(Failure::Answer(
            status.as_u16(),
            Error::from_response(status.as_u16(), &headers, &body, 0).to_string(),
        ))
    }

    fn uses_tls(&self) -> bool {
        self.endpoint.server.scheme() == "https"
    }

    /// The failed layer, and a sentence with the cause and a hint.
    fn explain(
        &self,
        failure: Failure,
        has_token: bool,
        reached: &[(Layer, Duration)],
    ) -> (Layer, String) {
        let (server, cache) = (http::redact(&self.endpoint.server), &self.endpoint.cache);
        let up_to = |layer: Layer| reached.iter().any(|(known, _)| *known == layer);
        let (layer, what) = match failure {
            // The separate attempt did connect, so the TLS handshake has failed.
            Failure::Request(Some(Layer::Connect), text)
                if up_to(Layer::Connect) && self.uses_tls() =>
            {
                (Layer::Tls, text)
            }
            Failure::Request(Some(layer), text) => (layer, text),
            // A timeout has no layer of its own: the first layer that was not reached is the one that hangs.
            Failure::Request(None, _) => {
                let layer = [Layer::Name, Layer::Connect]
                    .into_iter()
                    .find(|layer| !up_to(*layer));
                let seconds = self.limit.as_secs_f64();
                (
                    layer.unwrap_or(Layer::Http),
                    format!("no answer within {seconds} s"),
                )
            }
            Failure::Foreign(layer, text) => (layer, text),
            Failure::Answer(401 | 403, text) => (Layer::Authorised, text),
            Failure::Answer(404, text) => (Layer::Cache, text),
            Failure::Answer(_, text) => (Layer::Http, text),
        };
        let advice = match layer {
            Layer::Name => "Check the host in `attic-server`, and the runner's name servers",
            Layer::Connect => {
                "Check the port in `attic-server`, that the server is up, and that the runner may reach it"
            }
            Layer::Tls => {
                "Check `https` in `attic-server`, and name a private authority's file in `NIX_SSL_CERT_FILE`"
            }
            Layer::Http => {
                "Check that `attic-server` is the address of the cache server itself, and its log"
            }
            Layer::Authorised if has_token => {
                "The token in `ATTIC_TOKEN` may not read this cache: it has ended, lacks the right `pull`, or is for another cache"
            }
            Layer::Authorised => "The cache is private: give a token in `ATTIC_TOKEN`",
            Layer::Cache => "Check the name in `attic-cache`",
        };
        (
            layer,
            format!("{server} (cache `{cache}`): {what}. {advice}."),
        )
    }
}

#[cfg(test)]
mod tests;
