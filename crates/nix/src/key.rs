//! Signing keys of binary caches: parsing, signing and verifying (ed25519). Pure.

use std::fmt;
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ring::rand::{SecureRandom as _, SystemRandom};
use ring::signature::{ED25519, Ed25519KeyPair, KeyPair as _, UnparsedPublicKey};
use thiserror::Error;
use zeroize::Zeroizing;

#[derive(Debug, Error, PartialEq, Eq)]
pub enum KeyError {
    /// Not `<name>:<base64 of 32 bytes>`.
    #[error("`{0}` is not a public key (`<name>:<base64 of 32 bytes>`)")]
    Public(String),
    /// Not `<name>:<base64 of 64 bytes>`. The text is not shown, as it may be a key.
    #[error("this is not a secret key (`<name>:<base64 of 64 bytes>`)")]
    Secret,
    /// The name contains characters that a key name cannot have.
    #[error("`{0}` is not a key name (letters, digits, `.`, `_`, `-`, `+`)")]
    Name(String),
    /// The system's random source failed.
    #[error("the system gave no random bytes")]
    Random,
}

fn is_key_name(name: &str) -> bool {
    !name.is_empty()
        && name
            .bytes()
            .all(|c| c.is_ascii_alphanumeric() || b"._-+/@".contains(&c))
}

/// The key of `https://cache.nixos.org`, which Nix trusts by default.
pub const NIXOS_CACHE_KEY: &str = "cache.nixos.org-1:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY=";

/// A cache's public key, as `trusted-public-keys` has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PublicKey {
    name: String,
    bytes: [u8; 32],
}

impl PublicKey {
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether `signature` (`<key name>:<base64>`) is this key's signature of `text`.
    pub(crate) fn verifies(&self, text: &str, signature: &str) -> bool {
        let Some((name, digits)) = signature.split_once(':') else {
            return false;
        };
        let Ok(bytes) = STANDARD.decode(digits) else {
            return false;
        };
        // A signature by a key of another name is not this key's, even if the bytes match.
        name == self.name
            && UnparsedPublicKey::new(&ED25519, self.bytes)
                .verify(text.as_bytes(), &bytes)
                .is_ok()
    }
}

impl FromStr for PublicKey {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<Self, KeyError> {
        // A public key is no secret, so the error may quote it.
        let error = || KeyError::Public(flywheel_core::text::one_line(text, 120));
        let (name, digits) = text.trim().split_once(':').ok_or_else(error)?;
        let bytes = STANDARD
            .decode(digits)
            .ok()
            .and_then(|bytes| bytes.try_into().ok())
            .ok_or_else(error)?;
        if is_key_name(name) {
            Ok(Self {
                name: name.to_owned(),
                bytes,
            })
        } else {
            Err(error())
        }
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.name, STANDARD.encode(self.bytes))
    }
}

/// A cache's secret key. It cannot be printed; only `encode` returns its text.
pub struct SecretKey {
    name: String,
    seed: Zeroizing<[u8; 32]>,
    pair: Ed25519KeyPair,
}

impl SecretKey {
    /// Generates a new key.
    ///
    /// # Errors
    /// When the name is invalid, or the system's random source fails.
    pub fn generate(name: &str) -> Result<Self, KeyError> {
        if !is_key_name(name) {
            return Err(KeyError::Name(flywheel_core::text::one_line(name, 80)));
        }
        let mut seed = Zeroizing::new([0_u8; 32]);
        SystemRandom::new()
            .fill(&mut *seed)
            .map_err(|_| KeyError::Random)?;
        let pair = Ed25519KeyPair::from_seed_unchecked(&*seed).map_err(|_| KeyError::Secret)?;
        Ok(Self {
            name: name.to_owned(),
            seed,
            pair,
        })
    }

    /// Parses `<name>:<base64 of seed and public key>`, the format of `nix-store
    /// --generate-binary-cache-key`.
    ///
    /// # Errors
    /// When it has another format, or its two halves do not match. The text is never shown.
    pub fn parse(text: &str) -> Result<Self, KeyError> {
        let (name, digits) = text.trim().split_once(':').ok_or(KeyError::Secret)?;
        let bytes = Zeroizing::new(STANDARD.decode(digits).map_err(|_| KeyError::Secret)?);
        // Nix stores the seed and the public key, 32 bytes each.
        if bytes.len() != 64 || !is_key_name(name) {
            return Err(KeyError::Secret);
        }
        // Checks that the public half belongs to the seed.
        let pair = Ed25519KeyPair::from_seed_and_public_key(&bytes[..32], &bytes[32..])
            .map_err(|_| KeyError::Secret)?;
        let mut seed = Zeroizing::new([0_u8; 32]);
        seed.copy_from_slice(&bytes[..32]);
        Ok(Self {
            name: name.to_owned(),
            seed,
            pair,
        })
    }

    /// The text for a key file, which must have mode 0600.
    pub fn encode(&self) -> Zeroizing<String> {
        // Copies of the key are wiped from memory when dropped.
        let whole = Zeroizing::new([&self.seed[..], self.pair.public_key().as_ref()].concat());
        Zeroizing::new(format!("{}:{}", self.name, STANDARD.encode(&*whole)))
    }

    /// The public half.
    pub fn public(&self) -> PublicKey {
        let mut bytes = [0_u8; 32];
        bytes.copy_from_slice(self.pair.public_key().as_ref());
        PublicKey {
            name: self.name.clone(),
            bytes,
        }
    }

    /// `<key name>:<base64 of the signature of text>`.
    pub fn sign(&self, text: &str) -> String {
        format!(
            "{}:{}",
            self.name,
            STANDARD.encode(self.pair.sign(text.as_bytes()))
        )
    }
}

impl fmt::Debug for SecretKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SecretKey({}, …)", self.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_survives_its_spelling_and_signs() {
        let key = SecretKey::generate("main-1").expect("random");
        let again = SecretKey::parse(&key.encode()).expect("own spelling");
        let signature = again.sign("text");
        assert!(key.public().verifies("text", &signature));
        assert!(!key.public().verifies("other text", &signature));
        assert!(
            !key.public()
                .verifies("text", &signature.replace("main-1", "main-2"))
        );
        let public: PublicKey = key.public().to_string().parse().expect("own spelling");
        assert_eq!(public, key.public());
    }

    #[test]
    fn a_secret_key_is_not_printed() {
        let key = SecretKey::generate("main").expect("random");
        assert_eq!(format!("{key:?}"), "SecretKey(main, …)");
    }

    #[test]
    fn what_is_no_key_is_refused() {
        for text in [
            "",
            "main",
            "main:",
            "main:AAAA",
            ":47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=",
            "a b:47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=",
        ] {
            assert!(text.parse::<PublicKey>().is_err(), "{text}");
        }
    }
}
