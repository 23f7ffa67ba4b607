//! The 95th percentile of what runs used, where an older run counts for less.

use crate::history::Run;

/// After this many builds, a run counts half.
const HALF_LIFE_BUILDS: f64 = 25.0;
const RANK: f64 = 0.95;
/// Sums of weights are not exact.
const EPSILON: f64 = 1e-9;
/// What a run that ran out of memory is taken to have needed beyond its limit: a fifth, or this many GB if that is more.
const LEAST_MORE_GB: f64 = 0.1;
const MORE: f64 = 1.2;

/// How much each of the runs counts, the oldest first.
pub(super) fn weights(count: usize) -> impl Iterator<Item = f64> {
    (0..count)
        .rev()
        .map(|age| 0.5_f64.powf(age as f64 / HALF_LIFE_BUILDS))
}

/// The memory in GB that a run needed. Of one that ran out of memory only a lower bound is known: more than its limit.
pub(super) fn memory_needed(run: &Run) -> f64 {
    if run.ran_out_of_memory {
        (run.mem_p95 + LEAST_MORE_GB).max(run.mem_p95 * MORE)
    } else {
        run.mem_p95
    }
}

/// The 95th percentile by nearest rank: the smallest value that 95 % of the weight does not exceed. Zero without runs.
pub(super) fn p95(runs: &[&Run], value: impl Fn(&Run) -> f64) -> f64 {
    let mut weighted: Vec<(f64, f64)> = runs
        .iter()
        .map(|run| value(run))
        .zip(weights(runs.len()))
        .collect();
    weighted.sort_by(|a, b| a.0.total_cmp(&b.0));
    let total: f64 = weighted.iter().map(|(_, weight)| weight).sum();
    let mut below = 0.0;
    for (value, weight) in &weighted {
        below += weight;
        if below + EPSILON >= RANK * total {
            return *value;
        }
    }
    0.0
}
