//! How much of a job's time a cache may cost: the time that failed reads have taken is summed up over the whole job,
//! whatever number of Nix commands they came from, and once the sum is spent the cache is given up.

use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, timeout};

/// The sum of the time that failed reads may take. A publication to the same cache takes up to 5 s more to see for
/// itself, and a cache that hangs may cost a job 35 s in all.
pub(super) const BUDGET: Duration = Duration::from_secs(25);
/// So many reads that fail one after the other, each in spite of its tries, mean that the cache is down.
const FAILURES: u32 = 5;
/// If Nix closes the connection while it waits, the wait counts from this length on.
const ABANDONED: Duration = Duration::from_secs(3);
/// A body that brings less than this while the budget lasts stands still.
const LEAST_PROGRESS: u64 = 32 * 1024;

/// Why a wait ended without its result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ended {
    /// Nothing came for as long as this try may wait.
    Slow,
    /// The time for this read is spent.
    Spent,
    /// The cache was given up.
    GivenUp,
}

/// The health of one cache in one job.
#[derive(Debug)]
pub(super) struct Health {
    budget: Duration,
    spent: Mutex<Spent>,
    /// Why the cache was given up.
    given_up: watch::Sender<Option<String>>,
}

#[derive(Debug)]
struct Spent {
    sum: Duration,
    /// Reads fail side by side; what one of them has counted is not counted again.
    counted_until: Instant,
    failures: u32,
}

impl Health {
    pub(super) fn new(budget: Duration) -> Self {
        Self {
            budget,
            spent: Mutex::new(Spent {
                sum: Duration::ZERO,
                counted_until: Instant::now(),
                failures: 0,
            }),
            given_up: watch::Sender::new(None),
        }
    }

    fn spent(&self) -> MutexGuard<'_, Spent> {
        self.spent
            .lock()
            .expect("nothing panics while it holds this lock")
    }

    /// What is left for reads that fail.
    fn left(&self) -> Duration {
        self.budget.saturating_sub(self.spent().sum)
    }

    pub(super) fn on_success(&self) {
        self.spent().failures = 0;
    }

    /// Counts the time of a read, which has waited for so long.
    fn count(&self, waited: Duration) {
        let now = Instant::now();
        let mut spent = self.spent();
        let began = now.checked_sub(waited).unwrap_or(now);
        let uncounted = now - began.max(spent.counted_until);
        spent.sum += uncounted;
        spent.counted_until = now;
    }

    /// A read has failed for good, after it had waited for so long. Returns the reason if the cache is given up now.
    pub(super) fn on_failure(&self, waited: Duration, why: &str) -> Option<String> {
        self.count(waited);
        let mut spent = self.spent();
        spent.failures += 1;
        if spent.sum < self.budget && spent.failures < FAILURES {
            return None;
        }
        let seconds = spent.sum.as_secs_f64();
        drop(spent);
        let reason = format!("its reads failed for {seconds:.0} s in all, the last one: {why}");
        let is_first = self.given_up.send_if_modified(|given_up| {
            let is_first = given_up.is_none();
            given_up.get_or_insert_with(|| reason.clone());
            is_first
        });
        is_first.then_some(reason)
    }

    /// How much time reads have taken that failed.
    pub(super) fn sum(&self) -> Duration {
        self.spent().sum
    }

    /// Why the cache was given up.
    pub(super) fn given_up(&self) -> Option<String> {
        self.given_up.borrow().clone()
    }
}

/// How far a read has come.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Progress {
    /// How long it has waited since something came.
    pub(super) waited: Duration,
    /// What has come since then, too little to count.
    bytes: u64,
    /// Up to where in the body this try has come …
    at: u64,
    /// … and any try. What comes a second time is no progress: a server may hang at the same byte each time.
    furthest: u64,
}

/// The waits of one read.
#[derive(Debug)]
pub(super) struct Patience<'a> {
    health: &'a Health,
    pub(super) progress: Progress,
    /// When the wait began that is under way.
    since: Option<Instant>,
}

/// A client that hangs up before the end has lost its time, too.
impl Drop for Patience<'_> {
    fn drop(&mut self) {
        if let Some(since) = self.since {
            let waited = self.progress.waited + since.elapsed();
            if waited >= ABANDONED {
                self.health.count(waited);
            }
        }
    }
}

impl<'a> Patience<'a> {
    pub(super) fn new(health: &'a Health) -> Self {
        Self::resume(health, Progress::default())
    }

    /// Goes on where another one has ended.
    pub(super) fn resume(health: &'a Health, progress: Progress) -> Self {
        Self {
            health,
            progress,
            since: None,
        }
    }

