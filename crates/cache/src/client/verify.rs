//! Verifies that the cache serves what was published: looks each path up at the read endpoint, compares it with the
//! store's own facts, checks its signature, and of a few paths unpacks and hashes the body.
//! It never repairs anything, and never exceeds its deadline.

use std::time::Duration;

use futures_util::{StreamExt as _, stream};
use tokio::time::{Instant, sleep, timeout_at};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use crate::client::destination::{Action, BodyCheck, Destination, Error, Target};
use flywheel_core::retry::Policy;
use flywheel_nix::key::PublicKey;
use flywheel_nix::narinfo::NarInfo;
use flywheel_nix::path_info::PathInfo;

/// Concurrent look-ups. Each is a small file, and with a distant server mostly waiting: 500 of them at 50 ms each take
/// less than a second at this width.
const LOOKUPS: usize = 32;

/// The settings of a verification.
#[derive(Clone, Debug)]
pub struct Options {
    /// The key that the job's Nix trusts for this cache. Without it, signatures are checked with the key that the cache
    /// announces, which proves less.
    pub key: Option<PublicKey>,
    /// The number of bodies to fetch: the smallest ones, and one at random.
    pub sample: usize,
    /// Bodies of larger NARs than this, in bytes, are not fetched.
    pub body_limit: u64,
    /// Concurrent look-ups.
    pub lookups: usize,
    /// The tries of each look-up, and the waits between them.
    pub policy: Policy,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            key: None,
            sample: 4,
            body_limit: 8 * 1024 * 1024,
            lookups: LOOKUPS,
            policy: Policy {
                attempts: 4,
                base: Duration::from_millis(250),
                cap: Duration::from_secs(5),
            },
        }
    }
}

/// The key that the signatures were checked with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Key {
    /// From the caller.
    Given(PublicKey),
    /// From the cache itself.
    Announced(PublicKey),
    /// No key is known, so no signature was checked.
    Unknown,
}

/// The result of looking up one path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The cache serves the path as the store has it.
    Good {
        /// Whether the body was unpacked and hashed, too.
        body: bool,
    },
    /// The cache serves something else, or nothing; holds the reason.
    Bad(String),
    /// The path could not be looked up; holds the reason.
    Unverified(String),
}

/// The result of a verification.
#[derive(Clone, Debug)]
pub struct Verification {
    /// In the order in which the paths were given.
    pub paths: Vec<(PathInfo, Verdict)>,
    pub key: Key,
}

impl Verification {
    /// The number of paths with a good verdict.
    pub fn good(&self) -> u64 {
        self.paths
            .iter()
            .filter(|(_, verdict)| matches!(verdict, Verdict::Good { .. }))
            .count() as u64
    }
}

