//! A tool that answers on its standard output what it is asked on its standard input (`nix-daemon --stdio`), and that
//! ends when its input does.

use std::time::Duration;

use tokio::io::BufReader;
use tokio::process::{Child, ChildStdin, ChildStdout};

use crate::process::own::Registered;

/// A running tool. Dropping it kills it; a tool of a program that was killed finds its input at an end.
#[derive(Debug)]
pub struct PipedTool {
    child: Child,
    _registered: Registered,
    pub input: ChildStdin,
    pub output: BufReader<ChildStdout>,
}

impl PipedTool {
    pub(super) fn new(mut child: Child, registered: Registered) -> Self {
        let input = child.stdin.take().expect("it was asked for");
        let output = child.stdout.take().expect("it was asked for");
        Self {
            child,
            _registered: registered,
            input,
            output: BufReader::new(output),
        }
    }

    /// Closes its standard input, and kills it if it has not ended after `grace`.
    pub async fn end(self, grace: Duration) {
        let Self {
            mut child, input, ..
        } = self;
        drop(input);
        if tokio::time::timeout(grace, child.wait()).await.is_err() {
            // After `SIGKILL` the process is dead or dying, so reaping it takes no time.
            let _ = child.kill().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _};

    use super::*;
    use crate::process::capture::Tool;

    #[tokio::test]
    async fn a_tool_answers_under_its_name_and_ends_with_its_input() {
        let script = "echo $0; while read -r line; do echo \"<$line>\"; done";
        let mut tool = Tool::new(Path::new("/bin/sh"))
            .args(["-c", script])
            .pipe("by-this-name")
            .expect("starts");
        let id = tool.child.id().expect("runs");
        tool.input.write_all(b"asked\n").await.expect("taken");
        let mut answer = String::new();
        tool.output.read_line(&mut answer).await.expect("read");
        tool.output.read_line(&mut answer).await.expect("read");
        assert_eq!(answer, "by-this-name\n<asked>\n");
        tool.end(Duration::from_secs(10)).await;
        assert!(!Path::new(&format!("/proc/{id}")).exists());
    }

    #[tokio::test]
    async fn one_that_does_not_end_is_killed() {
        let tool = Tool::new(Path::new("/bin/sh"))
            .args(["-c", "exec sleep 600"])
            .pipe("sh")
            .expect("starts");
        let id = tool.child.id().expect("runs");
        tool.end(Duration::from_millis(20)).await;
        assert!(!Path::new(&format!("/proc/{id}")).exists());
    }
}
