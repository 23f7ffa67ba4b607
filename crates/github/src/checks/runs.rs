//! Which Check Runs there should be, and what each should show. Pure; `board.rs` brings GitHub to it.

use std::fmt::Write as _;

use crate::check_run::{Annotation, CheckRun, Stage};
use crate::checks::board::Aggregate;
use crate::checks::options::Options;
use crate::checks::text::{annotation, summary, title};
use crate::checks::{Conclusion, Output, OutputState, Verdict};
use flywheel_core::text::{count, one_line};

/// Lines of a shared run's list are cut to this many characters; a hundred of them fit GitHub's limit.
const LINE: usize = 500;

/// What a Check Run is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Subject {
    /// All outputs together.
    Aggregate,
    /// The output with this index.
    Output(usize),
    /// The outputs from this index on, which share a Check Run.
    Shared(usize),
}

/// The stage that each Check Run should show now, the most urgent first. `closing`: an output without a verdict counts
/// as cancelled.
pub(super) fn stages(
    outputs: &[(Output, OutputState)],
    announced: bool,
    aggregate: Option<&Aggregate>,
    options: &Options,
    closing: bool,
) -> Vec<(Subject, Stage)> {
    let mut all: Vec<(Subject, Stage)> = Vec::new();
    let of = |n: usize| (Subject::Output(n), stage_of(&outputs[n].1, closing));
    if !announced || outputs.len() <= options.alone {
        all.extend((0..outputs.len()).map(of));
    } else {
        let failed =
            |(_, stage): &(Subject, Stage)| *stage == Stage::Completed(Conclusion::Failure);
        all.extend(
            (0..outputs.len())
                .map(of)
                .filter(failed)
                .take(options.failures),
        );
        let firsts = (0..outputs.len()).step_by(options.shared.max(1));
        all.extend(firsts.map(|first| {
            let part = part(first, outputs, options);
            (
                Subject::Shared(first),
                stage_of_part(&ends(part, closing), part.len()),
            )
        }));
    }
    // When requests run short, people need failures first, then other results, then progress.
    all.sort_by_key(|(_, stage)| match stage {
        Stage::Completed(Conclusion::Failure) => 0,
        Stage::Completed(_) => 1,
        Stage::InProgress => 2,
        Stage::Queued => 3,
    });
    match aggregate {
        Some(aggregate) => all.push((Subject::Aggregate, Stage::Completed(aggregate.conclusion))),
        None => all.insert(0, (Subject::Aggregate, Stage::InProgress)),
    }
    all
}

/// The content that a Check Run should show now.
pub(super) fn render(
    subject: Subject,
    outputs: &[(Output, OutputState)],
    aggregate: Option<&Aggregate>,
    options: &Options,
    closing: bool,
) -> CheckRun {
    match subject {
        Subject::Aggregate => render_aggregate(outputs, aggregate, options),
        Subject::Output(n) => render_output(n, outputs, options, closing),
        Subject::Shared(first) => render_shared(first, outputs, options, closing),
    }
}

/// The name of a Check Run, as people see it.
pub(super) fn name(
    subject: Subject,
    outputs: &[(Output, OutputState)],
    options: &Options,
) -> String {
    match subject {
        Subject::Aggregate => options.name.clone(),
        Subject::Output(n) => one_line(&outputs[n].0.label, 200),
        Subject::Shared(first) => {
            format!(
                "{} ({}–{})",
                options.name,
                first + 1,
                (first + options.shared).min(outputs.len())
            )
        }
    }
}

fn stage_of(state: &OutputState, closing: bool) -> Stage {
    match state {
        OutputState::Finished(verdict) => Stage::Completed(verdict.conclusion()),
        _ if closing => Stage::Completed(Conclusion::Cancelled),
        OutputState::Queued => Stage::Queued,
        OutputState::Evaluating | OutputState::Building => Stage::InProgress,
    }
}

fn part<'a>(
    first: usize,
    outputs: &'a [(Output, OutputState)],
    options: &Options,
) -> &'a [(Output, OutputState)] {
    &outputs[first..(first + options.shared).min(outputs.len())]
}

fn ends(part: &[(Output, OutputState)], closing: bool) -> Vec<Conclusion> {
    let end = |(_, state): &(Output, OutputState)| match state {
        OutputState::Finished(verdict) => Some(verdict.conclusion()),
        _ => closing.then_some(Conclusion::Cancelled),
    };
    part.iter().filter_map(end).collect()
}

/// The order in which a shared run takes its conclusion from its outputs: the worst first.
const WORST: [Conclusion; 4] = [
    Conclusion::Failure,
    Conclusion::Cancelled,
    Conclusion::Success,
    Conclusion::Neutral,
];

fn stage_of_part(ends: &[Conclusion], outputs: usize) -> Stage {
    let worst = WORST
        .into_iter()
        .find(|conclusion| ends.contains(conclusion))
        .unwrap_or(Conclusion::Success);
    if ends.len() == outputs {
        Stage::Completed(worst)
    } else {
        Stage::InProgress
    }
}

