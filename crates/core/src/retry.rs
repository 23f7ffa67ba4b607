//! Retry policies as data. This module owns the waiting times; whether to retry is decided where the failure is known.

use std::time::Duration;

/// How often something is tried, and how long the waits between are.
#[derive(Clone, Copy, Debug)]
pub struct Policy {
    /// All tries, including the first one.
    pub attempts: u32,
    /// The upper bound of the wait before the second try; it doubles from there.
    pub base: Duration,
    /// The longest wait, whatever `Retry-After` requests.
    pub cap: Duration,
}

impl Policy {
    /// For requests to a cache: five tries, 0.5 s to 30 s of full jitter.
    pub const CACHE: Self = Self {
        attempts: 5,
        base: Duration::from_millis(500),
        cap: Duration::from_secs(30),
    };

    /// The wait before try number `attempt + 1`, after `attempt` failed tries (1 or more): with full jitter, or
    /// `retry_after` if that is longer. `None` when no try is left.
    pub fn wait(&self, attempt: u32, retry_after: Option<Duration>) -> Option<Duration> {
        if attempt >= self.attempts {
            return None;
        }
        // The exponent is limited only to keep the shift in range; `cap` limits the wait long before.
        let ceiling = self
            .base
            .saturating_mul(1 << (attempt.saturating_sub(1)).min(16))
            .min(self.cap);
        // Full jitter: clients that failed at the same moment do not return at the same moment.
        let jittered = ceiling.mul_f64(fastrand::f64());
        Some(retry_after.unwrap_or_default().max(jittered).min(self.cap))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_within_their_bounds_and_end() {
        let policy = Policy {
            attempts: 4,
            base: Duration::from_secs(1),
            cap: Duration::from_secs(3),
        };
        for _ in 0..100 {
            assert!(policy.wait(1, None).expect("a try is left") <= Duration::from_secs(1));
            assert!(policy.wait(3, None).expect("a try is left") <= Duration::from_secs(3));
        }
        assert_eq!(policy.wait(4, None), None);
    }

    #[test]
    fn retry_after_is_honoured_up_to_the_cap() {
        let policy = Policy {
            attempts: 4,
            base: Duration::ZERO,
            cap: Duration::from_secs(3),
        };
        assert_eq!(
            policy.wait(1, Some(Duration::from_secs(2))),
            Some(Duration::from_secs(2))
        );
        assert_eq!(
            policy.wait(1, Some(Duration::from_secs(60))),
            Some(Duration::from_secs(3))
        );
    }
}
