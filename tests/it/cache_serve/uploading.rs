//! Attic's upload: both carriers, what is refused, what survives a kill.

use super::*;

#[tokio::test]
async fn both_carriers_and_both_framings_store_the_same_path() {
    let served = Served::start(&[]);
    let url = format!("{}/_api/v1/upload-path", served.url);
    for (letter, preamble, chunked) in [
        ('a', false, false),
        ('b', false, true),
        ('c', true, false),
        ('d', true, true),
    ] {
        let path = TestPath::new(letter, &[letter as u8; 70_000]);
        let info = path.info("main").to_string();
        let mut body = path.nar.clone();
        let mut request = served.client().put(&url).bearer_auth(PLANTED_TOKEN);
        if preamble {
            request = request.header("X-Attic-Nar-Info-Preamble-Size", info.len());
            body.splice(0..0, info.bytes());
        } else {
            request = request.header("X-Attic-Nar-Info", info);
        }
        let pieces: Vec<std::io::Result<Vec<u8>>> =
            body.chunks(999).map(|piece| Ok(piece.to_vec())).collect();
        let stream = reqwest::Body::wrap_stream(futures_util::stream::iter(pieces));
        let (status, json) = answer(request.body(if chunked { stream } else { body.into() })).await;
        assert_eq!(
            (status, json["kind"].as_str()),
            (200, Some("Uploaded")),
            "{json}"
        );
        check_served(&served, &path).await;
    }
    assert!(served.names("tmp").is_empty());
}

/// The server has the path: its narinfo, its NAR, and what a HEAD of either gives.
async fn check_served(served: &Served, path: &TestPath) {
    let narinfo = served.narinfo("main", path).await.unwrap();
    assert_eq!(
        (narinfo.nar_hash, narinfo.nar_size),
        (path.nar_hash(), path.nar.len() as u64)
    );
    assert_eq!(
        narinfo.url,
        format!("nar/{}.nar.zst", path.nar_hash().base32())
    );
    let nar = served
        .client()
        .get(format!("{}/main/{}", served.url, narinfo.url))
        .send()
        .await
        .unwrap();
    assert_eq!(
        nar.headers()["content-length"].to_str().ok(),
        narinfo.file_size.map(|n| n.to_string()).as_deref()
    );
    let nar = nar.bytes().await.unwrap();
    assert_eq!(Some(sha256(&nar)), narinfo.file_hash);
    assert_eq!(zstd::decode_all(&*nar).unwrap(), path.nar);
    let head = served
        .client()
        .head(format!("{}/main/{}.narinfo", served.url, path.hash()))
        .send()
        .await
        .unwrap();
    assert_eq!(
        (head.status().as_u16(), head.bytes().await.unwrap().len()),
        (200, 0)
    );
    let head = served
        .client()
        .head(format!("{}/main/{}", served.url, narinfo.url))
        .send()
        .await
        .unwrap();
    assert_eq!(
        head.headers()["content-length"].to_str().ok(),
        Some(nar.len().to_string().as_str())
    );
}

#[tokio::test]
async fn a_large_preamble_is_taken_and_a_larger_one_is_not() {
    let served = Served::start(&[]);
    // Large enough to mention all of them.
    let mut path = TestPath::new('a', &[b'x'; 9_000 * 32]);
    path.references = (0..9_000)
        .map(|n| format!("{}-{n}", "b".repeat(32)))
        .collect();
    let info = path.info("main").to_string();
    assert!(info.len() > 300_000);
    let send = |size: usize, body: Vec<u8>| {
        let request = served
            .client()
            .put(format!("{}/_api/v1/upload-path", served.url))
            .bearer_auth(PLANTED_TOKEN);
        answer(
            request
                .header("X-Attic-Nar-Info-Preamble-Size", size)
                .body(body),
        )
    };
    let body = [info.as_bytes(), &path.nar].concat();
    assert_eq!(send(info.len(), body.clone()).await.0, 200);
    assert_eq!(
        served
            .narinfo("main", &path)
            .await
            .unwrap()
            .references
            .len(),
        9_000
    );
    for size in [0, 1024 * 1024 + 1] {
        assert_eq!(send(size, body.clone()).await.0, 400, "{size}");
    }
    assert_eq!(send(info.len() - 1, body.clone()).await.0, 400);
    assert_eq!(send(body.len() + 1, body).await.0, 400);
}

