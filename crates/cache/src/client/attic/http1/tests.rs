//! Uploads to servers that are scripted to the byte.

use std::path::PathBuf;
use std::sync::Arc;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

use crate::client::attic::{Attic, ExpectContinue, Pool, SendNar, StallTimeout, WholeBody};
use crate::client::destination::{ByteCounter, Error, Uploaded};
use crate::client::endpoint::Endpoint;
use crate::client::fake::Fake;
use flywheel_core::secret::Secret;
use flywheel_nix::path_info::PathInfo;
use flywheel_sys::http::{Clients, Roots};

const KNOWN: &str = "HTTP/1.1 200 OK\r\nContent-Length: 23\r\n\r\n{\"kind\":\"Deduplicated\"}";
const STORED: &str = "HTTP/1.1 200 OK\r\nContent-Length: 19\r\n\r\n{\"kind\":\"Uploaded\"}";

fn expect_continue(clients: &Clients) -> Box<dyn SendNar> {
    let pool = Arc::new(Pool::new(clients.direct.clone()));
    Box::new(ExpectContinue::new(
        pool,
        clients.streaming.clone(),
        StallTimeout::default(),
    ))
}

/// A server on loopback, a client that knows it, and a path of this many bytes to send to it.
struct Scene {
    _fake: Fake,
    listener: TcpListener,
    attic: Attic,
    path: PathInfo,
    file: PathBuf,
}

/// One request as the server received it.
struct Received {
    stream: TcpStream,
    head: String,
    /// The beginning of the body.
    more: Vec<u8>,
}

impl Received {
    /// Reads the head.
    async fn read(mut stream: TcpStream) -> Self {
        let mut bytes = Vec::new();
        loop {
            if let Some(end) = bytes.windows(4).position(|four: &[u8]| four == b"\r\n\r\n") {
                let more = bytes.split_off(end + 4);
                let head = String::from_utf8(bytes).expect("text").to_ascii_lowercase();
                return Self { stream, head, more };
            }
            assert!(
                stream.read_buf(&mut bytes).await.expect("readable") > 0,
                "no head came"
            );
        }
    }

    async fn send(&mut self, text: &str) {
        self.stream
            .write_all(text.as_bytes())
            .await
            .expect("the client listens");
    }

    fn length(&self) -> usize {
        let line = self
            .head
            .lines()
            .find_map(|line| line.strip_prefix("content-length: "))
            .expect("a length");
        line.parse().expect("a number")
    }

    /// Reads the body to its announced end.
    async fn whole_body(&mut self) {
        while self.more.len() < self.length() {
            assert!(
                self.stream
                    .read_buf(&mut self.more)
                    .await
                    .expect("readable")
                    > 0,
                "the body was cut"
            );
        }
        assert_eq!(self.more.len(), self.length());
    }

    /// The size of the body when the client has closed.
    async fn until_closed(&mut self) -> usize {
        // A reset is an end too.
        let _ = self.stream.read_to_end(&mut self.more).await;
        self.more.len()
    }
}

impl Scene {
    async fn new(size: usize) -> Self {
        Self::with(size, 0, expect_continue).await
    }

    async fn with(
        size: usize,
        references: usize,
        sender: impl Fn(&Clients) -> Box<dyn SendNar>,
    ) -> Self {
        let fake = Fake::start().await;
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("loopback");
        let url = format!("http://{}", listener.local_addr().expect("bound"));
        let endpoint = Endpoint::new(url.parse().expect("URL"), "main".parse().expect("name"));
        let clients = Clients::new(&Roots::default()).expect("settings hold");
        let sender = sender(&clients);
        let api_timeout = std::time::Duration::from_secs(2);
        let pool = Arc::new(Pool::new(clients.direct));
        let attic = Attic::with_sender(
            endpoint,
            Secret::new("token"),
            (clients.api, clients.streaming.clone()),
            pool,
            sender,
            api_timeout,
        );
        let others: Vec<PathInfo> = (0..references)
            .map(|n| fake.path(&format!("library-{n}"), b"", &[]))
            .collect();
        let path = fake.path(
            "path",
            &vec![b'x'; size],
            &others.iter().collect::<Vec<_>>(),
        );
        let file = fake.file(&path);
        Self {
            _fake: fake,
            listener,
            attic,
            path,
            file,
        }
    }

