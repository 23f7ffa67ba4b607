//! `finish` where the watch was killed: the step itself publishes what the watch left in the journal, and what was
//! added to the store since, as the next job on this disk would.

use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use super::{Error, not_started};
use crate::job::inputs::Plan;
use crate::job::{JobReport, Prepared, Session};
use crate::report::job::{JobResult, Work};
use flywheel_core::exit::{Exit, Failure};
use flywheel_nix::temp_roots::JobScope;
use flywheel_sys::process::signals::Signals;
use flywheel_sys::runner::env::{Env, current_folder};
use flywheel_sys::runner::files::Files;
use flywheel_sys::runner::workflow::Level;

const KILLED: &str = "the watch was killed before it could finish";

/// Publishes, verifies and reports in the place of the watch. Where this step may not publish, it says where the paths
/// are. What the watch left in the runner's temporary folder is removed either way, its netrc among it.
///
/// # Errors
/// When there is no usable Nix; when nothing can be published, and publication was required.
pub(super) async fn finish(plan: &Plan, env: &Env) -> Result<Exit, Failure> {
    // Making the session's own private folder removes those of dead processes.
    let (session, mut signals) = Session::begin(plan, env)?;
    let ended = publish(&session, &mut signals).await;
    session.end(ended, KILLED)
}

async fn publish(session: &Session<'_>, signals: &mut Signals) -> Result<Exit, Failure> {
    let plan = session.plan;
    let may_publish = session.decision.publishes() && plan.source.identity().is_some();
    if !may_publish {
        if plan.require_publish {
            return Err(Error::NotRunning.into());
        }
        let text = format!(
            "{KILLED}, and this step may not publish: what is left is in no report, and stands in the journal for the next job on this disk. With the inputs and the `ATTIC_TOKEN` of `start`, `finish` publishes it"
        );
        session
            .workflow
            .annotate(Level::Warning, "watch-store", &text);
        return Ok(Exit::Ok);
    }
    session.sink.degraded(
        "watch-store",
        format!("{KILLED}: this step publishes what it left"),
    );
    let Some(prepared) = session.prepare(signals).await? else {
        return Ok(Exit::Command(130));
    };
    let ended = deliver(session, &prepared, signals).await;
    prepared.stop().await;
    let job = ended?;
    session.screen.finish();
    JobReport::new(&job).emit(&session.workflow, &Files::from_env(session.env));
    Ok(Exit::Command(job.exit_code))
}

async fn deliver(
    session: &Session<'_>,
    prepared: &Prepared,
    signals: &mut Signals,
) -> Result<JobResult, Failure> {
    let folder = current_folder().map_err(not_started)?;
    let began = Instant::now();
    // The watch takes up the journals of the dead, and with one that did not end what was added after it began.
    let watch = session.watch(prepared, JobScope::Descendants).await;
    let cancel = CancellationToken::new();
    let (added_paths, publication) = session
        .deliver_in_time(watch, &prepared.cache, &folder, None, &cancel, signals)
        .await;
    let require_publish = session.plan.require_publish;
    let mut job = session.result(prepared, &added_paths, publication, require_publish);
    (job.command, job.publish) = (Duration::ZERO, began.elapsed());
    job.work = Work::OtherSteps;
    Ok(job)
}
