//! The proxy before servers that hang, break off, or refuse by chance.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::Instant;

use super::*;
use flywheel_sys::http::{Clients, Roots};

/// What a test waits at most for what must not take long.
const BUDGET: Duration = Duration::from_millis(600);
const LIMIT: Duration = Duration::from_secs(20);

/// What a server does with one request.
enum Reply {
    /// Sends this and waits for the next request.
    Send(Vec<u8>),
    /// Sends this and nothing else, and keeps the connection.
    Hang(Vec<u8>),
    /// Sends this and closes.
    Close(Vec<u8>),
    /// Sends this in pieces, with pauses between them.
    Slow(Vec<u8>),
}

/// The pieces of [`Reply::Slow`], and its pauses.
const PIECE: usize = 20_000;
const PAUSE: Duration = Duration::from_millis(20);

fn ok(body: &[u8]) -> Vec<u8> {
    let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", body.len());
    [head.as_bytes(), body].concat()
}

fn status(status: &str) -> Reply {
    Reply::Send(format!("HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n").into_bytes())
}

/// A server that answers the `n`-th request, with this head, as `script` says.
struct Scripted {
    address: SocketAddr,
    requests: Arc<AtomicUsize>,
    _serving: AbortOnDropHandle<()>,
}

impl Scripted {
    async fn start(script: impl Fn(&str, usize) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("loopback");
        let address = listener.local_addr().expect("bound");
        let requests = Arc::new(AtomicUsize::new(0));
        let (script, count) = (Arc::new(script), Arc::clone(&requests));
        let serving = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((mut stream, _)) = listener.accept().await {
                let (script, count) = (Arc::clone(&script), Arc::clone(&count));
                connections.spawn(async move {
                    loop {
                        let mut head = Vec::new();
                        while !head.ends_with(b"\r\n\r\n") {
                            match stream.read_u8().await {
                                Ok(byte) => head.push(byte),
                                Err(_) => return,
                            }
                        }
                        let head = String::from_utf8_lossy(&head).into_owned();
                        let n = count.fetch_add(1, Ordering::SeqCst) + 1;
                        let (bytes, hangs, closes) = match script(&head, n) {
                            Reply::Send(bytes) => (bytes, false, false),
                            Reply::Hang(bytes) => (bytes, true, false),
                            Reply::Close(bytes) => (bytes, false, true),
                            Reply::Slow(bytes) => {
                                for piece in bytes.chunks(PIECE) {
                                    sleep(PAUSE).await;
                                    let _ = stream.write_all(piece).await;
                                }
                                continue;
                            }
                        };
                        let _ = stream.write_all(&bytes).await;
                        if hangs {
                            std::future::pending::<()>().await;
                        }
                        if closes {
                            return;
                        }
                    }
                });
            }
        });
        Self {
            address,
            requests,
            _serving: AbortOnDropHandle::new(serving),
        }
    }

    async fn proxy(&self, parameters: &str) -> ReadProxy {
        let address = format!("http://{}/main{parameters}", self.address);
        let upstream = Upstream::new(&address, Secret::new("the-token")).expect("http");
        let sink = Sink::new(|_| ());
        ReadProxy::with_budget(upstream, clients().streaming, sink, BUDGET)
            .await
            .expect("a port")
    }
}

impl Scripted {
    /// A proxy with the time that it has in a job.
    async fn patient_proxy(&self) -> ReadProxy {
        let address = format!("http://{}/main", self.address);
        let upstream = Upstream::new(&address, None).expect("http");
        ReadProxy::start(upstream, clients().streaming, Sink::new(|_| ()))
            .await
            .expect("a port")
    }
}

fn clients() -> Clients {
    Clients::new(&Roots::default()).expect("settings hold")
}

async fn get(proxy: &ReadProxy, path: &str) -> (u16, Result<Bytes, String>) {
    let url = format!("{}/{path}", proxy.substituter());
    let response = timeout(LIMIT, clients().streaming.get(url).send()).await;
    let response = response.expect("in time").expect("the proxy answers");
    let code = response.status().as_u16();
    let body = timeout(LIMIT, response.bytes()).await.expect("in time");
    (code, body.map_err(|error| error.to_string()))
}

/// A body that is not the same twice.
fn large() -> Vec<u8> {
    (0..1_500_000_u32)
        .flat_map(|n| (n / 7).to_le_bytes())
        .collect()
}

#[tokio::test]
async fn what_the_cache_serves_is_served_and_the_token_is_the_proxys() {
    let server = Scripted::start(|head, _| {
        assert!(head.contains("authorization: Basic "), "{head}");
        match head.split(' ').nth(1) {
            Some("/main/nix-cache-info") => {
                Reply::Send(ok(b"StoreDir: /nix/store\nPriority: 41\n"))
            }
            Some("/main/x.narinfo") => Reply::Send(ok(b"StorePath: x")),
            Some("/main/nar/x.nar") => Reply::Send(ok(&large())),
            _ => status("404 Not Found"),
        }
    })
    .await;
    let proxy = server.proxy("?trusted=true").await;
    assert!(proxy.substituter().ends_with("/main?trusted=true"));
    let mut url: Url = proxy.substituter().parse().expect("a URL");
    url.set_query(None);
    let read = async |path: &str| {
        let response = clients().api.get(format!("{url}/{path}")).send().await;
        let response = response.expect("the proxy answers");
        (
            response.status().as_u16(),
            response.bytes().await.expect("whole"),
        )
    };
    let info = read("nix-cache-info").await;
    assert_eq!(
        info,
        (200, Bytes::from("StoreDir: /nix/store\nPriority: 41\n"))
    );
    assert_eq!(read("x.narinfo").await, (200, Bytes::from("StorePath: x")));
    assert_eq!(read("nar/x.nar").await, (200, Bytes::from(large())));
    assert_eq!(read("y.narinfo").await.0, 404);
    assert_eq!(read("../other/x.narinfo").await.0, 404);
    let put = clients()
        .api
        .put(format!("{url}/nix-cache-info"))
        .send()
        .await;
    assert_eq!(put.expect("an answer").status(), 405);
    let strangers = format!(
        "http://127.0.0.1:{}/guessed/main/x.narinfo",
        url.port().expect("a port")
    );
    let stranger = clients().api.get(strangers).send().await;
    assert_eq!(stranger.expect("an answer").status(), 404);
    proxy.stop().await;
}

