//! Names of caches, in Attic's format. Pure.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

use flywheel_core::exit::{Exit, Explain};
use flywheel_core::text::one_line;

/// Attic's limit, which also fits any file system.
const NAME_LIMIT: usize = 50;

/// A text that is not a valid cache name.
#[derive(Debug, Error, PartialEq, Eq)]
#[error(
    "`{0}` is not a cache name (a letter or digit, then letters, digits, `-`, `_` or `+`; at most 50 characters)"
)]
pub struct CacheNameError(String);

impl Explain for CacheNameError {
    fn exit(&self) -> Exit {
        Exit::Usage
    }

    fn hint(&self) -> Option<String> {
        Some("Give the cache's own name in `attic-cache`, and the server's address in `attic-server`.".into())
    }
}

/// The name of a cache on its server: `^[A-Za-z0-9][A-Za-z0-9-_+]{0,49}$`, so it is a safe file name
/// and needs no escape in a URL.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CacheName(String);

impl CacheName {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// The default name of a cache (`contract.md`, "Hints to a job").
impl Default for CacheName {
    fn default() -> Self {
        Self("main".to_owned())
    }
}

impl FromStr for CacheName {
    type Err = CacheNameError;

    fn from_str(text: &str) -> Result<Self, CacheNameError> {
        let first = text
            .bytes()
            .next()
            .is_some_and(|c| c.is_ascii_alphanumeric());
        let rest = text
            .bytes()
            .all(|c| c.is_ascii_alphanumeric() || b"-_+".contains(&c));
        if first && rest && text.len() <= NAME_LIMIT {
            Ok(Self(text.to_owned()))
        } else {
            Err(CacheNameError(one_line(text, 80)))
        }
    }
}

impl fmt::Display for CacheName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_cannot_leave_its_folder_or_its_url() {
        for good in ["main", "a", "9-_+", "Team-1_x+y", &"a".repeat(50)] {
            assert!(good.parse::<CacheName>().is_ok(), "{good}");
        }
        for bad in [
            "",
            ".",
            "..",
            "-a",
            "_api",
            "a/b",
            "a b",
            "ä",
            &"a".repeat(51),
        ] {
            assert!(bad.parse::<CacheName>().is_err(), "{bad}");
        }
    }
}
