//! The requests to a binary cache: narinfos, whose signatures are checked here, and bodies. Redirects are followed,
//! since caches keep their NARs in storages behind them; what comes is judged by its signature, not by where it is.

use std::time::Duration;

use reqwest::header::LOCATION;
use reqwest::{Client, Response, StatusCode};
use tokio::time::{sleep, timeout};
use url::Url;

use crate::bootstrap::closure::{ClosureSource, Error};
use crate::key::PublicKey;
use crate::narinfo::NarInfo;
use crate::store_path::StorePath;
use flywheel_core::retry::Policy;
use flywheel_sys::http::{chain, redact};

/// The first answer has to be there within this time, tries included: there are other sources.
pub(super) const FIRST_CONTACT: Duration = Duration::from_secs(3);
/// Nothing may come for this long.
pub(super) const STALL: Duration = Duration::from_secs(5);
/// Largest narinfo, in bytes: each reference takes some 50.
const INFO_LIMIT: usize = 256 * 1024;
/// So many storages behind a cache.
const REDIRECTS: usize = 5;
/// The tries of each request.
pub(super) const TRIES: Policy = Policy {
    attempts: 3,
    base: Duration::from_millis(300),
    cap: Duration::from_secs(2),
};

/// Why there is no response, or not the whole of it.
#[derive(Debug)]
pub(super) enum Trouble {
    Status(StatusCode),
    Network(String),
    Stalled,
    /// Trying again would not help.
    Refused(String),
}

impl Trouble {
    /// Whether another try may succeed.
    pub(super) fn is_passing(&self) -> bool {
        match self {
            Self::Status(status) => {
                status.is_server_error() || matches!(status.as_u16(), 408 | 425 | 429)
            }
            Self::Network(_) | Self::Stalled => true,
            Self::Refused(_) => false,
        }
    }
}

/// A binary cache.
pub(super) struct Cache {
    client: Client,
    /// With a slash at its end.
    base: Url,
    keys: Vec<PublicKey>,
}

impl Cache {
    pub(super) fn new(client: Client, source: &ClosureSource) -> Self {
        let mut base = source.address.clone();
        // Nix's own settings of a store (`?priority=10`) are none of the server's business.
        base.set_query(None);
        base.set_fragment(None);
        if !base.path().ends_with('/') {
            base.set_path(&format!("{}/", base.path()));
        }
        Self {
            client,
            base,
            keys: source.keys.clone(),
        }
    }

    /// For messages.
    pub(super) fn address(&self) -> String {
        redact(&self.base).trim_end_matches('/').to_owned()
    }

    /// The narinfo that is asked for first, within the time of a first contact.
    pub(super) async fn first_nar_info(&self, path: &StorePath) -> Result<NarInfo, Error> {
        let stalled = Error::Stalled {
            address: self.address(),
            limit: FIRST_CONTACT,
        };
        timeout(FIRST_CONTACT, self.nar_info(path))
            .await
            .unwrap_or(Err(stalled))
    }

    /// The narinfo of a path, with a good signature.
    pub(super) async fn nar_info(&self, path: &StorePath) -> Result<NarInfo, Error> {
        let url = self
            .base
            .join(&format!("{}.narinfo", path.hash()))
            .expect("a hash is a path of a URL");
        let mut tries = 0;
        let text = loop {
            tries += 1;
            let trouble = match self.small_text(&url).await {
                Ok(text) => break text,
                Err(trouble) => trouble,
            };
            match TRIES.wait(tries, None).filter(|_| trouble.is_passing()) {
                Some(wait) => sleep(wait).await,
                None => return Err(self.error(path, trouble)),
            }
        };
        self.judge(path, &text)
    }

    fn judge(&self, path: &StorePath, text: &str) -> Result<NarInfo, Error> {
        let address = self.address();
        let path = path.clone();
        let info = match NarInfo::parse(text) {
            Ok(info) => info,
            Err(source) => {
                return Err(Error::NarInfo {
                    address,
                    path,
                    source,
                });
            }
        };
        if info.path != path {
            let found = info.path;
            return Err(Error::OtherPath {
                address,
                path,
                found,
            });
        }
        if self.keys.iter().any(|key| info.signed_by(key)) {
            return Ok(info);
        }
        let names: Vec<String> = self
            .keys
            .iter()
            .map(|key| format!("`{}`", key.name()))
            .collect();
        let keys = match names.join(", ") {
            names if names.is_empty() => "any key, for none is named".to_owned(),
            names => names,
        };
        Err(Error::Unsigned {
            address,
            path,
            keys,
        })
    }

    /// A response of a few kilobytes.
    async fn small_text(&self, url: &Url) -> Result<String, Trouble> {
        let mut response = self.open(url).await?;
        let mut bytes = Vec::new();
        while let Some(block) = next_block(&mut response).await? {
            bytes.extend_from_slice(&block);
            if bytes.len() > INFO_LIMIT {
                return Err(Trouble::Refused(format!(
                    "a narinfo has more than {INFO_LIMIT} bytes"
                )));
            }
        }
        String::from_utf8(bytes).map_err(|_| Trouble::Refused("a narinfo is no text".to_owned()))
    }

    /// The response to the URL of a NAR, which may be relative.
    pub(super) async fn open_body(&self, url: &str) -> Result<Response, Trouble> {
        match self.base.join(url) {
            Ok(url) => self.open(&url).await,
            Err(_) => Err(Trouble::Refused("a NAR has no usable URL".to_owned())),
        }
    }

    async fn open(&self, url: &Url) -> Result<Response, Trouble> {
        let mut url = url.clone();
        for _ in 0..=REDIRECTS {
            if !matches!(url.scheme(), "http" | "https") {
                let problem = format!("a NAR is at an address of the kind `{}`", url.scheme());
                return Err(Trouble::Refused(problem));
            }
            let response = match timeout(STALL, self.client.get(url.clone()).send()).await {
                Err(_) => return Err(Trouble::Stalled),
                Ok(response) => response.map_err(|error| Trouble::Network(chain(error)))?,
            };
            let status = response.status();
            if status.is_success() {
                return Ok(response);
            }
            let target = response
                .headers()
                .get(LOCATION)
                .and_then(|value| value.to_str().ok())
                .filter(|_| status.is_redirection())
                .and_then(|text| url.join(text).ok());
            match target {
                Some(target) => url = target,
                None => return Err(Trouble::Status(status)),
            }
        }
        Err(Trouble::Refused(format!(
            "it redirects more than {REDIRECTS} times"
        )))
    }

    /// The error of a request for `path`.
    pub(super) fn error(&self, path: &StorePath, trouble: Trouble) -> Error {
        let address = self.address();
        match trouble {
            // As Nix has it: what may not be read is not there.
            Trouble::Status(status) if matches!(status.as_u16(), 401 | 403 | 404 | 410) => {
                Error::Missing {
                    address,
                    path: path.clone(),
                    status: status.as_u16(),
                }
            }
            Trouble::Status(status) => Error::Fetch {
                address,
                problem: format!("HTTP status {}", status.as_u16()),
            },
            Trouble::Network(problem) | Trouble::Refused(problem) => {
                Error::Fetch { address, problem }
            }
            Trouble::Stalled => Error::Stalled {
                address,
                limit: STALL,
            },
        }
    }
}

/// The next bytes of a body.
pub(super) async fn next_block(response: &mut Response) -> Result<Option<bytes::Bytes>, Trouble> {
    match timeout(STALL, response.chunk()).await {
        Err(_) => Err(Trouble::Stalled),
        Ok(block) => block.map_err(|error| Trouble::Network(chain(error))),
    }
}
