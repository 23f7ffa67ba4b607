//! The messages between the steps and the background process, a line of JSON each. Tokens go one way only: through
//! a pipe from `start` to its child.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::io::{
    AsyncBufRead, AsyncBufReadExt as _, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _,
};
use tokio::time::timeout;

use crate::job::JobReport;

/// The longest line there is, a report with every path of a large job, stays below this.
const LINE_LIMIT: u64 = 64 * 1024 * 1024;
/// A process that is alive reads a line at once.
const SEND_LIMIT: Duration = Duration::from_secs(5);

/// From `start` to its child.
#[derive(Serialize, Deserialize)]
pub(super) struct ChildConfig {
    pub(crate) attic: Option<String>,
    pub(crate) github: Option<String>,
    /// The folder with the links to the job's results.
    pub(crate) folder: PathBuf,
}

/// From the child to `start`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum StartEvent {
    Note(String),
    Degraded(String, String),
    Ready {
        /// What to mask before any variable is set.
        secrets: Vec<String>,
        /// Variables for the later steps.
        variables: Vec<(String, String)>,
        /// A folder for the later steps' `PATH`.
        folder: Option<PathBuf>,
    },
    Failed {
        text: String,
        hint: Option<String>,
        is_host: bool,
    },
}

/// From a later step to the background process.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Request {
    Status,
    Finish {
        /// How long publishing and verifying may take, in seconds; `None` for the value that `start` was given.
        drain_timeout: Option<u64>,
        /// Whether a loss fails the step, even if `start` was not given `require-publish`.
        require_publish: bool,
    },
    /// The step that waits for the end is being cancelled.
    Cancel,
}

/// What the background process is doing. `status --format json` prints it, so its keys are kept stable.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Status {
    /// `none`, `preparing`, `watching` or `finishing`.
    pub(crate) state: String,
    pub(crate) pid: u32,
    pub(crate) seconds: u64,
    pub(crate) cache: Option<String>,
    pub(crate) trust: String,
    pub(crate) publishes: bool,
    pub(crate) reason: String,
    /// Paths of which it is known how they ended, out of the `known` ones.
    pub(crate) settled: u64,
    pub(crate) known: u64,
    /// NAR bytes sent.
    pub(crate) bytes: u64,
    pub(crate) degraded: Vec<String>,
}

/// From the background process to the step that asked for the end.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Finished {
    pub(crate) report: JobReport,
    /// Variables with the values that they had before `start`.
    pub(crate) variables: Vec<(String, String)>,
}

/// Sends one line.
pub(super) async fn send(
    to: &mut (impl AsyncWrite + Unpin),
    message: &impl Serialize,
) -> io::Result<()> {
    let mut line = serde_json::to_string(message)?;
    line.push('\n');
    // Without a limit, a reader that hangs would hang the background process, too.
    let sending = async {
        to.write_all(line.as_bytes()).await?;
        to.flush().await
    };
    timeout(SEND_LIMIT, sending)
        .await
        .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

/// Receives one line. `None` at the end of the stream, and for a line that is no such message.
pub(super) async fn receive<T: DeserializeOwned>(
    from: &mut (impl AsyncBufRead + Unpin),
) -> Option<T> {
    let mut line = Vec::new();
    // Bounded, because anything of this user may connect to the socket.
    from.take(LINE_LIMIT)
        .read_until(b'\n', &mut line)
        .await
        .ok()?;
    serde_json::from_slice(&line).ok()
}