#[tokio::test]
async fn a_cache_that_hangs_costs_the_budget_once_whatever_phase_it_hangs_in() {
    let half = ok(&large())[..900_000].to_vec();
    let half_of_a_small_one = ok(&large()[..200_000])[..100_000].to_vec();
    let phases = [
        Vec::new(),
        b"HTTP/1.1 200 OK\r\nContent-Le".to_vec(),
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n".to_vec(),
        ok(b"StorePath: x")[..45].to_vec(),
        half_of_a_small_one,
        half,
    ];
    for phase in phases {
        let bytes = phase.clone();
        let server = Scripted::start(move |_, _| Reply::Hang(bytes.clone())).await;
        let proxy = server.proxy("").await;
        let began = Instant::now();
        for path in ["a.narinfo", "nar/b.nar", "c.narinfo", "nar/d.nar"] {
            let (code, body) = get(&proxy, path).await;
            assert!(code == 404 || body.is_err(), "{path} {code}");
        }
        let took = began.elapsed();
        assert!(took >= BUDGET && took < BUDGET * 3, "{took:?}");
        assert!(proxy.given_up().is_some());
        assert_eq!(
            get(&proxy, "nix-cache-info").await.0,
            200,
            "a cache without paths"
        );
        // A second try for the body that broke off, at most.
        assert!(server.requests.load(Ordering::SeqCst) <= 2);
        proxy.stop().await;
    }
}

#[tokio::test]
async fn a_body_may_take_longer_than_a_cache_may_cost_as_long_as_it_comes() {
    let server = Scripted::start(|_, _| Reply::Slow(ok(&large()[..1_200_000]))).await;
    let proxy = server.proxy("").await;
    let began = Instant::now();
    let (code, body) = get(&proxy, "nar/x.nar").await;
    assert_eq!((code, body.map(|body| body.len())), (200, Ok(1_200_000)));
    assert!(began.elapsed() > BUDGET, "{:?}", began.elapsed());
    proxy.stop().await;
}

#[tokio::test]
async fn what_fails_by_chance_is_read_again() {
    let server = Scripted::start(|head, n| match n {
        20 => status("503 Service Unavailable"),
        40 => status("429 Too Many Requests"),
        60 => Reply::Close(Vec::new()),
        80 => Reply::Close(ok(b"StorePath: x")[..45].to_vec()),
        _ if head.starts_with("GET /main/") => Reply::Send(ok(b"StorePath: x")),
        _ => status("404 Not Found"),
    })
    .await;
    let proxy = server.patient_proxy().await;
    for n in 0..100 {
        let found = get(&proxy, &format!("{n}.narinfo")).await;
        assert_eq!(found, (200, Ok(Bytes::from("StorePath: x"))), "{n}");
    }
    assert_eq!(server.requests.load(Ordering::SeqCst), 104);
    assert_eq!(proxy.given_up(), None);
    proxy.stop().await;
}

#[tokio::test]
async fn a_body_that_breaks_off_is_taken_up_where_it_ended() {
    for knows_ranges in [true, false] {
        let server = Scripted::start(move |head, n| {
            let body = large();
            let range = head.lines().find_map(|line| line.strip_prefix("range: bytes="));
            let from = range.and_then(|range| range.trim_end_matches('-').parse::<usize>().ok());
            match from.filter(|_| knows_ranges) {
                Some(from) => {
                    let (rest, total) = (&body[from..], body.len());
                    let head = format!(
                        "HTTP/1.1 206 Partial Content\r\nContent-Length: {}\r\nContent-Range: bytes {from}-{}/{total}\r\n\r\n",
                        rest.len(),
                        total - 1
                    );
                    Reply::Send([head.as_bytes(), rest].concat())
                }
                None if n == 1 => Reply::Close(ok(&body)[..2_000_000].to_vec()),
                None => Reply::Send(ok(&body)),
            }
        })
        .await;
        let proxy = server.patient_proxy().await;
        let (code, body) = get(&proxy, "nar/x.nar").await;
        assert_eq!((code, body.expect("whole") == large()), (200, true));
        assert_eq!(server.requests.load(Ordering::SeqCst), 2);
        proxy.stop().await;
    }
}

#[tokio::test]
async fn one_path_that_always_fails_costs_no_other_path_the_cache() {
    let server = Scripted::start(|head, _| match head.split(' ').nth(1) {
        Some("/main/bad.narinfo") => status("500 Internal Server Error"),
        _ => Reply::Send(ok(b"StorePath: x")),
    })
    .await;
    let proxy = server.patient_proxy().await;
    assert_eq!(get(&proxy, "bad.narinfo").await.0, 404);
    let asked = server.requests.load(Ordering::SeqCst);
    assert_eq!(get(&proxy, "bad.narinfo").await.0, 404);
    assert_eq!(
        server.requests.load(Ordering::SeqCst),
        asked,
        "it is remembered"
    );
    assert_eq!(get(&proxy, "good.narinfo").await.0, 200);
    assert_eq!(proxy.given_up(), None);
    proxy.stop().await;
}
