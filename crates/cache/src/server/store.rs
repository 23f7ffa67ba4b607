//! The content of the caches: objects (narinfos), NARs, and NARs that wait for their narinfo. All
//! calls block on the disk and belong on threads that may block, or into `ServerState::run_inline`.
//! Knows no HTTP.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::path::Path;
use std::sync::{Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, SystemTime};

use sha2::Digest as _;
use tempfile::NamedTempFile;

use crate::server::durable::{Durability, epoch_line};
use crate::server::folder::{Folder, nar_name, sync_parent};
use crate::server::gc::{self, Limits};
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

/// Facts about a NAR that `nix copy` uploaded before its narinfo.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PendingUpload {
    pub(crate) nar_hash: Sha256,
    /// Size of the NAR in bytes.
    pub(crate) nar_size: u64,
    /// Hash of the uploaded file, which may be compressed differently from ours.
    pub(crate) received_hash: Sha256,
    /// Size of the uploaded file in bytes.
    pub(crate) received_size: u64,
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
}

impl Store {
    /// Opens a folder. After a crash of the machine, also returns how many paths were removed
    /// because they may not have reached the disk.
    ///
    /// # Errors
    /// When the disk fails.
    pub(crate) fn open(folder: Folder) -> io::Result<(Self, Option<u64>)> {
        let (durability, rolled_back) = Durability::open(&folder)?;
        let store = Self {
            folder,
            durability,
            gate: RwLock::default(),
            publishing: Mutex::default(),
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

    /// Does the same and records a clean stop; nothing may arrive afterwards.
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
    pub(crate) fn object(&self, cache: &CacheName, hash: &PathHash) -> io::Result<Option<NarInfo>> {
        let _kept = self.prevent_removal();
        self.find_object(cache, hash)
    }

    fn find_object(&self, cache: &CacheName, hash: &PathHash) -> io::Result<Option<NarInfo>> {
        let file = self.folder.object(cache, hash);
        let Some(text) = if_exists(std::fs::read_to_string(&file))? else {
            return Ok(None);
        };
        // A file that is not a narinfo was not written by us. It counts as missing, so that it gets
        // replaced.
        let Ok(info) = NarInfo::parse(&text) else {
            return Ok(None);
        };
        // A path without its NAR would fail every download, so it counts as missing.
        if !self.folder.nar(&info.nar_hash).exists() {
            return Ok(None);
        }
        touch(&file, TOUCH_INTERVAL)?;
        Ok(Some(info))
    }

    /// Returns those of `hashes` that this cache cannot serve. The others count as used, because
    /// the client will rely on them.
    ///
    /// # Errors
    /// When the disk fails.
    pub(crate) fn missing(
        &self,
        cache: &CacheName,
        hashes: Vec<PathHash>,
    ) -> io::Result<Vec<PathHash>> {
        let _kept = self.prevent_removal();
        let mut missing = Vec::new();
        for hash in hashes {
            if self.find_object(cache, &hash)?.is_none() {
                missing.push(hash);
            }
        }
        Ok(missing)
    }

    /// Returns the compressed file of a NAR that is stored already. Counts as a use.
    ///
    /// # Errors
    /// When the disk fails.
    pub(crate) fn known_nar(&self, hash: &Sha256) -> io::Result<Option<StoredNar>> {
        let _kept = self.prevent_removal();
        let path = self.folder.nar(hash);
        let Some(file) = if_exists(File::open(&path))? else {
            return Ok(None);
        };
        touch(&path, Duration::ZERO)?;
        measure(file).map(Some)
    }

    /// Makes a NAR visible. If an equal one arrived first, that one is kept and returned.
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
            // Under the lock, no other upload can create the file in between.
            if !path.exists() {
                file.persist(&path)?;
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
        match if_exists(std::fs::read_to_string(&object))? {
            None => {
                // The narinfo comes last: once it is visible, the path can be served.
                self.folder.write_whole(&object, &(text + &epoch.line()))?;
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
                let text = text + &epoch_line(&old).unwrap_or_default();
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
    pub(crate) fn open_nar(
        &self,
        cache: &CacheName,
        hash: &Sha256,
    ) -> io::Result<Option<(File, u64)>> {
        // Caches of different trust share NARs on disk, but may only serve what was uploaded to
        // them.
        if !self.folder.marker(cache, hash).exists() {
            return Ok(None);
        }
        let path = self.folder.nar(hash);
        let Some(file) = if_exists(File::open(&path))? else {
            return Ok(None);
        };
        // The file may be removed at this point; the open descriptor stays readable.
        if_exists(touch(&path, TOUCH_INTERVAL))?;
        let size = file.metadata()?.len();
        Ok(Some((file, size)))
    }

    /// Records a NAR that waits for its narinfo. `name` must be a plain file name.
    ///
    /// # Errors
    /// When the disk fails.
    pub(crate) fn note_upload(
        &self,
        cache: &CacheName,
        name: &str,
        upload: &PendingUpload,
    ) -> io::Result<()> {
        let PendingUpload {
            nar_hash,
            nar_size,
            received_hash,
            received_size,
        } = upload;
        let text = format!(
            "NarHash: {nar_hash}\nNarSize: {nar_size}\nFileHash: {received_hash}\nFileSize: {received_size}\n"
        );
        let (epoch, file) = (
            self.durability.begin(),
            self.folder.uploads(cache).join(name),
        );
        self.folder.write_whole(&file, &text)?;
        epoch.file_added(file);
        Ok(())
    }

    /// Returns the NAR that was uploaded under this name, if it still exists.
    ///
    /// # Errors
    /// When the disk fails.
    pub(crate) fn pending_upload(
        &self,
        cache: &CacheName,
        name: &str,
    ) -> io::Result<Option<PendingUpload>> {
        let _kept = self.prevent_removal();
        let path = self.folder.uploads(cache).join(name);
        let Some(text) = if_exists(std::fs::read_to_string(&path))? else {
            return Ok(None);
        };
        let Some(upload) = parse_upload(&text) else {
            return Ok(None);
        };
        // Counts as a use, so that the NAR survives until its narinfo arrives.
        let nar = if_exists(touch(&self.folder.nar(&upload.nar_hash), Duration::ZERO))?;
        touch(&path, Duration::ZERO)?;
        Ok(nar.map(|()| upload))
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

/// The narinfo as stored, without our own signature: keys may change, and signing is cheap.
fn narinfo(path: &PathInfo, nar: StoredNar) -> NarInfo {
    NarInfo {
        path: path.path.clone(),
        url: format!("nar/{}", nar_name(&path.nar_hash)),
        compression: "zstd".to_owned(),
        file_hash: Some(nar.file_hash),
        file_size: Some(nar.file_size),
        nar_hash: path.nar_hash,
        nar_size: path.nar_size,
        references: path.references.clone(),
        deriver: path.deriver.clone(),
        signatures: path.signatures.clone(),
        ca: path.ca.clone(),
    }
}

fn parse_upload(text: &str) -> Option<PendingUpload> {
    let field = |name: &str| {
        text.lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
    };
    Some(PendingUpload {
        nar_hash: Sha256::parse(field("NarHash")?).ok()?,
        nar_size: field("NarSize")?.parse().ok()?,
        received_hash: Sha256::parse(field("FileHash")?).ok()?,
        received_size: field("FileSize")?.parse().ok()?,
    })
}

fn measure(mut file: File) -> io::Result<StoredNar> {
    let (mut hash, mut file_size) = (sha2::Sha256::new(), 0);
    let mut buffer = vec![0; 128 * 1024];
    loop {
        match file.read(&mut buffer)? {
            0 => {
                return Ok(StoredNar {
                    file_hash: Sha256(hash.finalize().into()),
                    file_size,
                });
            }
            read => {
                hash.update(&buffer[..read]);
                file_size += read as u64;
            }
        }
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
    File::open(path)?.set_modified(now)
}

/// Turns "not found" into `None`.
fn if_exists<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}
