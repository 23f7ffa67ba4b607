//! The compact form of a signed token (RFC 7515): three parts, of which the first names algorithm and key. Narrower than
//! the standard wherever an issuer of CI tokens needs no more: one algorithm, no extension, no claim twice.

use std::collections::BTreeMap;
use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, Visitor};
use serde_json::Value;
use thiserror::Error;

use super::claims::ClaimError;
use flywheel_core::text::one_line;

/// Tokens of both issuers have some 1,500 bytes.
const SIZE_LIMIT: usize = 16 * 1024;
/// The only algorithm of both issuers.
const ALGORITHM: &str = "RS256";
/// So much of a foreign value is shown.
const SHOWN: usize = 60;
/// No time of a token is after the year 9999.
const LAST_SECOND: u64 = 253_402_300_799;

/// Why a text is no token that is looked at further.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum CompactError {
    #[error("it has more than {SIZE_LIMIT} bytes")]
    Size,
    #[error("it has not three parts")]
    Parts,
    #[error("its {0} is not in base64url")]
    Encoding(&'static str),
    #[error("its {0} is no JSON object")]
    Json(&'static str),
    #[error("its {part} has `{name}` twice")]
    Twice { part: &'static str, name: String },
    #[error("its algorithm (`alg`) is `{0}`, not `{ALGORITHM}`")]
    Algorithm(String),
    #[error("its type (`typ`) is `{0}`, not `JWT`")]
    Type(String),
    #[error("it asks for an extension (`crit`)")]
    Extension,
    #[error("it names no key (`kid`)")]
    NoKey,
}

/// A token that is not verified.
pub(super) struct Compact<'a> {
    pub(super) key_id: String,
    pub(super) claims: Fields,
    /// What the signature is of.
    pub(super) signed: &'a [u8],
    pub(super) signature: Vec<u8>,
}

impl<'a> Compact<'a> {
    pub(super) fn parse(token: &'a str) -> Result<Self, CompactError> {
        if token.len() > SIZE_LIMIT {
            return Err(CompactError::Size);
        }
        let parts: Vec<&str> = token.split('.').collect();
        let [header, claims, signature] = parts.as_slice() else {
            return Err(CompactError::Parts);
        };
        let key_id = check_header(&Fields::parse("header", header)?)?;
        Ok(Self {
            key_id,
            claims: Fields::parse("claims", claims)?,
            signed: &token.as_bytes()[..header.len() + 1 + claims.len()],
            signature: decode("signature", signature)?,
        })
    }
}

/// Gives the name of the key. Addresses of keys (`jku`, `x5u`) and keys (`jwk`, `x5c`) are never looked at.
fn check_header(header: &Fields) -> Result<String, CompactError> {
    let shown = |value: &Value| match value {
        Value::String(text) => one_line(text, SHOWN),
        other => one_line(&other.to_string(), SHOWN),
    };
    match header.get("alg") {
        Some(Value::String(name)) if name == ALGORITHM => (),
        other => {
            let found = other.map_or_else(|| "missing".to_owned(), shown);
            return Err(CompactError::Algorithm(found));
        }
    }
    match header.get("typ") {
        None => (),
        Some(Value::String(kind)) if kind.eq_ignore_ascii_case("JWT") => (),
        Some(other) => return Err(CompactError::Type(shown(other))),
    }
    if header.get("crit").is_some() {
        return Err(CompactError::Extension);
    }
    match header.get("kid") {
        Some(Value::String(name)) if !name.is_empty() => Ok(name.clone()),
        _ => Err(CompactError::NoKey),
    }
}

fn decode(part: &'static str, text: &str) -> Result<Vec<u8>, CompactError> {
    let decoded = URL_SAFE_NO_PAD.decode(text);
    decoded.map_err(|_| CompactError::Encoding(part))
}

/// The members of a JSON object, each once.
#[derive(Debug)]
pub(super) struct Fields(BTreeMap<String, Value>);

impl Fields {
    fn parse(part: &'static str, text: &str) -> Result<Self, CompactError> {
        let bytes = decode(part, text)?;
        let members: Members =
            serde_json::from_slice(&bytes).map_err(|_| CompactError::Json(part))?;
        match members.twice {
            Some(name) => Err(CompactError::Twice {
                part,
                name: one_line(&name, SHOWN),
            }),
            None => Ok(Self(members.all)),
        }
    }

    /// `None` also for `null`.
    pub(super) fn get(&self, name: &str) -> Option<&Value> {
        self.0.get(name).filter(|value| !value.is_null())
    }

    /// A text. One that is empty is not known, like one that is missing.
    pub(super) fn text(&self, name: &'static str) -> Result<&str, ClaimError> {
        match self.get(name) {
            Some(Value::String(text)) if !text.is_empty() => Ok(text),
            None | Some(Value::String(_)) => Err(ClaimError::Missing(name)),
            Some(_) => Err(ClaimError::Kind {
                name,
                wanted: "a text",
            }),
        }
    }

    /// A text that may be missing.
    pub(super) fn optional(&self, name: &'static str) -> Result<Option<&str>, ClaimError> {
        match self.text(name) {
            Ok(text) => Ok(Some(text)),
            Err(ClaimError::Missing(_)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Whole seconds since 1970.
    pub(super) fn time(&self, name: &'static str) -> Result<SystemTime, ClaimError> {
        let value = self.get(name).ok_or(ClaimError::Missing(name))?;
        let seconds = value.as_u64().filter(|seconds| *seconds <= LAST_SECOND);
        let seconds = seconds.ok_or(ClaimError::Kind {
            name,
            wanted: "a number of seconds",
        })?;
        Ok(UNIX_EPOCH + Duration::from_secs(seconds))
    }
}

/// What JSON libraries do with a member that is there twice differs from one to the next.
#[derive(Default)]
struct Members {
    all: BTreeMap<String, Value>,
    twice: Option<String>,
}

impl<'de> Deserialize<'de> for Members {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Object;
        impl<'de> Visitor<'de> for Object {
            type Value = Members;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Members, A::Error> {
                let mut members = Members::default();
                while let Some((name, value)) = map.next_entry::<String, Value>()? {
                    if members.all.insert(name.clone(), value).is_some() {
                        members.twice.get_or_insert(name);
                    }
                }
                Ok(members)
            }

            fn visit_unit<E: serde::de::Error>(self) -> Result<Members, E> {
                Err(E::custom("no object"))
            }
        }
        deserializer
            .deserialize_map(Object)
            .map_err(|error| D::Error::custom(error.to_string()))
    }
}
