//! The parts that all ways to send a NAR share, and the simplest way: one request with the whole body and its exact
//! length, aborted when it stalls.

use std::time::Duration;

use bytes::Bytes;
use futures_util::future::{BoxFuture, ready};
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use reqwest::header::{CONTENT_LENGTH, CONTENT_TYPE, HeaderMap, HeaderValue};
use serde::Deserialize;
use tokio::time::{Instant, sleep};
use url::Url;

use crate::client::attic::read_response;
use crate::client::destination::{ByteCounter, Error, Uploaded};
use flywheel_nix::hash::Sha256;
use flywheel_nix::nar::NarSource;
use flywheel_sys::http::Layer;

/// Longer descriptions travel in front of the NAR: proxies refuse headers of more than 4 to 8 KiB.
pub(super) const HEADER_LIMIT: usize = 3500;
/// The response to an upload is a short JSON text.
pub(super) const RESPONSE_LIMIT: usize = 64 * 1024;

/// How long the second try waits before its body. A server may respond before it has read the body (refused, too
/// large, known already) and close; then the failed write hides the response. While nothing is being written, the
/// response arrives.
const BODY_DELAY: Duration = Duration::from_secs(1);

/// How long an upload may stand still.
#[derive(Clone, Copy, Debug)]
pub struct StallTimeout {
    /// The server takes no byte of the body for this long, or does not respond after the last one.
    pub(crate) idle: Duration,
    /// Bytes per second at which the server compresses what it has received, at least: the wait for its response grows
    /// with the NAR's size.
    pub(crate) rate: u64,
}

impl Default for StallTimeout {
    /// 30 s, and one second more for each megabyte.
    fn default() -> Self {
        Self {
            idle: Duration::from_secs(30),
            rate: 1_000_000,
        }
    }
}

impl StallTimeout {
    /// How long a server may take to respond after the last byte of a NAR of this size: it may compress and store what it
    /// has received before it responds.
    pub(crate) fn after_last_byte(&self, size: u64) -> Duration {
        self.idle + Duration::from_secs_f64(size as f64 / self.rate.max(1) as f64)
    }

    /// Ends when no byte has moved for too long, with the limit that was exceeded.
    pub(super) async fn stalled(self, counter: &ByteCounter, size: u64) -> Duration {
        let (mut seen, mut since) = (0, Instant::now());
        loop {
            let limit = if counter.sent() < size {
                self.idle
            } else {
                self.after_last_byte(size)
            };
            let left = limit.saturating_sub(since.elapsed());
            if left.is_zero() {
                return limit;
            }
            // The counter cannot wake this task, so it is read once a second.
            sleep(left.min(Duration::from_secs(1))).await;
            if counter.sent() != seen {
                (seen, since) = (counter.sent(), Instant::now());
            }
        }
    }
}

/// The upload of one path.
#[derive(Clone, Debug)]
pub struct UploadRequest {
    pub(crate) url: Url,
    /// The credential.
    pub(crate) headers: HeaderMap,
    /// The path's description as JSON.
    pub(crate) info: String,
    pub(crate) source: NarSource,
    /// The NAR's registered hash.
    pub(crate) hash: Sha256,
    /// The NAR's registered size in bytes.
    pub(crate) size: u64,
    pub(crate) counter: ByteCounter,
}

/// A way to send a NAR.
pub trait SendNar: Send + Sync + std::fmt::Debug {
    /// Sends a NAR. The caller decides about retries.
    fn send(&self, request: UploadRequest) -> BoxFuture<'_, Result<Uploaded, Error>>;
}

/// Uploads by the general client, for servers behind a proxy that the environment names.
/// The length is always given: with chunks the server may respond before it has received the last, empty one, and then
/// closes a connection that could have been reused.
#[derive(Debug)]
pub struct WholeBody {
    client: reqwest::Client,
    stall_timeout: StallTimeout,
}

