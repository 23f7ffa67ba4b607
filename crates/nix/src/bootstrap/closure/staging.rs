//! The way of store paths to their place: into a folder beside it, and then by renaming, all at once where there was no
//! store. Whatever the moment at which it is killed, no Nix can be found before all of it is there, and the next
//! installation takes away what is left. Only one process installs at a time.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;
use tokio::time::{Instant, sleep};

use crate::bootstrap::closure::lock::{exists, lock, make_folder, open_folder};
use crate::bootstrap::closure::manifest::Manifest;
use crate::bootstrap::closure::present::{can_be_of_others, nar_hash};
use crate::bootstrap::closure::register::{self, Registration};
use crate::db::{self, Db};
use crate::hash::Sha256;
use crate::nar::unpack::{remove_tree, seal};
use crate::narinfo::NarInfo;
use crate::store_path::StorePath;
use flywheel_core::exit::{Exit, Explain};
use flywheel_core::progress::Sink;
use flywheel_core::text;
use flywheel_sys::untrusted_file::FileError;

/// Free room that is left over, in bytes, for the database and for what the job does first.
const ROOM: u64 = 16 * 1024 * 1024;
/// How long the threads that unpack may take to notice that nothing more comes.
const THREADS_LIMIT: Duration = Duration::from_secs(10);
const THREADS_POLL_INTERVAL: Duration = Duration::from_millis(2);
/// Profiles at which others look for Nix. The second is Flywheel's own: `nix-env` may put another generation into the
/// first, without Nix in it.
const PROFILES: [&str; 2] = ["var/nix/profiles/default", "var/nix/profiles/flywheel"];
/// Where the paths are until all are there: a folder that becomes the store, or one inside of a store that is there.
const NEW_STORE: &str = "store.partial";
const INSIDE_STORE: &str = "store/.flywheel-partial";

