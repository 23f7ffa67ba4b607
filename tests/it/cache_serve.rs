//! `flywheel cache serve` and `flywheel cache gc` through the front door, over loopback.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt as _;
use std::time::{Duration, Instant, SystemTime};

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::world::cache_server::{Served, TestPath, answer, resealed, sha256};
use crate::world::{Flywheel, PLANTED_TOKEN};

mod collecting;
mod contents;
mod damage;
mod logins;
mod nix_copy;
mod reach;
mod readers;
mod sharing;
mod strangers;
mod tokens;
mod uploading;

/// A server on the folder `c` that ends as soon as it has started.
fn served_once() -> Flywheel {
    let mut arguments = vec!["cache", "serve", "--dir", "c"];
    arguments.extend(["--listen", "127.0.0.1:0", "--stop-after", "0s"]);
    Flywheel::new(&arguments)
}

#[test]
fn the_first_start_makes_private_files_and_the_second_keeps_them() {
    let start = || served_once().env("FLYWHEEL_CACHE_READY_FILE", "ready");
    let mut first = start();
    let ran = first.run();
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let lines: Vec<&str> = ran.stdout.lines().collect();
    let server = lines[0];
    assert!(server.starts_with("http://127.0.0.1:"), "{}", ran.stdout);
    assert_eq!(lines[1], format!("cache {server}/main"));
    let key = lines[2].trim_start_matches("public-key ");
    assert!(key.starts_with("main:"), "{}", ran.stdout);
    assert_eq!(lines[3], "tokens-file c/tokens");
    assert_eq!(
        lines[5..],
        [
            "# Nix reads it with these lines in nix.conf:".to_owned(),
            format!("extra-substituters = {server}/main"),
            format!("extra-trusted-public-keys = {key}"),
        ]
    );
    assert_eq!(first.read("ready").trim(), server);
    for file in ["c/tokens", "c/keys/main.secret"] {
        assert_eq!(
            std::fs::metadata(first.path(file))
                .unwrap()
                .permissions()
                .mode()
                & 0o777,
            0o600,
            "{file}"
        );
    }
    let token = first
        .read("c/tokens")
        .lines()
        .last()
        .unwrap()
        .trim_start_matches("write ")
        .to_owned();
    assert_eq!(token.len(), 64);
    assert!(!ran.stdout.contains(&token) && !ran.stderr.contains(&token));

    let mut second = start();
    std::mem::swap(&mut second.folder, &mut first.folder);
    let again = second.run();
    assert_eq!(again.stdout.lines().nth(2), Some(lines[2]), "the key stays");
    assert!(second.read("c/tokens").contains(&token), "the token stays");
}

#[test]
fn bad_input_is_refused_before_anything_is_made() {
    let cases: [(&[&str], &str, &str); 9] = [
        (
            &["--listen", "0.0.0.0:0"],
            "names 0.0.0.0, which other machines may reach",
            "--allow-remote",
        ),
        (
            &["--listen", "8080"],
            "must be an address and a port",
            "127.0.0.1:8484",
        ),
        (&["--cache", "../x"], "is not a cache name", ""),
        (
            &["--max-age", "3y"],
            "must be a time such as `30d`, not `3y`",
            "`w`",
        ),
        (
            &["--max-size", "big"],
            "must be a size such as `20G`, not `big`",
            "1024",
        ),
        (
            &["--level", "0"],
            "must be a number from 1 to 19, not `0`",
            "",
        ),
        (
            &["--priority", "low"],
            "must be a number from 0 to 1000, not `low`",
            "",
        ),
        (&["--grace", "x"], "must be a time", ""),
        (&["--stop-after", "x"], "must be a time", ""),
    ];
    for (more, problem, hint) in cases {
        let mut arguments = vec!["cache", "serve", "--dir", "c"];
        arguments.extend(more);
        let run = Flywheel::new(&arguments);
        let ran = run.run();
        assert_eq!(ran.code, 64, "{more:?}: {}", ran.stderr);
        assert!(
            ran.stderr.contains(problem) && ran.stderr.contains(hint),
            "{more:?}: {}",
            ran.stderr
        );
        assert!(!run.path("c").exists(), "{more:?}");
    }
}

