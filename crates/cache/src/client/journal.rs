//! The journal records on disk what a job saw, planned, uploaded and verified, so that the next job on that disk can
//! publish what a killed one left. It owns its folder and its files, holds no secret, and never decides what is
//! published.
//!
//! A write reaches the kernel before the caller continues, so `kill -9` loses nothing. The disk has it within a second:
//! only a machine that crashes loses more, and Nix's own database then does, too.

mod line;

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::process::geteuid;
use thiserror::Error;

use self::line::{Entry, JournalContent, Step};
use flywheel_nix::store_path::StorePath;

/// The time between two syncs to the disk.
const SYNC: Duration = Duration::from_secs(1);
/// The largest journal, in bytes: about half a million paths.
const SIZE_LIMIT: u64 = 64 * 1024 * 1024;
/// After two weeks, paths that no job could publish are forgotten.
const AGE_LIMIT_SECONDS: u64 = 14 * 24 * 60 * 60;
/// The file that is locked while a journal is created or dead ones are read: a journal that its job has not locked yet
/// would be taken for dead.
const LOCK: &str = "lock";
const EXTENSION: &str = "journal";

/// Why there is no journal.
#[derive(Debug, Error)]
pub enum Error {
    /// Other users could write in the folder, and so have their paths published.
    #[error("`{0}` is not a folder that belongs to this user alone")]
    Untrusted(PathBuf),
    #[error("the journal in `{folder}` cannot be kept")]
    System {
        folder: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// The folder of all journals of one user.
#[derive(Clone, Debug)]
pub struct Folder(PathBuf);

/// A job's journal. Cheap to clone; the default one writes nothing.
#[derive(Clone, Debug, Default)]
pub struct Journal(Option<Arc<OpenJournal>>);

#[derive(Debug)]
struct OpenJournal {
    file: Mutex<File>,
    path: PathBuf,
    size: AtomicU64,
    dirty: Arc<AtomicBool>,
    /// Dropped with the journal, which ends the syncing thread.
    stop: Option<Sender<()>>,
    syncing: Option<JoinHandle<()>>,
}

/// The unsettled paths in dead jobs' journals for one cache. The files stay locked until this is dropped.
#[derive(Debug, Default)]
pub struct Left {
    /// Paths that were seen to be valid, and since when they are unsettled (seconds since 1970).
    pub seen: Vec<(StorePath, u64)>,
    /// Paths that were only expected, and an id in Nix's database: a path counts if it was registered after it.
    pub expected: Vec<(i64, Vec<StorePath>)>,
    files: Vec<(PathBuf, File)>,
}

impl Folder {
    /// Opens the folder, and creates it (0700) if it does not exist.
    ///
    /// # Errors
    /// When it cannot be created, or others can write in it.
    pub fn open(folder: &Path) -> Result<Self, Error> {
        let system = |source| Error::System {
            folder: folder.to_owned(),
            source,
        };
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(folder)
            .map_err(system)?;
        let found = fs::symlink_metadata(folder).map_err(system)?;
        if !found.is_dir() || found.uid() != geteuid().as_raw() || found.mode() & 0o077 != 0 {
            return Err(Error::Untrusted(folder.to_owned()));
        }
        Ok(Self(folder.to_owned()))
    }

    /// Begins the journal of a job that publishes to `cache`. `mark` is the last id in Nix's database.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn begin(&self, cache: &str, mark: Option<i64>) -> Result<Journal, Error> {
        self.begin_file(cache, mark)
            .map(|open| Journal(Some(Arc::new(open))))
            .map_err(|source| self.system(source))
    }

    fn begin_file(&self, cache: &str, mark: Option<i64>) -> io::Result<OpenJournal> {
        let _creating = self.lock()?;
        // The random part is for jobs that start in the same second.
        let path = self
            .0
            .join(format!("{}-{:016x}.{EXTENSION}", now(), fastrand::u64(..)));
        let file = OpenOptions::new()
            .append(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)?;
        // Before the folder's lock is released: a journal without a lock is taken for a dead job's.
        file.lock()?;
        let dirty = Arc::new(AtomicBool::new(false));
        let (stop, stopped) = channel();
        let (syncs, is_dirty) = (file.try_clone()?, Arc::clone(&dirty));
        let syncing = std::thread::Builder::new()
            .name("journal".into())
            .spawn(move || {
                while stopped.recv_timeout(SYNC) == Err(RecvTimeoutError::Timeout) {
                    if is_dirty.swap(false, Ordering::Relaxed) {
                        // Nothing waits for this sync. If it fails, a power cut can cost the journal its last
                        // entries; a kill cannot.
                        let _ = syncs.sync_data();
                    }
                }
            })?;
        let open = OpenJournal {
            file: Mutex::new(file),
            path,
            size: AtomicU64::new(0),
            dirty,
            stop: Some(stop),
            syncing: Some(syncing),
        };
        open.write(&Entry::begin(cache, mark, now()))?;
        // A new file survives a crash only after its folder has been synced.
        File::open(&self.0)?.sync_all()?;
        Ok(open)
    }

    /// What dead jobs left for `cache`. Removes journals past their age; ignores those of other caches and of living
    /// jobs.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub fn left(&self, cache: &str) -> Result<Left, Error> {
        self.left_at(cache, now())
            .map_err(|source| self.system(source))
    }

