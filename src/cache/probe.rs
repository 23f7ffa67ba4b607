//! Whether a cache is of use, found out within a deadline, layer by layer; and if not, which layer
//! failed and what to do. Never hangs, never retries, and never sends the token where none is needed.

use std::net::SocketAddr;
use std::time::Duration;

use reqwest::header::{AUTHORIZATION, HeaderValue, LOCATION};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout_at};
use url::Url;

use crate::cache::attic::{CacheConfig, Error};
use crate::cache::endpoint::Endpoint;
use crate::http::{self, Names};
use crate::nix::store_path::STORE_DIR;
use crate::secret::Secret;

/// From a bad answer to the second try.
const RETRY_DELAY: Duration = Duration::from_millis(250);

/// What all layers together may take: a job waits for this before its command runs.
pub const DEADLINE: Duration = Duration::from_secs(3);
/// More than this is read of no answer.
const ANSWER_LIMIT: usize = 256 * 1024;

/// What has to work, from the ground up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Layer {
    /// The host's name has an address.
    Name,
    /// The port accepts a connection.
    Connect,
    /// The TLS handshake, certificate included.
    Tls,
    /// It answers, and as a cache would.
    Http,
    /// It lets us read.
    Authorised,
    /// The cache is there, for our store folder.
    Cache,
}

impl Layer {
    /// The layer as outputs and messages have it.
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

/// What a cache turned out to be.
#[derive(Clone, Debug, Default)]
pub struct Probe {
    /// The layers that work, with the time since the probe began at which each was known to.
    pub layers: Vec<(Layer, Duration)>,
    /// Whether Nix can read from it; if not, it belongs in no settings.
    pub usable: bool,
    /// The layer that failed, and a sentence that says how and what to do.
    pub failed: Option<(Layer, String)>,
    /// Whether it can be read without a token, so that Nix needs no netrc.
    pub public: bool,
    /// What it says of itself, if it speaks Attic's protocol and lets us ask.
    pub config: Option<CacheConfig>,
    /// Whether it is a server that answers, so that publishing may at least be tried: a token
    /// may push without being allowed to read.
    pub answers: bool,
}

/// Probes a cache: anonymously first, then with the token where that is refused.
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
    // The ground is tried by hand for the times, and to know how far a silent server lets us come.
    // What counts is the request: behind a proxy there may be no name and no route of our own.
    let (ground, anonymous) = tokio::join!(
        ground(&endpoint.server, names, began, deadline),
        prober.info(None)
    );
    let mut probe = Probe {
        layers: ground,
        ..Probe::default()
    };
    let info = match (anonymous, token) {
        (Err(Failure::Answer(401 | 403 | 404, _)), Some(token)) => prober.info(Some(token)).await,
        (answer, _) => {
            probe.public = answer.is_ok();
            answer
        }
    };
    if !matches!(info, Err(Failure::Request(..))) {
        reach(&mut probe.layers, &endpoint.server, began.elapsed());
        probe.answers = true;
    }
    match info.map_err(|failure| prober.explain(failure, token.is_some(), &probe.layers)) {
        Err((layer, text)) => {
            probe.answers &= layer >= Layer::Authorised;
            probe.failed = Some((layer, text));
        }
        Ok(()) => {
            let known = began.elapsed();
            probe
                .layers
                .extend([(Layer::Authorised, known), (Layer::Cache, known)]);
            probe.usable = true;
            probe.config = prober.config(token.filter(|_| !probe.public)).await;
        }
    }
    probe
}

