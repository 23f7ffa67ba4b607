//! HTTP clients: rustls on ring, a resolver of their own, trusted roots, bounded waits. This module owns how bytes
//! reach a host; its callers own the requests.

pub mod bundle;
mod direct;
mod trust;

use std::error::Error as StdError;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::pin::{Pin, pin};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use hickory_resolver::TokioResolver;
use hickory_resolver::config::LookupIpStrategy;
use thiserror::Error;

pub use self::direct::{ByteStream, ConnectError, Direct};

use flywheel_core::exit::{Exit, Explain};

/// The timeout of a name look-up, and of each connection attempt.
pub(crate) const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// A response with no new byte for this long is aborted.
pub(crate) const IDLE_TIMEOUT: Duration = Duration::from_secs(60);

/// Once a name has addresses of one family, those of the other are waited for this long. RFC 8305 has 50 ms.
const OTHER_FAMILY: Duration = Duration::from_millis(50);

pub const USER_AGENT: &str = concat!("flywheel/", env!("CARGO_PKG_VERSION"));

/// Why a client could not be created.
#[derive(Debug, Error)]
pub enum Error {
    #[error("the TLS library refused its settings")]
    Tls(#[source] rustls::Error),
    #[error("the HTTP library refused its settings")]
    Client(#[source] reqwest::Error),
}

impl Explain for Error {
    fn exit(&self) -> Exit {
        Exit::Bug
    }
}

/// Trusted certificates besides the system's own bundle.
#[derive(Clone, Debug, Default)]
pub struct Roots {
    /// PEM bundles that the environment names (`NIX_SSL_CERT_FILE`). They are read before the system's.
    pub files: Vec<PathBuf>,
}

/// A client that follows no redirects, so that a credential is never sent to a host that the user did not name.
///
/// Cloning is cheap. The client uses the proxies of the environment (`https_proxy` …), as Nix does.
///
/// # Errors
/// Only if the TLS or HTTP library refuses its settings, which would be a bug of Flywheel.
pub fn client(roots: &Roots) -> Result<reqwest::Client, Error> {
    builder(tls(roots)?)
        .read_timeout(IDLE_TIMEOUT)
        .build()
        .map_err(Error::Client)
}

/// A client for gRPC: HTTP/2 from the first byte on, without a proxy.
///
/// # Errors
/// As [`client`].
pub fn grpc_client(roots: &Roots) -> Result<reqwest::Client, Error> {
    let mut tls = tls(roots)?;
    tls.alpn_protocols = vec![b"h2".to_vec()];
    let builder = builder(tls).http2_prior_knowledge().no_proxy();
    builder.build().map_err(Error::Client)
}

/// The clients for a server that also gets large bodies.
#[derive(Clone, Debug)]
pub struct Clients {
    /// For small requests, as [`client`] makes it.
    pub api: reqwest::Client,
    /// For large bodies. It has no read timeout, because reqwest's runs from the first byte that is sent, and would
    /// abort every longer upload. So the caller has to check that bytes move.
    pub streaming: reqwest::Client,
    /// For callers with an HTTP implementation of their own.
    pub direct: Direct,
}

impl Clients {
    /// # Errors
    /// As [`client`].
    pub fn new(roots: &Roots) -> Result<Self, Error> {
        let tls = tls(roots)?;
        let api = builder(tls.clone())
            .read_timeout(IDLE_TIMEOUT)
            .build()
            .map_err(Error::Client)?;
        let streaming = builder(tls.clone()).build().map_err(Error::Client)?;
        Ok(Self {
            api,
            streaming,
            direct: Direct::new(tls),
        })
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "this is the one place that makes clients"
)]
fn builder(tls: rustls::ClientConfig) -> reqwest::ClientBuilder {
    reqwest::Client::builder()
        .user_agent(USER_AGENT)
        .redirect(reqwest::redirect::Policy::none())
        .connect_timeout(CONNECT_TIMEOUT)
        .pool_idle_timeout(Duration::from_secs(20))
        .http1_only()
        .tls_backend_preconfigured(tls)
        .dns_resolver(Names::default())
}

/// The TLS settings; their clones share the trusted roots.
fn tls(roots: &Roots) -> Result<rustls::ClientConfig, Error> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = trust::Verifier::new(roots.clone(), Arc::clone(&provider));
    // The verifier delegates to rustls' own, so nothing is weakened in spite of `dangerous`.
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(Error::Tls)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_no_client_auth();
    Ok(config)
}

/// Why a name has no address.
#[derive(Debug, Error)]
pub enum LookupError {
    /// The machine has no resolver, and public ones are never used without the user's knowledge.
    #[error("this machine has no usable `/etc/resolv.conf`, and `{0}` is not in `/etc/hosts`")]
    NoResolver(String),
    /// The resolver does not know the name, or did not respond.
    #[error("the name `{name}` does not resolve")]
    Unknown {
        name: String,
        #[source]
        source: Box<dyn StdError + Send + Sync>,
    },
}

/// Looks up names without libc's `getaddrinfo`, which a static binary must not call: it crashes where nsswitch loads
/// modules of another glibc.
#[derive(Clone, Default)]
pub struct Names(Arc<OnceLock<Option<Resolvers>>>);

impl Names {
    /// The addresses of `host`, which may be a literal address, `localhost`, or a name.
    ///
    /// # Errors
    /// When the name cannot be resolved. Only the resolver's own timeouts apply; callers with a tighter deadline add
    /// their own.
    pub async fn lookup(&self, host: &str) -> Result<Vec<IpAddr>, LookupError> {
        // In URLs, IPv6 addresses are in brackets.
        let bare = host.trim_start_matches('[').trim_end_matches(']');
        if let Ok(address) = bare.parse() {
            return Ok(vec![address]);
        }
        // Always loopback, without a resolver (RFC 6761, 6.3).
        if bare.eq_ignore_ascii_case("localhost") {
            return Ok(vec![
                IpAddr::from([127, 0, 0, 1]),
                IpAddr::from([0, 0, 0, 0, 0, 0, 0, 1]),
            ]);
        }
        // As for libc, a name that the file has is not asked for elsewhere, also if it has one address only.
        if let Some(found) = hosts_file(bare) {
            return Ok(found);
        }
        let Some(resolvers) = self.0.get_or_init(system_resolvers) else {
            return Err(LookupError::NoResolver(bare.to_owned()));
        };
        let ask = |resolver: &TokioResolver| {
            let resolver = resolver.clone();
            async move {
                let found = resolver.lookup_ip(bare).await;
                found.map(|found| found.iter().collect())
            }
        };
        Box::pin(either_family(ask(&resolvers.ipv4), ask(&resolvers.ipv6)))
            .await
            .map_err(|source| LookupError::Unknown {
                name: bare.to_owned(),
                source: source.into(),
            })
    }
}

/// A resolver for each family of addresses: some servers never answer for one of them.
#[derive(Clone)]
struct Resolvers {
    ipv4: TokioResolver,
    ipv6: TokioResolver,
}

/// The addresses of both families. Once one family has some, the other gets [`OTHER_FAMILY`] for its own.
async fn either_family<E>(
    ipv4: impl Future<Output = Result<Vec<IpAddr>, E>> + Send,
    ipv6: impl Future<Output = Result<Vec<IpAddr>, E>> + Send,
) -> Result<Vec<IpAddr>, E> {
    let (mut ipv4, mut ipv6) = (pin!(ipv4), pin!(ipv6));
    let (first, other): (_, Pin<&mut (dyn Future<Output = _> + Send)>) = tokio::select! {
        biased;
        found = &mut ipv4 => (found, ipv6),
        found = &mut ipv6 => (found, ipv4),
    };
    let Some(mut addresses) = first
        .as_ref()
        .ok()
        .filter(|found| !found.is_empty())
        .cloned()
    else {
        // The error of the family that has been asked to the end is as good as the other's.
        return other.await.or(first);
    };
    if let Ok(Ok(more)) = tokio::time::timeout(OTHER_FAMILY, other).await {
        addresses.extend(more);
    }
    Ok(addresses)
}

/// Why a host cannot be reached.
#[derive(Debug, Error)]
pub enum ReachError {
    #[error(transparent)]
    Name(#[from] LookupError),
    #[error("it takes no connection")]
    Connect(#[source] std::io::Error),
    #[error("no answer within {0:?}")]
    TimedOut(Duration),
}

/// Checks that `host` accepts TCP connections on `port`, `within` this time in all.
///
/// # Errors
/// When it does not.
pub async fn reach(
    names: &Names,
    host: &str,
    port: u16,
    within: Duration,
) -> Result<(), ReachError> {
    let connect = async {
        // All addresses are tried, such as IPv6 and IPv4. The last error is reported.
        let mut refused = std::io::Error::from(std::io::ErrorKind::AddrNotAvailable);
        for address in names.lookup(host).await? {
            match tokio::net::TcpStream::connect((address, port)).await {
                Ok(_) => return Ok(()),
                Err(error) => refused = error,
            }
        }
        Err(ReachError::Connect(refused))
    };
    tokio::time::timeout(within, connect)
        .await
        .unwrap_or(Err(ReachError::TimedOut(within)))
}

/// The resolver of `/etc/resolv.conf`. hickory falls back to public servers when that file is missing or has no server,
/// so both cases are refused first.
fn system_resolvers() -> Option<Resolvers> {
    let text = std::fs::read_to_string("/etc/resolv.conf").ok()?;
    let named = text
        .lines()
        .any(|line| line.trim_start().starts_with("nameserver"));
    if !named {
        return None;
    }
    let resolver = |family| {
        let mut builder = TokioResolver::builder_tokio().ok()?;
        builder.options_mut().ip_strategy = family;
        builder.build().ok()
    };
    Some(Resolvers {
        ipv4: resolver(LookupIpStrategy::Ipv4Only)?,
        ipv6: resolver(LookupIpStrategy::Ipv6Only)?,
    })
}

fn hosts_file(name: &str) -> Option<Vec<IpAddr>> {
    let text = std::fs::read_to_string("/etc/hosts").ok()?;
    let found: Vec<IpAddr> = text
        .lines()
        .map(|line| line.split('#').next().unwrap_or_default())
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            let address = words.next()?.parse().ok()?;
            words
                .any(|word| word.eq_ignore_ascii_case(name))
                .then_some(address)
        })
        .collect();
    (!found.is_empty()).then_some(found)
}

impl reqwest::dns::Resolve for Names {
    fn resolve(&self, name: reqwest::dns::Name) -> reqwest::dns::Resolving {
        let names = self.clone();
        Box::pin(async move {
            let found = names.lookup(name.as_str()).await?;
            // reqwest replaces port 0 by the port of the URL.
            let addresses: reqwest::dns::Addrs =
                Box::new(found.into_iter().map(|address| SocketAddr::new(address, 0)));
            Ok(addresses)
        })
    }
}

/// The layer at which a request failed before a response came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layer {
    /// The host's name has no address.
    Name,
    /// No connection: refused, unreachable, or timed out.
    Connect,
    /// The TLS handshake or the certificate.
    Tls,
    /// There was a connection, but no complete response.
    Http,
}

