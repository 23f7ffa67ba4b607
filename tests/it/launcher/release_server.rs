//! A release's files on a server of loopback, and what such a server can do wrong. Plain threads and sockets.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

/// No client asks with a head larger than this.
const HEAD_LIMIT: usize = 64 * 1024;
/// A client that sends nothing for this long is given up.
const PATIENCE: Duration = Duration::from_secs(10);

/// What a path is answered with.
#[derive(Clone)]
pub enum Answer {
    Bytes(Vec<u8>),
    /// The whole length is promised, and the connection ends after half of it.
    Half(Vec<u8>),
    Status(u16),
    /// Nothing, until the client goes.
    Hang,
    /// 302 with this `Location`.
    Redirect(String),
}

/// Ends with its owner.
pub struct ReleaseServer {
    address: SocketAddr,
    asked: Arc<Mutex<Vec<String>>>,
    ended: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl ReleaseServer {
    /// `answer` decides by the path, and by how often something was asked for before.
    pub fn start(answer: impl Fn(&str, usize) -> Answer + Send + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let ended = Arc::new(AtomicBool::new(false));
        let (log, stop) = (Arc::clone(&asked), Arc::clone(&ended));
        let thread = std::thread::spawn(move || {
            for client in listener.incoming() {
                if stop.load(Ordering::SeqCst) {
                    break;
                }
                // A client that goes away is no matter of the server's.
                let _ = client.and_then(|client| serve(client, &answer, &log));
            }
        });
        Self {
            address,
            asked,
            ended,
            thread: Some(thread),
        }
    }

    pub fn url(&self) -> String {
        format!("http://{}/v1", self.address)
    }

    pub fn port(&self) -> u16 {
        self.address.port()
    }

    /// The paths that were asked for, in order.
    pub fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap().clone()
    }
}

impl Drop for ReleaseServer {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::SeqCst);
        // Wakes the thread, which waits for a client.
        let _ = TcpStream::connect(self.address);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn serve(
    mut client: TcpStream,
    answer: &impl Fn(&str, usize) -> Answer,
    asked: &Mutex<Vec<String>>,
) -> std::io::Result<()> {
    client.set_read_timeout(Some(PATIENCE))?;
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") && head.len() < HEAD_LIMIT {
        client.read_exact(&mut byte)?;
        head.push(byte[0]);
    }
    let head = String::from_utf8_lossy(&head);
    let path = head.split(' ').nth(1).unwrap_or_default().to_owned();
    let before = {
        let mut asked = asked.lock().unwrap();
        asked.push(path.clone());
        asked.len() - 1
    };
    let (status, more, body) = match answer(&path, before) {
        Answer::Bytes(bytes) => (200, format!("Content-Length: {}\r\n", bytes.len()), bytes),
        Answer::Half(bytes) => {
            let length = format!("Content-Length: {}\r\n", bytes.len());
            (200, length, bytes[..bytes.len() / 2].to_vec())
        }
        Answer::Hang => return client.read(&mut byte).map(drop),
        Answer::Status(status) => (status, "Content-Length: 0\r\n".to_owned(), Vec::new()),
        Answer::Redirect(to) => {
            let head = format!("Location: {to}\r\nContent-Length: 0\r\n");
            (302, head, Vec::new())
        }
    };
    write!(
        client,
        "HTTP/1.1 {status} Answer\r\n{more}Connection: close\r\n\r\n"
    )?;
    client.write_all(&body)
}
