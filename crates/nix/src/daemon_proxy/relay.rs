//! One client's connection to the daemon: the bytes go both ways untouched and in order, and the names in them are
//! recorded before they go on. What either end does to its side of the connection, the other end sees.

use std::io;
use std::net::Shutdown;
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream as StdStream;
use std::path::Path;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::net::UnixStream;
use tokio::time::{Instant, sleep};

use crate::daemon_proxy::link::ShortPath;
use crate::daemon_proxy::scanner::Scanner;

/// Pause between two tries to connect while the daemon has too many connections waiting.
const CONNECT_PAUSE: Duration = Duration::from_millis(10);
/// A client would wait for the daemon itself for as long as it likes; for a client behind the proxy this is the end.
const CONNECT_LIMIT: Duration = Duration::from_secs(120);
/// How often a connection is examined for a client that has gone while its bytes still wait for the daemon.
const GONE_INTERVAL: Duration = Duration::from_millis(500);

/// How one direction has ended.
#[derive(PartialEq, Eq)]
enum DirectionEnd {
    /// Nothing more comes this way; the other way may go on.
    Finished,
    /// The sender has closed its connection both ways, and all that it sent has been passed on.
    SenderGone,
}

/// Serves one client until it or the daemon ends the connection. `found` gets the names of both directions, and
/// `scanned` counts the client's bytes.
pub(super) async fn relay(
    client: &UnixStream,
    scanned: &AtomicU64,
    daemon_socket: &Path,
    found: &impl Fn(&[u8]),
) {
    // Without a daemon the client sees its connection end, and says so.
    let Ok(daemon) = connect(daemon_socket, client).await else {
        return;
    };
    let answered = AtomicU64::new(0);
    let up = pass(client, &daemon, scanned, found);
    let down = pass(&daemon, client, &answered, found);
    let (mut up, mut down) = (pin!(up), pin!(down));
    let mut gone = pin!(until_gone(client));
    let (mut up_open, mut down_open) = (true, true);
    while up_open || down_open {
        let end = tokio::select! {
            end = &mut up, if up_open => {
                up_open = false;
                end
            }
            end = &mut down, if down_open => {
                down_open = false;
                end
            }
            () = &mut gone => DirectionEnd::SenderGone,
        };
        // To the daemon a client that is gone looks different from one that has merely nothing more to send: it stops
        // the build. So both ends of the connection are closed now.
        if end == DirectionEnd::SenderGone {
            return;
        }
    }
}

async fn connect(socket: &Path, client: &UnixStream) -> io::Result<UnixStream> {
    let deadline = Instant::now() + CONNECT_LIMIT;
    loop {
        let short = ShortPath::of(socket)?;
        // A client of the daemon itself waits in the system until the daemon has taken the connections before it.
        match UnixStream::connect(&short.path).await {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => (),
            other => return other,
        }
        if is_gone(client) || Instant::now() >= deadline {
            return Err(io::ErrorKind::TimedOut.into());
        }
        sleep(CONNECT_PAUSE).await;
    }
}

/// Passes on what `from` sends until it has nothing more to send.
async fn pass(
    from: &UnixStream,
    to: &UnixStream,
    scanned: &AtomicU64,
    found: &impl Fn(&[u8]),
) -> DirectionEnd {
    let mut scanner = Scanner::new();
    loop {
        match read(from, scanner.space()).await {
            Ok(0) if is_gone(from) => return DirectionEnd::SenderGone,
            Ok(0) => {
                shut_down(to, Shutdown::Write);
                return DirectionEnd::Finished;
            }
            Ok(read) => {
                // First recorded, then sent: no row can be in the store's database before its name is known here.
                scanner.scan(read, found);
                scanned.fetch_add(read as u64, Ordering::Relaxed);
                if write_all(to, scanner.fresh(read)).await.is_err() {
                    // The sender sees that nobody takes its bytes. It may still have an answer to read: the reason.
                    shut_down(from, Shutdown::Read);
                    return DirectionEnd::Finished;
                }
                scanner.keep_tail(read);
            }
            Err(_) => return DirectionEnd::SenderGone,
        }
    }
}

async fn read(from: &UnixStream, space: &mut [u8]) -> io::Result<usize> {
    loop {
        match from.try_read(space) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => from.readable().await?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => (),
            other => return other,
        }
    }
}

async fn write_all(to: &UnixStream, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match to.try_write(bytes) {
            Ok(written) => bytes = &bytes[written..],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => to.writable().await?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => (),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Waits until the other end has been closed both ways for a while, which usually ends the connection by itself: it
/// does not while a daemon that builds leaves the last bytes unread, nor after the client had closed one way before.
async fn until_gone(client: &UnixStream) {
    let mut seen = false;
    loop {
        sleep(GONE_INTERVAL).await;
        let gone = is_gone(client);
        if gone && seen {
            return;
        }
        seen = gone;
    }
}

/// Whether the other end has closed the connection both ways, as the end of a process does.
fn is_gone(stream: &UnixStream) -> bool {
    let mut polled = [PollFd::new(stream, PollFlags::empty())];
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    poll(&mut polled, Some(&now)).is_ok() && polled[0].revents().contains(PollFlags::HUP)
}

fn shut_down(stream: &UnixStream, how: Shutdown) {
    // A copy of the descriptor is the same connection. What fails is a connection that has ended already.
    if let Ok(copy) = stream.as_fd().try_clone_to_owned() {
        let _ = StdStream::from(copy).shutdown(how);
    }
}