/// The layer at which `error` arose, found in its chain of causes.
pub fn layer(error: &reqwest::Error) -> Layer {
    let causes = causes(error);
    // For reqwest, failed look-ups and handshakes are connection errors as well, so they are recognised first.
    if causes.iter().any(|cause| cause.is::<LookupError>()) {
        Layer::Name
    } else if causes.iter().any(|cause| is_tls(*cause)) {
        Layer::Tls
    } else if error.is_connect() {
        Layer::Connect
    } else {
        Layer::Http
    }
}

/// Whether a cause is a TLS error. `io::Error` hides the error that it wraps from `source()`, and TLS errors are
/// wrapped twice, so they are unwrapped here.
fn is_tls(cause: &(dyn StdError + 'static)) -> bool {
    if cause.is::<rustls::Error>() {
        return true;
    }
    let wrapped = cause
        .downcast_ref::<std::io::Error>()
        .and_then(std::io::Error::get_ref);
    wrapped.is_some_and(|wrapped| is_tls(wrapped))
}

/// The whole chain of causes in one line, without the URL that reqwest puts in front, since it may hold credentials.
pub fn chain(error: reqwest::Error) -> String {
    let error = error.without_url();
    let mut parts: Vec<String> = Vec::new();
    for cause in causes(&error) {
        let text = cause.to_string();
        // The libraries' general messages are left out where a deeper cause is known.
        let empty = text.starts_with("error sending request") || text.starts_with("client error (");
        if empty && cause.source().is_some() {
            continue;
        }
        // Many errors repeat the message of the error that they wrap.
        if !parts.iter().any(|part| part.contains(&text)) {
            parts.push(text);
        }
    }
    parts.join(": ")
}

fn causes<'a>(error: &'a (dyn StdError + 'static)) -> Vec<&'a (dyn StdError + 'static)> {
    std::iter::successors(Some(error), |cause| (*cause).source()).collect()
}

/// A URL for a message: user, password, query and fragment taken out.
pub fn redact(url: &url::Url) -> String {
    let mut url = url.clone();
    // Setting fails only for URLs that cannot have a user, which have none to hide.
    let _ = url.set_username("");
    let _ = url.set_password(None);
    url.set_query(None);
    url.set_fragment(None);
    url.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redact_takes_credentials_out() {
        let url = url::Url::parse("https://user:pw@cache.example/a?token=x#y").expect("valid");
        assert_eq!(redact(&url), "https://cache.example/a");
    }

    #[tokio::test]
    async fn literal_addresses_and_localhost_need_no_resolver() {
        let names = Names::default();
        assert_eq!(
            names.lookup("127.0.0.9").await.expect("literal"),
            [IpAddr::from([127, 0, 0, 9])]
        );
        assert_eq!(names.lookup("[::1]").await.expect("literal").len(), 1);
        assert!(
            names
                .lookup("localhost")
                .await
                .expect("known")
                .contains(&IpAddr::from([127, 0, 0, 1]))
        );
    }

    #[tokio::test]
    async fn the_first_family_that_answers_serves() {
        let silent = std::future::pending::<Result<Vec<IpAddr>, &str>>;
        let found = || async { Ok(vec![IpAddr::from([192, 0, 2, 1])]) };
        let refused = || async { Err("no such name") };
        let none = || async { Ok(Vec::new()) };
        let within = Duration::from_secs(5);
        let both = tokio::time::timeout(within, either_family(found(), silent())).await;
        assert_eq!(both.expect("in time").expect("found").len(), 1);
        let both = tokio::time::timeout(within, either_family(silent(), found())).await;
        assert_eq!(both.expect("in time").expect("found").len(), 1);
        assert_eq!(
            either_family(found(), found()).await.map(|all| all.len()),
            Ok(2)
        );
        assert_eq!(
            either_family(refused(), found()).await.map(|all| all.len()),
            Ok(1)
        );
        assert_eq!(
            either_family(none(), found()).await.map(|all| all.len()),
            Ok(1)
        );
        assert_eq!(
            either_family(refused(), refused()).await,
            Err("no such name")
        );
    }

    #[tokio::test]
    async fn a_refused_connection_is_recognised_among_the_layers() {
        // A port that is taken and not listened to stays closed, whatever other tests do.
        let closed = tokio::net::TcpSocket::new_v4().expect("a socket");
        closed
            .bind("127.0.0.1:0".parse().expect("an address"))
            .expect("loopback");
        let port = closed.local_addr().expect("bound").port();
        let client = client(&Roots::default()).expect("settings hold");
        let error = client
            .get(format!("http://127.0.0.1:{port}/"))
            .send()
            .await
            .expect_err("nobody listens");
        assert_eq!(layer(&error), Layer::Connect);
        assert!(!chain(error).contains("http://"), "no URL in messages");
    }
}