/// What this machine did not let happen.
#[derive(Debug, Error)]
pub(crate) enum StagingError {
    #[error("`{file}` could not be written")]
    Write {
        file: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the disk is full: `{folder}` has {} left, and {} are needed", text::bytes(*.room), text::bytes(*.needed))]
    Full {
        folder: PathBuf,
        /// In bytes.
        room: u64,
        needed: u64,
    },
    /// It became full while it was written to.
    #[error("the disk is full: `{file}` could not be written")]
    NoRoom { file: PathBuf, source: io::Error },
    #[error("`{file}` {problem}")]
    Foreign { file: PathBuf, problem: FileError },
    #[error("another installation of Nix on this machine has not ended in time")]
    Busy,
    /// There is no database that says what it is, and it is not what is installed.
    #[error("`{0}` exists with another content, and no database of Nix knows it")]
    Occupied(PathBuf),
    /// It is valid, and of another user.
    #[error("`{0}` is not what was signed, and another user of this machine can have written it")]
    Altered(PathBuf),
    #[error(transparent)]
    Database(#[from] db::Error),
    #[error("the Nix that has just arrived does not work: {0}")]
    Register(String),
}

impl Explain for StagingError {
    fn exit(&self) -> Exit {
        Exit::Host
    }

    fn hint(&self) -> Option<String> {
        let hint = match self {
            Self::Full { .. } | Self::NoRoom { .. } => "Give the runner more disk, or free some.",
            Self::Write { .. } | Self::Foreign { .. } => {
                "Give `/nix` with all that is in it to the job's user, or put Nix into the runner's image."
            }
            Self::Busy => "Look for an installation that hangs on the runner.",
            Self::Occupied(_) => {
                "Remove it, or mount the folder with the database of this store as well."
            }
            Self::Altered(_) => "Remove it, and find out who can write to `/nix` on the runner.",
            Self::Database(_) => "Remove the damaged store, or repair it.",
            Self::Register(_) => "Name another Nix by `nix-version`.",
        };
        Some(hint.to_owned())
    }
}

impl StagingError {
    pub(super) fn new(file: PathBuf, source: io::Error) -> Self {
        if matches!(
            source.kind(),
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
        ) {
            Self::NoRoom { file, source }
        } else {
            Self::Write { file, source }
        }
    }
}

/// What an installation begins with.
pub(crate) enum Entered {
    /// Another job installed Nix while this one waited; holds the path of its program.
    Installed(PathBuf),
    Staging(Box<Staging>),
}

/// When the steps of `complete` had ended.
pub(crate) struct Times {
    pub(crate) placed: Instant,
    pub(crate) registered: Instant,
}

/// A folder that store paths are unpacked into, and the right to give them their place. Dropping it removes what is in
/// it.
pub(crate) struct Staging {
    nix: PathBuf,
    folder: StagingFolder,
    /// Whether the folder becomes the store.
    becomes_store: bool,
    manifest: Manifest,
    /// The valid paths of the store that is there.
    database: Option<Db>,
    /// Free room when it began, in bytes.
    room: u64,
    is_over: bool,
}

/// The folder, for a thread that unpacks. While one exists, no other installation begins.
#[derive(Clone)]
pub(crate) struct StagingFolder {
    path: PathBuf,
    /// Its clones count the threads that are at work.
    lock: Arc<File>,
}

impl StagingFolder {
    /// # Errors
    /// When it is gone.
    pub(crate) fn folder(&self) -> io::Result<OwnedFd> {
        open_folder(&self.path).map(Into::into)
    }

    pub(crate) fn failure(&self, source: io::Error) -> StagingError {
        StagingError::new(self.path.clone(), source)
    }

    /// The failure of a file somewhere below it.
    pub(crate) fn failure_at(&self, name: &str, source: io::Error) -> StagingError {
        StagingError::new(self.path.join(name), source)
    }
}

impl Staging {
    /// Waits until no other installation is under way, and begins one below `nix`.
    ///
    /// # Errors
    /// When the folder cannot be written to, or another one does not end before `deadline`.
    pub(crate) async fn enter(
        nix: &Path,
        sink: &Sink,
        deadline: Instant,
    ) -> Result<Entered, StagingError> {
        let mut folders = Vec::new();
        let lock = Self::lock(nix, &mut folders, sink, deadline).await?;
        let nix = nix.to_owned();
        blocking(move || {
            if let Some(program) = installed(&nix) {
                return Ok(Entered::Installed(program));
            }
            Self::begin(nix, folders, lock).map(|staging| Entered::Staging(Box::new(staging)))
        })
        .await
    }

    /// Waits until no other installation is under way, nor a Nix at work that a killed one has started. None begins while
    /// the file is open. Adds to `folders` which were not there and had to be made.
    ///
    /// # Errors
    /// As `enter`.
    pub(crate) async fn lock(
        nix: &Path,
        folders: &mut Vec<PathBuf>,
        sink: &Sink,
        deadline: Instant,
    ) -> Result<File, StagingError> {
        let lock = lock(nix, folders, sink, deadline).await?;
        register::wait_for_orphan(nix, deadline).await?;
        Ok(lock)
    }

    fn begin(nix: PathBuf, folders: Vec<PathBuf>, lock: File) -> Result<Self, StagingError> {
        let mut manifest = Manifest::new();
        let left = left_over(&nix)?;
        manifest.folders = left.folders;
        manifest
            .folders
            .retain(|folder| folder.is_dir() && !folders.contains(folder));
        manifest.folders.splice(0..0, folders);
        manifest.paths = left.paths;
        manifest
            .paths
            .retain(|path| exists(&nix.join("store").join(path.base_name())));
        let becomes_store = !exists(&nix.join("store"));
        let path = nix.join(if becomes_store {
            NEW_STORE
        } else {
            INSIDE_STORE
        });
        let mut staging = Self {
            database: open_database(&nix)?,
            folder: StagingFolder {
                path: path.clone(),
                lock: Arc::new(lock),
            },
            becomes_store,
            manifest,
            room: 0,
            is_over: false,
            nix,
        };
        staging.write_manifest()?;
        make_folder(&path)?;
        staging.room = room(&path).map_err(|source| staging.folder.failure(source))?;
        Ok(staging)
    }

    pub(crate) fn folder(&self) -> StagingFolder {
        self.folder.clone()
    }

    /// Whether a store path is there already and need not come.
    ///
    /// # Errors
    /// When something else has its name.
    pub(crate) async fn has(&self, info: &NarInfo) -> Result<bool, StagingError> {
        self.has_path(&info.path, info.nar_hash).await
    }

    /// Does the same for a path with this hash of its NAR.
    ///
    /// # Errors
    /// As `has`.
    pub(crate) async fn has_path(
        &self,
        path: &StorePath,
        hash: Sha256,
    ) -> Result<bool, StagingError> {
        let file = self.nix.join("store").join(path.base_name());
        if self.becomes_store || !exists(&file) {
            return Ok(false);
        }
        let is_valid = match &self.database {
            Some(database) => database.valid_by_hash(&[path.hash()])?.contains(path),
            None => false,
        };
        if is_valid && !can_be_of_others(&file) {
            return Ok(true);
        }
        let there = file.clone();
        let same = blocking(move || Ok(nar_hash(&there) == Some(hash))).await?;
        match (same, &self.database) {
            (true, _) => Ok(true),
            (false, Some(_)) if is_valid => Err(StagingError::Altered(file)),
            // Nix's own garbage: what its database does not know it overwrites as well.
            (false, Some(_)) => blocking(move || {
                remove_tree(&file).map_err(|source| StagingError::new(file, source))
            })
            .await
            .map(|()| false),
            // A store whose database is elsewhere may be somebody's.
            (false, None) => Err(StagingError::Occupied(file)),
        }
    }

    /// Makes sure that so many bytes fit.
    ///
    /// # Errors
    /// When they do not.
    pub(crate) fn check_room(&self, needed: u64) -> Result<(), StagingError> {
        let needed = needed.saturating_add(ROOM);
        if needed <= self.room {
            return Ok(());
        }
        Err(StagingError::Full {
            folder: self.folder.path.clone(),
            room: self.room,
            needed,
        })
    }

    /// Removes what has been unpacked of a path.
    ///
    /// # Errors
    /// When that fails.
    pub(crate) async fn discard(&self, path: &StorePath) -> Result<(), StagingError> {
        let file = self.folder.path.join(path.base_name());
        blocking(move || remove_tree(&file).map_err(|source| StagingError::new(file, source))).await
    }

    /// Gives all paths their place, registers them, and links `nix`, whose program is returned. Whatever was there before
    /// stays.
    ///
    /// # Errors
    /// When a step fails. What was done is taken back then.
    pub(crate) async fn complete(
        mut self,
        nix: &StorePath,
        source: String,
        registrations: Vec<Registration>,
        deadline: Instant,
    ) -> Result<(PathBuf, Times), StagingError> {
        self.manifest.source = source;
        self.manifest.nix = Some(nix.clone());
        let registrations = Arc::new(registrations);
        let all = Arc::clone(&registrations);
        let mut staging = blocking(move || match self.place(&all) {
            Ok(()) => Ok(self),
            Err(error) => {
                self.undo();
                Err(error)
            }
        })
        .await?;
        let placed = Instant::now();
        let unknown = staging.unregistered(&registrations);
        if let Err(error) = register::load(&staging.nix, nix, &unknown, deadline).await {
            staging.abandon().await;
            return Err(error);
        }
        let nix = nix.clone();
        let program = blocking(move || match staging.link(&nix) {
            Ok(program) => Ok(program),
            Err(error) => {
                staging.undo();
                Err(error)
            }
        })
        .await?;
        let registered = Instant::now();
        Ok((program, Times { placed, registered }))
    }

    /// Takes back everything, once no thread unpacks any more.
    pub(crate) async fn abandon(self) {
        let give_up = Instant::now() + THREADS_LIMIT;
        while Arc::strong_count(&self.folder.lock) > 1 && Instant::now() < give_up {
            sleep(THREADS_POLL_INTERVAL).await;
        }
        let undone = blocking(move || {
            drop(self);
            Ok(())
        });
        // It fails only if it panics, and what is left is for the next installation.
        let _ = undone.await;
    }

    /// Those that the database does not have.
    fn unregistered<'a>(&self, all: &'a [Registration]) -> Vec<&'a Registration> {
        let paths: Vec<StorePath> = all.iter().map(|one| one.path.clone()).collect();
        let valid = valid(self.database.as_ref(), &paths);
        all.iter()
            .filter(|one| !valid.contains(&one.path))
            .collect()
    }

