//! Verification against the fake server, and a sample's promise.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use super::*;
use crate::client::destination::{BodyCheck, ByteCounter, CacheConfig, Pending, Uploaded};
use crate::client::fake::{Fake, GOOD, PUSH_ONLY};
use flywheel_nix::hash::Sha256;
use flywheel_nix::key::SecretKey;
use flywheel_nix::nar::NarSource;
use flywheel_nix::narinfo::NarInfo;
use flywheel_nix::store_path::StorePath;

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

/// A store that describes all paths well, and serves these bodies damaged.
#[derive(Debug)]
struct Damaging {
    infos: HashMap<StorePath, PathInfo>,
    damaged: HashSet<StorePath>,
    read: Mutex<Vec<StorePath>>,
}

impl Destination for Damaging {
    fn address(&self) -> String {
        "memory".to_owned()
    }

    fn describe(&self) -> Pending<'_, CacheConfig> {
        Box::pin(async { Ok(CacheConfig::default()) })
    }

    fn missing<'a>(&'a self, _: &'a [StorePath]) -> Pending<'a, HashSet<StorePath>> {
        Box::pin(async { Ok(HashSet::new()) })
    }

    fn send<'a>(
        &'a self,
        _: &'a PathInfo,
        _: NarSource,
        _: &'a ByteCounter,
    ) -> Pending<'a, Uploaded> {
        Box::pin(async { Ok(Uploaded::Stored) })
    }

    fn look_up<'a>(&'a self, path: &'a StorePath) -> Pending<'a, Option<NarInfo>> {
        Box::pin(async move {
            let info = self.infos.get(path).cloned();
            Ok(info.map(|info| NarInfo {
                path: info.path,
                url: String::new(),
                compression: String::new(),
                file_hash: None,
                file_size: None,
                nar_hash: info.nar_hash,
                nar_size: info.nar_size,
                references: info.references,
                deriver: None,
                signatures: Vec::new(),
                ca: None,
            }))
        })
    }

    fn check_body<'a>(&'a self, info: &'a NarInfo, _: &'a ByteCounter) -> Pending<'a, BodyCheck> {
        Box::pin(async move {
            self.read.lock().expect("lock").push(info.path.clone());
            Ok(if self.damaged.contains(&info.path) {
                BodyCheck::Bad("damaged".to_owned())
            } else {
                BodyCheck::Good
            })
        })
    }
}

/// A thousand paths of all sizes, and five of them, of all sizes too, that are served damaged.
fn five_of_a_thousand() -> (Vec<PathInfo>, HashSet<StorePath>) {
    let size = |n: u64| 1000 + (n % 10) * (n % 10) * 1_000_000;
    let paths: Vec<PathInfo> = (0..1000)
        .map(|n| {
            let digest = Sha256([(n % 251) as u8; 32]);
            let name = Seed(n).to_string().repeat(2);
            let base_name = format!("{}-path-{n}", name.replace(['e', 'u', 't', 'o'], "z"));
            PathInfo {
                path: StorePath::from_base_name(&base_name).expect("base name"),
                nar_hash: digest,
                nar_size: size(n),
                references: Vec::new(),
                deriver: None,
                signatures: Vec::new(),
                ca: None,
                ultimate: true,
            }
        })
        .collect();
    let damaged = [1, 250, 503, 777, 999].map(|n: usize| paths[n].path.clone());
    (paths, damaged.into())
}

fn damaging(paths: &[PathInfo], damaged: &HashSet<StorePath>) -> Arc<Damaging> {
    Arc::new(Damaging {
        infos: paths
            .iter()
            .map(|info| (info.path.clone(), info.clone()))
            .collect(),
        damaged: damaged.clone(),
        read: Mutex::default(),
    })
}

/// The damaged paths that are found, and the number of bodies that are read.
async fn found(
    store: &Arc<Damaging>,
    paths: &[PathInfo],
    options: Options,
) -> (HashSet<StorePath>, usize) {
    let deadline = Instant::now() + Duration::from_secs(60);
    let target: Target = Arc::<Damaging>::clone(store);
    let cancel = CancellationToken::new();
    let verification = verify(target, paths.to_vec(), &options, deadline, &cancel).await;
    let bad = verification
        .paths
        .into_iter()
        .filter(|(_, verdict)| matches!(verdict, Verdict::Bad(_)))
        .map(|(info, _)| info.path)
        .collect();
    let read = std::mem::take(&mut *store.read.lock().expect("lock"));
    (bad, read.len())
}

#[tokio::test]
async fn full_names_exactly_the_damaged_bodies() {
    let (paths, damaged) = five_of_a_thousand();
    let options = Options {
        mode: Mode::Full,
        budget: 0,
        ..quick()
    };
    let store = damaging(&paths, &damaged);
    assert_eq!(found(&store, &paths, options).await, (damaged, 1000));
    let off = Options {
        mode: Mode::Off,
        ..quick()
    };
    assert_eq!(found(&store, &paths, off).await, (HashSet::new(), 0));
}

