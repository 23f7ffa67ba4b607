//! The content of the caches: objects (narinfos), NARs, and NARs that wait for their narinfo. All
//! calls block on the disk and belong on threads that may block, or into `ServerState::run_inline`.
//! Knows no HTTP.

use std::fs::File;
use std::fs::Metadata;
use std::io::{self, Read, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, SystemTime};

use sha2::Digest as _;
use tempfile::NamedTempFile;

use crate::server::durable::{Durability, epoch_line};
use crate::server::folder::{Folder, open_at_once, read_small, sync_parent};
use crate::server::gc::{self, Limits};
use crate::server::records::{Upload, narinfo, read_narinfo, with_file};
use crate::server::sealed::{seal, unseal};
use crate::server::sound::{self, CheckedNars};
use flywheel_core::progress::Sink;
use flywheel_nix::cache_name::CacheName;
use flywheel_nix::hash::Sha256;
use flywheel_nix::narinfo::NarInfo;
use flywheel_nix::path_info::PathInfo;
use flywheel_nix::store_path::PathHash;

/// Minimum interval between two recorded uses of a file: garbage collection needs no more
/// precision, and this saves disk writes.
pub(crate) const TOUCH_INTERVAL: Duration = Duration::from_secs(60);

/// A file written within this time needs no record of its use.
const RECENT_WRITE: Duration = Duration::from_secs(1);

/// The compressed file of a NAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct StoredNar {
    pub(crate) file_hash: Sha256,
    /// Size of the file in bytes.
    pub(crate) file_size: u64,
}

/// What the disk has of a path.
#[derive(Debug)]
pub(crate) enum Found {
    Missing,
    /// Its NAR has been checked since the server's start.
    Checked(NarInfo),
    Unchecked(UncheckedPath),
}

/// A path with a NAR that has not been checked since the server's start.
#[derive(Debug)]
pub(crate) struct UncheckedPath {
    pub(crate) info: NarInfo,
    /// Size of the NAR's file in bytes.
    pub(crate) size: u64,
}

impl UncheckedPath {
    /// Whether the file's size shows that it is another one than was written.
    pub(crate) fn is_suspect(&self) -> bool {
        self.info.file_size != Some(self.size)
    }
}

/// A NAR that may be served.
#[derive(Debug)]
pub(crate) struct OpenNar {
    pub(crate) file: File,
    pub(crate) about: Metadata,
    /// Whether it has been checked since the server's start.
    pub(crate) checked: bool,
}

/// The content of one folder.
#[derive(Debug)]
pub(crate) struct Store {
    folder: Folder,
    durability: Durability,
    /// Write-locked while garbage is removed; read-locked while the server makes a promise that
    /// something exists: when committing an object, or telling a client that it need not send one.
    gate: RwLock<()>,
    /// Held while a NAR becomes visible, so that of two equal ones the first stays.
    publishing: Mutex<()>,
    checked: CheckedNars,
    /// Set when the server stops: checks of NARs end early.
    stopping: AtomicBool,
    log: Sink,
}

impl Store {
    /// Opens a folder. After a crash of the machine, also returns how many paths were removed
    /// because they may not have reached the disk.
    ///
    /// # Errors
    /// When the disk fails.
    pub(crate) fn open(folder: Folder, log: Sink) -> io::Result<(Self, Option<u64>)> {
        let (durability, rolled_back) = Durability::open(&folder)?;
        let store = Self {
            folder,
            durability,
            gate: RwLock::default(),
            publishing: Mutex::default(),
            checked: CheckedNars::default(),
            stopping: AtomicBool::new(false),
            log,
        };
        if rolled_back.is_some() {
            // The NARs of the removed paths may be torn, so they must not count as known.
            gc::collect(&store, &Limits::default(), false)?;
            sync_parent(&store.folder.nars().join("."))?;
        }
        Ok((store, rolled_back))
    }

    /// Writes everything visible to disk.
    ///
    /// # Errors
    /// When the disk fails.
    pub(crate) fn sync(&self) -> io::Result<()> {
        self.durability.sync(&self.folder)
    }

    /// Makes checks of NARs end early, with an error.
    pub(crate) fn stop_checks(&self) {
        self.stopping.store(true, Ordering::Relaxed);
    }

