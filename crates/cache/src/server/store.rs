//! What the cache holds: objects (narinfos), NARs, and NARs that wait for their narinfo.
//! All calls block on the disk and belong on threads that may, or into `State::brief`. Knows no HTTP.

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

/// A read is noted at most this often: garbage collection thinks in hours, disks dislike writes.
pub const TOUCH_INTERVAL: Duration = Duration::from_secs(60);

/// What was written within this time needs no note that it was used.
const RECENT_WRITE: Duration = Duration::from_secs(1);

/// A NAR's compressed file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoredNar {
    /// Hash of the file.
    pub file_hash: Sha256,
    /// Size of the file in bytes.
    pub file_size: u64,
}

/// What is known of a NAR that `nix copy` sent before its narinfo.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PendingUpload {
    /// Hash of the NAR.
    pub nar_hash: Sha256,
    /// Size of the NAR in bytes.
    pub nar_size: u64,
    /// Hash of the file that came, which was perhaps compressed otherwise than ours.
    pub received_hash: Sha256,
    /// Size of the file that came, in bytes.
    pub received_size: u64,
}

/// The holdings of one folder.
#[derive(Debug)]
pub struct Store {
    folder: Folder,
    durability: Durability,
    /// Held for writing while garbage is removed, for reading while something is promised to be
    /// there: an object is committed, or a client is told that it need not send one.
    gate: RwLock<()>,
    /// Held while a NAR becomes visible, so that of two equal ones the first stays.
    publishing: Mutex<()>,
}

