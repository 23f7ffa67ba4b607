//! One HTTP/1.1 connection for uploads. It reads a response at any time: before the body, between two blocks of it,
//! after it, and after a write has failed. It knows requests and responses, not what they mean.
//!
//! The general client (hyper, through reqwest) cannot replace it: when writing a body fails, that client reports the
//! failed write and drops the response that explains it. Measured without `Expect`: 12 to 14 % of early responses are
//! lost when the server closes after them. hyper can wait for `100 Continue` since 1.12
//! (`hyper::ext::on_informational`); before, it could not. Both decide whether uploads are reliable.

use std::io;
use std::time::Duration;

use bytes::Buf;
use futures_util::FutureExt as _;
use reqwest::header::{
    CONNECTION, CONTENT_LENGTH, HeaderMap, HeaderName, HeaderValue, TRANSFER_ENCODING,
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, ReadHalf, WriteHalf};
use tokio::time::timeout;

use flywheel_sys::http::ByteStream;

/// The largest response head, chunk header or trailer section, in bytes. A peer that sends more does not speak HTTP.
const HEAD_LIMIT: usize = 64 * 1024;
const MAX_HEADERS: usize = 64;
/// After a failed write the response has already arrived or is about to.
const RESPONSE_GRACE: Duration = Duration::from_secs(2);

#[derive(Debug)]
pub(super) struct Response {
    pub(crate) status: u16,
    pub(crate) headers: HeaderMap,
    /// At most the connection's body limit; further bytes are not read.
    pub(crate) body: Vec<u8>,
    /// Whether the body was read to the end that its own framing announces.
    pub(crate) complete: bool,
    /// Whether the body is complete and the server keeps the connection open.
    keep_alive: bool,
}

/// A connection, and the bytes that were read from it but not parsed yet.
pub(super) struct Connection {
    reader: Reader,
    writer: WriteHalf<Box<dyn ByteStream>>,
}

struct Reader {
    half: ReadHalf<Box<dyn ByteStream>>,
    buffer: Vec<u8>,
    /// The most bytes of a response's body that are read.
    body_limit: usize,
}

struct Head {
    status: u16,
    headers: HeaderMap,
    /// HTTP/1.1 keeps connections open unless the response has `Connection: close`.
    is_http11: bool,
}

/// What came of waiting for `100 Continue`.
pub(super) enum Continue {
    /// The server wants the body, or did not react to the expectation.
    SendBody,
    /// The server responded without wanting the body.
    Answered(Response),
}

impl Connection {
    /// `body_limit`: bytes of a response's body that are read at most.
    pub(crate) fn new(stream: Box<dyn ByteStream>, body_limit: usize) -> Self {
        let (half, writer) = tokio::io::split(stream);
        Self {
            reader: Reader {
                half,
                buffer: Vec::new(),
                body_limit,
            },
            writer,
        }
    }

    /// Reads at most this many bytes of a response's body from now on.
    pub(crate) fn set_body_limit(&mut self, limit: usize) {
        self.reader.body_limit = limit;
    }

    /// Whether the connection is still open and in step. An idle server must send nothing: bytes would be a response
    /// to no request, and an end of file means that it has closed.
    pub(crate) fn is_idle(&mut self) -> bool {
        let mut byte = [0];
        self.reader.buffer.is_empty() && self.reader.half.read(&mut byte).now_or_never().is_none()
    }

    /// Writes all bytes. Returns a response that arrives while they are written, or that explains why they could not
    /// be.
    pub(crate) async fn write(&mut self, bytes: &[u8]) -> io::Result<Option<Response>> {
        self.write_both(bytes, &[]).await
    }