#[tokio::test]
async fn references_are_sorted_and_the_signature_is_over_the_sorted_list() {
    let served = Served::start(&[]);
    let (b, c) = (TestPath::new('b', b"b"), TestPath::new('c', b"c"));
    let mut path = TestPath::new('a', b"a").refers_to(&[&c, &b, &c]);
    path.references.push(path.base.clone());
    assert_eq!(
        served.upload(&path).await.0,
        200,
        "a path may come before what it refers to"
    );
    // `narinfo` has checked the signature.
    let narinfo = served.narinfo("main", &path).await.unwrap();
    let names: Vec<&str> = narinfo
        .references
        .iter()
        .map(flywheel_nix::store_path::StorePath::base_name)
        .collect();
    assert_eq!(names, [&path.base, &b.base, &c.base]);
}

#[tokio::test]
async fn a_real_deriver_and_foreign_signatures_are_served() {
    let served = Served::start(&[]);
    let path = TestPath::new('a', b"a");
    let foreign = flywheel_nix::key::SecretKey::generate("other-1")
        .unwrap()
        .sign("whatever");
    let stale = flywheel_nix::key::SecretKey::generate("main")
        .unwrap()
        .sign("whatever");
    let mut info = path.info("main");
    info["deriver"] = json!(format!("{}-a.drv", "d".repeat(32)));
    info["sigs"] = json!([foreign, stale]);
    assert_eq!(
        served
            .upload_as(PLANTED_TOKEN, &info, path.nar.clone())
            .await
            .0,
        200
    );
    let narinfo = served.narinfo("main", &path).await.unwrap();
    assert_eq!(narinfo.deriver.unwrap().name(), "a.drv");
    assert_eq!(
        narinfo.signatures.len(),
        2,
        "a signature by our own name is ours alone"
    );
    assert_eq!(narinfo.signatures[0], foreign);
}

/// Upload infos that are each wrong in one thing, with words of the refusal.
fn bad_metadata(path: &TestPath) -> Vec<(Value, &'static str)> {
    let with = |name: &str, value: Value| {
        let mut info = path.info("main");
        info[name] = value;
        info
    };
    let without = |name: &str| {
        let mut info = path.info("main");
        info.as_object_mut().unwrap().remove(name);
        info
    };
    vec![
        (
            with("store_path_hash", json!("b".repeat(32))),
            "`store_path_hash` is not the hash of",
        ),
        (
            with("store_path", json!("/tmp/x")),
            "`store_path` is not a path in `/nix/store`",
        ),
        (
            with("references", json!([format!("/nix/store/{}", path.base)])),
            "`references` contains an invalid store path name",
        ),
        (
            with("deriver", json!("")),
            "`deriver` contains an invalid store path name",
        ),
        (
            with("deriver", json!(path.base)),
            "`deriver` is not a `.drv`",
        ),
        (
            with(
                "nar_hash",
                json!("sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU="),
            ),
            "`nar_hash` is not",
        ),
        (with("nar_size", json!(0)), "`nar_size` is 0"),
        (
            with("sigs", json!(["x"])),
            "`sigs` contains an invalid signature",
        ),
        (with("ca", json!("x")), "`ca` is not a content address"),
        (
            with("nar_size", json!(path.nar.len() + 1)),
            "Bad NAR Hash or Size: `Content-Length`",
        ),
        (
            with("nar_hash", json!(format!("sha256:{}", "0".repeat(64)))),
            "Bad NAR Hash or Size: the received NAR has",
        ),
        (without("references"), "missing field `references`"),
        (without("sigs"), "missing field `sigs`"),
        (json!("x"), "the upload info cannot be read"),
    ]
}

