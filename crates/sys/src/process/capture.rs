//! Short-lived tools (`nix`, `apt-get`): run to their end within a deadline, with their output captured.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::File;
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
use crate::process::piped::PipedTool;

/// The rest of a longer output is dropped. The list of all paths of a large store fits easily. In bytes.
const OUTPUT_LIMIT: u64 = 256 * 1024 * 1024;

/// Why a tool has no result.
#[derive(Debug, Error)]
pub enum CaptureError {
    #[error("`{program}` could not be started")]
    Start {
        program: PathBuf,
        #[source]
        source: io::Error,
    },
    /// The tool exceeded its time limit, and was killed with all its children.
    #[error("`{program}` did not end within {} s", limit.as_secs())]
    Deadline { program: PathBuf, limit: Duration },
    #[error("what `{program}` printed could not be read")]
    Read {
        program: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// A tool's exit status and output.
#[derive(Debug)]
pub struct Output {
    pub status: ExitStatus,
    pub stdout: Vec<u8>,
    pub stderr: String,
}

impl Output {
    /// The standard output as text; invalid UTF-8 is replaced.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }
}

/// A tool to run: the absolute path of a program, its arguments (never a secret), and its whole environment.
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

    #[must_use]
    pub fn arg(mut self, argument: impl AsRef<OsStr>) -> Self {
        self.arguments.push(argument.as_ref().to_owned());
        self
    }

    #[must_use]
    pub fn args<S: AsRef<OsStr>>(mut self, arguments: impl IntoIterator<Item = S>) -> Self {
        self.arguments.extend(
            arguments
                .into_iter()
                .map(|argument| argument.as_ref().to_owned()),
        );
        self
    }

    #[must_use]
    pub fn env(mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.environment
            .insert(name.as_ref().to_owned(), value.as_ref().to_owned());
        self
    }

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

    /// Sets the working directory.
    #[must_use]
    pub fn in_folder(mut self, folder: &Path) -> Self {
        self.folder = Some(folder.to_owned());
        self
    }

    /// Starts the tool in a process group of its own, without standard input, and with its standard output dropped. The
    /// caller has to read its standard error.
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

    /// Starts the tool in a process group of its own, with pipes for its standard input and output, and with its
    /// standard error dropped. `name` is the name that it sees itself started by.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn pipe(self, name: &str) -> Result<PipedTool, CaptureError> {
        let mut command = self.command();
        command.arg0(name);
        command.stdin(Stdio::piped()).stderr(Stdio::null());
        let start = |source| CaptureError::Start {
            program: self.program,
            source,
        };
        let (child, registered) = own::spawn(&mut command).map_err(start)?;
        Ok(PipedTool::new(child, registered))
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        // The child inherits nothing, because this program's environment holds the job's token.
        command
            .args(&self.arguments)
            .env_clear()
            .envs(&self.environment);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        // A caller that is cancelled must not leave the tool running.
        command.process_group(0).kill_on_drop(true);
        if let Some(folder) = &self.folder {
            command.current_dir(folder);
        }
        command
    }

    /// Runs the tool to its end in a process group of its own, without standard input.
    ///
    /// # Errors
    /// When it cannot be started or does not end within `limit`; in the latter case its whole group is killed.
    pub async fn run(self, limit: Duration) -> Result<Output, CaptureError> {
        self.run_with(Stdio::null(), limit).await
    }

    /// As `run`, with a file as its standard input. The tool shares the file's lock, if it has one.
    ///
    /// # Errors
    /// As `run`.
    pub async fn run_on(self, input: File, limit: Duration) -> Result<Output, CaptureError> {
        self.run_with(input.into(), limit).await
    }

    async fn run_with(self, input: Stdio, limit: Duration) -> Result<Output, CaptureError> {
        let mut command = self.command();
        command.stdin(input);
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
                // After `SIGKILL` the process is dead or dying, so reaping it takes no time.
                let _ = child.wait().await;
                Err(CaptureError::Deadline { program, limit })
            }
        }
    }
}

async fn collect(child: &mut Child) -> io::Result<Output> {
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    // Both at once: a tool that fills one pipe while only the other is read would wait for ever.
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
        // The rest is read, too: a full pipe would stop the tool.
        tokio::io::copy(&mut pipe, &mut tokio::io::sink()).await?;
    }
    Ok(bytes)
}

fn kill_group(group: Option<u32>) {
    let pid = group
        .and_then(|id| i32::try_from(id).ok())
        .and_then(Pid::from_raw);
    if let Some(pid) = pid {
        // It fails for a group that is already gone.
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
