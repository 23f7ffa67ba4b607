//! What a job's Nix reads from in place of the cache: a server on the loopback that reads the cache for it. It repeats
//! what fails by chance, and gives a cache up that would cost the job more than a bound: from then on it serves nothing,
//! at once, whatever number of Nix commands follow.
//!
//! Nix's own settings cannot do this: they bound each request of each command, and a job has many. The token stays here.
//! It never writes to the cache.

mod fetch;
mod health;
#[cfg(test)]
mod tests;

use std::collections::HashSet;
use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt as _;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::header::{ALLOW, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use sha2::{Digest as _, Sha256};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use url::Url;

use self::fetch::Found;
use self::health::{BUDGET, Health};
use flywheel_core::progress::Sink;
use flywheel_core::secret::Secret;
use flywheel_core::text;
use flywheel_sys::host::loopback;
use flywheel_sys::http;

/// Nix opens 25 connections for each of its processes; further ones wait to be accepted.
const CONNECTIONS: usize = 256;
/// A request's head comes within this time, also on a connection that is kept.
const HEAD_TIMEOUT: Duration = Duration::from_secs(30);
/// Requests under way get this long at the end of the job.
const GRACE: Duration = Duration::from_millis(200);
/// The pause after a failed `accept`, when the system is out of files.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);
/// So many paths that failed are remembered, to fail at once when they are asked for again.
const REMEMBERED: usize = 10_000;
/// What a cache says of itself at least; it has a priority of its own if that can be read.
const MINIMAL_INFO: &[u8] = b"StoreDir: /nix/store\n";

type Body = UnsyncBoxBody<Bytes, io::Error>;

/// The cache behind the proxy.
#[derive(Clone, Debug)]
pub struct Upstream {
    /// Its address with a slash at the end.
    base: Url,
    /// The parameters of the store, which Nix keeps to itself: `?priority=10`.
    parameters: Option<String>,
    token: Option<Secret>,
}

impl Upstream {
    /// The cache with this address, which may have parameters of Nix's (`?trusted=true`). `None` if it is not reached over
    /// HTTP. `token`: only for a cache that is not public.
    pub fn new(address: &str, token: Option<Secret>) -> Option<Self> {
        let mut base: Url = address.parse().ok()?;
        if !matches!(base.scheme(), "http" | "https") {
            return None;
        }
        let parameters = base.query().map(str::to_owned);
        base.set_query(None);
        base.set_fragment(None);
        if !base.path().ends_with('/') {
            base.set_path(&format!("{}/", base.path()));
        }
        Some(Self {
            base,
            parameters,
            token,
        })
    }

    /// The last part of the address, by which a reader of Nix's log knows the cache.
    fn name(&self) -> &str {
        self.base
            .path_segments()
            .and_then(|segments| segments.rev().find(|segment| !segment.is_empty()))
            .unwrap_or("cache")
    }
}

/// The running proxy. It ends when it is dropped.
#[derive(Debug)]
pub struct ReadProxy {
    port: u16,
    shared: Arc<Shared>,
    stop: CancellationToken,
    serving: AbortOnDropHandle<()>,
}

#[derive(Debug)]
struct Shared {
    upstream: Upstream,
    /// Part of the address, so that no other program of the job's user comes here by chance.
    key: Secret,
    client: reqwest::Client,
    health: Health,
    sink: Sink,
    info: tokio::sync::OnceCell<Bytes>,
    was_asked: AtomicBool,
    failed: Mutex<HashSet<Url>>,
}

impl ReadProxy {
    /// Starts it on a free port. `client` follows no redirects, and has no time limit for a body.
    ///
    /// # Errors
    /// When the loopback has no free port.
    pub async fn start(
        upstream: Upstream,
        client: reqwest::Client,
        sink: Sink,
    ) -> io::Result<Self> {
        Self::with_budget(upstream, client, sink, BUDGET).await
    }

    async fn with_budget(
        upstream: Upstream,
        client: reqwest::Client,
        sink: Sink,
        budget: Duration,
    ) -> io::Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
        let port = listener.local_addr()?.port();
        let shared = Arc::new(Shared {
            upstream,
            key: Secret::random(),
            client,
            health: Health::new(budget),
            sink,
            info: tokio::sync::OnceCell::new(),
            was_asked: AtomicBool::new(false),
            failed: Mutex::default(),
        });
        let stop = CancellationToken::new();
        let serving = tokio::spawn(serve(listener, Arc::clone(&shared), stop.clone()));
        Ok(Self {
            port,
            shared,
            stop,
            serving: AbortOnDropHandle::new(serving),
        })
    }

    /// The address for Nix's `substituters`. It holds [`Self::key`].
    pub fn substituter(&self) -> String {
        let upstream = &self.shared.upstream;
        let parameters = upstream
            .parameters
            .as_ref()
            .map(|parameters| format!("?{parameters}"));
        format!(
            "http://127.0.0.1:{}/{}/{}{}",
            self.port,
            self.shared.key.expose(),
            upstream.name(),
            parameters.unwrap_or_default()
        )
    }

    /// The random part of the address, without which a request is refused.
    pub fn key(&self) -> &Secret {
        &self.shared.key
    }

    /// Whether anybody has read through it.
    pub fn was_asked(&self) -> bool {
        self.shared.was_asked.load(Ordering::Relaxed)
    }

    /// Why the cache was given up, if it was.
    pub fn given_up(&self) -> Option<String> {
        self.shared.health.given_up()
    }

    /// How much of the job's time failed reads have taken.
    pub fn spent(&self) -> Duration {
        self.shared.health.sum()
    }

    /// Ends it; what is under way is cut off after a moment.
    pub async fn stop(self) {
        self.stop.cancel();
        // The task ends by itself within its grace.
        let _ = self.serving.await;
    }
}