    /// Renames all paths into the store.
    fn place(&mut self, all: &[Registration]) -> Result<(), StagingError> {
        let store = self.nix.join("store");
        let staged: Vec<StorePath> = all
            .iter()
            .map(|one| one.path.clone())
            .filter(|path| exists(&self.folder.path.join(path.base_name())))
            .collect();
        // Those of an earlier installation stay ours.
        self.manifest.paths.retain(|path| !staged.contains(path));
        self.manifest.paths.extend(staged.iter().cloned());
        if self.becomes_store {
            self.manifest.folders.push(store.clone());
        }
        // From here on this says what has to go if the next step is never reached.
        self.write_manifest()?;
        if self.becomes_store {
            self.seal_all(&self.folder.path, &staged)?;
            return fs::rename(&self.folder.path, &store)
                .map_err(|source| StagingError::new(store, source));
        }
        for path in &staged {
            let place = store.join(path.base_name());
            fs::rename(self.folder.path.join(path.base_name()), &place)
                .map_err(|source| StagingError::new(place, source))?;
        }
        // Only root could rename a folder that is not writable, so this comes after it.
        self.seal_all(&store, &staged)?;
        fs::remove_dir(&self.folder.path).map_err(|source| self.folder.failure(source))
    }

    fn seal_all(&self, folder: &Path, paths: &[StorePath]) -> Result<(), StagingError> {
        let failure = |source| StagingError::new(folder.to_owned(), source);
        let opened = open_folder(folder).map_err(failure)?;
        for path in paths {
            seal(&opened, path.base_name()).map_err(failure)?;
        }
        Ok(())
    }

