//! The cache's folder: its lock, its layout, and how files become visible atomically.
//!
//! ```text
//! lock                              held by the one process that uses the folder
//! tokens                            who may read and write (0600)
//! keys/<cache>.secret               signing keys in Nix's format (0600)
//! nars/<nar hash>.nar.zst           each NAR once, for all caches
//! caches/<cache>/<hash>.narinfo     a path's metadata; its modification time is its last use
//! caches/<cache>/nars/<nar hash>    a link to the NAR, or empty: this cache may serve it
//! caches/<cache>/uploads/<name>     which NAR `nix copy` has sent under this name
//! synced                            the last epoch that is completely on disk, see `durable`
//! socket                            other processes reach the one with the lock here, see `host`
//! tmp/                              unfinished files; swept at every start
//! ```

use std::fs::{DirBuilder, File, TryLockError};
use std::io::{self, Write as _};
use std::ops::Deref;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;
use thiserror::Error;

use flywheel_core::exit::{Exit, Explain};
use flywheel_nix::cache_name::CacheName;
use flywheel_nix::hash::Sha256;
use flywheel_nix::store_path::PathHash;
use flywheel_sys::untrusted_file::{self, FileError, Owner};

/// Far more than any of the folder's small files has: narinfos, records of uploads, `synced`.
const SMALL_LIMIT: u64 = 16 << 20;

/// The bit of a mode that lets every user write.
const OTHERS_WRITE: u32 = 0o002;

#[derive(Debug, Error)]
pub enum FolderError {
    #[error("the folder `{}` is in use by another `flywheel cache`", .0.display())]
    InUse(PathBuf),
    /// The process that serves it cannot be joined.
    #[error("the folder `{}` is in use by another process, {reason}", folder.display())]
    NotJoined { folder: PathBuf, reason: String },
    /// Its content is for another user to change, keys and tokens included.
    #[error("the folder `{}` belongs to another user (uid {uid})", folder.display())]
    Foreign { folder: PathBuf, uid: u32 },
    /// Every user can put files into it.
    #[error("the folder `{}` can be written by every user (mode {mode:o})", folder.display())]
    Writable { folder: PathBuf, mode: u32 },
    /// It cannot be created, read or written.
    #[error("the folder `{}` cannot be used", folder.display())]
    Unusable {
        folder: PathBuf,
        #[source]
        source: io::Error,
    },
}

impl Explain for FolderError {
    fn exit(&self) -> Exit {
        Exit::Host
    }

    fn hint(&self) -> Option<String> {
        Some(match self {
            Self::InUse(_) => {
                "A folder has one server, which also collects its garbage: stop that server, or \
                               give another folder with `--dir`."
                    .to_owned()
            }
            Self::NotJoined { .. } => {
                "Jobs of one user share a folder. End the process that holds it, or give another \
                               folder."
                    .to_owned()
            }
            Self::Foreign { .. } => {
                "Use a folder of this user's own, since what another user can write is no cache to trust."
                    .to_owned()
            }
            Self::Writable { folder, .. } => {
                format!("Make it this user's own: `chmod 700 {}`.", folder.display())
            }
            Self::Unusable { .. } => {
                "Use `--dir` to name a folder that this user can write to.".to_owned()
            }
        })
    }
}

/// Where everything in a cache's folder is. Needs no lock.
#[derive(Clone, Debug)]
pub(crate) struct Layout {
    root: PathBuf,
}

/// A folder that only this process uses while this value lives.
#[derive(Debug)]
pub(crate) struct Folder {
    layout: Layout,
    _lock: File,
}

impl Deref for Folder {
    type Target = Layout;

    fn deref(&self) -> &Layout {
        &self.layout
    }
}

impl Folder {
    /// Creates the folder if it is missing (0700), locks it, and removes what a killed process
    /// left.
    ///
    /// # Errors
    /// When another process holds the lock, or the folder cannot be written.
    pub(crate) fn open(root: &Path, caches: &[CacheName]) -> Result<Self, FolderError> {
        let unusable = |source| FolderError::Unusable {
            folder: root.to_owned(),
            source,
        };
        // The lock file lies inside the folder, so the folder must exist first.
        let layout = Layout::open(root)?;
        let lock = open_lock(&root.join("lock")).map_err(unusable)?;
        // The kernel releases the lock when the process ends, however it ends.
        match lock.try_lock() {
            Ok(()) => (),
            Err(TryLockError::WouldBlock) => return Err(FolderError::InUse(root.to_owned())),
            Err(TryLockError::Error(source)) => return Err(unusable(source)),
        }
        let folder = Self {
            layout,
            _lock: lock,
        };
        folder.prepare(caches).map_err(unusable)?;
        Ok(folder)
    }

