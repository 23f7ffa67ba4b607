//! The calls of Nix, and the results of its output. Real stores are tested in `tests/real`.

use std::fs;
use std::path::Path;

use tempfile::TempDir;

use super::*;
use flywheel_nix::hash::Sha256;
use flywheel_sys::runner::env::Env;
use flywheel_testing::script;

async fn store(url: &str, answers: &str) -> (TempDir, StoreCopy) {
    let folder = tempfile::tempdir().expect("folder");
    let text = format!(
        "[ \"$1\" = --version ] && {{ echo 'nix (Nix) 2.24.1'; exit; }}\necho \"$*\" >> {}/calls\n{answers}",
        folder.path().display()
    );
    let program = script(folder.path(), "nix", &text).await;
    let nix = Nix::detect(&program, &Env::default()).await.expect("a nix");
    (folder, StoreCopy::new(nix, url.parse().expect("a store")))
}

fn calls(folder: &TempDir) -> Vec<String> {
    let text = fs::read_to_string(folder.path().join("calls")).unwrap_or_default();
    text.lines().map(str::to_owned).collect()
}

fn path(n: u8) -> StorePath {
    format!(
        "/nix/store/{}-p",
        char::from(b'0' + n).to_string().repeat(32)
    )
    .parse()
    .expect("a path")
}

fn info(n: u8) -> PathInfo {
    PathInfo {
        path: path(n),
        nar_hash: Sha256([n; 32]),
        nar_size: 1000,
        references: Vec::new(),
        deriver: None,
        signatures: Vec::new(),
        ca: None,
        ultimate: true,
    }
}

async fn send_all(copy: &StoreCopy, infos: &[PathInfo]) -> Vec<Option<String>> {
    let (file, counter) = (Path::new("/nonexistent"), ByteCounter::default());
    let sent = futures_util::future::join_all(
        infos
            .iter()
            .map(|info| copy.send(info, file.into(), &counter)),
    )
    .await;
    sent.into_iter()
        .map(|sent| sent.err().map(|error| error.to_string()))
        .collect()
}

#[test]
fn stores_are_urls_that_nix_writes_to() {
    for good in [
        "s3://b?region=x&scheme=http",
        "file:///srv/nix",
        "ssh-ng://u@host",
        "http://h:1/main",
        "https://h/c",
    ] {
        assert_eq!(
            good.parse::<StoreUrl>().map(|url| url.as_str().to_owned()),
            Ok(good.to_owned())
        );
    }
    assert_eq!(
        "s3://b?secret-key=/k"
            .parse::<StoreUrl>()
            .expect("good")
            .to_string(),
        "s3://b"
    );
    for bad in [
        "",
        "main",
        "/srv/nix",
        "--help",
        "s3://",
        "file://",
        "s3://a b",
        "s3://a\nb",
    ] {
        assert!(bad.parse::<StoreUrl>().is_err(), "{bad}");
    }
    assert!(matches!(
        "daemon://".parse::<StoreUrl>(),
        Err(StoreUrlError::Scheme(_))
    ));
    assert_eq!(
        "http://u:p@h/".parse::<StoreUrl>(),
        Err(StoreUrlError::Password)
    );
}

#[tokio::test]
async fn paths_of_one_moment_are_one_call() {
    let (folder, copy) = store("ssh-ng://builder", "exit 0").await;
    assert_eq!(
        send_all(&copy, &[info(1), info(2), info(3)]).await,
        [None, None, None]
    );
    let wanted = format!(
        "copy --to ssh-ng://builder --no-recursive --no-check-sigs {} {} {}",
        path(1),
        path(2),
        path(3)
    );
    assert_eq!(calls(&folder), [wanted]);
}

#[tokio::test]
async fn one_bad_path_does_not_take_the_others_along() {
    let bad = path(2);
    let answers =
        format!("case \"$*\" in copy*{bad}*) echo \"error: cannot read {bad}\" >&2; exit 1;; esac");
    let (folder, copy) = store("s3://bucket", &answers).await;
    let sent = send_all(&copy, &[info(1), info(2), info(3)]).await;
    assert!(sent[0].is_none() && sent[2].is_none(), "{sent:?}");
    assert_eq!(
        sent[1].as_deref(),
        Some(format!("`nix copy` failed: cannot read {bad}").as_str())
    );
    assert_eq!(
        calls(&folder).len(),
        5,
        "together, a look at the store, and each alone: {:?}",
        calls(&folder)
    );
}

#[tokio::test]
async fn an_unavailable_store_is_not_queried_path_by_path() {
    let (folder, copy) = store("s3://bucket", "echo 'error: no route to host' >&2; exit 1").await;
    let sent = send_all(&copy, &[info(1), info(2), info(3)]).await;
    assert!(
        sent.iter()
            .all(|error| error.as_deref() == Some("`nix copy` failed: no route to host")),
        "{sent:?}"
    );
    assert_eq!(calls(&folder).len(), 2, "{:?}", calls(&folder));
}

#[tokio::test]
async fn what_the_store_lacks_is_missing_in_every_dialect_of_nix() {
    let [one, two] = [path(1), path(2)];
    let known = format!(
        r#"{{"path":"{one}","narHash":"sha256-AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=","narSize":9,"references":[]}}"#
    );
    let listing = format!(
        "case \"$*\" in path-info*) printf '%s' '[{known},{{\"path\":\"{two}\",\"valid\":false}}]';; esac"
    );
    let failing = format!(
        "case \"$*\" in path-info*{two}*) echo \"error: path '{two}' is not valid\" >&2; exit 1;; path-info*) printf '%s' '[{known}]';; esac"
    );
    for answers in [listing, failing] {
        let (_folder, copy) = store("file:///srv/nix", &answers).await;
        let missing = copy
            .missing(&[one.clone(), two.clone()])
            .await
            .expect("an answer");
        assert_eq!(missing, HashSet::from([two.clone()]));
        let found = copy.look_up(&one).await.expect("an answer").expect("there");
        assert_eq!((found.nar_size, found.nar_hash), (9, Sha256([1; 32])));
        assert_eq!(copy.look_up(&two).await.expect("an answer"), None);
    }
    let (_folder, away) = store("file:///srv/nix", "echo 'error: unreachable' >&2; exit 1").await;
    assert!(
        away.missing(&[one]).await.is_err(),
        "an error is no absence"
    );
    assert!(away.missing(&[]).await.is_err());
}

#[tokio::test]
async fn a_body_is_fetched_and_judged_by_nix() {
    for (answers, good) in [
        ("exit 0", true),
        (
            "echo \"error: path was modified! expected hash x\" >&2; exit 1",
            false,
        ),
    ] {
        let (folder, copy) = store("file:///srv/nix", answers).await;
        let body = copy
            .check_body(&nar_info(info(1)), &ByteCounter::default())
            .await
            .expect("judged");
        assert_eq!(body == BodyCheck::Good, good, "{body:?}");
        assert_eq!(
            calls(&folder),
            [format!(
                "store verify --no-trust --store file:///srv/nix {}",
                path(1)
            )]
        );
    }
}

#[test]
fn a_store_that_nix_trusts_says_so_in_its_url() {
    let is_trusted = |url: &str| url.parse::<StoreUrl>().expect("a store").is_trusted();
    assert!(is_trusted("https://h/nix?priority=1&trusted=true"));
    assert!(!is_trusted("https://h/nix") && !is_trusted("https://h/nix?trusted=false"));
}
