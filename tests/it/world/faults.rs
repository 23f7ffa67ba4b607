//! A front that makes a server misbehave: it stands before a real one, or alone, and does to chosen
//! requests what networks and proxies do. Plain threads and sockets, so that every suite can use it.
//!
//! One request per connection: a forwarded request asks the server to close, which a client must bear anyway.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

/// No client under test sends a head larger than this.
const HEAD_LIMIT: usize = 1024 * 1024;
/// After an early answer the client's body is read for this long, so that the answer arrives.
const LINGER: Duration = Duration::from_secs(2);

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The connection is closed as soon as the request's head is read.
    Close,
    /// Nothing is ever answered, until the client or the test ends.
    Hang,
    /// This status with an error in JSON, as Attic answers.
    Status(u16),
    /// This status with a page of HTML, as a proxy answers; for example 413.
    Html(u16),
    /// 429 with `Retry-After` in seconds.
    RetryAfter(u64),
    /// The server behind does all its work; its answer never reaches the client.
    CutAnswer,
    /// Half of the request's body goes through, then both ends are cut.
    CutBody,
    /// The request is held back for so long, then goes through.
    Slow(Duration),
    /// The request goes through, and its answer is held back for so long, as by a server that stores before it answers.
    HoldAnswer(Duration),
}

/// How many of the requests that match a rule get its fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    Always,
    /// The first n.
    First(u32),
    /// Every n-th, beginning with the first: the 1st, 4th, 7th … for 3.
    Every(u32),
}

#[derive(Debug)]
struct Rule {
    /// The request line begins with this: `PUT /_api`, or nothing for all.
    begins: String,
    when: When,
    fault: Fault,
    seen: u32,
}

/// The rules of a front that is still to start.
#[derive(Debug, Default)]
pub struct Plan {
    rules: Vec<Rule>,
}

impl Plan {
    pub fn new() -> Self {
        Self::default()
    }

    /// Does `fault` to requests whose line begins with `begins`. The first rule that applies is taken.
    pub fn fault(mut self, begins: &str, when: When, fault: Fault) -> Self {
        self.rules.push(Rule {
            begins: begins.to_owned(),
            when,
            fault,
            seen: 0,
        });
        self
    }

    /// Starts a front before this server, on a port of its own.
    pub fn before(self, upstream: SocketAddr) -> Front {
        Front::start(Some(upstream), self)
    }

    /// Starts a front with no server behind it: a request without a rule gets 404.
    pub fn alone(self) -> Front {
        Front::start(None, self)
    }
}

/// A running front; it ends when it is dropped.
pub struct Front {
    address: SocketAddr,
    shared: Arc<Shared>,
    accepting: Option<JoinHandle<()>>,
}

struct Shared {
    upstream: Option<SocketAddr>,
    plan: Mutex<Plan>,
    requests: Mutex<Vec<String>>,
    /// Every open socket, so that dropping the front can shut them down.
    open: Mutex<BTreeMap<u64, TcpStream>>,
    ending: AtomicBool,
}

impl Front {
    fn start(upstream: Option<SocketAddr>, plan: Plan) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("loopback");
        let address = listener.local_addr().expect("bound");
        let shared = Arc::new(Shared {
            upstream,
            plan: Mutex::new(plan),
            requests: Mutex::default(),
            open: Mutex::default(),
            ending: AtomicBool::new(false),
        });
        let of_thread = Arc::clone(&shared);
        let accepting = std::thread::spawn(move || accept(&listener, &of_thread));
        Self {
            address,
            shared,
            accepting: Some(accepting),
        }
    }

    /// `http://127.0.0.1:<port>`.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The request lines so far, without `HTTP/1.1`, in the order of their arrival.
    pub fn requests(&self) -> Vec<String> {
        self.shared
            .requests
            .lock()
            .expect("no panic holds it")
            .clone()
    }
}

impl Drop for Front {
    fn drop(&mut self) {
        self.shared.ending.store(true, Ordering::SeqCst);
        // One more connection wakes the thread that accepts, which then sees `ending` and joins all others.
        drop(TcpStream::connect(self.address));
        if let Some(accepting) = self.accepting.take() {
            let ended = accepting.join();
            if !std::thread::panicking() {
                ended.expect("the front does not panic");
            }
        }
    }
}

fn accept(listener: &TcpListener, shared: &Arc<Shared>) {
    let mut threads = Vec::new();
    for (number, stream) in (0_u64..).zip(listener.incoming()) {
        if shared.ending.load(Ordering::SeqCst) {
            break;
        }
        let Ok(stream) = stream else { continue };
        if let Ok(copy) = stream.try_clone() {
            shared
                .open
                .lock()
                .expect("no panic holds it")
                .insert(number, copy);
        }
        let shared = Arc::clone(shared);
        threads.push(std::thread::spawn(move || {
            // An error of a connection is what a fault looks like from here.
            let _ = answer(&stream, &shared);
            let _ = stream.shutdown(Shutdown::Both);
            shared
                .open
                .lock()
                .expect("no panic holds it")
                .remove(&number);
        }));
    }
    for stream in shared.open.lock().expect("no panic holds it").values() {
        let _ = stream.shutdown(Shutdown::Both);
    }
    for thread in threads {
        let _ = thread.join();
    }
}

