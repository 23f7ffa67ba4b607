//! Several processes on one folder: each has its own address and terms, one of them serves the folder, and another
//! goes on when that one ends, however it ends.

use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::Value;

use super::{Served, TestPath, answer, answers, served_once};
use crate::world::{Flywheel, PLANTED_TOKEN};

/// Uploads until the server takes it, as a publisher does.
async fn upload(served: &Served, path: &TestPath) {
    let begun = Instant::now();
    loop {
        let request = served
            .client()
            .put(format!("{}/_api/v1/upload-path", served.url))
            .bearer_auth(PLANTED_TOKEN)
            .header("X-Attic-Nar-Info", path.info("main").to_string())
            .body(path.nar.clone());
        match request.send().await {
            Ok(response) if response.status() == 200 => return,
            other => assert!(begun.elapsed().as_secs() < 20, "{other:?}"),
        }
        tokio::task::yield_now().await;
    }
}

fn path(n: u8) -> TestPath {
    let digit = b"0123456789abcdfghijklmnpqrsvwxyz"[usize::from(n)];
    // Large enough that a kill falls into an upload.
    TestPath::new(char::from(digit), &[n; 700_000])
}

#[tokio::test]
async fn a_second_process_uses_the_first_ones_server_under_its_own_terms() {
    let first = Served::start(&["--private"]);
    let second = first.beside(&["--priority", "7"]);
    assert_ne!(first.url, second.url);
    assert_eq!(first.keys, second.keys);
    let socket = std::fs::metadata(first.path("socket")).unwrap();
    assert!(socket.file_type().is_socket());
    assert_eq!(socket.permissions().mode() & 0o777, 0o600);

    let sent = path(1);
    upload(&second, &sent).await;
    let known = path(2);
    upload(&first, &known).await;
    for path in [&sent, &known] {
        assert!(second.narinfo("main", path).await.is_some());
    }
    // (token, cache) as in `a_private_cache_answers_as_attic_does` and its neighbour, at the same time.
    let probe = TestPath::new('z', b"x");
    assert_eq!(answers(&first, None, "main", &probe).await, [401; 4]);
    assert_eq!(
        answers(&second, None, "main", &probe).await,
        [200, 403, 404, 403]
    );
    assert_eq!(
        answers(&second, Some("team-token"), "team", &probe).await,
        [200, 200, 404, 200]
    );
    let config = second
        .client()
        .get(format!("{}/_api/v1/cache-config/main", second.url));
    let (_, config) = answer(config).await;
    assert_eq!(config["priority"], 7);
    assert_eq!(config["api_endpoint"], format!("{}/", second.url));

    let (ran, _) = second.stop();
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    assert!(first.path("socket").exists());
    let (ran, folder) = first.stop();
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    assert!(!folder.path().join("cache/socket").exists());
}

/// Two processes upload through the third one's server while it ends by `signal`; then one of them serves.
async fn the_owner_ends(signal: Signal) {
    let first = Served::start(&[]);
    let (second, third) = (first.beside(&[]), first.beside(&["--cache", "other"]));
    for n in 0..4 {
        upload(&first, &path(n)).await;
    }
    let uploads = async {
        for n in 4..16 {
            upload(&second, &path(n)).await;
        }
    };
    let more = async {
        for n in 16..28 {
            upload(&third, &path(n)).await;
        }
    };
    let end = async {
        // In the middle: the first path of each has arrived.
        while second.names("caches/main").len() < 8 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        first.signal(signal);
    };
    tokio::join!(uploads, more, end);
    for served in [&second, &third] {
        for n in 0..28 {
            assert!(served.narinfo("main", &path(n)).await.is_some(), "{n}");
        }
    }
    drop(second.stop());
    upload(&third, &path(28)).await;
    assert!(third.narinfo("main", &path(28)).await.is_some());
    assert_eq!(third.names("tmp"), [""; 0], "what was under way is swept");
}

#[tokio::test]
async fn the_others_go_on_when_the_first_is_killed() {
    the_owner_ends(Signal::KILL).await;
}

