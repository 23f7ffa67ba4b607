//! Identity tokens of CI jobs (OpenID Connect), by which a server knows who asks: the issuer signs which repository,
//! event and ref a job runs for, and the job cannot change that. This module verifies them; what an identity may do is
//! for the trust gate. Nothing is taken from a token before its signature is good, but the names of its issuer and key,
//! which are looked up among those that were configured.
//!
//! RFC 7515 to 7519; GitHub's "OpenID Connect reference" and GitLab's "ID token authentication" (2026).

pub mod claims;
mod compact;
pub mod keys;
pub mod replay;

use std::time::{Duration, SystemTime};

use thiserror::Error;

use self::claims::{ClaimError, Identity};
use self::compact::{Compact, CompactError};
use self::keys::{IssuerKeys, KeysError};
use self::replay::UsedTokens;
use flywheel_core::text::one_line;

/// Clocks may differ so much: GitHub's runs a few seconds ahead of many servers.
pub const LEEWAY: Duration = Duration::from_secs(60);
/// So much of a foreign value is shown.
const SHOWN: usize = 120;

/// The CI that issues the tokens. It decides which names the claims have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Provider {
    GitHub,
    GitLab,
}

impl Provider {
    /// The longest life that a token of this provider may have.
    fn longest_life(self) -> Duration {
        match self {
            // Five minutes in all that were seen.
            Self::GitHub => Duration::from_secs(15 * 60),
            // As long as the job may take.
            Self::GitLab => Duration::from_secs(24 * 60 * 60),
        }
    }
}

/// An issuer that this server trusts.
#[derive(Debug)]
pub struct Issuer {
    /// As it stands in the claim `iss`, byte for byte.
    pub url: String,
    pub provider: Provider,
    pub keys: IssuerKeys,
}

/// Verifies tokens for one server.
#[derive(Debug)]
pub struct Verifier {
    /// The server's own address, which a job asks a token for.
    audience: String,
    issuers: Vec<Issuer>,
    used: UsedTokens,
}

/// Why a token is refused. Its words are for the owner of the job, and hold nothing of the token but what is wrong.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum Refusal {
    #[error("it is no token: {0}")]
    Form(#[from] CompactError),
    #[error("its issuer (`iss`) is missing or no text")]
    NoIssuer,
    #[error("its issuer is `{0}`, which this server does not know")]
    UnknownIssuer(String),
    #[error("`{0}` is none of its issuer's keys")]
    UnknownKey(String),
    /// The token may be good.
    #[error("its issuer's keys are not to be had: {0}")]
    NoKeys(String),
    #[error("its signature is not its issuer's")]
    Signature,
    #[error("its audience (`aud`) is {found}; ask for a token with the audience `{expected}`")]
    Audience { expected: String, found: String },
    #[error("{0}")]
    Claim(#[from] ClaimError),
    #[error("it expired {} s ago", .0.as_secs())]
    Expired(Duration),
    #[error("it is valid only in {} s: compare the clocks", .0.as_secs())]
    NotYet(Duration),
    #[error("it was issued {} s in the future: compare the clocks", .0.as_secs())]
    IssuedLater(Duration),
    #[error("it lives for {} s, longer than any of its issuer's", .0.as_secs())]
    LongLife(Duration),
    #[error("it was used before (`jti`): ask for another one")]
    Used,
    /// The token may be good.
    #[error("too many tokens are in use")]
    Full,
}

impl Refusal {
    /// Whether the server is at fault, so that the same token may be taken later.
    pub fn is_passing(&self) -> bool {
        matches!(self, Self::NoKeys(_) | Self::Full)
    }
}

impl Verifier {
    /// `used` may be shared with other verifiers.
    pub fn new(audience: String, issuers: Vec<Issuer>, used: UsedTokens) -> Self {
        Self {
            audience,
            issuers,
            used,
        }
    }

    pub fn audience(&self) -> &str {
        &self.audience
    }

    /// Verifies a token, which counts once.
    ///
    /// # Errors
    /// With the first reason to refuse it.
    pub async fn verify(&self, token: &str, now: SystemTime) -> Result<Identity, Refusal> {
        let compact = Compact::parse(token)?;
        let url = compact.claims.text("iss").map_err(|_| Refusal::NoIssuer)?;
        let known = self.issuers.iter().find(|issuer| issuer.url == url);
        let issuer = known.ok_or_else(|| Refusal::UnknownIssuer(one_line(url, SHOWN)))?;
        let key = issuer.keys.find(&compact.key_id, now).await;
        let key = key.map_err(|error| match error {
            KeysError::Unknown => Refusal::UnknownKey(one_line(&compact.key_id, SHOWN)),
            error => Refusal::NoKeys(error.to_string()),
        })?;
        if !key.has_signed(compact.signed, &compact.signature) {
            return Err(Refusal::Signature);
        }
        self.check_audience(&compact)?;
        let expires = check_times(&compact, issuer.provider, now)?;
        let identity = Identity::read(issuer.provider, url, &compact.claims)?;
        // Last, so that a refused token cannot mark a good one with the same `jti` as used.
        self.used.take(
            &format!("{url} {}", identity.token_id),
            expires + LEEWAY,
            now,
        )?;
        Ok(identity)
    }

    /// A list of audiences would be good at another server as well.
    fn check_audience(&self, compact: &Compact<'_>) -> Result<(), Refusal> {
        let found = compact.claims.get("aud");
        if found.and_then(serde_json::Value::as_str) == Some(self.audience.as_str()) {
            return Ok(());
        }
        Err(Refusal::Audience {
            expected: self.audience.clone(),
            found: match found {
                None => "missing".to_owned(),
                Some(value) => format!("`{}`", one_line(&value.to_string(), SHOWN)),
            },
        })
    }
}

/// Checks all three times, and gives that at which the token ends.
fn check_times(
    compact: &Compact<'_>,
    provider: Provider,
    now: SystemTime,
) -> Result<SystemTime, Refusal> {
    let expires = compact.claims.time("exp")?;
    let issued = compact.claims.time("iat")?;
    let begins = compact.claims.time("nbf")?;
    if let Ok(ago) = now.duration_since(expires)
        && ago >= LEEWAY
    {
        return Err(Refusal::Expired(ago));
    }
    let ahead = |time: SystemTime| {
        time.duration_since(now)
            .ok()
            .filter(|ahead| *ahead > LEEWAY)
    };
    if let Some(ahead) = ahead(issued) {
        return Err(Refusal::IssuedLater(ahead));
    }
    if let Some(ahead) = ahead(begins) {
        return Err(Refusal::NotYet(ahead));
    }
    match expires.duration_since(issued) {
        Ok(life) if life > provider.longest_life() => Err(Refusal::LongLife(life)),
        _ => Ok(expires),
    }
}

#[cfg(test)]
mod tests;