fn answer(stream: &TcpStream, shared: &Shared) -> std::io::Result<()> {
    let (head, rest) = read_head(stream)?;
    let line = head
        .lines()
        .next()
        .unwrap_or_default()
        .trim_end_matches(" HTTP/1.1")
        .to_owned();
    shared
        .requests
        .lock()
        .expect("no panic holds it")
        .push(line.clone());
    // Not within the `match`, which would hold the lock while the fault lasts, and all other requests with it.
    let fault = shared.plan.lock().expect("no panic holds it").choose(&line);
    match fault {
        Some(Fault::Close) => Ok(()),
        Some(Fault::Hang) => drain(stream, None),
        Some(Fault::Status(status)) => {
            let body = format!(
                "{{\"code\":{status},\"error\":\"Fault\",\"message\":\"a planned fault\"}}"
            );
            early(stream, status, "application/json", "", &body)
        }
        Some(Fault::Html(status)) => early(
            stream,
            status,
            "text/html",
            "",
            "<html><h1>A proxy says no</h1></html>\n",
        ),
        Some(Fault::RetryAfter(seconds)) => early(
            stream,
            429,
            "text/plain",
            &format!("Retry-After: {seconds}\r\n"),
            "slow down\n",
        ),
        Some(Fault::CutBody) => cut_body(stream, shared, &head, &rest),
        Some(Fault::CutAnswer) => forward(stream, shared, &head, &rest, Back::Nothing),
        Some(Fault::HoldAnswer(time)) => forward(stream, shared, &head, &rest, Back::After(time)),
        Some(Fault::Slow(time)) => {
            std::thread::sleep(time);
            forward(stream, shared, &head, &rest, Back::AtOnce)
        }
        None => forward(stream, shared, &head, &rest, Back::AtOnce),
    }
}

impl Plan {
    fn choose(&mut self, line: &str) -> Option<Fault> {
        let rules = self
            .rules
            .iter_mut()
            .filter(|rule| line.starts_with(&rule.begins));
        for rule in rules {
            let number = rule.seen;
            rule.seen += 1;
            let applies = match rule.when {
                When::Always => true,
                When::First(count) => number < count,
                When::Every(step) => number % step == 0,
            };
            if applies {
                return Some(rule.fault.clone());
            }
        }
        None
    }
}

/// The head with its empty line, and the bytes that were read after it.
fn read_head(mut stream: &TcpStream) -> std::io::Result<(String, Vec<u8>)> {
    let mut bytes = Vec::new();
    let mut space = vec![0; 64 * 1024];
    loop {
        if let Some(end) = bytes.windows(4).position(|four| four == b"\r\n\r\n") {
            let rest = bytes.split_off(end + 4);
            return Ok((String::from_utf8_lossy(&bytes).into_owned(), rest));
        }
        match stream.read(&mut space)? {
            0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
            _ if bytes.len() > HEAD_LIMIT => return Err(std::io::ErrorKind::InvalidData.into()),
            read => bytes.extend_from_slice(&space[..read]),
        }
    }
}

fn early(
    mut stream: &TcpStream,
    status: u16,
    kind: &str,
    more: &str,
    body: &str,
) -> std::io::Result<()> {
    let length = body.len();
    write!(
        stream,
        "HTTP/1.1 {status} Fault\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n{more}Connection: close\r\n\r\n{body}"
    )?;
    stream.shutdown(Shutdown::Write)?;
    drain(stream, Some(LINGER))
}

/// Reads on until the client closes, or sends nothing for `silence`.
fn drain(mut stream: &TcpStream, silence: Option<Duration>) -> std::io::Result<()> {
    stream.set_read_timeout(silence)?;
    let mut space = vec![0; 64 * 1024];
    while stream.read(&mut space)? > 0 {}
    Ok(())
}

fn cut_body(
    mut client: &TcpStream,
    shared: &Shared,
    head: &str,
    rest: &[u8],
) -> std::io::Result<()> {
    let Some(upstream) = shared.upstream else {
        return Ok(());
    };
    let length = head.lines().find_map(|line| {
        line.to_ascii_lowercase()
            .strip_prefix("content-length:")?
            .trim()
            .parse()
            .ok()
    });
    let half = length.unwrap_or(0) / 2;
    let mut server = TcpStream::connect(upstream)?;
    server.write_all(head.as_bytes())?;
    let (mut sent, mut space) = (rest.len().min(half), vec![0; 64 * 1024]);
    server.write_all(&rest[..sent])?;
    while sent < half {
        let most = space.len().min(half - sent);
        let read = client.read(&mut space[..most])?;
        if read == 0 {
            break;
        }
        server.write_all(&space[..read])?;
        sent += read;
    }
    server.shutdown(Shutdown::Both)
}

/// What the client gets of the server's answer.
#[derive(Clone, Copy)]
enum Back {
    AtOnce,
    Nothing,
    /// All of it, but only after this time; `100 Continue` at once.
    After(Duration),
}