#[tokio::test]
async fn bad_metadata_is_refused_and_leaves_nothing() {
    let served = Served::start(&[]);
    let path = TestPath::new('a', b"a");
    for (info, problem) in bad_metadata(&path) {
        let (status, json) = served
            .upload_as(PLANTED_TOKEN, &info, path.nar.clone())
            .await;
        assert_eq!(
            (status, json["error"].as_str()),
            (400, Some("RequestError")),
            "{problem}: {json}"
        );
        assert!(
            json["message"].as_str().unwrap().contains(problem),
            "{problem}: {json}"
        );
    }
    let none = served
        .client()
        .put(format!("{}/_api/v1/upload-path", served.url))
        .bearer_auth(PLANTED_TOKEN);
    assert_eq!(answer(none.body("x")).await.0, 400);
    assert_eq!(
        served
            .upload_as(PLANTED_TOKEN, &path.info("main"), "")
            .await
            .0,
        400,
        "an empty body"
    );
    served.until("the temporary files gone", || {
        served.names("tmp").is_empty()
    });
    assert_eq!(served.names("caches/main"), ["nars", "uploads"]);
    assert!(served.names("nars").is_empty());
}

#[tokio::test]
async fn a_nar_that_is_longer_or_shorter_than_announced_is_refused() {
    let served = Served::start(&[]);
    let path = TestPath::new('a', &[1; 50_000]);
    let chunked = |nar: &[u8]| {
        let pieces: Vec<std::io::Result<Vec<u8>>> =
            nar.chunks(7_000).map(|piece| Ok(piece.to_vec())).collect();
        reqwest::Body::wrap_stream(futures_util::stream::iter(pieces))
    };
    // A new NAR and a known one take different ways in the server; Attic accepts the fault in a new one.
    for _ in 0..2 {
        for nar in [
            &path.nar[..path.nar.len() - 1],
            &[&path.nar[..], b"x"].concat(),
        ] {
            let (status, json) = served
                .upload_as(PLANTED_TOKEN, &path.info("main"), chunked(nar))
                .await;
            assert_eq!(status, 400, "{json}");
            assert!(
                json["message"]
                    .as_str()
                    .unwrap()
                    .starts_with("Bad NAR Hash or Size: "),
                "{json}"
            );
        }
        assert_eq!(served.upload(&path).await.0, 200);
    }
}

#[tokio::test]
async fn a_nar_is_stored_once_and_shown_only_where_it_was_sent() {
    let served = Served::start(&[]);
    let path = TestPath::new('a', b"shared");
    assert_eq!(served.upload(&path).await.1["kind"], "Uploaded");
    assert_eq!(served.upload(&path).await.1["kind"], "Deduplicated");
    let nar = format!(
        "{}/team/nar/{}.nar.zst",
        served.url,
        path.nar_hash().base32()
    );
    assert_eq!(
        served.client().get(&nar).send().await.unwrap().status(),
        404,
        "the other cache's NAR"
    );
    // A client has to send the NAR that it names, even if the server has it: a hash alone is no proof of having it.
    let (status, _) = served
        .upload_as("team-token", &path.info("team"), "x".repeat(path.nar.len()))
        .await;
    assert_eq!(status, 400);
    assert_eq!(
        served.client().get(&nar).send().await.unwrap().status(),
        404
    );
    let (status, json) = served
        .upload_as("team-token", &path.info("team"), path.nar.clone())
        .await;
    assert_eq!((status, json["kind"].as_str()), (200, Some("Deduplicated")));
    assert_eq!(
        served.client().get(&nar).send().await.unwrap().status(),
        200
    );
    assert_eq!(
        served.narinfo("main", &path).await.unwrap().file_hash,
        served.narinfo("team", &path).await.unwrap().file_hash
    );
    assert_eq!(served.names("nars").len(), 1);
}

#[tokio::test]
async fn many_writers_of_one_path_and_of_many_all_succeed() {
    let served = Served::start(&[]);
    let same = TestPath::new('z', &[3; 300_000]);
    let others: Vec<TestPath> = "0123456789abcdfghijk"
        .chars()
        .map(|c| TestPath::new(c, &[c as u8; 9_000]))
        .collect();
    let uploads = (0..20)
        .map(|_| &same)
        .chain(&others)
        .map(|path| served.upload(path));
    for (status, json) in futures_util::future::join_all(uploads).await {
        assert_eq!(status, 200, "{json}");
    }
    assert_eq!(served.names("nars").len(), 21);
    for path in others.iter().chain([&same]) {
        let narinfo = served.narinfo("main", path).await.unwrap();
        let nar = served
            .client()
            .get(format!("{}/main/{}", served.url, narinfo.url))
            .send()
            .await
            .unwrap();
        assert_eq!(Some(sha256(&nar.bytes().await.unwrap())), narinfo.file_hash);
    }
    assert!(served.names("tmp").is_empty());
}

