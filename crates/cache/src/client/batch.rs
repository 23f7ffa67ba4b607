//! Makes batches of what is asked for one by one, for tools of which one call for many paths is far
//! cheaper than many calls. Owns nothing but the waiting; a batch whose askers are gone is stopped.

use std::future::Future;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::sync::{mpsc, oneshot};
use tokio::time::sleep;
use tokio_util::task::AbortOnDropHandle;

use crate::client::attic::Error;

/// What comes within this time of the first goes along.
const GATHER: Duration = Duration::from_millis(20);

type Reply<T> = oneshot::Sender<Result<T, Error>>;

/// A line of askers, and the one task that answers them batch by batch.
#[derive(Debug)]
pub(super) struct Batches<Q, T> {
    askers: mpsc::Sender<(Q, Reply<T>)>,
    _task: AbortOnDropHandle<()>,
}

impl<Q: Send + 'static, T: Send + 'static> Batches<Q, T> {
    /// Starts the task. `work` gets at most `most` questions, and gives as many answers in their order.
    pub fn start<F, W>(most: usize, work: F) -> Self
    where
        F: Fn(Vec<Q>) -> W + Send + Sync + 'static,
        W: Future<Output = Vec<Result<T, Error>>> + Send,
    {
        let (askers, mut line) = mpsc::channel::<(Q, Reply<T>)>(most);
        let task = tokio::spawn(async move {
            while let Some(first) = line.recv().await {
                sleep(GATHER).await;
                let mut batch = vec![first];
                while batch.len() < most
                    && let Ok(next) = line.try_recv()
                {
                    batch.push(next);
                }
                batch.retain(|(_, reply)| !reply.is_closed());
                let (questions, mut replies): (Vec<Q>, Vec<Reply<T>>) = batch.into_iter().unzip();
                let all_gone = join_all(replies.iter_mut().map(oneshot::Sender::closed));
                let answers = tokio::select! {
                    answers = work(questions) => answers,
                    _ = all_gone => continue,
                };
                for (reply, answer) in replies.into_iter().zip(answers) {
                    // Who no longer listens needs no answer.
                    let _ = reply.send(answer);
                }
            }
        });
        Self {
            askers,
            _task: AbortOnDropHandle::new(task),
        }
    }

    /// Asks, and waits for the batch.
    pub async fn ask(&self, question: Q) -> Result<T, Error> {
        let (reply, answer) = oneshot::channel();
        let ended = || Error::Facts("the line of batches has ended".to_owned());
        self.askers
            .send((question, reply))
            .await
            .map_err(|_| ended())?;
        answer.await.map_err(|_| ended())?
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::{Arc, Mutex};

    use super::*;

    #[tokio::test]
    async fn what_comes_together_goes_together_and_each_gets_its_own_answer() {
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
        let answers = join_all((0..6).map(|n| batches.ask(n))).await;
        let answers: Vec<Option<u32>> = answers.into_iter().map(Result::ok).collect();
        assert_eq!(
            answers,
            [Some(0), Some(10), Some(20), None, Some(40), Some(50)]
        );
        assert_eq!(*sizes.lock().expect("lock"), [4, 2]);
    }

    #[tokio::test]
    async fn a_batch_that_nobody_waits_for_is_stopped() {
        let stopped = Arc::new(AtomicUsize::new(0));
        struct Told(Arc<AtomicUsize>);
        impl Drop for Told {
            fn drop(&mut self) {
                self.0.fetch_add(1, Ordering::Relaxed);
            }
        }
        let count = Arc::clone(&stopped);
        let batches = Batches::start(4, move |questions: Vec<u32>| {
            let told = Told(Arc::clone(&count));
            async move {
                let _told = told;
                if questions == [1] {
                    std::future::pending::<()>().await;
                }
                questions.into_iter().map(Ok).collect()
            }
        });
        let waited = tokio::time::timeout(Duration::from_millis(100), batches.ask(1)).await;
        assert!(waited.is_err(), "it never answers");
        assert_eq!(
            batches.ask(2).await.ok(),
            Some(2),
            "and does not hold back the next"
        );
        assert_eq!(stopped.load(Ordering::Relaxed), 2);
    }
}
