//! Gathers single requests into batches, for tools where one call for many paths is far cheaper than many calls.
//! A batch is cancelled when all its callers have gone.

use std::future::Future;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::sync::{mpsc, oneshot};
use tokio::time::sleep;
use tokio_util::task::AbortOnDropHandle;

use crate::client::destination::Error;

/// Requests that arrive within this time of the first one join its batch.
const GATHER: Duration = Duration::from_millis(20);

type Reply<T> = oneshot::Sender<Result<T, Error>>;

/// A queue of requests, and the one task that handles them batch by batch.
#[derive(Debug)]
pub(super) struct Batches<Q, T> {
    queue: mpsc::Sender<(Q, Reply<T>)>,
    _task: AbortOnDropHandle<()>,
}

impl<Q: Send + 'static, T: Send + 'static> Batches<Q, T> {
    /// Starts the task. `work` gets at most `limit` requests, and gives as many results in the same order.
    pub(crate) fn start<F, W>(limit: usize, work: F) -> Self
    where
        F: Fn(Vec<Q>) -> W + Send + Sync + 'static,
        W: Future<Output = Vec<Result<T, Error>>> + Send,
    {
        let (queue, mut incoming) = mpsc::channel::<(Q, Reply<T>)>(limit);
        let task = tokio::spawn(async move {
            while let Some(first) = incoming.recv().await {
                sleep(GATHER).await;
                let mut batch = vec![first];
                while batch.len() < limit
                    && let Ok(next) = incoming.try_recv()
                {
                    batch.push(next);
                }
                // Callers that have gone need no result.
                batch.retain(|(_, reply)| !reply.is_closed());
                let (requests, mut replies): (Vec<Q>, Vec<Reply<T>>) = batch.into_iter().unzip();
                let all_gone = join_all(replies.iter_mut().map(oneshot::Sender::closed));
                let results = tokio::select! {
                    results = work(requests) => results,
                    _ = all_gone => continue,
                };
                for (reply, result) in replies.into_iter().zip(results) {
                    // It fails only for a caller that has gone.
                    let _ = reply.send(result);
                }
            }
        });
        Self {
            queue,
            _task: AbortOnDropHandle::new(task),
        }
    }

    /// Adds a request to the next batch, and waits for its result.
    pub(crate) async fn submit(&self, request: Q) -> Result<T, Error> {
        let (reply, result) = oneshot::channel();
        let ended = || Error::Facts("the queue of batches has ended".to_owned());
        self.queue
            .send((request, reply))
            .await
            .map_err(|_| ended())?;
        result.await.map_err(|_| ended())?
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::{Arc, Mutex};

    use super::*;

    #[tokio::test]
    async fn simultaneous_requests_share_a_batch_and_each_gets_its_own_result() {
        let sizes = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&sizes);
        let batches = Batches::start(4, move |questions: Vec<u32>| {
            seen.lock().expect("lock").push(questions.len());
            async move {
                let answer = |n: u32| {
                    if n == 3 {
                        Err(Error::Facts("three".to_owned()))
                    } else {
                        Ok(n * 10)
                    }
                };
                questions.into_iter().map(answer).collect()
            }
        });
        let answers = join_all((0..6).map(|n| batches.submit(n))).await;
        let answers: Vec<Option<u32>> = answers.into_iter().map(Result::ok).collect();
        assert_eq!(
            answers,
            [Some(0), Some(10), Some(20), None, Some(40), Some(50)]
        );
        assert_eq!(*sizes.lock().expect("lock"), [4, 2]);
    }

    #[tokio::test]
    async fn a_batch_without_callers_is_cancelled() {
        let stopped = Arc::new(AtomicUsize::new(0));
        struct CountsDrops(Arc<AtomicUsize>);
        impl Drop for CountsDrops {
            fn drop(&mut self) {
                self.0.fetch_add(1, Ordering::Relaxed);
            }
        }
        let count = Arc::clone(&stopped);
        let batches = Batches::start(4, move |questions: Vec<u32>| {
            let drops = CountsDrops(Arc::clone(&count));
            async move {
                let _drops = drops;
                if questions == [1] {
                    std::future::pending::<()>().await;
                }
                questions.into_iter().map(Ok).collect()
            }
        });
        let waited = tokio::time::timeout(Duration::from_millis(100), batches.submit(1)).await;
        assert!(waited.is_err(), "it never ends");
        assert_eq!(
            batches.submit(2).await.ok(),
            Some(2),
            "and does not hold back the next"
        );
        assert_eq!(stopped.load(Ordering::Relaxed), 2);
    }
}
