//! Accepts connections, bounds their number, idle times and slowness, and closes them. Knows nothing
//! about caches.

use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes, HttpBody};
use axum::http::header;
use axum::response::{IntoResponse as _, Response};
use hyper::body::{Frame, Incoming, SizeHint};
use hyper::server::conn::http1;
use hyper::service::{Service as _, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpSocket, TcpStream, UnixListener, UnixStream};
use tokio::task::JoinSet;
use tokio::time::{Instant, Sleep, sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::server::connection_limit::{Answering, ConnectionLimit, ConnectionSlot, Peer};
use crate::server::error::ErrorResponse;
use crate::server::patience::Patience;

/// Maximum number of connections; for a further one, one without a request is closed, or it waits to be accepted. Well
/// below the usual limit of open files.
pub(crate) const CONNECTIONS: usize = 256;
/// Requests of one address at a time; further ones wait. A reverse proxy has one address for all its clients.
pub(crate) const PER_ADDRESS: usize = 192;
/// How long a request waits while its address has as many under way as it may.
const TURN_LIMIT: Duration = Duration::from_secs(60);
/// Time within which a request's head must arrive, also on a kept connection.
const HEAD_TIMEOUT: Duration = Duration::from_secs(30);
/// Time for the rest of a response to leave on a connection that has lost its slot.
const EVICTED_GRACE: Duration = Duration::from_millis(250);
/// Buffer size per connection, which limits a request's head and how much of a body is read at
/// once.
const BUFFER: usize = 128 * 1024;
/// After an early response the client may still be sending. Closing at once would reset the
/// connection, and the client would see the reset instead of the response. So the server keeps
/// reading for this long …
const LINGER: Duration = Duration::from_secs(2);
/// … as long as data arrives at this interval. A client on a busy machine may pause for a while.
const LINGER_IDLE: Duration = Duration::from_secs(1);
/// Connections that wait in the kernel's queue, as far as the system allows. Of a short queue the kernel drops some, and
/// their clients wait a second before they try again.
const BACKLOG: u32 = 1024;
/// Pause after a failed `accept`, when the system is out of files or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// The number of bytes a request transferred, for the log; attached to the response as an
/// extension.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BytesMoved(pub u64);

/// Where connections come from.
pub(crate) trait Listener: Send + 'static {
    type Stream: Send + 'static;

    fn next(&self) -> impl Future<Output = io::Result<(Self::Stream, Peer)>> + Send;
}

impl Listener for TcpListener {
    type Stream = TcpStream;

    async fn next(&self) -> io::Result<(TcpStream, Peer)> {
        let (stream, address) = self.accept().await?;
        Ok((stream, Peer::new(address.ip())))
    }
}

impl Listener for UnixListener {
    type Stream = UnixStream;

    async fn next(&self) -> io::Result<(UnixStream, Peer)> {
        let (stream, _) = self.accept().await?;
        Ok((stream, Peer::Unknown))
    }
}

/// Listens on an address.
///
/// # Errors
/// When the address is taken, or not this machine's.
pub fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = match address {
        SocketAddr::V4(_) => TcpSocket::new_v4(),
        SocketAddr::V6(_) => TcpSocket::new_v6(),
    }?;
    // A new server takes over the port of one that has just ended.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// Accepts connections within `limit` until `stop` is cancelled, then lets open requests finish for at most `grace`.
pub(crate) async fn serve<L: Listener, F: Future<Output = ()> + Send + 'static>(
    listener: L,
    limit: Arc<ConnectionLimit>,
    stop: CancellationToken,
    grace: Duration,
    answer: impl Fn(L::Stream, Arc<ConnectionSlot>) -> F,
) {
    let mut connections = JoinSet::new();
    loop {
        // Beyond the limit, clients wait in the kernel's queue.
        let accepted = tokio::select! {
            () = stop.cancelled() => break,
            // Finished connections are joined here, or the set would grow for ever.
            Some(_) = connections.join_next() => continue,
            accepted = async { (limit.available().await, listener.next().await) } => accepted,
        };
        match accepted {
            (place, Ok((stream, peer))) => {
                let slot = Arc::new(limit.take(place, peer));
                connections.spawn(answer(stream, slot));
            }
            (_, Err(_)) => sleep(ACCEPT_PAUSE).await,
        }
    }
    // Refuse new connections during the grace period.
    drop(listener);
    let _ = timeout(grace, async {
        while connections.join_next().await.is_some() {}
    })
    .await;
    // Whatever is still open after the grace period is aborted.
    connections.shutdown().await;
}

