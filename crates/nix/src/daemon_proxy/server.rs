//! The proxy's own process: takes clients from the socket, serves each, and hands the names on. It ends when it is no
//! longer needed and its last client has gone, whatever has become of the process that started it.

use std::io;
use std::os::unix::net::UnixListener as StdListener;
use std::os::unix::net::UnixStream as StdStream;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::time::Duration;

use futures_util::stream::{FuturesUnordered, StreamExt as _};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::ioctl_fionread;
use rustix::process::{Resource, Rlimit, geteuid, getrlimit, setrlimit};
use tokio::io::AsyncWriteExt as _;
use tokio::net::unix::OwnedWriteHalf;
use tokio::net::{UnixListener, UnixStream};
use tokio::time::{Instant, sleep, sleep_until, timeout};

use crate::daemon_proxy::link::SocketLink;
use crate::daemon_proxy::names::Names;
use crate::daemon_proxy::protocol::{Lines, Order, Report};
use crate::daemon_proxy::relay::relay;
use crate::daemon_proxy::{ProxyError, is_root};

/// How long the process stays after the link leads to the daemon again: a client may have followed it just before.
const LAST_CLIENT_GRACE: Duration = Duration::from_millis(50);
/// How long an answer waits for bytes that clients have sent and the daemon does not take.
const FLUSH_LIMIT: Duration = Duration::from_secs(1);
const FLUSH_INTERVAL: Duration = Duration::from_millis(1);
/// Pause after a client could not be taken, as when the process has too many open files. It waits in the socket.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Runs the proxy in this process, on the calling thread, until it is no longer needed.
///
/// # Errors
/// As root, when a descriptor is not what it has to be, and when the system refuses the thread its event queue.
pub(super) fn run(
    link: SocketLink,
    listener: StdListener,
    control: StdStream,
) -> Result<(), ProxyError> {
    if is_root() {
        return Err(ProxyError::Root);
    }
    raise_descriptor_limit();
    run_on_this_thread(link, listener, control)
}

fn run_on_this_thread(
    link: SocketLink,
    listener: StdListener,
    control: StdStream,
) -> Result<(), ProxyError> {
    // One thread with the priority of the process: the runtime's other threads have a lower one, and every answer of
    // the daemon goes through here.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .build()
        .map_err(ProxyError::Start)?;
    runtime.block_on(async {
        // By hand these are not sockets.
        listener.local_addr().map_err(ProxyError::Start)?;
        control.peer_addr().map_err(ProxyError::Start)?;
        let listener = listening(listener).map_err(ProxyError::Start)?;
        control.set_nonblocking(true).map_err(ProxyError::Start)?;
        let control = UnixStream::from_std(control).map_err(ProxyError::Start)?;
        let server = Server {
            link,
            listener,
            names: Names::default(),
            clients: Mutex::default(),
        };
        server.serve(control).await;
        Ok(())
    })
}

/// Two descriptors for each client; the limit of a login is often 1024, and may be raised by anybody to the hard one.
fn raise_descriptor_limit() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    // With the limit as it was, the clients beyond it wait.
    let _ = setrlimit(Resource::Nofile, raised);
}

pub(super) fn listening(listener: StdListener) -> io::Result<UnixListener> {
    listener.set_nonblocking(true)?;
    UnixListener::from_std(listener)
}

/// Takes the next client, if it is one that may use the daemon as this process's user.
pub(super) async fn accept(listener: &UnixListener) -> UnixStream {
    loop {
        match listener.accept().await {
            Ok((client, _)) if is_own(&client) => return client,
            // The connection of another user ends here. The folder's mode keeps such a client away already.
            Ok(_) => (),
            Err(_) => sleep(ACCEPT_PAUSE).await,
        }
    }
}

/// Whether the client runs as this user. Root may use every socket, and less of the daemon through this one than by
/// its own; were it refused, its commands would fail.
fn is_own(client: &UnixStream) -> bool {
    client
        .peer_cred()
        .is_ok_and(|peer| peer.uid() == geteuid().as_raw() || peer.uid() == 0)
}

/// A client that is being served.
struct Client {
    stream: UnixStream,
    /// How many bytes of it have been looked at.
    scanned: AtomicU64,
}

/// What runs beside the waiting.
enum Work {
    Serve(Arc<Client>),
    Flush(u64),
}

/// What the process waits for.
enum ServerEvent {
    Client(UnixStream),
    WorkDone,
    Order(Option<Order>),
    ReaderGone,
    NotNeeded,
}

struct Server {
    link: SocketLink,
    listener: UnixListener,
    names: Names,
    clients: Mutex<Vec<Weak<Client>>>,
}