    fn prepare(&self, caches: &[CacheName]) -> io::Result<()> {
        let tmp = self.root.join("tmp");
        // Holding the lock, so these files belong to a dead process.
        match std::fs::remove_dir_all(&tmp) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => (),
        }
        make_folder(&tmp)?;
        prepare_caches(self, caches)
    }
}

impl Layout {
    /// Creates the folder if it is missing (0700).
    ///
    /// # Errors
    /// When it cannot be created, belongs to another user, or is open to every user.
    pub(crate) fn open(root: &Path) -> Result<Self, FolderError> {
        let unusable = |source| FolderError::Unusable {
            folder: root.to_owned(),
            source,
        };
        make_folder(root).map_err(unusable)?;
        let uid = std::fs::metadata(root).map_err(unusable)?.uid();
        let own = rustix::process::geteuid();
        // Root is allowed: in a container it often works in a folder that was mounted from outside.
        if uid != own.as_raw() && !own.is_root() {
            return Err(FolderError::Foreign {
                folder: root.to_owned(),
                uid,
            });
        }
        let layout = Self {
            root: root.to_owned(),
        };
        layout.check_modes()?;
        Ok(layout)
    }

    /// Whoever can write into the folder can serve what they like, under this cache's signature.
    fn check_modes(&self) -> Result<(), FolderError> {
        let below = ["keys", "nars", "caches"].map(|name| self.root.join(name));
        for folder in std::iter::once(&self.root).chain(&below) {
            match std::fs::metadata(folder).map(|about| about.mode() & 0o7777) {
                Ok(mode) if mode & OTHERS_WRITE != 0 => {
                    return Err(FolderError::Writable {
                        folder: folder.clone(),
                        mode,
                    });
                }
                // What is missing will be created.
                Ok(_) | Err(_) => (),
            }
        }
        Ok(())
    }

    /// Returns the caches that have a folder here, sorted.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub(crate) fn caches(&self) -> io::Result<Vec<CacheName>> {
        let mut names = Vec::new();
        for entry in entries(&self.root.join("caches"))? {
            names.extend(
                entry?
                    .file_name()
                    .to_str()
                    // A folder with an invalid name is not one of ours.
                    .and_then(|name| name.parse().ok()),
            );
        }
        names.sort();
        Ok(names)
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// The socket of the process that holds the lock.
    pub(crate) fn socket(&self) -> PathBuf {
        self.root.join("socket")
    }

    /// A name in the folder of unfinished files, for what a process makes only once.
    pub(crate) fn unfinished(&self, name: &str) -> PathBuf {
        self.root.join("tmp").join(name)
    }

    /// The file that names the last synced epoch.
    pub(crate) fn synced(&self) -> PathBuf {
        self.root.join("synced")
    }

    pub(crate) fn tokens(&self) -> PathBuf {
        self.root.join("tokens")
    }

    /// The file with a cache's signing key.
    pub(crate) fn key(&self, cache: &CacheName) -> PathBuf {
        self.root.join("keys").join(format!("{cache}.secret"))
    }

    /// The folder of all NARs.
    pub(crate) fn nars(&self) -> PathBuf {
        self.root.join("nars")
    }

    /// The file of a compressed NAR.
    pub(crate) fn nar(&self, hash: &Sha256) -> PathBuf {
        self.nars().join(nar_name(hash))
    }

    /// The folder of a cache, with its narinfos and two subfolders.
    pub(crate) fn objects(&self, cache: &CacheName) -> PathBuf {
        self.root.join("caches").join(cache.as_str())
    }

    /// The narinfo of a path.
    pub(crate) fn object(&self, cache: &CacheName, hash: &PathHash) -> PathBuf {
        self.objects(cache).join(format!("{hash}.narinfo"))
    }

    /// The folder of markers for the NARs that a cache may serve.
    pub(crate) fn markers(&self, cache: &CacheName) -> PathBuf {
        self.objects(cache).join("nars")
    }

    /// The marker of one NAR.
    pub(crate) fn marker(&self, cache: &CacheName, hash: &Sha256) -> PathBuf {
        self.markers(cache).join(hash.base32())
    }

    /// The folder of notes on the names of uploaded NARs; the NARs themselves are in `nars`.
    pub(crate) fn uploads(&self, cache: &CacheName) -> PathBuf {
        self.objects(cache).join("uploads")
    }

