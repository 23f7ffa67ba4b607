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
use tokio::task::coop::consume_budget;
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
    // Without a daemon the client sees its connection end, and reports it.
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
                    // End this direction alone: the sender may still have to read an answer that gives the reason.
                    shut_down(from, Shutdown::Read);
                    return DirectionEnd::Finished;
                }
                scanner.keep_tail(read);
                // Both ends of a long upload may be ready all the time; the other connections get their turn here.
                consume_budget().await;
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

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::os::unix::net::UnixListener;
    use std::sync::Mutex;

    use super::*;

    const NAME: &str = "fvchbymk0m4jvldpb9m5hy0bjy2lf30k-hello";
    const LIMIT: Duration = Duration::from_secs(20);

    /// Runs a relay between what two threads do with the client's and the daemon's end; the names that passed.
    fn between(
        client: impl FnOnce(StdStream) + Send + 'static,
        daemon: impl FnOnce(StdStream) + Send + 'static,
    ) -> Vec<String> {
        let folder = tempfile::tempdir().expect("temporary folder");
        let socket = folder.path().join("socket");
        let listener = UnixListener::bind(&socket).expect("listens");
        let (ours, theirs) = StdStream::pair().expect("a pair");
        for stream in [&ours, &theirs] {
            stream.set_read_timeout(Some(LIMIT)).expect("set");
        }
        let client = std::thread::spawn(move || client(theirs));
        let daemon = std::thread::spawn(move || {
            let (stream, _) = listener.accept().expect("comes");
            stream.set_read_timeout(Some(LIMIT)).expect("set");
            daemon(stream);
        });
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime");
        let names = Mutex::new(Vec::new());
        runtime.block_on(async {
            ours.set_nonblocking(true).expect("set");
            let ours = UnixStream::from_std(ours).expect("registered");
            let found = |name: &[u8]| {
                let name = String::from_utf8(name.to_vec()).expect("ASCII");
                names.lock().expect("no panic").push(name);
            };
            let scanned = AtomicU64::new(0);
            let served = relay(&ours, &scanned, &socket, &found);
            tokio::time::timeout(LIMIT, served).await.expect("in time");
        });
        client.join().expect("the client's end is well");
        daemon.join().expect("the daemon's end is well");
        names.into_inner().expect("no panic")
    }

    fn read_all(mut stream: &StdStream) -> Vec<u8> {
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).expect("read to the end");
        bytes
    }

    /// Bytes in which a byte that is missing, doubled or moved shows.
    fn pattern(length: usize) -> Vec<u8> {
        (0..length).map(|n| (n * n / 253 % 251) as u8).collect()
    }

    #[test]
    fn many_bytes_go_both_ways_untouched_at_once() {
        const SIZE: usize = 5_000_003;
        let exchange = |stream: StdStream| {
            let copy = stream.try_clone().expect("a copy");
            let writer = std::thread::spawn(move || {
                (&copy).write_all(&pattern(SIZE)).expect("taken");
                copy.shutdown(Shutdown::Write).expect("shut");
            });
            assert!(read_all(&stream) == pattern(SIZE), "other bytes came");
            writer.join().expect("all was taken");
        };
        between(exchange, exchange);
    }

    #[test]
    fn a_client_that_has_sent_all_still_gets_its_answer() {
        let names = between(
            |mut client| {
                client.write_all(b"question").expect("taken");
                client.shutdown(Shutdown::Write).expect("shut");
                assert_eq!(read_all(&client), NAME.as_bytes());
            },
            |mut daemon| {
                assert_eq!(read_all(&daemon), b"question");
                daemon.write_all(NAME.as_bytes()).expect("taken");
            },
        );
        assert_eq!(names, [NAME]);
    }

    /// Whether the other end is closed both ways, which a daemon takes for the end of its client.
    fn hang_up_seen(stream: &StdStream) -> bool {
        let mut polled = [PollFd::new(stream, PollFlags::empty())];
        let limit = Timespec {
            tv_sec: 20,
            tv_nsec: 0,
        };
        poll(&mut polled, Some(&limit)).expect("asked") == 1
            && polled[0].revents().contains(PollFlags::HUP)
    }

    #[test]
    fn the_daemon_sees_that_its_client_is_gone() {
        between(
            |mut client| client.write_all(NAME.as_bytes()).expect("taken"),
            |daemon| {
                assert!(hang_up_seen(&daemon));
                assert_eq!(read_all(&daemon), NAME.as_bytes());
            },
        );
    }

    #[test]
    fn the_daemon_sees_it_too_after_one_way_was_closed_or_while_it_reads_nothing() {
        between(
            |client| {
                client.shutdown(Shutdown::Write).expect("shut");
                let mut byte = [0];
                assert_eq!((&client).read(&mut byte).expect("an answer"), 1);
            },
            |mut daemon| {
                assert_eq!(read_all(&daemon), b"");
                daemon.write_all(b"x").expect("taken");
                assert!(hang_up_seen(&daemon));
            },
        );
        between(
            |client| {
                client.set_nonblocking(true).expect("set");
                let full = || (&client).write(&[0; 65536]).is_err();
                let deadline = std::time::Instant::now() + LIMIT;
                // More than the daemon's end takes, so that the rest waits in the proxy.
                let mut refused = 0;
                while refused < 50 {
                    refused = if full() { refused + 1 } else { 0 };
                    assert!(std::time::Instant::now() < deadline);
                    std::thread::park_timeout(Duration::from_millis(2));
                }
            },
            |daemon| assert!(hang_up_seen(&daemon)),
        );
    }

    #[test]
    fn a_client_that_still_sends_gets_the_reason_of_a_daemon_that_has_ended() {
        between(
            |mut client| {
                let sent = std::iter::repeat_with(|| client.write(&[0; 65536])).take(10_000);
                assert!(
                    sent.into_iter().any(|sent| sent.is_err()),
                    "nobody reads it"
                );
                let mut reason = [0; 6];
                client
                    .read_exact(&mut reason)
                    .expect("it came before the end");
                assert_eq!(&reason, b"reason");
            },
            |mut daemon| daemon.write_all(b"reason").expect("taken"),
        );
    }
}
