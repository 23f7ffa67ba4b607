//! Publishing to the fake server, with each of its faults.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use super::*;
use crate::client::attic::{Attic, StallTimeout};
use crate::client::fake::{Fake, GOOD, PULL_ONLY, PUSH_ONLY};
use flywheel_core::progress::Progress;
use flywheel_core::trust::{Facts, Request, decide};
use flywheel_nix::key::SecretKey;
use flywheel_nix::path_info::fingerprint;

/// The permit of a person who publishes by hand: the gate makes no other without a job's facts.
pub(super) fn permit() -> PublishPermit {
    let by_hand = Request {
        by_hand: true,
        ..Request::default()
    };
    let decision = decide(&Facts::Local, &by_hand, true);
    decision.permit().expect("the gate allows it by hand")
}

pub(super) fn quick(fake: &Fake) -> Options {
    Options {
        store: fake.store.path().to_owned(),
        policy: Policy {
            attempts: 8,
            base: Duration::from_millis(10),
            cap: Duration::from_secs(2),
        },
        debounce: Duration::from_millis(5),
        max_check_interval: Duration::from_millis(100),
        give_up_after: Duration::from_secs(1),
        ..Options::default()
    }
}

fn with_short_timeouts(fake: &Fake, token: &str) -> Attic {
    fake.attic_with_timeout(
        token,
        StallTimeout {
            idle: Duration::from_millis(300),
            rate: u64::MAX,
        },
    )
}

/// Offers all and drains, within `limit`.
pub(super) async fn publish_within(
    attic: Attic,
    options: Options,
    infos: Vec<PathInfo>,
    limit: Duration,
) -> Outcome {
    let publisher = Publisher::start(&permit(), attic, options, Sink::silent());
    publisher.offer(infos).await;
    let began = Instant::now();
    let outcome = publisher
        .drain(began + limit, CancellationToken::new())
        .await;
    assert!(
        began.elapsed() < limit + Duration::from_secs(1),
        "the drain took {:?}",
        began.elapsed()
    );
    outcome
}

pub(super) async fn publish(fake: &Fake, infos: Vec<PathInfo>) -> Outcome {
    publish_within(
        with_short_timeouts(fake, GOOD),
        quick(fake),
        infos,
        Duration::from_secs(30),
    )
    .await
}

/// A library, and so many tools that refer to it, each offered before it.
pub(super) fn tools(fake: &Fake, count: usize) -> Vec<PathInfo> {
    let library = fake.path("library", b"library", &[]);
    let mut infos: Vec<PathInfo> = (0..count)
        .map(|n| {
            fake.path(
                &format!("tool-{n}"),
                format!("tool {n}").as_bytes(),
                &[&library],
            )
        })
        .collect();
    infos.push(library);
    infos
}

pub(super) fn end<'a>(outcome: &'a Outcome, info: &PathInfo) -> &'a Final {
    &outcome
        .paths
        .iter()
        .find(|path| path.info.path == info.path)
        .expect("offered")
        .end
}

#[track_caller]
fn check(fake: &Fake, outcome: &Outcome, expected: Counts) {
    assert_eq!(
        outcome.counts(),
        expected,
        "{:#?}",
        outcome.lost().take(3).collect::<Vec<_>>()
    );
    assert_eq!(fake.server.dangling(), [""; 0]);
    assert!(fake.server.was_in_order());
}

fn published(published: u64) -> Counts {
    Counts {
        published,
        ..Counts::default()
    }
}

#[tokio::test]
async fn all_is_published_in_order_and_found_there_again() {
    let fake = Fake::start().await;
    let infos = tools(&fake, 40);
    let outcome = publish(&fake, infos.clone()).await;
    check(&fake, &outcome, published(41));
    assert_eq!(
        outcome.bytes,
        infos.iter().map(|info| info.nar_size).sum::<u64>()
    );
    assert_eq!(
        fake.server.queries.load(Ordering::Relaxed),
        2,
        "the preflight and one batch"
    );
    let again = publish(&fake, infos).await;
    check(
        &fake,
        &again,
        Counts {
            already_there: 41,
            ..Counts::default()
        },
    );
    assert_eq!(
        (again.bytes, fake.server.uploads.load(Ordering::Relaxed)),
        (0, 41)
    );
}

