//! Tokens: a line of their file, their permissions, and a comparison in constant time. Keeps only hashes of
//! tokens in memory, except for the one write token that an embedding program needs. `token_file` changes the file.

use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use std::time::SystemTime;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use chrono::{DateTime, SecondsFormat, Utc};
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
    /// A line has not the format. The line is not shown: it may hold a token.
    #[error("line {line} of the tokens file `{}` {problem}", file.display())]
    Line {
        file: PathBuf,
        /// The line number, from 1.
        line: usize,
        problem: &'static str,
    },
}

impl TokenError {
    /// What to do, as a full sentence.
    pub(super) fn hint(&self) -> String {
        "Each line of the file is `<scope> <token> [<cache>] [until=<time>]`, scope `read` or `write`.".into()
    }
}

/// The permissions of a token. Writing includes reading, so that a publisher can verify its
/// uploads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    Read,
    /// Read and upload.
    Write,
}

impl Scope {
    /// The word in the file.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
        }
    }
}

/// What a line of the file holds.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub(super) digest: [u8; 32],
    pub(super) scope: Scope,
    /// `None`: every cache.
    pub(super) cache: Option<CacheName>,
    /// `None`: it has no end.
    pub(super) expires: Option<DateTime<Utc>>,
}

impl Entry {
    /// Reads a line: `<scope> <token> [<cache>] [until=<time>]`, with `sha256:<hash>` in the token's place where the file
    /// keeps only that. Also returns the token, if it is there. `None` for an empty line or a comment.
    ///
    /// # Errors
    /// What is wrong with the line.
    pub(super) fn read(line: &str) -> Result<Option<(Self, Option<Secret>)>, &'static str> {
        let line = line.split('#').next().unwrap_or_default();
        let mut words: Vec<&str> = line.split_whitespace().collect();
        let expires = match words.last().and_then(|word| word.strip_prefix(UNTIL)) {
            Some(time) => {
                words.pop();
                let time = DateTime::parse_from_rfc3339(time)
                    .map_err(|_| "has an end that is no time such as `2027-01-31T12:00:00Z`")?;
                Some(time.to_utc())
            }
            None => None,
        };
        let (scope, token, cache) = match words[..] {
            [] if expires.is_none() => return Ok(None),
            [scope, token] => (scope, token, None),
            [scope, token, cache] => (scope, token, Some(cache)),
            _ => return Err("is not `<scope> <token> [<cache>] [until=<time>]`"),
        };
        let scope = match scope {
            "read" => Scope::Read,
            "write" => Scope::Write,
            _ => return Err("does not begin with `read` or `write`"),
        };
        let (digest, token) = match token.strip_prefix(HASHED) {
            Some(hash) => (parse_digest(hash).ok_or("has a malformed hash")?, None),
            None if token.len() < MIN_TOKEN_LENGTH => {
                return Err("has a token shorter than 8 characters");
            }
            // Hashes have equal length, so comparing them reveals no length either.
            None => (digest(token), Secret::new(token)),
        };
        let cache = cache
            .map(str::parse)
            .transpose()
            .map_err(|_| "has an invalid cache name")?;
        let entry = Self {
            digest,
            scope,
            cache,
            expires,
        };
        Ok(Some((entry, token)))
    }

    /// The line that `read` reads, with the hash in the token's place.
    pub(super) fn line(&self) -> String {
        let mut line = format!("{} {HASHED}{}", self.scope.as_str(), hex(&self.digest));
        if let Some(cache) = &self.cache {
            line.push_str(&format!(" {cache}"));
        }
        if let Some(time) = &self.expires {
            line.push_str(&format!(
                " {UNTIL}{}",
                time.to_rfc3339_opts(SecondsFormat::Secs, true)
            ));
        }
        line
    }

    fn is_valid_at(&self, now: DateTime<Utc>) -> bool {
        self.expires.is_none_or(|end| now < end)
    }
}

/// What stands before the hash of a token that the file does not hold itself.
const HASHED: &str = "sha256:";
/// What stands before the end of a token.
const UNTIL: &str = "until=";

/// This moment.
pub(super) fn now() -> DateTime<Utc> {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let seconds = since.map_or(0, |since| {
        i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
    });
    // Beyond what can be expressed, every token has ended.
    DateTime::from_timestamp(seconds, 0).unwrap_or(DateTime::<Utc>::MAX_UTC)
}

fn parse_digest(hash: &str) -> Option<[u8; 32]> {
    let parsed = flywheel_nix::hash::Sha256::parse(&format!("sha256:{hash}"));
    parsed.ok().map(|hash| hash.0)
}

