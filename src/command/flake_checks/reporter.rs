//! Reports a run while it goes on: a line for each verdict, the log of what failed, and the progress. Passes each
//! output's state on to the Check Runs.

use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use crate::command::flake_checks::output::OutputProgress;
use flywheel_core::text::without_ansi;
use flywheel_core::text::{count, one_line, shorten};
use flywheel_github::checks::board::{Aggregate, CheckRunReporter, ReportStats};
use flywheel_github::checks::summary::sign;
use flywheel_github::checks::text::title;
use flywheel_github::checks::{Conclusion, Output, OutputState, Verdict};
use flywheel_sys::runner::workflow::Workflow;

/// How often the log gets a line about the progress.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(5);
/// How many lines of a failed build's log the job's log shows.
const LOG_TAIL_LINES: usize = 60;
/// Above this many outputs only a failure gets a line of its own, so that it is found in the log.
const QUIET_ABOVE: usize = 200;

pub(super) struct Reporter {
    workflow: Workflow,
    check_runs: Option<CheckRunReporter>,
    is_quiet: bool,
    building: u64,
    last: Instant,
}

impl Reporter {
    pub(crate) fn new(workflow: &Workflow, check_runs: Option<CheckRunReporter>) -> Self {
        Self {
            workflow: workflow.clone(),
            check_runs,
            is_quiet: false,
            building: 0,
            last: Instant::now(),
        }
    }

    /// Takes the list of outputs.
    pub(crate) fn announce(&mut self, outputs: &[Output]) {
        self.is_quiet = outputs.len() > QUIET_ABOVE;
        if let Some(check_runs) = &self.check_runs {
            check_runs.announce(outputs.to_vec());
        }
    }

    /// Takes an output's new state.
    pub(crate) fn state(&mut self, output: &Output, state: &OutputState) {
        if let Some(check_runs) = &self.check_runs {
            check_runs.update(&output.label, state.clone());
        }
        match state {
            OutputState::Queued | OutputState::Evaluating => (),
            OutputState::Building => self.building += 1,
            OutputState::Finished(verdict) => self.ended(output, verdict),
        }
    }

    fn ended(&mut self, output: &Output, verdict: &Verdict) {
        let is_failure = verdict.conclusion() == Conclusion::Failure;
        if self.is_quiet && !is_failure {
            return;
        }
        let line = format!(
            "{} {}: {}",
            sign(verdict.conclusion()),
            one_line(&output.label, 100),
            title(verdict)
        );
        if !is_failure || verdict.log_tail.is_empty() {
            return self.workflow.log(&line);
        }
        self.workflow.group(&line);
        let skipped = verdict.log_tail.len().saturating_sub(LOG_TAIL_LINES);
        for line in &verdict.log_tail[skipped..] {
            // The bar keeps a line that the build printed from being a workflow command.
            self.workflow.log(&format!(
                "| {}",
                shorten(&without_ansi(line).replace(['\r', '\n'], " "), 2000)
            ));
        }
        self.workflow
            .log(&format!("| by hand: {}", one_line(&verdict.reproduce, 500)));
        self.workflow.end_group();
    }

    /// Ends the Check Runs by `deadline`, and soon once `stop` is cancelled. `None` where there are none.
    pub(crate) async fn close(
        self,
        aggregate: Aggregate,
        deadline: Instant,
        stop: &CancellationToken,
    ) -> Option<ReportStats> {
        Some(
            self.check_runs?
                .close(aggregate, deadline.into(), stop)
                .await,
        )
    }

    /// Logs that a build is tried again, after a failure that was not its own fault.
    pub(crate) fn again(&self, output: &Output, why: &str) {
        self.workflow.log(&format!(
            "↻ {}: tried again: {}",
            one_line(&output.label, 100),
            one_line(&without_ansi(why), 300)
        ));
    }

    /// Logs which outputs are built although a cache says that it has them.
    pub(crate) fn doubted(&self, labels: &[String]) {
        if labels.is_empty() {
            return;
        }
        self.workflow.log(&format!(
            "flywheel: a cache claims {} without a valid signature of a key in `trusted-public-keys`; built instead: {}",
            count(labels.len() as u64, "output"),
            one_line(&labels.join(", "), 300)
        ));
    }

    /// Logs the progress, unless it was logged a moment ago.
    pub(crate) fn progress(&mut self, outs: &[OutputProgress]) {
        // This is called at every query of the store, several times a second.
        if self.last.elapsed() < PROGRESS_INTERVAL {
            return;
        }
        self.last = Instant::now();
        let ended = outs.iter().filter(|out| out.verdict.is_some()).count();
        let known = outs
            .iter()
            .filter(|out| out.facts.is_some() || out.verdict.is_some())
            .count();
        self.workflow.log(&format!(
            "flywheel: {ended} of {} outputs have a verdict, {known} are evaluated, {} builds of outputs have begun",
            outs.len(),
            self.building
        ));
    }
}
