//! The folder for a run's temporary files: private to the user, removed however the run ends, and swept by the next
//! start if the run was killed.

use std::fs::{self, DirBuilder, File, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;

use rustix::process::geteuid;
use tempfile::TempDir;
use thiserror::Error;

use crate::host::disk::full_disk;
use crate::untrusted_file::{self, Owner};
use flywheel_core::exit::{Exit, Explain};

/// The name of a file in each run's folder that stays locked for as long as the run lives.
const ALIVE: &str = "alive";
const PREFIX: &str = "run-";
/// A folder that has no such file for this long belongs to a run that was killed while it made the folder.
const UNBORN_LIMIT: Duration = Duration::from_secs(60);

/// The folders to remove if the program panics: a release build aborts and runs no destructors.
static LIVING: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// Why there is no private folder.
#[derive(Debug, Error)]
pub enum PrivateError {
    #[error("no private folder could be made in `{folder}`")]
    Make {
        folder: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("`{file}` could not be written")]
    Write {
        file: PathBuf,
        #[source]
        source: io::Error,
    },
}

impl Explain for PrivateError {
    fn exit(&self) -> Exit {
        Exit::Host
    }

    fn hint(&self) -> Option<String> {
        let (Self::Make {
            folder: place,
            source,
        }
        | Self::Write {
            file: place,
            source,
        }) = self;
        let advice = "point `TMPDIR` (in a job: `RUNNER_TEMP`) to a folder";
        Some(match full_disk(source, place) {
            Some(disk) => format!("There is {disk}: free some, or {advice} on another disk."),
            None => format!("P{} that can be written to.", &advice[1..]),
        })
    }
}

/// A private temporary folder (0700). Removed when dropped.
#[derive(Debug)]
pub struct PrivateFolder {
    folder: TempDir,
    /// The lock marks the run as alive. The system releases it with the process, however that ends.
    _alive: File,
}

impl PrivateFolder {
    /// Creates a folder below `base`, and removes the folders of dead runs there.
    ///
    /// # Errors
    /// When `base` cannot be written to.
    pub fn create(base: &Path) -> Result<Self, PrivateError> {
        let ours = Self::shared(base)?;
        let make = |source| PrivateError::Make {
            folder: ours.clone(),
            source,
        };
        sweep_dead(&ours);
        let folder = tempfile::Builder::new()
            .prefix(PREFIX)
            .permissions(Permissions::from_mode(0o700))
            .tempdir_in(&ours)
            .map_err(make)?;
        let alive = locked_file(folder.path()).map_err(make)?;
        living().push(folder.path().to_owned());
        Ok(Self {
            folder,
            _alive: alive,
        })
    }

    /// The folder below `base` that all runs of this user share (0700), `flywheel-UID`. Created if it does not exist.
    /// Everybody can take that name where everybody can write, so another one follows it then, which later runs find by
    /// its owner.
    ///
    /// # Errors
    /// As for `create`.
    pub fn shared(base: &Path) -> Result<PathBuf, PrivateError> {
        let ours = base.join(format!("flywheel-{}", geteuid().as_raw()));
        let make = |source| PrivateError::Make {
            folder: ours.clone(),
            source,
        };
        match DirBuilder::new().mode(0o700).create(&ours) {
            Ok(()) => return Ok(ours),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => (),
            Err(source) => return Err(make(source)),
        }
        if is_own(&ours).map_err(make)? {
            return Ok(ours);
        }
        if let Some(found) = first_own(base) {
            return Ok(found);
        }
        let made = tempfile::Builder::new()
            .prefix(&format!("flywheel-{}-", geteuid().as_raw()))
            .permissions(Permissions::from_mode(0o700))
            .tempdir_in(base)
            .map_err(make)?;
        // Of two runs that make one at the same time, both take the one that later runs will find.
        match first_own(base) {
            Some(first) if first != made.path() => Ok(first),
            _ => Ok(made.keep()),
        }
    }

    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Writes a file into the folder.
    ///
    /// # Errors
    /// When its disk is full, or fails.
    pub fn write(&self, name: &str, text: &str) -> Result<PathBuf, PrivateError> {
        let file = self.path().join(name);
        match fs::write(&file, text) {
            Ok(()) => Ok(file),
            Err(source) => Err(PrivateError::Write { file, source }),
        }
    }
}

impl Drop for PrivateFolder {
    fn drop(&mut self) {
        living().retain(|folder| folder != self.folder.path());
    }
}

/// Removes every private folder of this process. For the panic hook.
pub fn remove_all() {
    // Not `lock`: the panic may have happened while the list was locked, and the hook must not hang.
    if let Ok(living) = LIVING.try_lock() {
        for folder in living.iter() {
            let _ = fs::remove_dir_all(folder);
        }
    }
}

fn living() -> std::sync::MutexGuard<'static, Vec<PathBuf>> {
    LIVING
        .lock()
        .expect("nothing panics while it holds this lock")
}

/// Whether a folder belongs to this user alone. A symbolic link is not followed: it could lead to a folder of another
/// user's choice.
fn is_own(folder: &Path) -> io::Result<bool> {
    let found = fs::symlink_metadata(folder)?;
    // The lowest six bits of the mode are the rights of the group and of others.
    Ok(found.is_dir() && found.uid() == geteuid().as_raw() && found.mode().trailing_zeros() >= 6)
}

