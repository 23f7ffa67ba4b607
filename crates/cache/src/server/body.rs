//! Reads request bodies piece by piece, and gives up on those that come too slowly. Owns limits,
//! and does not interpret the content.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};

use axum::body::{Body, BodyDataStream, Bytes, HttpBody};
use axum::extract::Request;
use axum::http::{HeaderValue, header};
use axum::middleware::Next;
use axum::response::Response;
use futures_util::StreamExt as _;
use hyper::body::{Frame, SizeHint};

use tokio::time::{Instant, timeout};

use crate::server::error::ErrorResponse;
use crate::server::patience::Patience;

/// A request body that is being read.
pub(crate) struct RequestBody {
    stream: BodyDataStream,
    /// Bytes that have been read but not returned.
    rest: Option<Bytes>,
    patience: Patience,
}

impl RequestBody {
    /// Wraps a body without reading from it, so a client that waits for `100 Continue` keeps
    /// waiting.
    pub(crate) fn new(body: Body) -> Self {
        Self {
            stream: body.into_data_stream(),
            rest: None,
            patience: Patience::default(),
        }
    }

    /// Returns the next piece; `None` at the end.
    ///
    /// # Errors
    /// When too little arrives, or the connection breaks.
    pub(crate) async fn next(&mut self) -> Result<Option<Bytes>, ErrorResponse> {
        // `take` may have split a piece.
        if let Some(rest) = self.rest.take() {
            return Ok(Some(rest));
        }
        // Only the time that the client takes counts, not that of the disk behind this server.
        let begun = Instant::now();
        let next = timeout(self.patience.left(), self.stream.next()).await;
        self.patience.waited(begun.elapsed());
        match next {
            Err(_) => Err(ErrorResponse::timed_out()),
            Ok(None) => Ok(None),
            Ok(Some(Ok(piece))) => {
                self.patience.moved(piece.len());
                Ok(Some(piece))
            }
            Ok(Some(Err(_))) => Err(ErrorResponse::bad_request(
                "the request's body ended before its announced length",
            )),
        }
    }

    /// Returns exactly the first `size` bytes.
    ///
    /// # Errors
    /// When the body is shorter, or as [`RequestBody::next`].
    pub(crate) async fn take(&mut self, size: usize) -> Result<Vec<u8>, ErrorResponse> {
        let mut taken = Vec::new();
        while taken.len() < size {
            let Some(mut piece) = self.next().await? else {
                return Err(ErrorResponse::bad_request(
                    "the request's body is shorter than its preamble",
                ));
            };
            // The preamble ends inside a piece; the rest belongs to the NAR.
            let rest = piece.split_off(piece.len().min(size - taken.len()));
            taken.extend_from_slice(&piece);
            self.rest = (!rest.is_empty()).then_some(rest);
        }
        Ok(taken)
    }

    /// Returns the whole body.
    ///
    /// # Errors
    /// When it is over `limit` bytes, or as [`RequestBody::next`].
    pub(crate) async fn read_all(&mut self, limit: usize) -> Result<Vec<u8>, ErrorResponse> {
        let taken = self.up_to(limit).await?;
        if taken.len() > limit {
            Err(ErrorResponse::too_large(limit))
        } else {
            Ok(taken)
        }
    }

    /// Returns the whole body, or as much as shows that it exceeds `limit` bytes.
    ///
    /// # Errors
    /// As [`RequestBody::next`].
    pub(crate) async fn up_to(&mut self, limit: usize) -> Result<Vec<u8>, ErrorResponse> {
        let mut taken = Vec::new();
        // One piece beyond the limit is enough to prove that the body is too large.
        while taken.len() <= limit
            && let Some(piece) = self.next().await?
        {
            taken.extend_from_slice(&piece);
        }
        Ok(taken)
    }
}

/// Adds `Connection: close` to a response that is sent before the request's body was read
/// completely.
///
/// Such a connection has to be closed, because the amount of data still to come is unknown. Without
/// the header, a client that has sent everything by then would keep the connection and lose its
/// next request on it.
pub(crate) async fn announce_close(request: Request, next: Next) -> Response {
    let (parts, inner) = request.into_parts();
    let whole = Arc::new(AtomicBool::new(inner.is_end_stream()));
    let body = Body::new(EndTrackingBody {
        inner,
        whole: Arc::clone(&whole),
    });
    let mut response = next.run(Request::from_parts(parts, body)).await;
    if !whole.load(Ordering::Relaxed) {
        response
            .headers_mut()
            .insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

/// A body that records when it has been read to its end.
struct EndTrackingBody {
    inner: Body,
    whole: Arc<AtomicBool>,
}

impl HttpBody for EndTrackingBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let frame = ready!(Pin::new(&mut self.inner).poll_frame(cx));
        // hyper may report the end together with the last frame.
        let ended = frame.is_none() || self.inner.is_end_stream();
        self.whole.fetch_or(ended, Ordering::Relaxed);
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_preamble_is_cut_off_to_the_byte() {
        let pieces =
            ["pre", "ambleNA", "R"].map(|piece| Ok::<_, std::io::Error>(Bytes::from(piece)));
        let mut body = RequestBody::new(Body::from_stream(futures_util::stream::iter(pieces)));
        assert_eq!(body.take(8).await.expect("long enough"), b"preamble");
        assert_eq!(body.read_all(3).await.expect("small enough"), b"NAR");
    }

    #[tokio::test]
    async fn a_body_over_its_limit_is_refused() {
        assert!(
            RequestBody::new(Body::from("12345"))
                .read_all(4)
                .await
                .is_err()
        );
        assert!(RequestBody::new(Body::from("12345")).take(6).await.is_err());
    }

    #[tokio::test]
    async fn a_body_that_drips_is_given_up() {
        let drops = futures_util::stream::unfold((), async |()| {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
            Some((Ok::<_, std::io::Error>(Bytes::from_static(b"x")), ()))
        });
        let mut body = RequestBody::new(Body::from_stream(drops));
        body.patience
            .waited(std::time::Duration::from_millis(59_900));
        assert!(body.read_all(100_000).await.is_err());
    }
}