#[test]
fn a_pipe_in_place_of_a_file_of_the_folder_keeps_no_server_waiting() {
    for name in ["tokens", "lock", "keys/main.secret"] {
        let run = Flywheel::new(&["cache", "serve", "--dir", "c", "--listen", "127.0.0.1:0"]);
        std::fs::create_dir_all(run.path("c/keys")).unwrap();
        let file = run.path("c").join(name);
        rustix::fs::mkfifoat(rustix::fs::CWD, &file, rustix::fs::Mode::from(0o600)).unwrap();
        let began = std::time::Instant::now();
        let ran = run.run();
        assert!(
            began.elapsed().as_secs() < 10,
            "{name}: {:?}",
            began.elapsed()
        );
        assert_eq!(ran.code, 69, "{name}: {}", ran.stderr);
        assert!(
            ran.stderr.contains("is a named pipe"),
            "{name}: {}",
            ran.stderr
        );
    }
}

#[test]
fn empty_inputs_are_inputs_that_were_not_given() {
    let run = Flywheel::in_job(&[
        "cache",
        "serve",
        "--dir",
        "c",
        "--listen",
        "127.0.0.1:0",
        "--stop-after",
        "0",
    ]);
    let names = [
        "READY_FILE",
        "TOKENS",
        "LEVEL",
        "PRIORITY",
        "MAX_AGE",
        "MAX_SIZE",
        "GRACE",
        "GC_INTERVAL",
        "PRIVATE",
    ];
    let run = names.iter().fold(run, |run, name| {
        run.env(&format!("FLYWHEEL_CACHE_{name}"), "")
    });
    assert_eq!(run.run().code, 0);
    let run =
        Flywheel::in_job(&["cache", "serve", "--dir", "c"]).env("FLYWHEEL_CACHE_LISTEN", "nowhere");
    let ran = run.run();
    assert_eq!(ran.code, 64);
    assert!(
        ran.stdout
            .starts_with("::error title=flywheel::input `listen` must be"),
        "{}",
        ran.stdout
    );
}

#[test]
fn a_bad_tokens_file_is_named_and_not_shown() {
    let run = Flywheel::new(&["cache", "serve", "--dir", "c", "--listen", "127.0.0.1:0"]);
    std::fs::create_dir(run.path("c")).unwrap();
    std::fs::write(run.path("c/tokens"), "push hidden-token\n").unwrap();
    let ran = run.run();
    assert_eq!(ran.code, 69);
    assert!(
        ran.stderr.contains("line 1 of the tokens file `c/tokens`"),
        "{}",
        ran.stderr
    );
    assert!(!ran.stderr.contains("hidden-token"), "{}", ran.stderr);
}

#[test]
fn a_collection_beside_a_server_is_refused() {
    let served = Served::start(&[]);
    let folder = served.path("").display().to_string();
    let arguments = ["cache", "gc", "--dir", &folder, "--max-size", "0"];
    let ran = Flywheel::new(&arguments).run();
    assert_eq!(ran.code, 69, "{}", ran.stderr);
    assert!(
        ran.stderr.contains("is in use by another `flywheel cache`"),
        "{}",
        ran.stderr
    );
    assert!(
        ran.stderr.contains("help: A folder has one server"),
        "{}",
        ran.stderr
    );
    assert_eq!(served.stop().0.code, 0);
}

/// (token, cache) → what cache-config, get-missing-paths, narinfo and an upload answer.
async fn answers(served: &Served, token: Option<&str>, cache: &str, path: &TestPath) -> [u16; 4] {
    let client = served.client();
    let with = |request: reqwest::RequestBuilder| match token {
        Some(token) => request.bearer_auth(token),
        None => request,
    };
    let url = &served.url;
    let ask = json!({"cache": cache, "store_path_hashes": []});
    let info = path.info(cache).to_string();
    let requests = [
        client.get(format!("{url}/_api/v1/cache-config/{cache}")),
        client
            .post(format!("{url}/_api/v1/get-missing-paths"))
            .json(&ask),
        client.get(format!("{url}/{cache}/{}.narinfo", path.hash())),
        client
            .put(format!("{url}/_api/v1/upload-path"))
            .header("X-Attic-Nar-Info", info)
            .body(path.nar.clone()),
    ];
    let mut statuses = [0; 4];
    for (status, request) in statuses.iter_mut().zip(requests) {
        let (code, json) = answer(with(request)).await;
        if code >= 400 {
            assert_eq!(json["code"], code, "{json}");
            assert!(
                json["error"].is_string() && json["message"].is_string(),
                "{json}"
            );
        }
        *status = code;
    }
    statuses
}

