//! Reading back what a cache serves: narinfo, and the body of a small NAR.

use std::io::{self, Read};
use std::time::Duration;

use reqwest::header::LOCATION;
use sha2::{Digest as _, Sha256 as Hasher};
use url::Url;

use crate::client::attic::{ANSWER_LIMIT, Attic, Error, answer};
use flywheel_nix::hash::Sha256;
use flywheel_nix::narinfo::NarInfo;
use flywheel_nix::store_path::PathHash;

/// A compressed NAR is never much larger than the NAR.
const SLACK: u64 = 64 * 1024;
/// A NAR body small enough to be a sample arrives within this time.
const BODY_TIMEOUT: Duration = Duration::from_secs(60);

/// What a NAR body turned out to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Body {
    /// It is the NAR that the narinfo promises.
    Good,
    /// It is not, and why.
    Bad(String),
    /// It is compressed in a way that is not unpacked here.
    Unread(String),
}

impl Attic {
    /// What the cache says of a path; `None` if it does not have it.
    ///
    /// # Errors
    /// As [`Error`] says; [`Error::Foreign`] if the text is no narinfo.
    pub async fn nar_info(&self, hash: &PathHash) -> Result<Option<NarInfo>, Error> {
        let text = match self
            .get(self.endpoint().read(&format!("{hash}.narinfo")))
            .await
        {
            Err(Error::Refused { status: 404, .. }) => return Ok(None),
            answer => answer?,
        };
        let text = String::from_utf8(text).map_err(|error| Error::Foreign(error.to_string()))?;
        NarInfo::parse(&text)
            .map(Some)
            .map_err(|error| Error::Foreign(error.to_string()))
    }

    /// Fetches and unpacks the NAR body behind a narinfo, and compares its hash. It is held in
    /// memory while compressed, so this is for small ones.
    ///
    /// # Errors
    /// As [`Error`] says, when no body came at all.
    pub async fn check_body(&self, info: &NarInfo) -> Result<Body, Error> {
        let Some(url) = self.endpoint().nar(&info.url) else {
            return Ok(Body::Bad("its narinfo names no URL".to_owned()));
        };
        let limit =
            usize::try_from(info.nar_size + info.nar_size / 8 + SLACK).unwrap_or(usize::MAX);
        let packed = match self.fetch(url, limit).await {
            Err(Error::Refused { status: 404, .. }) => {
                return Ok(Body::Bad(
                    "its narinfo is there, but its NAR is not".to_owned(),
                ));
            }
            answer => answer?,
        };
        let (compression, hash, size) = (info.compression.clone(), info.nar_hash, info.nar_size);
        let judged =
            tokio::task::spawn_blocking(move || judge(&packed, &compression, hash, size)).await;
        judged.map_err(|panic| Error::Foreign(panic.to_string()))
    }

    /// The token goes to the server itself alone; a store behind it (S3) is sent to by one
    /// redirect to a signed URL, and gets none.
    async fn fetch(&self, url: Url, limit: usize) -> Result<Vec<u8>, Error> {
        let mut request = self.0.asking.get(url.clone()).timeout(BODY_TIMEOUT);
        if self.endpoint().owns(&url) {
            request = request.headers(self.headers()?);
        }
        let response = request.send().await.map_err(Error::of_request)?;
        let target = response
            .headers()
            .get(LOCATION)
            .and_then(|value| value.to_str().ok());
        let target = target
            .filter(|_| response.status().is_redirection())
            .and_then(|text| url.join(text).ok());
        let Some(target) = target else {
            return answer(response, limit.max(ANSWER_LIMIT), 0).await;
        };
        let request = self.0.asking.get(target).timeout(BODY_TIMEOUT);
        let response = request.send().await.map_err(Error::of_request)?;
        answer(response, limit.max(ANSWER_LIMIT), 0).await
    }
}

fn judge(packed: &[u8], compression: &str, hash: Sha256, size: u64) -> Body {
    if packed.is_empty() {
        return Body::Bad("its NAR is served empty".to_owned());
    }
    let unpacked = match compression {
        "none" | "" => digest(packed, size),
        "zstd" => zstd::stream::read::Decoder::new(packed).and_then(|reader| digest(reader, size)),
        "xz" => digest(liblzma::read::XzDecoder::new(packed), size),
        other => {
            return Body::Unread(format!(
                "its NAR is compressed with `{other}`, which is not unpacked here"
            ));
        }
    };
    match unpacked {
        Err(error) => Body::Bad(format!("its NAR cannot be unpacked ({error})")),
        Ok((_, found)) if found != size => Body::Bad(format!(
            "its NAR has {found} bytes or more instead of {size}"
        )),
        Ok((found, _)) if found != hash => {
            Body::Bad(format!("its NAR's hash is {found} instead of {hash}"))
        }
        Ok(_) => Body::Good,
    }
}

/// Hash and size of what a reader gives, up to one byte more than expected.
fn digest(reader: impl Read, size: u64) -> io::Result<(Sha256, u64)> {
    let mut reader = reader.take(size + 1);
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
                judge(packed, compression, hash, size),
                Body::Good,
                "{compression}"
            );
            assert!(
                matches!(judge(packed, compression, hash, size - 1), Body::Bad(_)),
                "{compression}"
            );
            assert!(matches!(
                judge(&packed[..packed.len() / 2], compression, hash, size),
                Body::Bad(_)
            ));
        }
        assert!(matches!(
            judge(&nar, "none", Sha256([0; 32]), size),
            Body::Bad(_)
        ));
        assert_eq!(
            judge(b"", "zstd", hash, size),
            Body::Bad("its NAR is served empty".to_owned())
        );
        assert!(matches!(judge(b"x", "br", hash, size), Body::Unread(_)));
    }
}
