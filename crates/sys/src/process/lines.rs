//! Tools that report their progress on standard error, line by line (`nix eval`, `nix build`). Each line can be read as
//! it comes, and the tool can be ended at any moment, with all its children.

use std::io;
use std::process::ExitStatus;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::{AsyncBufRead, AsyncBufReadExt as _, BufReader};
use tokio::process::{Child, ChildStderr};

use crate::process::own::Registered;

/// The rest of a longer line is dropped. In bytes.
const LINE_LIMIT: usize = 256 * 1024;
/// How long to wait for a killed child to be reaped.
const REAP_TIMEOUT: Duration = Duration::from_millis(500);

/// A running tool. Dropping it kills its group.
#[derive(Debug)]
pub struct StreamedTool {
    child: Child,
    _registered: Registered,
    group: Option<Pid>,
    stderr: BufReader<ChildStderr>,
}

impl StreamedTool {
    pub(super) fn new(mut child: Child, registered: Registered) -> Self {
        let group = child
            .id()
            .and_then(|id| i32::try_from(id).ok())
            .and_then(Pid::from_raw);
        let stderr = BufReader::new(child.stderr.take().expect("it was asked for"));
        Self {
            child,
            _registered: registered,
            group,
            stderr,
        }
    }

    /// The process id, until the process is reaped.
    pub fn id(&self) -> Option<u32> {
        self.child.id()
    }

    /// The next line without its line break; invalid UTF-8 is replaced. `None` when the tool has closed its standard
    /// error. Cancel-safe: `held` keeps the beginning of a line.
    ///
    /// # Errors
    /// When the pipe cannot be read.
    pub async fn line(&mut self, held: &mut PartialLine) -> io::Result<Option<String>> {
        read_line(&mut self.stderr, held).await
    }

    /// Whether the next line has already been read from the pipe.
    pub fn has_line(&self) -> bool {
        self.stderr.buffer().contains(&b'\n')
    }

    /// Waits for the tool to exit.
    ///
    /// # Errors
    /// When the system cannot wait for it.
    pub async fn ended(&mut self) -> io::Result<ExitStatus> {
        self.child.wait().await
    }

    /// Ends the tool and its children: by `SIGTERM`, and after `grace` by `SIGKILL`.
    pub async fn stop(mut self, grace: Duration) {
        self.signal(Signal::TERM);
        if tokio::time::timeout(grace, self.child.wait())
            .await
            .is_err()
        {
            self.kill();
            // A killed process is gone at once, unless it hangs in the kernel; hence the limit.
            let _ = tokio::time::timeout(REAP_TIMEOUT, self.child.wait()).await;
        }
    }

    /// Sends `SIGKILL` to the tool and its children.
    pub(crate) fn kill(&self) {
        self.signal(Signal::KILL);
    }

    /// Does nothing once the child is reaped: the number may then belong to another process.
    fn signal(&self, signal: Signal) {
        if let (Some(group), Some(_)) = (self.group, self.child.id()) {
            // It fails for a group that is already gone.
            let _ = kill_process_group(group, signal);
        }
    }
}

impl Drop for StreamedTool {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The beginning of a line that has not ended yet.
#[derive(Debug, Default)]
pub struct PartialLine(Vec<u8>);

async fn read_line(
    pipe: &mut (impl AsyncBufRead + Unpin),
    held: &mut PartialLine,
) -> io::Result<Option<String>> {
    loop {
        let bytes = pipe.fill_buf().await?;
        if bytes.is_empty() {
            return Ok((!held.0.is_empty()).then(|| take(held)));
        }
        let end = bytes.iter().position(|byte| *byte == b'\n');
        let (part, used) = end.map_or((bytes, bytes.len()), |end| (&bytes[..end], end + 1));
        // The rest of a long line is consumed, too, but not kept.
        let room = LINE_LIMIT.saturating_sub(held.0.len()).min(part.len());
        held.0.extend_from_slice(&part[..room]);
        // Bytes are consumed and kept without a wait in between, so that dropping this future loses none.
        pipe.consume(used);
        if end.is_some() {
            return Ok(Some(take(held)));
        }
    }
}

fn take(held: &mut PartialLine) -> String {
    let bytes = std::mem::take(&mut held.0);
    String::from_utf8_lossy(&bytes)
        .trim_end_matches('\r')
        .to_owned()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::process::capture::Tool;

    fn shell(script: &str) -> StreamedTool {
        Tool::new(Path::new("/bin/sh"))
            .args(["-c", script])
            .stream_stderr()
            .expect("starts")
    }

    #[tokio::test]
    async fn lines_come_as_they_are_printed() {
        let mut tool = shell("echo one >&2; printf 'two\\r\\nlast' >&2; echo dropped; exit 3");
        let mut held = PartialLine::default();
        let mut lines = Vec::new();
        while let Some(line) = tool.line(&mut held).await.expect("read") {
            lines.push(line);
        }
        assert_eq!(lines, ["one", "two", "last"]);
        assert_eq!(tool.ended().await.expect("ends").code(), Some(3));
    }

    #[tokio::test]
    async fn a_line_without_end_is_cut() {
        let mut tool = shell("head -c 400000 /dev/zero | tr '\\0' x >&2; echo >&2; echo next >&2");
        let mut held = PartialLine::default();
        assert_eq!(
            tool.line(&mut held)
                .await
                .expect("read")
                .expect("a line")
                .len(),
            LINE_LIMIT
        );
        assert_eq!(
            tool.line(&mut held).await.expect("read").as_deref(),
            Some("next")
        );
    }

    #[tokio::test]
    async fn a_tool_that_does_not_want_to_end_is_killed() {
        let mut tool = shell("trap '' TERM; echo up >&2; while :; do sleep 1; done");
        let mut held = PartialLine::default();
        assert_eq!(
            tool.line(&mut held).await.expect("read").as_deref(),
            Some("up")
        );
        let id = tool.id().expect("runs");
        tool.stop(Duration::from_millis(50)).await;
        assert!(!Path::new(&format!("/proc/{id}")).exists());
    }
}
