//! A proxy with a socket of its own in front of Nix's daemon. It records which store paths the clients of one job name,
//! and changes nothing that passes. The job's commands get a symbolic link as `NIX_DAEMON_SOCKET_PATH`: it points to the
//! proxy from `activate` until `deactivate` or the proxy's end, and to the daemon itself at all other times.
//!
//! The proxy is a process of its own, so that the end of the job's `flywheel` by a signal ends no build. The listening
//! socket belongs to both processes: where the proxy ends, this process serves the clients that had followed the link
//! before it was pointed back, and none finds a dead socket.

mod lasting_link;
mod link;
mod names;
mod protocol;
mod relay;
mod scanner;
mod server;
mod supervise;

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs::{self, Permissions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::os::unix::net::{UnixListener as StdListener, UnixStream as StdStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::process::{geteuid, getuid};
use thiserror::Error;
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::timeout;

pub use crate::daemon_proxy::lasting_link::LastingLink;
use crate::daemon_proxy::link::{SOCKET_PATH_LIMIT, ShortPath, SocketLink};
use crate::daemon_proxy::names::NAME_COUNT_LIMIT;
use crate::daemon_proxy::protocol::{Lines, Report};
use crate::daemon_proxy::supervise::{Request, Supervisor};
use crate::store_path::StorePath;
use flywheel_core::exit::{Exit, Explain};
use flywheel_core::progress::Sink;
use flywheel_sys::process::companion::{Companion, CompanionCommand, Starter};
use flywheel_sys::runner::env::{Env, program_and_arguments};

/// The hidden verb that is the proxy's process.
pub const VERB: &str = "daemon-proxy";
/// The variables that the proxy's process keeps: by them a runner finds what a job has left behind.
const KEPT_VARIABLES: [&str; 3] = ["RUNNER_TRACKING_ID", "CI_JOB_ID", "GITHUB_RUN_ID"];
/// The link's name in the private folder, short because it counts towards `SOCKET_PATH_LIMIT`.
const LINK_NAME: &str = "nix-daemon";
/// The process is ready within milliseconds; on a machine that swaps it may take longer.
const START_LIMIT: Duration = Duration::from_secs(10);
/// A flush is answered within a second, by the proxy's own limit.
const FLUSH_LIMIT: Duration = Duration::from_secs(3);
/// The proxy ends at once if no client is connected; otherwise it goes on by itself.
const STOP_LIMIT: Duration = Duration::from_secs(2);

/// Why there is no proxy. The job goes on without: its clients reach the daemon directly.
#[derive(Debug, Error)]
pub enum ProxyError {
    /// The daemon would trust every client behind the proxy.
    #[error("a proxy in front of Nix's daemon must not run as root")]
    Root,
    #[error("the path of the socket `{0}` is longer than {SOCKET_PATH_LIMIT} bytes")]
    TooLong(PathBuf),
    #[error("`{0}` is not a folder that belongs to this user alone")]
    Untrusted(PathBuf),
    #[error("the link to the daemon's socket could not be made")]
    Link(#[source] io::Error),
    #[error("the proxy in front of Nix's daemon could not be started")]
    Start(#[source] io::Error),
    #[error("the proxy in front of Nix's daemon has ended")]
    Ended,
}

impl Explain for ProxyError {
    fn exit(&self) -> Exit {
        Exit::Host
    }

    fn hint(&self) -> Option<String> {
        match self {
            Self::Root => Some("Run the job as an ordinary user.".into()),
            Self::TooLong(_) => Some(
                "Point `TMPDIR` (in a job: `RUNNER_TEMP`) to a folder with a shorter path.".into(),
            ),
            _ => None,
        }
    }
}

/// The link, and the proxy behind it while there is one. When dropped, the link leads to the daemon again, and the
/// proxy's clients are served to their end.
#[derive(Debug)]
pub struct DaemonProxy {
    shared: Arc<Shared>,
    program: PathBuf,
    environment: BTreeMap<String, OsString>,
    starter: Starter,
    running: Option<Running>,
    /// Whether there has been a proxy.
    started: bool,
}

#[derive(Debug)]
struct Running {
    process: Option<u32>,
    requests: mpsc::Sender<Request>,
    task: JoinHandle<()>,
}

/// What the supervising task and the handle share.
#[derive(Debug)]
struct Shared {
    link: SocketLink,
    named: Mutex<BTreeSet<StorePath>>,
    /// Derivations that clients have asked to be built.
    wanted: Mutex<BTreeSet<StorePath>>,
    /// Whether the proxy has ended by itself, or hangs.
    failed: AtomicBool,
    /// Whether names may be missing for another reason.
    lossy: AtomicBool,
    sink: Sink,
}

impl DaemonProxy {
    /// Makes the link in a private folder (0700), and points it to the daemon's socket; starts no process. To be called
    /// by a thread of full priority, which the proxy will have ([`Starter`]). The folder has to stay for as long as a
    /// command may use the link.
    ///
    /// # Errors
    /// When the link cannot be made, or the system would not take its path.
    pub fn prepare(
        daemon_socket: &Path,
        folder: &Path,
        env: &Env,
        sink: Sink,
    ) -> Result<Self, ProxyError> {
        let found = fs::symlink_metadata(folder).map_err(ProxyError::Link)?;
        let private = found.is_dir()
            && found.uid() == geteuid().as_raw()
            && found.mode().trailing_zeros() >= 6;
        if !private {
            return Err(ProxyError::Untrusted(folder.to_owned()));
        }
        let link = SocketLink {
            path: folder.join(LINK_NAME),
            direct: std::path::absolute(daemon_socket).map_err(ProxyError::Link)?,
            proxy: folder.join(format!("proxy-{}", std::process::id())),
        };
        if link.path.as_os_str().len() > SOCKET_PATH_LIMIT {
            return Err(ProxyError::TooLong(link.path));
        }
        let (program, _) = program_and_arguments().map_err(ProxyError::Start)?;
        let starter = Starter::new().map_err(ProxyError::Start)?;
        link.create().map_err(ProxyError::Link)?;
        let kept = KEPT_VARIABLES.iter().filter_map(|name| {
            let value = env.get(name)?;
            Some(((*name).to_owned(), value.into()))
        });
        Ok(Self {
            shared: Arc::new(Shared {
                link,
                named: Mutex::default(),
                wanted: Mutex::default(),
                failed: AtomicBool::new(false),
                lossy: AtomicBool::new(false),
                sink,
            }),
            program,
            environment: kept.collect(),
            starter,
            running: None,
            started: false,
        })
    }

    /// Takes the proxy's process from another program than this one.
    #[must_use]
    pub fn with_program(mut self, program: PathBuf) -> Self {
        self.program = program;
        self
    }

    /// What the job's commands get as `NIX_DAEMON_SOCKET_PATH`.
    pub fn link(&self) -> &Path {
        &self.shared.link.path
    }

    /// Lets the clients that connect from now on go through the proxy, which is started if it does not run yet.
    ///
    /// # Errors
    /// As root, and when the proxy cannot be started or has ended before. The link then leads to the daemon.
    pub async fn activate(&mut self) -> Result<(), ProxyError> {
        if self.running.is_none() {
            self.running = Some(self.start().await?);
            self.started = true;
        }
        let link = &self.shared.link;
        link.point_to_proxy().map_err(ProxyError::Link)?;
        // Check only after the link was changed: the supervisor sets `failed` first and then points the link back.
        if self.shared.failed.load(Ordering::SeqCst) {
            self.deactivate();
            return Err(ProxyError::Ended);
        }
        Ok(())
    }

    /// Lets the clients that connect from now on reach the daemon directly. Those that are connected are served, and
    /// recorded, to their end.
    pub fn deactivate(&self) {
        self.shared.point_to_daemon();
    }

    /// The store paths that have passed so far, and more: the caller compares them with paths that exist. An intermediate
    /// floating content-addressed output does not pass, because no client asks for it by name; the derivation that it
    /// was built from does.
    pub fn named(&self) -> BTreeSet<StorePath> {
        self.shared.named().clone()
    }

    /// The derivations that clients have asked the daemon to build, valid or not.
    pub fn wanted(&self) -> BTreeSet<StorePath> {
        self.shared.wanted().clone()
    }

    pub fn has_named(&self, path: &StorePath) -> bool {
        self.shared.named().contains(path)
    }

    /// Whether `named` has everything that clients named on connections through the proxy: it was started, it lives or
    /// was stopped in order, and there were not too many names. Connections from before `activate` or after
    /// `deactivate` do not pass it.
    pub fn is_complete(&self) -> bool {
        self.started
            && !self.shared.failed.load(Ordering::SeqCst)
            && !self.shared.lossy.load(Ordering::SeqCst)
    }

    /// Waits until `named` has everything that clients have sent before this call. False if it cannot be had in time,
    /// and when no proxy runs.
    pub async fn flush(&self) -> bool {
        let Some(running) = &self.running else {
            return false;
        };
        let (answer, answered) = oneshot::channel();
        let flushed = async {
            let sent = running.requests.send(Request::Flush(answer)).await;
            sent.is_ok() && answered.await.unwrap_or(false)
        };
        timeout(FLUSH_LIMIT, flushed).await.unwrap_or(false)
    }

    /// The process of the proxy, if it was started.
    pub fn process(&self) -> Option<u32> {
        self.running.as_ref()?.process
    }

    /// Points the link to the daemon, takes in the last names, and ends the proxy. One that still has clients goes on
    /// by itself until they end.
    pub async fn stop(&mut self) {
        self.deactivate();
        if self.running.is_some() && !self.flush().await {
            self.shared.lossy.store(true, Ordering::SeqCst);
        }
        if let Some(mut running) = self.running.take() {
            let stopped = async {
                // It fails when the task has ended already.
                let _ = running.requests.send(Request::Stop).await;
                let _ = (&mut running.task).await;
            };
            if timeout(STOP_LIMIT, stopped).await.is_err() {
                running.task.abort();
                let _ = running.task.await;
            }
            let _ = fs::remove_file(&self.shared.link.proxy);
        }
    }

    async fn start(&self) -> Result<Running, ProxyError> {
        if is_root() {
            return Err(ProxyError::Root);
        }
        let link = &self.shared.link;
        let listener = bind(&link.proxy).map_err(ProxyError::Start)?;
        let (ours, theirs) = StdStream::pair().map_err(ProxyError::Start)?;
        let command = CompanionCommand {
            program: self.program.clone(),
            arguments: arguments(link),
            environment: self.environment.clone(),
            stdin: OwnedFd::from(listener.try_clone().map_err(ProxyError::Start)?),
            stdout: theirs.into(),
        };
        let companion = self.starter.start(command).await;
        let mut companion = companion.map_err(ProxyError::Start)?;
        ours.set_nonblocking(true).map_err(ProxyError::Start)?;
        let control = UnixStream::from_std(ours).map_err(ProxyError::Start)?;
        let (from, to) = control.into_split();
        let mut lines = Lines::new(from);
        let ready = timeout(START_LIMIT, lines.report()).await;
        if !matches!(ready, Ok(Some(Report::Ready))) {
            let error = failed(&mut companion).await;
            let _ = fs::remove_file(&link.proxy);
            return Err(ProxyError::Start(error));
        }
        let listener = server::listening(listener).map_err(ProxyError::Start)?;
        let (requests, received) = mpsc::channel(1);
        let process = companion.id();
        let supervisor =
            Supervisor::new(Arc::clone(&self.shared), companion, (lines, to), listener);
        let task = tokio::spawn(supervisor.run(received));
        Ok(Running {
            process,
            requests,
            task,
        })
    }
}

impl Drop for DaemonProxy {
    fn drop(&mut self) {
        self.deactivate();
        if let Some(running) = &self.running {
            // With the task the connection to the proxy ends, and by that the proxy.
            running.task.abort();
            let _ = fs::remove_file(&self.shared.link.proxy);
        }
    }
}

impl Shared {
    fn add(&self, name: &str) {
        if let Some(derivation) = name.strip_suffix('!') {
            if let Ok(path) = StorePath::from_base_name(derivation) {
                let mut wanted = self.wanted();
                if wanted.len() < NAME_COUNT_LIMIT {
                    wanted.insert(path);
                }
            }
            return;
        }
        if let Ok(path) = StorePath::from_base_name(name) {
            let mut named = self.named();
            if named.len() < NAME_COUNT_LIMIT {
                named.insert(path);
            } else {
                self.lossy.store(true, Ordering::SeqCst);
            }
        }
    }

    fn named(&self) -> std::sync::MutexGuard<'_, BTreeSet<StorePath>> {
        self.named
            .lock()
            .expect("nothing panics while it holds this lock")
    }

    fn wanted(&self) -> std::sync::MutexGuard<'_, BTreeSet<StorePath>> {
        self.wanted
            .lock()
            .expect("nothing panics while it holds this lock")
    }

    fn point_to_daemon(&self) {
        if let Err(error) = self.link.point_to_daemon() {
            // Its clients are served all the same: this process listens at the same socket.
            self.sink.degraded(
                "publication",
                format!(
                    "the link to the socket of Nix's daemon, `{}`, could not be pointed back: {error}",
                    self.link.path.display()
                ),
            );
        }
    }
}

/// Runs the proxy in this process: its standard input is the listening socket, its standard output the connection to
/// the process that started it. The calling thread lends its priority to every answer of the daemon.
///
/// # Errors
/// As root, and when the descriptors are not these.
pub fn serve(link: &Path, daemon_socket: &Path, proxy_socket: &Path) -> Result<(), ProxyError> {
    let copy = |fd: std::os::fd::BorrowedFd<'_>| fd.try_clone_to_owned();
    let listener = copy(rustix::stdio::stdin()).map_err(ProxyError::Start)?;
    let control = copy(rustix::stdio::stdout()).map_err(ProxyError::Start)?;
    let link = SocketLink {
        path: link.to_owned(),
        direct: daemon_socket.to_owned(),
        proxy: proxy_socket.to_owned(),
    };
    server::run(link, StdListener::from(listener), StdStream::from(control))
}

fn arguments(link: &SocketLink) -> Vec<OsString> {
    let paths = [&link.path, &link.direct, &link.proxy];
    let paths = paths.iter().map(|path| path.as_os_str().to_owned());
    std::iter::once(VERB.into()).chain(paths).collect()
}

/// Listens at a socket that its user alone may connect to.
fn bind(socket: &Path) -> io::Result<StdListener> {
    // One that is there was left by a process that had this one's number.
    let _ = fs::remove_file(socket);
    let listener = StdListener::bind(&ShortPath::of(socket)?.path)?;
    // Until now the folder alone kept others away.
    fs::set_permissions(socket, Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Whether the daemon would take this process for root.
fn is_root() -> bool {
    geteuid().is_root() || getuid().is_root()
}

/// Ends a proxy that did not become ready; how it ended.
async fn failed(companion: &mut Companion) -> io::Error {
    companion.kill();
    let ended = timeout(STOP_LIMIT, companion.wait()).await;
    match ended {
        Ok(Ok(status)) => io::Error::other(format!("it was not ready, and ended with {status}")),
        _ => io::ErrorKind::TimedOut.into(),
    }
}
