//! The client of Attic's protocol: asking what is missing, uploading, reading back.
//! Stays on the server the user named; never decides what is published, and never tries twice by itself.

mod config;
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
use url::Url;

pub use self::config::CacheConfig;
pub use self::error::{Action, Error};
pub use self::expect_continue::AskFirst;
pub use self::pool::Lines;
pub use self::read::Body;
pub use self::send::{Meter, Parcel, Patience, SendNar, Uploaded, WholeBody};

use crate::client::endpoint::Endpoint;
use flywheel_core::secret::Secret;
use flywheel_nix::nar::NarSource;
use flywheel_nix::path_info::PathInfo;
use flywheel_nix::store_path::{PathHash, StorePath};
use flywheel_sys::http::Clients;

/// Hashes in one question. The server's own limits are far above (32,765 on SQLite, 2 MiB of body).
pub const BATCH: usize = 1000;
/// A question is answered within this time or not at all.
const ASK_TIMEOUT: Duration = Duration::from_secs(30);
/// More than this is read of no answer but a NAR.
const ANSWER_LIMIT: usize = 4 * 1024 * 1024;

/// An Attic cache to talk to. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Attic(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    endpoint: Endpoint,
    token: Option<Secret>,
    asking: reqwest::Client,
    lines: Arc<Lines>,
    sender: Box<dyn SendNar>,
    ask_timeout: Duration,
}

impl Attic {
    /// A cache, and the token by which we may use it.
    pub fn new(endpoint: Endpoint, token: Option<Secret>, clients: Clients) -> Self {
        let lines = Arc::new(Lines::new(clients.direct));
        let sender = Box::new(AskFirst::new(
            Arc::clone(&lines),
            clients.sending,
            Patience::default(),
        ));
        Self::with_sender(endpoint, token, clients.asking, lines, sender, ASK_TIMEOUT)
    }

    /// The same with another way of sending NARs, and another patience with questions.
    pub fn with_sender(
        endpoint: Endpoint,
        token: Option<Secret>,
        asking: reqwest::Client,
        lines: Arc<Lines>,
        sender: Box<dyn SendNar>,
        ask_timeout: Duration,
    ) -> Self {
        Self(Arc::new(Inner {
            endpoint,
            token,
            asking,
            lines,
            sender,
            ask_timeout,
        }))
    }

    /// Where it is.
    pub fn endpoint(&self) -> &Endpoint {
        &self.0.endpoint
    }

    /// What the cache says of itself. A token that may only push is refused here with 403.
    ///
    /// # Errors
    /// As [`Error`] says.
    pub async fn cache_config(&self) -> Result<CacheConfig, Error> {
        let answer = self
            .ask(self.0.asking.get(self.endpoint().config()))
            .await?;
        let raw =
            serde_json::from_slice(&answer).map_err(|error| Error::Foreign(error.to_string()))?;
        Ok(CacheConfig::from_json(raw))
    }

    /// Which of these the cache does not have: at most [`BATCH`] in one question. None at all is a
    /// good question too: it tells whether we may push.
    ///
    /// # Errors
    /// As [`Error`] says.
    pub async fn missing_paths(&self, hashes: &[PathHash]) -> Result<HashSet<PathHash>, Error> {
        #[derive(Serialize)]
        struct Question<'a> {
            cache: &'a str,
            store_path_hashes: &'a [PathHash],
        }
        #[derive(Deserialize)]
        struct Answer {
            missing_paths: HashSet<PathHash>,
        }
        let question = Question {
            cache: self.endpoint().cache.as_str(),
            store_path_hashes: hashes,
        };
        let request = self
            .0
            .asking
            .post(self.endpoint().api("get-missing-paths"))
            .json(&question);
        let answer = self.ask(request).await?;
        let answer: Answer =
            serde_json::from_slice(&answer).map_err(|error| Error::Foreign(error.to_string()))?;
        Ok(answer.missing_paths)
    }

    /// Sends one path; once. It is safe to be repeated.
    ///
    /// # Errors
    /// As [`Error`] says.
    pub async fn upload(
        &self,
        info: &PathInfo,
        source: impl Into<NarSource>,
        meter: &Meter,
    ) -> Result<Uploaded, Error> {
        let parcel = Parcel {
            url: self.endpoint().api("upload-path"),
            headers: self.headers()?,
            info: upload_info(self.endpoint().cache.as_str(), info)?,
            source: source.into(),
            hash: info.nar_hash,
            size: info.nar_size,
            meter: meter.clone(),
        };
        self.0.sender.send(parcel).await
    }

    fn headers(&self) -> Result<HeaderMap, Error> {
        let mut headers = HeaderMap::new();
        if let Some(token) = &self.0.token {
            let text = zeroize::Zeroizing::new(format!("Bearer {}", token.expose()));
            let mut value = HeaderValue::from_str(&text).map_err(|_| Error::Token)?;
            value.set_sensitive(true);
            headers.insert(AUTHORIZATION, value);
        }
        Ok(headers)
    }

    /// Something small and its whole, successful text.
    async fn get(&self, url: Url) -> Result<Vec<u8>, Error> {
        match self
            .0
            .lines
            .get(&url, &self.headers()?, ANSWER_LIMIT, self.0.ask_timeout)
            .await?
        {
            Some(answer) if (200..300).contains(&answer.status) => Ok(answer.body),
            Some(answer) => Err(Error::of_answer(
                answer.status,
                &answer.headers,
                &answer.body,
                0,
            )),
            None => self.ask(self.0.asking.get(url)).await,
        }
    }

    /// A question and its whole, successful answer.
    async fn ask(&self, request: RequestBuilder) -> Result<Vec<u8>, Error> {
        let request = request.headers(self.headers()?).timeout(self.0.ask_timeout);
        let response = request.send().await.map_err(Error::of_request)?;
        answer(response, ANSWER_LIMIT, 0).await
    }
}

/// Reads an answer of at most `limit` bytes; more is cut off. `sent` is the size of what was sent.
async fn answer(
    mut response: reqwest::Response,
    limit: usize,
    sent: u64,
) -> Result<Vec<u8>, Error> {
    let (status, headers) = (response.status(), response.headers().clone());
    let mut body = Vec::new();
    let broken = loop {
        match response.chunk().await {
            Ok(Some(chunk)) if body.len() < limit => body.extend_from_slice(&chunk),
            Ok(_) => break None,
            Err(error) => break Some(error),
        }
    };
    if !status.is_success() {
        // The status says enough, even when the text behind it was cut.
        return Err(Error::of_answer(status.as_u16(), &headers, &body, sent));
    }
    match broken {
        Some(error) => Err(Error::of_request(error)),
        None => Ok(body),
    }
}

/// What goes with a NAR. The server signs the references as they are sent, and Nix verifies a
/// sorted list: so they are sorted here, whatever the caller has.
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
