//! Sends a NAR after asking the server's leave, so that not a byte of it travels when the server refuses
//! it or has it already; and hears the answer whenever it comes. Never tries twice but for an answer
//! that was lost, or a connection that had ended while it rested.

use std::io::Write as _;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::future::BoxFuture;
use reqwest::header::HeaderValue;
use tokio::time::Instant;
use zeroize::Zeroizing;

use crate::cache::attic::Error;
use crate::cache::attic::line::{Answer, Leave, Line};
use crate::cache::attic::send::{HEADER_LIMIT, Parcel, Patience, SendNar, Uploaded, WholeBody, read_kind};
use crate::http::{Clients, Direct, USER_AGENT};
use crate::nix::nar::NarStream;

/// From this NAR size on, in bytes, a round trip for the server's leave costs less than the body.
const WORTH_ASKING: u64 = 64 * 1024;
/// A server or a proxy that does not know the question is silent; then the body is sent.
const GRACE: Duration = Duration::from_secs(1);
/// Connections that rest at most, and how long: less than servers let them.
const RESTING: usize = 16;
const REST: Duration = Duration::from_secs(15);

/// The usual way to send a NAR.
#[derive(Debug)]
pub struct AskFirst {
    direct: Direct,
    proxied: WholeBody,
    patience: Patience,
    resting: Mutex<Vec<Rested>>,
}

struct Rested {
    line: Line,
    since: Instant,
}

impl std::fmt::Debug for Rested {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Rested")
    }
}

/// How one request went about its body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Manner {
    /// Sends it at once.
    AtOnce,
    /// Asks for leave.
    Asks,
    /// Holds it back for a moment, and listens.
    Holds,
}

/// How one request ended.
enum Ended {
    /// `whole`: after the whole body.
    Answered { answer: Answer, whole: bool },
    /// It is known why, and trying again would be for nothing.
    Failed(Error),
    /// Without an answer. `in_vain`: on a connection that had rested, and of which nothing was heard.
    BrokeOff { error: std::io::Error, in_vain: bool },
}

impl AskFirst {
    /// Patience is for bytes that do not move; questions of leave have their own.
    pub fn new(clients: &Clients, patience: Patience) -> Self {
        let proxied = WholeBody::new(clients.sending.clone(), patience);
        Self { direct: clients.direct.clone(), proxied, patience, resting: Mutex::default() }
    }

    async fn put(&self, parcel: Parcel) -> Result<Uploaded, Error> {
        if self.direct.is_proxied(&parcel.url) {
            return self.proxied.send(parcel).await;
        }
        let by_header = parcel.info.len() <= HEADER_LIMIT && HeaderValue::from_str(&parcel.info).is_ok();
        let manner = if by_header && parcel.size > WORTH_ASKING { Manner::Asks } else { Manner::AtOnce };
        let mut ended = self.once(&parcel, manner, true).await;
        if matches!(ended, Ended::BrokeOff { in_vain: true, .. }) {
            parcel.meter.forget();
            ended = self.once(&parcel, manner, false).await;
        }
        let refused_to_wait = matches!(&ended, Ended::Answered { answer, .. } if answer.status == 417);
        // The server may have said why it takes no more, and closed so that it could not be heard.
        let unheard = matches!(ended, Ended::BrokeOff { .. }) && parcel.meter.own() < parcel.size;
        if refused_to_wait && manner == Manner::Asks {
            parcel.meter.forget();
            ended = self.once(&parcel, Manner::AtOnce, false).await;
        } else if unheard {
            parcel.meter.forget();
            ended = self.once(&parcel, if by_header { Manner::Asks } else { Manner::Holds }, false).await;
        }
        match ended {
            Ended::Answered { answer, .. } if (200..300).contains(&answer.status) => Ok(read_kind(&answer.body)),
            Ended::Answered { answer, .. } => {
                Err(Error::of_answer(answer.status, &answer.headers, &answer.body, parcel.size))
            }
            Ended::Failed(error) => Err(error),
            Ended::BrokeOff { error, .. } => Err(Error::broken_off(&error)),
        }
    }

    /// One request, on a connection that rested if `old` allows it and there is one.
    async fn once(&self, parcel: &Parcel, manner: Manner, old: bool) -> Ended {
        let rested = old.then(|| self.wake()).flatten();
        let is_old = rested.is_some();
        let mut line = match rested {
            Some(line) => line,
            None => match self.direct.connect(&parcel.url).await {
                Ok(connection) => Line::new(connection),
                Err(error) => return Ended::Failed(Error::of_connection(&error)),
            },
        };
        let exchange = exchange(&mut line, parcel, manner);
        let ended = tokio::select! {
            ended = exchange => ended,
            limit = self.patience.standstill(&parcel.meter, parcel.size) => return Ended::Failed(Error::timed_out(limit)),
        };
        match ended {
            Ended::Answered { answer, whole } => {
                // Only after a whole exchange does the next answer belong to the next request.
                if whole && line.may_stay(&answer) {
                    self.rest(line);
                }
                Ended::Answered { answer, whole }
            }
            Ended::BrokeOff { error, .. } => Ended::BrokeOff { error, in_vain: is_old },
            failed @ Ended::Failed(_) => failed,
        }
    }