async fn serve(listener: TcpListener, shared: Arc<Shared>, stop: CancellationToken) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        let place = Arc::clone(&places).acquire_owned();
        let accepted = tokio::select! {
            () = stop.cancelled() => break,
            // Finished connections are joined here, or the set would grow for ever.
            Some(_) = connections.join_next() => continue,
            accepted = async { (place.await, listener.accept().await) } => accepted,
        };
        match accepted {
            (Ok(_), Ok((stream, peer))) if is_of_another_user(&stream, peer) => drop(stream),
            (Ok(place), Ok((stream, _))) => {
                let (shared, stop) = (Arc::clone(&shared), stop.clone());
                connections.spawn(async move {
                    serve_connection(stream, shared, stop).await;
                    drop(place);
                });
            }
            _ => sleep(ACCEPT_PAUSE).await,
        }
    }
    drop(listener);
    let _ = timeout(GRACE, async {
        while connections.join_next().await.is_some() {}
    })
    .await;
    connections.shutdown().await;
}

/// The key in the address stands in files of Nix that others may read, so it is not enough by itself.
fn is_of_another_user(stream: &TcpStream, peer: SocketAddr) -> bool {
    stream
        .local_addr()
        .is_ok_and(|own| loopback::is_of_another_user(peer, own))
}

