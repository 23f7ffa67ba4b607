//! Paths that the cache had already: one query for all, a few bodies, and what is damaged is sent anew.

use std::collections::BTreeSet;
use std::sync::atomic::Ordering;

use super::tests::{end, publish_within, quick, tools};
use super::*;
use crate::client::destination::{BodyCheck, ByteCounter};
use crate::client::fake::{Fake, GOOD};
use crate::client::verify::{self, Key, Mode, Seed, Verdict, verify};

fn with_recheck(fake: &Fake, mode: Mode, seed: u64) -> Options {
    Options {
        recheck: Some(Recheck {
            key: Some(fake.server.key.public()),
            mode,
            seed: Seed(seed),
            policy: Policy {
                attempts: 2,
                base: Duration::from_millis(5),
                cap: Duration::from_millis(20),
            },
        }),
        ..quick(fake)
    }
}

async fn again(fake: &Fake, infos: &[PathInfo], options: Options) -> Outcome {
    publish_within(
        fake.attic(GOOD),
        options,
        infos.to_vec(),
        Duration::from_secs(30),
    )
    .await
}

/// Publishes these paths, and forgets how many requests that took.
async fn stored(fake: &Fake, infos: &[PathInfo]) {
    let outcome = again(fake, infos, quick(fake)).await;
    assert_eq!(outcome.counts().published, infos.len() as u64);
    for count in [
        &fake.server.queries,
        &fake.server.uploads,
        &fake.server.requests,
    ] {
        count.store(0, Ordering::Relaxed);
    }
}

fn names<'a>(infos: impl Iterator<Item = &'a PathInfo>) -> BTreeSet<String> {
    infos.map(|info| info.path.to_string()).collect()
}

/// A path of this size that cannot be compressed.
fn noise(fake: &Fake, name: &str, size: usize) -> PathInfo {
    let mut content = vec![0; size];
    fastrand::Rng::with_seed(size as u64).fill(&mut content);
    fake.path(name, &content, &[])
}

#[tokio::test]
async fn a_cache_that_has_everything_costs_one_query_and_a_few_bodies() {
    let fake = Fake::start().await;
    let infos = tools(&fake, 299);
    stored(&fake, &infos).await;
    let outcome = again(&fake, &infos, with_recheck(&fake, Mode::Sample, 1)).await;
    assert_eq!(outcome.counts().already_there, 300);
    assert_eq!(
        fake.server.queries.load(Ordering::Relaxed),
        2,
        "one is the preflight's"
    );
    // The two queries, the configuration, and for each of four paths its narinfo and its body.
    assert_eq!(fake.server.requests.load(Ordering::Relaxed), 3 + 2 * 4);
    let checked = outcome.paths.iter().filter_map(|path| path.checked.clone());
    assert_eq!(
        checked.collect::<Vec<_>>(),
        vec![Verdict::Good { body: true }; 4]
    );
    assert_eq!(outcome.key, Key::Given(fake.server.key.public()));
}

#[tokio::test]
async fn each_kind_of_damage_is_repaired_and_named() {
    let fake = Fake::start().await;
    let [truncated, changed, hidden, broken_off] =
        ["truncated", "changed", "hidden", "broken-off"].map(|name| noise(&fake, name, 9_000_000));
    let infos = [truncated, changed, hidden, broken_off];
    stored(&fake, &infos).await;
    fake.server.damage(&infos[0], |nar| nar.truncate(4_000_000));
    fake.server.damage(&infos[1], |nar| nar[5_000_000] ^= 0x40);
    let hash = |n: usize| infos[n].path.hash().as_str().to_owned();
    fake.server.faults().hidden.insert(hash(2));
    fake.server.faults().broken_off.insert(hash(3));
    let outcome = again(&fake, &infos, with_recheck(&fake, Mode::Sample, 1)).await;
    let expected = Counts {
        repaired: 4,
        ..Counts::default()
    };
    assert_eq!(outcome.counts(), expected, "{:?}", outcome.lost().next());
    for (info, words) in
        infos
            .iter()
            .zip(["instead of", "hash is", "does not serve it", "breaks off"])
    {
        let Final::Repaired { reason } = end(&outcome, info) else {
            panic!("{:?}", end(&outcome, info));
        };
        assert!(reason.contains(words), "{reason}");
    }
    // Checked again: now all is well, without another upload.
    let outcome = again(&fake, &infos, with_recheck(&fake, Mode::Full, 2)).await;
    assert_eq!(outcome.counts().already_there, 4);
    assert_eq!(fake.server.uploads.load(Ordering::Relaxed), 4);
}

