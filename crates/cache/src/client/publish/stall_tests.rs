//! A publication that stands still ends, and one that is only slow does not.

use std::sync::atomic::Ordering;

use super::tests::{publish_within, quick, tools};
use super::*;
use crate::client::fake::{Fake, GOOD};

/// A hundredth of the real one.
const IDLE: Duration = Duration::from_millis(300);
/// Longer than any of these tests should take.
const LIMIT: Duration = Duration::from_secs(30);

fn stall(rate: u64) -> StallTimeout {
    StallTimeout { idle: IDLE, rate }
}

fn options(fake: &Fake, rate: u64) -> Options {
    Options {
        stall: stall(rate),
        ..quick(fake)
    }
}

#[tokio::test]
async fn a_server_that_answers_no_upload_ends_it_soon() {
    for count in [1, 60] {
        let fake = Fake::start().await;
        fake.server.faults().uploads_hang = true;
        let attic = fake.attic_with_timeout(GOOD, stall(u64::MAX));
        let outcome =
            publish_within(attic, options(&fake, u64::MAX), tools(&fake, count), LIMIT).await;
        assert!(outcome.stalled, "{:?}", outcome.stopped);
        assert!(outcome.elapsed < IDLE * 6, "{count}: {:?}", outcome.elapsed);
        assert_eq!(outcome.counts().published, 0);
        assert!(
            outcome.lost().all(|(_, reason)| reason.contains("stalled")),
            "{:?}",
            outcome.lost().next()
        );
        assert_eq!(outcome.lost().count(), count + 1);
    }
}

/// The uploads began while the job still worked, so that they are given up one after the other, and each next one moves
/// bytes.
#[tokio::test]
async fn new_tries_are_no_progress() {
    let fake = Fake::start().await;
    fake.server.faults().uploads_hang = true;
    let infos: Vec<PathInfo> = (0..40)
        .map(|n| fake.path(&format!("path-{n}"), b"", &[]))
        .collect();
    let attic = fake.attic_with_timeout(GOOD, stall(u64::MAX));
    let publisher = Publisher::start(
        &super::tests::permit(),
        attic,
        options(&fake, u64::MAX),
        Sink::silent(),
    );
    publisher.offer(infos).await;
    let began = Instant::now();
    while fake
        .server
        .uploads
        .load(std::sync::atomic::Ordering::Relaxed)
        < 6
    {
        assert!(began.elapsed() < LIMIT, "none was tried again");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let drain = Instant::now();
    let outcome = publisher
        .drain(drain + LIMIT, CancellationToken::new())
        .await;
    assert!(outcome.stalled);
    assert!(drain.elapsed() < IDLE * 4, "{:?}", drain.elapsed());
}

#[tokio::test]
async fn a_server_that_answers_nothing_ends_it_soon() {
    let fake = Fake::start().await;
    fake.server.faults().hang = true;
    let attic = fake.attic_with_timeout(GOOD, stall(u64::MAX));
    let outcome = publish_within(attic, options(&fake, u64::MAX), tools(&fake, 3), LIMIT).await;
    assert!(outcome.stalled && outcome.elapsed < IDLE * 4);
    assert_eq!(outcome.counts().left, 4);
}

/// The time that failed reads have cost shortens the publisher's wait for an answer.
#[tokio::test]
async fn a_server_that_has_cost_its_time_already_gets_less() {
    let fake = Fake::start().await;
    fake.server.faults().hang = true;
    let mut options = options(&fake, u64::MAX);
    options.stall.idle = LIMIT;
    let attic = fake.attic_with_timeout(GOOD, stall(u64::MAX));
    let permit = super::tests::permit();
    let publisher = Publisher::start(&permit, attic, options, Sink::silent());
    publisher.offer(tools(&fake, 3)).await;
    publisher.stall_after(IDLE).await;
    let drain = Instant::now();
    let outcome = publisher
        .drain(drain + LIMIT, CancellationToken::new())
        .await;
    assert!(
        outcome.stalled && drain.elapsed() < IDLE * 5,
        "{:?}",
        drain.elapsed()
    );
}

/// 3 MB at 1 MB/s get 3 s more than the 0.3 s of any response.
#[tokio::test]
async fn a_server_that_stores_before_it_answers_is_slow_and_not_stalled() {
    for info_hangs in [false, true] {
        let fake = Fake::start().await;
        fake.server.faults().delay = Duration::from_millis(1800);
        fake.server.faults().info_hangs = info_hangs;
        let infos = vec![fake.path("large", &vec![b'x'; 3_000_000], &[])];
        let attic = fake.attic_with_timeout(GOOD, stall(1_000_000));
        let outcome = publish_within(attic, options(&fake, 1_000_000), infos, LIMIT).await;
        assert_eq!(outcome.stalled, info_hangs, "{:?}", outcome.stopped);
        assert_eq!(outcome.counts().published, u64::from(!info_hangs));
        if info_hangs {
            assert!(outcome.elapsed < Duration::from_millis(1500));
        }
    }
}

/// Each of its answers asks for a pause.
#[tokio::test]
async fn a_server_that_only_asks_for_pauses_is_given_up() {
    let fake = Fake::start().await;
    fake.server.faults().busy = u32::MAX;
    let attic = fake.attic_with_timeout(GOOD, stall(u64::MAX));
    let outcome = publish_within(attic, options(&fake, u64::MAX), tools(&fake, 3), LIMIT).await;
    let stopped = outcome.stopped.as_deref().unwrap_or_default();
    assert!(stopped.contains("unavailable for too long"), "{stopped}");
    assert_eq!(outcome.counts().published, 0);
    assert!(
        fake.server.uploads.load(Ordering::Relaxed) < 4 * 8,
        "its tries are not used up"
    );
}

/// The server is busy all the time, with one small path after the other.
#[tokio::test]
async fn a_server_that_goes_on_answering_has_all_the_time() {
    let fake = Fake::start().await;
    fake.server.faults().delay = Duration::from_millis(150);
    let attic = fake.attic_with_timeout(GOOD, stall(u64::MAX));
    let options = Options {
        initial_uploads: 1,
        max_uploads: 1,
        ..options(&fake, u64::MAX)
    };
    let outcome = publish_within(attic, options, tools(&fake, 11), LIMIT).await;
    assert_eq!(outcome.counts().published, 12);
    assert!(outcome.elapsed > IDLE * 4);
}