    /// Writes everything visible to disk and records a clean stop; nothing may arrive afterwards.
    ///
    /// # Errors
    /// When the disk fails.
    pub(crate) fn close(&self) -> io::Result<()> {
        self.durability.close(&self.folder)
    }

    pub(crate) fn folder(&self) -> &Folder {
        &self.folder
    }

    /// Returns a guard that prevents the removal of garbage.
    fn prevent_removal(&self) -> RwLockReadGuard<'_, ()> {
        // The lock guards no data that a panic could leave half-done, so poisoning is ignored.
        self.gate.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether calls would have to wait for the removal of garbage now.
    pub(crate) fn is_removing(&self) -> bool {
        self.gate.try_read().is_err()
    }

    /// Returns a guard for removing garbage; nothing is promised to clients while it lives.
    pub(super) fn lock_for_removal(&self) -> RwLockWriteGuard<'_, ()> {
        self.gate.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the narinfo of a path if its NAR exists too. Counts as a use.
    ///
    /// # Errors
    /// When the disk fails.
    pub(crate) fn object(&self, cache: &CacheName, hash: &PathHash) -> io::Result<Found> {
        let _kept = self.prevent_removal();
        self.find_object(cache, hash)
    }

    fn find_object(&self, cache: &CacheName, hash: &PathHash) -> io::Result<Found> {
        let file = self.folder.object(cache, hash);
        // A file that is torn, or that was not written by us, counts as missing, so that it gets
        // replaced.
        let Some(info) = read_narinfo(&file)?.filter(|info| info.path.hash() == *hash) else {
            return Ok(Found::Missing);
        };
        // A path without its NAR would fail every download, so it counts as missing.
        let nar = if_exists(std::fs::symlink_metadata(self.folder.nar(&info.nar_hash)))?;
        // A symbolic link may lead anywhere.
        let Some(about) = nar.filter(Metadata::is_file) else {
            return Ok(Found::Missing);
        };
        touch(&file, TOUCH_INTERVAL)?;
        Ok(match self.checked.get(&info.nar_hash, &about) {
            Some(nar) => Found::Checked(with_file(info, nar)),
            None => Found::Unchecked(UncheckedPath {
                info,
                size: about.len(),
            }),
        })
    }

    /// Checks a path's NAR, and removes a damaged one, so that its paths count as missing. Reads the whole file unless
    /// it has been checked before. Returns the narinfo as it is to be served.
    ///
    /// # Errors
    /// When the disk fails.
    pub(crate) fn confirm(&self, info: NarInfo) -> io::Result<Option<NarInfo>> {
        let stated = info
            .file_hash
            .zip(info.file_size)
            .map(|(file_hash, file_size)| StoredNar {
                file_hash,
                file_size,
            });
        let nar = self.check_nar(&info.nar_hash, stated)?;
        Ok(nar.map(|nar| with_file(info, nar)))
    }

    /// Returns the size and hash of a NAR's file; `None` if there is none, or if it was damaged and has been removed.
    fn check_nar(&self, hash: &Sha256, stated: Option<StoredNar>) -> io::Result<Option<StoredNar>> {
        let Some(file) = self.open_stored(hash)? else {
            return Ok(None);
        };
        let about = file.metadata()?;
        if let Some(nar) = self.checked.get(hash, &about) {
            return Ok(Some(nar));
        }
        let found = sound::check(&file, hash, stated, &self.stopping)?;
        match found {
            Some(nar) => self.checked.insert(*hash, &about, nar),
            None => self.remove_damaged(hash, &about)?,
        }
        Ok(found)
    }

    /// Opens a NAR's file. Something else under its name, such as a symbolic link, is removed.
    fn open_stored(&self, hash: &Sha256) -> io::Result<Option<File>> {
        let path = self.folder.nar(hash);
        let Some(about) = if_exists(std::fs::symlink_metadata(&path))? else {
            return Ok(None);
        };
        if !about.is_file() {
            self.remove_damaged(hash, &about)?;
            return Ok(None);
        }
        // Nor is a link followed that takes its place in between.
        let flags = rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK;
        let flags = flags.bits().cast_signed();
        if_exists(File::options().read(true).custom_flags(flags).open(&path))
    }