#[tokio::test]
async fn a_private_cache_answers_as_attic_does() {
    let served = Served::start(&["--private"]);
    let path = TestPath::new('a', b"x");
    for stranger in [None, Some("garbage-token"), Some("planted-token-4f1d9c2b7")] {
        assert_eq!(
            answers(&served, stranger, "main", &path).await,
            [401, 401, 401, 401],
            "{stranger:?}"
        );
        assert_eq!(
            answers(&served, stranger, "none", &path).await,
            [401, 401, 404, 401],
            "{stranger:?}"
        );
    }
    assert_eq!(
        answers(&served, Some("team-token"), "main", &path).await,
        [401, 401, 401, 401]
    );
    assert_eq!(
        answers(&served, Some("team-token"), "none", &path).await,
        [401, 401, 404, 401]
    );
    assert_eq!(
        answers(&served, Some("reader-token"), "main", &path).await,
        [200, 403, 404, 403]
    );
    assert_eq!(
        answers(&served, Some(PLANTED_TOKEN), "none", &path).await,
        [404, 404, 404, 404]
    );
    assert_eq!(
        answers(&served, Some(PLANTED_TOKEN), "main", &path).await,
        [200, 200, 404, 200]
    );
    assert_eq!(
        answers(&served, Some("reader-token"), "main", &path).await,
        [200, 403, 200, 403]
    );
    check_basic_authentication(&served, &path).await;
    let nar = format!(
        "{}/main/nar/{}.nar.zst",
        served.url,
        path.nar_hash().base32()
    );
    assert_eq!(served.client().get(nar).send().await.unwrap().status(), 401);
    let (ran, _) = served.stop();
    assert!(
        ran.stderr.contains("PUT /_api/v1/upload-path 200 "),
        "{}",
        ran.stderr
    );
    assert!(!ran.stderr.contains("reader-token"), "{}", ran.stderr);
    assert!(
        ran.stderr.contains("warning: tokens: `"),
        "the tests' file has no private mode: {}",
        ran.stderr
    );
}

/// The password is the token, whatever the user is called: so Nix sends what stands in a netrc.
async fn check_basic_authentication(served: &Served, path: &TestPath) {
    let url = format!("{}/main/{}.narinfo", served.url, path.hash());
    let get = || served.client().get(&url);
    assert_eq!(
        get()
            .basic_auth("anybody", Some("reader-token"))
            .send()
            .await
            .unwrap()
            .status(),
        200
    );
    assert_eq!(
        get()
            .basic_auth("reader-token", None::<&str>)
            .send()
            .await
            .unwrap()
            .status(),
        401
    );
}

#[tokio::test]
async fn a_public_cache_answers_as_attic_does() {
    let served = Served::start(&[]);
    let path = TestPath::new('a', b"x");
    for stranger in [
        None,
        Some("garbage-token"),
        Some("reader-token"),
        Some("team-token"),
    ] {
        assert_eq!(
            answers(&served, stranger, "main", &path).await,
            [200, 403, 404, 403],
            "{stranger:?}"
        );
    }
    // The cache is named in the body of a question for missing paths, which is not read without a token.
    assert_eq!(
        answers(&served, None, "none", &path).await,
        [401, 403, 404, 401]
    );
    assert_eq!(
        answers(&served, Some("team-token"), "team", &path).await,
        [200, 200, 404, 200]
    );
}