#[tokio::test]
async fn a_killed_server_shows_nothing_half_done() {
    let served = Served::start(&[]);
    let (whole, cut) = (
        TestPath::new('a', b"whole"),
        TestPath::new('b', &[9; 500_000]),
    );
    assert_eq!(served.upload(&whole).await.0, 200);
    let mut sending = TcpStream::connect(served.address()).unwrap();
    let head = upload_head(
        &cut,
        PLANTED_TOKEN,
        &format!("Content-Length: {}\r\n", cut.nar.len()),
    );
    sending.write_all(head.as_bytes()).unwrap();
    sending.write_all(&cut.nar[..400_000]).unwrap();
    served.until("a temporary file", || !served.names("tmp").is_empty());
    served.signal(Signal::KILL);
    let (_, folder) = served.wait();
    assert_eq!(
        std::fs::read_dir(folder.path().join("cache/tmp"))
            .unwrap()
            .count(),
        1,
        "the kill came in between"
    );

    let served = Served::in_folder(folder, &[]);
    assert!(served.names("tmp").is_empty());
    assert_eq!(served.names("nars").len(), 1);
    assert!(served.narinfo("main", &cut).await.is_none());
    assert!(served.narinfo("main", &whole).await.is_some());
    assert_eq!(served.upload(&cut).await.0, 200);
}

#[test]
fn a_client_that_goes_away_leaves_nothing() {
    let served = Served::start(&[]);
    let path = TestPath::new('a', &[9; 500_000]);
    let mut sending = TcpStream::connect(served.address()).unwrap();
    sending
        .write_all(upload_head(&path, PLANTED_TOKEN, "Transfer-Encoding: chunked\r\n").as_bytes())
        .unwrap();
    sending.write_all(b"10000\r\n").unwrap();
    sending.write_all(&path.nar[..0x8000]).unwrap();
    served.until("a temporary file", || !served.names("tmp").is_empty());
    drop(sending);
    served.until("the temporary file gone", || served.names("tmp").is_empty());
    assert!(served.names("nars").is_empty());
}

#[test]
fn a_refusal_comes_before_the_body_is_asked_for() {
    let served = Served::start(&[]);
    let path = TestPath::new('a', &[1; 100_000]);
    let more = format!(
        "Content-Length: {}\r\nExpect: 100-continue\r\n",
        path.nar.len()
    );
    let refused = TcpStream::connect(served.address()).unwrap();
    (&refused)
        .write_all(upload_head(&path, "garbage-token", &more).as_bytes())
        .unwrap();
    let answer = read_all(&refused);
    assert!(
        answer.starts_with("HTTP/1.1 403 ") && !answer.contains("100 Continue"),
        "{answer}"
    );

    let mut welcome = TcpStream::connect(served.address()).unwrap();
    let more = format!("{more}Connection: close\r\n");
    welcome
        .write_all(upload_head(&path, PLANTED_TOKEN, &more).as_bytes())
        .unwrap();
    let mut first = [0; 12];
    welcome.read_exact(&mut first).unwrap();
    assert_eq!(&first, b"HTTP/1.1 100");
    welcome.write_all(&path.nar).unwrap();
    assert!(read_all(&welcome).contains("HTTP/1.1 200 OK"));
}

