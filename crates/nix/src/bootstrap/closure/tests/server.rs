//! A server of plain files on the loopback, which misbehaves where it is told to. One connection for each request.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use crate::narinfo::NarInfo;

/// What a URL is answered with.
#[derive(Clone)]
pub(super) enum Answer {
    Body(Vec<u8>),
    Status(u16),
    Moved(String),
    /// So many times 503, and then the other one.
    Busy(u32, Box<Self>),
    /// So many times only half of the other one.
    Cut(u32, Box<Self>),
    /// Nothing, on an open connection.
    Silence,
}

impl From<NarInfo> for Answer {
    fn from(info: NarInfo) -> Self {
        Self::Body(info.to_string().into_bytes())
    }
}

impl Answer {
    pub(super) fn text(&self) -> String {
        match self {
            Self::Body(bytes) => String::from_utf8(bytes.clone()).expect("text"),
            _ => panic!("no body"),
        }
    }

    fn body(&self) -> &[u8] {
        match self {
            Self::Body(bytes) => bytes,
            _ => panic!("no body"),
        }
    }
}

#[derive(Default)]
struct State {
    answers: BTreeMap<String, Answer>,
    requests: Vec<String>,
    /// Connections that get no answer.
    silent: Vec<TcpStream>,
}

pub(super) struct Server {
    /// `http://127.0.0.1:<port>`.
    pub(super) url: String,
    state: Arc<Mutex<State>>,
}

impl Server {
    /// Its thread ends with the process of the test.
    pub(super) fn start(answers: BTreeMap<String, Answer>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("loopback");
        let url = format!("http://{}", listener.local_addr().expect("bound"));
        let state = Arc::new(Mutex::new(State {
            answers,
            ..State::default()
        }));
        let shared = Arc::clone(&state);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let shared = Arc::clone(&shared);
                // Clients open connections that they then have no use for.
                std::thread::spawn(move || {
                    // A client that has gone is the client's business.
                    let _ = serve(stream, &shared);
                });
            }
        });
        Self { url, state }
    }

    /// The URLs that were asked for.
    pub(super) fn requests(&self) -> Vec<String> {
        self.state.lock().expect("no panic").requests.clone()
    }
}

fn serve(mut stream: TcpStream, state: &Mutex<State>) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let first = lines.next().transpose()?.unwrap_or_default();
    let url = first.split(' ').nth(1).unwrap_or_default().to_owned();
    while lines
        .next()
        .transpose()?
        .is_some_and(|line| !line.is_empty())
    {}
    let state = &mut state.lock().expect("no panic");
    state.requests.push(url.clone());
    let found = state.answers.get(&url).cloned();
    let head =
        |status: &str, rest: &str| format!("HTTP/1.1 {status}\r\nConnection: close\r\n{rest}\r\n");
    let whole = |length: usize| head("200 OK", &format!("Content-Length: {length}\r\n"));
    match found.unwrap_or(Answer::Status(404)) {
        Answer::Body(body) => {
            stream.write_all(whole(body.len()).as_bytes())?;
            stream.write_all(&body)
        }
        Answer::Status(status) => {
            stream.write_all(head(&format!("{status} X"), "Content-Length: 0\r\n").as_bytes())
        }
        Answer::Moved(target) => {
            let rest = format!("Location: {target}\r\nContent-Length: 0\r\n");
            stream.write_all(head("302 Found", &rest).as_bytes())
        }
        Answer::Busy(times, then) => {
            let next = if times > 1 {
                Answer::Busy(times - 1, then)
            } else {
                *then
            };
            state.answers.insert(url, next);
            stream.write_all(head("503 Busy", "Content-Length: 0\r\n").as_bytes())
        }
        Answer::Cut(times, then) => {
            let body = then.body().to_vec();
            let next = if times > 1 {
                Answer::Cut(times - 1, then)
            } else {
                *then
            };
            state.answers.insert(url, next);
            stream.write_all(whole(body.len()).as_bytes())?;
            stream.write_all(&body[..body.len() / 2])
        }
        Answer::Silence => {
            state.silent.push(stream);
            Ok(())
        }
    }
}
