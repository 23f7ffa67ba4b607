//! Whether GitHub answers, and when it is asked no more: a GitHub that is away must cost the run neither time nor an
//! endless row of requests. Pure; the clock and the requests are the caller's.

use std::time::Duration;

use tokio::time::Instant;

/// The wait after a failed request doubles up to this many times.
const DOUBLINGS: u32 = 4;

#[derive(Debug)]
pub(super) struct Reachability {
    /// How long no request may have an answer until GitHub counts as away.
    patience: Duration,
    /// The first wait after a request that failed.
    base: Duration,
    /// When the first of the requests was sent that are without an answer.
    unanswered_since: Option<Instant>,
    failures_in_a_row: u32,
    is_away: bool,
}

impl Reachability {
    pub(super) fn new(patience: Duration, base: Duration) -> Self {
        Self {
            patience,
            base,
            unanswered_since: None,
            failures_in_a_row: 0,
            is_away: false,
        }
    }

    pub(super) fn on_request(&mut self, now: Instant) {
        self.unanswered_since.get_or_insert(now);
    }

    /// GitHub answered, whatever it said. `is_read`: the request changed nothing; one that is answered while those that
    /// would change something fail does not count. `is_waiting`: other requests are under way.
    pub(super) fn on_answer(&mut self, now: Instant, is_read: bool, is_waiting: bool) {
        if is_read && self.failures_in_a_row > 0 {
            return;
        }
        self.unanswered_since = is_waiting.then_some(now);
        self.failures_in_a_row = 0;
        self.is_away = false;
    }

    /// A request failed without an answer of GitHub's own. Returns how long to wait before the next one.
    pub(super) fn on_failure(&mut self) -> Duration {
        let doublings = self.failures_in_a_row.min(DOUBLINGS);
        self.failures_in_a_row += 1;
        self.base.saturating_mul(1 << doublings)
    }

    /// When GitHub counts as away, unless it answers until then; `None` while nothing is unanswered, and after that.
    pub(super) fn away_at(&self) -> Option<Instant> {
        let since = self.unanswered_since.filter(|_| !self.is_away)?;
        Some(since + self.patience)
    }

    /// Counts GitHub as away from now on, until it answers again.
    pub(super) fn set_away(&mut self) {
        self.is_away = true;
    }

    pub(super) fn is_away(&self) -> bool {
        self.is_away
    }

    /// Whether the last request that counts had no answer.
    pub(super) fn is_failing(&self) -> bool {
        self.is_away || self.failures_in_a_row > 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(30);
    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn github_is_away_once_nothing_was_answered_for_so_long() {
        let began = Instant::now();
        let mut reachability = Reachability::new(PATIENCE, SECOND);
        assert_eq!(reachability.away_at(), None);
        reachability.on_request(began);
        reachability.on_request(began + 20 * SECOND);
        assert_eq!(reachability.away_at(), Some(began + PATIENCE));
        // Of two requests one was answered: the other has waited for no longer than that.
        reachability.on_answer(began + 25 * SECOND, false, true);
        assert_eq!(reachability.away_at(), Some(began + 55 * SECOND));
        reachability.on_answer(began + 26 * SECOND, true, false);
        assert_eq!(reachability.away_at(), None, "it is waited for nothing");
    }

    #[test]
    fn waits_double_up_to_a_bound_and_begin_anew_with_an_answer() {
        let mut reachability = Reachability::new(PATIENCE, SECOND);
        let waits: Vec<u64> = (0..7)
            .map(|_| reachability.on_failure().as_secs())
            .collect();
        assert_eq!(waits, [1, 2, 4, 8, 16, 16, 16]);
        assert!(reachability.is_failing());
        reachability.set_away();
        // It still shows what there is, and takes nothing new.
        reachability.on_answer(Instant::now(), true, false);
        assert!(reachability.is_away());
        reachability.on_answer(Instant::now(), false, false);
        assert!(!reachability.is_failing());
        assert_eq!(
            (reachability.on_failure(), reachability.is_away()),
            (SECOND, false)
        );
    }
}
