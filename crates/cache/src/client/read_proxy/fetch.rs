//! One read of the cache behind the proxy, tried again until it succeeds or the job has waited enough for it. A body that
//! breaks off is taken up where it ended.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::stream::{Stream, try_unfold};
use reqwest::header::{
    AUTHORIZATION, CONTENT_RANGE, HeaderMap, HeaderValue, IF_RANGE, LOCATION, RANGE,
};
use reqwest::{Method, Response, StatusCode};
use tokio::time::sleep;
use url::Url;
use zeroize::Zeroizing;

use super::Shared;
use super::health::{Ended, Patience, Progress};
use crate::client::destination::{Action, Error};
use flywheel_core::retry::Policy;
use flywheel_sys::http;

/// The tries of one read, if they fail at once.
const TRIES: Policy = Policy {
    attempts: 5,
    base: Duration::from_secs(1),
    cap: Duration::from_secs(10),
};
/// A try without a byte for this long is repeated on another connection: the first one may be dead.
const TRY_LIMIT: Duration = Duration::from_secs(15);
/// So much of a body is read before anything is answered, so that Nix sees nothing of a small one that breaks off.
const FIRST_PART: usize = 256 * 1024;
/// A cache that keeps its NARs elsewhere redirects once.
const REDIRECTS: usize = 4;

/// The cache's answer: whole, or with the rest of a large body still to be read.
pub(super) struct Found {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    pub(super) first: Bytes,
    pub(super) rest: Option<Rest>,
}

/// What is left of a body.
pub(super) struct Rest {
    response: Option<Response>,
    url: Url,
    /// The version that the body belongs to.
    etag: Option<HeaderValue>,
    /// How much has been passed on.
    offset: u64,
    attempt: u32,
    progress: Progress,
}

/// Why a try failed.
enum Failure {
    /// By chance: it may succeed a second time.
    Chance(String, Option<Duration>),
    Ended(Ended),
}

impl From<Ended> for Failure {
    fn from(ended: Ended) -> Self {
        Self::Ended(ended)
    }
}

/// What follows from a failed try.
enum Next {
    Again,
    /// The read has failed, for this reason.
    Fail(String),
}

impl Shared {
    /// Reads `url`. `None` if the cache does not give it in the time that it has.
    pub(super) async fn read(&self, method: &Method, url: &Url) -> Option<Found> {
        let mut patience = Patience::new(&self.health);
        let mut attempt = 0;
        loop {
            attempt += 1;
            let failure = match self.try_once(method, url, &mut patience, attempt).await {
                Ok(found) => {
                    self.health.on_success();
                    return Some(found);
                }
                Err(failure) => failure,
            };
            if let Next::Fail(why) = next(failure, attempt, &mut patience).await {
                self.fail(url, patience.progress.waited, &why);
                return None;
            }
            // It is lost, whatever becomes of the next try.
            patience.count_try();
        }
    }

    async fn try_once(
        &self,
        method: &Method,
        url: &Url,
        patience: &mut Patience<'_>,
        attempt: u32,
    ) -> Result<Found, Failure> {
        let mut response = self.open(method, url, HeaderMap::new(), patience).await?;
        patience.begin_at(0);
        let (status, headers) = (response.status(), response.headers().clone());
        if !status.is_success() {
            return Ok(Found {
                // Nix takes some other refusals for reasons to end the build.
                status: match status.as_u16() {
                    401 | 403 | 410 => status,
                    _ => StatusCode::NOT_FOUND,
                },
                headers: HeaderMap::new(),
                first: Bytes::new(),
                rest: None,
            });
        }
        let mut first = BytesMut::new();
        while method == Method::GET && first.len() < FIRST_PART {
            match chunk(&mut response, patience).await? {
                Some(bytes) => first.extend_from_slice(&bytes),
                None => {
                    return Ok(Found {
                        status,
                        headers,
                        first: first.freeze(),
                        rest: None,
                    });
                }
            }
        }
        let rest = (method == Method::GET).then(|| Rest {
            url: url.clone(),
            etag: headers.get("etag").cloned(),
            offset: first.len() as u64,
            attempt,
            progress: patience.progress,
            response: Some(response),
        });
        Ok(Found {
            status,
            headers,
            first: first.freeze(),
            rest,
        })
    }

    /// Sends the request, and follows redirects. An answer that passes is a failure.
    async fn open(
        &self,
        method: &Method,
        url: &Url,
        headers: HeaderMap,
        patience: &mut Patience<'_>,
    ) -> Result<Response, Failure> {
        let mut url = url.clone();
        for _ in 0..=REDIRECTS {
            let request = self.client.request(method.clone(), url.clone());
            let request = request.headers(self.with_token(&url, headers.clone()));
            let response = patience
                .wait(TRY_LIMIT, request.send())
                .await?
                .map_err(|error| Failure::Chance(http::chain(error), None))?;
            let status = response.status();
            let target = response
                .headers()
                .get(LOCATION)
                .filter(|_| status.is_redirection())
                .and_then(|target| url.join(target.to_str().ok()?).ok())
                // As Nix does, a redirect from an encrypted to an unencrypted address is not followed.
                .filter(|target| target.scheme() == "https" || target.scheme() == url.scheme());
            if let Some(target) = target {
                url = target;
                continue;
            }
            if matches!(status.as_u16(), 408 | 425 | 429 | 500..) {
                let error = Error::from_response(status.as_u16(), response.headers(), b"", 0);
                let after = match error.action() {
                    Action::Retry { after, .. } => after,
                    _ => None,
                };
                return Err(Failure::Chance(format!("it answered {status}"), after));
            }
            return Ok(response);
        }
        Err(Failure::Chance("it redirects too often".to_owned(), None))
    }

