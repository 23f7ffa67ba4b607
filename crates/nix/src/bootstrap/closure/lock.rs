//! One installation at a time: the lock on Flywheel's own folder, and the folders that an installation makes. The kernel
//! releases the lock with the process, however that ends.

use std::fs::{self, File, Permissions, TryLockError};
use std::io;
use std::os::unix::fs::{
    DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _,
};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::OFlags;
use tokio::time::{Instant, sleep};

use crate::bootstrap::closure::staging::StagingError;
use flywheel_core::progress::Sink;
use flywheel_sys::untrusted_file::FileError;

const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// Makes the folders for Flywheel's own state, adds to `folders` which were not there, and waits for the lock.
pub(super) async fn lock(
    nix: &Path,
    folders: &mut Vec<PathBuf>,
    sink: &Sink,
    deadline: Instant,
) -> Result<File, StagingError> {
    let own = nix.join("var/flywheel");
    let mut is_noted = false;
    loop {
        if let Some(lock) = try_lock(nix, &own, folders)? {
            return Ok(lock);
        }
        if Instant::now() >= deadline {
            return Err(StagingError::Busy);
        }
        if !is_noted {
            sink.note("another job on this machine installs Nix: waiting for it");
            is_noted = true;
        }
        sleep(POLL_INTERVAL).await;
    }
}

/// The lock on the folder itself, or `None` if another process has it.
fn try_lock(
    nix: &Path,
    own: &Path,
    folders: &mut Vec<PathBuf>,
) -> Result<Option<File>, StagingError> {
    for folder in [nix, &nix.join("var"), own, &nix.join("var/nix")] {
        // The store's state is made by Nix, and only noted.
        let is_missing = !exists(folder);
        let is_made = is_missing && (folder.ends_with("var/nix") || make_folder(folder)?);
        if is_made && !folders.iter().any(|known| known == folder) {
            folders.push(folder.to_owned());
        }
    }
    let failure = |source| StagingError::new(own.to_owned(), source);
    let opened = match open_folder(own) {
        // An installation that failed has just removed it.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened.map_err(failure)?,
    };
    let facts = opened.metadata().map_err(failure)?;
    if facts.uid() != rustix::process::geteuid().as_raw() {
        return Err(StagingError::Foreign {
            file: own.to_owned(),
            problem: FileError::Owner(facts.uid()),
        });
    }
    match opened.try_lock() {
        Ok(()) => (),
        Err(TryLockError::WouldBlock) => return Ok(None),
        Err(TryLockError::Error(source)) => return Err(failure(source)),
    }
    // An installation that failed removes its folder, and this may be the lock of that one.
    let current = fs::symlink_metadata(own);
    let is_current = current.is_ok_and(|current| current.ino() == facts.ino());
    Ok(is_current.then_some(opened))
}

/// Makes a folder; returns whether it was not there. Folders of Nix are no symbolic links.
pub(super) fn make_folder(folder: &Path) -> Result<bool, StagingError> {
    let failure = |source| StagingError::new(folder.to_owned(), source);
    let made = match fs::DirBuilder::new().mode(0o755).create(folder) {
        Ok(()) => true,
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => false,
        // Another installation that failed removes its folders.
        Err(error) => return Err(failure(error)),
    };
    if made {
        // Whatever the job's umask takes away.
        fs::set_permissions(folder, Permissions::from_mode(0o755)).map_err(failure)?;
    }
    Ok(made)
}

pub(super) fn open_folder(folder: &Path) -> io::Result<File> {
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW;
    fs::OpenOptions::new()
        .read(true)
        .custom_flags(flags.bits().cast_signed())
        .open(folder)
}

/// Whether something has this name, a dangling link included.
pub(super) fn exists(file: &Path) -> bool {
    fs::symlink_metadata(file).is_ok()
}