async fn serve_connection(stream: TcpStream, shared: Arc<Shared>, stop: CancellationToken) {
    // Small answers must not wait for the client's acknowledgement. Without the option they are only slower.
    let _ = stream.set_nodelay(true);
    let service = service_fn(|request: Request<Incoming>| {
        let shared = Arc::clone(&shared);
        async move { Ok::<_, Infallible>(shared.answer(&request).await) }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .serve_connection(TokioIo::new(stream), service);
    let mut served = pin!(served);
    // A client that breaks its connection cannot receive an error.
    let _ = tokio::select! {
        ended = served.as_mut() => ended,
        () = stop.cancelled() => {
            served.as_mut().graceful_shutdown();
            served.await
        }
    };
}

impl Shared {
    async fn answer(self: &Arc<Self>, request: &Request<Incoming>) -> Response<Body> {
        let Some(path) = self.path_below(request.uri().path()) else {
            return empty(StatusCode::NOT_FOUND);
        };
        self.was_asked.store(true, Ordering::Relaxed);
        let method = request.method();
        if !matches!(*method, Method::GET | Method::HEAD) {
            let mut response = empty(StatusCode::METHOD_NOT_ALLOWED);
            let allowed = hyper::header::HeaderValue::from_static("GET, HEAD");
            response.headers_mut().insert(ALLOW, allowed);
            return response;
        }
        if path == "nix-cache-info" {
            return whole(self.info().await);
        }
        let mut url = self.upstream.base.clone();
        url.set_path(&format!("{}{path}", self.upstream.base.path()));
        url.set_query(request.uri().query());
        // `..` leads out of the cache.
        let is_below = url.path().starts_with(self.upstream.base.path());
        if !is_below || self.health.given_up().is_some() || self.has_failed(&url) {
            return empty(StatusCode::NOT_FOUND);
        }
        match self.read(method, &url).await {
            Some(found) => self.respond(found, method == Method::HEAD),
            // For Nix the path is not there, so that it goes on to the next cache, or builds.
            None => empty(StatusCode::NOT_FOUND),
        }
    }

    /// The part of a request's path below the proxy's own address.
    fn path_below<'a>(&self, path: &'a str) -> Option<&'a str> {
        let (key, path) = path.strip_prefix('/')?.split_once('/')?;
        let path = path.strip_prefix(self.upstream.name())?;
        // Comparing hashes takes a time that shows nothing of the key.
        let fits = Sha256::digest(key) == Sha256::digest(self.key.expose());
        path.strip_prefix('/').filter(|_| fits)
    }

    /// The cache's description of itself. It is read once, and served as long as the job lives: a cache that does not
    /// serve it is an error for Nix, and this one has served it when it was probed.
    async fn info(&self) -> Bytes {
        let read = async || {
            let url = self.upstream.base.join("nix-cache-info").map_err(|_| ())?;
            let found = match self.health.given_up() {
                None => self.read(&Method::GET, &url).await.ok_or(())?,
                Some(_) => return Err(()),
            };
            let is_info = found.status.is_success() && found.rest.is_none();
            is_info.then_some(found.first).ok_or(())
        };
        let info = self.info.get_or_try_init(read).await;
        info.cloned()
            .unwrap_or_else(|()| Bytes::from_static(MINIMAL_INFO))
    }

    fn respond(self: &Arc<Self>, found: Found, is_head: bool) -> Response<Body> {
        let Found {
            status,
            headers,
            first,
            rest,
        } = found;
        let mut response = match rest {
            None if is_head => empty(status),
            None => whole(first),
            Some(rest) => {
                let first = futures_util::stream::iter([Ok(first)]);
                let frames = first
                    .chain(self.stream(rest))
                    .map(|piece| piece.map(Frame::data));
                Response::new(StreamBody::new(frames).boxed_unsync())
            }
        };
        *response.status_mut() = status;
        for name in [CONTENT_TYPE, CONTENT_ENCODING, CONTENT_LENGTH] {
            if let Some(value) = headers.get(&name) {
                response.headers_mut().insert(name, value.clone());
            }
        }
        response
    }

    fn has_failed(&self, url: &Url) -> bool {
        self.failed.lock().is_ok_and(|failed| failed.contains(url))
    }

    /// Remembers a path, so that the next command of the job does not wait for it, too.
    fn note_failed(&self, url: &Url) {
        if let Ok(mut failed) = self.failed.lock()
            && failed.len() < REMEMBERED
        {
            failed.insert(url.clone());
        }
    }

    fn report_given_up(&self, reason: &str) {
        let address = http::redact(&self.upstream.base);
        self.sink.degraded(
            "cache",
            format!(
                "{} is given up for the rest of the job, which builds what it would have fetched: {}",
                address.trim_end_matches('/'),
                text::one_line(reason, 300)
            ),
        );
    }
}

fn empty(status: StatusCode) -> Response<Body> {
    let mut response = whole(Bytes::new());
    *response.status_mut() = status;
    response
}

fn whole(bytes: Bytes) -> Response<Body> {
    Response::new(
        Full::new(bytes)
            .map_err(|never| match never {})
            .boxed_unsync(),
    )
}
