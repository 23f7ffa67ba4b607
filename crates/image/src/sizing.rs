//! Decides how large a runner a build gets. The first of three sources that knows wins: what the context asks for, what
//! earlier runs used, what the language usually needs. Pure; a decision carries its reasons and its alternatives.

mod cost;
mod percentile;

use serde::Serialize;

pub use self::cost::Choice;
use crate::build_spec::BuildSpec;
use crate::history::{Approval, Run};
use crate::language::Language;
use crate::size::{Need, NoSize, Size, SizeTable, Target};

/// How often a build is tried again after it ran out of memory. A second time means that a setting is wrong.
pub const MAX_OOM_RETRIES: u32 = 1;
/// With fewer runs, history says nothing.
pub const LEAST_SAMPLES: usize = 5;
/// No build gets less by its history.
pub const FLOOR: Need = Need {
    cpu: 2,
    memory_gb: 4,
};
/// What is added to what was used.
const MARGIN: f64 = 1.2;
/// Keeps a product that is whole but for its rounding error, such as 1.2 × 35, from the next number.
const EPSILON: f64 = 1e-9;

/// How history becomes a size.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Policy {
    /// The 95th percentile of what was used, and a fifth more.
    #[default]
    P95,
    /// The size that would have cost the least on the history, with the retries that it would have needed.
    ExpectedCost,
}

impl Policy {
    /// Every policy, by its name.
    pub const ALL: [(&str, Self); 2] = [("p95", Self::P95), ("expected-cost", Self::ExpectedCost)];
}

/// What is known of a build.
#[derive(Clone, Debug)]
pub struct Known<'a> {
    /// What the context asks for, and the file that says it.
    pub spec: Option<(&'a str, &'a BuildSpec)>,
    /// The runs that are alike, the oldest first.
    pub runs: &'a [&'a Run],
    pub approval: Option<&'a Approval>,
    pub language: Language,
    /// The file that shows the language.
    pub marker: Option<&'a str>,
}

/// The source that decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    Explicit,
    History,
    Language,
}

impl Source {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Explicit => "explicit",
            Self::History => "history",
            Self::Language => "language",
        }
    }
}

/// What a build gets, and why.
#[derive(Clone, Debug, PartialEq)]
pub struct Decision {
    pub source: Source,
    pub need: Need,
    /// The size, or why there is none.
    pub size: Result<Size, NoSize>,
    /// The minutes after which the build is ended.
    pub time_budget_min: u32,
    /// Why this source decided, as a fragment.
    pub reason: String,
    /// What history would have asked for, if it was not the source.
    pub advice: Option<String>,
    /// What each size would have cost on the history; none without enough of it.
    pub choices: Vec<Choice>,
}

/// Decides.
pub fn decide(table: &SizeTable, target: Target, policy: Policy, known: &Known) -> Decision {
    let (guess, minutes) = known.language.needs();
    let spec = known.spec.map(|(_, spec)| spec);
    let time_budget_min = spec
        .and_then(|spec| spec.time_budget_min)
        .unwrap_or(minutes);
    let history = from_history(table, target, policy, known);
    let choices = cost::choices(table, target, known.runs);
    let decision = |source, need, size, reason, advice| Decision {
        source,
        need,
        size,
        time_budget_min,
        reason,
        advice,
        choices,
    };
    if let Some((need, size, reason)) = explicit(table, target, known) {
        let advice = Some(history.map_or_else(|silent| silent, |asked| asked.reason));
        return decision(Source::Explicit, need, size, reason, advice);
    }
    match history {
        Ok(asked) => decision(
            Source::History,
            asked.need,
            table.smallest(asked.need, target).cloned(),
            asked.reason,
            None,
        ),
        Err(silent) => {
            let reason = match known.marker {
                Some(marker) => format!("`{marker}` means {}", known.language.as_str()),
                None => "no file shows a language that is known here".into(),
            };
            let size = table.smallest(guess, target).cloned();
            decision(Source::Language, guess, size, reason, Some(silent))
        }
    }
}

/// What the context asks for: a size, or a need.
fn explicit(
    table: &SizeTable,
    target: Target,
    known: &Known,
) -> Option<(Need, Result<Size, NoSize>, String)> {
    let (file, spec) = known.spec?;
    if let Some(name) = &spec.runner_type {
        let size = table.named(name, target).cloned();
        let need = size.as_ref().map_or(FLOOR, |size| Need {
            cpu: size.cpu,
            memory_gb: size.memory_gb,
        });
        return Some((need, size, format!("`{file}` names `{name}`")));
    }
    let need = Need {
        cpu: spec.cpu?,
        memory_gb: whole(spec.memory_gb?),
    };
    let size = table.smallest(need, target).cloned();
    Some((need, size, format!("`{file}` asks for {need}")))
}

/// What history asks for.
struct Asked {
    need: Need,
    reason: String,
}

/// What history asks for, or why it does not decide.
fn from_history(
    table: &SizeTable,
    target: Target,
    policy: Policy,
    known: &Known,
) -> Result<Asked, String> {
    let count = known.runs.len();
    if count < LEAST_SAMPLES {
        return Err(format!(
            "history has {count} runs that are alike, and {LEAST_SAMPLES} are needed"
        ));
    }
    let (need, reason) = match policy {
        Policy::P95 => by_percentile(known.runs),
        Policy::ExpectedCost => by_cost(table, target, known),
    };
    let Some(approval) = known.approval else {
        return Err(format!(
            "{reason}; that is advice until `flywheel image sizing approve` allows it"
        ));
    };
    let most = approval.need();
    let capped = Need {
        cpu: need.cpu.min(most.cpu),
        memory_gb: need.memory_gb.min(most.memory_gb),
    };
    let reason = if capped == need {
        reason
    } else {
        format!("{reason}; at most {most} is approved")
    };
    Ok(Asked {
        need: capped,
        reason,
    })
}

/// What the 95th percentile of these runs asks for, and the sentence about it.
pub fn by_percentile(runs: &[&Run]) -> (Need, String) {
    let cpu = percentile::p95(runs, |run| run.cpu_p95);
    let memory = percentile::p95(runs, percentile::memory_needed);
    let need = Need {
        cpu: whole(cpu * MARGIN).max(FLOOR.cpu),
        memory_gb: whole(memory * MARGIN).max(FLOOR.memory_gb),
    };
    let reason = format!(
        "P95 of {} runs is {cpu:.1} CPU, {memory:.1} GB; with a fifth more, rounded up, and at least {FLOOR}: {need}",
        runs.len()
    );
    (need, reason)
}

/// The size with the least expected cost, as a need. Without a size for the target the percentile decides.
fn by_cost(table: &SizeTable, target: Target, known: &Known) -> (Need, String) {
    let choices = cost::choices(table, target, known.runs);
    let cheapest = choices
        .iter()
        .filter(|choice| choice.need.cpu >= FLOOR.cpu && choice.need.memory_gb >= FLOOR.memory_gb)
        .min_by(|a, b| a.cost.total_cmp(&b.cost));
    match cheapest {
        Some(choice) => (
            choice.need,
            format!(
                "`{}` would have cost the least on {} runs, {:.0} % of which it would have run twice",
                choice.size,
                known.runs.len(),
                choice.retried * 100.0
            ),
        ),
        None => by_percentile(known.runs),
    }
}

/// A number rounded up.
fn whole(number: f64) -> u32 {
    // A float beyond the range becomes its end.
    (number - EPSILON).ceil() as u32
}

#[cfg(test)]
mod tests;