#[tokio::test]
async fn cache_config_tells_a_client_what_it_needs() {
    let served = Served::start(&["--max-age", "2d", "--priority", "30"]);
    let get = |name: &str, value: &str| {
        let url = format!("{}/_api/v1/cache-config/team", served.url);
        answer(served.client().get(url).header(name, value))
    };
    let (status, config) = get("accept", "*/*").await;
    assert_eq!(status, 200);
    assert_eq!(
        config,
        json!({
            "substituter_endpoint": format!("{}/team", served.url), "api_endpoint": format!("{}/", served.url),
            "public_key": served.keys[1], "is_public": true, "store_dir": "/nix/store", "priority": 30,
            "upstream_cache_key_names": ["cache.nixos.org-1"], "retention_period": {"Period": 172_800},
        })
    );
    let (_, config) = get("x-forwarded-proto", "https").await;
    assert_eq!(
        config["api_endpoint"],
        served.url.replace("http:", "https:") + "/"
    );
    let info = served
        .client()
        .get(format!("{}/team/nix-cache-info", served.url))
        .send()
        .await
        .unwrap();
    assert_eq!(info.headers()["x-attic-cache-visibility"], "public");
    assert_eq!(
        info.text().await.unwrap(),
        "WantMassQuery: 1\nStoreDir: /nix/store\nPriority: 30\n"
    );
}

#[tokio::test]
async fn what_is_at_no_address_is_told_in_json() {
    let served = Served::start(&[]);
    let url = &served.url;
    let client = served.client();
    assert_eq!(
        client.get(format!("{url}/")).send().await.unwrap().status(),
        200
    );
    for (request, status) in [
        (client.get(format!("{url}/main/x/y/z")), 404),
        (client.get(format!("{url}/main/{}.ls", "a".repeat(32))), 404),
        (client.get(format!("{url}/main/not-a-hash.narinfo")), 404),
        (client.get(format!("{url}/main/nar/..%2f..%2ftokens")), 404),
        (client.get(format!("{url}/main/nar/x.nar.zst")), 404),
        (client.get(format!("{url}/..%2ftokens/nix-cache-info")), 404),
        (client.delete(format!("{url}/main/nix-cache-info")), 405),
        (client.put(format!("{url}/main/nix-cache-info")), 405),
    ] {
        let (code, json) = answer(request.bearer_auth(PLANTED_TOKEN)).await;
        assert_eq!((code, &json["code"]), (status, &json!(status)), "{json}");
    }
}

fn ten_thousand_hashes() -> Vec<String> {
    let digits = "0123456789abcdfghijklmnpqrsvwxyz".as_bytes();
    (0..10_000_usize)
        .map(|n| {
            let tail: String = (0..3)
                .map(|place| char::from(digits[n >> (5 * place) & 31]))
                .collect();
            format!("{}{tail}", "c".repeat(29))
        })
        .collect()
}

#[tokio::test]
async fn missing_paths_are_asked_for_in_one_batch() {
    let served = Served::start(&[]);
    let known = TestPath::new('a', b"x");
    assert_eq!(served.upload(&known).await.0, 200);
    let post = |body: String, kind: &'static str| {
        let url = format!("{}/_api/v1/get-missing-paths", served.url);
        answer(
            served
                .client()
                .post(url)
                .bearer_auth(PLANTED_TOKEN)
                .header("content-type", kind)
                .body(body),
        )
    };
    let ask = |hashes: Vec<String>| {
        post(
            json!({"cache": "main", "store_path_hashes": hashes}).to_string(),
            "application/json",
        )
    };
    let b = "b".repeat(32);
    assert_eq!(ask(vec![]).await, (200, json!({"missing_paths": []})));
    assert_eq!(
        ask(vec![b.clone(), known.hash().into(), b.clone()]).await,
        (200, json!({"missing_paths": [b]}))
    );
    assert_eq!(
        ask(ten_thousand_hashes()).await.1["missing_paths"]
            .as_array()
            .unwrap()
            .len(),
        10_000
    );
    assert_eq!(ask(vec!["e".repeat(32)]).await.0, 422);
    assert_eq!(
        post("{}".into(), "application/json; charset=utf-8").await.0,
        422
    );
    assert_eq!(post("{".into(), "application/json").await.0, 400);
    assert_eq!(post("{}".into(), "text/plain").await.0, 415);
    assert_eq!(
        post(" ".repeat(2 * 1024 * 1024 + 1), "application/json")
            .await
            .0,
        413
    );
    // A NAR that is gone from the disk is missing, although its narinfo is still there.
    std::fs::remove_file(
        served
            .path("nars")
            .join(format!("{}.nar.zst", known.nar_hash().base32())),
    )
    .unwrap();
    assert_eq!(
        ask(vec![known.hash().into()]).await.1["missing_paths"],
        json!([known.hash()])
    );
    assert!(served.narinfo("main", &known).await.is_none());
    assert_eq!(served.upload(&known).await.1["kind"], "Uploaded");
    assert!(served.narinfo("main", &known).await.is_some());
}

