//! A process of this program's own that serves the job's commands beside it, and that outlives this program if it has
//! to: it is neither killed with its handle, nor by a signal for this program's process group.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::JoinHandle;

use tokio::process::{Child, Command};
use tokio::runtime::Handle;
use tokio::sync::oneshot;

use crate::process::detached::CLOSE_AND_EXEC;
use crate::process::own::{self, Registered};

/// The shells that close what the step has left open. Small images have one of them; without any, nothing is closed.
const SHELLS: [&str; 3] = ["/bin/sh", "/bin/bash", "/usr/bin/bash"];

/// What a companion is started with.
#[derive(Debug)]
pub struct CompanionCommand {
    pub program: PathBuf,
    pub arguments: Vec<OsString>,
    /// The whole environment: nothing is inherited, because this program's environment holds the job's token.
    pub environment: BTreeMap<String, OsString>,
    pub stdin: OwnedFd,
    pub stdout: OwnedFd,
}

/// A running companion. Dropping the handle leaves it running.
#[derive(Debug)]
pub struct Companion {
    child: Child,
    _registered: Registered,
}

impl Companion {
    /// Waits for its end. Cancel-safe.
    ///
    /// # Errors
    /// When the system does not give its exit status.
    pub async fn wait(&mut self) -> io::Result<ExitStatus> {
        self.child.wait().await
    }

    pub fn kill(&mut self) {
        // It fails for a process that has ended.
        let _ = self.child.start_kill();
    }

    /// `None` after its end.
    pub fn id(&self) -> Option<u32> {
        self.child.id()
    }
}

type Request = (
    CompanionCommand,
    Handle,
    oneshot::Sender<io::Result<Companion>>,
);

/// A thread that keeps the priority of the thread that made it, to start a companion with that priority later. A child
/// inherits the niceness of the thread that starts it, and the runtime's threads have a lowered one
/// (`host/priority.rs`).
#[derive(Debug)]
pub struct Starter {
    requests: Option<SyncSender<Request>>,
    thread: Option<JoinHandle<()>>,
}

impl Starter {
    /// To be made by a thread of full priority.
    ///
    /// # Errors
    /// When the thread cannot be started.
    pub fn new() -> io::Result<Self> {
        let (requests, received) = sync_channel::<Request>(1);
        let thread = std::thread::Builder::new()
            .name("starter".into())
            .spawn(move || {
                while let Ok((command, runtime, answer)) = received.recv() {
                    let _in_runtime = runtime.enter();
                    // The receiver is gone if the caller was cancelled; the companion then finds its other end closed.
                    let _ = answer.send(start(command));
                }
            })?;
        Ok(Self {
            requests: Some(requests),
            thread: Some(thread),
        })
    }

    /// Starts a companion.
    ///
    /// # Errors
    /// When it cannot be started.
    pub async fn start(&self, command: CompanionCommand) -> io::Result<Companion> {
        let (answer, started) = oneshot::channel();
        let request = (command, Handle::current(), answer);
        let requests = self.requests.as_ref().expect("taken by `drop` alone");
        // The thread takes a request at once, unless it starts another companion at the moment.
        requests
            .try_send(request)
            .map_err(|_| io::Error::from(io::ErrorKind::ResourceBusy))?;
        started
            .await
            .unwrap_or_else(|_| Err(io::ErrorKind::BrokenPipe.into()))
    }
}

impl Drop for Starter {
    fn drop(&mut self) {
        // Without a sender the thread ends.
        drop(self.requests.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn start(command: CompanionCommand) -> io::Result<Companion> {
    // A descriptor that the step's shell has left open would keep the runner waiting for this process.
    let shell = SHELLS.iter().find(|shell| Path::new(shell).exists());
    let mut started = if let Some(shell) = shell {
        let mut started = Command::new(shell);
        started.arg("-c").arg(CLOSE_AND_EXEC).arg(command.program);
        started
    } else {
        Command::new(command.program)
    };
    started
        .args(command.arguments)
        .env_clear()
        .envs(command.environment)
        .current_dir("/")
        .stdin(command.stdin)
        .stdout(command.stdout)
        // The step's own stream would keep the runner waiting, too.
        .stderr(Stdio::null())
        .process_group(0);
    let (child, registered) = own::spawn(&mut started)?;
    Ok(Companion {
        child,
        _registered: registered,
    })
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    use super::*;

    fn niceness() -> i32 {
        rustix::process::nice(0).expect("always known")
    }

    #[tokio::test]
    async fn it_has_the_priority_of_the_threads_maker_and_nothing_of_the_environment() {
        let starter = Starter::new().expect("a thread");
        let full = niceness();
        let started = std::thread::spawn(move || {
            // As the runtime's threads do (`host/priority.rs`).
            rustix::process::nice(1).expect("allowed to everybody");
            assert_ne!(niceness(), full);
            let (mut ours, theirs) = UnixStream::pair().expect("a pair");
            let command = CompanionCommand {
                program: "/bin/sh".into(),
                arguments: ["-c", "nice; env"].map(OsString::from).to_vec(),
                environment: BTreeMap::from([("KEPT".to_owned(), "yes".into())]),
                stdin: theirs.try_clone().expect("a copy").into(),
                stdout: theirs.into(),
            };
            let runtime = tokio::runtime::Runtime::new().expect("a runtime");
            let mut companion = runtime.block_on(starter.start(command)).expect("started");
            ours.set_read_timeout(Some(Duration::from_secs(20)))
                .expect("set");
            let mut printed = String::new();
            ours.read_to_string(&mut printed).expect("read");
            let status = runtime.block_on(companion.wait()).expect("known");
            assert!(status.success());
            printed
        });
        let printed = started.join().expect("no panic");
        let (nice, environment) = printed.split_once('\n').expect("two parts");
        assert_eq!(nice, full.to_string());
        let names: Vec<&str> = environment
            .lines()
            .filter_map(|line| Some(line.split_once('=')?.0))
            .filter(|name| !["PWD", "OLDPWD", "SHLVL", "_"].contains(name))
            .collect();
        assert_eq!(names, ["KEPT"]);
    }
}
