//! What an installation has put on this machine: a file in `/nix/var/flywheel`, written before each step. After a
//! kill it shows which files are left of that installation, and which were there before it.

use std::fs::{self, File, Permissions, TryLockError};
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::store_path::StorePath;
use flywheel_sys::untrusted_file::{self, FileError, Owner};

/// Far more than the names of the largest closure take.
const SIZE_LIMIT: u64 = 4 * 1024 * 1024;
const VERSION: u32 = 1;

/// What is there because Flywheel put it there. Nothing else is ever taken away.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Manifest {
    version: u32,
    /// Whether the installation came to its end.
    pub(crate) complete: bool,
    /// Where it came from, for people.
    pub(crate) source: String,
    /// The store path of Nix.
    pub(crate) nix: Option<StorePath>,
    /// The store paths that were not there before.
    pub(crate) paths: Vec<StorePath>,
    /// The folders that were not there before, outermost first.
    pub(crate) folders: Vec<PathBuf>,
    /// The symbolic links to Nix, which are roots of the garbage collector.
    pub(crate) links: Vec<PathBuf>,
}

impl Manifest {
    pub(super) fn new() -> Self {
        Self {
            version: VERSION,
            ..Self::default()
        }
    }

    /// The file for a store below `nix`.
    pub(crate) fn file(nix: &Path) -> PathBuf {
        nix.join("var/flywheel/installed.json")
    }

    /// Reads it; `None` if nothing was installed.
    ///
    /// # Errors
    /// When it cannot be read, another user can write to it, or it is of a newer version.
    pub(crate) fn read(nix: &Path) -> Result<Option<Self>, FileError> {
        let bytes = match untrusted_file::read(&Self::file(nix), Owner::Exclusive, SIZE_LIMIT) {
            Err(error) if error.is_absence() => return Ok(None),
            read => read?,
        };
        let invalid = |problem: String| io::Error::new(io::ErrorKind::InvalidData, problem);
        let read: Self =
            serde_json::from_slice(&bytes).map_err(|error| invalid(error.to_string()))?;
        if read.version == VERSION {
            Ok(Some(read))
        } else {
            Err(invalid(format!("it is of version {}", read.version)).into())
        }
    }

    /// Writes it. What was there before stays whole until the new one is.
    pub(crate) fn write(&self, nix: &Path) -> io::Result<()> {
        let fresh = Self::fresh_file(nix);
        // One at a time writes it, in a folder of its own.
        fs::write(&fresh, serde_json::to_vec_pretty(self)?)?;
        // It is read only if no other user can write to it.
        fs::set_permissions(&fresh, Permissions::from_mode(0o644))?;
        fs::rename(fresh, Self::file(nix))
    }

    /// Keeps what was installed from being taken back for as long as the file is open. `None` where nothing was, or
    /// another user's.
    pub(crate) fn hold(nix: &Path) -> Option<File> {
        let file = untrusted_file::open(&Self::file(nix), Owner::Exclusive, SIZE_LIMIT).ok()?;
        file.try_lock_shared().ok()?;
        Some(file)
    }

    /// Whether a job holds it.
    pub(crate) fn is_held(nix: &Path) -> bool {
        let file = untrusted_file::open(&Self::file(nix), Owner::Exclusive, SIZE_LIMIT);
        file.is_ok_and(|file| matches!(file.try_lock(), Err(TryLockError::WouldBlock)))
    }

    fn fresh_file(nix: &Path) -> PathBuf {
        Self::file(nix).with_extension("json.new")
    }

    /// Removes it.
    pub(crate) fn remove(nix: &Path) -> io::Result<()> {
        for file in [Self::fresh_file(nix), Self::file(nix)] {
            match fs::remove_file(file) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => (),
            }
        }
        Ok(())
    }
}