#[test]
fn sigterm_ends_it_within_six_seconds_whatever_is_under_way() {
    let served = Served::start(&[]);
    let mut hanging = TcpStream::connect(served.address()).unwrap();
    let path = TestPath::new('a', &[7; 1_000_000]);
    let head = upload_head(
        &path,
        PLANTED_TOKEN,
        &format!("Content-Length: {}\r\n", path.nar.len()),
    );
    hanging.write_all(head.as_bytes()).unwrap();
    hanging.write_all(&path.nar[..500_000]).unwrap();
    served.until("a temporary file", || !served.names("tmp").is_empty());
    let begun = Instant::now();
    let (ran, _) = served.stop();
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    assert!(
        begun.elapsed() < Duration::from_secs(6),
        "{:?}",
        begun.elapsed()
    );
}

#[tokio::test]
async fn a_kill_loses_nothing_and_the_end_of_the_machine_only_what_came_last() {
    let (old, new) = (TestPath::new('a', b"old"), TestPath::new('b', b"new"));
    let new = new.refers_to(&[&old]);
    let served = Served::start(&[]);
    assert_eq!(served.upload(&old).await.0, 200);
    let (ran, folder) = served.stop();
    assert_eq!(ran.code, 0, "{}", ran.stderr);

    let served = Served::in_folder(folder, &[]);
    let synced = std::fs::read_to_string(served.path("synced")).unwrap();
    assert_eq!(served.upload(&new).await.0, 200);
    served.signal(Signal::KILL);
    let (_, folder) = served.wait();
    let served = Served::in_folder(folder, &[]);
    assert!(
        served.narinfo("main", &new).await.is_some(),
        "the system keeps what a killed process wrote"
    );
    served.signal(Signal::KILL);
    let (ran, folder) = served.wait();
    assert!(!ran.stderr.contains("the machine ended"), "{}", ran.stderr);

    // As if the machine had ended before anything more was synced.
    let boot = synced
        .lines()
        .find(|line| line.starts_with("Boot: "))
        .unwrap()
        .to_owned();
    let file = folder.path().join("cache/synced");
    std::fs::write(&file, &synced).unwrap();
    std::fs::write(&file, resealed(&file, &boot, "Boot: another")).unwrap();
    let served = Served::in_folder(folder, &[]);
    assert!(served.narinfo("main", &old).await.is_some());
    assert!(served.narinfo("main", &new).await.is_none());
    for folder in ["nars", "caches/main/nars"] {
        assert_eq!(
            served.names(folder).len(),
            1,
            "a NAR that may be torn is not taken for known"
        );
    }
    assert_eq!(served.upload(&new).await.0, 200);
    assert!(served.narinfo("main", &new).await.is_some());
    let (ran, _) = served.stop();
    assert!(
        ran.stderr
            .contains("the last uploads may be incomplete: 1 path\n"),
        "{}",
        ran.stderr
    );
}

/// The head of an upload in the header's form, for tests that talk to the socket themselves.
fn upload_head(path: &TestPath, token: &str, more: &str) -> String {
    let info = path.info("main");
    format!(
        "PUT /_api/v1/upload-path HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n\
         X-Attic-Nar-Info: {info}\r\n{more}\r\n"
    )
}

/// Everything that a connection sends until it ends.
fn read_all(mut stream: &TcpStream) -> String {
    stream
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    String::from_utf8_lossy(&answer).into_owned()
}
