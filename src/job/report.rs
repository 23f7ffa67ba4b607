//! How a job ends: its result, and the report of it, which another process may print.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::added_paths::AddedPaths;
use super::attach::Cache;
use super::begin::Session;
use super::prepare::Prepared;
use super::rootless;
use crate::report::disk::DiskReport;
use crate::report::job::{CacheState, JobResult, Outcome, Trust, Work};
use crate::report::publication::{Missed, Publication};
use crate::report::{outputs, summary};
use flywheel_core::exit::{Exit, Explain};
use flywheel_nix::tool::Nix;
use flywheel_sys::runner::env::Env;
use flywheel_sys::runner::files::Files;
use flywheel_sys::runner::workflow::{Level, Workflow};

/// So many failed builds are annotated; GitHub shows ten annotations of a step.
const FAILED_BUILDS: usize = 5;

impl Session<'_> {
    /// Whether everything that was to be published was.
    pub(crate) fn is_whole(&self, publication: Option<&Publication>) -> bool {
        // A job that the gate refused was asked to publish, so nothing published is a loss there too.
        let asked = self.decision.is_refused() || self.decision.publishes();
        publication.map_or(!asked, Publication::is_whole)
    }

    /// The result of a job that ended well. Its times and its memory are left empty, for the verb to fill in.
    /// `require_publish`: whether a loss fails the step.
    pub(crate) fn result(
        &self,
        prepared: &Prepared,
        added_paths: &AddedPaths,
        publication: Option<Publication>,
        require_publish: bool,
    ) -> JobResult {
        let outcome = self.outcome(publication.as_ref(), require_publish);
        JobResult {
            work: Work::Command,
            outcome,
            exit_code: u8::from(outcome != Outcome::Success),
            nix: nix_line(&prepared.ready.nix),
            trust: Trust {
                verdict: self.decision.verdict().as_str(),
                publishes: self.decision.publishes(),
                attic: self.decision.plan().attic.as_str(),
                flakehub: self.decision.plan().flakehub.as_str(),
                reason: self.decision.reason(),
            },
            cache: prepared.cache.address(),
            cache_state: prepared.cache.state.clone(),
            degraded: self.screen.degraded(),
            failed_builds: Vec::new(),
            built: added_paths.built,
            substituted: added_paths.substituted,
            added: added_paths.added,
            not_watched: self.not_watched(),
            publication,
            store: with_remark(added_paths.store.clone()),
            unpublished: self.unpublished(&prepared.cache),
            bootstrap: prepared.took,
            bootstrap_parts: prepared.bootstrap_parts(),
            command: Duration::ZERO,
            publish: Duration::ZERO,
            peak: None,
            limit: None,
            out_of_memory: None,
            heavy_lane: None,
            disk: DiskReport::default(),
        }
    }

    fn outcome(&self, publication: Option<&Publication>, require_publish: bool) -> Outcome {
        let withholds = publication.is_some_and(|found| !found.withheld.is_empty());
        if require_publish && !(self.is_whole(publication) && self.not_watched().is_empty()) {
            Outcome::NotPublished
        } else if self.plan.policy.fails && withholds {
            Outcome::Withheld
        } else {
            Outcome::Success
        }
    }

    /// Why nothing is published, where nothing is.
    fn unpublished(&self, cache: &Cache) -> String {
        match (self.decision.publishes(), &cache.state) {
            (true, CacheState::NotNamed) => "no cache is named (`attic-server`)".to_owned(),
            (true, CacheState::Off) => "the cache is switched off (`attic-enabled`)".to_owned(),
            (true, _) if cache.skipped.is_some() => {
                format!(
                    "publication was skipped: {}",
                    cache.skipped.as_deref().unwrap_or_default()
                )
            }
            (true, _) => "the store is not watched".to_owned(),
            (false, _) => self.decision.reason(),
        }
    }
}

/// Nix's version and program, and what is wrong with the version.
fn nix_line(nix: &Nix) -> String {
    let line = format!("{} at {}", nix.version, nix.program.display());
    match nix.version.too_old() {
        Some(remark) => format!("{line}; {remark}"),
        None => line,
    }
}

/// The line about the store, with where its files are, if that is elsewhere than the job sees them.
fn with_remark(store: Option<String>) -> Option<String> {
    let parts: Vec<String> = store.into_iter().chain(rootless::remark()).collect();
    (!parts.is_empty()).then(|| parts.join("; "))
}

/// Reports in the summary and the outputs that a job did not come to its work; the error itself is printed where the
/// program ends. `what` names the work that was not done.
pub(super) fn report_not_started(failure: &dyn Explain, env: &Env, what: &str) {
    let hint = failure.hint().unwrap_or_default();
    let text = format!("### ❌ Flywheel: {what}\n\n{failure}\n\n{hint}\n");
    // A report that cannot be written changes nothing.
    let _ = set_outcome(env, Outcome::NotStarted, failure.exit());
    let _ = Files::from_env(env).add_summary(&text);
}