    /// A stored NAR, decompressed: at most its first `size` bytes.
    ///
    /// # Errors
    /// When it is not there, or the disk fails.
    pub(crate) fn read_nar(
        &self,
        hash: &Sha256,
        size: u64,
    ) -> io::Result<impl Read + Send + use<>> {
        let file = self.open_stored(hash)?.ok_or(io::ErrorKind::NotFound)?;
        Ok(sound::decoder(file)?.take(size))
    }

    /// Records that a NAR has been read as a whole and is good.
    pub(crate) fn note_checked(&self, hash: &Sha256, about: &Metadata, nar: StoredNar) {
        self.checked.insert(*hash, about, nar);
    }

    /// Removes a NAR that was found damaged, unless it has been replaced since.
    ///
    /// # Errors
    /// When the disk fails.
    pub(crate) fn remove_damaged(&self, hash: &Sha256, about: &Metadata) -> io::Result<()> {
        let _alone = self
            .publishing
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let path = self.folder.nar(hash);
        let Some(now) = if_exists(std::fs::symlink_metadata(&path))? else {
            return Ok(());
        };
        if now.ino() != about.ino() || now.len() != about.len() {
            return Ok(());
        }
        self.checked.remove(hash);
        // Markers are links to the damaged file, and would keep its bytes.
        for cache in self.folder.caches()? {
            if_exists(std::fs::remove_file(self.folder.marker(&cache, hash)))?;
        }
        if now.is_dir() {
            std::fs::remove_dir_all(&path)?;
        } else {
            std::fs::remove_file(&path)?;
        }
        let text = format!(
            "the stored NAR {hash} was damaged ({} bytes) and has been removed; its paths count as missing until they are sent again",
            about.len()
        );
        self.log.degraded("damage", text);
        Ok(())
    }

    /// Returns those of `hashes` that this cache cannot serve, and those with unchecked NARs. The others
    /// count as used, because the client will rely on them.
    ///
    /// # Errors
    /// When the disk fails.
    pub(crate) fn missing(
        &self,
        cache: &CacheName,
        hashes: Vec<PathHash>,
    ) -> io::Result<(Vec<PathHash>, Vec<UncheckedPath>)> {
        let _kept = self.prevent_removal();
        let (mut missing, mut unchecked) = (Vec::new(), Vec::new());
        for hash in hashes {
            match self.find_object(cache, &hash)? {
                Found::Missing => missing.push(hash),
                Found::Unchecked(path) => unchecked.push(path),
                Found::Checked(_) => (),
            }
        }
        Ok((missing, unchecked))
    }

    /// Checks paths, the smallest first, up to `budget` bytes. Returns those that are missing since their NARs were
    /// damaged, and the NARs that are left to check.
    ///
    /// # Errors
    /// When the disk fails.
    pub(crate) fn confirm_within(
        &self,
        mut unchecked: Vec<UncheckedPath>,
        budget: u64,
    ) -> io::Result<(Vec<PathHash>, Vec<NarInfo>)> {
        unchecked.sort_by_key(|path| path.size);
        let (mut missing, mut left, mut read) = (Vec::new(), Vec::new(), 0_u64);
        for path in unchecked {
            // A wrong size must not be claimed, so its cause is always found out now.
            if path.is_suspect() || read.saturating_add(path.size) <= budget {
                read = read.saturating_add(path.size);
                let hash = path.info.path.hash();
                if self.confirm(path.info)?.is_none() {
                    missing.push(hash);
                }
            } else {
                left.push(path.info);
            }
        }
        Ok((missing, left))
    }

    /// Returns the compressed file of a NAR that is stored already. Counts as a use.
    ///
    /// # Errors
    /// When the disk fails.
    pub(crate) fn known_nar(&self, hash: &Sha256) -> io::Result<Option<StoredNar>> {
        let _kept = self.prevent_removal();
        let Some(file) = self.open_stored(hash)? else {
            return Ok(None);
        };
        file.set_modified(SystemTime::now())?;
        self.check_nar(hash, None)
    }