impl Server {
    async fn serve(&self, control: UnixStream) {
        let (from, to) = control.into_split();
        let mut orders = Lines::new(from);
        let mut sending = pin!(self.send_lines(to));
        let mut work = FuturesUnordered::new();
        let (mut connected, mut has_reader) = (true, true);
        // Since when the process is not needed; the last client may extend it.
        let mut free_since: Option<Instant> = None;
        self.names.answer(&Report::Ready);
        loop {
            let event = tokio::select! {
                // A client that waits comes before the end.
                biased;
                client = accept(&self.listener) => ServerEvent::Client(client),
                Some(()) = work.next(), if !work.is_empty() => ServerEvent::WorkDone,
                order = orders.order(), if connected => ServerEvent::Order(order),
                () = &mut sending, if has_reader => ServerEvent::ReaderGone,
                () = not_needed(free_since), if work.is_empty() => ServerEvent::NotNeeded,
            };
            match event {
                ServerEvent::Client(stream) => {
                    // Registered before anything else runs, so that no flush overlooks it.
                    let client = self.register(stream);
                    work.push(self.work(Work::Serve(client)));
                }
                ServerEvent::WorkDone => free_since = free_since.map(|_| Instant::now()),
                ServerEvent::Order(Some(Order::Flush(number))) => {
                    work.push(self.work(Work::Flush(number)));
                }
                ServerEvent::Order(Some(Order::Ping)) => self.names.answer(&Report::Pong),
                // After an order to end, or when the other process is gone, the next client is the daemon's own.
                ServerEvent::Order(order) => {
                    connected = order.is_some();
                    // If it fails, the clients go on coming here while there are any.
                    let _ = self.link.point_to_daemon();
                    free_since = Some(Instant::now());
                }
                ServerEvent::ReaderGone => {
                    has_reader = false;
                    self.names.close();
                }
                ServerEvent::NotNeeded => break,
            }
        }
        if !connected {
            // The process that made it cannot remove it any more.
            let _ = std::fs::remove_file(&self.link.proxy);
        }
    }

    /// Ends when the reader of the lines is gone.
    async fn send_lines(&self, mut to: OwnedWriteHalf) {
        loop {
            let lines = self.names.next().await;
            if to.write_all(lines.as_bytes()).await.is_err() {
                return;
            }
        }
    }

    fn register(&self, stream: UnixStream) -> Arc<Client> {
        let client = Arc::new(Client {
            stream,
            scanned: AtomicU64::new(0),
        });
        let mut clients = self.clients();
        clients.retain(|client| client.strong_count() > 0);
        clients.push(Arc::downgrade(&client));
        client
    }

    async fn work(&self, work: Work) {
        match work {
            Work::Serve(client) => {
                let found = |name: &[u8]| self.names.add(name);
                relay(&client.stream, &client.scanned, &self.link.direct, &found).await;
            }
            Work::Flush(number) => {
                let flushed = timeout(FLUSH_LIMIT, self.until_scanned()).await;
                self.names.answer(&match flushed {
                    Ok(()) => Report::Flushed(number),
                    Err(_) => Report::Behind(number),
                });
            }
        }
    }

    /// Waits until everything is looked at that clients have sent so far.
    async fn until_scanned(&self) {
        // A client that has come and gone may still wait to be taken.
        while is_readable(&self.listener) {
            sleep(FLUSH_INTERVAL).await;
        }
        let due = |client: &Weak<Client>| {
            let living = client.upgrade()?;
            let unread = ioctl_fionread(&living.stream).unwrap_or(0);
            let scanned = living.scanned.load(Ordering::Relaxed);
            // Weak, so that no connection stays open until the others are done.
            Some((client.clone(), scanned + unread))
        };
        let mut waited: Vec<(Weak<Client>, u64)> = self.clients().iter().filter_map(due).collect();
        loop {
            waited.retain(|(client, due)| {
                let living = client.upgrade();
                living.is_some_and(|client| client.scanned.load(Ordering::Relaxed) < *due)
            });
            if waited.is_empty() {
                return;
            }
            sleep(FLUSH_INTERVAL).await;
        }
    }

    fn clients(&self) -> MutexGuard<'_, Vec<Weak<Client>>> {
        self.clients
            .lock()
            .expect("nothing panics while it holds this lock")
    }
}

async fn not_needed(since: Option<Instant>) {
    match since {
        Some(since) => sleep_until(since + LAST_CLIENT_GRACE).await,
        None => std::future::pending().await,
    }
}

