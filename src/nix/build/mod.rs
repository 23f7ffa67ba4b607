//! Building derivations with `nix build`, and what it says meanwhile. Knows nothing of flakes and of who wants it.

pub mod log;
pub mod presence;

use std::time::Duration;

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::nix::build::log::{Event, Reader};
use crate::nix::store_path::StorePath;
use crate::nix::tool::Nix;
use crate::process::capture::CaptureError;
use crate::process::lines::PartialLine;

/// A build that is cancelled has this long to end well.
const GRACE: Duration = Duration::from_secs(2);

/// What to build, and how.
#[derive(Clone, Debug)]
pub struct Order {
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
pub struct Ended {
    /// Whether all of it was built.
    pub whole: bool,
    /// What Nix said beside its events, the last of it: for an end that no event explains.
    pub said: String,
}

impl Order {
    /// Builds it, and tells what happens. Ends early when cancelled.
    ///
    /// # Errors
    /// When Nix cannot be started.
    pub async fn build(
        &self,
        nix: &Nix,
        events: &mpsc::Sender<Event>,
        cancel: &CancellationToken,
    ) -> Result<Ended, CaptureError> {
        let mut tool = nix.tool().args(self.words(nix)).stream_stderr()?;
        let (mut held, mut reader) = (PartialLine::default(), Reader::default());
        loop {
            let line = tokio::select! {
                biased;
                () = cancel.cancelled() => {
                    tool.stop(GRACE).await;
                    return Ok(Ended { whole: false, said: reader.said() });
                }
                line = tool.line(&mut held) => line,
            };
            let Ok(Some(line)) = line else { break };
            if let Some(event) = reader.read(&line) {
                // Whoever has stopped to listen has no use for it.
                let _ = events.send(event).await;
            }
        }
        let whole = tool.ended().await.is_ok_and(|status| status.success());
        Ok(Ended {
            whole,
            said: reader.said(),
        })
    }

    fn words(&self, nix: &Nix) -> Vec<String> {
        let mut words: Vec<String> = ["build", "--no-link", "--log-format", "internal-json"]
            .map(str::to_owned)
            .into();
        if self.keep_going {
            words.push("--keep-going".to_owned());
        }
        if let Some(jobs) = self.max_jobs {
            words.extend(["--max-jobs".to_owned(), jobs.to_string()]);
        }
        words.extend(self.arguments.iter().cloned());
        // From 2.13 on a bare `.drv` is the file itself.
        let all = if nix.version.at_least(2, 13) {
            "^*"
        } else {
            ""
        };
        words.extend(self.derivations.iter().map(|path| format!("{path}{all}")));
        words
    }
}
