//! What every way of sending a NAR needs, and the simplest one: one request with the whole body,
//! exact in length, watched while it moves.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::{BoxFuture, ready};
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use reqwest::header::{CONTENT_LENGTH, CONTENT_TYPE, HeaderMap, HeaderValue};
use serde::Deserialize;
use tokio::time::{Instant, sleep};
use url::Url;

use crate::client::attic::{Error, answer};
use flywheel_nix::hash::Sha256;
use flywheel_nix::nar::NarSource;
use flywheel_sys::http::Layer;

/// Longer descriptions travel in front of the NAR: proxies stop at headers of 4 to 8 KiB.
pub(super) const HEADER_LIMIT: usize = 3500;
/// An answer to an upload is a short JSON.
pub(super) const ANSWER_LIMIT: usize = 64 * 1024;

/// A server that breaks off may have said why: it answers before the body (refused, too large,
/// known already) and closes, and then the error of writing hides the answer. So the second try
/// holds its body back for this long, and listens.
const LISTEN: Duration = Duration::from_secs(1);

/// How long an upload may stand still.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// No byte of the body is taken for this long, or no answer follows the last one.
    pub idle: Duration,
    /// Bytes per second at which the server is expected to compress what it has received; the
    /// wait for its answer grows with it.
    pub rate: u64,
}

impl Default for Patience {
    /// 60 s and 4 MB/s (`attic-protocol`, section 5).
    fn default() -> Self {
        Self {
            idle: Duration::from_secs(60),
            rate: 4_000_000,
        }
    }
}

impl Patience {
    /// Ends when nothing has moved for too long, with the time that was waited.
    pub(super) async fn standstill(self, meter: &Meter, size: u64) -> Duration {
        let (mut seen, mut since) = (0, Instant::now());
        loop {
            let limit = if meter.own() < size {
                self.idle
            } else {
                self.idle + Duration::from_secs(size / self.rate.max(1))
            };
            let left = limit.saturating_sub(since.elapsed());
            if left.is_zero() {
                return limit;
            }
            sleep(left.min(Duration::from_secs(1))).await;
            if meter.own() != seen {
                (seen, since) = (meter.own(), Instant::now());
            }
        }
    }
}

/// Counts the NAR bytes of one upload as they leave, and of all uploads together.
#[derive(Clone, Debug, Default)]
pub struct Meter {
    own: Arc<AtomicU64>,
    all: Arc<AtomicU64>,
}

impl Meter {
    /// A meter for one more upload that counts into the same sum.
    #[must_use]
    pub fn next(&self) -> Self {
        Self {
            own: Arc::default(),
            all: Arc::clone(&self.all),
        }
    }

    /// NAR bytes of this upload so far.
    pub fn own(&self) -> u64 {
        self.own.load(Ordering::Relaxed)
    }

    /// NAR bytes of all uploads so far.
    pub fn all(&self) -> u64 {
        self.all.load(Ordering::Relaxed)
    }

    /// Begins the count of this upload again.
    pub(super) fn forget(&self) {
        self.own.store(0, Ordering::Relaxed);
    }

    /// Counts bytes that have left.
    pub(in crate::client) fn add(&self, bytes: u64) {
        self.own.fetch_add(bytes, Ordering::Relaxed);
        self.all.fetch_add(bytes, Ordering::Relaxed);
    }
}

/// One path on its way.
#[derive(Clone, Debug)]
pub struct Parcel {
    /// Where it goes.
    pub url: Url,
    /// The credential.
    pub headers: HeaderMap,
    /// Its description as JSON.
    pub info: String,
    /// Where its NAR comes from.
    pub source: NarSource,
    /// The NAR's registered hash.
    pub hash: Sha256,
    /// The NAR's registered size in bytes.
    pub size: u64,
    /// Counts what leaves.
    pub meter: Meter,
}

/// What the server did with an upload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Uploaded {
    /// It stored the NAR.
    Stored,
    /// It had the NAR already, from another path or cache.
    Deduplicated,
}

