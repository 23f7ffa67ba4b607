//! Uploads of NARs with `Expect: 100-continue` (RFC 9110, 10.1.1), so that no byte of a NAR travels when the server
//! refuses it or already has it. It reads the response whenever it arrives. It repeats a request only when the response
//! was lost, or when the connection had been closed while it was idle.

use std::io::Write as _;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::future::BoxFuture;
use reqwest::header::HeaderValue;
use zeroize::Zeroizing;

use crate::client::attic::http1::{Connection, Continue, Response};
use crate::client::attic::pool::{self, Pool};
use crate::client::attic::send::{
    HEADER_LIMIT, RESPONSE_LIMIT, SendNar, StallTimeout, UploadRequest, WholeBody, read_kind,
};
use crate::client::destination::{ByteCounter, Error, Uploaded};
use flywheel_nix::nar::NarStream;

/// Above this NAR size, in bytes, the round trip that waits for `100 Continue` costs less than a useless body.
const EXPECT_THRESHOLD: u64 = 64 * 1024;
/// A server or a proxy that does not know `Expect` does not react to it. Then the body is sent after this time.
const CONTINUE_TIMEOUT: Duration = Duration::from_secs(1);

/// The usual way to send a NAR.
#[derive(Debug)]
pub struct ExpectContinue {
    pool: Arc<Pool>,
    proxied: WholeBody,
    stall_timeout: StallTimeout,
}

/// When a request sends its body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum BodyMode {
    Immediate,
    /// After `100 Continue`, or when the server does not react to `Expect`.
    AfterContinue,
    /// After a pause in which an early response can arrive. For requests that cannot carry `Expect`.
    Delayed,
}

/// How one request ended.
enum Attempt {
    Answered {
        response: Response,
        /// Whether the body was sent completely.
        body_sent: bool,
    },
    /// The cause is known, and another try would not help.
    Failed(Error),
    /// The connection ended without a response.
    Disconnected {
        error: std::io::Error,
        on_reused_connection: bool,
    },
}

impl ExpectContinue {
    /// `streaming` is the client for servers behind a proxy. `stall_timeout` does not cover the wait for `100
    /// Continue`, which has a timeout of its own.
    pub(crate) fn new(
        pool: Arc<Pool>,
        streaming: reqwest::Client,
        stall_timeout: StallTimeout,
    ) -> Self {
        Self {
            pool,
            proxied: WholeBody::new(streaming, stall_timeout),
            stall_timeout,
        }
    }

    async fn put(&self, request: UploadRequest) -> Result<Uploaded, Error> {
        if self.pool.is_proxied(&request.url) {
            return self.proxied.send(request).await;
        }
        // A preamble is part of the body but is written together with the head, so it rules out waiting in between.
        let mode = if fits_header(&request.info) && request.size > EXPECT_THRESHOLD {
            BodyMode::AfterContinue
        } else {
            BodyMode::Immediate
        };
        match self.attempt_with_repeats(&request, mode).await {
            Attempt::Answered { response, .. } if (200..300).contains(&response.status) => {
                Ok(read_kind(&response.body))
            }
            Attempt::Answered { response, .. } => Err(Error::from_response(
                response.status,
                &response.headers,
                &response.body,
                request.size,
            )),
            Attempt::Failed(error) => Err(error),
            Attempt::Disconnected { error, .. } => Err(Error::disconnected(&error)),
        }
    }

    /// At most three requests: one on a reused connection, one on a new one, and one that waits before its body.
    async fn attempt_with_repeats(&self, request: &UploadRequest, mode: BodyMode) -> Attempt {
        let mut attempt = self.attempt(request, mode, true).await;
        // The server closed the idle connection just as the request left: this does not count as a failure.
        if matches!(
            attempt,
            Attempt::Disconnected {
                on_reused_connection: true,
                ..
            }
        ) {
            request.counter.reset();
            attempt = self.attempt(request, mode, false).await;
        }
        // A server that does not support `Expect` may refuse it (RFC 9110, 15.5.18).
        let expectation_failed =
            matches!(&attempt, Attempt::Answered { response, .. } if response.status == 417);
        // A server that responds early and closes resets the connection, and the reset can discard its response.
        // The repeat waits before its body, so that an early response arrives while nothing is being written.
        let response_lost = matches!(attempt, Attempt::Disconnected { .. })
            && request.counter.sent() < request.size;
        let repeat = if expectation_failed && mode == BodyMode::AfterContinue {
            BodyMode::Immediate
        } else if response_lost && fits_header(&request.info) {
            BodyMode::AfterContinue
        } else if response_lost {
            BodyMode::Delayed
        } else {
            return attempt;
        };
        request.counter.reset();
        self.attempt(request, repeat, false).await
    }

