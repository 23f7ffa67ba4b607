//! Three hundred connections to an embedded cache that send a byte now and then. A reader is answered within a second.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use super::{Attack, Trial};
use crate::world::cache::Cache;

const STRANGERS: usize = 300;
const PATIENCE: Duration = Duration::from_secs(1);
/// How many readers come while the strangers hold their connections.
const READERS: usize = 5;

fn beginning(trial: &mut Trial) -> Vec<u8> {
    let starts: [&[u8]; 6] = [
        b"",
        b"G",
        b"GET /main/nix-cache-info HTTP/1.1\r\nHost: ",
        b"PUT /_api/v1/upload-path HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer none\r\nContent-Length: 800000\r\n\r\n",
        b"POST /_api/v1/get-missing-paths HTTP/1.1\r\nHost: x\r\nContent-Length: 800000\r\n\r\n{",
        b"PUT /main/nar/x.nar HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n",
    ];
    let mut bytes = trial.pick(&starts).to_vec();
    let length = trial.random.usize(..2000);
    bytes.extend(std::iter::repeat_n(
        b'a',
        if bytes.len() > 1 { length } else { 0 },
    ));
    bytes
}

/// The time that one reader waits for its answer.
fn read(address: SocketAddr) -> Result<Duration, std::io::Error> {
    let begun = Instant::now();
    let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream
        .write_all(b"GET /main/nix-cache-info HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    if answer.starts_with("HTTP/1.1 200 ") {
        Ok(begun.elapsed())
    } else {
        Err(std::io::Error::other(answer))
    }
}

#[test]
fn strangers_that_drip_lock_no_reader_out() {
    let cache = Cache::start(&[]);
    let address = cache.address();
    let mut attack = Attack::begin("strangers");
    while let Some(mut trial) = attack.next() {
        let mut held = Vec::new();
        for _ in 0..STRANGERS {
            // A server that is full may refuse or close.
            if let Ok(mut stream) = TcpStream::connect_timeout(&address, PATIENCE) {
                stream.set_nonblocking(true).unwrap();
                let _ = stream.write(&beginning(&mut trial));
                held.push(stream);
            }
        }
        for _ in 0..READERS {
            for stream in &mut held {
                let _ = stream.write(b"x");
            }
            let waited = read(address).unwrap_or_else(|error| panic!("{}: {error}", trial.seed));
            assert!(waited < PATIENCE, "{}: {waited:?}", trial.seed);
            attack.count("readers answered");
        }
    }
    attack.report();
}
