//! The connections to a server that rest between requests, and what each request on them begins with; look-ups too,
//! for which the general client takes twice the time. Never goes around a proxy, nor keeps a half-done exchange.

use std::io::Write as _;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use reqwest::header::HeaderMap;
use tokio::time::{Instant, timeout};
use url::Url;
use zeroize::Zeroizing;

use crate::client::attic::Error;
use crate::client::attic::http1::{Answer, Line};
use flywheel_sys::http::{ConnectError, Direct, USER_AGENT};

/// Connections that rest at most, and how long: less than servers let them.
const RESTING: usize = 32;
const REST: Duration = Duration::from_secs(15);

/// Connections, made and resting.
pub struct Lines {
    direct: Direct,
    resting: Mutex<Vec<Rested>>,
}

impl std::fmt::Debug for Lines {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Lines")
    }
}

struct Rested {
    line: Line,
    to: url::Origin,
    since: Instant,
}

impl Lines {
    /// None rests yet.
    pub fn new(direct: Direct) -> Self {
        Self {
            direct,
            resting: Mutex::default(),
        }
    }

    /// Whether the environment names a proxy for this address, so that nobody may go there by a line.
    pub fn is_proxied(&self, url: &Url) -> bool {
        self.direct.is_proxied(url)
    }

    /// A connection that rested and is quiet still; `limit`: bytes of an answer's body that are read.
    pub(super) fn wake(&self, url: &Url, limit: usize) -> Option<Line> {
        let (mut resting, to) = (
            self.resting.lock().unwrap_or_else(PoisonError::into_inner),
            url.origin(),
        );
        while let Some(at) = resting.iter().rposition(|rested| rested.to == to) {
            let mut rested = resting.remove(at);
            if rested.since.elapsed() < REST && rested.line.is_quiet() {
                rested.line.limit(limit);
                return Some(rested.line);
            }
        }
        None
    }

    /// A new connection.
    pub(super) async fn connect(&self, url: &Url, limit: usize) -> Result<Line, ConnectError> {
        Ok(Line::new(self.direct.connect(url).await?, limit))
    }

    /// Keeps a connection, after a whole exchange only, for the next request.
    pub(super) fn rest(&self, url: &Url, line: Line) {
        let mut resting = self.resting.lock().unwrap_or_else(PoisonError::into_inner);
        resting.retain(|rested| rested.since.elapsed() < REST);
        if resting.len() < RESTING {
            resting.push(Rested {
                line,
                to: url.origin(),
                since: Instant::now(),
            });
        }
    }

    /// Asks for something small; `None` where it takes the general client: through a proxy, or when the answer does
    /// not say itself where it ends or is over `limit` bytes.
    ///
    /// # Errors
    /// Without an answer `within` this time.
    pub(super) async fn get(
        &self,
        url: &Url,
        headers: &HeaderMap,
        limit: usize,
        within: Duration,
    ) -> Result<Option<Answer>, Error> {
        if self.is_proxied(url) {
            return Ok(None);
        }
        let Some(mut head) = head("GET", url, headers, 0) else {
            return Err(Error::Token);
        };
        head.extend_from_slice(b"\r\n");
        let asking = async {
            if let Some(line) = self.wake(url, limit)
                && let Ok(answer) = self.exchange(url, line, &head).await
            {
                return Ok(answer);
            }
            let line = self
                .connect(url, limit)
                .await
                .map_err(|error| Error::of_connection(&error))?;
            self.exchange(url, line, &head)
                .await
                .map_err(|error| Error::broken_off(&error))
        };
        let answer = timeout(within, asking)
            .await
            .unwrap_or(Err(Error::timed_out(within)))?;
        Ok((answer.whole || answer.status >= 300).then_some(answer))
    }

    async fn exchange(&self, url: &Url, mut line: Line, head: &[u8]) -> std::io::Result<Answer> {
        if let Some(early) = line.say(head).await? {
            return Ok(early);
        }
        let answer = line.answer().await?;
        if line.may_stay(&answer) {
            self.rest(url, line);
        }
        Ok(answer)
    }
}

/// A request's first line and headers, but for the empty line at their end, with `room` for so many bytes more.
/// Zeroised, for the token is in it.
pub(super) fn head(
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
    // Grown at once: what a vector leaves behind when it grows is not zeroised.
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