    /// As [`Self::write`], for two pieces that should leave in one packet.
    pub(crate) async fn write_both(
        &mut self,
        first: &[u8],
        second: &[u8],
    ) -> io::Result<Option<Response>> {
        let Self { reader, writer } = self;
        let write = async {
            writer.write_all_buf(&mut Buf::chain(first, second)).await?;
            writer.flush().await
        };
        // The reader comes first: a response that has already arrived makes writing the rest pointless.
        tokio::select! {
            biased;
            head = reader.final_head() => reader.read_body(head?).await.map(Some),
            written = write => match written {
                Ok(()) => Ok(None),
                // A server that does not want the body responds, closes, and thereby breaks the write.
                Err(error) => reader.response_after_failed_write(error).await.map(Some),
            },
        }
    }

    /// Waits for `100 Continue` for at most `grace`.
    pub(crate) async fn await_continue(&mut self, grace: Duration) -> io::Result<Continue> {
        let reader = &mut self.reader;
        let reaction = async {
            loop {
                let head = reader.head().await?;
                // Other interim responses, such as `102 Processing`, do not ask for the body.
                if head.status == 100 || head.status >= 200 {
                    return Ok(head);
                }
            }
        };
        match timeout(grace, reaction).await {
            Err(_) => Ok(Continue::SendBody),
            Ok(Ok(head)) if head.status == 100 => Ok(Continue::SendBody),
            Ok(Ok(head)) => self.reader.read_body(head).await.map(Continue::Answered),
            Ok(Err(error)) => Err(error),
        }
    }

    /// Reads the response to a request that was written completely.
    pub(crate) async fn response(&mut self) -> io::Result<Response> {
        self.reader.response().await
    }

    /// Whether the connection can carry another request. `response` must answer a request that was written completely.
    pub(crate) fn is_reusable(&self, response: &Response) -> bool {
        response.keep_alive && self.reader.buffer.is_empty()
    }
}

