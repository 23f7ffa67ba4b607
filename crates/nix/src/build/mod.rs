//! Building derivations with `nix build`, and what it says meanwhile. Knows nothing of flakes and of who wants it.

pub mod log;
pub mod presence;

use std::time::Duration;

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::build::log::{BuildEvent, LogReader};
use crate::store_path::StorePath;
use crate::tool::Nix;
use flywheel_sys::process::capture::CaptureError;
use flywheel_sys::process::lines::Line;

/// A build that is cancelled has this long to end well.
const GRACE: Duration = Duration::from_secs(2);

/// What to build, and how.
#[derive(Clone, Debug)]
pub struct BuildRequest {
    /// The derivations.
    pub derivations: Vec<StorePath>,
    /// Builds at once; Nix's own setting if `None`.
    pub max_jobs: Option<usize>,
    /// Whether the others go on when one fails.
    pub keep_going: bool,
    /// More words for Nix.
    pub arguments: Vec<String>,
}

/// How a build ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BuildResult {
    /// Whether all of it was built.
    pub complete: bool,
    /// What Nix said beside its events, the last of it: for an end that no event explains.
    pub output: String,
}

impl BuildRequest {
    /// Builds it, and tells what happens. Ends early when cancelled.
    ///
    /// # Errors
    /// When Nix cannot be started.
    pub async fn build(
        &self,
        nix: &Nix,
        events: &mpsc::Sender<BuildEvent>,
        cancel: &CancellationToken,
    ) -> Result<BuildResult, CaptureError> {
        let mut tool = nix.tool().args(self.arguments_for(nix)).talk()?;
        let (mut held, mut reader) = (Line::default(), LogReader::default());
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
                // Whoever has stopped to listen has no use for it.
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
        if self.keep_going {
            args.push("--keep-going".to_owned());
        }
        if let Some(jobs) = self.max_jobs {
            args.extend(["--max-jobs".to_owned(), jobs.to_string()]);
        }
        args.extend(self.arguments.iter().cloned());
        // From 2.13 on a bare `.drv` is the file itself.
        let all = if nix.version.at_least(2, 13) {
            "^*"
        } else {
            ""
        };
        args.extend(self.derivations.iter().map(|path| format!("{path}{all}")));
        args
    }
}
