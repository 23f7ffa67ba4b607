//! Reads back what a cache serves: narinfos, and the bodies of NARs. A body is unpacked while it comes, so that its size
//! does not matter to memory.

use std::io::{self, BufRead as _, BufReader, Read};
use std::time::Duration;

use bytes::Bytes;
use reqwest::header::LOCATION;
use sha2::{Digest as _, Sha256 as Hasher};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_util::task::AbortOnDropHandle;
use url::Url;

use crate::client::attic::{Attic, RESPONSE_LIMIT, read_response};
use crate::client::destination::{BodyCheck, ByteCounter, Error};
use flywheel_nix::hash::Sha256;
use flywheel_nix::nar::compression;
use flywheel_nix::narinfo::NarInfo;
use flywheel_nix::store_path::PathHash;
use flywheel_sys::http;

/// How many bytes a compressed NAR may exceed the NAR by, besides an eighth: incompressible data grows a little.
const SLACK: u64 = 64 * 1024;
/// NARs up to this size, in bytes, are fetched in one piece.
const SMALL: u64 = 1024 * 1024;
/// NARs up to this size, in bytes, are unpacked on the runtime's own threads.
const INLINE: u64 = 64 * 1024;
/// A body of which nothing comes for this long has stalled.
const BODY_IDLE: Duration = Duration::from_secs(30);
/// Blocks of a body, each of some kilobytes, between the connection and the thread that unpacks.
const BLOCKS: usize = 16;
const BUFFER: usize = 64 * 1024;

impl Attic {
    /// The narinfo of a path; `None` if the cache does not have it.
    ///
    /// # Errors
    /// As [`Error`] lists them; [`Error::Foreign`] if the text is no narinfo.
    pub async fn nar_info(&self, hash: &PathHash) -> Result<Option<NarInfo>, Error> {
        let text = match self
            .get(self.endpoint().read(&format!("{hash}.narinfo")))
            .await
        {
            // Here 404 means that the path is absent, not that access is refused.
            Err(Error::Refused { status: 404, .. }) => return Ok(None),
            answer => answer?,
        };
        let text = String::from_utf8(text).map_err(|error| Error::Foreign(error.to_string()))?;
        NarInfo::parse(&text)
            .map(Some)
            .map_err(|error| Error::Foreign(error.to_string()))
    }

