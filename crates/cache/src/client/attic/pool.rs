//! The pool of idle connections to the cache server, shared by uploads and look-ups. Look-ups use it because the
//! general client takes twice the time for them. It never bypasses a proxy, and never keeps a connection after
//! an incomplete exchange.

use std::io::Write as _;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use reqwest::header::HeaderMap;
use tokio::time::{Instant, timeout};
use url::Url;
use zeroize::Zeroizing;

use crate::client::attic::http1::{Connection, Response};
use crate::client::destination::Error;
use flywheel_sys::http::{ConnectError, Direct, USER_AGENT};

const MAX_IDLE: usize = 32;
/// Shorter than servers and proxies keep an idle connection open, so that it is rarely closed under a request.
const IDLE_TIMEOUT: Duration = Duration::from_secs(15);

pub struct Pool {
    direct: Direct,
    idle: Mutex<Vec<Idle>>,
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Pool")
    }
}

struct Idle {
    connection: Connection,
    origin: url::Origin,
    since: Instant,
}

impl Pool {
    /// An empty pool.
    pub(crate) fn new(direct: Direct) -> Self {
        Self {
            direct,
            idle: Mutex::default(),
        }
    }

    /// Whether the environment names a proxy for this address, so that no direct connection may be made.
    pub(crate) fn is_proxied(&self, url: &Url) -> bool {
        self.direct.is_proxied(url)
    }

    /// An idle connection that is still open; `limit`: bytes of a response's body that are read at most.
    pub(super) fn checkout(&self, url: &Url, limit: usize) -> Option<Connection> {
        let (mut idle, origin) = (
            self.idle.lock().unwrap_or_else(PoisonError::into_inner),
            url.origin(),
        );
        // The most recently used one first: the server is least likely to have closed it.
        while let Some(at) = idle.iter().rposition(|idle| idle.origin == origin) {
            let mut found = idle.remove(at);
            if found.since.elapsed() < IDLE_TIMEOUT && found.connection.is_idle() {
                found.connection.set_body_limit(limit);
                return Some(found.connection);
            }
        }
        None
    }

    /// A new connection.
    pub(super) async fn connect(
        &self,
        url: &Url,
        limit: usize,
    ) -> Result<Connection, ConnectError> {
        Ok(Connection::new(self.direct.connect(url).await?, limit))
    }

    /// Keeps a connection for the next request. Only after a complete exchange: else the next request would read the
    /// rest of this one's response.
    pub(super) fn checkin(&self, url: &Url, connection: Connection) {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        // `checkout` removes expired connections of one server only; those of others would stay for ever.
        idle.retain(|idle| idle.since.elapsed() < IDLE_TIMEOUT);
        if idle.len() < MAX_IDLE {
            idle.push(Idle {
                connection,
                origin: url.origin(),
                since: Instant::now(),
            });
        }
    }

    /// Sends a GET request for something small. `None` where the general client is needed: through a proxy, or when
    /// the response does not announce its own end or is over `limit` bytes.
    ///
    /// # Errors
    /// Without a response `within` this time.
    pub(super) async fn get(
        &self,
        url: &Url,
        headers: &HeaderMap,
        limit: usize,
        within: Duration,
    ) -> Result<Option<Response>, Error> {
        if self.is_proxied(url) {
            return Ok(None);
        }
        let Some(mut head) = request_head("GET", url, headers, 0) else {
            return Err(Error::Token);
        };
        head.extend_from_slice(b"\r\n");
        let request = async {
            // A server may close an idle connection just as the request leaves. GET is safe to repeat, so any failure
            // on a reused connection is tried again on a new one.
            if let Some(connection) = self.checkout(url, limit)
                && let Ok(response) = self.exchange(url, connection, &head).await
            {
                return Ok(response);
            }
            let connection = self
                .connect(url, limit)
                .await
                .map_err(|error| Error::from_connect(&error))?;
            self.exchange(url, connection, &head)
                .await
                .map_err(|error| Error::disconnected(&error))
        };
        let response = timeout(within, request)
            .await
            .unwrap_or(Err(Error::timed_out(within)))?;
        // For a failure the status is enough, even when its body is incomplete.
        Ok((response.complete || response.status >= 300).then_some(response))
    }

    async fn exchange(
        &self,
        url: &Url,
        mut connection: Connection,
        head: &[u8],
    ) -> std::io::Result<Response> {
        if let Some(early) = connection.write(head).await? {
            return Ok(early);
        }
        let response = connection.response().await?;
        if connection.is_reusable(&response) {
            self.checkin(url, connection);
        }
        Ok(response)
    }
}

/// A request's first line and headers, without the empty line at their end, with `room` for that many bytes more.
/// Zeroized, because the token is in it.
pub(super) fn request_head(
    method: &str,
    url: &Url,
    headers: &HeaderMap,
    room: usize,
) -> Option<Zeroizing<Vec<u8>>> {
    let port = url
        .port()
        .map(|port| format!(":{port}"))
        .unwrap_or_default();
    let query = url
        .query()
        .map(|query| format!("?{query}"))
        .unwrap_or_default();
    // All room is allocated up front: the old buffer of a vector that grows is not zeroized.
    let mut head = Zeroizing::new(Vec::with_capacity(8 * 1024 + room));
    write!(
        head,
        "{method} {}{query} HTTP/1.1\r\nHost: {}{port}\r\nUser-Agent: {USER_AGENT}\r\nAccept: */*\r\n",
        url.path(),
        url.host_str()?
    )
    .ok()?;
    for (name, value) in headers {
        head.extend_from_slice(name.as_str().as_bytes());
        head.extend_from_slice(b": ");
        head.extend_from_slice(value.as_bytes());
        head.extend_from_slice(b"\r\n");
    }
    Some(head)
}