#[tokio::test]
async fn the_others_go_on_when_the_first_is_stopped() {
    the_owner_ends(Signal::TERM).await;
}

#[tokio::test]
async fn a_stale_socket_is_replaced() {
    let first = Served::start(&[]);
    upload(&first, &path(1)).await;
    first.signal(Signal::KILL);
    let (_, folder) = first.wait();
    assert!(folder.path().join("cache/socket").exists());
    let second = Served::in_folder(folder, &[]);
    assert!(second.narinfo("main", &path(1)).await.is_some());
    let third = second.beside(&[]);
    assert!(third.narinfo("main", &path(1)).await.is_some());
}

#[test]
fn a_folder_with_a_frozen_server_is_refused_soon() {
    let first = Served::start(&[]);
    first.signal(Signal::STOP);
    let begun = Instant::now();
    let folder = first.path("").display().to_string();
    let ran = Flywheel::new(&[
        "cache",
        "serve",
        "--dir",
        &folder,
        "--listen",
        "127.0.0.1:0",
    ])
    .run();
    assert!(begun.elapsed() < Duration::from_secs(6));
    first.signal(Signal::CONT);
    assert_eq!(ran.code, 69, "{}", ran.stderr);
    assert!(
        ran.stderr
            .contains("is in use by another process, which has not answered within 2 s"),
        "{}",
        ran.stderr
    );
}

#[tokio::test]
async fn a_server_that_freezes_costs_the_others_an_error_and_not_their_time() {
    let first = Served::start(&[]);
    let second = first.beside(&[]);
    upload(&second, &path(1)).await;
    first.signal(Signal::STOP);
    let begun = Instant::now();
    let get = || async {
        let url = format!("{}/main/{}.narinfo", second.url, path(1).hash());
        second.client().get(url).send().await
    };
    // The first on the connection that is open, the others on new ones.
    for _ in 0..3 {
        let got = get().await;
        assert!(
            got.as_ref().map_or(true, |answer| answer.status() == 503),
            "{got:?}"
        );
    }
    assert!(
        begun.elapsed() < Duration::from_secs(20),
        "{:?}",
        begun.elapsed()
    );
    let again = Instant::now();
    assert_eq!(get().await.unwrap().status(), 503);
    assert!(again.elapsed() < Duration::from_secs(3), "it is known now");
    first.signal(Signal::CONT);
    let begun = Instant::now();
    while get().await.is_ok_and(|answer| answer.status() != 200) {
        assert!(begun.elapsed() < Duration::from_secs(20));
    }
    upload(&second, &path(2)).await;
}

#[test]
fn a_folder_whose_lock_is_no_file_is_refused_at_once() {
    for name in ["lock", "socket"] {
        let run = served_once();
        std::fs::create_dir(run.path("c")).unwrap();
        let made = std::process::Command::new("mkfifo")
            .arg(run.path("c").join(name))
            .status();
        assert!(made.unwrap().success());
        let begun = Instant::now();
        let ran = run.run();
        assert!(begun.elapsed() < Duration::from_secs(3));
        // A pipe in the socket's place is replaced: since the lock is free, no process has it.
        let expected = if name == "lock" { 69 } else { 0 };
        assert_eq!(ran.code, expected, "{name}: {}", ran.stderr);
    }
}

#[tokio::test]
async fn a_folder_with_a_long_name_can_be_shared() {
    let long = tempfile::tempdir().unwrap();
    let folder = long.path().join("n".repeat(120)).join("m".repeat(60));
    std::fs::create_dir_all(&folder).unwrap();
    let inner = tempfile::tempdir_in(&folder).unwrap();
    let first = Served::in_folder(inner, &[]);
    let second = first.beside(&[]);
    upload(&second, &path(1)).await;
    let got = first.narinfo("main", &path(1)).await;
    assert!(got.is_some());
    let config = answer(
        second
            .client()
            .get(format!("{}/_api/v1/cache-config/main", second.url)),
    )
    .await;
    assert_ne!(config.1, Value::Null);
}
