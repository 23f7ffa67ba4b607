//! The journal records on disk what a job saw, planned, uploaded and verified, so that the next job on that disk can
//! publish what a killed one left. It owns its folder and its files, holds no secret, and never decides what is
//! published.
//!
//! A write reaches the kernel before the caller continues, so `kill -9` loses nothing. The disk has it within a second:
//! only a machine that crashes loses more, and Nix's own database then does, too.

mod line;

use std::collections::BTreeSet;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::process::geteuid;
use thiserror::Error;

pub use self::line::Until;
use self::line::{Entry, JournalContent, Step};
use flywheel_nix::store_path::StorePath;
use flywheel_sys::host::disk::full_disk;
use flywheel_sys::untrusted_file::{self, FileError, Owner};

/// The time between two syncs to the disk.
const SYNC: Duration = Duration::from_secs(1);
/// How long a job waits for its journal's first sync. After a longer time it goes on: a kill still loses nothing, and
/// the disk has the journal as soon as it comes to it.
const FIRST_SYNC_LIMIT: Duration = Duration::from_secs(2);
/// The largest journal, in bytes: about half a million paths.
const SIZE_LIMIT: u64 = 64 * 1024 * 1024;
/// The largest file that is read: the last line, and what other jobs append, may go beyond `SIZE_LIMIT`.
const READ_LIMIT: u64 = SIZE_LIMIT + 8 * 1024 * 1024;
/// After two weeks, paths that no job could publish are forgotten.
const AGE_LIMIT_SECONDS: u64 = 14 * 24 * 60 * 60;
const EXTENSION: &str = "journal";
/// The extension of a journal that its job is still making. It is locked before it is renamed, because a journal
/// without a lock is taken for a dead job's.
const DRAFT: &str = "draft";
/// A draft that is older belongs to a job that was killed while it made it.
const DRAFT_LIMIT: Duration = Duration::from_secs(60);

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

/// The folder of all journals of one user, as a job on one store uses it. A mark is an id in that store's database, and says
/// nothing of another one, so journals of jobs on other stores are left to jobs on those.
#[derive(Clone, Debug)]
pub struct Folder {
    path: PathBuf,
    /// The state folder of the store.
    store: String,
    /// The newest path of the store when the job began; its id in the database is the mark.
    marked: Option<StorePath>,
}

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
    /// The first line that could not be written, and why.
    problem: Mutex<Option<String>>,
}

/// What a journal holds when its job has ended.
#[derive(Debug, Default)]
pub struct Closed {
    /// The unsettled paths, which the next job takes up.
    pub kept: BTreeSet<StorePath>,
    /// Why the journal lacks lines, if it does.
    pub problem: Option<String>,
}

/// The store's growth during a job that has died, for which the job did not account: what was registered after `mark`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unaccounted {
    /// An id in Nix's database.
    pub mark: i64,
    /// The path that had this id. Where another one has it, the store is a new one in the place of the job's.
    pub marked: Option<StorePath>,
    /// Where another job's account begins.
    pub until: Option<Until>,
    /// When the job began (seconds since 1970).
    pub since: u64,
}

/// The unsettled paths in dead jobs' journals for one cache. The files stay locked until this is dropped.
#[derive(Debug, Default)]
pub struct Left {
    /// Paths that were seen to be valid, and since when they are unsettled (seconds since 1970).
    pub seen: Vec<(StorePath, u64)>,
    /// Paths that were only expected, and an id in Nix's database: a path counts if it was registered after it.
    pub expected: Vec<(i64, Vec<StorePath>)>,
    /// What is in no journal, because the job was killed first or what it had started lived on.
    pub unaccounted: Vec<Unaccounted>,
    /// Journals that are not used, each with the reason.
    pub refused: Vec<(PathBuf, String)>,
    files: Vec<(PathBuf, File)>,
}

