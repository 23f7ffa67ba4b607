//! Changes of a tokens file: a new token, of which the file keeps the hash; the list; the end of one. A change is written
//! whole or not at all, one at a time, and a server that uses the file reads it anew.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::{MetadataExt as _, fchown};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use chrono::{DateTime, SecondsFormat, TimeDelta, Utc};
use thiserror::Error;

use crate::server::folder::open_at_once;
use crate::server::token::{Entry, Scope, TokenError, digest, hex, new_token, now, read_text};
use flywheel_core::exit::{Exit, Explain};
use flywheel_core::secret::Secret;
use flywheel_nix::cache_name::CacheName;

/// Hexadecimal digits of a token's hash that name it.
const ID_DIGITS: usize = 8;
/// Another change of the file takes milliseconds.
const LOCK_LIMIT: Duration = Duration::from_secs(5);
const LOCK_PAUSE: Duration = Duration::from_millis(20);

/// Why a tokens file is not changed or shown.
#[derive(Debug, Error)]
pub enum TokenFileError {
    #[error(transparent)]
    Tokens(#[from] TokenError),
    #[error("the tokens file `{}` cannot be changed", file.display())]
    Change {
        file: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the tokens file `{}` has no token `{id}`", file.display())]
    Unknown { file: PathBuf, id: String },
}

impl Explain for TokenFileError {
    fn exit(&self) -> Exit {
        match self {
            Self::Unknown { .. } => Exit::Failed,
            Self::Tokens(_) | Self::Change { .. } => Exit::Host,
        }
    }

    fn hint(&self) -> Option<String> {
        match self {
            Self::Tokens(error) => Some(error.hint()),
            Self::Change { .. } => Some("Let this user write to the file and its folder.".into()),
            Self::Unknown { .. } => {
                Some("`flywheel cache token list` shows the names of all.".into())
            }
        }
    }
}

/// A token as it may be shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListedToken {
    /// The first digits of its hash.
    pub id: String,
    pub scope: Scope,
    /// `None`: every cache.
    pub cache: Option<CacheName>,
    /// When it ends, in RFC 3339; `None`: it has no end.
    pub expires: Option<String>,
    pub has_ended: bool,
    /// Whether the file holds the token itself.
    pub is_plain: bool,
}

impl ListedToken {
    fn new(entry: Entry, is_plain: bool) -> Self {
        Self {
            id: id(&entry),
            scope: entry.scope,
            cache: entry.cache,
            expires: entry
                .expires
                .map(|end| end.to_rfc3339_opts(SecondsFormat::Secs, true)),
            has_ended: entry.expires.is_some_and(|end| end <= now()),
            is_plain,
        }
    }
}

/// A tokens file.
#[derive(Debug)]
pub struct TokenFile(PathBuf);

impl TokenFile {
    /// The file of this name, which has to exist for everything that is done with it.
    ///
    /// # Errors
    /// When there is no such file.
    pub fn open(file: &Path) -> io::Result<Self> {
        // Behind a link, the file itself is to be replaced and not the link.
        Ok(Self(fs::canonicalize(file)?))
    }

    /// All tokens, in the order of the file.
    ///
    /// # Errors
    /// When the file cannot be read, or a line is malformed.
    pub fn list(&self) -> Result<Vec<ListedToken>, TokenFileError> {
        let lines = self.lines()?.into_iter();
        Ok(lines.filter_map(|(_, token)| token).collect())
    }

    /// Adds a token, and returns it with its name. The file gets its hash alone.
    ///
    /// # Errors
    /// When the file cannot be read or written.
    pub fn add(
        &self,
        scope: Scope,
        cache: Option<CacheName>,
        lifetime: Option<Duration>,
    ) -> Result<(Secret, ListedToken), TokenFileError> {
        let token = new_token().map_err(|source| self.unchanged(source))?;
        let entry = Entry {
            digest: digest(token.expose()),
            scope,
            cache,
            expires: lifetime.map(end_of),
        };
        let line = entry.line();
        self.change(|lines| {
            lines.push(line);
            Ok(())
        })?;
        Ok((token, ListedToken::new(entry, false)))
    }

    /// Removes the token of this name.
    ///
    /// # Errors
    /// When there is none, or the file cannot be read or written.
    pub fn revoke(&self, id: &str) -> Result<ListedToken, TokenFileError> {
        let mut revoked = None;
        self.change(|lines| {
            let known = self.lines()?;
            let is_named = |token: &Option<ListedToken>| token.as_ref().is_some_and(|t| t.id == id);
            let found = known.into_iter().find(|(_, token)| is_named(token));
            let Some((number, Some(token))) = found else {
                return Err(TokenFileError::Unknown {
                    file: self.0.clone(),
                    id: id.to_owned(),
                });
            };
            lines.remove(number);
            revoked = Some(token);
            Ok(())
        })?;
        Ok(revoked.expect("the change found it"))
    }

    /// Every line's number, from 0, with its token if it has one.
    fn lines(&self) -> Result<Vec<(usize, Option<ListedToken>)>, TokenFileError> {
        let text = self.text()?;
        let lines = text.expose().lines().enumerate().map(|(number, line)| {
            let read = Entry::read(line).map_err(|problem| TokenError::Line {
                file: self.0.clone(),
                line: number + 1,
                problem,
            })?;
            let token = read.map(|(entry, plain)| ListedToken::new(entry, plain.is_some()));
            Ok((number, token))
        });
        lines.collect()
    }

    fn text(&self) -> Result<Secret, TokenFileError> {
        let text = read_text(&self.0).map_err(|source| TokenError::File {
            file: self.0.clone(),
            source,
        })?;
        // A file without a single token is as good as a comment.
        Ok(Secret::new(&text).unwrap_or_else(|| Secret::new("#").expect("not empty")))
    }

