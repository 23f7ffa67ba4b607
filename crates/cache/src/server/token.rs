//! Tokens: their file, their permissions, and a comparison in constant time. Keeps only hashes of
//! tokens in memory, except for the one write token that an embedding program needs.

use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ring::rand::{SecureRandom as _, SystemRandom};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use thiserror::Error;

use flywheel_core::secret::Secret;
use flywheel_nix::cache_name::CacheName;
use flywheel_sys::untrusted_file::{self, Owner};

/// Random bytes in a generated token; this many cannot be guessed.
const TOKEN_BYTES: usize = 32;
/// Minimum length of a token. Shorter ones can be guessed over the network, and typing `test`
/// should be an error.
const MIN_TOKEN_LENGTH: usize = 8;

/// A file with tokens or a key is shorter, in bytes.
const FILE_LIMIT: u64 = 1 << 20;

#[derive(Debug, Error)]
pub enum TokenError {
    /// The file could not be read or created.
    #[error("the tokens file `{}` could not be read or written", file.display())]
    File {
        file: PathBuf,
        #[source]
        source: io::Error,
    },
    /// A line is not `<scope> <token> [<cache>]`. The line is not shown: it may hold a token.
    #[error("line {line} of the tokens file `{}` {problem}", file.display())]
    Line {
        file: PathBuf,
        /// The line number, from 1.
        line: usize,
        problem: &'static str,
    },
}

/// The permissions of a token. Writing includes reading, so that a publisher can verify its
/// uploads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scope {
    Read,
    /// Read and upload.
    Write,
}

#[derive(Clone, Debug)]
struct Entry {
    digest: [u8; 32],
    scope: Scope,
    /// `None`: every cache.
    cache: Option<CacheName>,
}

/// A token's hash and permissions, as one process sends them to another.
#[derive(Debug, Deserialize, Serialize)]
pub(crate) struct WireToken {
    /// SHA-256 in hexadecimal.
    digest: String,
    write: bool,
    /// `None`: every cache.
    cache: Option<String>,
}

#[derive(Clone, Debug)]
pub(crate) struct Tokens {
    entries: Vec<Entry>,
    write: Option<Secret>,
}

impl Tokens {
    /// Reads the file, or creates it (0600) with one random write token.
    ///
    /// # Errors
    /// When it can be neither read nor created, or a line is not `<scope> <token> [<cache>]`.
    pub(crate) fn open_or_create(file: &Path) -> Result<Self, TokenError> {
        let file_error = |source| TokenError::File {
            file: file.to_owned(),
            source,
        };
        let text = read_or_create(file, new_file_text).map_err(file_error)?;
        Self::parse(text.expose(), file)
    }

    /// Reads an existing file.
    ///
    /// # Errors
    /// As for [`Tokens::open_or_create`].
    pub(crate) fn open(file: &Path) -> Result<Self, TokenError> {
        let text = read_text(file).map_err(|source| TokenError::File {
            file: file.to_owned(),
            source,
        })?;
        Self::parse(&text, file)
    }

    fn parse(text: &str, file: &Path) -> Result<Self, TokenError> {
        let mut tokens = Self {
            entries: Vec::new(),
            write: None,
        };
        for (number, line) in text.lines().enumerate() {
            let words: Vec<&str> = line
                .split('#')
                .next()
                .unwrap_or_default()
                .split_whitespace()
                .collect();
            if !words.is_empty() {
                let bad = |problem| TokenError::Line {
                    file: file.to_owned(),
                    line: number + 1,
                    problem,
                };
                tokens.add(&words).map_err(bad)?;
            }
        }
        Ok(tokens)
    }