    /// Creates a temporary file, which is deleted when dropped.
    ///
    /// # Errors
    /// When it cannot be created.
    pub(crate) fn temporary(&self) -> io::Result<NamedTempFile> {
        // On the same file system as its target, so that renaming works.
        NamedTempFile::new_in(self.root.join("tmp"))
    }

    /// Writes a small file atomically: a reader sees all of it or nothing.
    ///
    /// # Errors
    /// When the disk fails; then nothing has changed.
    pub(crate) fn write_whole(&self, file: &Path, text: &str) -> io::Result<()> {
        self.write(file, text, false)
    }

    /// Like `write_whole`, and atomic across a power cut, too.
    ///
    /// # Errors
    /// When the disk fails. The file may then be the new one already, without being durable.
    pub(crate) fn write_synced(&self, file: &Path, text: &str) -> io::Result<()> {
        self.write(file, text, true)?;
        sync_parent(file)
    }

    fn write(&self, file: &Path, text: &str, sync: bool) -> io::Result<()> {
        // Written elsewhere and renamed: renaming is atomic.
        let mut temporary = self.temporary()?;
        temporary.write_all(text.as_bytes())?;
        if sync {
            // The content must be on disk before its name is.
            temporary.as_file().sync_all()?;
        }
        temporary.persist(file)?;
        Ok(())
    }
}

/// Creates the folders of caches. Needs no lock.
///
/// # Errors
/// When the disk fails.
pub(crate) fn prepare_caches(layout: &Layout, caches: &[CacheName]) -> io::Result<()> {
    make_folder(&layout.root.join("keys"))?;
    make_folder(&layout.nars())?;
    for cache in caches {
        make_folder(&layout.markers(cache))?;
        make_folder(&layout.uploads(cache))?;
    }
    Ok(())
}

fn open_lock(file: &Path) -> io::Result<File> {
    // The file's content does not matter, and another process may hold its lock.
    Ok(untrusted_file::open_to_write(
        file,
        Owner::Any,
        u64::MAX,
        false,
    )?)
}

/// A NAR's file name, on disk and in URLs.
pub(crate) fn nar_name(hash: &Sha256) -> String {
    format!("{}.nar.zst", hash.base32())
}

/// Lists a folder; empty if it does not exist.
///
/// # Errors
/// When it cannot be read.
pub(crate) fn entries(
    folder: &Path,
) -> io::Result<Box<dyn Iterator<Item = io::Result<std::fs::DirEntry>>>> {
    match std::fs::read_dir(folder) {
        Ok(entries) => Ok(Box::new(entries)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Box::new(std::iter::empty())),
        Err(error) => Err(error),
    }
}

/// Reads a small file of the folder. What is no regular file there, or far too large for one of ours, has no content: so
/// it counts as torn, and is replaced by the next one that is written in its place.
///
/// # Errors
/// When it is missing, or the disk fails.
pub(crate) fn read_small(file: &Path) -> io::Result<Vec<u8>> {
    match untrusted_file::read(file, Owner::Any, SMALL_LIMIT) {
        Ok(bytes) => Ok(bytes),
        Err(FileError::System(error)) => Err(error),
        Err(_) => Ok(Vec::new()),
    }
}

/// Opens a file or folder to read, without waiting for the other end of a named pipe.
///
/// # Errors
/// As `File::open`.
pub(crate) fn open_at_once(file: &Path) -> io::Result<File> {
    let flags = rustix::fs::OFlags::NONBLOCK | rustix::fs::OFlags::NOCTTY;
    let mut options = File::options();
    options.read(true).custom_flags(flags.bits().cast_signed());
    options.open(file)
}

/// Makes a rename survive a power cut.
///
/// # Errors
/// When the folder cannot be synced.
pub(crate) fn sync_parent(file: &Path) -> io::Result<()> {
    file.parent()
        .map_or(Ok(()), |folder| File::open(folder)?.sync_all())
}

fn make_folder(folder: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(folder)
}

/// Opens a folder once its lock is free. A process that another test is starting inherits our lock
/// until it executes another program.
#[cfg(test)]
pub(super) fn when_free<T, E: std::fmt::Debug>(
    open: impl Fn() -> Result<T, E>,
    in_use: impl Fn(&E) -> bool,
) -> T {
    let begun = std::time::Instant::now();
    loop {
        match open() {
            Err(error) if in_use(&error) && begun.elapsed().as_secs() < 20 => {
                std::thread::park_timeout(std::time::Duration::from_millis(2));
            }
            opened => return opened.expect("nobody has it"),
        }
    }
}
