//! Builds derivations with `nix build` and reports its events. Knows nothing about flakes or the
//! purpose of a build.

pub mod cache_trust;
pub mod log;
pub mod presence;

use std::time::Duration;

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::build::log::{BuildEvent, LogReader};
use crate::store_path::StorePath;
use crate::tool::Nix;
use flywheel_sys::process::capture::CaptureError;
use flywheel_sys::process::lines::PartialLine;

/// Time between SIGTERM and SIGKILL for a cancelled build.
const GRACE: Duration = Duration::from_secs(2);

/// A set of derivations to build.
#[derive(Clone, Debug)]
pub struct BuildRequest {
    pub derivations: Vec<StorePath>,
    /// Parallel builds; Nix's own setting if `None`.
    pub max_jobs: Option<usize>,
    /// Whether the other builds continue when one fails.
    pub keep_going: bool,
    /// Further arguments of Nix.
    pub arguments: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BuildResult {
    pub complete: bool,
    /// The end of Nix's output besides events, for a failure that no event explains.
    pub output: String,
}

impl BuildRequest {
    /// Builds the derivations and sends what happens to `events`. Ends early when cancelled.
    ///
    /// # Errors
    /// When Nix cannot be started.
    pub async fn build(
        &self,
        nix: &Nix,
        events: &mpsc::Sender<BuildEvent>,
        cancel: &CancellationToken,
    ) -> Result<BuildResult, CaptureError> {
        let mut tool = nix.tool().args(self.arguments_for(nix)).stream_stderr()?;
        let (mut held, mut reader) = (PartialLine::default(), LogReader::default());
        loop {
            let line = tokio::select! {
                biased;
                () = cancel.cancelled() => {
                    tool.stop(GRACE).await;
                    return Ok(BuildResult { complete: false, output: reader.output() });
                }
                line = tool.line(&mut held) => line,
            };
            let Ok(Some(line)) = line else { break };
            if let Some(event) = reader.read(&line) {
                // A closed receiver has no use for the event.
                let _ = events.send(event).await;
            }
        }
        let complete = tool.ended().await.is_ok_and(|status| status.success());
        Ok(BuildResult {
            complete,
            output: reader.output(),
        })
    }

    fn arguments_for(&self, nix: &Nix) -> Vec<String> {
        let mut args: Vec<String> = ["build", "--no-link", "--log-format", "internal-json"]
            .map(str::to_owned)
            .into();
        // Nix's default is to stop all builds at the first failure.
        if self.keep_going {
            args.push("--keep-going".to_owned());
        }
        if let Some(jobs) = self.max_jobs {
            args.extend(["--max-jobs".to_owned(), jobs.to_string()]);
        }
        args.extend(self.arguments.iter().cloned());
        // From Nix 2.13 on, a bare `.drv` means the file itself instead of its outputs.
        let all = if nix.version.at_least(2, 13) {
            "^*"
        } else {
            ""
        };
        args.extend(self.derivations.iter().map(|path| format!("{path}{all}")));
        args
    }
}