    async fn received(&self) -> Received {
        Received::read(self.listener.accept().await.expect("accepted").0).await
    }

    async fn upload(&self) -> (Result<Uploaded, Error>, ByteCounter) {
        let counter = ByteCounter::default();
        (
            self.attic.upload(&self.path, &self.file, &counter).await,
            counter,
        )
    }
}

#[tokio::test]
async fn a_known_nar_is_not_sent_at_all() {
    let scene = Scene::new(30_000_000).await;
    let server = async {
        let mut received = scene.received().await;
        assert!(
            received.head.contains("expect: 100-continue\r\n"),
            "{}",
            received.head
        );
        received.send(KNOWN).await;
        received.until_closed().await
    };
    let ((uploaded, counter), came) = tokio::join!(scene.upload(), server);
    assert_eq!(
        (uploaded.expect("taken"), counter.sent(), came),
        (Uploaded::Deduplicated, 0, 0)
    );
}

#[tokio::test]
async fn a_refused_nar_is_not_sent_at_all() {
    let scene = Scene::new(1_000_000).await;
    for status in [401, 403, 404, 413] {
        let server = async {
            let mut received = scene.received().await;
            received
                .send(&format!(
                    "HTTP/1.1 {status} No\r\nContent-Length: 0\r\n\r\n"
                ))
                .await;
            received.until_closed().await
        };
        let ((uploaded, _), came) = tokio::join!(scene.upload(), server);
        let text = uploaded.expect_err("refused").to_string();
        assert!(
            came == 0 && (text.contains(&status.to_string()) || text.contains("refuses")),
            "{text}"
        );
    }
}

#[tokio::test]
async fn the_body_waits_for_continue_and_a_silent_server_gets_it_all_the_same() {
    let scene = Scene::new(1_000_000).await;
    let server = async {
        let mut received = scene.received().await;
        received
            .send("HTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n")
            .await;
        received.whole_body().await;
        received.send(STORED).await;
        // The same connection, because the exchange was complete. This time the server ignores `Expect`.
        let mut received = Received::read(received.stream).await;
        received.whole_body().await;
        received.send(STORED).await;
    };
    let uploads = async {
        for _ in 0..2 {
            let (uploaded, counter) = scene.upload().await;
            assert_eq!(
                (uploaded.expect("taken"), counter.sent()),
                (Uploaded::Stored, scene.path.nar_size)
            );
        }
    };
    tokio::join!(uploads, server);
}

#[tokio::test]
async fn a_server_that_refuses_the_expectation_is_sent_the_body() {
    let scene = Scene::new(1_000_000).await;
    let server = async {
        let mut received = scene.received().await;
        received
            .send("HTTP/1.1 417 Expectation Failed\r\nContent-Length: 0\r\n\r\n")
            .await;
        let mut received = scene.received().await;
        assert!(!received.head.contains("expect:"), "{}", received.head);
        received.whole_body().await;
        received.send(STORED).await;
    };
    let ((uploaded, _), ()) = tokio::join!(scene.upload(), server);
    assert_eq!(uploaded.expect("taken"), Uploaded::Stored);
}

#[tokio::test]
async fn a_small_nar_goes_at_once_and_its_length_is_exact() {
    let scene = Scene::new(1_000).await;
    let server = async {
        let mut received = scene.received().await;
        assert!(
            !received.head.contains("expect:") && !received.head.contains("chunked"),
            "{}",
            received.head
        );
        received.whole_body().await;
        assert_eq!(received.length() as u64, scene.path.nar_size);
        received
            .send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            .await;
        received
            .send("a\r\n{\"kind\":\"U\r\n9;x=y\r\nploaded\"}\r\n0\r\nA: b\r\n\r\n")
            .await;
        // Kept after a chunked response, too; a connection with bytes after the response is not kept.
        let mut received = Received::read(received.stream).await;
        received.whole_body().await;
        received.send(&format!("{STORED}HTTP/1.1 200 OK\r\n")).await;
        let mut received = scene.received().await;
        received.whole_body().await;
        received
            .send(&STORED.replace("\r\n\r\n", "\r\nConnection: close\r\n\r\n"))
            .await;
        let mut received = scene.received().await;
        received.whole_body().await;
        received
            .send(
                &STORED
                    .replace("1.1", "1.0")
                    .replace("Content-Length: 19\r\n", ""),
            )
            .await;
        drop(received);
        let mut received = scene.received().await;
        received.whole_body().await;
        received.send(STORED).await;
    };
    let uploads = async {
        for _ in 0..5 {
            assert_eq!(scene.upload().await.0.expect("taken"), Uploaded::Stored);
        }
    };
    tokio::join!(uploads, server);
}