#[tokio::test]
async fn paths_leave_while_the_build_still_runs() {
    let fake = Fake::start().await;
    let publisher = Publisher::start(
        &permit(),
        with_short_timeouts(&fake, GOOD),
        quick(&fake),
        Sink::silent(),
    );
    let first = fake.path("first", b"1", &[]);
    publisher.offer(vec![first.clone()]).await;
    let deadline = Instant::now() + Duration::from_secs(10);
    while !fake.server.has(&first) {
        assert!(Instant::now() < deadline, "it left before the drain");
        tokio::task::yield_now().await;
    }
    publisher
        .offer(vec![fake.path("second", b"2", &[&first])])
        .await;
    let outcome = publisher.drain(deadline, CancellationToken::new()).await;
    check(&fake, &outcome, published(2));
}

#[tokio::test]
async fn what_upstream_has_signed_and_derivations_stay_here() {
    let fake = Fake::start().await;
    let mut glibc = fake.path("glibc", b"", &[]);
    let mut announced = fake.path("announced", b"", &[]);
    let keys =
        ["cache.nixos.org-1", "upstream-1"].map(|name| SecretKey::generate(name).expect("random"));
    for (path, key) in [&mut glibc, &mut announced].into_iter().zip(&keys) {
        let text = fingerprint(&path.path, &path.nar_hash, path.nar_size, &path.references);
        path.signatures = vec![key.sign(&text)];
    }
    fake.server
        .upstream
        .lock()
        .expect("lock")
        .extend([glibc.path.base_name().to_owned()]);
    let app = fake.path("app", b"", &[&glibc]);
    let options = Options {
        upstream: Upstream::default().with_keys(keys.iter().map(SecretKey::public)),
        ..quick(&fake)
    };
    let infos = vec![
        app.clone(),
        glibc.clone(),
        announced,
        fake.path("x.drv", b"", &[]),
    ];
    let attic = with_short_timeouts(&fake, GOOD);
    let outcome = publish_within(attic, options, infos, Duration::from_secs(30)).await;
    check(
        &fake,
        &outcome,
        Counts {
            published: 1,
            skipped: 3,
            ..Counts::default()
        },
    );
    assert_eq!(end(&outcome, &app), &Final::Published);
}

#[tokio::test]
async fn a_server_that_fails_every_third_time_loses_nothing() {
    let fake = Fake::start().await;
    fake.server.faults().every_third_fails = true;
    let outcome = publish(&fake, tools(&fake, 30)).await;
    check(&fake, &outcome, published(31));
    assert!(outcome.retries > 0);
}

#[tokio::test]
async fn a_busy_server_gets_the_pause_that_it_requests() {
    let fake = Fake::start().await;
    fake.server.faults().busy = 1;
    let began = Instant::now();
    let outcome = publish(&fake, tools(&fake, 3)).await;
    check(&fake, &outcome, published(4));
    assert!(
        began.elapsed() >= Duration::from_secs(1),
        "{:?}",
        began.elapsed()
    );
    assert_eq!(fake.server.uploads.load(Ordering::Relaxed), 5);
}