fn hold_back(
    server: &mut TcpStream,
    mut client: &TcpStream,
    time: Duration,
) -> std::io::Result<()> {
    let (mut space, mut held) = (vec![0; 64 * 1024], false);
    loop {
        let read = server.read(&mut space)?;
        if read == 0 {
            return Ok(());
        }
        if !held && !space.starts_with(b"HTTP/1.1 100") {
            std::thread::sleep(time);
            held = true;
        }
        client.write_all(&space[..read])?;
    }
}

fn forward(
    mut client: &TcpStream,
    shared: &Shared,
    head: &str,
    rest: &[u8],
    back: Back,
) -> std::io::Result<()> {
    let Some(upstream) = shared.upstream else {
        return early(
            client,
            404,
            "text/plain",
            "",
            "there is nothing behind this front\n",
        );
    };
    let mut server = TcpStream::connect(upstream)?;
    let (line, headers) = head.split_once("\r\n").unwrap_or((head, "\r\n"));
    let kept: Vec<&str> = headers
        .split("\r\n")
        .filter(|header| !header.to_ascii_lowercase().starts_with("connection:"))
        .collect();
    server.write_all(format!("{line}\r\nConnection: close\r\n{}", kept.join("\r\n")).as_bytes())?;
    server.write_all(rest)?;
    let (mut from_client, mut to_server) = (client.try_clone()?, server.try_clone()?);
    let sending = std::thread::spawn(move || {
        // An error here shows in the server's answer; a client that is done leaves its side open.
        let _ = std::io::copy(&mut from_client, &mut to_server);
    });
    let copied = match back {
        Back::AtOnce => std::io::copy(&mut server, &mut client).map(|_| ()),
        Back::Nothing => std::io::copy(&mut server, &mut std::io::sink()).map(|_| ()),
        Back::After(time) => hold_back(&mut server, client, time),
    };
    let _ = client.shutdown(Shutdown::Both);
    let _ = server.shutdown(Shutdown::Both);
    let _ = sending.join();
    copied
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::world::port::Port;

    /// The status line that a request gets, empty when the connection ends without one.
    fn get(front: &str, path: &str) -> String {
        let address = front.trim_start_matches("http://");
        let Ok(mut stream) = TcpStream::connect(address) else {
            return "refused".to_owned();
        };
        stream
            .set_read_timeout(Some(Duration::from_millis(200)))
            .expect("a socket");
        write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\n\r\n").expect("sent");
        let mut answer = Vec::new();
        let ended = stream.read_to_end(&mut answer);
        let text = String::from_utf8_lossy(&answer).into_owned();
        if ended.is_err() && text.is_empty() {
            return "silence".to_owned();
        }
        text.lines().next().unwrap_or_default().to_owned()
    }

    #[test]
    fn each_fault_does_what_it_says_to_the_requests_it_is_for() {
        let behind = Plan::new()
            .fault("GET /", When::Always, Fault::Status(204))
            .alone();
        let front = Plan::new()
            .fault("GET /close", When::Always, Fault::Close)
            .fault("GET /hang", When::Always, Fault::Hang)
            .fault("GET /first", When::First(2), Fault::Status(500))
            .fault("GET /every", When::Every(2), Fault::Html(413))
            .fault("GET /later", When::Always, Fault::RetryAfter(1))
            .fault("GET /cut", When::Always, Fault::CutAnswer)
            .fault(
                "GET /slow",
                When::Always,
                Fault::Slow(Duration::from_millis(20)),
            )
            .fault("GET /half", When::Always, Fault::CutBody)
            .fault(
                "GET /held",
                When::Always,
                Fault::HoldAnswer(Duration::from_millis(20)),
            )
            .before(behind.address);
        let statuses = |path: &str| [(); 3].map(|()| get(&front.url(), path));
        assert_eq!(get(&front.url(), "/close"), "");
        assert_eq!(get(&front.url(), "/hang"), "silence");
        assert_eq!(
            statuses("/first"),
            ["500", "500", "204"].map(|status| format!("HTTP/1.1 {status} Fault"))
        );
        assert_eq!(
            statuses("/every"),
            ["413", "204", "413"].map(|status| format!("HTTP/1.1 {status} Fault"))
        );
        assert_eq!(get(&front.url(), "/later"), "HTTP/1.1 429 Fault");
        assert_eq!(get(&front.url(), "/cut"), "");
        assert_eq!(get(&front.url(), "/half"), "");
        assert_eq!(get(&front.url(), "/slow"), "HTTP/1.1 204 Fault");
        assert_eq!(get(&front.url(), "/held"), "HTTP/1.1 204 Fault");
        assert_eq!(
            behind.requests(),
            [
                "GET /first",
                "GET /every",
                "GET /cut",
                "GET /half",
                "GET /slow",
                "GET /held"
            ]
        );
        assert_eq!(front.requests().len(), 13);
        assert_eq!(get(&Plan::new().alone().url(), "/"), "HTTP/1.1 404 Fault");
        let closed = Port::reserve();
        assert_eq!(get(&format!("http://{}", closed.address()), "/"), "refused");
    }
}