/// Sets the two step outputs of how a job ended.
///
/// # Errors
/// When the runner's file cannot be written.
pub(crate) fn set_outcome(env: &Env, outcome: Outcome, exit: Exit) -> std::io::Result<()> {
    let files = Files::from_env(env);
    files.set_output("outcome", outcome.as_str())?;
    files.set_output("exit-code", &exit.code().to_string())
}

/// Everything that a job reports at its end. It can be serialized: the background process of `watch-store` makes
/// it, and the step that calls `finish` prints it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct JobReport {
    annotations: Vec<(Level, String, String)>,
    lines: Vec<String>,
    summary: String,
    outputs: Vec<(String, String)>,
    /// The step's exit code.
    pub(crate) exit_code: u8,
}

impl JobReport {
    pub(crate) fn new(job: &JobResult) -> Self {
        Self {
            annotations: annotations(job),
            lines: lines(job),
            summary: summary::render(job),
            outputs: outputs::values(job)
                .into_iter()
                .map(|(name, value)| (name.to_owned(), value))
                .collect(),
            exit_code: job.exit_code,
        }
    }

    /// The report of a job that was cancelled before it began.
    pub(crate) fn cancelled() -> Self {
        Self {
            exit_code: 130,
            ..Self::default()
        }
    }

    /// Writes the annotations, the log lines, the summary and the outputs. A report that cannot be written never
    /// changes how the job ends.
    pub(crate) fn emit(&self, workflow: &Workflow, files: &Files) {
        for (level, title, text) in &self.annotations {
            workflow.annotate(*level, title, text);
        }
        for line in &self.lines {
            workflow.log(line);
        }
        // Each file by itself: a summary that cannot be written must not cost the outputs.
        let summary = files.add_summary(&self.summary);
        let mut outputs = self.outputs.iter();
        let outputs = outputs.try_for_each(|(name, value)| files.set_output(name, value));
        for error in [summary, outputs].into_iter().filter_map(Result::err) {
            workflow.annotate(
                Level::Warning,
                "report",
                &format!("the report could not be written: {error}"),
            );
        }
    }
}

/// The last lines of the log; the closing line is the last of all.
fn lines(job: &JobResult) -> Vec<String> {
    let verification = job.publication.as_ref().map(|publication| {
        format!(
            "flywheel: verification: {}",
            publication.coverage.sentence()
        )
    });
    let mut lines = vec![format!("flywheel: {}", job.clocks())];
    lines.extend(verification);
    let unread = job.publication.as_ref();
    lines.extend(
        unread
            .and_then(Publication::unread_sentence)
            .map(|text| format!("flywheel: not watched: {text}")),
    );
    lines.push(format!("flywheel: {}", job.closing_line()));
    lines
}

fn annotations(job: &JobResult) -> Vec<(Level, String, String)> {
    let mut annotations = Vec::new();
    if let Some(found) = &job.out_of_memory {
        annotations.push((
            Level::Error,
            "out of memory".to_owned(),
            found.text(job.heavy_lane.as_deref()),
        ));
    }
    if job.outcome == Outcome::CommandFailed {
        annotations.extend(job.failed_builds.iter().take(FAILED_BUILDS).map(|build| {
            let last = build
                .log_tail
                .iter()
                .rev()
                .find(|line| !line.trim().is_empty());
            let last = last
                .map(|line| format!("; its log ends: {}", line.trim()))
                .unwrap_or_default();
            let text = format!("the build of {} failed{last}", build.derivation);
            (Level::Error, build.name.clone(), text)
        }));
    }
    if let Some(text) = job.disk.full_text() {
        annotations.push((Level::Error, "disk full".to_owned(), text));
    }
    // As a warning, it was printed when it was found.
    if job.outcome == Outcome::NotPublished {
        annotations.extend(job.not_watched.iter().map(|store| {
            let text = format!("{}: {}", store.path, store.reason);
            (Level::Error, "not watched".to_owned(), text)
        }));
    }
    let Some(publication) = &job.publication else {
        return annotations;
    };
    // What fails the step is an error; the same finding in a step that goes on is a warning.
    let level_if = |outcome: Outcome| {
        if job.outcome == outcome {
            Level::Error
        } else {
            Level::Warning
        }
    };
    let lost = level_if(Outcome::NotPublished);
    let withheld = level_if(Outcome::Withheld);
    for (level, title, missed) in [
        (lost, "lost", &publication.lost),
        (lost, "ambiguous", &publication.ambiguous),
        (lost, "not verified", &publication.unverified),
        (withheld, "withheld", &publication.withheld),
        (Level::Warning, "policy", &publication.warned),
        (Level::Warning, "repaired", &publication.repaired),
    ] {
        let text = |one: &Missed| format!("{}: {}", one.path, one.reason);
        annotations.extend(
            missed
                .iter()
                .map(|one| (level, title.to_owned(), text(one))),
        );
    }
    annotations
}