/// A way to send a NAR.
pub trait SendNar: Send + Sync + std::fmt::Debug {
    /// Sends it once.
    fn send(&self, parcel: Parcel) -> BoxFuture<'_, Result<Uploaded, Error>>;
}

/// One request, one body, by the general client: for servers behind a proxy that the environment names.
/// The length is always given: with chunks the server may answer before the last, empty one has
/// come, and close a connection that could have served again.
#[derive(Debug)]
pub struct WholeBody {
    client: reqwest::Client,
    patience: Patience,
}

impl WholeBody {
    /// `client` must not have a read timeout of its own.
    pub fn new(client: reqwest::Client, patience: Patience) -> Self {
        Self { client, patience }
    }

    async fn put(&self, parcel: Parcel) -> Result<Uploaded, Error> {
        let (ended, broke_off) = self.once(parcel.clone(), Duration::ZERO).await;
        if !broke_off || parcel.meter.own() >= parcel.size {
            return ended;
        }
        parcel.meter.forget();
        self.once(parcel, LISTEN).await.0
    }

    /// One request, its body held back for `hold`: how it ended, and whether the connection broke off.
    async fn once(&self, parcel: Parcel, hold: Duration) -> (Result<Uploaded, Error>, bool) {
        let Parcel {
            url,
            mut headers,
            info,
            source,
            hash,
            size,
            meter,
        } = parcel;
        let header = HeaderValue::from_str(&info)
            .ok()
            .filter(|_| info.len() <= HEADER_LIMIT);
        let preamble = match header {
            Some(value) => {
                headers.insert("x-attic-nar-info", value);
                Bytes::new()
            }
            None => {
                headers.insert(
                    "x-attic-nar-info-preamble-size",
                    HeaderValue::from(info.len()),
                );
                Bytes::from(info)
            }
        };
        headers.insert(
            CONTENT_LENGTH,
            HeaderValue::from(preamble.len() as u64 + size),
        );
        headers.insert(
            CONTENT_TYPE,
            HeaderValue::from_static("application/x-nix-nar"),
        );
        let nar = source.stream(hash, size);
        let fault = nar.fault();
        let counted = meter.clone();
        let nar = nar.inspect_ok(move |block| counted.add(block.len() as u64));
        let held = stream::once(sleep(hold)).filter_map(|()| ready(None));
        let body = held
            .chain(stream::iter((!preamble.is_empty()).then_some(Ok(preamble))))
            .chain(nar);
        let request = self
            .client
            .put(url)
            .headers(headers)
            .body(reqwest::Body::wrap_stream(body))
            .send();
        let exchange = async {
            let response = request.await.map_err(Error::of_request)?;
            answer(response, ANSWER_LIMIT, size).await
        };
        let ended = tokio::select! {
            ended = exchange => ended,
            limit = self.patience.standstill(&meter, size) => return (Err(Error::timed_out(limit)), false),
        };
        match (ended, fault.take()) {
            (_, Some(error)) => (Err(error.into()), false),
            (Ok(text), None) => (Ok(read_kind(&text)), false),
            (Err(error), None) => {
                let broke_off = matches!(
                    error,
                    Error::Unreachable {
                        layer: Layer::Http,
                        ..
                    }
                );
                (Err(error), broke_off)
            }
        }
    }
}

impl SendNar for WholeBody {
    fn send(&self, parcel: Parcel) -> BoxFuture<'_, Result<Uploaded, Error>> {
        Box::pin(self.put(parcel))
    }
}

/// A success whose text cannot be read is a success, and kinds we do not know are uploads.
pub(super) fn read_kind(text: &[u8]) -> Uploaded {
    #[derive(Deserialize)]
    struct Answer {
        kind: String,
    }
    match serde_json::from_slice::<Answer>(text) {
        Ok(answer) if answer.kind == "Deduplicated" => Uploaded::Deduplicated,
        _ => Uploaded::Stored,
    }
}
