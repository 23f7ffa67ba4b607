//! Broken servers: one that answers 500 to everything, and one that stops answering.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

/// Starts a server that answers 500 to everything, until the process of the tests ends; its address.
pub fn server() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let mut request = [0_u8; 4096];
            // A client that hangs up early gets no answer.
            let _ = stream.read(&mut request);
            let _ = stream
                .write_all(b"HTTP/1.1 500 Oh\r\nContent-Length: 2\r\nConnection: close\r\n\r\nno");
        }
    });
    address
}

/// A way to another server that can be cut: from then on nothing is answered, and nothing is refused.
pub struct Forward {
    /// Where to connect to instead.
    pub url: String,
    cut: Arc<AtomicBool>,
}

impl Forward {
    pub fn cut(&self) {
        self.cut.store(true, Ordering::SeqCst);
    }

    /// Lets new connections through again.
    pub fn mend(&self) {
        self.cut.store(false, Ordering::SeqCst);
    }
}

/// Forwards connections to `url` until it is cut.
pub fn forward(url: &str) -> Forward {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let own = format!("http://{}", listener.local_addr().unwrap());
    let target = url
        .trim_start_matches("http://")
        .trim_end_matches('/')
        .to_owned();
    let cut = Arc::new(AtomicBool::new(false));
    let stop = Arc::clone(&cut);
    thread::spawn(move || {
        for client in listener.incoming().flatten() {
            let Ok(server) = TcpStream::connect(&target) else {
                continue;
            };
            let halves = [
                (client.try_clone().unwrap(), server.try_clone().unwrap()),
                (server, client),
            ];
            for (from, to) in halves {
                let stop = Arc::clone(&stop);
                thread::spawn(move || pump(from, to, &stop));
            }
        }
    });
    Forward { url: own, cut }
}

fn pump(mut from: TcpStream, mut to: TcpStream, stop: &AtomicBool) {
    let mut bytes = [0_u8; 16 * 1024];
    while let Ok(read @ 1..) = from.read(&mut bytes) {
        if stop.load(Ordering::SeqCst) {
            // The bytes are dropped, and the connection stays open, as behind a network that is cut.
            continue;
        }
        if to.write_all(&bytes[..read]).is_err() {
            break;
        }
    }
    if !stop.load(Ordering::SeqCst) {
        let _ = to.shutdown(std::net::Shutdown::Write);
    }
}
