//! The keys that an issuer signs with: a set that it publishes and changes without notice. It is fetched from the
//! address that the issuer's own description names, or read from a file where servers have no internet.

use std::collections::HashMap;
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use reqwest::Client;
use ring::signature::{RSA_PKCS1_2048_8192_SHA256, RsaPublicKeyComponents};
use serde::Deserialize;
use thiserror::Error;
use tokio::sync::Mutex;
use tokio::time::timeout;
use url::Url;

use flywheel_core::text::one_line;

/// An unknown key has the set fetched anew, but no more often than this: whoever makes up names of keys must not have
/// us ask the issuer without end.
const FETCH_INTERVAL: Duration = Duration::from_secs(60);
/// A set of this age is fetched anew in passing.
const FRESH_FOR: Duration = Duration::from_secs(60 * 60);
/// An issuer that cannot be reached is believed by its last set for this long.
const KEPT_FOR: Duration = Duration::from_secs(24 * 60 * 60);
/// Each of the two requests.
const REQUEST_LIMIT: Duration = Duration::from_secs(5);
/// A set has some kilobytes.
const SIZE_LIMIT: usize = 256 * 1024;
const KEYS_LIMIT: usize = 64;

/// Why there is no key.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum KeysError {
    /// The issuer has no key of that name.
    #[error("it has no such key")]
    Unknown,
    #[error("{0} could not be fetched: {1}")]
    Fetch(String, String),
    #[error("{0} is not usable: {1}")]
    Malformed(String, String),
}

/// A public RSA key.
#[derive(Debug)]
pub(super) struct Key(RsaPublicKeyComponents<Vec<u8>>);

impl Key {
    /// Whether this is the key's signature, by RSASSA-PKCS1-v1_5 with SHA-256 and at least 2,048 bits.
    pub(super) fn has_signed(&self, signed: &[u8], signature: &[u8]) -> bool {
        self.0
            .verify(&RSA_PKCS1_2048_8192_SHA256, signed, signature)
            .is_ok()
    }
}

type Keys = HashMap<String, Arc<Key>>;

/// Where an issuer's keys come from.
#[derive(Clone, Debug)]
pub enum KeySource {
    /// From the issuer, whose description is asked for their address. `client` follows no redirects.
    Issuer { url: String, client: Client },
    /// A file with the set, which is read anew as often.
    File(PathBuf),
}

/// An issuer's keys, as they were when they were last fetched.
#[derive(Debug)]
pub struct IssuerKeys {
    source: KeySource,
    /// Held while they are fetched, so that one request serves all who wait.
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    keys: Keys,
    fetched: Option<SystemTime>,
    tried: Option<SystemTime>,
    problem: Option<KeysError>,
}

impl State {
    fn is_older(time: Option<SystemTime>, age: Duration, now: SystemTime) -> bool {
        // A clock that was set back makes a set old, rather than young for ever.
        time.is_none_or(|time| now.duration_since(time).is_ok_and(|old| old >= age) || time > now)
    }
}

impl IssuerKeys {
    pub fn new(source: KeySource) -> Self {
        Self {
            source,
            state: Mutex::default(),
        }
    }

    /// The key of that name.
    ///
    /// # Errors
    /// When the issuer has none of that name, or has not been reached for too long.
    pub(super) async fn find(&self, name: &str, now: SystemTime) -> Result<Arc<Key>, KeysError> {
        let mut state = self.state.lock().await;
        let is_due =
            State::is_older(state.fetched, FRESH_FOR, now) || !state.keys.contains_key(name);
        if is_due && State::is_older(state.tried, FETCH_INTERVAL, now) {
            state.tried = Some(now);
            match self.fetch().await {
                Ok(keys) => {
                    *state = State {
                        keys,
                        fetched: Some(now),
                        tried: Some(now),
                        problem: None,
                    };
                }
                Err(problem) => state.problem = Some(problem),
            }
        }
        let problem = || {
            let unreached = KeysError::Fetch("the set".to_owned(), "it is too old".to_owned());
            state.problem.clone().unwrap_or(unreached)
        };
        if State::is_older(state.fetched, KEPT_FOR, now) {
            return Err(problem());
        }
        match (state.keys.get(name), &state.problem) {
            (Some(key), _) => Ok(Arc::clone(key)),
            (None, None) => Err(KeysError::Unknown),
            // It may be one of those that could not be fetched.
            (None, Some(problem)) => Err(problem.clone()),
        }
    }