impl WholeBody {
    /// `client` must not have a read timeout of its own.
    pub(crate) fn new(client: reqwest::Client, stall_timeout: StallTimeout) -> Self {
        Self {
            client,
            stall_timeout,
        }
    }

    async fn put(&self, request: UploadRequest) -> Result<Uploaded, Error> {
        let (result, disconnected) = self.once(request.clone(), Duration::ZERO).await;
        // A connection that ended during the body may hide a response. After the whole body the server may have stored
        // the NAR, so the caller checks before it sends again.
        if !disconnected || request.counter.sent() >= request.size {
            return result;
        }
        request.counter.reset();
        self.once(request, BODY_DELAY).await.0
    }

    /// One request; its body begins after `delay`. Gives its result, and whether the connection ended early.
    async fn once(
        &self,
        request: UploadRequest,
        delay: Duration,
    ) -> (Result<Uploaded, Error>, bool) {
        let UploadRequest {
            url,
            mut headers,
            info,
            source,
            hash,
            size,
            counter,
        } = request;
        let preamble = add_info(&mut headers, info);
        headers.insert(
            CONTENT_LENGTH,
            HeaderValue::from(preamble.len() as u64 + size),
        );
        headers.insert(
            CONTENT_TYPE,
            HeaderValue::from_static("application/x-nix-nar"),
        );
        let nar = source.stream(hash, size);
        // reqwest reports an error of the body only as a failed request; the cause is kept here.
        let fault = nar.fault();
        let counted = counter.clone();
        let nar = nar.inspect_ok(move |block| counted.add(block.len() as u64));
        // A stream without items: the body's first block waits until it ends.
        let pause = stream::once(sleep(delay)).filter_map(|()| ready(None));
        let body = pause
            .chain(stream::iter((!preamble.is_empty()).then_some(Ok(preamble))))
            .chain(nar);
        let request = self
            .client
            .put(url)
            .headers(headers)
            .body(reqwest::Body::wrap_stream(body))
            .send();
        let exchange = async {
            let response = request.await.map_err(Error::from_reqwest)?;
            read_response(response, RESPONSE_LIMIT, size).await
        };
        let result = tokio::select! {
            result = exchange => result,
            limit = self.stall_timeout.stalled(&counter, size) => return (Err(Error::timed_out(limit)), false),
        };
        match (result, fault.take()) {
            // A NAR that could not be read is the cause of whatever else went wrong.
            (_, Some(error)) => (Err(error.into()), false),
            (Ok(text), None) => (Ok(read_kind(&text)), false),
            (Err(error), None) => {
                let disconnected = matches!(
                    error,
                    Error::Unreachable {
                        layer: Layer::Http,
                        ..
                    }
                );
                (Err(error), disconnected)
            }
        }
    }
}

impl SendNar for WholeBody {
    fn send(&self, request: UploadRequest) -> BoxFuture<'_, Result<Uploaded, Error>> {
        Box::pin(self.put(request))
    }
}

/// Puts the path's description into a header. Where it is too long for one, returns it as the preamble of the body.
fn add_info(headers: &mut HeaderMap, info: String) -> Bytes {
    let header = HeaderValue::from_str(&info)
        .ok()
        .filter(|_| info.len() <= HEADER_LIMIT);
    match header {
        Some(value) => {
            headers.insert("x-attic-nar-info", value);
            Bytes::new()
        }
        None => {
            headers.insert(
                "x-attic-nar-info-preamble-size",
                HeaderValue::from(info.len()),
            );
            Bytes::from(info)
        }
    }
}

/// Lenient: a success with a text that cannot be parsed is still a success, and an unknown kind counts as stored.
pub(super) fn read_kind(text: &[u8]) -> Uploaded {
    #[derive(Deserialize)]
    struct UploadResult {
        kind: String,
    }
    match serde_json::from_slice::<UploadResult>(text) {
        Ok(result) if result.kind == "Deduplicated" => Uploaded::Deduplicated,
        _ => Uploaded::Stored,
    }
}
