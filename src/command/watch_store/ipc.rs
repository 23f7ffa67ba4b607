//! What the steps and the background process say to each other: one JSON line each. Tokens go one way
//! only, by a pipe from `start` to its child.

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

/// More than this is no line of ours: a report with every path of a large job.
const LINE_LIMIT: u64 = 64 * 1024 * 1024;
/// The other side takes a line at once, or has ended.
const SEND_LIMIT: Duration = Duration::from_secs(5);

/// From `start` to its child.
#[derive(Serialize, Deserialize)]
pub(super) struct ChildConfig {
    pub attic: Option<String>,
    pub github: Option<String>,
    /// Where the job's results are linked from.
    pub folder: PathBuf,
}

/// From the child to `start`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum StartEvent {
    Note(String),
    Degraded(String, String),
    Ready {
        /// To be masked before anything is set.
        secret: Option<String>,
        /// For the later steps.
        variables: Vec<(String, String)>,
        /// For the later steps' `PATH`.
        folder: Option<PathBuf>,
    },
    Failed {
        text: String,
        hint: Option<String>,
        is_host: bool,
    },
}

/// From a later step.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Request {
    Status,
    Finish {
        /// How long it may take, in seconds; none for what `start` was told.
        drain_timeout: Option<u64>,
        /// Whether a loss fails the step, besides what `start` was told.
        require_publish: bool,
    },
    /// The step is being cancelled.
    Cancel,
}

/// What the background process is doing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Status {
    /// `none`, `preparing`, `watching` or `finishing`.
    pub state: String,
    pub pid: u32,
    pub seconds: u64,
    pub cache: Option<String>,
    pub trust: String,
    pub publishes: bool,
    pub reason: String,
    /// Paths settled, and paths known so far.
    pub settled: u64,
    pub known: u64,
    /// NAR bytes sent.
    pub bytes: u64,
    pub degraded: Vec<String>,
}

/// The end, told to the step that asked for it.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Finished {
    pub report: JobReport,
    /// Variables as they were before `start`.
    pub variables: Vec<(String, String)>,
}

/// Says one line.
pub(super) async fn send(
    to: &mut (impl AsyncWrite + Unpin),
    word: &impl Serialize,
) -> io::Result<()> {
    let mut line = serde_json::to_string(word)?;
    line.push('\n');
    let said = async {
        to.write_all(line.as_bytes()).await?;
        to.flush().await
    };
    timeout(SEND_LIMIT, said)
        .await
        .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

/// Hears one line; none at the end, or when it is not one of ours.
pub(super) async fn receive<T: DeserializeOwned>(
    from: &mut (impl AsyncBufRead + Unpin),
) -> Option<T> {
    let mut line = Vec::new();
    from.take(LINE_LIMIT)
        .read_until(b'\n', &mut line)
        .await
        .ok()?;
    serde_json::from_slice(&line).ok()
}
