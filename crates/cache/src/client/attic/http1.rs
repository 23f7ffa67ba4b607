//! One HTTP/1.1 connection as an upload needs it: answers are heard at any time, before, in and after
//! the body, and after a failed write. Knows requests and answers, not what they mean.
//!
//! The general client reports the failed write of a body and drops the answer that explains it, and
//! cannot wait for `100 Continue`. Both decide whether uploads are reliable (`attic-protocol`, 1.8).

use std::io;
use std::time::Duration;

use bytes::Buf;
use futures_util::FutureExt as _;
use reqwest::header::{
    CONNECTION, CONTENT_LENGTH, HeaderMap, HeaderName, HeaderValue, TRANSFER_ENCODING,
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, ReadHalf, WriteHalf};
use tokio::time::timeout;

use flywheel_sys::http::Connection;

/// A head larger than this is no answer.
const HEAD_LIMIT: usize = 64 * 1024;
/// Headers of an answer at most.
const HEADERS: usize = 64;
/// After a failed write the answer is there already, or it is on its way.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// An answer.
#[derive(Debug)]
pub(super) struct Answer {
    pub status: u16,
    pub headers: HeaderMap,
    /// At most as many bytes as the line was made for; more are not read.
    pub body: Vec<u8>,
    /// Its end was seen where the answer itself says that it is.
    pub whole: bool,
    /// That, and the server keeps the connection.
    keeps: bool,
}

/// A connection, and what was read from it and not understood yet.
pub(super) struct Line {
    reader: Reader,
    writer: WriteHalf<Box<dyn Connection>>,
}

struct Reader {
    half: ReadHalf<Box<dyn Connection>>,
    read: Vec<u8>,
    /// Bytes of an answer's body that are read.
    limit: usize,
}

struct Head {
    status: u16,
    headers: HeaderMap,
    /// HTTP/1.1, which keeps connections unless it says otherwise.
    modern: bool,
}

/// What came before the body was sent.
pub(super) enum Leave {
    /// The server wants the body, or says nothing.
    Send,
    /// It has answered already.
    Answered(Answer),
}

impl Line {
    /// `limit`: bytes of an answer's body that are read.
    pub fn new(connection: Box<dyn Connection>, limit: usize) -> Self {
        let (half, writer) = tokio::io::split(connection);
        Self {
            reader: Reader {
                half,
                read: Vec::new(),
                limit,
            },
            writer,
        }
    }

    /// Reads so many bytes of an answer's body from now on.
    pub fn limit(&mut self, limit: usize) {
        self.reader.limit = limit;
    }

    /// Whether the server still holds it: nothing may be said on a connection that rests, not even its end.
    pub fn is_quiet(&mut self) -> bool {
        let mut byte = [0];
        self.reader.read.is_empty() && self.reader.half.read(&mut byte).now_or_never().is_none()
    }

    /// Says something. An answer that comes meanwhile, or that explains why it could not be said, is returned.
    pub async fn say(&mut self, bytes: &[u8]) -> io::Result<Option<Answer>> {
        self.say_both(bytes, &[]).await
    }

    /// The same of two things in one breath.
    pub async fn say_both(&mut self, first: &[u8], second: &[u8]) -> io::Result<Option<Answer>> {
        let Self { reader, writer } = self;
        let saying = async {
            writer.write_all_buf(&mut Buf::chain(first, second)).await?;
            writer.flush().await
        };
        tokio::select! {
            biased;
            head = reader.last_head() => reader.body(head?).await.map(Some),
            said = saying => match said {
                Ok(()) => Ok(None),
                Err(error) => reader.last_words(error).await.map(Some),
            },
        }
    }

    /// Waits so long for the leave to send the body.
    pub async fn leave(&mut self, grace: Duration) -> io::Result<Leave> {
        let reader = &mut self.reader;
        let heard = async {
            loop {
                let head = reader.head().await?;
                if head.status == 100 || head.status >= 200 {
                    return Ok(head);
                }
            }
        };
        match timeout(grace, heard).await {
            Err(_) => Ok(Leave::Send),
            Ok(Ok(head)) if head.status == 100 => Ok(Leave::Send),
            Ok(Ok(head)) => self.reader.body(head).await.map(Leave::Answered),
            Ok(Err(error)) => Err(error),
        }
    }

    /// The answer to a request that was said.
    pub async fn answer(&mut self) -> io::Result<Answer> {
        self.reader.answer().await
    }

    /// Whether it may carry another request after this answer to a whole one.
    pub fn may_stay(&self, answer: &Answer) -> bool {
        answer.keeps && self.reader.read.is_empty()
    }
}