    fn left_at(&self, cache: &str, now: u64) -> io::Result<Left> {
        let _reading = self.lock()?;
        let mut left = Left::default();
        for entry in fs::read_dir(&self.0)?.flatten() {
            let path = entry.path();
            if path
                .extension()
                .is_none_or(|extension| extension != EXTENSION)
            {
                continue;
            }
            let Ok(file) = File::open(&path) else {
                continue;
            };
            // Its job is alive, or another job is reading it.
            if file.try_lock().is_err() {
                continue;
            }
            // A file that cannot be read now may be readable at the next start.
            let Ok(text) = fs::read(&path) else { continue };
            let read = JournalContent::parse(&text);
            // Of a journal in another version's format, only the file's own time is known.
            let begun = read
                .begun
                .or_else(|| file.metadata().ok()?.modified().ok().map(seconds))
                .unwrap_or_default();
            let is_old = begun.saturating_add(AGE_LIMIT_SECONDS) < now;
            if is_old && read.youngest().saturating_add(AGE_LIMIT_SECONDS) < now {
                let _ = fs::remove_file(&path);
            } else if read.cache.as_deref() == Some(cache) {
                left.seen.extend(
                    read.seen()
                        .filter(|(_, since)| since.saturating_add(AGE_LIMIT_SECONDS) >= now),
                );
                let expected: Vec<StorePath> = read.expected().collect();
                left.expected.extend(
                    read.mark
                        .filter(|_| !expected.is_empty())
                        .map(|mark| (mark, expected)),
                );
                left.files.push((path, file));
            }
        }
        Ok(left)
    }

    fn lock(&self) -> io::Result<File> {
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(self.0.join(LOCK))?;
        file.lock()?;
        Ok(file)
    }

    fn system(&self, source: io::Error) -> Error {
        Error::System {
            folder: self.0.clone(),
            source,
        }
    }
}

impl Left {
    /// Whether dead jobs left nothing for this cache.
    pub fn is_empty(&self) -> bool {
        self.files.is_empty()
    }

    /// Removes the journals. Everything in them that is still wanted must be in a living journal by now.
    pub fn taken_up(self) {
        for (path, _locked) in &self.files {
            // A file that cannot be removed is read again by the next job, which sends nothing twice.
            let _ = fs::remove_file(path);
        }
    }
}

impl Journal {
    /// Records paths that a process of the job is about to add: they may become valid at any moment.
    pub fn expected<'a>(&self, paths: impl IntoIterator<Item = &'a StorePath>) {
        self.note(Step::Expected, paths);
    }

    /// Records paths that became valid and are wanted in the cache.
    pub fn seen<'a>(&self, paths: impl IntoIterator<Item = &'a StorePath>) {
        self.note(Step::Seen, paths);
    }

    /// Records paths of earlier jobs, and since when they are unsettled. The disk has them when this returns.
    pub fn carried(&self, paths: &[(&StorePath, Option<u64>)]) {
        for (path, since) in paths {
            self.write(&Entry::carried(path, since.unwrap_or_else(now)));
        }
        if let Some(open) = &self.0 {
            let _ = open.file().sync_data();
        }
    }

    /// Records paths that the cache lacks and that will be sent.
    pub(crate) fn planned<'a>(&self, paths: impl IntoIterator<Item = &'a StorePath>) {
        self.note(Step::Planned, paths);
    }

    /// Records paths that the cache has, sent by this job or before it.
    pub(crate) fn uploaded<'a>(&self, paths: impl IntoIterator<Item = &'a StorePath>) {
        self.note(Step::Uploaded, paths);
    }

    /// Records paths that are finished: the cache was seen to serve them, or they are left out on purpose.
    pub fn settled<'a>(&self, paths: impl IntoIterator<Item = &'a StorePath>) {
        self.note(Step::Settled, paths);
    }

    /// Ends the journal: expected paths can no longer become valid. Removes the file if nothing is unsettled; else
    /// the next job reads it.
    pub fn close(self) {
        let Some(open) = &self.0 else { return };
        self.write(&Entry::end());
        // The states are only in the file; memory keeps none of them.
        let is_settled = fs::read(&open.path).is_ok_and(|text| {
            let read = JournalContent::parse(&text);
            read.seen().next().is_none()
        });
        if is_settled {
            let _ = fs::remove_file(&open.path);
        }
    }

    fn note<'a>(&self, step: Step, paths: impl IntoIterator<Item = &'a StorePath>) {
        if self.0.is_some() {
            let paths: Vec<&str> = paths.into_iter().map(StorePath::base_name).collect();
            if !paths.is_empty() {
                self.write(&Entry::paths(step, &paths));
            }
        }
    }

    /// A journal that cannot be written, for example on a full disk, must not fail the job. It then lacks lines.
    fn write(&self, entry: &Entry) {
        if let Some(open) = &self.0 {
            let _ = open.write(entry);
        }
    }
}

impl OpenJournal {
    fn file(&self) -> MutexGuard<'_, File> {
        self.file
            .lock()
            .expect("nothing panics while it holds this lock")
    }

    /// Each line is written by one call and starts with a line break, so that a line that a full disk has cut short
    /// does not spoil the next one.
    fn write(&self, entry: &Entry) -> io::Result<()> {
        let line = entry.to_line();
        // Lines beyond the limit are dropped. Only the successor of a killed job would miss them.
        if self.size.fetch_add(line.len() as u64, Ordering::Relaxed) > SIZE_LIMIT {
            return Ok(());
        }
        let written = self.file().write_all(line.as_bytes());
        self.dirty.store(true, Ordering::Relaxed);
        written
    }
}

impl Drop for OpenJournal {
    fn drop(&mut self) {
        self.stop.take();
        if let Some(syncing) = self.syncing.take() {
            // The thread holds no lock and cannot panic.
            let _ = syncing.join();
        }
        // Closing the file would not release the lock if a child was forked just now: the child holds the file, too,
        // until it executes its program.
        let _ = self.file().unlock();
    }
}

fn now() -> u64 {
    seconds(SystemTime::now())
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH)
        .map_or(0, |time| time.as_secs())
}

#[cfg(test)]
mod tests;
