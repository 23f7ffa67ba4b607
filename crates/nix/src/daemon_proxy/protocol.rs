//! The lines between the proxy and the process that has started it.

use std::io;

use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::net::unix::OwnedReadHalf;

/// No line is longer: a word, a space, and a name of at most 244 bytes.
const LINE_LIMIT: usize = 512;

/// To the proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    /// Answer once all names are handed on that clients had sent before.
    Flush(u64),
    /// Answer at once.
    Ping,
    /// End when the last client has gone.
    End,
}

/// From the proxy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Report {
    Ready,
    /// A base name that passed.
    Named(String),
    Flushed(u64),
    /// As `Flushed`, but the daemon does not take what a client has sent.
    Behind(u64),
    Pong,
    /// There were too many names.
    Incomplete,
}

impl Order {
    pub(super) fn line(self) -> String {
        match self {
            Self::Flush(number) => format!("flush {number}\n"),
            Self::Ping => "ping\n".into(),
            Self::End => "end\n".into(),
        }
    }

    fn parse(line: &str) -> Option<Self> {
        match line.split_once(' ') {
            Some(("flush", number)) => number.parse().ok().map(Self::Flush),
            None if line == "ping" => Some(Self::Ping),
            None if line == "end" => Some(Self::End),
            _ => None,
        }
    }
}

impl Report {
    pub(super) fn line(&self) -> String {
        match self {
            Self::Ready => "ready\n".into(),
            Self::Named(name) => format!("named {name}\n"),
            Self::Flushed(number) => format!("flushed {number}\n"),
            Self::Behind(number) => format!("behind {number}\n"),
            Self::Pong => "pong\n".into(),
            Self::Incomplete => "incomplete\n".into(),
        }
    }

    fn parse(line: &str) -> Option<Self> {
        match line.split_once(' ') {
            Some(("named", name)) => Some(Self::Named(name.to_owned())),
            Some(("flushed", number)) => number.parse().ok().map(Self::Flushed),
            Some(("behind", number)) => number.parse().ok().map(Self::Behind),
            None if line == "ready" => Some(Self::Ready),
            None if line == "pong" => Some(Self::Pong),
            None if line == "incomplete" => Some(Self::Incomplete),
            _ => None,
        }
    }
}

/// The lines that come from the other process.
pub(super) struct Lines {
    from: BufReader<OwnedReadHalf>,
    partial: Vec<u8>,
}

impl Lines {
    pub(super) fn new(from: OwnedReadHalf) -> Self {
        Self {
            from: BufReader::new(from),
            partial: Vec::new(),
        }
    }

    /// The next order; `None` at the end. Cancel-safe.
    pub(super) async fn order(&mut self) -> Option<Order> {
        self.next(Order::parse).await.ok()
    }

    /// The next report; `None` at the end. Cancel-safe.
    pub(super) async fn report(&mut self) -> Option<Report> {
        self.next(Report::parse).await.ok()
    }

    /// Lines that are none of these are passed over.
    async fn next<T>(&mut self, parse: impl Fn(&str) -> Option<T>) -> io::Result<T> {
        loop {
            let bytes = self.from.fill_buf().await?;
            if bytes.is_empty() || self.partial.len() > LINE_LIMIT {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let end = bytes.iter().position(|byte| *byte == b'\n');
            let part = end.unwrap_or(bytes.len());
            self.partial.extend_from_slice(&bytes[..part]);
            self.from.consume(part + usize::from(end.is_some()));
            if end.is_some() {
                let line = std::mem::take(&mut self.partial);
                if let Some(parsed) = str::from_utf8(&line).ok().and_then(&parse) {
                    return Ok(parsed);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_one_side_writes_the_other_reads() {
        for order in [Order::Flush(7), Order::Ping, Order::End] {
            assert_eq!(Order::parse(order.line().trim_end()), Some(order));
        }
        for report in [
            Report::Ready,
            Report::Named("fvchbymk0m4jvldpb9m5hy0bjy2lf30k-hello".into()),
            Report::Flushed(1),
            Report::Behind(2),
            Report::Pong,
            Report::Incomplete,
        ] {
            assert_eq!(Report::parse(report.line().trim_end()), Some(report));
        }
    }
}
