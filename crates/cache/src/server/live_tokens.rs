//! The tokens that are in force: read anew when their file changes, so that a revoked one ends without a restart.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, SystemTime};

use crate::server::token::{TokenError, Tokens};

/// Time between two looks at the file.
pub(super) const POLL_INTERVAL: Duration = Duration::from_secs(1);

/// What shows that a file is another one, or was written to.
type Stamp = (u64, u64, u64, Option<SystemTime>);

#[derive(Clone, Debug)]
pub(crate) struct LiveTokens(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    /// `None` for the tokens of another process.
    file: Option<PathBuf>,
    current: RwLock<Arc<Tokens>>,
    read: Mutex<Option<Stamp>>,
}

impl LiveTokens {
    /// The tokens of a file, which are read anew when it has changed since `stamp`.
    pub(crate) fn of_file(file: &Path, stamp: Option<Stamp>, tokens: Tokens) -> Self {
        Self::new(Some(file.to_owned()), stamp, tokens)
    }

    /// Tokens without a file here.
    pub(crate) fn fixed(tokens: Tokens) -> Self {
        Self::new(None, None, tokens)
    }

    fn new(file: Option<PathBuf>, stamp: Option<Stamp>, tokens: Tokens) -> Self {
        Self(Arc::new(Inner {
            file,
            current: RwLock::new(Arc::new(tokens)),
            read: Mutex::new(stamp),
        }))
    }

    pub(crate) fn current(&self) -> Arc<Tokens> {
        let current = self.0.current.read();
        Arc::clone(&current.unwrap_or_else(PoisonError::into_inner))
    }

    /// Reads the file if it has changed. `true` if its tokens are in force now and were not before. A file that cannot be
    /// read leaves the tokens as they are, and is reported once.
    ///
    /// # Errors
    /// When the file has changed and cannot be read.
    pub(crate) fn refresh(&self) -> Result<bool, TokenError> {
        let Some(file) = &self.0.file else {
            return Ok(false);
        };
        let mut read = self.0.read.lock().unwrap_or_else(PoisonError::into_inner);
        let found = stamp(file).ok();
        if *read == found {
            return Ok(false);
        }
        *read = found;
        let tokens = Arc::new(Tokens::open(file)?);
        let current = self.0.current.write();
        *current.unwrap_or_else(PoisonError::into_inner) = tokens;
        Ok(true)
    }
}

/// The stamp of a file, to be taken before the file is read.
pub(crate) fn stamp(file: &Path) -> io::Result<Stamp> {
    let about = fs::metadata(file)?;
    let stamp = (about.dev(), about.ino(), about.len(), about.modified().ok());
    Ok(stamp)
}