/// The layers up to the connection, tried by hand.
async fn ground(
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

/// An answer proves all layers below it, whatever the hand-made trial said.
fn reach(layers: &mut Vec<(Layer, Duration)>, server: &Url, now: Duration) {
    let tls = server.scheme() == "https";
    for layer in [Layer::Name, Layer::Connect, Layer::Tls, Layer::Http] {
        if (layer != Layer::Tls || tls) && !layers.iter().any(|(known, _)| *known == layer) {
            layers.push((layer, now));
        }
    }
}

/// Why a question gave nothing.
enum Failure {
    /// No answer: the layer if it is known, and what broke.
    Request(Option<Layer>, String),
    /// An answer with this status, and the server's own words.
    Answer(u16, String),
    /// A success that is not a cache's, and what it is instead.
    Foreign(Layer, String),
}

struct Prober<'a> {
    endpoint: &'a Endpoint,
    client: &'a reqwest::Client,
    deadline: Instant,
    limit: Duration,
}

impl Prober<'_> {
    /// What every Nix cache has to answer.
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
                    crate::text::one_line(other, 80)
                );
                Err(Failure::Foreign(Layer::Cache, text))
            }
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

    /// Attic's own description. A cache without one is a plain Nix cache, or the token may only push.
    async fn config(&self, token: Option<&Secret>) -> Option<CacheConfig> {
        let text = self.get(self.endpoint.config(), token).await.ok()?;
        serde_json::from_slice(&text)
            .ok()
            .map(CacheConfig::from_json)
    }

    /// Once more after a hiccup: one bad answer must not cost a job its cache.
    async fn get_with_retry(&self, url: Url, token: Option<&Secret>) -> Result<Vec<u8>, Failure> {
        let first = self.get(url.clone(), token).await;
        let hiccup = match &first {
            Err(Failure::Answer(status, _)) => matches!(status, 429 | 500..),
            Err(Failure::Request(layer, _)) => *layer == Some(Layer::Http),
            _ => false,
        };
        if !hiccup || Instant::now() + RETRY_DELAY >= self.deadline {
            return first;
        }
        tokio::time::sleep(RETRY_DELAY).await;
        self.get(url, token).await
    }

    async fn get(&self, url: Url, token: Option<&Secret>) -> Result<Vec<u8>, Failure> {
        let silent = || Failure::Request(None, String::new());
        let mut request = self.client.get(url);
        if let Some(token) = token {
            let text = zeroize::Zeroizing::new(format!("Bearer {}", token.expose()));
            let mut value = HeaderValue::from_str(&text).map_err(|_| {
                Failure::Answer(
                    401,
                    "the token holds characters that cannot be sent".to_owned(),
                )
            })?;
            value.set_sensitive(true);
            request = request.header(AUTHORIZATION, value);
        }
        let broken = |error: reqwest::Error| {
            Failure::Request(Some(http::layer(&error).into()), http::chain(error))
        };
        let mut response = timeout_at(self.deadline, request.send())
            .await
            .map_err(|_| silent())?
            .map_err(broken)?;
        let (status, headers) = (response.status(), response.headers().clone());
        let mut body = Vec::new();
        while body.len() < ANSWER_LIMIT {
            match timeout_at(self.deadline, response.chunk())
                .await
                .map_err(|_| silent())?
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
                format!("it redirects to {}", crate::text::one_line(&shown, 120)),
            ));
        }
        Err(Failure::Answer(
            status.as_u16(),
            Error::from_response(status.as_u16(), &headers, &body, 0).to_string(),
        ))
    }

    fn speaks_tls(&self) -> bool {
        self.endpoint.server.scheme() == "https"
    }

    /// Layer and sentence of a failure.
    fn explain(
        &self,
        failure: Failure,
        has_token: bool,
        reached: &[(Layer, Duration)],
    ) -> (Layer, String) {
        let (server, cache) = (http::redact(&self.endpoint.server), &self.endpoint.cache);
        let up_to = |layer: Layer| reached.iter().any(|(known, _)| *known == layer);
        let (layer, what) = match failure {
            // A port that accepts, and then breaks off the handshake.
            Failure::Request(Some(Layer::Connect), text)
                if up_to(Layer::Connect) && self.speaks_tls() =>
            {
                (Layer::Tls, text)
            }
            Failure::Request(Some(layer), text) => (layer, text),
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