    /// Changes the lines while no other process does, and puts the file in place in one step.
    fn change(
        &self,
        change: impl FnOnce(&mut Vec<String>) -> Result<(), TokenFileError>,
    ) -> Result<(), TokenFileError> {
        let locked = self.lock().map_err(|source| self.unchanged(source))?;
        // A malformed file is for its owner to mend.
        self.lines()?;
        let text = self.text()?;
        let mut lines: Vec<String> = text.expose().lines().map(str::to_owned).collect();
        change(&mut lines)?;
        let text = Secret::new(&lines.join("\n"));
        let text = text.as_ref().map_or("#", Secret::expose);
        self.replace(&locked, text)
            .map_err(|source| self.unchanged(source))
    }

    /// Locks the file that has the name now: the one that was opened may have been replaced before it was locked.
    fn lock(&self) -> io::Result<File> {
        let until = Instant::now() + LOCK_LIMIT;
        loop {
            let file = open_at_once(&self.0)?;
            match file.try_lock() {
                Ok(()) if file.metadata()?.ino() == fs::metadata(&self.0)?.ino() => {
                    return Ok(file);
                }
                Ok(()) => (),
                Err(fs::TryLockError::Error(error)) => return Err(error),
                Err(fs::TryLockError::WouldBlock) => {
                    if Instant::now() >= until {
                        return Err(io::Error::other("another process is changing it"));
                    }
                    std::thread::sleep(LOCK_PAUSE);
                }
            }
        }
    }

    fn replace(&self, old: &File, text: &str) -> io::Result<()> {
        let folder = self.0.parent().unwrap_or(Path::new("/"));
        // Its mode is 0600 from the start.
        let mut new = tempfile::NamedTempFile::new_in(folder)?;
        new.write_all(text.as_bytes())?;
        new.write_all(b"\n")?;
        let (was, is) = (old.metadata()?, new.as_file().metadata()?);
        if (was.uid(), was.gid()) != (is.uid(), is.gid()) {
            // The server's user has to read it, where root makes the change.
            fchown(new.as_file(), Some(was.uid()), Some(was.gid()))?;
        }
        new.as_file().sync_all()?;
        new.persist(&self.0)?;
        Ok(())
    }

    fn unchanged(&self, source: io::Error) -> TokenFileError {
        TokenFileError::Change {
            file: self.0.clone(),
            source,
        }
    }
}

fn id(entry: &Entry) -> String {
    hex(&entry.digest)[..ID_DIGITS].to_owned()
}

fn end_of(lifetime: Duration) -> DateTime<Utc> {
    let lifetime = TimeDelta::from_std(lifetime).unwrap_or(TimeDelta::MAX);
    now()
        .checked_add_signed(lifetime)
        .unwrap_or(DateTime::<Utc>::MAX_UTC)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::token::Tokens;

    fn file(text: &str) -> (tempfile::TempDir, TokenFile) {
        let folder = tempfile::tempdir().expect("temporary folder");
        let path = folder.path().join("tokens");
        fs::write(&path, text).expect("writable");
        let file = TokenFile::open(&path).expect("there");
        (folder, file)
    }

    #[test]
    fn a_new_token_is_kept_as_its_hash_and_ends_when_it_is_revoked() {
        let (_folder, file) = file("# kept\nwrite old-plain-token\n");
        let name = "main".parse().ok();
        let (token, listed) = file
            .add(Scope::Read, name, Some(Duration::from_secs(3600)))
            .expect("added");
        let text = fs::read_to_string(&file.0).expect("readable");
        assert!(text.starts_with("# kept\nwrite old-plain-token\nread sha256:"));
        assert!(!text.contains(token.expose()));
        let allows = |scope| {
            let tokens = Tokens::open(&file.0).expect("well formed");
            tokens.allow(Some(&token), "main", scope)
        };
        assert_eq!((allows(Scope::Read), allows(Scope::Write)), (true, false));
        let all = file.list().expect("well formed");
        assert_eq!(all.len(), 2);
        assert!(all[0].is_plain && all[0].expires.is_none());
        assert_eq!(all[1], listed);
        file.revoke(&listed.id).expect("there");
        assert!(!allows(Scope::Read));
        let error = file.revoke(&listed.id).expect_err("gone").to_string();
        assert!(
            error.ends_with(&format!("no token `{}`", listed.id)),
            "{error}"
        );
        file.revoke(&all[0].id).expect("old lines have names, too");
        assert_eq!(fs::read_to_string(&file.0).expect("readable"), "# kept\n");
    }

    #[test]
    fn changes_at_once_are_made_one_after_another() {
        let (_folder, file) = file("write old-plain-token\n");
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| file.add(Scope::Read, None, None).expect("added"));
            }
        });
        assert_eq!(file.list().expect("well formed").len(), 9);
    }

    #[test]
    fn a_pipe_in_its_place_is_not_waited_for() {
        let (_folder, file) = file("");
        fs::remove_file(&file.0).expect("there");
        let (fifo, mode) = (rustix::fs::FileType::Fifo, 0o600.into());
        rustix::fs::mknodat(rustix::fs::CWD, &file.0, fifo, mode, 0).expect("made");
        file.list().expect_err("no file");
        file.add(Scope::Read, None, None).expect_err("no file");
    }

    #[test]
    fn a_malformed_file_is_left_alone() {
        let (_folder, file) = file("wrote old-plain-token\n");
        file.add(Scope::Read, None, None).expect_err("malformed");
        let text = fs::read_to_string(&file.0).expect("readable");
        assert_eq!(text, "wrote old-plain-token\n");
    }
}
