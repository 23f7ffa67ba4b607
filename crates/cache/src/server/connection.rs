//! Accepts connections, bounds their number and idle times, and closes them. Knows nothing about
//! caches.

use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{Instant, Sleep, sleep};
use tokio_util::sync::CancellationToken;

/// Maximum number of connections; further ones wait to be accepted. Well below the usual limit of
/// open files.
pub(crate) const CONNECTIONS: usize = 256;
/// Time within which a request's head must arrive, also on a kept connection.
const HEAD_TIMEOUT: Duration = Duration::from_secs(30);
/// A client that reads nothing of a response for this long is disconnected.
const WRITE_TIMEOUT: Duration = Duration::from_secs(60);
/// Buffer size per connection, which limits a request's head and how much of a body is read at
/// once.
const BUFFER: usize = 128 * 1024;
/// After an early response the client may still be sending. Closing at once would reset the
/// connection, and the client would see the reset instead of the response. So the server keeps
/// reading for this long …
const LINGER: Duration = Duration::from_secs(2);
/// … as long as data arrives at this interval. A client on a busy machine may pause for a while.
const LINGER_IDLE: Duration = Duration::from_secs(1);
/// Pause after a failed `accept`, when the system is out of files or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// The number of bytes a request transferred, for the log; attached to the response as an
/// extension.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BytesMoved(pub u64);

/// Where connections come from.
pub(crate) trait Listener: Send + 'static {
    type Stream: Send + 'static;

    fn next(&self) -> impl Future<Output = io::Result<Self::Stream>> + Send;
}

impl Listener for TcpListener {
    type Stream = TcpStream;

    async fn next(&self) -> io::Result<TcpStream> {
        self.accept().await.map(|(stream, _)| stream)
    }
}

impl Listener for UnixListener {
    type Stream = UnixStream;

    async fn next(&self) -> io::Result<UnixStream> {
        self.accept().await.map(|(stream, _)| stream)
    }
}

/// Accepts at most `limit` connections at a time until `stop` is cancelled, then lets open requests finish for at most
/// `grace`.
pub(crate) async fn serve<L: Listener, F: Future<Output = ()> + Send + 'static>(
    listener: L,
    limit: usize,
    stop: CancellationToken,
    grace: Duration,
    answer: impl Fn(L::Stream) -> F,
) {
    let places = Arc::new(Semaphore::new(limit));
    let mut connections = JoinSet::new();
    loop {
        // Acquire a place before accepting: beyond the limit, clients wait in the kernel's queue.
        let place = Arc::clone(&places).acquire_owned();
        let accepted = tokio::select! {
            () = stop.cancelled() => break,
            // Finished connections are joined here, or the set would grow for ever.
            Some(_) = connections.join_next() => continue,
            accepted = async { (place.await, listener.next().await) } => accepted,
        };
        match accepted {
            (Ok(place), Ok(stream)) => {
                let answered = answer(stream);
                connections.spawn(async move {
                    answered.await;
                    drop(place);
                });
            }
            _ => sleep(ACCEPT_PAUSE).await,
        }
    }
    // Refuse new connections during the grace period.
    drop(listener);
    let _ = tokio::time::timeout(grace, async {
        while connections.join_next().await.is_some() {}
    })
    .await;
    // Whatever is still open after the grace period is aborted.
    connections.shutdown().await;
}

/// Answers on one connection until the client or `stop` ends it.
pub(crate) async fn answer<S>(stream: S, router: Router, stop: CancellationToken)
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(BUFFER)
        .serve_connection(
            TokioIo::new(LingeringStream::new(stream)),
            TowerToHyperService::new(router),
        );
    let mut served = pin!(served);
    let ended = tokio::select! {
        ended = served.as_mut() => ended,
        () = stop.cancelled() => {
            // Finish the current request, then close instead of waiting for the next one.
            served.as_mut().graceful_shutdown();
            served.await
        }
    };
    // A client that broke its connection cannot receive an error, and the request has its own log
    // line.
    drop(ended);
}

/// A stream that times out when the client stops reading, and that closes so that the last response
/// arrives.
struct LingeringStream<S> {
    stream: S,
    stalled: Option<Pin<Box<Sleep>>>,
    linger: Option<Linger>,
}

struct Linger {
    until: Instant,
    idle: Pin<Box<Sleep>>,
}

impl<S> LingeringStream<S> {
    fn new(stream: S) -> Self {
        Self {
            stream,
            stalled: None,
            linger: None,
        }
    }

    fn written(
        &mut self,
        cx: &mut Context<'_>,
        result: Poll<io::Result<usize>>,
    ) -> Poll<io::Result<usize>> {
        if result.is_ready() {
            // The client has read something, so its time starts again.
            self.stalled = None;
            return result;
        }
        let stalled = self
            .stalled
            .get_or_insert_with(|| Box::pin(sleep(WRITE_TIMEOUT)));
        ready!(stalled.as_mut().poll(cx));
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