    /// Adds the token for the cache's own host, in the form in which Nix sends it.
    fn with_token(&self, url: &Url, mut headers: HeaderMap) -> HeaderMap {
        let own = url.origin() == self.upstream.base.origin();
        if let Some(token) = self.upstream.token.as_ref().filter(|_| own) {
            let text = Zeroizing::new(format!("Basic {}", token.basic("attic").expose()));
            if let Ok(mut value) = HeaderValue::from_str(&text) {
                // Keeps the token out of debug output.
                value.set_sensitive(true);
                headers.insert(AUTHORIZATION, value);
            }
        }
        headers
    }

    /// The rest of a body as a stream. It ends with an error if the cache does not give all of it.
    pub(super) fn stream(
        self: &Arc<Self>,
        rest: Rest,
    ) -> impl Stream<Item = io::Result<Bytes>> + Send + use<> {
        let shared = Arc::clone(self);
        try_unfold((shared, rest), async |(shared, mut rest)| {
            let mut patience = Patience::resume(&shared.health, rest.progress);
            loop {
                let failure = match shared.more(&mut rest, &mut patience).await {
                    Ok(Some(bytes)) => {
                        rest.offset += bytes.len() as u64;
                        rest.attempt = 0;
                        rest.progress = patience.progress;
                        return Ok(Some((bytes, (shared.clone(), rest))));
                    }
                    Ok(None) => return Ok(None),
                    Err(failure) => failure,
                };
                rest.response = None;
                rest.attempt += 1;
                if let Next::Fail(why) = next(failure, rest.attempt, &mut patience).await {
                    shared.fail(&rest.url, patience.progress.waited, &why);
                    return Err(io::Error::other(why));
                }
                patience.count_try();
            }
        })
    }

    /// The next piece of a body, which is asked for again from where it broke off.
    async fn more(
        &self,
        rest: &mut Rest,
        patience: &mut Patience<'_>,
    ) -> Result<Option<Bytes>, Failure> {
        if rest.response.is_none() {
            let (response, first) = self.reopen(rest, patience).await?;
            rest.response = Some(response);
            if !first.is_empty() {
                return Ok(Some(first));
            }
        }
        match &mut rest.response {
            Some(response) => chunk(response, patience).await,
            None => Ok(None),
        }
    }

    /// Opens a body at the place where it broke off; returns what of it has come already, too.
    async fn reopen(
        &self,
        rest: &Rest,
        patience: &mut Patience<'_>,
    ) -> Result<(Response, Bytes), Failure> {
        let (offset, etag) = (rest.offset, rest.etag.as_ref());
        let changed = || Failure::Chance("it serves another body now".to_owned(), None);
        let mut headers = HeaderMap::new();
        let range = HeaderValue::try_from(format!("bytes={offset}-"));
        headers.insert(RANGE, range.expect("digits"));
        // A weak tag does not stand for the same bytes (RFC 9110, 13.1.5).
        let strong = etag.filter(|etag| !etag.as_bytes().starts_with(b"W/"));
        if let Some(etag) = strong {
            headers.insert(IF_RANGE, etag.clone());
        }
        let mut response = self
            .open(&Method::GET, &rest.url, headers, patience)
            .await?;
        match response.status() {
            StatusCode::PARTIAL_CONTENT => {
                patience.begin_at(offset);
                let begins = format!("bytes {offset}-");
                let range = response.headers().get(CONTENT_RANGE);
                let fits =
                    range.is_some_and(|range| range.as_bytes().starts_with(begins.as_bytes()));
                fits.then_some((response, Bytes::new())).ok_or_else(changed)
            }
            // It does not know ranges, so that the first part comes again.
            StatusCode::OK if response.headers().get("etag") == etag => {
                patience.begin_at(0);
                let mut skip = offset;
                let mut bytes = Bytes::new();
                while skip > 0 {
                    bytes = chunk(&mut response, patience).await?.ok_or_else(changed)?;
                    let seen = skip.min(bytes.len() as u64);
                    skip -= seen;
                    bytes = bytes.slice(usize::try_from(seen).unwrap_or(bytes.len())..);
                }
                Ok((response, bytes))
            }
            _ => Err(changed()),
        }
    }

    /// A read has failed for good.
    fn fail(&self, url: &Url, waited: Duration, why: &str) {
        self.note_failed(url);
        if let Some(reason) = self.health.on_failure(waited, why) {
            self.report_given_up(&reason);
        }
    }
}

async fn chunk(
    response: &mut Response,
    patience: &mut Patience<'_>,
) -> Result<Option<Bytes>, Failure> {
    let bytes = patience
        .wait(TRY_LIMIT, response.chunk())
        .await?
        .map_err(|error| Failure::Chance(http::chain(error), None))?;
    if let Some(bytes) = &bytes {
        patience.on_bytes(bytes.len());
    }
    Ok(bytes)
}

/// Waits before the next try, if there is one.
async fn next(failure: Failure, attempt: u32, patience: &mut Patience<'_>) -> Next {
    let silent = || {
        format!(
            "no answer for {:.0} s",
            patience.progress.waited.as_secs_f64()
        )
    };
    let (why, after) = match failure {
        // The time was spent by waiting; another pause would only add to it.
        Failure::Ended(Ended::Slow) if attempt < TRIES.attempts => return Next::Again,
        Failure::Ended(Ended::GivenUp) => return Next::Fail("the cache was given up".to_owned()),
        Failure::Ended(_) => return Next::Fail(silent()),
        Failure::Chance(why, after) => (why, after),
    };
    let Some(pause) = TRIES.wait(attempt, after) else {
        return Next::Fail(why);
    };
    match patience.wait(pause + TRY_LIMIT, sleep(pause)).await {
        Ok(()) => Next::Again,
        Err(_) => Next::Fail(why),
    }
}