impl Reader {
    async fn fill(&mut self) -> io::Result<()> {
        match self.half.read_buf(&mut self.buffer).await? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            _ => Ok(()),
        }
    }

    /// The response of a server that takes no more of a body; without one, the error of the failed write.
    async fn response_after_failed_write(&mut self, error: io::Error) -> io::Result<Response> {
        timeout(RESPONSE_GRACE, self.response())
            .await
            .unwrap_or(Err(io::ErrorKind::TimedOut.into()))
            .map_err(|_| error)
    }

    async fn response(&mut self) -> io::Result<Response> {
        let head = self.final_head().await?;
        self.read_body(head).await
    }

    /// The first head with a final status, 200 or higher. Cancel-safe: bytes stay in the buffer until a whole head is
    /// parsed.
    async fn final_head(&mut self) -> io::Result<Head> {
        loop {
            let head = self.head().await?;
            if !(100..200).contains(&head.status) {
                return Ok(head);
            }
        }
    }

    async fn head(&mut self) -> io::Result<Head> {
        loop {
            if let Some((head, length)) = parse(&self.buffer)? {
                // The rest of the buffer belongs to the body, or to the response after an interim one.
                self.buffer.drain(..length);
                return Ok(head);
            }
            if self.buffer.len() > HEAD_LIMIT {
                return Err(invalid("the head of its response has no end"));
            }
            self.fill().await?;
        }
    }

    async fn read_body(&mut self, head: Head) -> io::Result<Response> {
        let has_token = |name: &HeaderName, token: &str| {
            let values = head
                .headers
                .get_all(name)
                .into_iter()
                .filter_map(|value| value.to_str().ok());
            values
                .flat_map(|value| value.split(','))
                .any(|part| part.trim().eq_ignore_ascii_case(token))
        };
        let keep_alive = head.is_http11 && !has_token(&CONNECTION, "close");
        let length = head
            .headers
            .get(CONTENT_LENGTH)
            .and_then(|value| value.to_str().ok()?.trim().parse().ok());
        let mut body = Vec::new();
        // The order of RFC 9112, 6.3: 204 and 304 have no body, chunks go before a length, and without either the body ends
        // with the connection.
        let ended = if head.status == 204 || head.status == 304 {
            Ok(true)
        } else if has_token(&TRANSFER_ENCODING, "chunked") {
            self.chunks(&mut body).await
        } else if let Some(length) = length {
            self.take(length, &mut body).await
        } else {
            self.until_end_of_file(&mut body).await
        };
        // The status of a failure is informative enough, even when its body was cut off.
        let complete = match ended {
            Ok(complete) => complete,
            Err(_) if head.status >= 300 => false,
            Err(error) => return Err(error),
        };
        Ok(Response {
            status: head.status,
            headers: head.headers,
            body,
            complete,
            keep_alive: keep_alive && complete,
        })
    }

    /// Reads `length` bytes; `false` if the body limit cuts them short.
    async fn take(&mut self, length: usize, body: &mut Vec<u8>) -> io::Result<bool> {
        // Bytes beyond the limit stay unread. The response is then incomplete, and the connection is not reused.
        let wanted = length.min(self.body_limit - body.len().min(self.body_limit));
        while self.buffer.len() < wanted {
            if let Err(error) = self.fill().await {
                // The part of the body that did arrive may still explain a failure.
                body.append(&mut self.buffer);
                return Err(error);
            }
        }
        body.extend(self.buffer.drain(..wanted));
        Ok(wanted == length)
    }

    /// Reads until the server closes. The response does not announce its end, so it always counts as incomplete.
    async fn until_end_of_file(&mut self, body: &mut Vec<u8>) -> io::Result<bool> {
        while self.buffer.len() < self.body_limit && self.half.read_buf(&mut self.buffer).await? > 0
        {
        }
        body.append(&mut self.buffer);
        body.truncate(self.body_limit);
        Ok(false)
    }

    async fn chunks(&mut self, body: &mut Vec<u8>) -> io::Result<bool> {
        loop {
            let size = match httparse::parse_chunk_size(&self.buffer) {
                Err(_) => return Err(invalid("its response is not in valid chunks")),
                Ok(httparse::Status::Partial) if self.buffer.len() > HEAD_LIMIT => {
                    return Err(invalid("a chunk header of its response has no end"));
                }
                Ok(httparse::Status::Partial) => {
                    self.fill().await?;
                    continue;
                }
                Ok(httparse::Status::Complete((start, size))) => {
                    self.buffer.drain(..start);
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
            // Each chunk ends with a line break of its own (RFC 9112, 7.1).
            let mut line_end = Vec::new();
            while self.buffer.len() < 2 {
                self.fill().await?;
            }
            line_end.extend(self.buffer.drain(..2));
            if line_end != b"\r\n" {
                return Err(invalid("its response is not in valid chunks"));
            }
        }
    }

    /// Skips the trailers. Without any, the last chunk is followed by a single empty line.
    async fn trailers(&mut self) -> io::Result<bool> {
        loop {
            let end = if self.buffer.starts_with(b"\r\n") {
                Some(2)
            } else {
                self.buffer
                    .windows(4)
                    .position(|four| four == b"\r\n\r\n")
                    .map(|at| at + 4)
            };
            if let Some(end) = end {
                self.buffer.drain(..end);
                return Ok(true);
            }
            if self.buffer.len() > HEAD_LIMIT {
                return Err(invalid("the trailers of its response have no end"));
            }
            self.fill().await?;
        }
    }
}

fn parse(bytes: &[u8]) -> io::Result<Option<(Head, usize)>> {
    let mut space = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut response = httparse::Response::new(&mut space);
    let length = match response.parse(bytes) {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(error) => {
            return Err(invalid(&format!(
                "it does not respond in HTTP/1.1 ({error})"
            )));
        }
    };
    let mut headers = HeaderMap::new();
    for header in response.headers.iter() {
        let name = HeaderName::from_bytes(header.name.as_bytes());
        // One invalid header is no reason to lose the response.
        if let (Ok(name), Ok(value)) = (name, HeaderValue::from_bytes(header.value)) {
            headers.append(name, value);
        }
    }
    let status = response.code.unwrap_or(0);
    Ok(Some((
        Head {
            status,
            headers,
            is_http11: response.version == Some(1),
        },
        length,
    )))
}

fn invalid(text: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text)
}

#[cfg(test)]
mod tests;
