//! Reports what the canary found: in the log, the summary, the step's outputs, files, a Pushgateway, and a Check Run on
//! the commit. None of these can change the verdict; one that fails is a warning.

use std::path::Path;
use std::time::Duration;

use url::Url;

use super::CheckContext;
use super::inputs::CheckRun;
use crate::report::canary::{Canary, Verdict};
use flywheel_core::secret::Secret;
use flywheel_github::check_run::{self, Commit, Conclusion, Finished};
use flywheel_sys::http::{chain, redact};
use flywheel_sys::runner::context::{commit, github_api};
use flywheel_sys::runner::files::Files;
use flywheel_sys::runner::workflow::{Level, Workflow, data, json_data};

/// How long a push may take: a slow gateway must not hold the builder up.
const PUSH_LIMIT: Duration = Duration::from_secs(5);
/// How long the two or three requests to GitHub may take.
const CHECK_RUN_LIMIT: Duration = Duration::from_secs(15);

pub(super) async fn report(
    canary: &Canary,
    work: &CheckContext<'_>,
    workflow: &Workflow,
    github: Option<&Secret>,
) {
    let plan = &work.plan;
    let report = format!("{:#}\n", canary.json());
    if plan.as_json {
        json_data(report.trim_end());
    } else {
        data(&format!("{}{}", canary.table(), canary.closing_line()));
    }
    // In a job, warnings go to stdout, which must hold the JSON alone.
    let quiet = plan.as_json && workflow.in_job();
    let warn = |area: &str, text: String| {
        if !quiet {
            workflow.annotate(Level::Warning, area, &text);
        }
    };
    if workflow.in_job() && !quiet {
        annotate(canary, workflow);
    }
    let files = Files::from_env(work.env);
    let outputs = canary.outputs();
    let written = outputs
        .iter()
        .try_for_each(|(name, value)| files.set_output(name, value));
    if let Err(error) = written.and_then(|()| files.add_summary(&canary.summary())) {
        warn(
            "report",
            format!("the runner's files cannot be written: {error}"),
        );
    }
    let metrics = canary.metrics();
    for (file, text) in [(&plan.report_file, &report), (&plan.metrics_file, &metrics)] {
        if let Some(Err(error)) = file.as_deref().map(|file| write_whole(file, text)) {
            let file = file.as_deref().unwrap_or(Path::new("")).display();
            warn("report", format!("`{file}` cannot be written: {error}"));
        }
    }
    let (pushed, left) = tokio::join!(
        async {
            match &plan.pushgateway {
                Some(gateway) => {
                    push(gateway, canary, metrics.clone(), &work.clients.streaming).await
                }
                None => Ok(()),
            }
        },
        write_check_run(canary, work, github),
    );
    for (area, result) in [("metrics", pushed), ("check run", left)] {
        if let Err(text) = result {
            warn(area, text);
        }
    }
}

fn annotate(canary: &Canary, workflow: &Workflow) {
    for check in &canary.checks {
        if let Verdict::Failed { hint } = &check.verdict {
            let required = check.severity == crate::report::canary::Severity::Required;
            let level = if required {
                Level::Error
            } else {
                Level::Warning
            };
            workflow.annotate(level, check.layer, &format!("{}\nhelp: {hint}", check.text));
        }
    }
}

/// Replaces a file at once, so that a collector never reads half of it.
fn write_whole(file: &Path, text: &str) -> std::io::Result<()> {
    let folder = file
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    let new = tempfile::Builder::new()
        .prefix(".flywheel-")
        .tempfile_in(folder)?;
    std::fs::write(new.path(), text)?;
    // A temporary file is private, and the collector that reads this one has a user of its own.
    std::fs::set_permissions(
        new.path(),
        std::os::unix::fs::PermissionsExt::from_mode(0o644),
    )?;
    new.persist(file)?;
    Ok(())
}

/// Replaces the gateway's metrics of this class and lane.
async fn push(
    gateway: &Url,
    canary: &Canary,
    metrics: String,
    client: &reqwest::Client,
) -> Result<(), String> {
    let mut url = gateway.clone();
    {
        let mut path = url
            .path_segments_mut()
            .map_err(|()| "`pushgateway` is no base address".to_owned())?;
        path.pop_if_empty()
            .extend(["metrics", "job", "flywheel_canary", "class", &canary.class]);
        path.extend(canary.lane.iter().flat_map(|lane| ["lane", lane.as_str()]));
    }
    // `PUT` replaces the whole group; `POST` would leave the metrics of checks that no longer run.
    let sent = client
        .put(url)
        .timeout(PUSH_LIMIT)
        .header("content-type", "text/plain; version=0.0.4")
        .body(metrics)
        .send()
        .await;
    let shown = redact(gateway);
    match sent {
        Ok(answer) if answer.status().is_success() => Ok(()),
        Ok(answer) => Err(format!("{shown} answered {}", answer.status().as_u16())),
        Err(error) => Err(format!("{shown}: {}", chain(error))),
    }
}

async fn write_check_run(
    canary: &Canary,
    work: &CheckContext<'_>,
    token: Option<&Secret>,
) -> Result<(), String> {
    let unavailable = |what: &str| match work.plan.check_run {
        CheckRun::Always => Err(format!("no Check Run is left: {what}")),
        CheckRun::IfToken | CheckRun::Never => Ok(()),
    };
    if work.plan.check_run == CheckRun::Never {
        return Ok(());
    }
    let Some(token) = token else {
        return unavailable("there is no `GITHUB_TOKEN` in the step's `env`");
    };
    let Some((repository, sha)) = commit(work.env) else {
        return unavailable("the job has no commit");
    };
    let api = github_api(work.env).map_err(|error| format!("no Check Run is left: {error}"))?;
    let conclusion = if canary.healthy() {
        Conclusion::Success
    } else {
        Conclusion::Failure
    };
    let finished = Finished {
        name: format!("Builder health: {}", canary.class),
        external_id: format!("flywheel/validate-builders/{}", canary.class),
        conclusion,
        title: canary.closing_line(),
        summary: canary.summary(),
        ended_at: canary.ended_at,
        took: canary.took,
    };
    let commit = Commit {
        api,
        repository,
        sha,
    };
    let leaving = check_run::create_or_update(&commit, &finished, token, work.clients.api.clone());
    match tokio::time::timeout(CHECK_RUN_LIMIT, leaving).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => {
            let hint = flywheel_core::exit::Explain::hint(&error).unwrap_or_default();
            Err(format!("no Check Run is left: {error}. {hint}"))
        }
        Err(_) => Err(format!(
            "no Check Run is left: GitHub did not answer within {} s",
            CHECK_RUN_LIMIT.as_secs()
        )),
    }
}
