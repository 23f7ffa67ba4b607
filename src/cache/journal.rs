//! The journal: what a job saw, planned, uploaded and verified, on disk as it happens, so that the next
//! job on that disk takes up what a killed one left. Owns its folder and its files; holds no secret, and
//! never decides what is published.
//!
//! A write reaches the kernel before the caller goes on, so that `kill -9` loses nothing of it. The disk
//! has it within a second: only a machine that dies loses more, and Nix's own database then does, too.

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
use crate::nix::store_path::StorePath;

/// How long after a write the disk has it.
const SYNC: Duration = Duration::from_secs(1);
/// A journal takes no more than this, in bytes: about half a million paths.
const SIZE_LIMIT: u64 = 64 * 1024 * 1024;
/// What nobody could publish in this time is let go: two weeks.
const AGE_LIMIT_SECONDS: u64 = 14 * 24 * 60 * 60;
/// Held while a journal is made or dead ones are taken up, so that no half-made one is taken for dead.
const LOCK: &str = "lock";
const EXTENSION: &str = "journal";

/// Why there is no journal.
#[derive(Debug, Error)]
pub enum Error {
    /// Others could write in it, and so have paths published.
    #[error("`{0}` is not a folder that belongs to this user alone")]
    Untrusted(PathBuf),
    /// The system refused.
    #[error("the journal in `{folder}` cannot be kept")]
    System {
        /// The folder.
        folder: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// The folder of all journals of one user.
#[derive(Clone, Debug)]
pub struct Folder(PathBuf);

/// A job's journal. Cheap to clone; the default one is kept nowhere.
#[derive(Clone, Debug, Default)]
pub struct Journal(Option<Arc<OpenJournal>>);

#[derive(Debug)]
struct OpenJournal {
    file: Mutex<File>,
    path: PathBuf,
    size: AtomicU64,
    dirty: Arc<AtomicBool>,
    /// Gone with the journal, which ends the thread that syncs.
    stop: Option<Sender<()>>,
    syncing: Option<JoinHandle<()>>,
}

/// What dead journals hold of one cache. The files are kept from others until this is dropped.
#[derive(Debug, Default)]
pub struct Left {
    /// Paths that were seen to be valid, and since when (seconds since 1970) that is unsettled.
    pub seen: Vec<(StorePath, u64)>,
    /// Paths that were only expected: they count if they were registered after the id.
    pub expected: Vec<(i64, Vec<StorePath>)>,
    files: Vec<(PathBuf, File)>,
}

impl Folder {
    /// Opens it, and makes it (0700) if it is not there.
    ///
    /// # Errors
    /// When it cannot be made, or others can write in it.
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
        let _made = self.lock()?;
        let path = self
            .0
            .join(format!("{}-{:016x}.{EXTENSION}", now(), fastrand::u64(..)));
        let file = OpenOptions::new()
            .append(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)?;
        file.lock()?;
        let dirty = Arc::new(AtomicBool::new(false));
        let (stop, stopped) = channel();
        let (syncs, is_dirty) = (file.try_clone()?, Arc::clone(&dirty));
        let syncing = std::thread::Builder::new()
            .name("journal".into())
            .spawn(move || {
                while stopped.recv_timeout(SYNC) == Err(RecvTimeoutError::Timeout) {
                    if is_dirty.swap(false, Ordering::Relaxed) {
                        // A disk that fails now fails the next write, too.
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
        File::open(&self.0)?.sync_all()?;
        Ok(open)
    }

    /// What jobs that are dead left for `cache`. Journals past their age are removed; those of other
    /// caches and of living jobs are let be.
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
            // Its job is alive, or another one is taking it up.
            if file.try_lock().is_err() {
                continue;
            }
            // What cannot be read now may be at the next start; too long is no journal of ours.
            let Ok(text) = fs::read(&path) else { continue };
            let read = JournalContent::parse(&text);
            // Of another version's journal only the file's own time is known.
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

    /// Removes the journals: everything in them that is still wanted stands in a living one.
    pub fn taken_up(self) {
        for (path, _locked) in &self.files {
            // One that cannot be removed is taken up again, which sends nothing twice.
            let _ = fs::remove_file(path);
        }
    }
}

impl Journal {
    /// Paths that a process of the job means to add: they may become valid at any moment.
    pub fn expected<'a>(&self, paths: impl IntoIterator<Item = &'a StorePath>) {
        self.note(Step::Expected, paths);
    }

    /// Paths that became valid and are wanted in the cache.
    pub fn seen<'a>(&self, paths: impl IntoIterator<Item = &'a StorePath>) {
        self.note(Step::Seen, paths);
    }

    /// Paths of earlier jobs, and since when they are unsettled. The disk has them when this returns.
    pub fn carried(&self, paths: &[(&StorePath, Option<u64>)]) {
        for (path, since) in paths {
            self.write(&Entry::carried(path, since.unwrap_or_else(now)));
        }
        if let Some(open) = &self.0 {
            let _ = open.file().sync_data();
        }
    }

    /// Paths that the cache does not have, and that are to be sent.
    pub fn planned<'a>(&self, paths: impl IntoIterator<Item = &'a StorePath>) {
        self.note(Step::Planned, paths);
    }

    /// Paths that the cache has, sent by this job or before it.
    pub fn uploaded<'a>(&self, paths: impl IntoIterator<Item = &'a StorePath>) {
        self.note(Step::Uploaded, paths);
    }

    /// Paths that need no more care: the cache was seen to serve them, or they are left out on purpose.
    pub fn settled<'a>(&self, paths: impl IntoIterator<Item = &'a StorePath>) {
        self.note(Step::Settled, paths);
    }

    /// Ends the journal in order: nothing expected becomes valid any more. If nothing is left its file
    /// goes; else the next job takes it up.
    pub fn close(self) {
        let Some(open) = &self.0 else { return };
        self.write(&Entry::end());
        let whole = fs::read(&open.path).is_ok_and(|text| {
            let read = JournalContent::parse(&text);
            read.seen().next().is_none()
        });
        if whole {
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

    /// A journal that cannot be written, on a full disk say, is no reason to stop: then it has less.
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

    /// One write for one line, begun on a line of its own: what a full disk cut short spoils nothing else.
    fn write(&self, entry: &Entry) -> io::Result<()> {
        let line = entry.to_line();
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
            // It holds no lock and cannot panic.
            let _ = syncing.join();
        }
        // A child that was forked this moment holds the file, too, until it becomes its program: closing it here
        // would not be enough for the next job.
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
