//! What `flywheel publish` prints: notes while it works, and at its end a report as text or as JSON.

use std::time::Duration;

use serde::Serialize;

use crate::command::inputs::Format;
use crate::progress::{Progress, Sink};
use crate::report::publication::{Key, Missed, Publication};
use crate::runner::workflow::{Level, Workflow, data};
use crate::text;

/// So many paths are named in text; JSON has them all.
const NAMED: usize = 20;

/// Notes are log lines, what is degraded is a warning.
pub(super) fn sink(workflow: &Workflow) -> Sink {
    let workflow = workflow.clone();
    Sink::new(move |event| match event {
        Progress::Note(text) => workflow.say(&text),
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
    skipped: u64,
    verified: u64,
    unverified: usize,
    withheld: usize,
    lost: usize,
    bytes: u64,
    /// `given`, `announced` or `unknown`.
    key: &'static str,
    stopped: Option<&'a str>,
    withheld_paths: &'a [Missed],
    lost_paths: &'a [Missed],
    unverified_paths: &'a [Missed],
}

/// Tells the end of a publication of `offered` paths that took this long, and whether anything is lost.
pub(super) fn close(
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
            skipped: publication.skipped,
            verified: publication.verified,
            unverified: publication.unverified.len(),
            withheld: publication.withheld.len(),
            lost: publication.lost.len(),
            bytes: publication.bytes,
            key: publication.key.word(),
            stopped: publication.stopped.as_deref(),
            withheld_paths: &publication.withheld,
            lost_paths: &publication.lost,
            unverified_paths: &publication.unverified,
        };
        data(&serde_json::to_string_pretty(&report).expect("texts and numbers are always JSON"));
        return is_lost;
    }
    name(workflow, Level::Warning, "withheld", &publication.withheld);
    name(workflow, Level::Warning, "policy", &publication.warned);
    name(workflow, Level::Error, "lost", &publication.lost);
    name(
        workflow,
        Level::Warning,
        "unverified",
        &publication.unverified,
    );
    match publication.key {
        Key::Given => (),
        _ if offered == 0 => (),
        Key::Announced => {
            workflow.say(
                "signatures were checked with the key that the cache itself announces: no `attic-public-key` is given",
            );
        }
        Key::Unknown => {
            workflow.say("no signature was checked: no `attic-public-key` is given, and the cache announces none");
        }
    }
    let (sent, took) = (text::bytes(publication.bytes), text::duration(elapsed));
    workflow.say(&format!("{publication} ({sent} sent in {took})"));
    is_lost
}

fn name(workflow: &Workflow, level: Level, title: &str, paths: &[Missed]) {
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