    fn wake(&self) -> Option<Line> {
        let mut resting = self.resting.lock().unwrap_or_else(PoisonError::into_inner);
        while let Some(mut rested) = resting.pop() {
            if rested.since.elapsed() < REST && rested.line.is_quiet() {
                return Some(rested.line);
            }
        }
        None
    }

    fn rest(&self, line: Line) {
        let mut resting = self.resting.lock().unwrap_or_else(PoisonError::into_inner);
        resting.retain(|rested| rested.since.elapsed() < REST);
        if resting.len() < RESTING {
            resting.push(Rested { line, since: Instant::now() });
        }
    }
}

impl SendNar for AskFirst {
    fn send(&self, parcel: Parcel) -> BoxFuture<'_, Result<Uploaded, Error>> {
        Box::pin(self.put(parcel))
    }
}

async fn exchange(line: &mut Line, parcel: &Parcel, manner: Manner) -> Ended {
    let broke_off = |error| Ended::BrokeOff { error, in_vain: false };
    let early = |answer| Ended::Answered { answer, whole: false };
    let Some(head) = head(parcel, manner) else { return Ended::Failed(Error::Token) };
    match line.say(&head).await {
        Ok(Some(answer)) => return early(answer),
        Ok(None) => (),
        Err(error) => return broke_off(error),
    }
    if manner != Manner::AtOnce {
        match line.leave(GRACE).await {
            Ok(Leave::Answered(answer)) => return early(answer),
            Ok(Leave::Send) => (),
            Err(error) => return broke_off(error),
        }
    }
    let mut nar = NarStream::open(parcel.file.clone(), parcel.hash, parcel.size);
    let fault = nar.fault();
    while let Some(block) = nar.next().await {
        let block: Bytes = match (block, fault.take()) {
            (Ok(block), None) => block,
            // The request stays unfinished, so that the server stores nothing.
            (_, Some(error)) => return Ended::Failed(error.into()),
            (Err(error), None) => return broke_off(error),
        };
        parcel.meter.add(block.len() as u64);
        match line.say(&block).await {
            Ok(Some(answer)) => return early(answer),
            Ok(None) => (),
            Err(error) => return broke_off(error),
        }
    }
    line.answer().await.map_or_else(broke_off, |answer| Ended::Answered { answer, whole: true })
}

/// The request's head, and the description where it does not fit into it. Zeroised, for the token is in it.
fn head(parcel: &Parcel, manner: Manner) -> Option<Zeroizing<Vec<u8>>> {
    let by_header = parcel.info.len() <= HEADER_LIMIT && HeaderValue::from_str(&parcel.info).is_ok();
    let url = &parcel.url;
    let port = url.port().map(|port| format!(":{port}")).unwrap_or_default();
    let preamble = if by_header { "" } else { parcel.info.as_str() };
    let length = preamble.len() as u64 + parcel.size;
    // Grown at once: what a vector leaves behind when it grows is not zeroised.
    let mut head = Zeroizing::new(Vec::with_capacity(8 * 1024 + 2 * parcel.info.len()));
    let query = url.query().map(|query| format!("?{query}")).unwrap_or_default();
    write!(
        head,
        "PUT {}{query} HTTP/1.1\r\nHost: {}{port}\r\nUser-Agent: {USER_AGENT}\r\n\
         Content-Type: application/x-nix-nar\r\nContent-Length: {length}\r\n",
        url.path(),
        url.host_str()?
    )
    .ok()?;
    for (name, value) in &parcel.headers {
        head.extend_from_slice(name.as_str().as_bytes());
        head.extend_from_slice(b": ");
        head.extend_from_slice(value.as_bytes());
        head.extend_from_slice(b"\r\n");
    }
    if by_header {
        write!(head, "X-Attic-Nar-Info: {}\r\n", parcel.info).ok()?;
    } else {
        write!(head, "X-Attic-Nar-Info-Preamble-Size: {}\r\n", preamble.len()).ok()?;
    }
    if manner == Manner::Asks && by_header {
        head.extend_from_slice(b"Expect: 100-continue\r\n");
    }
    head.extend_from_slice(b"\r\n");
    head.extend_from_slice(preamble.as_bytes());
    Some(head)
}