impl Store {
    /// The holdings of a folder. After an unforeseen end of the machine: how many paths were taken back, because
    /// they may not have reached the disk.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn open(folder: Folder) -> io::Result<(Self, Option<u64>)> {
        let (durability, rolled_back) = Durability::open(&folder)?;
        let store = Self {
            folder,
            durability,
            gate: RwLock::default(),
            publishing: Mutex::default(),
        };
        if rolled_back.is_some() {
            // The NARs that are not claimed any more may be torn: nobody may take them for known.
            gc::collect(&store, &Limits::default(), false)?;
            sync_parent(&store.folder.nars().join("."))?;
        }
        Ok((store, rolled_back))
    }

    /// Has all that is visible reach the disk.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn sync(&self) -> io::Result<()> {
        self.durability.sync(&self.folder)
    }

    /// The same, once nothing comes any more.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn close(&self) -> io::Result<()> {
        self.durability.close(&self.folder)
    }

    /// Where things lie.
    pub fn folder(&self) -> &Folder {
        &self.folder
    }

    /// Nothing is removed while this guard lives.
    fn prevent_removal(&self) -> RwLockReadGuard<'_, ()> {
        // The lock guards no data of its own that a panic could have left half-done.
        self.gate.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether calls would wait now for garbage to be removed.
    pub fn is_removing(&self) -> bool {
        self.gate.try_read().is_err()
    }

    /// Nothing is promised while this guard lives.
    pub(super) fn lock_for_removal(&self) -> RwLockWriteGuard<'_, ()> {
        self.gate.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is known of a path, if its NAR is there too. Counts as a use.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn object(&self, cache: &CacheName, hash: &PathHash) -> io::Result<Option<NarInfo>> {
        let _kept = self.prevent_removal();
        self.find_object(cache, hash)
    }

    fn find_object(&self, cache: &CacheName, hash: &PathHash) -> io::Result<Option<NarInfo>> {
        let file = self.folder.object(cache, hash);
        let Some(text) = if_exists(std::fs::read_to_string(&file))? else {
            return Ok(None);
        };
        // A file that is no narinfo was not written by us: it counts as absent, so that it is replaced.
        let Ok(info) = NarInfo::parse(&text) else {
            return Ok(None);
        };
        if !self.folder.nar(&info.nar_hash).exists() {
            return Ok(None);
        }
        touch(&file, TOUCH_INTERVAL)?;
        Ok(Some(info))
    }

    /// Those of `hashes` that this cache cannot serve. What it can counts as used: the client will
    /// rely on it.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn missing(&self, cache: &CacheName, hashes: Vec<PathHash>) -> io::Result<Vec<PathHash>> {
        let _kept = self.prevent_removal();
        let mut missing = Vec::new();
        for hash in hashes {
            if self.find_object(cache, &hash)?.is_none() {
                missing.push(hash);
            }
        }
        Ok(missing)
    }

    /// The compressed file of a NAR that is here already. Counts as a use.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn known_nar(&self, hash: &Sha256) -> io::Result<Option<StoredNar>> {
        let _kept = self.prevent_removal();
        let path = self.folder.nar(hash);
        let Some(file) = if_exists(File::open(&path))? else {
            return Ok(None);
        };
        touch(&path, Duration::ZERO)?;
        measure(file).map(Some)
    }

    /// Makes a NAR visible. If an equal one came first, that one stays and is the answer.
    ///
    /// # Errors
    /// When the disk fails; then nothing has changed.
    pub fn publish_nar(
        &self,
        file: NamedTempFile,
        hash: &Sha256,
        nar: StoredNar,
    ) -> io::Result<StoredNar> {
        let epoch = self.durability.begin();
        {
            let _alone = self
                .publishing
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            let path = self.folder.nar(hash);
            if !path.exists() {
                file.persist(&path)?;
                epoch.file_added(path);
                return Ok(nar);
            }
        }
        let known = self.known_nar(hash)?;
        known.ok_or_else(|| io::Error::other("a NAR was removed while it was sent again"))
    }

    /// The same for one that is in memory, compressed.
    ///
    /// # Errors
    /// As `publish_nar`.
    pub fn publish_compressed(&self, compressed: &[u8], hash: &Sha256) -> io::Result<StoredNar> {
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

    /// Makes a path visible, after its NAR. What it refers to counts as used from now on.
    /// `false` if the NAR is not there any more; then nothing has changed.
    ///
    /// # Errors
    /// When the disk fails; then the path is whole or not visible, and may be sent again.
    pub fn commit(&self, cache: &CacheName, path: &PathInfo, nar: StoredNar) -> io::Result<bool> {
        let _kept = self.prevent_removal();
        let epoch = self.durability.begin();
        let nar_file = self.folder.nar(&path.nar_hash);
        if if_exists(touch(&nar_file, RECENT_WRITE))?.is_none() {
            return Ok(false);
        }
        for reference in &path.references {
            // A reference that is not here, or not yet, is the client's affair.
            if_exists(touch(
                &self.folder.object(cache, &reference.hash()),
                Duration::ZERO,
            ))?;
        }
        let marker = self.folder.marker(cache, &path.nar_hash);
        let linked = write_marker(&marker, &nar_file)?;
        let object = self.folder.object(cache, &path.path.hash());
        let text = narinfo(path, nar).to_string();
        match if_exists(std::fs::read_to_string(&object))? {
            None => {
                self.folder.write_whole(&object, &(text + &epoch.line()))?;
                if linked {
                    epoch.link_added(&marker);
                } else {
                    epoch.file_added(marker);
                }
                epoch.file_added(object);
            }
            // Others may refer to it since long: it keeps its epoch, and so nothing of it may be torn.
            Some(old) => {
                let text = text + &epoch_line(&old).unwrap_or_default();
                File::open(&nar_file)?.sync_all()?;
                self.folder.write_synced(&object, &text)?;
                // Last, since one commit of the file system's journal covers all that came before it.
                sync_parent(&nar_file)?;
                sync_parent(&marker)?;
            }
        }
        Ok(true)
    }

    /// Opens a NAR that this cache may serve; a NAR of another cache alone is not shown. Counts as a use.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn open_nar(&self, cache: &CacheName, hash: &Sha256) -> io::Result<Option<(File, u64)>> {
        if !self.folder.marker(cache, hash).exists() {
            return Ok(None);
        }
        let path = self.folder.nar(hash);
        let Some(file) = if_exists(File::open(&path))? else {
            return Ok(None);
        };
        // It may be removed between the two; the open file stays readable.
        if_exists(touch(&path, TOUCH_INTERVAL))?;
        let size = file.metadata()?.len();
        Ok(Some((file, size)))
    }

    /// Notes a NAR that waits for its narinfo. `name` must be a plain file name.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn note_upload(
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

    /// The NAR that was sent under this name, if it is still here.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn pending_upload(
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
        let nar = if_exists(touch(&self.folder.nar(&upload.nar_hash), Duration::ZERO))?;
        touch(&path, Duration::ZERO)?;
        Ok(nar.map(|()| upload))
    }
}

/// Marks a NAR as one that a cache may serve. A link to it takes no inode, and making those is what costs.
/// `false` if the mark is a file of its own.
fn write_marker(marker: &Path, nar: &Path) -> io::Result<bool> {
    match std::fs::hard_link(nar, marker) {
        Ok(()) => Ok(true),
        // Of an earlier path with this NAR, and it may be one or the other.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        // Not every file system has links, and of those that have each has its limit.
        Err(_) => File::create(marker).map(|_| false),
    }
}

/// The narinfo as it is kept, without our own signature: keys may change, and signing is cheap.
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

/// Notes a use of a file now, unless one was noted within `interval`.
fn touch(path: &Path, interval: Duration) -> io::Result<()> {
    let now = SystemTime::now();
    let noted = std::fs::metadata(path)?.modified()?;
    // A time in the future (the clock was set back) is put right as well.
    if now
        .duration_since(noted)
        .is_ok_and(|since| since <= interval)
        && !interval.is_zero()
    {
        return Ok(());
    }
    File::open(path)?.set_modified(now)
}

/// `None` where there is no such file.
fn if_exists<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}