    fn add(&mut self, words: &[&str]) -> Result<(), &'static str> {
        let (scope, token, cache) = match words {
            [scope, token] => (scope, token, None),
            [scope, token, cache] => (scope, token, Some(cache)),
            _ => return Err("is not `<scope> <token>` or `<scope> <token> <cache>`"),
        };
        let scope = match *scope {
            "read" => Scope::Read,
            "write" => Scope::Write,
            _ => return Err("does not begin with `read` or `write`"),
        };
        if token.len() < MIN_TOKEN_LENGTH {
            return Err("has a token shorter than 8 characters");
        }
        let cache = cache
            .map(|name| name.parse())
            .transpose()
            .map_err(|_| "has an invalid cache name")?;
        // Only a token for all caches serves the program that embeds the server.
        if scope == Scope::Write && cache.is_none() && self.write.is_none() {
            self.write = Secret::new(token);
        }
        self.entries.push(Entry {
            // Hashes have equal length, so comparing them reveals no length either.
            digest: digest(token),
            scope,
            cache,
        });
        Ok(())
    }

    pub(crate) fn to_wire(&self) -> Vec<WireToken> {
        let wire = |entry: &Entry| WireToken {
            digest: hex(&entry.digest),
            write: entry.scope == Scope::Write,
            cache: entry.cache.as_ref().map(ToString::to_string),
        };
        self.entries.iter().map(wire).collect()
    }

    /// # Errors
    /// When a hash or a cache's name is malformed.
    pub(crate) fn from_wire(tokens: &[WireToken]) -> Result<Self, String> {
        let entry = |token: &WireToken| -> Option<Entry> {
            let digest = flywheel_nix::hash::Sha256::parse(&format!("sha256:{}", token.digest));
            let cache = token.cache.as_deref().map(str::parse).transpose();
            Some(Entry {
                digest: digest.ok()?.0,
                scope: if token.write {
                    Scope::Write
                } else {
                    Scope::Read
                },
                cache: cache.ok()?,
            })
        };
        let entries: Option<Vec<Entry>> = tokens.iter().map(entry).collect();
        Ok(Self {
            entries: entries.ok_or("a token's hash or cache is malformed")?,
            write: None,
        })
    }

    /// The first token that may write to every cache, for a program that embeds the server.
    pub(crate) fn write_token(&self) -> Option<&Secret> {
        self.write.as_ref()
    }

    /// Whether `token` has `scope` on the cache of this name.
    ///
    /// Every entry is compared, by hash, whether or not an earlier one matches, so that the time
    /// taken reveals nothing about a token.
    pub(crate) fn allow(&self, token: Option<&Secret>, cache: &str, scope: Scope) -> bool {
        self.any(token, scope, |entry| {
            entry
                .cache
                .as_ref()
                .is_none_or(|name| name.as_str() == cache)
        })
    }

    /// Whether `token` has `scope` on any cache at all.
    pub(crate) fn allow_somewhere(&self, token: Option<&Secret>, scope: Scope) -> bool {
        self.any(token, scope, |_| true)
    }

    fn any(&self, token: Option<&Secret>, scope: Scope, applies: impl Fn(&Entry) -> bool) -> bool {
        let Some(token) = token else { return false };
        let presented = digest(token.expose());
        // A fold without early exit: `any` would stop at the first match.
        self.entries.iter().fold(false, |found, entry| {
            let same = equal(&presented, &entry.digest);
            let enough = scope == Scope::Read || entry.scope == Scope::Write;
            // `&` and `|` evaluate both sides, unlike `&&` and `||`.
            found | (same & enough & applies(entry))
        })
    }
}

/// Extracts the token from an `Authorization` header: `Bearer`, or the password of `Basic` with any
/// user, which is what Nix makes of a netrc line. `None` if there is none or it cannot be parsed.
pub(crate) fn presented(authorization: &str) -> Option<Secret> {
    let (scheme, rest) = authorization.split_once(' ')?;
    if scheme.eq_ignore_ascii_case("bearer") {
        Secret::new(rest)
    } else if scheme.eq_ignore_ascii_case("basic") {
        let pair = String::from_utf8(STANDARD.decode(rest.trim()).ok()?).ok()?;
        Secret::new(pair.split_once(':')?.1)
    } else {
        None
    }
}

fn digest(token: &str) -> [u8; 32] {
    Sha256::digest(token.as_bytes()).into()
}

/// Compares all bytes, wherever the first difference is.
fn equal(left: &[u8; 32], right: &[u8; 32]) -> bool {
    left.iter()
        .zip(right)
        .fold(0, |difference, (a, b)| difference | (a ^ b))
        == 0
}