    /// Makes a NAR visible. If an equal one arrived first, that one is kept and returned, unless it has not been checked.
    ///
    /// # Errors
    /// When the disk fails; then nothing has changed.
    pub(crate) fn publish_nar(
        &self,
        file: NamedTempFile,
        hash: &Sha256,
        nar: StoredNar,
    ) -> io::Result<StoredNar> {
        let epoch = self.durability.begin();
        {
            // Two uploads of the same NAR may finish at the same time.
            let _alone = self
                .publishing
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            let path = self.folder.nar(hash);
            let stored = if_exists(std::fs::symlink_metadata(&path))?;
            // Under the lock, no other upload can create the file in between.
            let known = stored.and_then(|about| self.checked.get(hash, &about));
            if known.is_none() {
                // Replaces what may be damaged. The new file is what this server has just hashed.
                let about = file.as_file().metadata()?;
                file.persist(&path)?;
                self.checked.insert(*hash, &about, nar);
                epoch.file_added(path);
                return Ok(nar);
            }
        }
        // The stored file counts, whose compressed hash may differ from that of this upload.
        let known = self.known_nar(hash)?;
        known.ok_or_else(|| io::Error::other("a NAR was removed while it was sent again"))
    }

    /// Like `publish_nar`, for a compressed NAR in memory.
    ///
    /// # Errors
    /// As for `publish_nar`.
    pub(crate) fn publish_compressed(
        &self,
        compressed: &[u8],
        hash: &Sha256,
    ) -> io::Result<StoredNar> {
        let file_hash = Sha256(sha2::Sha256::digest(compressed).into());
        let mut file = self.folder.temporary()?;
        file.write_all(compressed)?;
        self.publish_nar(
            file,
            hash,
            StoredNar {
                file_hash,
                file_size: compressed.len() as u64,
            },
        )
    }

    /// Makes a path visible after its NAR. Its references count as used from now on. Returns
    /// `false` if the NAR has been removed; nothing has changed then.
    ///
    /// # Errors
    /// When the disk fails; the path is then complete or invisible, and may be sent again.
    pub(crate) fn commit(
        &self,
        cache: &CacheName,
        path: &PathInfo,
        nar: StoredNar,
    ) -> io::Result<bool> {
        let _kept = self.prevent_removal();
        let epoch = self.durability.begin();
        let nar_file = self.folder.nar(&path.nar_hash);
        if if_exists(touch(&nar_file, RECENT_WRITE))?.is_none() {
            return Ok(false);
        }
        for reference in &path.references {
            // A missing reference is allowed: the client may upload it later.
            if_exists(touch(
                &self.folder.object(cache, &reference.hash()),
                Duration::ZERO,
            ))?;
        }
        // The marker lets this cache serve the NAR, which other caches may have uploaded.
        let marker = self.folder.marker(cache, &path.nar_hash);
        let linked = write_marker(&marker, &nar_file)?;
        let object = self.folder.object(cache, &path.path.hash());
        let text = narinfo(path, nar).to_string();
        let old = if_exists(read_small(&object))?;
        // A torn one counts as none.
        match old.as_deref().and_then(unseal) {
            None => {
                // The narinfo comes last: once it is visible, the path can be served.
                self.folder
                    .write_whole(&object, &seal(&(text + &epoch.line())))?;
                if linked {
                    epoch.link_added(&marker);
                } else {
                    epoch.file_added(marker);
                }
                epoch.file_added(object);
            }
            // Other paths may already rely on this one, so it keeps its old epoch, and everything
            // that belongs to it must be on disk now.
            Some(old) => {
                let text = seal(&(text + &epoch_line(old).unwrap_or_default()));
                File::open(&nar_file)?.sync_all()?;
                self.folder.write_synced(&object, &text)?;
                // Folders last: one commit of the file system's journal covers everything before
                // it.
                sync_parent(&nar_file)?;
                sync_parent(&marker)?;
            }
        }
        Ok(true)
    }

    /// Opens a NAR that this cache may serve. A NAR that only other caches have stays hidden.
    /// Counts as a use.
    ///
    /// # Errors
    /// When the disk fails.
    pub(crate) fn open_nar(&self, cache: &CacheName, hash: &Sha256) -> io::Result<Option<OpenNar>> {
        // Caches of different trust share NARs on disk, but may only serve what was uploaded to
        // them.
        if !self.folder.marker(cache, hash).exists() {
            return Ok(None);
        }
        self.open_known(hash)
    }