/// Whether something waits to be read, or to be accepted.
fn is_readable(listener: &UnixListener) -> bool {
    let mut polled = [PollFd::new(listener, PollFlags::IN)];
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    poll(&mut polled, Some(&now)).is_ok_and(|ready| ready > 0)
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead as _, BufReader, Read as _, Write as _};
    use std::thread::JoinHandle;

    use super::*;

    const LIMIT: Duration = Duration::from_secs(20);

    /// A proxy on a thread, between a socket of its own and a daemon that sends back what it gets.
    struct World {
        folder: tempfile::TempDir,
        control: BufReader<StdStream>,
        proxy: JoinHandle<Result<(), ProxyError>>,
    }

    impl World {
        fn new() -> Self {
            let folder = tempfile::tempdir().expect("temporary folder");
            let at = |name: &str| folder.path().join(name);
            let daemon = StdListener::bind(at("daemon")).expect("listens");
            std::thread::spawn(move || {
                for stream in daemon.incoming() {
                    let stream = stream.expect("comes");
                    std::thread::spawn(move || std::io::copy(&mut &stream, &mut &stream));
                }
            });
            let link = SocketLink {
                path: at("link"),
                direct: at("daemon"),
                proxy: at("proxy"),
            };
            link.create().expect("made");
            let listener = StdListener::bind(&link.proxy).expect("listens");
            link.point_to_proxy().expect("pointed");
            let (ours, theirs) = StdStream::pair().expect("a pair");
            ours.set_read_timeout(Some(LIMIT)).expect("set");
            let proxy = std::thread::spawn(move || run_on_this_thread(link, listener, theirs));
            let mut world = Self {
                folder,
                control: BufReader::new(ours),
                proxy,
            };
            assert_eq!(world.lines_until("ready"), ["ready"]);
            world
        }

        fn connect(&self) -> StdStream {
            let stream = StdStream::connect(self.folder.path().join("link")).expect("connects");
            stream.set_read_timeout(Some(LIMIT)).expect("set");
            stream
        }

        fn order(&self, order: Order) {
            let mut control = self.control.get_ref();
            control.write_all(order.line().as_bytes()).expect("taken");
        }

        fn lines_until(&mut self, last: &str) -> Vec<String> {
            let mut lines = Vec::new();
            loop {
                let mut line = String::new();
                self.control.read_line(&mut line).expect("in time");
                assert!(line.ends_with('\n'), "it ended after {lines:?}");
                lines.push(line.trim_end().to_owned());
                if lines.last().is_some_and(|line| line == last) {
                    return lines;
                }
            }
        }

        fn leads_to_daemon(&self) -> bool {
            let target = std::fs::read_link(self.folder.path().join("link"));
            target.expect("a link").ends_with("daemon")
        }
    }

    #[test]
    fn a_flush_comes_after_all_that_a_client_sent_who_is_gone() {
        let mut world = World::new();
        for n in 0..200 {
            let name = format!("fvchbymk0m4jvldpb9m5hy0bjy2lf30k-hello-{n}");
            let mut client = world.connect();
            client.write_all(name.as_bytes()).expect("taken");
            drop(client);
            world.order(Order::Flush(n));
            let lines = world.lines_until(&format!("flushed {n}"));
            assert!(lines.contains(&format!("named {name}")), "{lines:?}");
        }
        world.order(Order::Ping);
        world.lines_until("pong");
    }

    #[test]
    fn it_ends_with_its_last_client_when_the_job_is_gone() {
        let world = World::new();
        let mut client = world.connect();
        world
            .control
            .get_ref()
            .shutdown(std::net::Shutdown::Both)
            .expect("shut");
        let deadline = std::time::Instant::now() + LIMIT;
        while !world.leads_to_daemon() {
            assert!(std::time::Instant::now() < deadline);
            std::thread::yield_now();
        }
        std::thread::park_timeout(2 * LAST_CLIENT_GRACE);
        client.write_all(b"still").expect("taken");
        let mut answer = [0; 5];
        client.read_exact(&mut answer).expect("served");
        assert_eq!(&answer, b"still");
        assert!(!world.proxy.is_finished());
        drop(client);
        world.proxy.join().expect("no panic").expect("in order");
        assert!(!world.folder.path().join("proxy").exists());
    }

    #[test]
    fn it_ends_at_once_when_it_is_not_needed() {
        let world = World::new();
        world.order(Order::End);
        world.proxy.join().expect("no panic").expect("in order");
        let target = std::fs::read_link(world.folder.path().join("link"));
        assert!(target.expect("a link").ends_with("daemon"));
    }
}