#[tokio::test]
async fn after_a_lost_response_the_cache_is_queried_before_sending_again() {
    let fake = Fake::start().await;
    fake.server.faults().cut_after_storing = 1;
    let path = fake.path("cut", b"cut", &[]);
    let outcome = publish(&fake, vec![path]).await;
    check(&fake, &outcome, published(1));
    assert_eq!(fake.server.uploads.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn a_cut_nar_is_read_afresh_once() {
    let fake = Fake::start().await;
    fake.server.faults().bad_nar = 1;
    check(
        &fake,
        &publish(&fake, vec![fake.path("once", b"", &[])]).await,
        published(1),
    );
    fake.server.faults().bad_nar = 2;
    let outcome = publish(&fake, vec![fake.path("twice", b"", &[])]).await;
    check(
        &fake,
        &outcome,
        Counts {
            failed: 1,
            ..Counts::default()
        },
    );
}

#[tokio::test]
async fn a_path_too_large_for_a_proxy_fails_with_what_refers_to_it_alone() {
    let fake = Fake::start().await;
    fake.server.faults().proxy_limit = Some(100_000);
    let large = fake.path("large", &vec![b'x'; 1_000_000], &[]);
    let needs = fake.path("needs", b"", &[&large]);
    let other = fake.path("other", b"", &[]);
    let outcome = publish(&fake, vec![needs.clone(), large.clone(), other]).await;
    check(
        &fake,
        &outcome,
        Counts {
            published: 1,
            failed: 2,
            ..Counts::default()
        },
    );
    let reason = end(&outcome, &large).lost().expect("lost");
    assert!(
        reason.starts_with("a proxy before the server refuses 1000"),
        "{reason}"
    );
    assert!(
        end(&outcome, &needs)
            .lost()
            .is_some_and(|reason| reason.contains("-large`, which could not be"))
    );
}

#[tokio::test]
async fn queries_shrink_to_what_the_server_accepts() {
    let fake = Fake::start().await;
    fake.server.faults().query_limit = Some(20);
    let outcome = publish(&fake, tools(&fake, 99)).await;
    check(&fake, &outcome, published(100));
}

#[tokio::test]
async fn a_push_only_token_pushes() {
    let fake = Fake::start().await;
    let outcome = publish_within(
        with_short_timeouts(&fake, PUSH_ONLY),
        quick(&fake),
        tools(&fake, 3),
        Duration::from_secs(10),
    )
    .await;
    check(&fake, &outcome, published(4));
}

#[tokio::test]
async fn a_refused_token_stops_publishing_with_one_message() {
    let fake = Fake::start().await;
    let said: Arc<Mutex<Vec<String>>> = Arc::default();
    let sink = {
        let said = Arc::clone(&said);
        Sink::new(move |event| {
            if let Progress::Degraded { text, .. } = event {
                said.lock().expect("lock").push(text);
            }
        })
    };
    let publisher = Publisher::start(
        &permit(),
        with_short_timeouts(&fake, PULL_ONLY),
        quick(&fake),
        sink,
    );
    publisher.offer(tools(&fake, 3)).await;
    let began = Instant::now();
    let outcome = publisher
        .drain(began + Duration::from_secs(60), CancellationToken::new())
        .await;
    assert!(began.elapsed() < Duration::from_secs(5));
    check(
        &fake,
        &outcome,
        Counts {
            left: 4,
            ..Counts::default()
        },
    );
    let said = said.lock().expect("lock");
    assert_eq!(said.len(), 1, "{said:?}");
    assert!(
        said[0].contains("403") && said[0].contains("lacks the right `push`"),
        "{said:?}"
    );
    assert_eq!(outcome.stopped.as_ref(), Some(&said[0]));
    assert_eq!(fake.server.uploads.load(Ordering::Relaxed), 0);
}

#[tokio::test]
async fn uploads_that_are_refused_while_queries_are_not_end_soon() {
    let fake = Fake::start().await;
    fake.server.faults().uploads_refused = true;
    let outcome = publish(&fake, tools(&fake, 50)).await;
    assert!(
        outcome
            .stopped
            .as_ref()
            .is_some_and(|text| text.contains("401")),
        "{:?}",
        outcome.stopped
    );
    assert_eq!(outcome.counts().left, 51);
    assert!(fake.server.uploads.load(Ordering::Relaxed) < 20);
}

#[tokio::test]
async fn a_server_that_restarts_costs_time_and_no_path() {
    let mut fake = Fake::start().await;
    fake.server.faults().delay = Duration::from_millis(20);
    let infos = tools(&fake, 60);
    let options = Options {
        give_up_after: Duration::from_secs(20),
        ..quick(&fake)
    };
    let noticed = CancellationToken::new();
    let notice = noticed.clone();
    let sink = Sink::new(move |event| {
        if matches!(event, Progress::Note(text) if text.contains("the cache is unavailable")) {
            notice.cancel();
        }
    });
    let publisher = Publisher::start(&permit(), with_short_timeouts(&fake, GOOD), options, sink);
    publisher.offer(infos).await;
    let deadline = Instant::now() + Duration::from_secs(20);
    while fake.server.order.lock().expect("lock").len() < 10 {
        assert!(Instant::now() < deadline);
        tokio::task::yield_now().await;
    }
    fake.stop().await;
    let drained = tokio::spawn(publisher.drain(deadline, CancellationToken::new()));
    noticed.cancelled().await;
    fake.listen().await;
    let outcome = drained.await.expect("ends");
    check(&fake, &outcome, published(61));
}

#[tokio::test]
async fn a_dead_server_is_given_up_in_the_drain() {
    let mut fake = Fake::start().await;
    fake.stop().await;
    let outcome = publish(&fake, tools(&fake, 3)).await;
    check(
        &fake,
        &outcome,
        Counts {
            left: 4,
            ..Counts::default()
        },
    );
    assert!(
        outcome
            .stopped
            .as_ref()
            .is_some_and(|text| text.contains("unavailable for too long")),
        "{:?}",
        outcome.stopped
    );
    assert!(outcome.elapsed < Duration::from_secs(5));
}

#[tokio::test]
async fn a_silent_server_takes_no_longer_than_the_deadline() {
    let fake = Fake::start().await;
    fake.server.faults().uploads_hang = true;
    let outcome = publish_within(
        fake.attic(GOOD),
        quick(&fake),
        tools(&fake, 3),
        Duration::from_millis(500),
    )
    .await;
    check(
        &fake,
        &outcome,
        Counts {
            left: 4,
            ..Counts::default()
        },
    );
    assert_eq!(
        outcome.lost().next().expect("left").1,
        "the time for publishing was over"
    );
}

/// `watch-store status` shows all known paths even when nothing moves any more.
#[tokio::test]
async fn all_known_paths_are_reported_while_the_server_is_silent() {
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0")
        .await
        .expect("a port");
    for probed in [true, false] {
        let mut fake = Fake::start().await;
        fake.server.faults().uploads_hang = true;
        if !probed {
            fake.stop().await;
            fake.address = silent.local_addr().expect("bound");
        }
        let known = Arc::new(Mutex::new(0));
        let total_seen = Arc::clone(&known);
        let sink = Sink::new(move |event| {
            if let Progress::Moved { total, .. } = event {
                *total_seen.lock().expect("not poisoned") = total;
            }
        });
        let publisher = Publisher::start(&permit(), fake.attic(GOOD), quick(&fake), sink);
        for info in tools(&fake, 3) {
            publisher.offer(vec![info]).await;
        }
        let began = Instant::now();
        while *known.lock().expect("not poisoned") != 4 {
            assert!(
                began.elapsed() < Duration::from_secs(10),
                "probed: {probed}, {known:?}"
            );
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

#[tokio::test]
async fn a_cancelled_drain_ends_at_once_and_names_everything() {
    let fake = Fake::start().await;
    fake.server.faults().uploads_hang = true;
    let publisher = Publisher::start(&permit(), fake.attic(GOOD), quick(&fake), Sink::silent());
    publisher.offer(tools(&fake, 3)).await;
    let cancel = CancellationToken::new();
    let began = Instant::now();
    let drained = tokio::spawn(publisher.drain(began + Duration::from_secs(60), cancel.clone()));
    while fake.server.uploads.load(Ordering::Relaxed) == 0 {
        assert!(began.elapsed() < Duration::from_secs(10));
        tokio::task::yield_now().await;
    }
    cancel.cancel();
    let outcome = drained.await.expect("ends");
    assert!(began.elapsed() < Duration::from_secs(10));
    assert_eq!(outcome.counts().left, 4);
}

#[tokio::test]
async fn collected_paths_are_skipped_and_corrupt_ones_named() {
    let fake = Fake::start().await;
    let (gone, corrupt) = (fake.path("gone", b"", &[]), fake.path("corrupt", b"1", &[]));
    let with_it = fake.path("with-it", b"", &[&gone]);
    for info in [&gone, &with_it] {
        std::fs::remove_file(fake.file(info)).expect("removed");
    }
    std::fs::write(fake.file(&corrupt), b"2").expect("written");
    let outcome = publish(&fake, vec![gone.clone(), with_it, corrupt.clone()]).await;
    check(
        &fake,
        &outcome,
        Counts {
            skipped: 2,
            failed: 1,
            ..Counts::default()
        },
    );
    assert_eq!(end(&outcome, &gone), &Final::Skipped(Skip::Vanished));
    assert!(
        end(&outcome, &corrupt)
            .lost()
            .is_some_and(|reason| reason.contains("is corrupt"))
    );
}

#[tokio::test]
async fn few_uploads_run_at_once_and_large_ones_leave_room() {
    let fake = Fake::start().await;
    fake.server.faults().delay = Duration::from_millis(30);
    let content = vec![b'x'; 17 * 1024 * 1024];
    let mut infos: Vec<PathInfo> = (0..4)
        .map(|n| fake.path(&format!("large-{n}"), &content, &[]))
        .collect();
    infos.extend(tools(&fake, 30));
    let options = Options {
        max_uploads: 4,
        ..quick(&fake)
    };
    let outcome = publish_within(fake.attic(GOOD), options, infos, Duration::from_secs(60)).await;
    check(&fake, &outcome, published(35));
    assert!(fake.server.max_uploading.load(Ordering::SeqCst) <= 4);
    let order = fake.server.order.lock().expect("lock");
    let last_small = order
        .iter()
        .rposition(|name| name.contains("-tool-"))
        .expect("stored");
    let last_large = order
        .iter()
        .rposition(|name| name.contains("-large-"))
        .expect("stored");
    assert!(
        last_small < last_large,
        "small ones do not wait for large ones: {order:?}"
    );
}
