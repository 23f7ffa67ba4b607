//! Verification against the fake server, and a sample's promise.

use super::*;
use crate::client::destination::ByteCounter;
use crate::client::fake::{Fake, GOOD, PUSH_ONLY};
use flywheel_nix::hash::Sha256;
use flywheel_nix::key::SecretKey;

impl Verification {
    /// The number of bodies that were unpacked and hashed, and are good.
    fn bodies(&self) -> u64 {
        self.paths
            .iter()
            .filter(|(_, verdict)| matches!(verdict, Verdict::Good { body: true }))
            .count() as u64
    }

    /// The paths without a good verdict, and the reason.
    fn doubtful(&self) -> impl Iterator<Item = (&PathInfo, &str)> {
        self.paths
            .iter()
            .filter_map(|(info, verdict)| match verdict {
                Verdict::Good { .. } => None,
                Verdict::Bad(reason) | Verdict::Unverified(reason) => Some((info, reason.as_str())),
            })
    }
}

async fn with_three() -> (Fake, Vec<PathInfo>) {
    let fake = Fake::start().await;
    let library = fake.path("library", b"1", &[]);
    let tool = fake.path("tool", &vec![b'2'; 200_000], &[&library]);
    let large = fake.path("large", &vec![b'3'; 9 * 1024 * 1024], &[]);
    for info in [&library, &tool, &large] {
        fake.attic(GOOD)
            .upload(info, &fake.file(info), &ByteCounter::default())
            .await
            .expect("stored");
    }
    (fake, vec![library, tool, large])
}

fn quick() -> Options {
    let policy = Policy {
        attempts: 3,
        base: Duration::from_millis(5),
        cap: Duration::from_millis(20),
    };
    Options {
        policy,
        ..Options::default()
    }
}

async fn verified(fake: &Fake, paths: Vec<PathInfo>, options: &Options) -> Verification {
    let deadline = Instant::now() + Duration::from_secs(10);
    verify(
        fake.attic(GOOD),
        paths,
        options,
        deadline,
        &CancellationToken::new(),
    )
    .await
}

#[tokio::test]
async fn what_is_served_well_is_good() {
    let (fake, paths) = with_three().await;
    let found = verified(&fake, paths.clone(), &quick()).await;
    assert_eq!((found.good(), found.bodies()), (3, 3), "{found:?}");
    assert_eq!(found.key, Key::Announced(fake.server.key.public()));
    let given = Options {
        key: Key::Given(fake.server.key.public()),
        ..quick()
    };
    assert!(matches!(
        verified(&fake, paths, &given).await.key,
        Key::Given(_)
    ));
}

#[tokio::test]
async fn a_server_that_fails_now_and_then_is_queried_again() {
    let (fake, paths) = with_three().await;
    fake.server.faults().every_third_fails = true;
    let options = Options {
        policy: Policy {
            attempts: 20,
            ..quick().policy
        },
        ..quick()
    };
    assert_eq!(verified(&fake, paths, &options).await.good(), 3);
}

#[tokio::test]
async fn every_difference_is_found_and_named() {
    let (fake, paths) = with_three().await;
    let other = SecretKey::generate("main").expect("random").public();
    let foreign = SecretKey::generate("other").expect("random").public();
    let check = async |options: Options, words: &str| {
        let found = verified(&fake, vec![paths[0].clone()], &options).await;
        let reason = found.doubtful().next().expect("doubtful").1;
        assert!(reason.contains(words), "{reason}");
    };
    check(
        Options {
            key: Key::Given(other),
            ..quick()
        },
        "is not one of the given key",
    )
    .await;
    check(
        Options {
            key: Key::Given(foreign),
            ..quick()
        },
        "signed by `main` and not by `other`",
    )
    .await;
    fake.server.faults().nar_empty = true;
    check(quick(), "its NAR is served empty").await;
    fake.server.faults().nar_missing = true;
    check(quick(), "its NAR is not").await;
    fake.server.faults().unsigned = true;
    check(quick(), "without a signature").await;
    fake.server.faults().lying_hash = Some(Sha256([7; 32]));
    check(quick(), "serves NAR hash").await;
    fake.server.faults().narinfo_missing = true;
    check(quick(), "the cache does not serve it").await;
    *fake.server.faults() = crate::client::fake::Faults {
        html: Some(200),
        ..Default::default()
    };
    check(quick(), "not Attic's").await;
}

#[tokio::test]
async fn a_server_that_does_not_respond_is_bounded_and_named() {
    let (fake, paths) = with_three().await;
    fake.server.faults().hang = true;
    let began = Instant::now();
    let deadline = began + Duration::from_millis(200);
    let found = verify(
        fake.attic(GOOD),
        paths.clone(),
        &quick(),
        deadline,
        &CancellationToken::new(),
    )
    .await;
    assert!(began.elapsed() < Duration::from_secs(2));
    assert_eq!(found.doubtful().count(), 3);
    assert_eq!(found.key, Key::Unknown);
    let cancelled = CancellationToken::new();
    cancelled.cancel();
    let deadline = Instant::now() + Duration::from_secs(60);
    let found = verify(fake.attic(GOOD), paths, &quick(), deadline, &cancelled).await;
    assert_eq!(
        found.doubtful().next().expect("doubtful").1,
        "verification was cancelled"
    );
}

#[tokio::test]
async fn a_token_that_may_not_read_leaves_paths_unverified() {
    let (fake, paths) = with_three().await;
    let deadline = Instant::now() + Duration::from_secs(10);
    let found = verify(
        fake.attic(PUSH_ONLY),
        paths,
        &quick(),
        deadline,
        &CancellationToken::new(),
    )
    .await;
    assert!(
        found
            .doubtful()
            .all(|(_, reason)| reason.contains("may not be read")),
        "{found:?}"
    );
    assert_eq!(found.doubtful().count(), 3);
}