#[tokio::test]
async fn full_repairs_exactly_the_damaged_paths() {
    let fake = Fake::start().await;
    let infos = tools(&fake, 99);
    stored(&fake, &infos).await;
    let damaged: Vec<PathInfo> = [3, 20, 41, 77, 99].map(|n: usize| infos[n].clone()).into();
    for info in &damaged {
        fake.server.damage(info, |nar| nar.truncate(90));
    }
    let outcome = again(&fake, &infos, with_recheck(&fake, Mode::Full, 1)).await;
    let repaired = outcome.repaired().map(|(info, _)| info);
    assert_eq!(names(repaired), names(damaged.iter()));
    let counts = outcome.counts();
    assert_eq!((counts.already_there, counts.repaired), (95, 5));
    let off = again(&fake, &infos, with_recheck(&fake, Mode::Off, 1)).await;
    assert!(off.paths.iter().all(|path| path.checked.is_none()));
}

/// A path that others refer to is queried with them, and may be offered only later.
#[tokio::test]
async fn a_path_that_is_offered_after_its_query_is_checked_too() {
    let fake = Fake::start().await;
    let library = fake.path("library", b"library", &[]);
    let tool = fake.path("tool", b"tool", &[&library]);
    stored(&fake, &[library.clone(), tool.clone()]).await;
    fake.server.damage(&library, |nar| nar.truncate(90));
    let options = with_recheck(&fake, Mode::Full, 1);
    let publisher = Publisher::start(
        &super::tests::permit(),
        fake.attic(GOOD),
        options,
        Sink::silent(),
    );
    publisher.offer(vec![tool]).await;
    let deadline = Instant::now() + Duration::from_secs(20);
    // The preflight, and the query for both.
    while fake.server.queries.load(Ordering::Relaxed) < 2 {
        assert!(Instant::now() < deadline, "never queried");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    publisher.offer(vec![library]).await;
    let outcome = publisher.drain(deadline, CancellationToken::new()).await;
    let counts = outcome.counts();
    assert_eq!(
        (counts.already_there, counts.repaired),
        (1, 1),
        "{counts:?}"
    );
}

/// A real atticd takes a NAR that it knows by its name alone, unless its own database knows that a chunk is missing.
#[tokio::test]
async fn what_no_request_repairs_is_found_bad_again() {
    let fake = Fake::start().await;
    let infos = [noise(&fake, "kept", 9_000_000)];
    stored(&fake, &infos).await;
    fake.server.faults().deduplicates = true;
    fake.server.damage(&infos[0], |nar| nar.truncate(4_000_000));
    let outcome = again(&fake, &infos, with_recheck(&fake, Mode::Sample, 1)).await;
    assert_eq!(outcome.counts().repaired, 1, "as far as the server says");
    let sent: Vec<PathInfo> = outcome.sent().cloned().collect();
    let deadline = Instant::now() + Duration::from_secs(10);
    let verification = verify(
        fake.attic(GOOD),
        sent,
        &verify::Options::default(),
        deadline,
        &CancellationToken::new(),
    )
    .await;
    assert!(matches!(verification.paths[..], [(_, Verdict::Bad(_))]));
}

#[tokio::test]
async fn a_repair_that_fails_is_lost_with_both_reasons() {
    let fake = Fake::start().await;
    let infos = [
        noise(&fake, "refused", 2_000_000),
        noise(&fake, "gone", 3_000_000),
    ];
    stored(&fake, &infos).await;
    for info in &infos {
        fake.server.damage(info, |nar| nar.truncate(1_000_000));
    }
    fake.server.faults().proxy_limit = Some(1000);
    std::fs::remove_file(fake.file(&infos[1])).expect("removed");
    let outcome = again(&fake, &infos, with_recheck(&fake, Mode::Sample, 1)).await;
    assert_eq!(outcome.counts().failed, 2, "{:?}", outcome.counts());
    for (_, reason) in outcome.lost() {
        assert!(
            reason.contains("damaged (its NAR has 1000000 bytes"),
            "{reason}"
        );
    }
}

/// What refers to a path that is being repaired is sent after the repair, and what was there before stays.
#[tokio::test]
async fn dependents_of_a_repair_are_published() {
    let fake = Fake::start().await;
    let library = noise(&fake, "library", 1_500_000);
    stored(&fake, std::slice::from_ref(&library)).await;
    fake.server.damage(&library, |nar| nar.truncate(1000));
    let tools: Vec<PathInfo> = (0..20)
        .map(|n| fake.path(&format!("tool-{n}"), b"tool", &[&library]))
        .collect();
    let mut infos = tools.clone();
    infos.push(library.clone());
    let outcome = again(&fake, &infos, with_recheck(&fake, Mode::Sample, 1)).await;
    let counts = outcome.counts();
    assert_eq!((counts.published, counts.repaired), (20, 1), "{counts:?}");
    let good = fake.attic(GOOD);
    let info = good.nar_info(&library.path.hash()).await.expect("answered");
    let (info, received) = (info.expect("there"), ByteCounter::default());
    let body = good.check_body(&info, &received).await.expect("read");
    assert_eq!(body, BodyCheck::Good);
}
