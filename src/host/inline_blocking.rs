//! Work that is over in a fraction of a millisecond, done where its caller is: to hand it to a thread that may block,
//! and to wait for that thread, takes longer than the work and wakes two processors. Where the disk turns out to be
//! slow it goes to such a thread after all, so that others go on meanwhile. Never takes more than one of the runtime's
//! workers, nor the only one, so that a disk that hangs holds up nobody but who uses it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::runtime::Handle;
use tokio::sync::Semaphore;
use tokio::task::JoinError;
use tokio::time::timeout;

/// Above this mean the work is not brief: a thread that others go before for some milliseconds now and then is not
/// slow yet.
const SLOW: Duration = Duration::from_millis(5);
/// The mean is that of about so many calls.
const CALLS: u64 = 8;

/// So long a call waits for those before it.
const PATIENCE: Duration = Duration::from_millis(20);

/// One call at a time in the whole process: more of them would take from the build what they gain.
static TURN: Semaphore = Semaphore::const_new(1);

/// One kind of brief work, and how long it has been taking. Clones share that.
#[derive(Clone, Debug)]
pub struct AdaptiveBlocking {
    /// In microseconds.
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
    /// Does it here, or on a thread that may block. `busy`: this time it is not brief, or would have to wait.
    ///
    /// # Errors
    /// When it was on another thread and has panicked.
    pub async fn run<T: Send + 'static>(
        &self,
        busy: bool,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, JoinError> {
        if busy {
            return tokio::task::spawn_blocking(work).await;
        }
        if !self.is_slow()
            && Handle::current().metrics().num_workers() > 1
            && let Ok(Ok(_turn)) = timeout(PATIENCE, self.turn.acquire()).await
        {
            return Ok(self.timed(work));
        }
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
        // That of two calls at once one may be forgotten does no harm.
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

    /// One that waits for no other test.
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
    async fn it_is_done_here_until_it_is_slow_and_again_when_it_is_not() {
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
    async fn a_disk_that_hangs_holds_up_nobody_else() {
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
                        begun.send(()).expect("heard");
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
