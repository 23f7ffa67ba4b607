//! Sends a NAR after asking the server's leave, so that not a byte of it travels when the server refuses
//! it or has it already; and hears the answer whenever it comes. Never tries twice but for an answer
//! that was lost, or a connection that had ended while it rested.

use std::io::Write as _;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::future::BoxFuture;
use reqwest::header::HeaderValue;
use zeroize::Zeroizing;

use crate::client::attic::Error;
use crate::client::attic::http1::{Answer, Leave, Line};
use crate::client::attic::pool::{self, Lines};
use crate::client::attic::send::{
    ANSWER_LIMIT, HEADER_LIMIT, Meter, Parcel, Patience, SendNar, Uploaded, WholeBody, read_kind,
};
use flywheel_nix::nar::NarStream;

/// From this NAR size on, in bytes, a round trip for the server's leave costs less than the body.
const WORTH_ASKING: u64 = 64 * 1024;
/// A server or a proxy that does not know the question is silent; then the body is sent.
const GRACE: Duration = Duration::from_secs(1);

/// The usual way to send a NAR.
#[derive(Debug)]
pub struct AskFirst {
    lines: Arc<Lines>,
    proxied: WholeBody,
    patience: Patience,
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
    BrokeOff {
        error: std::io::Error,
        in_vain: bool,
    },
}

impl AskFirst {
    /// Patience is for bytes that do not move; questions of leave have their own.
    pub fn new(lines: Arc<Lines>, sending: reqwest::Client, patience: Patience) -> Self {
        Self {
            lines,
            proxied: WholeBody::new(sending, patience),
            patience,
        }
    }

    async fn put(&self, parcel: Parcel) -> Result<Uploaded, Error> {
        if self.lines.is_proxied(&parcel.url) {
            return self.proxied.send(parcel).await;
        }
        let by_header =
            parcel.info.len() <= HEADER_LIMIT && HeaderValue::from_str(&parcel.info).is_ok();
        let manner = if by_header && parcel.size > WORTH_ASKING {
            Manner::Asks
        } else {
            Manner::AtOnce
        };
        let mut ended = self.once(&parcel, manner, true).await;
        if matches!(ended, Ended::BrokeOff { in_vain: true, .. }) {
            parcel.meter.forget();
            ended = self.once(&parcel, manner, false).await;
        }
        let refused_to_wait =
            matches!(&ended, Ended::Answered { answer, .. } if answer.status == 417);
        // The server may have said why it takes no more, and closed so that it could not be heard.
        let unheard = matches!(ended, Ended::BrokeOff { .. }) && parcel.meter.own() < parcel.size;
        if refused_to_wait && manner == Manner::Asks {
            parcel.meter.forget();
            ended = self.once(&parcel, Manner::AtOnce, false).await;
        } else if unheard {
            parcel.meter.forget();
            ended = self
                .once(
                    &parcel,
                    if by_header {
                        Manner::Asks
                    } else {
                        Manner::Holds
                    },
                    false,
                )
                .await;
        }
        match ended {
            Ended::Answered { answer, .. } if (200..300).contains(&answer.status) => {
                Ok(read_kind(&answer.body))
            }
            Ended::Answered { answer, .. } => Err(Error::of_answer(
                answer.status,
                &answer.headers,
                &answer.body,
                parcel.size,
            )),
            Ended::Failed(error) => Err(error),
            Ended::BrokeOff { error, .. } => Err(Error::broken_off(&error)),
        }
    }

    /// One request, on a connection that rested if `old` allows it and there is one.
    async fn once(&self, parcel: &Parcel, manner: Manner, old: bool) -> Ended {
        let rested = old
            .then(|| self.lines.wake(&parcel.url, ANSWER_LIMIT))
            .flatten();
        let is_old = rested.is_some();
        let mut line = match rested {
            Some(line) => line,
            None => match self.lines.connect(&parcel.url, ANSWER_LIMIT).await {
                Ok(line) => line,
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
                    self.lines.rest(&parcel.url, line);
                }
                Ended::Answered { answer, whole }
            }
            Ended::BrokeOff { error, .. } => Ended::BrokeOff {
                error,
                in_vain: is_old,
            },
            failed @ Ended::Failed(_) => failed,
        }
    }
}