    /// One request; `reuse`: on an idle connection if there is one.
    async fn attempt(&self, request: &UploadRequest, mode: BodyMode, reuse: bool) -> Attempt {
        let idle = reuse
            .then(|| self.pool.checkout(&request.url, RESPONSE_LIMIT))
            .flatten();
        let on_reused_connection = idle.is_some();
        let mut connection = match idle {
            Some(connection) => connection,
            None => match self.pool.connect(&request.url, RESPONSE_LIMIT).await {
                Ok(connection) => connection,
                Err(error) => return Attempt::Failed(Error::from_connect(&error)),
            },
        };
        // A connection that stalls is dropped, and never returned to the pool.
        let exchange = exchange(&mut connection, request, mode);
        let attempt = tokio::select! {
            attempt = exchange => attempt,
            limit = self.stall_timeout.stalled(&request.counter, request.size) => return Attempt::Failed(Error::timed_out(limit)),
        };
        match attempt {
            Attempt::Answered {
                response,
                body_sent,
            } => {
                // Only after a complete exchange does the next response belong to the next request.
                if body_sent && connection.is_reusable(&response) {
                    self.pool.checkin(&request.url, connection);
                }
                Attempt::Answered {
                    response,
                    body_sent,
                }
            }
            Attempt::Disconnected { error, .. } => Attempt::Disconnected {
                error,
                on_reused_connection,
            },
            failed @ Attempt::Failed(_) => failed,
        }
    }
}

impl SendNar for ExpectContinue {
    fn send(&self, request: UploadRequest) -> BoxFuture<'_, Result<Uploaded, Error>> {
        Box::pin(self.put(request))
    }
}

async fn exchange(connection: &mut Connection, request: &UploadRequest, mode: BodyMode) -> Attempt {
    let early = |response| Attempt::Answered {
        response,
        body_sent: false,
    };
    let Some(head) = head(request, mode) else {
        return Attempt::Failed(Error::Token);
    };
    // The head and the body of a small NAR leave in one packet, so that the server wakes up once.
    let mut body = (mode == BodyMode::Immediate && request.size <= EXPECT_THRESHOLD)
        .then(|| NarBody::open(request));
    let first = match &mut body {
        Some(body) => match body.next().await {
            Ok(block) => block.unwrap_or_default(),
            Err(ended) => return ended,
        },
        None => Bytes::new(),
    };
    match connection.write_both(&head, &first).await {
        Ok(Some(response)) => return early(response),
        Ok(None) => (),
        Err(error) => return disconnected(error),
    }
    if mode != BodyMode::Immediate {
        match connection.await_continue(CONTINUE_TIMEOUT).await {
            Ok(Continue::Answered(response)) => return early(response),
            Ok(Continue::SendBody) => (),
            Err(error) => return disconnected(error),
        }
    }
    let mut body = body.unwrap_or_else(|| NarBody::open(request));
    loop {
        let block = match body.next().await {
            Ok(Some(block)) => block,
            Ok(None) => break,
            Err(ended) => return ended,
        };
        match connection.write(&block).await {
            Ok(Some(response)) => return early(response),
            Ok(None) => (),
            Err(error) => return disconnected(error),
        }
    }
    connection
        .response()
        .await
        .map_or_else(disconnected, |response| Attempt::Answered {
            response,
            body_sent: true,
        })
}

fn disconnected(error: std::io::Error) -> Attempt {
    Attempt::Disconnected {
        error,
        on_reused_connection: false,
    }
}

/// The NAR as it is sent, counted block by block.
struct NarBody<'a> {
    nar: NarStream,
    counter: &'a ByteCounter,
}

impl<'a> NarBody<'a> {
    fn open(request: &'a UploadRequest) -> Self {
        Self {
            nar: request.source.stream(request.hash, request.size),
            counter: &request.counter,
        }
    }

    async fn next(&mut self) -> Result<Option<Bytes>, Attempt> {
        match (self.nar.next().await, self.nar.fault().take()) {
            (Some(Ok(block)), None) => {
                self.counter.add(block.len() as u64);
                Ok(Some(block))
            }
            (None, None) => Ok(None),
            // The request is left unfinished, so that the server stores nothing.
            (_, Some(error)) => Err(Attempt::Failed(error.into())),
            (Some(Err(error)), None) => Err(disconnected(error)),
        }
    }
}

/// Whether the path's description can travel in a header instead of in front of the NAR.
fn fits_header(info: &str) -> bool {
    info.len() <= HEADER_LIMIT && HeaderValue::from_str(info).is_ok()
}

/// The request's head, followed by the description where that does not fit into a header.
fn head(request: &UploadRequest, mode: BodyMode) -> Option<Zeroizing<Vec<u8>>> {
    let in_header = fits_header(&request.info);
    let preamble = if in_header { "" } else { request.info.as_str() };
    let length = preamble.len() as u64 + request.size;
    let mut head = pool::request_head(
        "PUT",
        &request.url,
        &request.headers,
        2 * request.info.len(),
    )?;
    write!(
        head,
        "Content-Type: application/x-nix-nar\r\nContent-Length: {length}\r\n"
    )
    .ok()?;
    if in_header {
        write!(head, "X-Attic-Nar-Info: {}\r\n", request.info).ok()?;
    } else {
        write!(
            head,
            "X-Attic-Nar-Info-Preamble-Size: {}\r\n",
            preamble.len()
        )
        .ok()?;
    }

    if mode == BodyMode::AfterContinue && in_header {
        head.extend_from_slice(b"Expect: 100-continue\r\n");
    }
    head.extend_from_slice(b"\r\n");
    head.extend_from_slice(preamble.as_bytes());
    Some(head)
}