#[tokio::test]
async fn a_long_description_counts_into_the_length() {
    let scene = Scene::with(200_000, 100, expect_continue).await;
    let server = async {
        let mut received = scene.received().await;
        let size = received
            .head
            .lines()
            .find_map(|line| line.strip_prefix("x-attic-nar-info-preamble-size: "));
        let size: usize = size.expect("a preamble").parse().expect("a number");
        received.whole_body().await;
        assert_eq!(received.length() as u64, size as u64 + scene.path.nar_size);
        let info: serde_json::Value = serde_json::from_slice(&received.more[..size]).expect("JSON");
        assert_eq!(info["references"].as_array().map(Vec::len), Some(100));
        received.send(STORED).await;
    };
    let ((uploaded, _), ()) = tokio::join!(scene.upload(), server);
    assert_eq!(uploaded.expect("taken"), Uploaded::Stored);
}

/// A server that responds early and closes at once, while the body is still being sent: its response is read, or
/// requested once more, and never reported as a broken connection.
#[tokio::test]
async fn an_early_response_is_never_lost() {
    type Sender = fn(&Clients) -> Box<dyn SendNar>;
    let senders: [(Sender, usize); 3] = [
        (expect_continue, 0),
        (expect_continue, 100),
        (
            |clients| {
                Box::new(WholeBody::new(
                    clients.streaming.clone(),
                    StallTimeout::default(),
                ))
            },
            0,
        ),
    ];
    for (sender, references) in senders {
        let scene = Scene::with(8_000_000, references, sender).await;
        for answer in [
            KNOWN,
            "HTTP/1.1 401 No\r\nContent-Length: 0\r\n\r\n",
            "HTTP/1.1 413 No\r\n\r\n",
        ] {
            let server = async {
                loop {
                    let mut received = scene.received().await;
                    received.send("HTTP/1.1 100 Continue\r\n\r\n").await;
                    // Closed with bytes unread: the system resets the connection.
                    received.send(answer).await;
                }
            };
            let (uploaded, _) = tokio::select! {
                ended = scene.upload() => ended,
                () = server => unreachable!("it serves for ever"),
            };
            match uploaded {
                Ok(uploaded) => assert_eq!((uploaded, answer), (Uploaded::Deduplicated, KNOWN)),
                Err(error) => assert!(
                    matches!(
                        error,
                        Error::Refused { status: 401, .. } | Error::TooLarge { .. }
                    ),
                    "{references}: {answer}: {error}"
                ),
            }
        }
    }
}

#[tokio::test]
async fn a_connection_that_was_closed_while_idle_costs_nothing() {
    let scene = Scene::new(1_000).await;
    let server = async {
        let mut received = scene.received().await;
        received.whole_body().await;
        received.send(STORED).await;
        // The server promises to keep the connection, and closes it when the next request comes.
        let received = Received::read(received.stream).await;
        drop(received);
        let mut received = scene.received().await;
        received.whole_body().await;
        received.send(STORED).await;
    };
    let uploads = async {
        for _ in 0..2 {
            assert_eq!(scene.upload().await.0.expect("taken"), Uploaded::Stored);
        }
    };
    tokio::join!(uploads, server);
}

#[tokio::test]
async fn an_invalid_response_is_an_error() {
    let scene = Scene::new(1_000).await;
    for text in [
        "SSH-2.0-OpenSSH\r\n\r\n",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
    ] {
        let server = async {
            loop {
                let mut received = scene.received().await;
                received.whole_body().await;
                received.send(text).await;
            }
        };
        let (uploaded, _) = tokio::select! {
            ended = scene.upload() => ended,
            () = server => unreachable!("it serves for ever"),
        };
        assert!(
            matches!(uploaded, Err(Error::Unreachable { .. })),
            "{text}: {uploaded:?}"
        );
    }
}