/// Looks every path up at the read endpoint, until `deadline` or `cancel`. Paths that were not looked up by then are
/// unverified.
///
/// The work runs on a worker thread of the runtime, where responses arrive, whichever thread calls this.
pub async fn verify(
    from: impl Into<Target>,
    paths: Vec<PathInfo>,
    options: &Options,
    deadline: Instant,
    cancel: &CancellationToken,
) -> Verification {
    let (from, options, cancel) = (from.into(), options.clone(), cancel.clone());
    let work =
        tokio::spawn(async move { look_up_all(&*from, paths, &options, deadline, &cancel).await });
    match AbortOnDropHandle::new(work).await {
        Ok(verification) => verification,
        // The task is never aborted while this waits for it, so the error is a panic.
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

async fn look_up_all(
    from: &dyn Destination,
    paths: Vec<PathInfo>,
    options: &Options,
    deadline: Instant,
    cancel: &CancellationToken,
) -> Verification {
    let key = key(from, options, deadline, cancel).await;
    let sample = sample(&paths, options);
    let check = Check {
        from,
        options,
        key: &key,
    };
    // All look-ups share one deadline, so a server that hangs costs it once and not for each path.
    let checks: Vec<_> = paths
        .iter()
        .enumerate()
        .map(|(n, info)| {
            let (check, fetches) = (&check, sample.contains(&n));
            async move {
                tokio::select! {
                    biased;
                    () = cancel.cancelled() => Verdict::Unverified("verification was cancelled".to_owned()),
                    verdict = timeout_at(deadline, check.path(info, fetches)) => verdict
                        .unwrap_or_else(|_| Verdict::Unverified("the time for verification was over".to_owned())),
                }
            }
        })
        .collect();
    // `buffered` keeps the order, so that each verdict belongs to its path.
    let width = from.concurrency().unwrap_or(options.lookups).max(1);
    let verdicts: Vec<Verdict> = stream::iter(checks).buffered(width).collect().await;
    Verification {
        paths: paths.into_iter().zip(verdicts).collect(),
        key,
    }
}

async fn key(
    from: &dyn Destination,
    options: &Options,
    deadline: Instant,
    cancel: &CancellationToken,
) -> Key {
    // A given key proves more than the one that the cache announces, and saves a request.
    if let Some(key) = &options.key {
        return Key::Given(key.clone());
    }
    let config = tokio::select! {
        () = cancel.cancelled() => None,
        config = timeout_at(deadline, from.describe()) => config.ok().and_then(Result::ok),
    };
    config
        .and_then(|config| config.public_key)
        .map_or(Key::Unknown, Key::Announced)
}

/// The indices of the smallest paths, which are the cheapest to fetch, and of one random path more, so that every body
/// within the limit can be chosen.
fn sample(paths: &[PathInfo], options: &Options) -> Vec<usize> {
    let mut small: Vec<usize> = (0..paths.len())
        .filter(|n| paths[*n].nar_size <= options.body_limit)
        .collect();
    small.sort_unstable_by_key(|n| paths[*n].nar_size);
    if options.sample == 0 || small.is_empty() {
        return Vec::new();
    }
    let mut chosen: Vec<usize> = small.drain(..small.len().min(options.sample - 1)).collect();
    chosen.extend(fastrand::choice(small));
    chosen
}

struct Check<'a> {
    from: &'a dyn Destination,
    options: &'a Options,
    key: &'a Key,
}

impl Check<'_> {
    async fn path(&self, info: &PathInfo, fetches: bool) -> Verdict {
        let mut tries = 0;
        loop {
            tries += 1;
            let (verdict, after) = match self.once(info, fetches).await {
                // A cache with several replicas may need a moment until all of them have the path.
                Ok(None) => (Verdict::Bad("the cache does not serve it".to_owned()), None),
                Ok(Some(verdict)) => return verdict,
                Err(error) => match error.action() {
                    Action::Retry { after, .. } => (Verdict::Unverified(error.to_string()), after),
                    // A token may push without the right to read, so this is not held against the cache.
                    Action::Stop => {
                        return Verdict::Unverified(format!("it may not be read: {error}"));
                    }
                    Action::Never | Action::RereadOnce => return Verdict::Bad(error.to_string()),
                },
            };
            match self.options.policy.wait(tries, after) {
                Some(wait) => sleep(wait).await,
                None => return verdict,
            }
        }
    }

    /// `None` if the cache lacks the path.
    async fn once(&self, info: &PathInfo, fetches: bool) -> Result<Option<Verdict>, Error> {
        let Some(served) = self.from.look_up(&info.path).await? else {
            return Ok(None);
        };
        // The body is fetched only if its description is right.
        if let Some(difference) = difference(info, &served, self.key) {
            return Ok(Some(Verdict::Bad(difference)));
        }
        if !fetches {
            return Ok(Some(Verdict::Good { body: false }));
        }
        Ok(Some(match self.from.check_body(&served).await? {
            BodyCheck::Good => Verdict::Good { body: true },
            BodyCheck::Bad(reason) => Verdict::Bad(reason),
            // The narinfo was good, and nothing is known against the body.
            BodyCheck::Unsupported(_) => Verdict::Good { body: false },
        }))
    }
}

/// The first difference between what the cache serves and what the store has, if any.
fn difference(info: &PathInfo, served: &NarInfo, key: &Key) -> Option<String> {
    if served.path != info.path {
        return Some(format!("the cache serves `{}` in its place", served.path));
    }
    if served.nar_hash != info.nar_hash {
        return Some(format!(
            "the cache serves NAR hash {} instead of {}",
            served.nar_hash, info.nar_hash
        ));
    }
    if served.nar_size != info.nar_size {
        return Some(format!(
            "the cache serves NAR size {} instead of {}",
            served.nar_size, info.nar_size
        ));
    }
    // As sets: a server may store the references in another order.
    let sorted = |paths: &[flywheel_nix::store_path::StorePath]| {
        let mut paths = paths.to_vec();
        paths.sort_unstable();
        paths.dedup();
        paths
    };
    if sorted(&served.references) != sorted(&info.references) {
        return Some("the cache serves other references than the store has".to_owned());
    }
    match key {
        Key::Given(key) | Key::Announced(key) if !served.signed_by(key) => {
            let names = served
                .signatures
                .iter()
                .filter_map(|signature| signature.split(':').next());
            let names: Vec<&str> = names.collect();
            Some(match names.as_slice() {
                [] => "the cache serves it without a signature".to_owned(),
                names if names.contains(&key.name()) => {
                    format!(
                        "its signature by `{}` is not one of the given key, so that Nix refuses it",
                        key.name()
                    )
                }
                names => format!(
                    "it is signed by `{}` and not by `{}`",
                    names.join("`, `"),
                    key.name()
                ),
            })
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::destination::ByteCounter;
    use crate::client::fake::{Fake, GOOD, PUSH_ONLY};
    use flywheel_nix::hash::Sha256;
    use flywheel_nix::key::SecretKey;

    impl Verification {
        /// The number of bodies that were unpacked and hashed.
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
                    Verdict::Bad(reason) | Verdict::Unverified(reason) => {
                        Some((info, reason.as_str()))
                    }
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
        assert_eq!((found.good(), found.bodies()), (3, 2), "{found:?}");
        assert_eq!(found.key, Key::Announced(fake.server.key.public()));
        let given = Options {
            key: Some(fake.server.key.public()),
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
                key: Some(other),
                ..quick()
            },
            "is not one of the given key",
        )
        .await;
        check(
            Options {
                key: Some(foreign),
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
}
