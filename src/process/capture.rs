//! Short-lived tools (`nix`, `apt-get`): run to their end within a deadline, what they print is caught.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group};
use thiserror::Error;
use tokio::io::AsyncReadExt as _;
use tokio::process::{Child, Command};

use crate::process::lines::StreamedTool;
use crate::process::own;

/// What one tool may print before the rest is dropped; the list of a big store fits well.
const OUTPUT_LIMIT: u64 = 256 * 1024 * 1024;

/// Why a tool gave no answer.
#[derive(Debug, Error)]
pub enum CaptureError {
    /// It could not be started.
    #[error("`{program}` could not be started")]
    Start {
        /// The program's path.
        program: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// It did not end in time, and was killed with all its children.
    #[error("`{program}` did not end within {} s", limit.as_secs())]
    Deadline {
        /// The program's path.
        program: PathBuf,
        /// The time it was given.
        limit: Duration,
    },
    /// Its output could not be read.
    #[error("what `{program}` printed could not be read")]
    Read {
        /// The program's path.
        program: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// How a tool ended and what it printed.
#[derive(Debug)]
pub struct Output {
    /// How it ended.
    pub status: ExitStatus,
    /// Its standard output, as it came.
    pub stdout: Vec<u8>,
    /// Its standard error, as text.
    pub stderr: String,
}

impl Output {
    /// Its standard output as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }
}

/// A tool to run: an absolute program, its arguments (never a secret), its whole environment.
#[derive(Clone, Debug)]
pub struct Tool {
    program: PathBuf,
    arguments: Vec<OsString>,
    environment: BTreeMap<OsString, OsString>,
    folder: Option<PathBuf>,
}

impl Tool {
    /// A tool with no arguments and an empty environment.
    pub fn new(program: &Path) -> Self {
        Self {
            program: program.to_owned(),
            arguments: Vec::new(),
            environment: BTreeMap::new(),
            folder: None,
        }
    }

    /// Adds an argument.
    #[must_use]
    pub fn arg(mut self, argument: impl AsRef<OsStr>) -> Self {
        self.arguments.push(argument.as_ref().to_owned());
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<S: AsRef<OsStr>>(mut self, arguments: impl IntoIterator<Item = S>) -> Self {
        self.arguments.extend(
            arguments
                .into_iter()
                .map(|argument| argument.as_ref().to_owned()),
        );
        self
    }

    /// Sets a variable.
    #[must_use]
    pub fn env(mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.environment
            .insert(name.as_ref().to_owned(), value.as_ref().to_owned());
        self
    }

    /// Sets variables.
    #[must_use]
    pub fn envs<N: AsRef<OsStr>, V: AsRef<OsStr>>(
        mut self,
        pairs: impl IntoIterator<Item = (N, V)>,
    ) -> Self {
        self.environment.extend(
            pairs
                .into_iter()
                .map(|(name, value)| (name.as_ref().to_owned(), value.as_ref().to_owned())),
        );
        self
    }

    /// Runs it in a folder.
    #[must_use]
    pub fn in_folder(mut self, folder: &Path) -> Self {
        self.folder = Some(folder.to_owned());
        self
    }

    /// Starts it, without standard input and with what it prints dropped, in a process group of its own; what it
    /// says on standard error is to be read.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn stream_stderr(self) -> Result<StreamedTool, CaptureError> {
        let mut command = self.command();
        command.stdout(Stdio::null());
        let start = |source| CaptureError::Start {
            program: self.program,
            source,
        };
        let (child, registered) = own::spawn(&mut command).map_err(start)?;
        Ok(StreamedTool::new(child, registered))
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command
            .args(&self.arguments)
            .env_clear()
            .envs(&self.environment);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command.process_group(0).kill_on_drop(true);
        if let Some(folder) = &self.folder {
            command.current_dir(folder);
        }
        command
    }

    /// Runs it to its end, without standard input, in a process group of its own.
    ///
    /// # Errors
    /// When it cannot be started or does not end within `limit`; then its whole group is killed.
    pub async fn run(self, limit: Duration) -> Result<Output, CaptureError> {
        let mut command = self.command();
        let program = self.program;
        let (mut child, _registered) =
            own::spawn(&mut command).map_err(|source| CaptureError::Start {
                program: program.clone(),
                source,
            })?;
        let group = child.id();
        match tokio::time::timeout(limit, collect(&mut child)).await {
            Ok(result) => result.map_err(|source| CaptureError::Read { program, source }),
            Err(_) => {
                kill_group(group);
                // It is dead or dying now; reaping it cannot last.
                let _ = child.wait().await;
                Err(CaptureError::Deadline { program, limit })
            }
        }
    }
}

async fn collect(child: &mut Child) -> io::Result<Output> {
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let (stdout, stderr) = tokio::try_join!(read(stdout), read(stderr))?;
    let status = child.wait().await?;
    Ok(Output {
        status,
        stdout,
        stderr: String::from_utf8_lossy(&stderr).into_owned(),
    })
}

async fn read(pipe: Option<impl tokio::io::AsyncRead + Unpin>) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    if let Some(mut pipe) = pipe {
        (&mut pipe)
            .take(OUTPUT_LIMIT)
            .read_to_end(&mut bytes)
            .await?;
        tokio::io::copy(&mut pipe, &mut tokio::io::sink()).await?;
    }
    Ok(bytes)
}

fn kill_group(group: Option<u32>) {
    let pid = group
        .and_then(|id| i32::try_from(id).ok())
        .and_then(Pid::from_raw);
    if let Some(pid) = pid {
        // Already gone is as good as killed.
        let _ = kill_process_group(pid, Signal::KILL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Tool {
        Tool::new(Path::new("/bin/sh")).arg("-c").arg(script)
    }

    #[tokio::test]
    async fn output_status_and_a_bare_environment() {
        let output = shell("echo out; echo err >&2; env | grep -c HOME; exit 3")
            .run(Duration::from_secs(10))
            .await
            .expect("ends");
        assert_eq!(
            (output.text().as_str(), output.stderr.as_str()),
            ("out\n0\n", "err\n")
        );
        assert_eq!(output.status.code(), Some(3));
    }

    #[tokio::test]
    async fn a_hanging_tool_is_killed_with_its_children() {
        let ended = shell("sleep 600 & sleep 600")
            .run(Duration::from_millis(50))
            .await;
        assert!(matches!(ended, Err(CaptureError::Deadline { .. })));
    }

    #[tokio::test]
    async fn a_missing_tool_is_named() {
        let ended = Tool::new(Path::new("/nonexistent/nix"))
            .run(Duration::from_secs(1))
            .await;
        assert!(
            ended
                .expect_err("missing")
                .to_string()
                .contains("/nonexistent/nix")
        );
    }
}
