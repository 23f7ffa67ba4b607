//! How many uploads go at once: fewer when the server is troubled, more while it is quick. Pure.

use std::time::Duration;

/// A server whose answers take this much longer than its best is not given more to do.
const SLOWER: f64 = 2.0;
/// Weight of the newest answer in the running mean.
const WEIGHT: f64 = 0.2;

/// The limit of uploads at once. Grows by one after as many good answers as it is wide, and
/// halves on trouble. SQLite servers get slower beyond five, which the times show.
#[derive(Debug)]
pub(super) struct Pace {
    limit: usize,
    most: usize,
    good: usize,
    /// Seconds, running mean and the best mean seen, of small uploads.
    mean: Option<f64>,
    best: f64,
}

impl Pace {
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

    /// An upload went well. `small`: whether its time says something of the server and not of the line.
    pub(super) fn went_well(&mut self, took: Duration, small: bool) {
        if small {
            let took = took.as_secs_f64();
            let mean = self.mean.map_or(took, |mean| mean + WEIGHT * (took - mean));
            self.mean = Some(mean);
            self.best = self.best.min(mean);
        }
        self.good += 1;
        if self.good < self.limit {
            return;
        }
        self.good = 0;
        if self.mean.is_some_and(|mean| mean > self.best * SLOWER) {
            self.limit = (self.limit - 1).max(1);
        } else {
            self.limit = (self.limit + 1).min(self.most);
        }
    }

    /// The server asked for less, or failed.
    pub(super) fn trouble(&mut self) {
        self.limit = (self.limit / 2).max(1);
        self.good = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grows_while_quick_and_shrinks_on_trouble() {
        let mut pace = Pace::new(4, 8);
        for _ in 0..100 {
            pace.went_well(Duration::from_millis(10), true);
        }
        assert_eq!(pace.limit(), 8);
        pace.trouble();
        assert_eq!(pace.limit(), 4);
        for _ in 0..5 {
            pace.trouble();
        }
        assert_eq!(pace.limit(), 1);
    }

    #[test]
    fn a_server_that_gets_slower_is_given_less() {
        let mut pace = Pace::new(4, 16);
        for _ in 0..10 {
            pace.went_well(Duration::from_millis(10), true);
        }
        let before = pace.limit();
        for _ in 0..200 {
            pace.went_well(Duration::from_millis(80), true);
        }
        assert!(pace.limit() < before, "{} of {before}", pace.limit());
    }
}