fn new_file_text() -> io::Result<Secret> {
    let mut bytes = [0_u8; TOKEN_BYTES];
    let no_random = || io::Error::other("the system gave no random bytes");
    SystemRandom::new()
        .fill(&mut bytes)
        .map_err(|_| no_random())?;
    let token = hex(&bytes);
    let text = format!(
        "# Tokens of this cache: one `<scope> <token> [<cache>]` a line, scope `read` or `write`\n\
         # (which includes reading). Restart the server after a change.\nwrite {token}\n"
    );
    Secret::new(&text).ok_or_else(no_random)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Reads a private file, or creates it with the text from `make`. Of several processes that create it at once, all
/// return the first one's text. An empty file was torn by a power cut, and is made anew.
///
/// # Errors
/// When it can be neither read nor created.
pub(super) fn read_or_create(
    file: &Path,
    make: impl Fn() -> io::Result<Secret>,
) -> io::Result<Secret> {
    for replace in [false, true] {
        match read_text(file) {
            Ok(text) => {
                if let Some(text) = Secret::new(&text) {
                    return Ok(text);
                }
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => (),
            Err(error) => return Err(error),
        }
        let text = make()?;
        if write_private(file, &text, replace)? {
            return Ok(text);
        }
    }
    Err(io::Error::other("the file is empty, and was not replaced"))
}

/// Writes a file that only its owner can read, completely or not at all. Returns `false` if there is one already.
fn write_private(file: &Path, text: &Secret, replace: bool) -> io::Result<bool> {
    let folder = file
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    // Its mode is 0600 from the start.
    let mut out = tempfile::NamedTempFile::new_in(folder)?;
    out.write_all(text.expose().as_bytes())?;
    out.write_all(b"\n")?;
    out.as_file().sync_all()?;
    let placed = if replace {
        out.persist(file).map(|_| true)
    } else {
        out.persist_noclobber(file).map(|_| true)
    };
    match placed {
        Err(error) if error.error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        placed => Ok(placed?),
    }
}

/// Reads a file with tokens or a key, which may be mounted by another user and behind a link.
fn read_text(file: &Path) -> io::Result<String> {
    let bytes = untrusted_file::read(file, Owner::Any, FILE_LIMIT)?;
    String::from_utf8(bytes).map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "is not UTF-8"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(text: &str) -> Tokens {
        Tokens::parse(text, Path::new("tokens")).expect("valid")
    }

    fn secret(text: &str) -> Option<Secret> {
        Secret::new(text)
    }

    #[test]
    fn scopes_and_caches_are_kept_apart() {
        let all = tokens(
            "# a comment\nwrite writer-token\nread reader-token # all\n\nwrite main-writer main\n",
        );
        let check = |token: &str, cache: &str| {
            let token = secret(token);
            (
                all.allow(token.as_ref(), cache, Scope::Read),
                all.allow(token.as_ref(), cache, Scope::Write),
            )
        };
        assert_eq!(check("writer-token", "any"), (true, true));
        assert_eq!(check("reader-token", "any"), (true, false));
        assert_eq!(check("main-writer", "main"), (true, true));
        assert_eq!(check("main-writer", "other"), (false, false));
        assert_eq!(check("writer-toke", "any"), (false, false));
        assert!(!all.allow(None, "main", Scope::Read));
        assert_eq!(
            all.write_token().expect("one for all").expose(),
            "writer-token"
        );
    }

    #[test]
    fn a_bad_line_is_named_but_not_shown() {
        for bad in [
            "admin secret-token",
            "write",
            "write short",
            "read secret-token a/b",
            "read secret-token a b",
        ] {
            let error = Tokens::parse(&format!("\n{bad}"), Path::new("tokens"))
                .expect_err(bad)
                .to_string();
            assert!(
                error.contains("line 2") && !error.contains("secret-token"),
                "{error}"
            );
        }
    }

    #[test]
    fn bearer_and_basic_carry_the_same_token() {
        let token = secret("a:token").expect("not empty");
        let basic = format!("Basic {}", token.basic("any").expose());
        assert_eq!(
            presented(&basic).as_ref(),
            Some(&token),
            "only the first colon splits"
        );
        assert_eq!(presented("bEARER a:token").as_ref(), Some(&token));
        for bad in ["", "Bearer", "Bearer ", "Basic !!!", "Digest a", "a:token"] {
            assert!(presented(bad).is_none(), "{bad}");
        }
    }

    #[test]
    fn the_first_start_makes_one_private_token() {
        use std::os::unix::fs::PermissionsExt as _;
        let folder = tempfile::tempdir().expect("temporary folder");
        let file = folder.path().join("tokens");
        let made = Tokens::open_or_create(&file).expect("made");
        let again = Tokens::open_or_create(&file).expect("read");
        assert_eq!(made.write_token(), again.write_token());
        assert_eq!(
            made.write_token().expect("one").expose().len(),
            2 * TOKEN_BYTES
        );
        assert_eq!(
            std::fs::metadata(&file)
                .expect("there")
                .permissions()
                .mode()
                & 0o777,
            0o600
        );
    }
}
