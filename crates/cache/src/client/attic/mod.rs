//! The client of Attic's protocol: queries for missing paths, uploads, and reading back.
//! It stays on the server that the user named, never decides what is published, and never retries by itself.

mod destination;
mod error;
mod expect_continue;
mod http1;
mod pool;
mod read;
mod send;

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use reqwest::RequestBuilder;
use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderValue};
use serde::{Deserialize, Serialize};
use tokio::sync::Semaphore;
use url::Url;

pub use self::expect_continue::ExpectContinue;
pub use self::pool::Pool;
pub use self::send::{SendNar, StallTimeout, UploadRequest, WholeBody};

use crate::client::destination::{ByteCounter, CacheConfig, Error, Uploaded};
use crate::client::endpoint::Endpoint;
use flywheel_core::secret::Secret;
use flywheel_nix::nar::NarSource;
use flywheel_nix::path_info::PathInfo;
use flywheel_nix::store_path::{PathHash, StorePath};
use flywheel_sys::host::inline_blocking::AdaptiveBlocking;
use flywheel_sys::http::Clients;

/// Hashes in one query. The server's own limits are far above (32,765 on SQLite, 2 MiB of body).
pub(crate) const BATCH: usize = 1000;
/// For every request that carries no NAR.
const API_TIMEOUT: Duration = Duration::from_secs(30);
/// How much of a response is read, in bytes, apart from NARs; the rest is dropped.
const RESPONSE_LIMIT: usize = 4 * 1024 * 1024;
/// Large bodies that are read back at the same time.
const LARGE_BODIES: usize = 4;

/// A client for one Attic cache. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Attic(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    endpoint: Endpoint,
    token: Option<Secret>,
    api: reqwest::Client,
    pool: Arc<Pool>,
    sender: Box<dyn SendNar>,
    /// For bodies, which may take longer than any fixed time.
    streaming: reqwest::Client,
    api_timeout: Duration,
    /// Unpacks small bodies.
    unpacking: AdaptiveBlocking,
    /// The bodies that are unpacked while they come.
    large_bodies: Semaphore,
}

impl Attic {
    /// `token` is sent with every request, where there is one.
    pub fn new(endpoint: Endpoint, token: Option<Secret>, clients: Clients) -> Self {
        let pool = Arc::new(Pool::new(clients.direct));
        let sender = Box::new(ExpectContinue::new(
            Arc::clone(&pool),
            clients.streaming.clone(),
            StallTimeout::default(),
        ));
        let clients = (clients.api, clients.streaming);
        Self::with_sender(endpoint, token, clients, pool, sender, API_TIMEOUT)
    }

    /// As [`Self::new`], with another way to send NARs and another timeout for all other requests. `clients`: for
    /// requests that carry no NAR, and for bodies.
    pub(crate) fn with_sender(
        endpoint: Endpoint,
        token: Option<Secret>,
        (api, streaming): (reqwest::Client, reqwest::Client),
        pool: Arc<Pool>,
        sender: Box<dyn SendNar>,
        api_timeout: Duration,
    ) -> Self {
        Self(Arc::new(Inner {
            endpoint,
            token,
            api,
            pool,
            sender,
            streaming,
            api_timeout,
            unpacking: AdaptiveBlocking::default(),
            large_bodies: Semaphore::new(LARGE_BODIES),
        }))
    }

    pub(crate) fn endpoint(&self) -> &Endpoint {
        &self.0.endpoint
    }

    /// The cache's own description. The server refuses a token that may only push, with 403.
    ///
    /// # Errors
    /// As [`Error`] lists them.
    pub async fn cache_config(&self) -> Result<CacheConfig, Error> {
        let response = self
            .request(self.0.api.get(self.endpoint().config()))
            .await?;
        let raw =
            serde_json::from_slice(&response).map_err(|error| Error::Foreign(error.to_string()))?;
        Ok(CacheConfig::from_json(raw))
    }

