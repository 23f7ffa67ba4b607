//! What each size would have cost on the history, with the retries that it would have needed.

use serde::Serialize;

use super::percentile::{memory_needed, weights};
use crate::history::Run;
use crate::size::{Need, Size, SizeTable, Target};

/// The part of its time that a run has gone through when memory runs out.
const SPENT_BEFORE_RUNNING_OUT: f64 = 0.7;

/// A size, and what it would have cost.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Choice {
    pub size: String,
    #[serde(flatten)]
    pub need: Need,
    /// The mean of a build, in the price of an hour.
    pub cost: f64,
    /// The part of the builds that would have run twice, from 0 to 1.
    pub retried: f64,
    /// The part of the builds that would have failed on the second size, too.
    pub failed: f64,
}

/// What each size that the target is built on would have cost, the smallest first. Nothing without runs.
pub(super) fn choices(table: &SizeTable, target: Target, runs: &[&Run]) -> Vec<Choice> {
    if runs.len() < super::LEAST_SAMPLES {
        return Vec::new();
    }
    let sizes = table.for_target(target);
    sizes
        .map(|size| choice(table, target, runs, size))
        .collect()
}

fn choice(table: &SizeTable, target: Target, runs: &[&Run], size: &Size) -> Choice {
    let next = table.next(size, target);
    let largest = table.for_target(target).last().unwrap_or(size);
    let (mut cost, mut retried, mut failed, mut total) = (0.0, 0.0, 0.0, 0.0);
    for (run, weight) in runs.iter().zip(weights(runs.len())) {
        total += weight;
        let fits = |size: &Size| memory_needed(run) <= f64::from(size.memory_gb);
        cost += weight
            * match next {
                _ if fits(size) => price(run, size),
                Some(next) if fits(next) => {
                    retried += weight;
                    SPENT_BEFORE_RUNNING_OUT * price(run, size) + price(run, next)
                }
                next => {
                    // Somebody has to run it once more, and then on the largest.
                    failed += weight;
                    let attempts = [Some(size), next];
                    let spent = attempts.into_iter().flatten();
                    let spent: f64 = spent.map(|size| price(run, size)).sum();
                    SPENT_BEFORE_RUNNING_OUT * spent + price(run, largest)
                }
            };
    }
    let need = Need {
        cpu: size.cpu,
        memory_gb: size.memory_gb,
    };
    Choice {
        size: size.name.clone(),
        need,
        cost: cost / total,
        retried: (retried + failed) / total,
        failed: failed / total,
    }
}

/// What a run costs on a size. With fewer processors than it kept busy, it takes longer.
fn price(run: &Run, size: &Size) -> f64 {
    let slower = (run.cpu_p95 / f64::from(size.cpu)).max(1.0);
    run.minutes / 60.0 * slower * size.price
}
