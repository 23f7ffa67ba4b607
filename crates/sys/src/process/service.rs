//! A server that this program starts for itself (`nix-daemon`): in a process group of its own, without this program's
//! streams, and stopped before this program ends.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::Path;
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::AsyncReadExt as _;
use tokio::process::{Child, ChildStderr, Command};
use tokio::task::JoinHandle;

use crate::process::capture::CaptureError;
use crate::process::own::{self, Registered};

/// Bytes of the end of a server's standard error that are kept, to explain its exit.
const TAIL_LIMIT: usize = 4096;
/// How long to wait for the end of the pipe after the server has exited: a grandchild may hold the pipe open.
const READ_GRACE: Duration = Duration::from_millis(500);

/// A running server. Dropping it kills its group; `stop` ends it cleanly.
pub struct Service {
    child: Child,
    _registered: Registered,
    group: Option<Pid>,
    tail: Arc<Mutex<Vec<u8>>>,
    reader: JoinHandle<()>,
}

impl Service {
    /// Starts a server without standard input and output. The end of its standard error is kept.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(
        program: &Path,
        arguments: &[&str],
        environment: &BTreeMap<String, OsString>,
    ) -> Result<Self, CaptureError> {
        let mut command = Command::new(program);
        // The server inherits nothing, because this program's environment holds the job's token.
        command
            .args(arguments)
            .env_clear()
            .envs(environment)
            .current_dir("/");
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        command.process_group(0).kill_on_drop(true);
        let start = |source| CaptureError::Start {
            program: program.to_owned(),
            source,
        };
        let (mut child, registered) = own::spawn(&mut command).map_err(start)?;
        let group = child
            .id()
            .and_then(|id| i32::try_from(id).ok())
            .and_then(Pid::from_raw);
        let tail = Arc::default();
        let stderr = child.stderr.take().expect("it was asked for above");
        let reader = tokio::spawn(keep_tail(stderr, Arc::clone(&tail)));
        Ok(Self {
            child,
            _registered: registered,
            group,
            tail,
            reader,
        })
    }

    pub fn is_alive(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Ends the server by `SIGTERM`, and after `grace` by `SIGKILL`. Gives the end of its standard error.
    pub async fn stop(mut self, grace: Duration) -> String {
        self.signal(Signal::TERM);
        if tokio::time::timeout(grace, self.child.wait())
            .await
            .is_err()
        {
            self.signal(Signal::KILL);
            // After `SIGKILL` the process is dead or dying, so reaping it takes no time.
            let _ = self.child.wait().await;
        }
        // The pipe ends with the server, unless a grandchild holds it open.
        let _ = tokio::time::timeout(READ_GRACE, &mut self.reader).await;
        self.stderr_tail()
    }

    fn stderr_tail(&self) -> String {
        let tail = self
            .tail
            .lock()
            .expect("nothing panics while it holds this lock");
        String::from_utf8_lossy(&tail).into_owned()
    }

    /// Does nothing once the child is reaped: the number may then belong to another process.
    fn signal(&self, signal: Signal) {
        if let (Some(group), Some(_)) = (self.group, self.child.id()) {
            // It fails for a group that is already gone.
            let _ = kill_process_group(group, signal);
        }
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.signal(Signal::KILL);
        self.reader.abort();
    }
}

async fn keep_tail(mut stderr: ChildStderr, tail: Arc<Mutex<Vec<u8>>>) {
    let mut bytes = [0_u8; 1024];
    // Read to the end, though little is kept: a full pipe would stop the server.
    while let Ok(read @ 1..) = stderr.read(&mut bytes).await {
        let mut tail = tail
            .lock()
            .expect("nothing panics while it holds this lock");
        tail.extend_from_slice(&bytes[..read]);
        let excess = tail.len().saturating_sub(TAIL_LIMIT);
        tail.drain(..excess);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Service {
        Service::start(Path::new("/bin/sh"), &["-c", script], &BTreeMap::new()).expect("starts")
    }

    async fn until(condition: impl Fn() -> bool) {
        let waited = async {
            while !condition() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), waited)
            .await
            .expect("in time");
    }

    fn runs(pid: u32) -> bool {
        // A zombie is no longer running; its parent has just not reaped it yet.
        std::fs::read_to_string(format!("/proc/{pid}/stat"))
            .is_ok_and(|stat| !stat.contains(") Z "))
    }

    #[tokio::test]
    async fn a_server_that_ignores_sigterm_is_killed_with_its_children() {
        let service = shell("trap '' TERM; sleep 600 & echo $! >&2; wait; wait");
        until(|| service.stderr_tail().ends_with('\n')).await;
        let child: u32 = service.stderr_tail().trim().parse().expect("a process id");
        service.stop(Duration::from_millis(50)).await;
        until(|| !runs(child)).await;
    }

    #[tokio::test]
    async fn a_dropped_server_is_gone() {
        let service = shell("sleep 600 & echo $! >&2; wait");
        until(|| service.stderr_tail().ends_with('\n')).await;
        let child: u32 = service.stderr_tail().trim().parse().expect("a process id");
        drop(service);
        until(|| !runs(child)).await;
    }

    #[tokio::test]
    async fn the_end_of_stderr_explains_an_exit() {
        let mut service = shell("echo no socket >&2; exit 1");
        let ended = tokio::time::timeout(Duration::from_secs(10), service.child.wait())
            .await
            .expect("in time");
        assert!(!ended.expect("ended").success() && !service.is_alive());
        assert_eq!(service.stop(Duration::ZERO).await, "no socket\n");
    }
}
