//! The type of store paths, with their hash and name. Pure.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::hash::is_base32;

/// The folder of all store paths. Chroot stores keep this logical name.
pub const STORE_DIR: &str = "/nix/store";
/// Nix's limit for a name, `StorePath::MaxPathLen`.
const NAME_LIMIT: usize = 211;
const HASH_LENGTH: usize = 32;

/// A text that is not a store path.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("`{0}` is not a store path (`/nix/store/<32 characters>-<name>`)")]
pub struct StorePathError(String);

/// The 32 characters by which caches identify a store path.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PathHash(String);

impl PathHash {
    /// Parses the 32 characters.
    ///
    /// # Errors
    /// When length or alphabet are wrong.
    pub fn parse(text: &str) -> Result<Self, StorePathError> {
        if text.len() == HASH_LENGTH && is_base32(text) {
            Ok(Self(text.to_owned()))
        } else {
            Err(StorePathError(flywheel_core::text::one_line(text, 80)))
        }
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for PathHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for PathHash {
    type Error = StorePathError;
    fn try_from(text: String) -> Result<Self, StorePathError> {
        Self::parse(&text)
    }
}

impl From<PathHash> for String {
    fn from(hash: PathHash) -> Self {
        hash.0
    }
}

/// A store path, `/nix/store/<hash>-<name>`, with nothing below it.
///
/// Ordered by base name, bytewise, which is how Nix sorts references.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct StorePath(String);

impl StorePath {
    /// Parses a base name, `<hash>-<name>`.
    ///
    /// # Errors
    /// When it is not one.
    pub fn from_base_name(name: &str) -> Result<Self, StorePathError> {
        let error = || StorePathError(flywheel_core::text::one_line(name, 260));
        // Checked, since the text may have a multi-byte character at this position.
        let (hash, rest) = name.split_at_checked(HASH_LENGTH).ok_or_else(error)?;
        let rest = rest.strip_prefix('-').ok_or_else(error)?;
        // The characters that Nix allows in names.
        let allowed = |c: u8| c.is_ascii_alphanumeric() || b"+-._?=".contains(&c);
        let named = !rest.is_empty() && rest.len() <= NAME_LIMIT && rest.bytes().all(allowed);
        // Nix rejects such names too.
        let dots = matches!(rest.split('-').next(), Some("." | ".."));
        if is_base32(hash) && named && !dots {
            Ok(Self(name.to_owned()))
        } else {
            Err(error())
        }
    }

    /// Returns the store path that contains this path, which may be the store path itself.
    ///
    /// # Errors
    /// When it is not below the store.
    pub fn containing(path: &Path) -> Result<Self, StorePathError> {
        let error = || StorePathError(flywheel_core::text::one_line(&path.to_string_lossy(), 260));
        let below = path.strip_prefix(STORE_DIR).map_err(|_| error())?;
        let first = below
            .components()
            .next()
            .and_then(|part| part.as_os_str().to_str())
            .ok_or_else(error)?;
        Self::from_base_name(first)
    }

    /// `<hash>-<name>`.
    pub fn base_name(&self) -> &str {
        &self.0
    }

    pub fn hash(&self) -> PathHash {
        PathHash(self.0[..HASH_LENGTH].to_owned())
    }

    /// The part after the hash.
    pub fn name(&self) -> &str {
        &self.0[HASH_LENGTH + 1..]
    }

    /// Whether this is a derivation.
    pub fn is_derivation(&self) -> bool {
        self.0.ends_with(".drv")
    }

    pub fn to_path(&self) -> PathBuf {
        Path::new(STORE_DIR).join(&self.0)
    }
}

/// The full path.
impl fmt::Display for StorePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{STORE_DIR}/{}", self.0)
    }
}

impl fmt::Debug for StorePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Parses a full path with nothing below it.
impl FromStr for StorePath {
    type Err = StorePathError;

    fn from_str(text: &str) -> Result<Self, StorePathError> {
        let base = text
            .strip_prefix(STORE_DIR)
            .and_then(|rest| rest.strip_prefix('/'));
        base.map_or_else(
            || Err(StorePathError(flywheel_core::text::one_line(text, 260))),
            Self::from_base_name,
        )
    }
}

impl TryFrom<String> for StorePath {
    type Error = StorePathError;
    fn try_from(text: String) -> Result<Self, StorePathError> {
        text.parse()
    }
}

impl From<StorePath> for String {
    fn from(path: StorePath) -> Self {
        path.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HELLO: &str = "/nix/store/fvchbymk0m4jvldpb9m5hy0bjy2lf30k-hello-1.0";

    #[test]
    fn parts_of_a_store_path() {
        let path: StorePath = HELLO.parse().expect("valid");
        assert_eq!(path.hash().as_str(), "fvchbymk0m4jvldpb9m5hy0bjy2lf30k");
        assert_eq!(path.name(), "hello-1.0");
        assert_eq!(path.to_string(), HELLO);
        assert!(!path.is_derivation());
        assert_eq!(
            StorePath::containing(Path::new(&format!("{HELLO}/bin/x"))),
            Ok(path)
        );
    }

    #[test]
    fn strangers_are_refused() {
        for text in [
            "",
            "/nix/store",
            "/nix/store/",
            "/nix/store/short-name",
            "/nix/store/fvchbymk0m4jvldpb9m5hy0bjy2lf30k",
            "/nix/store/fvchbymk0m4jvldpb9m5hy0bjy2lf30k-",
            "/nix/store/fvchbymk0m4jvldpb9m5hy0bjy2lf30k-a/b",
            "/nix/store/fvchbymk0m4jvldpb9m5hy0bjy2lf30k-a b",
            "/nix/store/fvchbymk0m4jvldpb9m5hy0bjy2lf30k-..",
            "/nix/store/evchbymk0m4jvldpb9m5hy0bjy2lf30k-hello",
            "/nix/storefvchbymk0m4jvldpb9m5hy0bjy2lf30k-hello",
            "/gnu/store/fvchbymk0m4jvldpb9m5hy0bjy2lf30k-hello",
            "/nix/store/äääääääääääääääääääääääääääääääää-hello",
        ] {
            assert!(text.parse::<StorePath>().is_err(), "{text}");
        }
    }
}