    /// Links the profiles, which is what makes Nix found.
    fn link(&mut self, nix: &StorePath) -> Result<PathBuf, StagingError> {
        let target = self.nix.join("store").join(nix.base_name());
        for folder in ["var/nix", "var/nix/profiles"] {
            make_folder(&self.nix.join(folder))?;
        }
        let links = PROFILES.map(|name| self.nix.join(name));
        self.manifest.links = links
            .into_iter()
            // A profile that is there may have other programs in it.
            .filter(|link| !exists(link))
            .collect();
        self.write_manifest()?;
        // The one that is searched first comes last.
        for link in self.manifest.links.iter().rev() {
            std::os::unix::fs::symlink(&target, link)
                .map_err(|source| StagingError::new(link.clone(), source))?;
        }
        self.manifest.complete = true;
        self.write_manifest()?;
        self.is_over = true;
        Ok(target.join("bin/nix"))
    }

    /// Where the store's state is while it is taken back.
    pub(crate) fn aside(nix: &Path) -> PathBuf {
        nix.join("var/flywheel/state.gone")
    }

    fn write_manifest(&self) -> Result<(), StagingError> {
        self.manifest
            .write(&self.nix)
            .map_err(|source| StagingError::new(Manifest::file(&self.nix), source))
    }

    /// Removes the links, paths and folders of an installation that is not complete. What Nix's database has stays: it is
    /// whole, and in use.
    ///
    /// # Errors
    /// When something of it cannot be removed.
    pub(crate) fn take_back(nix: &Path, manifest: &Manifest) -> io::Result<()> {
        for link in &manifest.links {
            if link.is_symlink() {
                fs::remove_file(link)?;
            }
        }
        for name in [NEW_STORE, INSIDE_STORE] {
            remove_tree(&nix.join(name))?;
        }
        let database = open_database(nix).ok().flatten();
        let valid = valid(database.as_ref(), &manifest.paths);
        let store = nix.join("store");
        for path in &manifest.paths {
            if !valid.contains(path) {
                remove_tree(&store.join(path.base_name()))?;
            }
        }
        remove_tree(&Self::aside(nix))?;
        let is_unused =
            database.is_none_or(|database| database.last_id().is_ok_and(|last| last == 0));
        let state = nix.join("var/nix");
        if is_unused && manifest.folders.contains(&state) {
            remove_tree(&state)?;
            // Nix makes it in each store that it opens.
            let _ = fs::remove_dir(store.join(".links"));
        }
        Ok(())
    }

