//! When derivations are built: in two lanes, each a single `nix build` of many derivations, so that Nix builds once
//! what they have in common. The first lane starts with the first derivation; the second takes those that arrive while
//! the first runs. Pure: the engine starts and ends what is decided here.

use std::time::Duration;

/// The second lane waits for the end of the evaluation, for this many outputs, or this long.
const ENOUGH_OUTPUTS: usize = 50;
const LONG_ENOUGH: Duration = Duration::from_secs(10);

/// The largest number of outputs in one lane: whenever a build ends, Nix goes through all of them.
pub(super) const MAX_OUTPUTS: usize = 256;

/// How many of the waiting outputs the next lane takes, given how many each may have in its lane.
pub(super) fn size(limits: impl Iterator<Item = usize>) -> usize {
    let (mut size, mut limit) = (0, MAX_OUTPUTS);
    for next in limits {
        limit = limit.min(next.max(1));
        if size >= limit {
            break;
        }
        size += 1;
    }
    size
}

/// What decides whether a free lane starts.
#[derive(Clone, Copy, Debug)]
pub(super) struct LaneState {
    /// Outputs that wait to be built.
    pub(crate) waiting: usize,
    /// Whether all derivations are known.
    pub(crate) all_known: bool,
    /// How many builds at once the other lane was given, if it runs; `Some(None)` is Nix's own setting.
    pub(crate) other: Option<Option<usize>>,
    /// How long the other lane has been running.
    pub(crate) running: Duration,
    /// Whether a derivation is addressed by its content, or needs one that is. Nix does not keep two processes from
    /// building such a derivation at the same time, and one of them then fails.
    pub(crate) is_content_addressed: bool,
}

/// Whether a lane starts now, and with how many builds at once: `Some(None)` is Nix's own setting.
/// `jobs`: what both may have together, if that was asked for.
pub(super) fn start(jobs: Option<usize>, state: &LaneState) -> Option<Option<usize>> {
    if state.waiting == 0 {
        return None;
    }
    let Some(other) = state.other else {
        // As long as more derivations may come, half of the builds is left for the second lane.
        return Some(jobs.map(|jobs| {
            if state.all_known {
                jobs
            } else {
                jobs.div_ceil(2)
            }
        }));
    };
    if state.is_content_addressed {
        return None;
    }
    if !(state.all_known || state.waiting >= ENOUGH_OUTPUTS || state.running >= LONG_ENOUGH) {
        return None;
    }
    match (jobs, other) {
        (None, _) => Some(None),
        // `max-jobs = 0` means that remote builders build everything, and these have limits of their own.
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
        is_content_addressed: false,
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
    fn a_lane_is_as_small_as_each_of_its_outputs_needs() {
        let size = |limits: &[usize]| size(limits.iter().copied());
        assert_eq!(size(&[MAX_OUTPUTS; 300]), MAX_OUTPUTS);
        assert_eq!(size(&[4, 4, 4, 4, 4, 4]), 4);
        assert_eq!(size(&[256, 256, 1, 256]), 2);
        assert_eq!((size(&[1, 256]), size(&[0]), size(&[])), (1, 1, 0));
    }

    #[test]
    fn what_is_addressed_by_its_content_is_built_in_one_lane() {
        let alone = LaneState {
            all_known: true,
            is_content_addressed: true,
            ..QUIET
        };
        let beside = LaneState {
            other: Some(None),
            ..alone
        };
        assert_eq!(
            (start(None, &alone), start(None, &beside)),
            (Some(None), None)
        );
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
                waiting: ENOUGH_OUTPUTS,
                ..beside
            },
            LaneState {
                running: LONG_ENOUGH,
                ..beside
            },
        ] {
            assert_eq!(start(None, &reason), Some(None), "{reason:?}");
        }
    }
}
