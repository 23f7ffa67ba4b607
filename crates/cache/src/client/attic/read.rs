//! Reads back what a cache serves: narinfos, and the bodies of small NARs.

use std::io::{self, Read};
use std::time::Duration;

use reqwest::header::LOCATION;
use sha2::{Digest as _, Sha256 as Hasher};
use url::Url;

use crate::client::attic::{Attic, RESPONSE_LIMIT, read_response};
use crate::client::destination::{BodyCheck, Error};
use flywheel_nix::hash::Sha256;
use flywheel_nix::narinfo::NarInfo;
use flywheel_nix::store_path::PathHash;

/// How many bytes a compressed NAR may exceed the NAR by, besides an eighth: incompressible data grows a little.
const SLACK: u64 = 64 * 1024;
/// Enough for the small NARs that are sampled.
const BODY_TIMEOUT: Duration = Duration::from_secs(60);

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

    /// Fetches and unpacks the NAR body behind a narinfo, and compares its hash. The compressed body is held in
    /// memory, so this is for small ones.
    ///
    /// # Errors
    /// As [`Error`] lists them, when no body came at all.
    pub async fn check_body(&self, info: &NarInfo) -> Result<BodyCheck, Error> {
        let Some(url) = self.endpoint().nar(&info.url) else {
            return Ok(BodyCheck::Bad("its narinfo names no URL".to_owned()));
        };
        let limit =
            usize::try_from(info.nar_size + info.nar_size / 8 + SLACK).unwrap_or(usize::MAX);
        let packed = match self.fetch(url, limit).await {
            Err(Error::Refused { status: 404, .. }) => {
                return Ok(BodyCheck::Bad(
                    "its narinfo is there, but its NAR is not".to_owned(),
                ));
            }
            answer => answer?,
        };
        let (compression, hash, size) = (info.compression.clone(), info.nar_hash, info.nar_size);
        // Unpacking takes processor time, which would stop the runtime's other tasks.
        let judged =
            tokio::task::spawn_blocking(move || judge(&packed, &compression, hash, size)).await;
        judged.map_err(|panic| Error::Foreign(panic.to_string()))
    }

    /// Follows one redirect, to the signed URL of a storage behind the server (S3). The token is sent to the server
    /// alone.
    async fn fetch(&self, url: Url, limit: usize) -> Result<Vec<u8>, Error> {
        let mut request = self.0.api.get(url.clone()).timeout(BODY_TIMEOUT);
        if self.endpoint().owns(&url) {
            request = request.headers(self.headers()?);
        }
        let response = request.send().await.map_err(Error::from_reqwest)?;
        let target = response
            .headers()
            .get(LOCATION)
            .and_then(|value| value.to_str().ok());
        let target = target
            .filter(|_| response.status().is_redirection())
            .and_then(|text| url.join(text).ok());
        let Some(target) = target else {
            return read_response(response, limit.max(RESPONSE_LIMIT), 0).await;
        };
        let request = self.0.api.get(target).timeout(BODY_TIMEOUT);
        let response = request.send().await.map_err(Error::from_reqwest)?;
        read_response(response, limit.max(RESPONSE_LIMIT), 0).await
    }
}

fn judge(packed: &[u8], compression: &str, hash: Sha256, size: u64) -> BodyCheck {
    if packed.is_empty() {
        return BodyCheck::Bad("its NAR is served empty".to_owned());
    }
    let unpacked = match compression {
        "none" | "" => digest(packed, size),
        "zstd" => zstd::stream::read::Decoder::new(packed).and_then(|reader| digest(reader, size)),
        "xz" => digest(liblzma::read::XzDecoder::new(packed), size),
        other => {
            return BodyCheck::Unsupported(format!(
                "its NAR is compressed with `{other}`, which is not unpacked here"
            ));
        }
    };
    match unpacked {
        Err(error) => BodyCheck::Bad(format!("its NAR cannot be unpacked ({error})")),
        Ok((_, found)) if found != size => BodyCheck::Bad(format!(
            "its NAR has {found} bytes or more instead of {size}"
        )),
        Ok((found, _)) if found != hash => {
            BodyCheck::Bad(format!("its NAR's hash is {found} instead of {hash}"))
        }
        Ok(_) => BodyCheck::Good,
    }
}

/// The hash and the size of a reader's bytes. It reads at most one byte more than expected, which is enough to see that
/// the size is wrong.
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
                BodyCheck::Good,
                "{compression}"
            );
            assert!(
                matches!(
                    judge(packed, compression, hash, size - 1),
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
            judge(&nar, "none", Sha256([0; 32]), size),
            BodyCheck::Bad(_)
        ));
        assert_eq!(
            judge(b"", "zstd", hash, size),
            BodyCheck::Bad("its NAR is served empty".to_owned())
        );
        assert!(matches!(
            judge(b"x", "br", hash, size),
            BodyCheck::Unsupported(_)
        ));
    }
}