impl SendNar for AskFirst {
    fn send(&self, parcel: Parcel) -> BoxFuture<'_, Result<Uploaded, Error>> {
        Box::pin(self.put(parcel))
    }
}

async fn exchange(line: &mut Line, parcel: &Parcel, manner: Manner) -> Ended {
    let broke_off = |error| Ended::BrokeOff {
        error,
        in_vain: false,
    };
    let early = |answer| Ended::Answered {
        answer,
        whole: false,
    };
    let Some(head) = head(parcel, manner) else {
        return Ended::Failed(Error::Token);
    };
    // Head and body of a small one go together: one packet, and the server wakes up once.
    let mut body =
        (manner == Manner::AtOnce && parcel.size <= WORTH_ASKING).then(|| Body::open(parcel));
    let first = match &mut body {
        Some(body) => match body.next().await {
            Ok(block) => block.unwrap_or_default(),
            Err(ended) => return ended,
        },
        None => Bytes::new(),
    };
    match line.say_both(&head, &first).await {
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
    let mut body = body.unwrap_or_else(|| Body::open(parcel));
    loop {
        let block = match body.next().await {
            Ok(Some(block)) => block,
            Ok(None) => break,
            Err(ended) => return ended,
        };
        match line.say(&block).await {
            Ok(Some(answer)) => return early(answer),
            Ok(None) => (),
            Err(error) => return broke_off(error),
        }
    }
    line.answer()
        .await
        .map_or_else(broke_off, |answer| Ended::Answered {
            answer,
            whole: true,
        })
}

/// The NAR on its way, counted as it leaves.
struct Body<'a> {
    nar: NarStream,
    meter: &'a Meter,
}

impl<'a> Body<'a> {
    fn open(parcel: &'a Parcel) -> Self {
        Self {
            nar: parcel.source.stream(parcel.hash, parcel.size),
            meter: &parcel.meter,
        }
    }

    async fn next(&mut self) -> Result<Option<Bytes>, Ended> {
        match (self.nar.next().await, self.nar.fault().take()) {
            (Some(Ok(block)), None) => {
                self.meter.add(block.len() as u64);
                Ok(Some(block))
            }
            (None, None) => Ok(None),
            // The request stays unfinished, so that the server stores nothing.
            (_, Some(error)) => Err(Ended::Failed(error.into())),
            (Some(Err(error)), None) => Err(Ended::BrokeOff {
                error,
                in_vain: false,
            }),
        }
    }
}

/// The request's head, and the description where it does not fit into it.
fn head(parcel: &Parcel, manner: Manner) -> Option<Zeroizing<Vec<u8>>> {
    let by_header =
        parcel.info.len() <= HEADER_LIMIT && HeaderValue::from_str(&parcel.info).is_ok();
    let preamble = if by_header { "" } else { parcel.info.as_str() };
    let length = preamble.len() as u64 + parcel.size;
    let mut head = pool::head("PUT", &parcel.url, &parcel.headers, 2 * parcel.info.len())?;
    write!(
        head,
        "Content-Type: application/x-nix-nar\r\nContent-Length: {length}\r\n"
    )
    .ok()?;
    if by_header {
        write!(head, "X-Attic-Nar-Info: {}\r\n", parcel.info).ok()?;
    } else {
        write!(
            head,
            "X-Attic-Nar-Info-Preamble-Size: {}\r\n",
            preamble.len()
        )
        .ok()?;
    }
    if manner == Manner::Asks && by_header {
        head.extend_from_slice(b"Expect: 100-continue\r\n");
    }
    head.extend_from_slice(b"\r\n");
    head.extend_from_slice(preamble.as_bytes());
    Some(head)
}