    /// Succeeds if the server answers for the cache at all, whatever the token's rights are.
    ///
    /// # Errors
    /// As [`Error`] lists them, but a refusal is an answer.
    pub(crate) async fn cache_info(&self) -> Result<(), Error> {
        match self.get(self.endpoint().read("nix-cache-info")).await {
            Ok(_) | Err(Error::Refused { .. } | Error::Rejected { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Fetches and unpacks the NAR body behind a narinfo as it is served, and compares its size and its hash.
    ///
    /// # Errors
    /// As [`Error`] lists them, when no body came at all.
    pub async fn check_body(
        &self,
        info: &NarInfo,
        received: &ByteCounter,
    ) -> Result<BodyCheck, Error> {
        let Some(url) = self.endpoint().nar(&info.url) else {
            return Ok(BodyCheck::Bad("its narinfo names no URL".to_owned()));
        };
        let checked = if info.nar_size <= SMALL && self.endpoint().owns(&url) {
            self.check_small_body(&url, info, received).await
        } else {
            None
        };
        let checked = match checked {
            Some(checked) => checked,
            None => self.check_streamed_body(&url, info, received).await,
        };
        match checked {
            Err(Error::Refused { status: 404, .. }) => Ok(BodyCheck::Bad(
                "its narinfo is there, but its NAR is not".to_owned(),
            )),
            checked => checked,
        }
    }

    /// Fetches a small body by the pool, which takes half the time. `None` where the general client is needed.
    async fn check_small_body(
        &self,
        url: &Url,
        info: &NarInfo,
        received: &ByteCounter,
    ) -> Option<Result<BodyCheck, Error>> {
        let limit = usize::try_from(limit(info)).ok()?;
        let headers = match self.headers() {
            Ok(headers) => headers,
            Err(error) => return Some(Err(error)),
        };
        let got = self
            .0
            .pool
            .get(url, &headers, limit, self.0.api_timeout)
            .await;
        let response = match got {
            Ok(response) => response?,
            // A body that breaks off is looked into by the general client, which keeps what did come.
            Err(_) => return None,
        };
        // A redirect leads to a storage behind the server.
        if (300..400).contains(&response.status) {
            return None;
        }
        if !(200..300).contains(&response.status) {
            let (status, headers) = (response.status, &response.headers);
            let error = Error::from_response(status, headers, &response.body, 0);
            return Some(Err(error));
        }
        received.add(response.body.len() as u64);
        let (compression, hash, size) = (info.compression.clone(), info.nar_hash, info.nar_size);
        // Unpacking this little takes less time than handing it to another thread.
        let judged = self
            .0
            .unpacking
            .run(size > INLINE, move || {
                judge(&response.body[..], &compression, hash, size)
            })
            .await;
        Some(judged.map_err(|panic| Error::Foreign(panic.to_string())))
    }

    /// Fetches a body of any size, and unpacks it while it comes.
    async fn check_streamed_body(
        &self,
        url: &Url,
        info: &NarInfo,
        received: &ByteCounter,
    ) -> Result<BodyCheck, Error> {
        // Each has a decoder with a window of some megabytes.
        let _turn = self.0.large_bodies.acquire().await;
        let mut response = self.open_body(url).await?;
        if !response.status().is_success() {
            return match read_response(response, RESPONSE_LIMIT, 0).await {
                Ok(_) => Err(Error::Foreign("its NAR has no success status".to_owned())),
                Err(error) => Err(error),
            };
        }
        let (send, receive) = mpsc::channel(BLOCKS);
        let (compression, hash, size) = (info.compression.clone(), info.nar_hash, info.nar_size);
        // Unpacking takes processor time, which would stop the runtime's other tasks. The thread ends with the channel.
        let judging = AbortOnDropHandle::new(tokio::task::spawn_blocking(move || {
            judge(Blocks::new(receive), &compression, hash, size)
        }));
        let (mut total, limit) = (0, limit(info));
        let broken = loop {
            let block = match timeout(BODY_IDLE, response.chunk()).await {
                Err(_) => return Err(Error::timed_out(BODY_IDLE)),
                Ok(Ok(Some(block))) => block,
                Ok(Ok(None)) => break None,
                Ok(Err(error)) => break Some(http::chain(error)),
            };
            total += block.len() as u64;
            received.add(block.len() as u64);
            // The judge has ended early, with a verdict that no further byte can change.
            if total > limit || send.send(block).await.is_err() {
                break None;
            }
        };
        drop(send);
        let judged = judging
            .await
            .map_err(|panic| Error::Foreign(panic.to_string()))?;
        Ok(match (judged, broken) {
            (BodyCheck::Bad(_), Some(cause)) => BodyCheck::BrokenOff(format!(
                "its NAR breaks off after {total} bytes as served ({cause})"
            )),
            (judged, _) => judged,
        })
    }

    /// Follows one redirect, to the signed URL of a storage behind the server (S3). The token is sent to the server
    /// alone.
    async fn open_body(&self, url: &Url) -> Result<reqwest::Response, Error> {
        let mut request = self.0.streaming.get(url.clone());
        if self.endpoint().owns(url) {
            request = request.headers(self.headers()?);
        }
        let response = open(request).await?;
        let target = response
            .headers()
            .get(LOCATION)
            .and_then(|value| value.to_str().ok());
        let target = target
            .filter(|_| response.status().is_redirection())
            .and_then(|text| url.join(text).ok());
        match target {
            None => Ok(response),
            Some(target) => open(self.0.streaming.get(target)).await,
        }
    }
}

/// The response's head, within a time.
async fn open(request: reqwest::RequestBuilder) -> Result<reqwest::Response, Error> {
    match timeout(BODY_IDLE, request.send()).await {
        Err(_) => Err(Error::timed_out(BODY_IDLE)),
        Ok(response) => response.map_err(Error::from_reqwest),
    }
}

/// The most bytes that a body of this NAR can have in any compression.
fn limit(info: &NarInfo) -> u64 {
    info.nar_size
        .saturating_add(info.nar_size / 8)
        .saturating_add(SLACK)
}

/// The blocks of a body as a reader, for a thread that may wait.
struct Blocks {
    receive: mpsc::Receiver<Bytes>,
    current: Bytes,
}

impl Blocks {
    fn new(receive: mpsc::Receiver<Bytes>) -> Self {
        Self {
            receive,
            current: Bytes::new(),
        }
    }
}

impl Read for Blocks {
    fn read(&mut self, space: &mut [u8]) -> io::Result<usize> {
        while self.current.is_empty() {
            match self.receive.blocking_recv() {
                Some(block) => self.current = block,
                None => return Ok(0),
            }
        }
        let got = space.len().min(self.current.len());
        space[..got].copy_from_slice(&self.current.split_to(got));
        Ok(got)
    }
}

fn judge(packed: impl Read, compression: &str, hash: Sha256, size: u64) -> BodyCheck {
    let mut packed = BufReader::with_capacity(BUFFER, packed);
    match packed.fill_buf() {
        Ok([]) => return BodyCheck::Bad("its NAR is served empty".to_owned()),
        Ok(_) => (),
        Err(error) => return BodyCheck::Bad(format!("its NAR cannot be read ({error})")),
    }
    let unpacked = match compression::reader(packed, compression) {
        Ok(Some(reader)) => digest(reader, size),
        Ok(None) => {
            return BodyCheck::Unsupported(format!(
                "its NAR is compressed with `{compression}`, which is not unpacked here"
            ));
        }
        Err(error) => Err(error),
    };
    match unpacked {
        Err(error) => BodyCheck::Bad(format!("its NAR cannot be unpacked ({error})")),
        Ok((_, found)) if found < size => {
            BodyCheck::Bad(format!("its NAR has {found} bytes instead of {size}"))
        }
        Ok((_, found)) if found > size => {
            BodyCheck::Bad(format!("its NAR has more than {size} bytes"))
        }
        Ok((found, _)) if found != hash => {
            BodyCheck::Bad(format!("its NAR's hash is {found} instead of {hash}"))
        }
        Ok(_) => BodyCheck::Good,
    }
}

/// The hash and the size of a reader's bytes. It reads at most one byte more than expected, which is enough to see that
/// the size is wrong.
fn digest(reader: impl Read, size: u64) -> io::Result<(Sha256, u64)> {
    let mut reader = reader.take(size.saturating_add(1));
    let (mut hasher, mut total) = (Hasher::new(), 0);
    let mut buffer = vec![0; 64 * 1024];
    loop {
        match reader.read(&mut buffer)? {
            0 => return Ok((Sha256(hasher.finalize().into()), total)),
            got => {
                hasher.update(&buffer[..got]);
                total += got as u64;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bodies_are_judged_in_every_compression() {
        let nar = vec![b'n'; 100_000];
        let (hash, size) = (Sha256(Hasher::digest(&nar).into()), nar.len() as u64);
        let zstd = zstd::encode_all(&nar[..], 3).expect("packed");
        let mut xz = Vec::new();
        liblzma::read::XzEncoder::new(&nar[..], 1)
            .read_to_end(&mut xz)
            .expect("packed");
        for (packed, compression) in [(&nar, "none"), (&zstd, "zstd"), (&xz, "xz")] {
            assert_eq!(
                judge(&packed[..], compression, hash, size),
                BodyCheck::Good,
                "{compression}"
            );
            assert!(
                matches!(
                    judge(&packed[..], compression, hash, size - 1),
                    BodyCheck::Bad(_)
                ),
                "{compression}"
            );
            assert!(matches!(
                judge(&packed[..packed.len() / 2], compression, hash, size),
                BodyCheck::Bad(_)
            ));
        }
        assert!(matches!(
            judge(&nar[..], "none", Sha256([0; 32]), size),
            BodyCheck::Bad(_)
        ));
        assert_eq!(
            judge(&b""[..], "zstd", hash, size),
            BodyCheck::Bad("its NAR is served empty".to_owned())
        );
        assert!(matches!(
            judge(&b"x"[..], "br", hash, size),
            BodyCheck::Unsupported(_)
        ));
    }

    #[test]
    fn a_body_that_takes_too_much_memory_to_unpack_is_bad() {
        use liblzma::stream::{Check, Filters, LzmaOptions, Stream};
        use std::io::Write as _;

        let nar = vec![b'n'; 100_000];
        let (hash, size) = (Sha256(Hasher::digest(&nar).into()), nar.len() as u64);
        for (dictionary, good) in [(64, true), (192, false)] {
            let mut options = LzmaOptions::new_preset(0).expect("a preset");
            options.dict_size(dictionary * 1024 * 1024);
            let mut filters = Filters::new();
            filters.lzma2(&options);
            let stream = Stream::new_stream_encoder(&filters, Check::Crc32).expect("memory");
            let mut encoder = liblzma::write::XzEncoder::new_stream(Vec::new(), stream);
            encoder.write_all(&nar).expect("memory");
            let packed = encoder.finish().expect("memory");
            let judged = judge(&packed[..], "xz", hash, size);
            assert_eq!(
                judged == BodyCheck::Good,
                good,
                "{dictionary} MiB: {judged:?}"
            );
        }
    }
}