#[test]
fn a_known_nar_is_asked_for_unless_its_proof_is_waived() {
    for (more, waived) in [(&[] as &[&str], false), (&["--waive-proof"], true)] {
        let served = Served::start(more);
        let path = TestPath::new('a', &[1; 100_000]);
        let length = format!("Content-Length: {}\r\n", path.nar.len());
        let first = TcpStream::connect(served.address()).unwrap();
        (&first)
            .write_all(upload_head(&path, PLANTED_TOKEN, &length).as_bytes())
            .unwrap();
        (&first).write_all(&path.nar).unwrap();
        assert!(read_answer(&first).contains("Uploaded"));
        // The server has the NAR; the client waits for `100 Continue` and sends none of it.
        let second = TcpStream::connect(served.address()).unwrap();
        let head = upload_head(
            &path,
            PLANTED_TOKEN,
            &format!("{length}Expect: 100-continue\r\n"),
        );
        (&second).write_all(head.as_bytes()).unwrap();
        let mut answer = [0; 12];
        (&second).read_exact(&mut answer).unwrap();
        assert_eq!(
            &answer,
            if waived {
                b"HTTP/1.1 200"
            } else {
                b"HTTP/1.1 100"
            }
        );
        // A client that may not write learns no more than before.
        let refused = TcpStream::connect(served.address()).unwrap();
        (&refused)
            .write_all(upload_head(&path, "garbage-token", &length).as_bytes())
            .unwrap();
        assert!(read_all(&refused).starts_with("HTTP/1.1 403 "));
    }
}

#[test]
fn an_early_answer_announces_the_end_of_its_connection() {
    let served = Served::start(&[]);
    let path = TestPath::new('a', &[1; 400_000]);
    let more = format!("Content-Length: {}\r\n", path.nar.len());
    let mut early = TcpStream::connect(served.address()).unwrap();
    early
        .write_all(upload_head(&path, "garbage-token", &more).as_bytes())
        .unwrap();
    // Even a client that has sent its whole body has to see that this connection takes no further request.
    early.write_all(&path.nar).unwrap();
    let answer = read_all(&early).to_ascii_lowercase();
    assert!(
        answer.starts_with("http/1.1 403 ") && answer.contains("\r\nconnection: close\r\n"),
        "{answer}"
    );

    let whole = TcpStream::connect(served.address()).unwrap();
    for _ in 0..2 {
        (&whole)
            .write_all(upload_head(&path, PLANTED_TOKEN, &more).as_bytes())
            .unwrap();
        (&whole).write_all(&path.nar).unwrap();
        let answer = read_answer(&whole).to_ascii_lowercase();
        assert!(
            answer.starts_with("http/1.1 200 ") && !answer.contains("connection: close"),
            "{answer}"
        );
    }
}

/// One answer with its JSON, of a connection that goes on.
fn read_answer(mut stream: &TcpStream) -> String {
    let mut answer = Vec::new();
    while !answer.ends_with(b"}") {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        answer.push(byte[0]);
    }
    String::from_utf8_lossy(&answer).into_owned()
}

#[test]
fn a_client_that_sends_before_it_listens_still_hears_the_refusal() {
    let served = Served::start(&[]);
    let path = TestPath::new('a', &[1; 20_000_000]);
    let mut refused = TcpStream::connect(served.address()).unwrap();
    let more = format!("Content-Length: {}\r\n", path.nar.len());
    refused
        .write_all(upload_head(&path, "garbage-token", &more).as_bytes())
        .unwrap();
    refused.write_all(&path.nar).unwrap();
    assert!(read_all(&refused).starts_with("HTTP/1.1 403 "));
}

#[tokio::test]
async fn a_full_disk_fails_the_upload_and_not_the_server() {
    // No file may grow over 64 KiB, and the error of the disk is an error like any other.
    let served = Served::start_limited();
    // One is compressed as it comes, the other in memory.
    let large = [
        TestPath::new('a', &noise(300_000)),
        TestPath::new('c', &noise(200_000)),
    ];
    for large in &large {
        let (status, json) = served.upload(large).await;
        assert_eq!(
            (status, json["error"].as_str()),
            (500, Some("InternalServerError")),
            "{json}"
        );
        assert!(served.names("tmp").is_empty() && served.names("nars").is_empty());
    }
    assert_eq!(served.upload(&TestPath::new('b', b"small")).await.0, 200);
    for large in &large {
        assert!(served.narinfo("main", large).await.is_none());
    }
}

/// Bytes that do not compress.
fn noise(size: usize) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(7);
    (0..size).map(|_| random.u8(..)).collect()
}
