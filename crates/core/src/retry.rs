//! When to try again, as data. Owns the waiting times; what deserves a retry is decided where the failure is known.

use std::time::Duration;

/// How often and how patiently something is tried.
#[derive(Clone, Copy, Debug)]
pub struct Policy {
    /// Tries in all, the first one included.
    pub attempts: u32,
    /// Upper bound of the wait before the second try; it doubles from there.
    pub base: Duration,
    /// No wait is longer than this, whatever the server asks for.
    pub cap: Duration,
}

impl Policy {
    /// For requests to a cache: five tries, 0.5 s to 30 s of full jitter (`attic-protocol`, section 5).
    pub const CACHE: Self = Self {
        attempts: 5,
        base: Duration::from_millis(500),
        cap: Duration::from_secs(30),
    };

    /// The wait before try number `attempt + 1`, where `attempt` tries (1 or more) have failed:
    /// full jitter, or what the server asked for when that is longer. `None` when no try is left.
    pub fn wait(&self, attempt: u32, retry_after: Option<Duration>) -> Option<Duration> {
        if attempt >= self.attempts {
            return None;
        }
        let ceiling = self
            .base
            .saturating_mul(1 << (attempt.saturating_sub(1)).min(16))
            .min(self.cap);
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
    fn a_server_is_obeyed_up_to_the_cap() {
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
