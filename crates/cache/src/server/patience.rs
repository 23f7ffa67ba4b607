//! How long a server waits for a peer that sends or takes little. Pure.

use std::time::Duration;

/// A peer that moves nothing for this long has gone.
const LONGEST: Duration = Duration::from_secs(60);
/// In the long run a peer has to move this many bytes in a second. Even a poor connection that many uploads share has
/// several times as many.
const LEAST_RATE: u64 = 1024;

/// The patience that is left for one transfer. Waiting uses it up, and each byte brings some back.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Patience {
    left: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self { left: LONGEST }
    }
}

impl Patience {
    pub(crate) fn left(&self) -> Duration {
        self.left
    }

    pub(crate) fn waited(&mut self, time: Duration) {
        self.left = self.left.saturating_sub(time);
    }

    pub(crate) fn moved(&mut self, bytes: usize) {
        let earned = Duration::from_micros((bytes as u64).saturating_mul(1_000_000 / LEAST_RATE));
        self.left = self.left.saturating_add(earned).min(LONGEST);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The time for which a peer is waited for that moves `bytes` every `seconds`, up to a day.
    fn endured(bytes: usize, seconds: u64) -> u64 {
        let (mut patience, mut total) = (Patience::default(), 0);
        while total < 86_400 && patience.left() >= Duration::from_secs(seconds) {
            patience.waited(Duration::from_secs(seconds));
            patience.moved(bytes);
            total += seconds;
        }
        total
    }

    #[test]
    fn a_trickle_ends_and_a_slow_transfer_goes_on() {
        assert!(endured(1, 50) <= 60);
        assert!(endured(1, 1) <= 61);
        assert!(endured(512, 1) <= 130);
        assert_eq!(endured(1100, 1), 86_400);
        assert_eq!(endured(64 * 1024, 59), 59 * 86_400_u64.div_ceil(59));
    }
}