    /// Waits for `result`, at most for `limit`, for what is left of the budget, and until the cache is given up.
    pub(super) async fn wait<T>(
        &mut self,
        limit: Duration,
        result: impl Future<Output = T>,
    ) -> Result<T, Ended> {
        let mut given_up = self.health.given_up.subscribe();
        let left = self.health.left().saturating_sub(self.progress.waited);
        let began = Instant::now();
        self.since = Some(began);
        let ended = tokio::select! {
            biased;
            _ = given_up.wait_for(Option::is_some) => Err(Ended::GivenUp),
            result = timeout(limit.min(left), result) => result.map_err(|_| Ended::Slow),
        };
        self.since = None;
        self.progress.waited += began.elapsed();
        match ended {
            Err(Ended::Slow) if self.progress.waited >= self.health.left() => Err(Ended::Spent),
            ended => ended,
        }
    }

    /// A try has failed, and another one follows: its time counts against the budget, as where half of a cache's servers
    /// hang and each read succeeds in the end.
    pub(super) fn count_try(&mut self) {
        self.health.count(std::mem::take(&mut self.progress.waited));
    }

    /// A try begins at this place in the body.
    pub(super) fn begin_at(&mut self, at: u64) {
        self.progress.at = at;
    }

    /// The server has sent this much of a body. A head alone is no progress: it comes again with each try.
    pub(super) fn on_bytes(&mut self, bytes: usize) {
        let progress = &mut self.progress;
        progress.at += bytes as u64;
        progress.bytes += progress.at.saturating_sub(progress.furthest);
        progress.furthest = progress.furthest.max(progress.at);
        if progress.bytes >= LEAST_PROGRESS {
            (progress.waited, progress.bytes) = (Duration::ZERO, 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A test does not wait for real seconds.
    const SECOND: Duration = Duration::from_millis(20);

    #[tokio::test]
    async fn reads_that_fail_side_by_side_are_counted_once() {
        let health = Health::new(10 * SECOND);
        tokio::time::sleep(6 * SECOND).await;
        assert_eq!(health.on_failure(6 * SECOND, "x"), None);
        assert_eq!(health.on_failure(6 * SECOND, "x"), None);
        assert!(health.left() <= 4 * SECOND && health.left() > 2 * SECOND);
        tokio::time::sleep(4 * SECOND).await;
        assert!(health.on_failure(4 * SECOND, "x").is_some());
        assert!(health.given_up().is_some());
        assert_eq!(health.on_failure(SECOND, "y"), None, "it is given up once");
    }

    #[tokio::test]
    async fn one_success_separates_failures_and_gives_no_time_back() {
        let health = Health::new(10 * SECOND);
        for _ in 1..FAILURES {
            assert_eq!(health.on_failure(Duration::ZERO, "x"), None);
        }
        health.on_success();
        assert_eq!(health.on_failure(Duration::ZERO, "x"), None);
        health.on_success();
        tokio::time::sleep(10 * SECOND).await;
        assert!(health.on_failure(10 * SECOND, "x").is_some());
    }

    #[tokio::test]
    async fn tries_that_are_followed_by_a_success_cost_their_time() {
        let health = Health::new(10 * SECOND);
        for _ in 0..2 {
            let mut patience = Patience::new(&health);
            let hangs = std::future::pending::<()>();
            let slow = patience.wait(4 * SECOND, hangs).await;
            assert_eq!(slow, Err(Ended::Slow));
            patience.count_try();
            health.on_success();
        }
        assert!(health.sum() >= 8 * SECOND);
        let mut patience = Patience::new(&health);
        let hangs = std::future::pending::<()>();
        let spent = patience.wait(4 * SECOND, hangs).await;
        assert_eq!(spent, Err(Ended::Spent));
    }

    #[tokio::test]
    async fn what_comes_a_second_time_is_no_progress() {
        let health = Health::new(10 * SECOND);
        let mut patience = Patience::new(&health);
        let ended = loop {
            patience.begin_at(0);
            patience.on_bytes(100_000);
            match patience
                .wait(60 * SECOND, tokio::time::sleep(3 * SECOND))
                .await
            {
                Ok(()) => (),
                Err(ended) => break ended,
            }
        };
        assert_eq!(ended, Ended::Spent);
    }

    #[tokio::test]
    async fn a_body_that_drips_stands_still() {
        let health = Health::new(10 * SECOND);
        let mut patience = Patience::new(&health);
        let began = Instant::now();
        let ended = loop {
            match patience.wait(60 * SECOND, tokio::time::sleep(SECOND)).await {
                Ok(()) => patience.on_bytes(1),
                Err(ended) => break ended,
            }
        };
        assert_eq!(ended, Ended::Spent);
        assert!(began.elapsed() >= 10 * SECOND, "{:?}", began.elapsed());
    }
}
