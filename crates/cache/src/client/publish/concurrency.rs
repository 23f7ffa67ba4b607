//! The limit of concurrent uploads: it falls on errors and rises while the server is fast. Pure.

use std::time::Duration;

/// When the mean duration exceeds the best mean by this factor, the limit falls instead of rising.
const SLOWER: f64 = 2.0;
/// The weight of the newest upload in the running mean.
const WEIGHT: f64 = 0.2;

/// Additive increase, multiplicative decrease: after as many successes as the limit it rises by one, and an error
/// halves it. Servers on SQLite get slower beyond five concurrent uploads; the durations show it, and the limit falls.
#[derive(Debug)]
pub(super) struct ConcurrencyLimit {
    limit: usize,
    most: usize,
    /// Successes since the last change of the limit.
    good: usize,
    /// The running mean of the durations of small uploads, in seconds.
    mean: Option<f64>,
    /// The best mean so far, in seconds.
    best: f64,
}

impl ConcurrencyLimit {
    pub(super) fn new(start: usize, most: usize) -> Self {
        Self {
            limit: start.clamp(1, most.max(1)),
            most: most.max(1),
            good: 0,
            mean: None,
            best: f64::INFINITY,
        }
    }

    pub(super) fn limit(&self) -> usize {
        self.limit
    }

    /// `small`: whether the duration depends on the server rather than on the bandwidth.
    pub(super) fn on_success(&mut self, took: Duration, small: bool) {
        if small {
            let took = took.as_secs_f64();
            let mean = self.mean.map_or(took, |mean| mean + WEIGHT * (took - mean));
            self.mean = Some(mean);
            self.best = self.best.min(mean);
        }
        self.good += 1;
        // The limit changes once in a round, that is, when every slot has been used about once.
        if self.good < self.limit {
            return;
        }
        self.good = 0;
        // Much slower than at its best, the server is saturated, although nothing fails.
        if self.mean.is_some_and(|mean| mean > self.best * SLOWER) {
            self.limit = (self.limit - 1).max(1);
        } else {
            self.limit = (self.limit + 1).min(self.most);
        }
    }

    /// The server failed, or asked for fewer requests.
    pub(super) fn on_error(&mut self) {
        self.limit = (self.limit / 2).max(1);
        self.good = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grows_while_fast_and_shrinks_on_errors() {
        let mut concurrency = ConcurrencyLimit::new(4, 8);
        for _ in 0..100 {
            concurrency.on_success(Duration::from_millis(10), true);
        }
        assert_eq!(concurrency.limit(), 8);
        concurrency.on_error();
        assert_eq!(concurrency.limit(), 4);
        for _ in 0..5 {
            concurrency.on_error();
        }
        assert_eq!(concurrency.limit(), 1);
    }

    #[test]
    fn a_server_that_gets_slower_is_given_less() {
        let mut concurrency = ConcurrencyLimit::new(4, 16);
        for _ in 0..10 {
            concurrency.on_success(Duration::from_millis(10), true);
        }
        let before = concurrency.limit();
        for _ in 0..200 {
            concurrency.on_success(Duration::from_millis(80), true);
        }
        assert!(
            concurrency.limit() < before,
            "{} of {before}",
            concurrency.limit()
        );
    }
}