/// Our identifier of a Check Run, which is the same on every attempt of a job, so that the run is found again.
pub(super) fn external_id(
    subject: Subject,
    outputs: &[(Output, OutputState)],
    options: &Options,
) -> String {
    match subject {
        Subject::Aggregate => options.scope.clone(),
        Subject::Output(n) => format!("{}/{}", options.scope, outputs[n].0.label),
        Subject::Shared(first) => format!("{}#{first}", options.scope),
    }
}

fn render_aggregate(
    outputs: &[(Output, OutputState)],
    aggregate: Option<&Aggregate>,
    options: &Options,
) -> CheckRun {
    let ended = outputs
        .iter()
        .filter(|(_, state)| matches!(state, OutputState::Finished(_)))
        .count();
    let (stage, title, summary) = match aggregate {
        Some(aggregate) => (
            Stage::Completed(aggregate.conclusion),
            aggregate.title.clone(),
            aggregate.summary.clone(),
        ),
        None => (
            Stage::InProgress,
            "Evaluating and building".to_owned(),
            format!(
                "{ended} of {} have ended.",
                count(outputs.len() as u64, "output")
            ),
        ),
    };
    CheckRun {
        name: options.name.clone(),
        external_id: external_id(Subject::Aggregate, outputs, options),
        stage,
        started_at: None,
        completed_at: None,
        title,
        summary,
        annotations: Vec::new(),
    }
}

fn render_output(
    n: usize,
    outputs: &[(Output, OutputState)],
    options: &Options,
    closing: bool,
) -> CheckRun {
    let (output, state) = &outputs[n];
    let blank = CheckRun {
        name: name(Subject::Output(n), outputs, options),
        external_id: external_id(Subject::Output(n), outputs, options),
        stage: Stage::Queued,
        started_at: None,
        completed_at: None,
        title: "Waiting".to_owned(),
        summary: format!("`{}`", output.attribute.replace('`', "'")),
        annotations: Vec::new(),
    };
    let stage = stage_of(state, closing);
    match state {
        OutputState::Finished(verdict) => CheckRun {
            stage,
            started_at: Some(verdict.started_at_ms / 1000),
            completed_at: Some(verdict.started_at_ms / 1000 + verdict.took.as_secs()),
            title: title(verdict),
            summary: summary(output, verdict),
            annotations: annotations_of(verdict),
            ..blank
        },
        _ if closing => CheckRun {
            stage,
            title: "Cancelled".to_owned(),
            ..blank
        },
        OutputState::Queued => blank,
        OutputState::Evaluating => CheckRun {
            stage,
            title: "Evaluating".to_owned(),
            ..blank
        },
        OutputState::Building => CheckRun {
            stage,
            title: "Building".to_owned(),
            ..blank
        },
    }
}

fn render_shared(
    first: usize,
    outputs: &[(Output, OutputState)],
    options: &Options,
    closing: bool,
) -> CheckRun {
    let part = part(first, outputs, options);
    let ends = ends(part, closing);
    let stage = stage_of_part(&ends, part.len());
    let of = |conclusion: Conclusion| ends.iter().filter(|end| **end == conclusion).count();
    let counts = WORST
        .iter()
        .filter(|one| of(**one) > 0)
        .map(|one| format!("{} {}", of(*one), as_str(*one)));
    let counts: Vec<String> = counts.collect();
    let mut text = format!(
        "{} of {}.\n\n",
        part.len(),
        count(outputs.len() as u64, "output")
    );
    for (output, state) in part {
        let verdict_text = match state {
            OutputState::Finished(verdict) => {
                format!("{}: {}", as_str(verdict.conclusion()), title(verdict))
            }
            _ if closing => as_str(Conclusion::Cancelled).to_owned(),
            _ => "…".to_owned(),
        };
        let line = one_line(&format!("{}: {verdict_text}", output.label), LINE).replace('`', "'");
        // Writing to a `String` cannot fail.
        let _ = writeln!(text, "- `{line}`");
    }
    CheckRun {
        name: name(Subject::Shared(first), outputs, options),
        external_id: external_id(Subject::Shared(first), outputs, options),
        stage,
        started_at: None,
        completed_at: None,
        title: if stage.is_completed() {
            counts.join(", ")
        } else {
            "Evaluating and building".to_owned()
        },
        summary: text,
        annotations: Vec::new(),
    }
}

fn annotations_of(verdict: &Verdict) -> Vec<Annotation> {
    let location = verdict.cause.location();
    let mark = location
        .zip(annotation(verdict))
        .map(|(location, message)| Annotation {
            path: location.file.clone(),
            start_line: location.line,
            end_line: location.line,
            annotation_level: "failure",
            title: title(verdict),
            message,
        });
    mark.into_iter().collect()
}

/// A conclusion, as people read it.
pub(crate) fn as_str(conclusion: Conclusion) -> &'static str {
    match conclusion {
        Conclusion::Success => "success",
        Conclusion::Failure => "failure",
        Conclusion::Neutral => "already there",
        Conclusion::Cancelled => "cancelled",
    }
}