    async fn fetch(&self) -> Result<Keys, KeysError> {
        match &self.source {
            KeySource::File(file) => {
                let shown = file.display().to_string();
                let length = fs::metadata(file).map(|facts| facts.len());
                if length.is_ok_and(|length| length > SIZE_LIMIT as u64) {
                    return Err(KeysError::Malformed(shown, "it is too large".into()));
                }
                let read = fs::read(file);
                let bytes =
                    read.map_err(|error| KeysError::Fetch(shown.clone(), error.to_string()))?;
                parse(&bytes, &shown)
            }
            KeySource::Issuer { url, client } => fetch(url, client).await,
        }
    }
}

/// The part of an issuer's description that matters (OpenID Connect Discovery 1.0).
#[derive(Deserialize)]
struct Description {
    issuer: String,
    jwks_uri: String,
}

async fn fetch(issuer: &str, client: &Client) -> Result<Keys, KeysError> {
    let place = format!("{issuer}/.well-known/openid-configuration");
    let malformed = |problem: &str| KeysError::Malformed(place.clone(), problem.to_owned());
    let base: Url = place.parse().map_err(|_| malformed("it is no address"))?;
    let described: Description = serde_json::from_slice(&get(client, &base).await?)
        .map_err(|error| malformed(&error.to_string()))?;
    if described.issuer != issuer {
        return Err(malformed("it is another issuer's"));
    }
    let address: Url = described
        .jwks_uri
        .parse()
        .map_err(|_| malformed("its `jwks_uri` is no address"))?;
    // Whoever can write the description must not have the keys come from elsewhere, nor without TLS.
    if address.origin() != base.origin() {
        return Err(malformed("its `jwks_uri` is on another host"));
    }
    parse(&get(client, &address).await?, address.as_str())
}

async fn get(client: &Client, address: &Url) -> Result<Vec<u8>, KeysError> {
    let failed = |problem: String| KeysError::Fetch(address.to_string(), problem);
    let reading = async {
        let sent = client.get(address.clone()).send().await;
        let mut response = sent.map_err(|error| failed(error.to_string()))?;
        if !response.status().is_success() {
            return Err(failed(format!(
                "HTTP status {}",
                response.status().as_u16()
            )));
        }
        let mut bytes = Vec::new();
        while let Some(block) = response
            .chunk()
            .await
            .map_err(|error| failed(error.to_string()))?
        {
            bytes.extend_from_slice(&block);
            if bytes.len() > SIZE_LIMIT {
                return Err(failed(format!("it has more than {SIZE_LIMIT} bytes")));
            }
        }
        Ok(bytes)
    };
    timeout(REQUEST_LIMIT, reading)
        .await
        .unwrap_or_else(|_| Err(failed("no answer in time".into())))
}

/// A set of keys (RFC 7517).
#[derive(Deserialize)]
struct Set {
    keys: Vec<Entry>,
}

#[derive(Deserialize)]
struct Entry {
    kty: String,
    kid: Option<String>,
    #[serde(rename = "use")]
    purpose: Option<String>,
    alg: Option<String>,
    n: Option<String>,
    e: Option<String>,
}

/// Keys of other kinds and for other purposes are passed over.
fn parse(bytes: &[u8], place: &str) -> Result<Keys, KeysError> {
    let malformed = |problem: String| KeysError::Malformed(place.to_owned(), problem);
    let set: Set = serde_json::from_slice(bytes)
        .map_err(|error| malformed(one_line(&error.to_string(), 120)))?;
    if set.keys.len() > KEYS_LIMIT {
        return Err(malformed(format!("it has more than {KEYS_LIMIT} keys")));
    }
    let mut keys = Keys::new();
    for entry in set.keys {
        let is_usable = entry.kty == "RSA"
            && entry
                .purpose
                .as_deref()
                .is_none_or(|purpose| purpose == "sig")
            && entry.alg.as_deref().is_none_or(|alg| alg == "RS256");
        let (true, Some(name), Some(n), Some(e)) = (is_usable, entry.kid, entry.n, entry.e) else {
            continue;
        };
        let decode = |text: &str| URL_SAFE_NO_PAD.decode(text.trim_end_matches('='));
        let (Ok(n), Ok(e)) = (decode(&n), decode(&e)) else {
            return Err(malformed(format!(
                "key `{}` is no number",
                one_line(&name, 60)
            )));
        };
        let key = Arc::new(Key(RsaPublicKeyComponents { n, e }));
        // Of two with one name it would not be known which one signs.
        if keys.insert(name.clone(), key).is_some() {
            return Err(malformed(format!(
                "key `{}` is there twice",
                one_line(&name, 60)
            )));
        }
    }
    if keys.is_empty() {
        return Err(malformed("it has no key that signs by RS256".into()));
    }
    Ok(keys)
}
