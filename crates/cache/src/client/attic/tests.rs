//! The client against the fake server: headers and preambles, refusals, broken connections.

use std::sync::atomic::Ordering;

use super::*;
use crate::client::fake::{Fake, GOOD, PULL_ONLY};
use flywheel_sys::http::Layer;

#[tokio::test]
async fn what_is_sent_is_what_the_store_knows() {
    let fake = Fake::start().await;
    let attic = fake.attic(GOOD);
    let library = fake.path("library", b"library", &[]);
    let mut tool = fake.path("tool", b"tool", &[]);
    // Unsorted, with a duplicate, and with a reference to itself.
    tool.references = vec![tool.path.clone(), library.path.clone(), tool.path.clone()];
    tool.deriver =
        Some(StorePath::from_base_name("fvchbymk0m4jvldpb9m5hy0bjy2lf30k-tool.drv").expect("name"));
    tool.signatures = vec!["a-1:xyz".to_owned()];
    let counter = ByteCounter::default();
    assert_eq!(
        attic
            .upload(&tool, &fake.file(&tool), &counter)
            .await
            .expect("taken"),
        Uploaded::Stored
    );
    assert_eq!(
        (counter.sent(), counter.total()),
        (tool.nar_size, tool.nar_size)
    );
    let stored = fake.server.stored.lock().expect("lock");
    let stored = &stored[tool.path.hash().as_str()];
    let mut names = vec![tool.path.base_name(), library.path.base_name()];
    names.sort_unstable();
    assert_eq!(stored.info["references"], serde_json::json!(names));
    assert_eq!(
        stored.info["deriver"],
        "fvchbymk0m4jvldpb9m5hy0bjy2lf30k-tool.drv"
    );
    assert_eq!(stored.info["sigs"], serde_json::json!(["a-1:xyz"]));
    assert_eq!(stored.info["ca"], serde_json::Value::Null);
    assert!(stored.by_header);
}

#[tokio::test]
async fn a_long_description_travels_before_the_nar() {
    let fake = Fake::start().await;
    let others: Vec<_> = (0..100)
        .map(|n| fake.path(&format!("library-{n}"), b"", &[]))
        .collect();
    let tool = fake.path(
        "tool",
        &vec![b'x'; 1_000_000],
        &others.iter().collect::<Vec<_>>(),
    );
    fake.attic(GOOD)
        .upload(&tool, &fake.file(&tool), &ByteCounter::default())
        .await
        .expect("taken");
    let stored = fake.server.stored.lock().expect("lock");
    assert!(!stored[tool.path.hash().as_str()].by_header);
}

#[tokio::test]
async fn a_connection_is_reused_and_a_query_gets_its_result() {
    let fake = Fake::start().await;
    let attic = fake.attic(GOOD);
    let (there, not) = (fake.path("there", b"", &[]), fake.path("not", b"", &[]));
    attic
        .upload(&there, &fake.file(&there), &ByteCounter::default())
        .await
        .expect("taken");
    let missing = attic
        .missing_paths(&[there.path.hash(), not.path.hash()])
        .await
        .expect("answered");
    assert_eq!(missing, HashSet::from([not.path.hash()]));
    assert!(attic.missing_paths(&[]).await.expect("answered").is_empty());
    let config = attic.cache_config().await.expect("answered");
    assert_eq!(config.public_key, Some(fake.server.key.public()));
    assert_eq!(
        config.foreign_hosts(attic.endpoint()),
        ["attic.elsewhere.example"]
    );
}

#[tokio::test]
async fn a_refusal_before_the_body_is_read_is_noticed() {
    let fake = Fake::start().await;
    fake.server.faults().uploads_refused = true;
    let attic = fake.attic(GOOD);
    let large = fake.path("large", &vec![b'x'; 30_000_000], &[]);
    for _ in 0..10 {
        let error = attic
            .upload(&large, &fake.file(&large), &ByteCounter::default())
            .await
            .expect_err("refused");
        assert!(
            matches!(error, Error::Refused { status: 401, .. }),
            "{error}"
        );
    }
}

#[tokio::test]
async fn a_token_without_the_right_is_refused_with_its_reason() {
    let fake = Fake::start().await;
    let error = fake
        .attic(PULL_ONLY)
        .missing_paths(&[])
        .await
        .expect_err("no right");
    assert_eq!(
        error.to_string(),
        "the server answered 403: AccessError: not allowed"
    );
    let error = fake
        .attic("bad\ntoken")
        .missing_paths(&[])
        .await
        .expect_err("no token");
    assert!(matches!(error, Error::Token), "{error}");
}

#[tokio::test]
async fn a_changed_path_is_caught_here_and_never_stored() {
    let fake = Fake::start().await;
    let path = fake.path("changed", &vec![b'x'; 500_000], &[]);
    std::fs::write(fake.file(&path), vec![b'y'; 500_000]).expect("written");
    let error = fake
        .attic(GOOD)
        .upload(&path, &fake.file(&path), &ByteCounter::default())
        .await
        .expect_err("corrupt");
    assert!(
        matches!(
            error,
            Error::Local(flywheel_nix::nar::DumpError::Corrupt { .. })
        ),
        "{error}"
    );
    assert!(!fake.server.has(&path));
    let mut unknown = path;
    unknown.nar_size = 0;
    let error = fake
        .attic(GOOD)
        .upload(&unknown, &fake.file(&unknown), &ByteCounter::default())
        .await
        .expect_err("empty");
    assert!(matches!(error, Error::Facts(_)), "{error}");
}

#[tokio::test]
async fn a_cut_response_is_ambiguous() {
    let fake = Fake::start().await;
    fake.server.faults().cut_after_storing = 1;
    let path = fake.path("cut", b"x", &[]);
    let error = fake
        .attic(GOOD)
        .upload(&path, &fake.file(&path), &ByteCounter::default())
        .await
        .expect_err("cut");
    assert!(
        matches!(
            error,
            Error::Unreachable {
                layer: Layer::Http,
                ..
            }
        ),
        "{error}"
    );
    assert!(fake.server.has(&path));
}

#[tokio::test]
async fn a_server_that_stands_still_is_given_up() {
    let fake = Fake::start().await;
    fake.server.faults().uploads_hang = true;
    let path = fake.path("hang", &vec![b'x'; 50_000_000], &[]);
    let stall_timeout = StallTimeout {
        idle: Duration::from_millis(200),
        rate: u64::MAX,
    };
    let attic = fake.attic_with_timeout(GOOD, stall_timeout);
    let error = attic
        .upload(&path, &fake.file(&path), &ByteCounter::default())
        .await
        .expect_err("silence");
    assert!(
        matches!(
            error,
            Error::Unreachable {
                layer: Layer::Http,
                ..
            }
        ),
        "{error}"
    );
    assert_eq!(fake.server.uploads.load(Ordering::Relaxed), 1);
}
