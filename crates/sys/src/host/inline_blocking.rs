//! Runs short blocking work, a fraction of a millisecond long, directly on the async worker thread that needs it.
//! Handing such work to the blocking pool and waiting for it takes longer than the work itself, and wakes two
//! processors. When the disk turns out to be slow, the work moves to the blocking pool after all. It never occupies
//! more than one of the runtime's workers, and never the only one, so that a disk that hangs stops nothing but the
//! tasks that use it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::runtime::Handle;
use tokio::sync::Semaphore;
use tokio::task::JoinError;
use tokio::time::timeout;

/// Above this mean duration the work moves to the blocking pool. It is well above the work's own duration, because a
/// busy machine may now and then delay the thread for some milliseconds.
const SLOW: Duration = Duration::from_millis(5);
/// The mean covers about this many calls.
const CALLS: u64 = 8;

/// How long a call waits for its turn before it moves to the blocking pool.
const TURN_TIMEOUT: Duration = Duration::from_millis(20);

/// One call at a time in the whole process: more would take processor time from the build.
static TURN: Semaphore = Semaphore::const_new(1);

/// One kind of short blocking work and its mean duration, which clones share.
#[derive(Clone, Debug)]
pub struct AdaptiveBlocking {
    /// The mean duration in microseconds.
    mean: Arc<AtomicU64>,
    turn: &'static Semaphore,
}

impl Default for AdaptiveBlocking {
    fn default() -> Self {
        Self {
            mean: Arc::default(),
            turn: &TURN,
        }
    }
}

impl AdaptiveBlocking {
    /// Runs `work` on this thread, or in the blocking pool. `long`: this call takes long or has to wait, so it goes to
    /// the pool and does not count.
    ///
    /// # Errors
    /// When the work panicked in the blocking pool.
    pub async fn run<T: Send + 'static>(
        &self,
        long: bool,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, JoinError> {
        if long {
            return tokio::task::spawn_blocking(work).await;
        }
        // Never on the only worker: a disk that hangs would stop all tasks.
        if !self.is_slow()
            && Handle::current().metrics().num_workers() > 1
            && let Ok(Ok(_turn)) = timeout(TURN_TIMEOUT, self.turn.acquire()).await
        {
            return Ok(self.timed(work));
        }
        // Work in the pool is timed, too, so that it comes back here when the disk is fast again.
        let blocking = self.clone();
        tokio::task::spawn_blocking(move || blocking.timed(work)).await
    }

    fn is_slow(&self) -> bool {
        Duration::from_micros(self.mean.load(Ordering::Relaxed)) > SLOW
    }

    fn timed<T>(&self, work: impl FnOnce() -> T) -> T {
        let begun = Instant::now();
        let done = work();
        self.took(begun.elapsed());
        done
    }

    fn took(&self, time: Duration) {
        let part = u64::try_from(time.as_micros()).unwrap_or(u64::MAX) / CALLS;
        // A lost update between two concurrent calls is fine: this is an estimate.
        let mean = self.mean.load(Ordering::Relaxed);
        self.mean.store(
            (mean - mean / CALLS).saturating_add(part),
            Ordering::Relaxed,
        );
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Mutex, mpsc};

    use super::*;

    /// With a turn of its own, so that it does not wait for other tests.
    fn blocking() -> AdaptiveBlocking {
        AdaptiveBlocking {
            mean: Arc::default(),
            turn: Box::leak(Box::new(Semaphore::new(1))),
        }
    }

    async fn is_here(blocking: &AdaptiveBlocking, busy: bool) -> bool {
        let here = std::thread::current().id();
        blocking
            .run(busy, move || std::thread::current().id() == here)
            .await
            .expect("no panic")
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn work_is_done_here_until_it_is_slow_and_again_when_it_is_fast() {
        let blocking = blocking();
        assert!(is_here(&blocking, false).await && !is_here(&blocking, true).await);
        blocking.took(SLOW);
        assert!(is_here(&blocking, false).await, "once is nothing");
        for _ in 0..4 * CALLS {
            blocking.took(4 * SLOW);
        }
        assert!(!is_here(&blocking, false).await);
        for _ in 0..4 * CALLS {
            blocking.took(Duration::ZERO);
        }
        assert!(is_here(&blocking, false).await);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_disk_that_hangs_does_not_stop_other_tasks() {
        let blocking = blocking();
        let (begun, mut begins) = tokio::sync::mpsc::unbounded_channel();
        let (free, waits) = mpsc::channel::<()>();
        let waits = Arc::new(Mutex::new(waits));
        let hung: Vec<_> = (0..4)
            .map(|_| {
                let (blocking, begun, waits) =
                    (blocking.clone(), begun.clone(), Arc::clone(&waits));
                tokio::spawn(async move {
                    let work = move || {
                        begun.send(()).expect("the test waits");
                        let _ = waits.lock().expect("sound").recv();
                    };
                    blocking.run(false, work).await
                })
            })
            .collect();
        for _ in 0..hung.len() {
            begins.recv().await.expect("each of them hangs");
        }
        tokio::spawn(tokio::time::sleep(Duration::from_millis(1)))
            .await
            .expect("a worker is left");
        drop(free);
        for hung in hung {
            hung.await.expect("no panic").expect("no panic");
        }
    }

    #[tokio::test]
    async fn the_only_worker_is_never_taken() {
        assert!(!is_here(&blocking(), false).await);
    }
}