    /// Opens a NAR that the caller may have. Counts as a use.
    fn open_known(&self, hash: &Sha256) -> io::Result<Option<OpenNar>> {
        let Some(file) = self.open_stored(hash)? else {
            return Ok(None);
        };
        // The file may be removed at this point; the open descriptor stays readable.
        if_exists(touch(&self.folder.nar(hash), TOUCH_INTERVAL))?;
        let about = file.metadata()?;
        // An empty body ends before a check of it could break it off.
        if about.len() == 0 {
            self.remove_damaged(hash, &about)?;
            return Ok(None);
        }
        let checked = self.checked.get(hash, &about).is_some();
        Ok(Some(OpenNar {
            file,
            about,
            checked,
        }))
    }

    /// Opens a NAR by the name under which it was uploaded to this cache. Counts as a use.
    ///
    /// # Errors
    /// When the disk fails.
    pub(crate) fn open_upload(
        &self,
        cache: &CacheName,
        name: &str,
    ) -> io::Result<Option<(Upload, OpenNar)>> {
        let Some(upload) = self.upload(cache, name)? else {
            return Ok(None);
        };
        Ok(self.open_known(&upload.nar_hash)?.map(|nar| (upload, nar)))
    }

    /// The narinfo of a path that this cache serves.
    ///
    /// # Errors
    /// When the disk fails.
    pub(crate) fn served(&self, cache: &CacheName, hash: &PathHash) -> io::Result<Option<NarInfo>> {
        match self.object(cache, hash)? {
            Found::Missing => Ok(None),
            Found::Checked(info) => Ok(Some(info)),
            Found::Unchecked(path) => self.confirm(path.info),
        }
    }

    /// Records under which name a NAR was uploaded to a cache. `name` must be a plain file name.
    ///
    /// # Errors
    /// When the disk fails.
    pub(crate) fn note_upload(
        &self,
        cache: &CacheName,
        name: &str,
        upload: &Upload,
    ) -> io::Result<()> {
        let (epoch, file) = (
            self.durability.begin(),
            self.folder.uploads(cache).join(name),
        );
        self.folder.write_whole(&file, &upload.to_record())?;
        epoch.file_added(file);
        Ok(())
    }

    /// Returns the NAR that was uploaded under this name, if it still exists.
    ///
    /// # Errors
    /// When the disk fails.
    pub(crate) fn upload(&self, cache: &CacheName, name: &str) -> io::Result<Option<Upload>> {
        let path = self.folder.uploads(cache).join(name);
        let Some(text) = if_exists(read_small(&path))? else {
            return Ok(None);
        };
        let Some(upload) = Upload::from_record(&text) else {
            return Ok(None);
        };
        // Counts as a use, so that the NAR survives until its narinfo arrives.
        let nar = self.known_nar(&upload.nar_hash)?;
        if_exists(touch(&path, Duration::ZERO))?;
        Ok(nar.map(|_| upload))
    }
}

/// Marks a NAR as one that a cache may serve. A hard link needs no inode, and creating inodes is
/// what costs time. Returns `false` if the marker is a file of its own.
fn write_marker(marker: &Path, nar: &Path) -> io::Result<bool> {
    match std::fs::hard_link(nar, marker) {
        Ok(()) => Ok(true),
        // The marker belongs to an earlier path with this NAR and may be a link or a file.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        // Some file systems have no hard links, and the others limit their number.
        Err(_) => File::create(marker).map(|_| false),
    }
}

/// Records that a file is used now, unless a use was recorded within `interval`.
fn touch(path: &Path, interval: Duration) -> io::Result<()> {
    let now = SystemTime::now();
    let noted = std::fs::metadata(path)?.modified()?;
    // A time in the future, after the clock was set back, is corrected as well.
    if now
        .duration_since(noted)
        .is_ok_and(|since| since <= interval)
        && !interval.is_zero()
    {
        return Ok(());
    }
    open_at_once(path)?.set_modified(now)
}

/// Turns "not found" into `None`.
fn if_exists<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests;
