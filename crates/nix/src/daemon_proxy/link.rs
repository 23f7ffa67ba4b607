//! The symbolic link that the job's commands use as the daemon's socket, and a short path for sockets whose own path is
//! longer than the system allows. A link is replaced in one step, so that a client finds one socket or the other, and never none.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

/// The most bytes of a socket's path, `sun_path` without its final zero (`unix(7)`).
pub(super) const SOCKET_PATH_LIMIT: usize = 107;

/// A link that leads to one of two sockets.
#[derive(Clone, Debug)]
pub(super) struct SocketLink {
    pub(super) path: PathBuf,
    /// The daemon's own socket.
    pub(super) direct: PathBuf,
    /// The proxy's.
    pub(super) proxy: PathBuf,
}

impl SocketLink {
    /// Makes the link, and points it to the daemon. One that an earlier run has left is replaced.
    pub(super) fn create(&self) -> io::Result<()> {
        match fs::symlink_metadata(&self.path) {
            Ok(found) if !found.is_symlink() => Err(io::ErrorKind::AlreadyExists.into()),
            _ => self.replace(&self.direct),
        }
    }

    pub(super) fn point_to_proxy(&self) -> io::Result<()> {
        self.swap(&self.direct, &self.proxy)
    }

    pub(super) fn point_to_daemon(&self) -> io::Result<()> {
        self.swap(&self.proxy, &self.direct)
    }

    /// Does nothing if the link leads elsewhere. The job may have put a daemon of its own in its place, which listens
    /// wherever `NIX_DAEMON_SOCKET_PATH` points.
    fn swap(&self, from: &Path, to: &Path) -> io::Result<()> {
        match fs::read_link(&self.path) {
            Ok(now) if now == from => self.replace(to),
            Ok(_) => Ok(()),
            // It is no link, or it is gone with its folder.
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::InvalidInput | io::ErrorKind::NotFound
                ) =>
            {
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    fn replace(&self, target: &Path) -> io::Result<()> {
        // The proxy and the process that started it may both be at it, so each has a name of its own.
        let mut new = self.path.clone().into_os_string();
        new.push(format!(".{}", std::process::id()));
        let _ = fs::remove_file(&new);
        symlink(target, &new)?;
        fs::rename(&new, &self.path)
    }
}

/// A path of a socket that the system takes, however long the socket's own path is.
pub(super) struct ShortPath {
    pub(super) path: PathBuf,
    /// The path may name the folder by this open file.
    _folder: Option<File>,
}

impl ShortPath {
    pub(super) fn of(socket: &Path) -> io::Result<Self> {
        if socket.as_os_str().len() <= SOCKET_PATH_LIMIT {
            return Ok(Self {
                path: socket.to_owned(),
                _folder: None,
            });
        }
        let (Some(folder), Some(name)) = (socket.parent(), socket.file_name()) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        let folder = File::open(folder)?;
        let path = Path::new("/proc/self/fd")
            .join(folder.as_raw_fd().to_string())
            .join(name);
        Ok(Self {
            path,
            _folder: Some(folder),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::{UnixListener, UnixStream};

    use super::*;

    #[test]
    fn it_leads_back_and_a_socket_in_its_place_is_left_alone() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let link = SocketLink {
            path: folder.path().join("link"),
            direct: "/daemon".into(),
            proxy: "/proxy".into(),
        };
        let target = || fs::read_link(&link.path).ok();
        symlink("/left/by/an/earlier/run", &link.path).expect("made");
        link.create().expect("made");
        assert_eq!(target(), Some("/daemon".into()));
        link.point_to_proxy().expect("pointed");
        assert_eq!(target(), Some("/proxy".into()));
        for _ in 0..2 {
            link.point_to_daemon().expect("pointed");
            assert_eq!(target(), Some("/daemon".into()));
        }
        fs::remove_file(&link.path).expect("removed");
        link.point_to_daemon().expect("nothing to do");
        fs::write(&link.path, "a socket").expect("written");
        link.point_to_daemon().expect("nothing to do");
        link.point_to_proxy().expect("nothing to do");
        assert_eq!(target(), None);
        assert!(link.create().is_err());
        assert_eq!(fs::read_dir(folder.path()).expect("listed").count(), 1);
    }

    #[test]
    fn a_socket_may_lie_deep() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let deep = folder.path().join("x".repeat(100)).join("y".repeat(100));
        fs::create_dir_all(&deep).expect("made");
        let socket = deep.join("socket");
        let short = ShortPath::of(&socket).expect("the folder is there");
        let _listener = UnixListener::bind(&short.path).expect("listens");
        UnixStream::connect(&short.path).expect("connects");
    }
}