impl Folder {
    /// Opens the folder, and creates it (0700) if it does not exist. `store` is the state folder of the job's store, and
    /// `marked` the newest path there, unless the store is empty.
    ///
    /// # Errors
    /// When it cannot be created, or others can write in it.
    pub fn open(folder: &Path, store: &Path, marked: Option<StorePath>) -> Result<Self, Error> {
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
        Ok(Self {
            path: folder.to_owned(),
            store: store.display().to_string(),
            marked,
        })
    }

    /// Begins the journal of a job that publishes to `cache`; `None` for a job that publishes nothing, of which the
    /// others must know all the same. `mark` is the last id in Nix's database, and `left` what this job takes up. The
    /// disk has the journal when this returns, unless it is slow.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn begin(
        &self,
        cache: Option<&str>,
        mark: Option<i64>,
        left: &Left,
    ) -> Result<Journal, Error> {
        let cache = cache.unwrap_or_default();
        let open = self
            .begin_file(cache, mark)
            .map_err(|source| self.system(source))?;
        if let Some(mark) = mark {
            self.divide(&open.0, cache, mark, left);
        }
        let _ = open.1.recv_timeout(FIRST_SYNC_LIMIT);
        Ok(Journal(Some(Arc::new(open.0))))
    }

    fn begin_file(
        &self,
        cache: &str,
        mark: Option<i64>,
    ) -> io::Result<(OpenJournal, Receiver<()>)> {
        // The random part is for jobs that start in the same second.
        let path = self
            .path
            .join(format!("{}-{:016x}.{EXTENSION}", now(), fastrand::u64(..)));
        let draft = path.with_extension(DRAFT);
        let file = OpenOptions::new()
            .append(true)
            .create_new(true)
            .mode(0o600)
            .open(&draft)?;
        // No other process has this file yet, so its lock is free.
        file.try_lock()?;
        let dirty = Arc::new(AtomicBool::new(false));
        let (stop, stopped) = channel();
        let (first, synced) = channel();
        let (syncs, is_dirty) = (file.try_clone()?, Arc::clone(&dirty));
        let folder = File::open(&self.path)?;
        let mut open = OpenJournal {
            file: Mutex::new(file),
            path,
            size: AtomicU64::new(0),
            dirty,
            stop: Some(stop),
            syncing: None,
            problem: Mutex::default(),
        };
        open.write(&Entry::begin(
            cache,
            &self.store,
            (mark, self.marked.as_ref()),
            now(),
        ))?;
        fs::rename(&draft, &open.path)?;
        let sync = move || {
            // A new file survives a crash only after its folder has been synced.
            let _ = syncs.sync_data().and_then(|()| folder.sync_all());
            let _ = first.send(());
            while stopped.recv_timeout(SYNC) == Err(RecvTimeoutError::Timeout) {
                if is_dirty.swap(false, Ordering::Relaxed) {
                    // Nothing waits for this sync. If it fails, a power cut can cost the journal its last entries; a
                    // kill cannot.
                    let _ = syncs.sync_data();
                }
            }
        };
        let thread = std::thread::Builder::new().name("journal".into());
        open.syncing = Some(thread.spawn(sync)?);
        Ok((open, synced))
    }

    /// Records in the other jobs' journals that this one accounts for what comes after its mark; and in `own`, where
    /// another job is alive, that nothing that comes is known to be this one's by its id alone.
    fn divide(&self, own: &OpenJournal, cache: &str, mark: i64, left: &Left) {
        let mut shared = None;
        for path in self.files(EXTENSION) {
            if path == own.path {
                continue;
            }
            let Ok(file) = untrusted_file::open(&path, Owner::Own, READ_LIMIT) else {
                continue;
            };
            let text = untrusted_file::read_open(&file, READ_LIMIT).unwrap_or_default();
            let read = JournalContent::parse(&text);
            if !read.is_of_store(&self.store) {
                continue;
            }
            let is_same = read.cache.as_deref() == Some(cache);
            let until = Until {
                id: mark,
                heir: is_same && !cache.is_empty(),
            };
            // The journals that this job takes up are locked by this job itself.
            let is_taken = left.files.iter().any(|(taken, _)| *taken == path);
            if !is_taken && file.try_lock_shared().is_err() {
                // Of several, one that publishes elsewhere or nothing decides.
                shared = Some(shared.map_or(until, |known: Until| known.min(until)));
            }
            // Without a lock, because a living job holds it: one short write at the end of the file cannot tear
            // another one. Should it fail, the next job trusts that one's account too far, as if this job kept none.
            let _ = untrusted_file::open_to_append(&path, Owner::Own, READ_LIMIT)
                .map_err(io::Error::from)
                .and_then(|mut other| other.write_all(Entry::until(until).to_line().as_bytes()));
        }
        if let Some(until) = shared {
            let _ = own.write(&Entry::until(until));
        }
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
        fs::read_dir(&self.path)?;
        self.sweep_drafts();
        let mut left = Left::default();
        for path in self.files(EXTENSION) {
            let file = match untrusted_file::open(&path, Owner::Own, READ_LIMIT) {
                Ok(file) => file,
                // Its job has ended well just now.
                Err(error) if error.is_absence() => continue,
                Err(error) => {
                    left.refused.push((path, error.to_string()));
                    continue;
                }
            };
            // Its job is alive, or another job is reading it.
            if file.try_lock().is_err() {
                continue;
            }
            // Another job has taken it up between our opening and our locking it.
            if file.metadata().is_ok_and(|found| found.nlink() == 0) {
                continue;
            }
            match untrusted_file::read_open(&file, READ_LIMIT) {
                Ok(text) => {
                    let read = JournalContent::parse(&text);
                    left.take((path, file), &read, (cache, &self.store), now);
                }
                // A file that cannot be read now may be readable at the next start.
                Err(error) => left.refused.push((path, error.to_string())),
            }
        }
        Ok(left)
    }

    /// Removes what jobs left that were killed while they made their journal: nothing of theirs had run yet.
    fn sweep_drafts(&self) {
        for path in self.files(DRAFT) {
            let changed = fs::symlink_metadata(&path).and_then(|found| found.modified());
            let age = changed.ok().and_then(|time| time.elapsed().ok());
            if age.is_some_and(|age| age > DRAFT_LIMIT) {
                let _ = fs::remove_file(&path);
            }
        }
    }

    /// The files in the folder with this extension.
    fn files(&self, extension: &str) -> Vec<PathBuf> {
        let entries = fs::read_dir(&self.path).into_iter().flatten().flatten();
        entries
            .map(|entry| entry.path())
            .filter(|path| path.extension().is_some_and(|found| found == extension))
            .collect()
    }

    fn system(&self, source: io::Error) -> Error {
        Error::System {
            folder: self.path.clone(),
            source,
        }
    }
}