/// A token's hash and permissions, as one process sends them to another.
#[derive(Debug, Deserialize, Serialize)]
pub(crate) struct WireToken {
    /// SHA-256 in hexadecimal.
    digest: String,
    write: bool,
    /// `None`: every cache.
    cache: Option<String>,
    /// In seconds since 1970.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    expires: Option<i64>,
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
            let bad = |problem| TokenError::Line {
                file: file.to_owned(),
                line: number + 1,
                problem,
            };
            let Some((entry, token)) = Entry::read(line).map_err(bad)? else {
                continue;
            };
            // Only a token for all caches serves the program that embeds the server.
            let serves =
                entry.scope == Scope::Write && entry.cache.is_none() && entry.is_valid_at(now());
            if serves && tokens.write.is_none() {
                tokens.write = token;
            }
            tokens.entries.push(entry);
        }
        Ok(tokens)
    }

    pub(crate) fn to_wire(&self) -> Vec<WireToken> {
        let wire = |entry: &Entry| WireToken {
            digest: hex(&entry.digest),
            write: entry.scope == Scope::Write,
            cache: entry.cache.as_ref().map(ToString::to_string),
            expires: entry.expires.map(|end| end.timestamp()),
        };
        self.entries.iter().map(wire).collect()
    }

    /// # Errors
    /// When a hash or a cache's name is malformed.
    pub(crate) fn from_wire(tokens: &[WireToken]) -> Result<Self, String> {
        let entry = |token: &WireToken| -> Option<Entry> {
            let expires = match token.expires {
                Some(end) => Some(DateTime::from_timestamp(end, 0)?),
                None => None,
            };
            let cache = token.cache.as_deref().map(str::parse).transpose();
            Some(Entry {
                digest: parse_digest(&token.digest)?,
                scope: if token.write {
                    Scope::Write
                } else {
                    Scope::Read
                },
                cache: cache.ok()?,
                expires,
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
        let now = now();
        // A fold without early exit: `any` would stop at the first match.
        self.entries.iter().fold(false, |found, entry| {
            let same = equal(&presented, &entry.digest);
            let enough = scope == Scope::Read || entry.scope == Scope::Write;
            // `&` and `|` evaluate both sides, unlike `&&` and `||`.
            found | (same & enough & entry.is_valid_at(now) & applies(entry))
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

pub(super) fn digest(token: &str) -> [u8; 32] {
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
    let token = new_token()?;
    let text = format!(
        "# Tokens of this cache: one `<scope> <token> [<cache>]` a line, scope `read` or `write`\n\
         # (which includes reading). `flywheel cache token` makes, lists and revokes them.\nwrite {}\n",
        token.expose()
    );
    Ok(Secret::new(&text).expect("the text is not empty"))
}

/// Makes a random token.
pub(super) fn new_token() -> io::Result<Secret> {
    let mut bytes = [0_u8; TOKEN_BYTES];
    SystemRandom::new()
        .fill(&mut bytes)
        .map_err(|_| io::Error::other("the system gave no random bytes"))?;
    Ok(Secret::new(&hex(&bytes)).expect("a token is not empty"))
}

pub(super) fn hex(bytes: &[u8]) -> String {
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
pub(super) fn read_text(file: &Path) -> io::Result<String> {
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
    fn a_token_ends_and_may_be_kept_as_its_hash() {
        let line = |until: &str| {
            let hash = hex(&digest("hashed-token"));
            format!("write sha256:{hash} main until={until}\n")
        };
        let may =
            |text: &str| tokens(text).allow(secret("hashed-token").as_ref(), "main", Scope::Write);
        assert!(may(&line("2999-01-31T12:00:00Z")));
        assert!(!may(&line("2020-01-31T12:00:00+01:00")));
        let wired = |text: &str| Tokens::from_wire(&tokens(text).to_wire()).expect("well formed");
        let may =
            |text: &str| wired(text).allow(secret("hashed-token").as_ref(), "main", Scope::Write);
        assert!(may(&line("2999-01-31T12:00:00Z")));
        assert!(!may(&line("2020-01-31T12:00:00Z")));
        let (entry, token) = Entry::read(&line("2999-01-31T12:00:00Z"))
            .expect("well formed")
            .expect("not empty");
        assert!(token.is_none());
        assert_eq!(entry.line() + "\n", line("2999-01-31T12:00:00Z"));
        for bad in [
            "write sha256:00ff",
            "write writer-token until=tomorrow",
            "until=2999-01-31T12:00:00Z",
        ] {
            Entry::read(bad).expect_err(bad);
        }
        let ended = tokens("write plain-token until=2020-01-01T00:00:00Z\nwrite other-token");
        assert_eq!(ended.write_token().expect("one").expose(), "other-token");
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