    /// Which of these the cache does not have. At most [`BATCH`] of them; an empty query checks whether the token may
    /// push.
    ///
    /// # Errors
    /// As [`Error`] lists them.
    pub(crate) async fn missing_paths(
        &self,
        hashes: &[PathHash],
    ) -> Result<HashSet<PathHash>, Error> {
        #[derive(Serialize)]
        struct Query<'a> {
            cache: &'a str,
            store_path_hashes: &'a [PathHash],
        }
        #[derive(Deserialize)]
        struct MissingPaths {
            missing_paths: HashSet<PathHash>,
        }
        let query = Query {
            cache: self.endpoint().cache.as_str(),
            store_path_hashes: hashes,
        };
        let request = self
            .0
            .api
            .post(self.endpoint().api("get-missing-paths"))
            .json(&query);
        let response = self.request(request).await?;
        let response: MissingPaths =
            serde_json::from_slice(&response).map_err(|error| Error::Foreign(error.to_string()))?;
        Ok(response.missing_paths)
    }

    /// Uploads one path. The caller may repeat it safely.
    ///
    /// # Errors
    /// As [`Error`] lists them.
    pub async fn upload(
        &self,
        info: &PathInfo,
        source: impl Into<NarSource>,
        counter: &ByteCounter,
    ) -> Result<Uploaded, Error> {
        let request = UploadRequest {
            url: self.endpoint().api("upload-path"),
            headers: self.headers()?,
            info: upload_info(self.endpoint().cache.as_str(), info)?,
            source: source.into(),
            hash: info.nar_hash,
            size: info.nar_size,
            counter: counter.clone(),
        };
        self.0.sender.send(request).await
    }

    fn headers(&self) -> Result<HeaderMap, Error> {
        let mut headers = HeaderMap::new();
        if let Some(token) = &self.0.token {
            // This copy of the token is wiped as well.
            let text = zeroize::Zeroizing::new(format!("Bearer {}", token.expose()));
            let mut value = HeaderValue::from_str(&text).map_err(|_| Error::Token)?;
            // Keeps the token out of debug output.
            value.set_sensitive(true);
            headers.insert(AUTHORIZATION, value);
        }
        Ok(headers)
    }

    /// The body of a successful GET request for something small.
    async fn get(&self, url: Url) -> Result<Vec<u8>, Error> {
        match self
            .0
            .pool
            .get(&url, &self.headers()?, RESPONSE_LIMIT, self.0.api_timeout)
            .await?
        {
            // The fast path; the pool leaves proxies and unusual responses to the general client.
            Some(response) if (200..300).contains(&response.status) => Ok(response.body),
            Some(response) => Err(Error::from_response(
                response.status,
                &response.headers,
                &response.body,
                0,
            )),
            None => self.request(self.0.api.get(url)).await,
        }
    }

    /// Sends a request by the general client; gives the body of a successful response.
    async fn request(&self, request: RequestBuilder) -> Result<Vec<u8>, Error> {
        let request = request.headers(self.headers()?).timeout(self.0.api_timeout);
        let response = request.send().await.map_err(Error::from_reqwest)?;
        read_response(response, RESPONSE_LIMIT, 0).await
    }
}

/// Reads a response of at most `limit` bytes and drops the rest. `sent` is the size of the request's body in bytes.
async fn read_response(
    mut response: reqwest::Response,
    limit: usize,
    sent: u64,
) -> Result<Vec<u8>, Error> {
    let (status, headers) = (response.status(), response.headers().clone());
    let mut body = Vec::new();
    let broken = loop {
        match response.chunk().await {
            Ok(Some(chunk)) if body.len() < limit => body.extend_from_slice(&chunk),
            // The end, or the limit: the rest of the response is not read.
            Ok(_) => break None,
            Err(error) => break Some(error),
        }
    };
    if !status.is_success() {
        // The status is informative enough, even when the body was cut off.
        return Err(Error::from_response(status.as_u16(), &headers, &body, sent));
    }
    match broken {
        Some(error) => Err(Error::from_reqwest(error)),
        None => Ok(body),
    }
}

/// The description that accompanies a NAR, as JSON. The server signs the references in the order in which they are
/// sent, and Nix verifies a sorted list: so they are sorted here, whatever the caller has.
fn upload_info(cache: &str, info: &PathInfo) -> Result<String, Error> {
    #[derive(Serialize)]
    struct UploadInfo<'a> {
        cache: &'a str,
        store_path_hash: PathHash,
        store_path: String,
        references: Vec<&'a str>,
        deriver: Option<&'a str>,
        sigs: &'a [String],
        ca: Option<&'a str>,
        nar_hash: String,
        nar_size: u64,
    }
    if info.nar_size == 0 {
        // Attic would take an empty NAR and serve it for ever.
        return Err(Error::Facts(format!(
            "the store has not registered a NAR size for `{}`",
            info.path
        )));
    }
    let mut references: Vec<&str> = info.references.iter().map(StorePath::base_name).collect();
    references.sort_unstable();
    references.dedup();
    let info = UploadInfo {
        cache,
        store_path_hash: info.path.hash(),
        store_path: info.path.to_string(),
        references,
        deriver: info.deriver.as_ref().map(StorePath::base_name),
        sigs: &info.signatures,
        ca: info.ca.as_deref(),
        nar_hash: info.nar_hash.to_string(),
        nar_size: info.nar_size,
    };
    serde_json::to_string(&info).map_err(|error| Error::Facts(error.to_string()))
}

#[cfg(test)]
mod tests;
