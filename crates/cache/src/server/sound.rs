//! Whether a stored NAR has the hash in its name: it is decompressed and hashed, once for each run of the server. Knows
//! files and hashes, no paths and no caches.

use std::collections::HashMap;
use std::fs::{File, Metadata};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write};
use std::os::unix::fs::MetadataExt as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use sha2::Digest as _;

use crate::server::store::StoredNar;
use flywheel_nix::hash::Sha256;

/// Maximum number of checked NARs to remember, some 15 MiB. Beyond it, checks are repeated.
const REMEMBERED: usize = 100_000;
/// Maximum window of a stored NAR: levels up to 19 use 8 MiB.
const WINDOW_LOG: u32 = 25;
const BUFFER: usize = 128 * 1024;

/// What a file was when it was checked. Its modification time does not count: that is its last use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Identity {
    device: u64,
    inode: u64,
    size: u64,
}

impl Identity {
    fn of(about: &Metadata) -> Self {
        Self {
            device: about.dev(),
            inode: about.ino(),
            size: about.len(),
        }
    }
}

/// The NARs that have been found good, or were written, since the server's start.
#[derive(Debug, Default)]
pub(crate) struct CheckedNars(Mutex<HashMap<Sha256, (Identity, StoredNar)>>);

impl CheckedNars {
    /// The size and hash of a NAR's file, if that very file has been checked.
    pub(crate) fn get(&self, hash: &Sha256, about: &Metadata) -> Option<StoredNar> {
        let checked = self.lock();
        let (identity, nar) = checked.get(hash)?;
        (*identity == Identity::of(about)).then_some(*nar)
    }

    pub(crate) fn insert(&self, hash: Sha256, about: &Metadata, nar: StoredNar) {
        let mut checked = self.lock();
        // A new check costs little compared with a list of what was used last.
        if checked.len() >= REMEMBERED {
            checked.clear();
        }
        checked.insert(hash, (Identity::of(about), nar));
    }

    pub(crate) fn remove(&self, hash: &Sha256) {
        self.lock().remove(hash);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<Sha256, (Identity, StoredNar)>> {
        // A panic cannot leave the map half-changed.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Decompresses a NAR's file.
///
/// # Errors
/// When memory is short.
pub(crate) fn decoder(
    file: File,
) -> io::Result<zstd::stream::read::Decoder<'static, io::BufReader<File>>> {
    let mut decoder = zstd::stream::read::Decoder::new(file)?;
    // The header of a frame, which may be damaged, decides how much memory decoding takes.
    decoder.window_log_max(WINDOW_LOG)?;
    Ok(decoder)
}

/// A NAR's file that is checked piece by piece.
pub(crate) struct NarCheck {
    decoder: zstd::stream::write::Decoder<'static, HashSink>,
    file: sha2::Sha256,
    file_size: u64,
    broken: bool,
}

struct HashSink(sha2::Sha256);

impl Write for HashSink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl NarCheck {
    /// # Errors
    /// When memory is short.
    pub(crate) fn new() -> io::Result<Self> {
        let mut decoder = zstd::stream::write::Decoder::new(HashSink(sha2::Sha256::new()))?;
        // The header of a frame, which may be damaged, decides how much memory decoding takes.
        decoder.window_log_max(WINDOW_LOG)?;
        Ok(Self {
            decoder,
            file: sha2::Sha256::new(),
            file_size: 0,
            broken: false,
        })
    }

    /// Returns `false` as soon as the file is known to be damaged.
    pub(crate) fn take(&mut self, bytes: &[u8]) -> bool {
        self.file.update(bytes);
        self.file_size += bytes.len() as u64;
        self.broken = self.broken || self.decoder.write_all(bytes).is_err();
        !self.broken
    }

    /// The file's hash and size, if it holds the NAR with this hash.
    pub(crate) fn finish(mut self, expected: &Sha256) -> Option<StoredNar> {
        // Detects a truncated frame.
        if self.broken || self.decoder.do_finish().is_err() {
            return None;
        }
        let nar = Sha256(self.decoder.into_inner().0.finalize().into());
        (nar == *expected).then(|| StoredNar {
            file_hash: Sha256(self.file.finalize().into()),
            file_size: self.file_size,
        })
    }
}

/// Reads a NAR's whole file; `None` if it is damaged, or the disk cannot read it. `stated` is the file's hash
/// and size from a narinfo: if they fit, nothing needs to be decompressed.
///
/// # Errors
/// When the system, not the file, is at fault, or `stop` becomes true: a large file takes longer than a server may
/// take to stop.
pub(crate) fn check(
    mut file: &File,
    expected: &Sha256,
    stated: Option<StoredNar>,
    stop: &AtomicBool,
) -> io::Result<Option<StoredNar>> {
    if let Some(stated) = stated
        && file.metadata()?.len() == stated.file_size
    {
        let mut hash = sha2::Sha256::new();
        match for_each_piece(file, stop, |piece| {
            hash.update(piece);
            true
        }) {
            Ok(()) if Sha256(hash.finalize().into()) == stated.file_hash => {
                return Ok(Some(stated));
            }
            Err(error) if !is_damage(&error) => return Err(error),
            // The file may still hold the NAR: one that was sent again can be compressed differently.
            Ok(()) | Err(_) => file.seek(SeekFrom::Start(0))?,
        };
    }
    let mut check = NarCheck::new()?;
    match for_each_piece(file, stop, |piece| check.take(piece)) {
        Ok(()) => Ok(check.finish(expected)),
        Err(error) if is_damage(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Stops early if `take` returns `false`.
fn for_each_piece(
    mut file: &File,
    stop: &AtomicBool,
    mut take: impl FnMut(&[u8]) -> bool,
) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    loop {
        if stop.load(Ordering::Relaxed) {
            return Err(io::Error::other("the server stops"));
        }
        match file.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(read) if take(&buffer[..read]) => (),
            Ok(_) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => (),
            Err(error) => return Err(error),
        }
    }
}

/// Whether an error of reading is that of a sector that cannot be read, or of a name that is no file.
pub(crate) fn is_damage(error: &io::Error) -> bool {
    error.raw_os_error() == Some(rustix::io::Errno::IO.raw_os_error())
        || error.kind() == io::ErrorKind::IsADirectory
}