/// Answers on one connection until the client or `stop` ends it, or another one gets its slot.
pub(crate) async fn answer<S>(
    stream: S,
    router: Router,
    stop: CancellationToken,
    slot: Arc<ConnectionSlot>,
) where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let router = TowerToHyperService::new(router);
    let of = Arc::clone(&slot);
    let service = service_fn(move |request: hyper::Request<Incoming>| {
        let (router, slot) = (router.clone(), Arc::clone(&of));
        async move {
            match timeout(TURN_LIMIT, slot.begin()).await {
                Ok(answering) => router
                    .call(request)
                    .await
                    .map(|response| until_sent(response, answering)),
                Err(_) => {
                    let text = "too many requests from this address at once; try again";
                    Ok(ErrorResponse::unavailable(text).into_response())
                }
            }
        }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(BUFFER)
        .serve_connection(
            TokioIo::new(LingeringStream::new(stream, Arc::clone(&slot))),
            service,
        );
    let mut served = pin!(served);
    let ended = tokio::select! {
        ended = served.as_mut() => ended,
        () = stop.cancelled() => {
            // Finish the current request, then close instead of waiting for the next one.
            served.as_mut().graceful_shutdown();
            served.await
        }
        () = slot.evicted() => {
            // A client that has never completed a request loses nothing.
            if slot.has_answered() {
                served.as_mut().graceful_shutdown();
                let _ = timeout(EVICTED_GRACE, served).await;
            }
            return;
        }
    };
    // A client that broke its connection cannot receive an error, and the request has its own log
    // line.
    drop(ended);
}

/// The response; its request counts as under way until the body has been sent.
fn until_sent(response: Response, mut answering: Option<Answering>) -> Response {
    let closes = response
        .headers()
        .get(header::CONNECTION)
        .is_some_and(|value| value == "close");
    if let Some(answering) = answering.as_mut().filter(|_| closes) {
        answering.mark_last();
    }
    response.map(|inner| {
        Body::new(AnswerBody {
            inner,
            _answering: answering,
        })
    })
}

struct AnswerBody {
    inner: Body,
    _answering: Option<Answering>,
}

impl HttpBody for AnswerBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.inner).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

/// A stream that ends when the client reads too little, and that closes so that the last response
/// arrives.
struct LingeringStream<S> {
    stream: S,
    slot: Arc<ConnectionSlot>,
    patience: Patience,
    stalled: Option<Stall>,
    linger: Option<Linger>,
}

/// The client takes nothing of what is to be sent.
struct Stall {
    since: Instant,
    /// The end of the server's patience.
    end: Pin<Box<Sleep>>,
}

struct Linger {
    until: Instant,
    idle: Pin<Box<Sleep>>,
}

impl<S> LingeringStream<S> {
    fn new(stream: S, slot: Arc<ConnectionSlot>) -> Self {
        Self {
            stream,
            slot,
            patience: Patience::default(),
            stalled: None,
            linger: None,
        }
    }

    fn written(
        &mut self,
        cx: &mut Context<'_>,
        result: Poll<io::Result<usize>>,
    ) -> Poll<io::Result<usize>> {
        if let Poll::Ready(written) = &result {
            if let Some(stall) = self.stalled.take() {
                self.patience.waited(stall.since.elapsed());
                self.slot.stalled(None);
            }
            self.patience
                .moved(written.as_ref().map_or(0, |bytes| *bytes));
            return result;
        }
        let (slot, left) = (&self.slot, self.patience.left());
        let stall = self.stalled.get_or_insert_with(|| {
            let since = Instant::now();
            slot.stalled(Some(since));
            let end = Box::pin(sleep(left));
            Stall { since, end }
        });
        ready!(stall.end.as_mut().poll(cx));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for LingeringStream<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for LingeringStream<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.written(cx, result)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.stream).poll_write_vectored(cx, parts);
        self.written(cx, result)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.linger.is_none() {
            // Close the sending side first, so that the client sees the end of the response.
            ready!(Pin::new(&mut this.stream).poll_shutdown(cx))?;
        }
        let now = Instant::now();
        let linger = this.linger.get_or_insert_with(|| Linger {
            until: now + LINGER,
            idle: Box::pin(sleep(LINGER_IDLE)),
        });
        // The data is discarded; only its arrival matters.
        let mut space = [0; 16 * 1024];
        while Instant::now() < linger.until {
            let mut buffer = ReadBuf::new(&mut space);
            match Pin::new(&mut this.stream).poll_read(cx, &mut buffer) {
                Poll::Ready(Ok(())) if !buffer.filled().is_empty() => {
                    linger
                        .idle
                        .as_mut()
                        // A client that keeps sending cannot extend the total time.
                        .reset((Instant::now() + LINGER_IDLE).min(linger.until));
                }
                // The client has closed or reset the connection as well.
                Poll::Ready(_) => return Poll::Ready(Ok(())),
                Poll::Pending => return linger.idle.as_mut().poll(cx).map(Ok),
            }
        }
        Poll::Ready(Ok(()))
    }
}
