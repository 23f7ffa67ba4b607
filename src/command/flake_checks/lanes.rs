//! When which derivations are built: in two lanes, each one `nix build` over many, so that Nix shares what they
//! have in common. The first starts with the first derivation; the second takes what has come meanwhile.
//! Pure: the engine starts and ends what is decided here.

use std::time::Duration;

/// The second lane waits for the end of the evaluation, for so many outputs, or so long.
const MANY: usize = 50;
const LONG: Duration = Duration::from_secs(10);

/// Outputs in one lane at most: each costs Nix a look at every other when a build ends.
pub(super) const MOST: usize = 256;

/// What is known when a lane is free.
#[derive(Clone, Copy, Debug)]
pub(super) struct LaneState {
    /// Outputs that wait to be built.
    pub waiting: usize,
    /// Whether all derivations are known.
    pub all_known: bool,
    /// What the other lane has of the builds at once, if it runs: `Some(None)` is Nix's own setting.
    pub other: Option<Option<usize>>,
    /// How long the other lane has been running.
    pub running: Duration,
}

/// Whether a lane starts now, and with how many builds at once: `Some(None)` is Nix's own setting.
/// `jobs`: what both may have together, if that was asked for.
pub(super) fn start(jobs: Option<usize>, moment: &LaneState) -> Option<Option<usize>> {
    if moment.waiting == 0 {
        return None;
    }
    let Some(other) = moment.other else {
        // Alone; half is left for the second lane, while there may be a use for it.
        return Some(jobs.map(|jobs| {
            if moment.all_known {
                jobs
            } else {
                jobs.div_ceil(2)
            }
        }));
    };
    if !(moment.all_known || moment.waiting >= MANY || moment.running >= LONG) {
        return None;
    }
    match (jobs, other) {
        (None, _) => Some(None),
        // No builds here at all: remote builders do everything, and have bounds of their own.
        (Some(0), _) => Some(Some(0)),
        (Some(jobs), other) => Some(jobs.saturating_sub(other.unwrap_or(jobs)))
            .filter(|left| *left > 0)
            .map(Some),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUIET: LaneState = LaneState {
        waiting: 3,
        all_known: false,
        other: None,
        running: Duration::ZERO,
    };

    #[test]
    fn the_first_lane_starts_at_once() {
        assert_eq!(start(None, &QUIET), Some(None));
        assert_eq!(start(Some(5), &QUIET), Some(Some(3)));
        assert_eq!(
            start(
                Some(5),
                &LaneState {
                    all_known: true,
                    ..QUIET
                }
            ),
            Some(Some(5))
        );
        assert_eq!(
            start(
                None,
                &LaneState {
                    waiting: 0,
                    ..QUIET
                }
            ),
            None
        );
    }

    #[test]
    fn both_lanes_together_keep_to_what_was_asked_for() {
        for jobs in 1..=64 {
            let first = start(Some(jobs), &QUIET).flatten().expect("starts");
            let second = start(
                Some(jobs),
                &LaneState {
                    all_known: true,
                    other: Some(Some(first)),
                    ..QUIET
                },
            );
            assert_eq!(first + second.flatten().unwrap_or(0), jobs);
        }
    }

    #[test]
    fn the_second_lane_waits_for_a_reason() {
        let beside = LaneState {
            other: Some(None),
            ..QUIET
        };
        assert_eq!(start(None, &beside), None);
        for reason in [
            LaneState {
                all_known: true,
                ..beside
            },
            LaneState {
                waiting: MANY,
                ..beside
            },
            LaneState {
                running: LONG,
                ..beside
            },
        ] {
            assert_eq!(start(None, &reason), Some(None), "{reason:?}");
        }
    }
}
