//! Starts this job's Check Runs, if it may have any, and decides what the aggregate one shows.

use std::time::{Duration, Instant};

use crate::command::flake_checks::RunResult;
use crate::command::flake_checks::engine::RunEnd;
use crate::command::flake_checks::inputs::{Checks, Plan};
use crate::inputs::roots::roots;
use crate::job::{STOPPED_LIMIT, Session};
use flywheel_core::exit::Explain;
use flywheel_core::markdown::plain;
use flywheel_core::text::one_line;
use flywheel_github::check_run::{CheckRuns, Commit, Conclusion};
use flywheel_github::checks::board::{Aggregate, CheckRunReporter};
use flywheel_github::checks::options::Options;
use flywheel_github::checks::summary::{closing_line, render};
use flywheel_sys::http::Clients;
use flywheel_sys::runner::context::{commit, github_api};
use flywheel_sys::runner::workflow::Level;

/// How long bringing the last Check Runs up to date may take, with the waits that GitHub asks for.
const CLOSE_LIMIT: Duration = Duration::from_secs(300);
/// After a request to stop, this much of the time is kept for publishing.
const STOPPED_RESERVE: Duration = Duration::from_millis(700);

/// Starts the Check Runs, if this job may have any. Warns with the reason where they were asked for and cannot be.
pub(super) fn start(plan: &Plan, session: &Session<'_>) -> Option<CheckRunReporter> {
    if plan.checks == Checks::No {
        return None;
    }
    let warn = |why: &str| {
        let text = format!("there are no Check Runs: {why}");
        session
            .workflow
            .annotate(Level::Warning, "check runs", &text);
    };
    let unavailable = |why: &str| {
        if plan.checks == Checks::Yes {
            warn(why);
        }
        None
    };
    let Some(token) = session.secrets.github.as_ref() else {
        return unavailable("there is no `GITHUB_TOKEN` in the step's `env`");
    };
    let Some((repository, sha)) = commit(session.env) else {
        return unavailable("the job has no commit");
    };
    let api = match github_api(session.env) {
        Ok(api) => api,
        Err(error) => {
            warn(&error.to_string());
            return None;
        }
    };
    let roots = roots(session.env);
    let client = match Clients::new(&roots) {
        Ok(clients) => clients.api,
        Err(error) => return unavailable(&error.to_string()),
    };
    let commit = Commit {
        api,
        repository,
        sha,
    };
    match CheckRuns::for_commit(&commit, token, client) {
        Ok(runs) => {
            let job = [
                // Two jobs on one commit must not take each other's Check Runs, so the identifiers hold workflow and
                // job.
                session.env.get("GITHUB_WORKFLOW"),
                session.env.get("GITHUB_JOB"),
            ];
            let job = job
                .map(|name| one_line(name.unwrap_or_default(), 60))
                .join("/");
            let scope = format!("flywheel/flake-checks/{job}/{}", plan.check_name);
            let options = Options {
                name: plan.check_name.clone(),
                scope,
                ..Options::default()
            };
            Some(CheckRunReporter::start(runs, options, session.sink.clone()))
        }
        Err(error) => unavailable(&error.to_string()),
    }
}

/// Until when the Check Runs may be brought up to date.
pub(super) fn deadline(ran: &RunResult) -> Instant {
    match ran.end {
        RunEnd::Stopped(_, at) => at + (STOPPED_LIMIT - STOPPED_RESERVE),
        RunEnd::Complete | RunEnd::FailedFast => Instant::now() + CLOSE_LIMIT,
    }
}

/// The aggregate of a run that has ended.
pub(super) fn aggregate(ran: &RunResult) -> Aggregate {
    let ended = ran.ended();
    let failed = ran.failures() > 0 || !ran.wrong.is_empty();
    let conclusion = match (failed, ran.end) {
        (_, RunEnd::Stopped(..)) => Conclusion::Cancelled,
        (true, _) | (_, RunEnd::FailedFast) => Conclusion::Failure,
        (false, RunEnd::Complete) => Conclusion::Success,
    };
    Aggregate {
        conclusion,
        title: closing_line(&ended),
        summary: render(&ended, &ran.not_looked_at),
    }
}

/// The aggregate of a run that was cancelled before there was anything to check.
pub(super) fn cancelled() -> Aggregate {
    let text = "Cancelled before anything was evaluated";
    Aggregate {
        conclusion: Conclusion::Cancelled,
        title: text.to_owned(),
        summary: format!("{text}."),
    }
}

/// The aggregate of a run that found nothing to check, because the flake does not evaluate.
pub(super) fn for_failure(failure: &dyn Explain) -> Aggregate {
    let text = failure.to_string();
    Aggregate {
        conclusion: Conclusion::Failure,
        title: one_line(&text, 200),
        summary: format!(
            "{}\n\n{}",
            plain(&text),
            plain(&failure.hint().unwrap_or_default())
        ),
    }
}
