//! The output of `flywheel publish`: log lines while it works, and at its end a report as text or as JSON.

use std::time::Duration;

use serde::Serialize;

use crate::inputs::Format;
use crate::report::publication::{KeySource, Missed, Publication};
use flywheel_core::progress::{Progress, Sink};
use flywheel_core::text;
use flywheel_sys::runner::workflow::{Level, Workflow, json_data};

/// How many paths of a kind the text names; JSON names all.
const NAMED: usize = 20;

/// A sink that logs notes, and annotates the step with warnings.
pub(super) fn sink(workflow: &Workflow) -> Sink {
    let workflow = workflow.clone();
    Sink::new(move |event| match event {
        Progress::Note(text) => workflow.log(&text),
        Progress::Degraded { area, text } => workflow.annotate(Level::Warning, area, &text),
        Progress::Moved { .. } => (),
    })
}

/// The stable machine-readable form.
#[derive(Serialize)]
struct Report<'a> {
    offered: u64,
    published: u64,
    already_there: u64,
    repaired: usize,
    skipped: u64,
    verified: u64,
    /// Of how many the bodies were read, too, in words.
    verification: String,
    unverified: usize,
    withheld: usize,
    lost: usize,
    bytes: u64,
    /// `given`, `announced` or `unknown`.
    key: &'static str,
    stopped: Option<&'a str>,
    repaired_paths: &'a [Missed],
    withheld_paths: &'a [Missed],
    lost_paths: &'a [Missed],
    unverified_paths: &'a [Missed],
}

/// Prints the report of a publication of `offered` paths that took `elapsed`. Returns whether a path is lost.
pub(super) fn report(
    workflow: &Workflow,
    format: Format,
    publication: &Publication,
    offered: u64,
    elapsed: Duration,
) -> bool {
    let is_lost = !publication.lost.is_empty();
    if let Format::Json = format {
        let report = Report {
            offered,
            published: publication.published,
            already_there: publication.already_there,
            repaired: publication.repaired.len(),
            skipped: publication.skipped,
            verified: publication.verified,
            verification: publication.coverage.sentence(),
            unverified: publication.unverified.len(),
            withheld: publication.withheld.len(),
            lost: publication.lost.len(),
            bytes: publication.bytes,
            key: publication.key.as_str(),
            stopped: publication.stopped.as_deref(),
            repaired_paths: &publication.repaired,
            withheld_paths: &publication.withheld,
            lost_paths: &publication.lost,
            unverified_paths: &publication.unverified,
        };
        json_data(
            &serde_json::to_string_pretty(&report).expect("texts and numbers are always JSON"),
        );
        return is_lost;
    }
    for (level, title, paths) in [
        (Level::Warning, "withheld", &publication.withheld),
        (Level::Warning, "policy", &publication.warned),
        (Level::Warning, "repaired", &publication.repaired),
        (Level::Error, "lost", &publication.lost),
        (Level::Warning, "unverified", &publication.unverified),
    ] {
        annotate(workflow, level, title, paths);
    }
    match publication.key {
        KeySource::Given => (),
        _ if publication.verified == 0 && publication.coverage.there_read == 0 => (),
        KeySource::Announced => {
            workflow.log(
                "signatures were checked with the key that the cache itself announces: no `attic-public-key` is given",
            );
        }
        KeySource::Unknown => {
            workflow.log("no signature was checked: no `attic-public-key` is given, and the cache announces none");
        }
    }
    workflow.log(&format!(
        "verification: {}",
        publication.coverage.sentence()
    ));
    let (sent, took) = (text::bytes(publication.bytes), text::duration(elapsed));
    workflow.log(&format!("{publication} ({sent} sent in {took})"));
    is_lost
}

fn annotate(workflow: &Workflow, level: Level, title: &str, paths: &[Missed]) {
    if paths.is_empty() {
        return;
    }
    let more = paths.len().saturating_sub(NAMED);
    let mut lines: Vec<String> = paths
        .iter()
        .take(NAMED)
        .map(|missed| format!("{}: {}", missed.path, missed.reason))
        .collect();
    if more > 0 {
        lines.push(format!(
            "and {}; `--format json` names them all",
            text::count(more as u64, "more path")
        ));
    }
    workflow.annotate(level, title, &lines.join("\n"));
}