impl Left {
    /// Whether dead jobs left nothing for this cache.
    pub fn is_empty(&self) -> bool {
        self.files.is_empty()
    }

    /// Takes what a dead job's journal, locked and read, has for a cache, if the job worked on this store.
    fn take(
        &mut self,
        (path, file): (PathBuf, File),
        read: &JournalContent,
        (cache, store): (&str, &str),
        now: u64,
    ) {
        // Of a journal in another version's format, only the file's own time is known.
        let begun = read
            .begun
            .or_else(|| file.metadata().ok()?.modified().ok().map(seconds))
            .unwrap_or_default();
        let is_old = begun.saturating_add(AGE_LIMIT_SECONDS) < now;
        let is_done = is_old && read.youngest().saturating_add(AGE_LIMIT_SECONDS) < now;
        // A dead job that published nothing leaves nothing.
        if is_done || read.cache.as_deref() == Some("") {
            let _ = fs::remove_file(&path);
        } else if read.cache.as_deref() == Some(cache) && read.is_of_store(store) {
            self.seen.extend(
                read.seen()
                    .filter(|(_, since)| since.saturating_add(AGE_LIMIT_SECONDS) >= now),
            );
            let expected: Vec<StorePath> = read.expected().collect();
            self.expected.extend(
                read.mark
                    .filter(|_| !expected.is_empty())
                    .map(|mark| (mark, expected)),
            );
            let unaccounted = read.unaccounted().filter(|_| !is_old);
            self.unaccounted.extend(unaccounted.map(|mark| Unaccounted {
                mark,
                marked: read.marked.clone(),
                until: read.until,
                since: begun,
            }));
            self.files.push((path, file));
        }
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
    ///
    /// # Errors
    /// With the reason, when the disk may lack some of them: then the earlier jobs' journals must stay.
    pub fn carried(&self, paths: &[(&StorePath, Option<u64>)]) -> Result<(), String> {
        let Some(open) = &self.0 else { return Ok(()) };
        for (path, since) in paths {
            self.write(&Entry::carried(path, since.unwrap_or_else(now)));
        }
        if let Some(problem) = open.problem().clone() {
            return Err(problem);
        }
        // Sync a copy of the file, without the journal's lock: a sync may take long, and other threads write in that time.
        let file = open.file().try_clone();
        file.and_then(|file| file.sync_data())
            .map_err(|error| format!("it could not be written: {error}"))
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

    /// Whether there is one that is written to.
    pub fn is_kept(&self) -> bool {
        self.0.is_some()
    }

    /// Ends the journal of a job that has read the store to its end: nothing that it expected is still to come, and
    /// nothing is unaccounted for. Removes the file if nothing is unsettled; else the next job reads it.
    pub fn close(self) -> Closed {
        self.write(&Entry::end());
        self.leave()
    }

    /// Leaves the journal to the next job, which reads what this job could not: all that was registered since its mark.
    pub fn leave(self) -> Closed {
        let Some(open) = &self.0 else {
            return Closed::default();
        };
        // The states are only in the file; memory keeps none of them.
        let text = match untrusted_file::read(&open.path, Owner::Own, READ_LIMIT) {
            Ok(text) => text,
            Err(error) => {
                return Closed {
                    kept: BTreeSet::new(),
                    problem: Some(format!("it {error}")),
                };
            }
        };
        let read = JournalContent::parse(&text);
        let kept: BTreeSet<StorePath> = read.seen().map(|(path, _)| path).collect();
        let is_reader = read.cache.as_deref() == Some("");
        if kept.is_empty() && (is_reader || read.unaccounted().is_none()) {
            let _ = fs::remove_file(&open.path);
        }
        Closed {
            kept,
            problem: open.problem().take(),
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

    /// A journal that cannot be written, for example on a full disk, must not fail the job. It then lacks lines, which
    /// `Closed` reports.
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

    fn problem(&self) -> MutexGuard<'_, Option<String>> {
        self.problem
            .lock()
            .expect("nothing panics while it holds this lock")
    }

    /// Each line is written by one call and starts with a line break, so that a line that a full disk has cut short
    /// does not spoil the next one.
    fn write(&self, entry: &Entry) -> io::Result<()> {
        let line = entry.to_line();
        // Lines beyond the limit are dropped. Only the successor of a killed job would miss them.
        let written = if self.size.fetch_add(line.len() as u64, Ordering::Relaxed) > SIZE_LIMIT {
            let limit = SIZE_LIMIT;
            Err(FileError::TooLarge { limit }.into())
        } else {
            self.file().write_all(line.as_bytes())
        };
        self.dirty.store(true, Ordering::Relaxed);
        written.inspect_err(|error: &io::Error| {
            let mut problem = self.problem();
            problem.get_or_insert_with(|| {
                let disk = full_disk(error, &self.path).map(|disk| format!(" ({disk})"));
                format!(
                    "it could not be written: {error}{}",
                    disk.unwrap_or_default()
                )
            });
        })
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
