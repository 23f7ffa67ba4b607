//! Endpoints that answer as a Bazel remote cache would, or as a broken one: real HTTP/1 and HTTP/2 on loopback.

use std::convert::Infallible;
use std::net::TcpListener;
use std::pin::Pin;
use std::task::{Context, Poll};

use hyper::body::{Body, Bytes, Frame, Incoming};
use hyper::header::{HeaderMap, HeaderValue};
use hyper::{Request, Response, service};
use hyper_util::rt::{TokioExecutor, TokioIo};

/// How an endpoint answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// gRPC: a cache, which is an executor as well or not.
    Grpc { execution: bool },
    /// gRPC: a cache whose content-addressed store fails.
    GrpcWithoutBlobs,
    /// gRPC: something that is no message.
    GrpcGarbage,
    /// gRPC: a status other than 0, in the trailers.
    GrpcStatus(&'static str),
    /// HTTP: this status and body.
    Http(u16, &'static str),
    /// Nothing: the connection is taken and held.
    Silent,
}

/// A server on a port of its own; it ends with the test's process.
pub struct Server {
    pub port: u16,
}

impl Server {
    pub fn start(answer: Answer) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        listener.set_nonblocking(true).unwrap();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async {
                serve(tokio::net::TcpListener::from_std(listener).unwrap(), answer).await;
            });
        });
        Self { port }
    }

    /// Its address with this scheme.
    pub fn url(&self, scheme: &str) -> String {
        format!("{scheme}://127.0.0.1:{}", self.port)
    }
}

async fn serve(listener: tokio::net::TcpListener, answer: Answer) {
    let mut held = Vec::new();
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        if answer == Answer::Silent {
            held.push(stream);
            continue;
        }
        let io = TokioIo::new(stream);
        let respond = service::service_fn(move |request| async move {
            Ok::<_, Infallible>(respond(answer, &request))
        });
        tokio::spawn(async move {
            // A client may hang up at any time; the test judges by what the client printed.
            let _ = match answer {
                Answer::Http(..) => {
                    hyper::server::conn::http1::Builder::new()
                        .serve_connection(io, respond)
                        .await
                }
                _ => {
                    hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                        .serve_connection(io, respond)
                        .await
                }
            };
        });
    }
}

fn respond(answer: Answer, request: &Request<Incoming>) -> Response<Message> {
    let message = |body: &[u8], status: &'static str| {
        let mut trailers = HeaderMap::new();
        trailers.insert("grpc-status", HeaderValue::from_static(status));
        let length = u32::try_from(body.len()).unwrap().to_be_bytes();
        let body = [&[0], &length[..], body].concat();
        let answer = Response::builder().header("content-type", "application/grpc");
        answer
            .body(Message {
                body: Some(Bytes::from(body)),
                trailers: Some(trailers),
            })
            .unwrap()
    };
    let called = |call: &str| request.uri().path().ends_with(call);
    let asked = called("/build.bazel.remote.execution.v2.Capabilities/GetCapabilities");
    let blobs =
        called("/build.bazel.remote.execution.v2.ContentAddressableStorage/FindMissingBlobs");
    match answer {
        Answer::Http(status, body) => {
            let message = Message {
                body: Some(Bytes::from_static(body.as_bytes())),
                trailers: None,
            };
            Response::builder().status(status).body(message).unwrap()
        }
        Answer::Grpc { .. } if blobs => message(b"", "0"),
        Answer::GrpcWithoutBlobs if blobs => message(b"", "14"),
        _ if !asked => message(b"", "12"),
        Answer::GrpcWithoutBlobs => message(&[0x0a, 2, 0x08, 1], "0"),
        Answer::Grpc { execution: false } => message(&[0x0a, 2, 0x08, 1], "0"),
        Answer::Grpc { execution: true } => message(&[0x0a, 2, 0x08, 1, 0x12, 2, 0x10, 1], "0"),
        Answer::GrpcGarbage => message(&[0xff; 7], "0"),
        Answer::GrpcStatus(status) => message(b"", status),
        Answer::Silent => unreachable!("it never answers"),
    }
}

/// One frame of data, then the trailers.
struct Message {
    body: Option<Bytes>,
    trailers: Option<HeaderMap>,
}

impl Body for Message {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if let Some(body) = self.body.take() {
            return Poll::Ready(Some(Ok(Frame::data(body))));
        }
        Poll::Ready(
            self.trailers
                .take()
                .map(|trailers| Ok(Frame::trailers(trailers))),
        )
    }
}