    /// Takes back what was done; what fails is left to the next installation.
    fn undo(&mut self) {
        self.is_over = true;
        self.database = None;
        if Self::take_back(&self.nix, &self.manifest).is_err() {
            return;
        }
        let store = self.nix.join("store");
        let paths = &mut self.manifest.paths;
        paths.retain(|path| exists(&store.join(path.base_name())));
        if !paths.is_empty() {
            // What an earlier installation has put there is still to be taken back.
            self.manifest.links.clear();
            let _ = self.write_manifest();
            return;
        }
        if Manifest::remove(&self.nix).is_err() {
            return;
        }
        for folder in self.manifest.folders.iter().rev() {
            // One that something else came into stays.
            let _ = fs::remove_dir(folder);
        }
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if !self.is_over {
            self.undo();
        }
    }
}

/// Takes away what an installation left that did not come to its end, or was not taken back to its end; returns what is
/// there of one before.
fn left_over(nix: &Path) -> Result<Manifest, StagingError> {
    let file = Manifest::file(nix);
    let foreign = |problem| StagingError::Foreign {
        file: file.clone(),
        problem,
    };
    let manifest = match Manifest::read(nix) {
        // It was written to its end, or not at all, so this is not ours.
        Err(error) => return Err(foreign(error)),
        Ok(manifest) => manifest.unwrap_or_else(Manifest::new),
    };
    // A complete one whose Nix is gone has nothing left that is half there.
    if manifest.complete {
        return Ok(manifest);
    }
    Staging::take_back(nix, &manifest)
        .map_err(|source| StagingError::new(nix.to_owned(), source))?;
    Ok(manifest)
}

/// The program of a Nix that is there.
fn installed(nix: &Path) -> Option<PathBuf> {
    PROFILES.iter().find_map(|profile| {
        let store_path = fs::canonicalize(nix.join(profile)).ok()?;
        let program = store_path.join("bin/nix");
        program.is_file().then_some(program)
    })
}

/// Opens the database of the store that is there, if it has one.
fn open_database(nix: &Path) -> Result<Option<Db>, db::Error> {
    let file = Db::file(&nix.join("var/nix"));
    if exists(&file) {
        Db::open(&file).map(Some)
    } else {
        Ok(None)
    }
}

/// Those of `paths` that are valid. A database that cannot be read has none, since a killed Nix leaves a new one without
/// tables.
fn valid(database: Option<&Db>, paths: &[StorePath]) -> BTreeSet<StorePath> {
    let hashes: Vec<_> = paths.iter().map(StorePath::hash).collect();
    let valid = database.and_then(|database| database.valid_by_hash(&hashes).ok());
    valid.unwrap_or_default().into_iter().collect()
}

/// Free room for this user, in bytes.
fn room(folder: &Path) -> io::Result<u64> {
    let facts = rustix::fs::statvfs(folder)?;
    Ok(facts.f_bavail.saturating_mul(facts.f_frsize))
}

/// Runs what waits for the disk on a thread that may.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StagingError> + Send + 'static,
) -> Result<T, StagingError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(panic) => Err(StagingError::Register(panic.to_string())),
    }
}
