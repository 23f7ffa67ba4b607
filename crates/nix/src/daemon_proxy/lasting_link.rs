//! The folder of a link that outlives the process that made it. The later steps of a job have the link in their
//! environment, and so has whatever they leave running; so the folder stays, and its link leads to a socket that
//! somebody listens at, whichever process has been killed.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::net::UnixStream;
use tokio::time::timeout;

use crate::daemon_proxy::LINK_NAME;
use crate::daemon_proxy::link::{ShortPath, SocketLink};

/// A link to the daemon's own socket, which the steps' variable does not name any more.
const DAEMON_NAME: &str = "daemon";
/// A process on this machine accepts a connection at once, or never.
const CONNECT_LIMIT: Duration = Duration::from_secs(2);

/// A private folder with the link to the daemon's socket, and what that socket is.
#[derive(Clone, Debug)]
pub struct LastingLink(PathBuf);

impl LastingLink {
    /// Makes nothing yet.
    pub fn in_folder(folder: PathBuf) -> Self {
        Self(folder)
    }

    pub fn folder(&self) -> &Path {
        &self.0
    }

    /// The value of `NIX_DAEMON_SOCKET_PATH` for the later steps.
    pub fn path(&self) -> PathBuf {
        self.0.join(LINK_NAME)
    }

    /// Makes the folder (0700), and returns the daemon's own socket, which it notes. `reached` is the socket that clients
    /// reach the daemon by now: where that is this link, an earlier process has noted the daemon's own.
    ///
    /// # Errors
    /// When the folder or the note cannot be made.
    pub fn make(&self, reached: &Path) -> io::Result<PathBuf> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.0)?;
        if reached == self.path() {
            return self
                .daemon_socket()
                .ok_or_else(|| io::ErrorKind::NotFound.into());
        }
        let daemon = std::path::absolute(reached)?;
        let note = self.0.join(DAEMON_NAME);
        let new = self.0.join(format!("{DAEMON_NAME}.{}", std::process::id()));
        let _ = fs::remove_file(&new);
        symlink(&daemon, &new)?;
        fs::rename(&new, note)?;
        Ok(daemon)
    }

    /// The daemon's own socket, if the link was ever made.
    pub fn daemon_socket(&self) -> Option<PathBuf> {
        fs::read_link(self.0.join(DAEMON_NAME)).ok()
    }

    /// Points the link to the daemon if nobody listens at the socket that it leads to: the proxy and the process that
    /// watches it were killed together, so that neither has done so.
    pub async fn repair(&self) {
        let (Some(direct), Ok(proxy)) = (self.daemon_socket(), fs::read_link(self.path())) else {
            return;
        };
        if proxy == direct || is_served(&proxy).await {
            return;
        }
        let link = SocketLink {
            path: self.path(),
            direct,
            proxy,
        };
        // If it fails, Nix names the socket that it cannot connect to.
        let _ = link.point_to_daemon();
    }
}

/// Whether a process listens at the socket. One that hangs counts: the process that watches it sees to that.
async fn is_served(socket: &Path) -> bool {
    let Ok(short) = ShortPath::of(socket) else {
        return false;
    };
    match timeout(CONNECT_LIMIT, UnixStream::connect(&short.path)).await {
        Ok(connected) => connected.is_ok(),
        Err(_) => true,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[tokio::test]
    async fn a_link_to_a_dead_proxy_leads_to_the_daemon_again_and_one_to_a_living_one_stays() {
        let base = tempfile::tempdir().expect("temporary folder");
        let lasting = LastingLink::in_folder(base.path().join("nix"));
        // Nothing is there to be repaired.
        lasting.repair().await;
        let daemon = base.path().join("socket");
        assert_eq!(lasting.make(&daemon).expect("made"), daemon);
        let link = SocketLink {
            path: lasting.path(),
            direct: daemon.clone(),
            proxy: lasting.folder().join("proxy-1"),
        };
        link.create().expect("made");
        let target = || fs::read_link(lasting.path()).expect("a link");
        // A proxy that lives.
        let listener = UnixListener::bind(&link.proxy).expect("listens");
        link.point_to_proxy().expect("pointed");
        lasting.repair().await;
        assert_eq!(target(), link.proxy);
        // Its socket stays when it is killed.
        drop(listener);
        assert!(link.proxy.exists());
        lasting.repair().await;
        assert_eq!(target(), daemon);
        // A process that is started with the link in its environment still knows the daemon.
        assert_eq!(lasting.make(&lasting.path()).expect("noted"), daemon);
        assert_eq!(lasting.daemon_socket(), Some(daemon));
    }
}