impl Reader {
    async fn more(&mut self) -> io::Result<()> {
        match self.half.read_buf(&mut self.read).await? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            _ => Ok(()),
        }
    }

    /// What a server has said that takes no more of a body; if nothing, why it takes no more.
    async fn last_words(&mut self, error: io::Error) -> io::Result<Answer> {
        timeout(LAST_WORDS, self.answer())
            .await
            .unwrap_or(Err(io::ErrorKind::TimedOut.into()))
            .map_err(|_| error)
    }

    async fn answer(&mut self) -> io::Result<Answer> {
        let head = self.last_head().await?;
        self.body(head).await
    }

    /// The head that is no `1xx`. Safe to be dropped at any time: what was read stays until it is understood.
    async fn last_head(&mut self) -> io::Result<Head> {
        loop {
            let head = self.head().await?;
            if !(100..200).contains(&head.status) {
                return Ok(head);
            }
        }
    }

    async fn head(&mut self) -> io::Result<Head> {
        loop {
            if let Some((head, length)) = parse(&self.read)? {
                self.read.drain(..length);
                return Ok(head);
            }
            if self.read.len() > HEAD_LIMIT {
                return Err(no_answer("the head of its answer has no end"));
            }
            self.more().await?;
        }
    }

    async fn body(&mut self, head: Head) -> io::Result<Answer> {
        let says = |name: &HeaderName, word: &str| {
            let values = head
                .headers
                .get_all(name)
                .into_iter()
                .filter_map(|value| value.to_str().ok());
            values
                .flat_map(|value| value.split(','))
                .any(|part| part.trim().eq_ignore_ascii_case(word))
        };
        let keeps = head.modern && !says(&CONNECTION, "close");
        let length = head
            .headers
            .get(CONTENT_LENGTH)
            .and_then(|value| value.to_str().ok()?.trim().parse().ok());
        let mut body = Vec::new();
        let ended = if head.status == 204 || head.status == 304 {
            Ok(true)
        } else if says(&TRANSFER_ENCODING, "chunked") {
            self.chunks(&mut body).await
        } else if let Some(length) = length {
            self.take(length, &mut body).await
        } else {
            self.rest(&mut body).await
        };
        // A failure's status says enough, even when the text behind it was cut.
        let whole = match ended {
            Ok(whole) => whole,
            Err(_) if head.status >= 300 => false,
            Err(error) => return Err(error),
        };
        let keeps = keeps && whole;
        Ok(Answer {
            status: head.status,
            headers: head.headers,
            body,
            whole,
            keeps,
        })
    }

    /// So many bytes; `false` if they are more than are read of an answer.
    async fn take(&mut self, length: usize, body: &mut Vec<u8>) -> io::Result<bool> {
        let wanted = length.min(self.limit - body.len().min(self.limit));
        while self.read.len() < wanted {
            if let Err(error) = self.more().await {
                body.append(&mut self.read);
                return Err(error);
            }
        }
        body.extend(self.read.drain(..wanted));
        Ok(wanted == length)
    }

    /// Everything until the connection ends, which it then has.
    async fn rest(&mut self, body: &mut Vec<u8>) -> io::Result<bool> {
        while self.read.len() < self.limit && self.half.read_buf(&mut self.read).await? > 0 {}
        body.append(&mut self.read);
        body.truncate(self.limit);
        Ok(false)
    }

    async fn chunks(&mut self, body: &mut Vec<u8>) -> io::Result<bool> {
        loop {
            let size = match httparse::parse_chunk_size(&self.read) {
                Err(_) => return Err(no_answer("its answer is not cut into chunks as it says")),
                Ok(httparse::Status::Partial) if self.read.len() > HEAD_LIMIT => {
                    return Err(no_answer("a chunk of its answer has no end"));
                }
                Ok(httparse::Status::Partial) => {
                    self.more().await?;
                    continue;
                }
                Ok(httparse::Status::Complete((start, size))) => {
                    self.read.drain(..start);
                    size
                }
            };
            if size == 0 {
                return self.trailers().await;
            }
            if !self
                .take(usize::try_from(size).unwrap_or(usize::MAX), body)
                .await?
            {
                return Ok(false);
            }
            let mut line_end = Vec::new();
            while self.read.len() < 2 {
                self.more().await?;
            }
            line_end.extend(self.read.drain(..2));
            if line_end != b"\r\n" {
                return Err(no_answer("its answer is not cut into chunks as it says"));
            }
        }
    }

    async fn trailers(&mut self) -> io::Result<bool> {
        loop {
            let end = if self.read.starts_with(b"\r\n") {
                Some(2)
            } else {
                self.read
                    .windows(4)
                    .position(|four| four == b"\r\n\r\n")
                    .map(|at| at + 4)
            };
            if let Some(end) = end {
                self.read.drain(..end);
                return Ok(true);
            }
            if self.read.len() > HEAD_LIMIT {
                return Err(no_answer("the trailers of its answer have no end"));
            }
            self.more().await?;
        }
    }
}

fn parse(bytes: &[u8]) -> io::Result<Option<(Head, usize)>> {
    let mut space = [httparse::EMPTY_HEADER; HEADERS];
    let mut response = httparse::Response::new(&mut space);
    let length = match response.parse(bytes) {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(error) => {
            return Err(no_answer(&format!(
                "it does not answer in HTTP/1.1 ({error})"
            )));
        }
    };
    let mut headers = HeaderMap::new();
    for header in response.headers.iter() {
        let name = HeaderName::from_bytes(header.name.as_bytes());
        if let (Ok(name), Ok(value)) = (name, HeaderValue::from_bytes(header.value)) {
            headers.append(name, value);
        }
    }
    let status = response.code.unwrap_or(0);
    Ok(Some((
        Head {
            status,
            headers,
            modern: response.version == Some(1),
        },
        length,
    )))
}

fn no_answer(text: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text)
}

#[cfg(test)]
mod tests;
