//! `flywheel daemon-proxy`: the process of the proxy in front of Nix's daemon (`flywheel_nix::daemon_proxy`). Jobs start
//! it for themselves, so the help does not list it.

use std::path::PathBuf;

use clap::Args;
use tokio::sync::oneshot;

use flywheel_core::exit::{Exit, VerbError};
use flywheel_nix::daemon_proxy::{self, ProxyError};

/// Pass a job's connections to Nix's daemon on, and note the store paths in them.
///
/// A job starts it: standard input is a listening socket, standard output the connection to the job.
#[derive(Args, Debug)]
#[command(hide = true)]
pub(crate) struct Inputs {
    /// The link that the job's commands have for the daemon's socket.
    #[arg(value_name = "LINK")]
    link: PathBuf,
    /// The daemon's own socket.
    #[arg(value_name = "DAEMON")]
    daemon: PathBuf,
    /// The path of the socket that is listened at.
    #[arg(value_name = "SOCKET")]
    socket: PathBuf,
}

/// Runs the verb.
///
/// # Errors
/// As root, and by hand: without these descriptors.
pub(crate) async fn run(inputs: Inputs) -> Result<Exit, VerbError> {
    let (ended, end) = oneshot::channel();
    // A thread of the main thread's priority: those of the runtime have a lower one.
    let thread = std::thread::Builder::new()
        .name("daemon-proxy".into())
        .spawn(move || {
            let served = daemon_proxy::serve(&inputs.link, &inputs.daemon, &inputs.socket);
            // The receiver waits for it below.
            let _ = ended.send(served);
        })
        .map_err(ProxyError::Start)?;
    let served = end.await;
    thread
        .join()
        .map_err(|_| ProxyError::Start(std::io::Error::other("its thread panicked")))?;
    served.map_err(|_| ProxyError::Ended)??;
    Ok(Exit::Ok)
}
