//! A store for a user who can have none at `/nix`, entered before any thread is started; and what the log and the report
//! say of it.

use flywheel_core::exit::Failure;
use flywheel_nix::bootstrap::rootless::{self, Need, Viewers};
use flywheel_sys::runner::env::Env;
use flywheel_sys::runner::workflow::Workflow;

use super::report::report_not_started;

/// Lets this process, and all that it starts, see a store in a folder of this user's as `/nix`. `undone` names the work that
/// is not done without.
///
/// # Errors
/// When there can be no such store. It has been reported to the runner; this process must end then.
pub(crate) fn enter(env: &Env, need: Need, viewers: Viewers, undone: &str) -> Result<(), Failure> {
    let entered = rootless::enter(env, need, viewers).inspect_err(|error| {
        report_not_started(error, env, undone);
    })?;
    let workflow = Workflow::new(env.in_github_actions());
    workflow.log(&format!("flywheel: {}", entered.sentence()));
    Ok(())
}

/// What the report adds to the line about the store.
pub(super) fn remark() -> Option<String> {
    let folder = rootless::folder()?;
    Some(format!(
        "its files are in `{}`, which this job alone sees as `/nix`",
        folder.display()
    ))
}