/// The first folder of this user whose name follows a name that is taken.
fn first_own(base: &Path) -> Option<PathBuf> {
    let prefix = format!("flywheel-{}-", geteuid().as_raw());
    let entries = fs::read_dir(base).ok()?.flatten();
    let named = entries.filter(|entry| {
        let name = entry.file_name();
        name.to_str().is_some_and(|name| name.starts_with(&prefix))
    });
    named
        .map(|entry| entry.path())
        .filter(|folder| is_own(folder).unwrap_or(false))
        .min()
}

/// Makes the file that marks the run in `folder` as alive. It has its name only once it is locked, so that no sweep takes
/// the run for dead, and none has to be waited for.
fn locked_file(folder: &Path) -> io::Result<File> {
    let draft = folder.join(format!("{ALIVE}.draft"));
    let alive = File::create_new(&draft)?;
    // No other process knows this file, so its lock is free.
    alive.try_lock()?;
    fs::rename(&draft, folder.join(ALIVE))?;
    Ok(alive)
}

fn sweep_dead(ours: &Path) {
    for entry in fs::read_dir(ours).into_iter().flatten().flatten() {
        let named = entry
            .file_name()
            .to_str()
            .is_some_and(|name| name.starts_with(PREFIX));
        let dead = match untrusted_file::open(&entry.path().join(ALIVE), Owner::Own, 0) {
            Ok(alive) => alive.try_lock().is_ok(),
            // The run that makes this folder may still be alive, and a moment away from locking it.
            Err(error) if error.is_absence() => {
                let changed = entry.metadata().and_then(|found| found.modified());
                let age = changed.ok().and_then(|time| time.elapsed().ok());
                age.is_some_and(|age| age > UNBORN_LIMIT)
            }
            Err(_) => false,
        };
        if named && dead {
            // A folder that cannot be removed now is tried again at the next start.
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_private_and_goes_with_its_owner() {
        let base = tempfile::tempdir().expect("temporary folder");
        let private = PrivateFolder::create(base.path()).expect("made");
        let path = private.path().to_owned();
        assert_eq!(fs::metadata(&path).expect("there").mode() & 0o777, 0o700);
        drop(private);
        assert!(!path.exists());
    }

    #[test]
    fn the_dead_are_swept_and_the_living_are_not() {
        let base = tempfile::tempdir().expect("temporary folder");
        let living = PrivateFolder::create(base.path()).expect("made");
        let dead = living.path().with_file_name("run-dead");
        fs::create_dir(&dead).expect("made");
        fs::write(dead.join(ALIVE), "").expect("written");
        fs::write(dead.join("netrc"), "secret").expect("written");
        let unborn = |age: Duration| {
            let folder = living
                .path()
                .with_file_name(format!("run-unborn-{}", age.as_secs()));
            fs::create_dir(&folder).expect("made");
            let made = std::time::SystemTime::now() - age;
            File::open(&folder)
                .and_then(|open| open.set_modified(made))
                .expect("set");
            folder
        };
        let (young, old) = (unborn(Duration::ZERO), unborn(UNBORN_LIMIT * 2));
        let next = PrivateFolder::create(base.path()).expect("made");
        assert!(!dead.exists() && !old.exists());
        assert!(young.exists(), "its run may be about to lock it");
        assert!(living.path().exists() && next.path().exists());
    }

    #[test]
    fn a_name_that_is_taken_stops_no_run_and_all_runs_meet() {
        let base = tempfile::tempdir().expect("temporary folder");
        let taken = base.path().join(format!("flywheel-{}", geteuid().as_raw()));
        let prefix = format!("flywheel-{}-", geteuid().as_raw());
        let elsewhere = tempfile::tempdir().expect("temporary folder");
        // One that others can read stands for one of another user, which a test cannot make without being root.
        let takers: [&dyn Fn(); 3] = [
            &|| {
                fs::create_dir(&taken).expect("made");
                fs::set_permissions(&taken, Permissions::from_mode(0o755)).expect("set");
            },
            &|| std::os::unix::fs::symlink(elsewhere.path(), &taken).expect("linked"),
            &|| fs::write(&taken, "").expect("written"),
        ];
        // A folder that is not this user's alone is none, whatever its name.
        let open = base.path().join(format!("{prefix}0"));
        fs::create_dir(&open).expect("made");
        fs::set_permissions(&open, Permissions::from_mode(0o777)).expect("set");
        let mut shared = Vec::new();
        for take in takers {
            take();
            let run = PrivateFolder::create(base.path()).expect("made");
            let parent = run.path().parent().expect("it is below one").to_owned();
            assert!(is_own(&parent).expect("there") && parent != taken && parent != open);
            assert_eq!(PrivateFolder::shared(base.path()).expect("found"), parent);
            shared.push(parent);
            let _ = fs::remove_dir(&taken).or_else(|_| fs::remove_file(&taken));
        }
        assert!(
            shared.iter().all(|folder| *folder == shared[0]),
            "{shared:?}"
        );
        assert!(
            fs::read_dir(elsewhere.path())
                .expect("there")
                .next()
                .is_none()
        );
        assert!(fs::read_dir(&open).expect("there").next().is_none());
    }
}
