//! Clients that hold connections and send next to nothing: they lock nobody out, and cost little memory.

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream as Stream};

use super::*;

/// More than the server has places for.
const STRANGERS: u16 = 300;
const PATIENCE: Duration = Duration::from_secs(1);

/// What a stranger sends at once; then a byte now and then.
fn beginnings() -> [Vec<u8>; 4] {
    let path = TestPath::new('s', &[1; 500_000]);
    let length = format!("Content-Length: {}\r\n", path.nar.len());
    let refused = upload_head(&path, "garbage-token", &length);
    let question = "POST /_api/v1/get-missing-paths HTTP/1.1\r\nHost: x\r\n\
                    Content-Type: application/json\r\nContent-Length: 800000\r\n\r\n[";
    [
        Vec::new(),
        b"GET /main/nix-cache-info HTTP/1.1\r\nHost: ".to_vec(),
        refused.into_bytes(),
        [question.as_bytes(), &[b' '; 10_000]].concat(),
    ]
}

/// Connects from an address of this machine.
async fn connect(served: &Served, from: [u8; 4]) -> Stream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind((from, 0).into()).unwrap();
    socket
        .connect(served.address().parse().unwrap())
        .await
        .unwrap()
}

/// Holds `STRANGERS` connections and drips into them.
async fn drip(mut connections: Vec<Stream>) {
    loop {
        for connection in &mut connections {
            // Those that the server has closed stay closed.
            let _ = connection.try_write(b"x");
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Reads as one client after the other, each on a connection of its own.
async fn check_readers(served: &Served, path: &TestPath, what: &str) {
    let request = format!(
        "GET /main/{}.narinfo HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
        path.hash()
    );
    for _ in 0..5 {
        let read = async || {
            let mut reader = connect(served, [127, 0, 0, 1]).await;
            reader.write_all(request.as_bytes()).await?;
            let mut answer = String::new();
            reader.read_to_string(&mut answer).await?;
            std::io::Result::Ok(answer)
        };
        // In the middle of a burst a connection may give way before its request has come, which Nix, too, takes for a
        // reason to try again.
        let answered = async {
            loop {
                match read().await {
                    Ok(answer) if !answer.is_empty() => break answer,
                    Ok(_) | Err(_) => tokio::task::yield_now().await,
                }
            }
        };
        let answer = tokio::time::timeout(PATIENCE, answered).await;
        let good = matches!(&answer, Ok(text) if text.starts_with("HTTP/1.1 200 OK"));
        assert!(good, "{what}: {answer:?}");
    }
}

async fn check(served: &Served, path: &TestPath, many: bool) {
    for (n, beginning) in beginnings().iter().enumerate() {
        let what = format!("beginning {n}, from {}", if many { "many" } else { "one" });
        let mut connections = Vec::new();
        for stranger in 0..STRANGERS {
            let last = if many { 2 + (stranger % 250) as u8 } else { 1 };
            let mut connection = connect(served, [127, 0, 0, last]).await;
            // The server may have refused, closed, or be too busy to take all of it.
            let send = connection.write_all(beginning);
            let _ = tokio::time::timeout(Duration::from_millis(20), send).await;
            connections.push(connection);
        }
        tokio::select! {
            () = check_readers(served, path, &what) => (),
            () = drip(connections) => (),
        }
    }
}

#[tokio::test]
async fn three_hundred_dripping_strangers_lock_nobody_out() {
    // Nobody reads the log before the end, and the strangers fill the pipe that it goes into.
    let served = Served::start(&[]);
    let path = TestPath::new('a', b"wanted");
    assert_eq!(served.upload(&path).await.0, 200);
    for many in [false, true] {
        check(&served, &path, many).await;
    }
    let peak = served.peak_kib();
    assert!(peak < 96 * 1024, "{peak} KiB");
    let (ran, _) = served.stop();
    assert_eq!(ran.code, 0);
}

#[tokio::test]
async fn nor_do_they_at_a_process_that_shares_the_folder() {
    let served = Served::start(&[]);
    let beside = served.beside(&[]);
    let path = TestPath::new('a', b"wanted");
    assert_eq!(beside.upload(&path).await.0, 200);
    for many in [false, true] {
        check(&beside, &path, many).await;
    }
    check_readers(&served, &path, "at the other").await;
}

#[test]
fn no_body_is_asked_of_a_stranger() {
    let served = Served::start(&[]);
    let path = TestPath::new('a', b"x");
    let hash = path.hash();
    let nar = format!("{}.nar.xz", path.nar_hash().base32());
    for (method, address) in [
        ("POST", "/_api/v1/get-missing-paths".to_owned()),
        ("PUT", "/_api/v1/upload-path".to_owned()),
        ("PUT", format!("/main/{hash}.narinfo")),
        ("PUT", format!("/main/nar/{nar}")),
    ] {
        for token in ["", "Authorization: Bearer reader-token\r\n"] {
            let stream = TcpStream::connect(served.address()).unwrap();
            let head = format!(
                "{method} {address} HTTP/1.1\r\nHost: x\r\n{token}Content-Type: application/json\r\n\
                 X-Attic-Nar-Info-Preamble-Size: 99\r\nContent-Length: 800000\r\nExpect: 100-continue\r\n\r\n"
            );
            (&stream).write_all(head.as_bytes()).unwrap();
            let answer = read_all(&stream);
            assert!(answer.starts_with("HTTP/1.1 403 "), "{address}: {answer}");
        }
    }
}