/// The promise of a sample: each body is read with the chance `budget / all bytes`, whatever its size.
#[tokio::test]
async fn a_sample_finds_what_its_rate_promises() {
    let (paths, damaged) = five_of_a_thousand();
    let total: u64 = paths.iter().map(|info| info.nar_size).sum();
    let (runs, share) = (200, 5);
    let store = damaging(&paths, &damaged);
    let (mut hits, mut seeds_with_a_hit, mut large_read) = (0, 0, 0);
    let large: HashSet<&StorePath> = paths
        .iter()
        .filter(|info| info.nar_size > 60_000_000)
        .map(|info| &info.path)
        .collect();
    for seed in 0..runs {
        let options = Options {
            seed: Seed(seed),
            budget: total / share,
            ..quick()
        };
        let drawn = sample::draw(&paths, options.seed, options.budget);
        large_read += drawn
            .iter()
            .filter(|n| large.contains(&paths[**n].path))
            .count();
        let drawn: HashSet<StorePath> = drawn.iter().map(|n| paths[*n].path.clone()).collect();
        assert!(
            (199..=201).contains(&drawn.len()),
            "{} bodies of 1000 at a fifth",
            drawn.len()
        );
        let hit: HashSet<StorePath> = damaged.intersection(&drawn).cloned().collect();
        // What is drawn is what is read, and of that the damaged ones are found.
        if seed == 0 {
            let (bad, read) = found(&store, &paths, options).await;
            assert_eq!((read, &bad), (drawn.len(), &hit), "seed {seed}");
        }
        hits += hit.len();
        seeds_with_a_hit += usize::from(!hit.is_empty());
    }
    // A thousand draws at a fifth: 200, with a standard deviation of 12.6. Four of them on each side.
    assert!((150..=250).contains(&hits), "{hits} of 1000");
    // At least one of the five: 1 - 0.8^5 of 200 seeds is 134, with a standard deviation of 6.6.
    assert!(
        (108..=160).contains(&seeds_with_a_hit),
        "{seeds_with_a_hit} of 200"
    );
    // Two hundred of the paths are large, and of those a fifth is read as well.
    let expected = large.len() * 200 / 5;
    assert!(
        (expected * 9 / 10..=expected * 11 / 10).contains(&large_read),
        "{large_read} instead of {expected}"
    );
}

#[test]
fn below_the_budget_every_body_is_drawn_and_above_it_the_bytes_have_a_bound() {
    let (paths, _) = five_of_a_thousand();
    let total: u64 = paths.iter().map(|info| info.nar_size).sum();
    assert_eq!(sample::draw(&paths, Seed(1), total).len(), 1000);
    // A single path of ten times the budget is read once in ten times.
    let one = &paths[9..10];
    let read = (0..1000)
        .filter(|seed| !sample::draw(one, Seed(*seed), one[0].nar_size / 10).is_empty())
        .count();
    assert!((60..140).contains(&read), "{read} of 1000");
}

#[tokio::test]
async fn truncated_and_changed_bodies_of_every_size_are_found_as_served() {
    let fake = Fake::start().await;
    let mut random = fastrand::Rng::with_seed(7);
    let mut paths = Vec::new();
    for (n, size) in [100, 60_000, 900_000, 9_000_000, 12_000_000]
        .into_iter()
        .enumerate()
    {
        let mut content = vec![0; size];
        random.fill(&mut content);
        let info = fake.path(&format!("path-{n}"), &content, &[]);
        fake.attic(GOOD)
            .upload(&info, &fake.file(&info), &ByteCounter::default())
            .await
            .expect("stored");
        paths.push(info);
    }
    assert_eq!(verified(&fake, paths.clone(), &quick()).await.bodies(), 5);
    let reason = async |n: usize| {
        let found = verified(&fake, paths.clone(), &quick()).await;
        let doubtful: Vec<_> = found.doubtful().collect();
        assert_eq!(doubtful.len(), n + 1, "{doubtful:?}");
        let (_, reason) = doubtful
            .iter()
            .find(|(info, _)| info.path == paths[n].path)
            .expect("the damaged one");
        (*reason).to_owned()
    };
    for (n, info) in paths.iter().enumerate() {
        let (reason, words) = match n {
            0 | 3 => {
                fake.server.damage(info, |nar| nar.truncate(nar.len() - 8));
                (reason(n).await, "instead of")
            }
            1 => {
                fake.server.damage(info, |nar| nar[30_000] ^= 1);
                (reason(n).await, "its NAR's hash is")
            }
            2 => {
                fake.server.damage(info, |nar| nar.extend([0; 8]));
                (reason(n).await, "more than")
            }
            _ => {
                let hash = info.path.hash().as_str().to_owned();
                fake.server.faults().broken_off.insert(hash);
                (reason(n).await, "breaks off after")
            }
        };
        assert!(reason.contains(words), "{n}: {reason}");
    }
}

#[tokio::test]
async fn a_cache_that_falls_silent_ends_the_verification() {
    let (fake, paths) = with_three().await;
    fake.server.faults().hang = true;
    let options = Options {
        key: Key::Given(fake.server.key.public()),
        idle: Duration::from_millis(200),
        ..quick()
    };
    let began = Instant::now();
    let found = verified(&fake, paths, &options).await;
    assert!(began.elapsed() < Duration::from_secs(2), "not the deadline");
    assert_eq!(found.doubtful().count(), 3);
    assert!(
        found
            .doubtful()
            .all(|(_, reason)| reason.contains("stalled"))
    );
}
