//! The protocol on the socket of a folder that two processes share: a line of JSON each way, then either the
//! bytes of one client's connection, or pings. Only processes of one user talk to each other.

use std::fs::{File, Permissions};
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;

use crate::server::folder::Layout;
use crate::server::terms::WireTerms;

/// Changes with the meaning of a message.
pub(crate) const VERSION: u32 = 1;
/// Maximum length of a line, some 8,000 tokens.
const LINE_LIMIT: usize = 1024 * 1024;
/// The kernel takes names of sockets of up to 107 bytes.
const NAME_LIMIT: usize = 107;

/// The first line from the process that connects.
#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Hello {
    /// This connection shows that the process lives, and carries pings.
    Join { version: u32, terms: WireTerms },
    /// This connection is one of a client of the process with this number.
    Client { guest: u64 },
}

/// The answer to it.
#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Reply {
    Joined { guest: u64 },
    Ready,
    Refused { reason: String },
}

/// Creates the folder's socket (0600). Replaces what a killed process left; the caller holds the folder's lock.
///
/// # Errors
/// When the disk fails, or the file system has no sockets.
pub(crate) fn bind(layout: &Layout) -> io::Result<UnixListener> {
    let unfinished = layout.unfinished("socket");
    let (_folder, short) = short_name(&unfinished)?;
    let listener = UnixListener::bind(short)?;
    std::fs::set_permissions(&unfinished, Permissions::from_mode(0o600))?;
    // Under its name the socket exists only with its mode.
    std::fs::rename(&unfinished, layout.socket())?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Connects to the folder's socket. Does not wait: a queue that is full is an error.
///
/// # Errors
/// `NotFound` or `ConnectionRefused` if no process listens.
pub(crate) async fn dial(layout: &Layout) -> io::Result<UnixStream> {
    let (_folder, short) = short_name(&layout.socket())?;
    UnixStream::connect(short).await
}

/// A name for `file` that the kernel accepts for a socket, and what must be open while it is used.
fn short_name(file: &Path) -> io::Result<(Option<File>, PathBuf)> {
    let (Some(folder), Some(name)) = (file.parent(), file.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    if file.as_os_str().len() <= NAME_LIMIT {
        return Ok((None, file.to_owned()));
    }
    let folder = File::open(folder)?;
    let short = format!("/proc/self/fd/{}", folder.as_raw_fd());
    Ok((Some(folder), Path::new(&short).join(name)))
}

/// The user of the process on the other side.
///
/// # Errors
/// When the kernel does not know it.
pub(crate) fn peer(stream: &UnixStream) -> io::Result<u32> {
    Ok(stream.peer_cred()?.uid())
}

/// # Errors
/// When the connection breaks.
pub(crate) async fn send<T: Serialize>(stream: &mut UnixStream, message: &T) -> io::Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    stream.write_all(&line).await
}

/// Receives one line. The sender must wait for an answer before it sends more. Waits as long as the caller lets it.
///
/// # Errors
/// When the connection ends, or the line is none of ours.
pub(crate) async fn receive<T: DeserializeOwned>(stream: &mut UnixStream) -> io::Result<T> {
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') {
        if stream.read_buf(&mut line).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if line.len() > LINE_LIMIT {
            return Err(io::Error::other("the line is too long"));
        }
    }
    Ok(serde_json::from_slice(&line)?)
}
