//! Collects the store paths that the Nix processes of the job have named. It only reads. That a path was named by the
//! job is evidence for it; that a path was not named, or was named by another process, is no evidence against it: a
//! process can be gone before it is looked at, and the processes of a daemon are not the job's.
//!
//! Before a Nix process adds, builds or fetches a path, it writes the path's name to its own file
//! in `temproots/`, named after its process id, so that the garbage collector spares the path
//! (`LocalStore::addTempRoot`). A daemon worker does this on behalf of its client, and shows the
//! client's process id in its own arguments. This module opens each file when it appears and keeps
//! it open, because the contents stay readable after the process has removed the file.

mod process_owner;

use std::collections::{BTreeMap, HashSet};
use std::fs::{self, File};
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use process_owner::{ProcessOwner, impurity_of};

use crate::store_path::StorePath;
use flywheel_core::policy::Impurity;
use flywheel_sys::host::notify::{Event, Notify, WatchFlags};
use flywheel_sys::untrusted_file::{self, FileError, Owner};

/// The processes that belong to the job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum JobScope {
    /// This process and its descendants.
    Descendants,
    /// Processes that carry this `NAME=value` in their environment, or descend from one that does.
    /// CI systems mark a job this way. Looking at the ancestors finds processes that dropped the
    /// variable (`sudo`, `env -i`).
    Marked(String),
    /// All processes of this user, for laptops, where nothing marks a session.
    User,
}

/// Called with the paths that a process of the job is about to add.
type OnExpected = Box<dyn FnMut(&[StorePath]) + Send>;

/// Watches `temproots/` and remembers the paths that the job has named.
#[derive(Debug)]
pub struct TempRootWatcher {
    state: Arc<Mutex<WatcherState>>,
    _notify: Option<Notify>,
}

struct WatcherState {
    folder: PathBuf,
    job: JobScope,
    on_expected: Option<OnExpected>,
    open: BTreeMap<u32, RootsFile>,
    ours: HashSet<StorePath>,
    /// Named by daemon workers that show no client.
    unattributed: HashSet<StorePath>,
    /// Processes whose names could not be read: they ended too soon, or their files are closed to this user.
    unread: HashSet<u32>,
    /// Processes whose names were read, and that ended before it was known whose they are.
    ownerless: HashSet<u32>,
    /// Processes that cannot be missed any more: their files were opened, or are another job's.
    known: HashSet<u32>,
    /// Files that were there before the watch, left by processes long gone. They are kept open, so that no new file gets
    /// the number of one of them.
    stale: Vec<File>,
    /// How a process of the job requested impure evaluation, if one did.
    impurity: Option<Impurity>,
}

impl std::fmt::Debug for WatcherState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WatcherState")
            .field("folder", &self.folder)
            .field("job", &self.job)
            .finish_non_exhaustive()
    }
}

/// The open temporary-roots file of one process.
#[derive(Debug)]
struct RootsFile {
    file: File,
    ours: bool,
    unparsed: Vec<u8>,
}

impl RootsFile {
    /// Returns the paths written since the last call whose names are complete, or `None` if the
    /// file cannot be read.
    fn read(&mut self) -> Option<Vec<StorePath>> {
        self.file.read_to_end(&mut self.unparsed).ok()?;
        let whole = self
            .unparsed
            .iter()
            .rposition(|byte| *byte == 0)
            .map_or(0, |end| end + 1);
        // A name without its terminating NUL is still being written; keep it for the next call.
        let done: Vec<u8> = self.unparsed.drain(..whole).collect();
        // A store path is UTF-8; anything else in the file is not one.
        let names = done
            .split(|byte| *byte == 0)
            .filter_map(|name| std::str::from_utf8(name).ok());
        Some(names.filter_map(|name| name.parse().ok()).collect())
    }
}

impl TempRootWatcher {
    /// Starts watching. `state_dir` is Nix's state folder, usually `/nix/var/nix`. Call this before
    /// the moment from which added paths count as the job's: a process that exited earlier cannot
    /// have added a path since.
    pub fn start(state_dir: &Path, job: JobScope) -> Self {
        let folder = state_dir.join("temproots");
        let state = Arc::new(Mutex::new(WatcherState {
            folder: folder.clone(),
            job,
            on_expected: None,
            open: BTreeMap::new(),
            ours: HashSet::new(),
            unattributed: HashSet::new(),
            unread: HashSet::new(),
            ownerless: HashSet::new(),
            known: HashSet::new(),
            stale: Vec::new(),
            impurity: None,
        }));
        let shared_state = Arc::clone(&state);
        // Without inotify the watcher still works: `owners` reads the folder itself.
        let notify = Notify::watch(
            &folder,
            WatchFlags::CREATE | WatchFlags::MODIFY,
            Duration::ZERO,
            move |event| {
                lock(&shared_state).on_event(&event);
            },
        )
        .ok();
        let mut begun = lock(&state);
        begun.set_stale_aside();
        // Processes that were already running when the watch began raise no event.
        begun.open_all();
        drop(begun);
        Self {
            state,
            _notify: notify,
        }
    }

    /// Registers `on_expected`, which receives the paths that processes of the job are about to
    /// add, including those seen before this call. This is usually long before the paths become
    /// valid. Each path is reported immediately, because a path missing from the journal when the
    /// job is killed is lost to the next job.
    pub fn subscribe(&self, mut on_expected: impl FnMut(&[StorePath]) + Send + 'static) {
        let mut state = lock(&self.state);
        // Paths found before this call would otherwise never be reported.
        let before: Vec<StorePath> = state.ours.iter().cloned().collect();
        if !before.is_empty() {
            on_expected(&before);
        }
        state.on_expected = Some(Box::new(on_expected));
    }

    /// How a Nix process of the job requested impure evaluation, if one has been seen doing so.
    pub fn impurity(&self) -> Option<Impurity> {
        let mut state = lock(&self.state);
        state.open_all();
        state.impurity.clone()
    }

    /// The paths that processes of the job have named so far. A path that is valid has been named before, if its
    /// process was seen at all.
    pub fn named(&self) -> HashSet<StorePath> {
        let mut state = lock(&self.state);
        state.catch_up();
        state.ours.clone()
    }

    /// How many processes, of this job or of others, have named what could not be read.
    pub fn unread(&self) -> usize {
        lock(&self.state).unread.len()
    }

    /// How many processes ended before it was known whose they are; [`Self::unattributed`] has what they named.
    pub fn ownerless(&self) -> usize {
        lock(&self.state).ownerless.len()
    }

    /// The paths that were named by daemon workers for clients that they do not show, and by processes that ended before
    /// they were looked at: the job's own where no other job uses the store.
    pub fn unattributed(&self) -> HashSet<StorePath> {
        let mut state = lock(&self.state);
        state.catch_up();
        state.unattributed.clone()
    }
}

fn lock(state: &Mutex<WatcherState>) -> MutexGuard<'_, WatcherState> {
    state
        .lock()
        .expect("nothing panics while it holds this lock")
}

impl WatcherState {
    /// Reads what inotify's thread may not have handled yet.
    fn catch_up(&mut self) {
        self.open_all();
        self.read_new();
    }

    fn on_event(&mut self, event: &Event<'_>) {
        match event {
            Event::Entry(name) => {
                if let Ok(pid) = name.parse() {
                    self.open_file(pid);
                }
            }
            // inotify dropped events, but the folder still lists every running process.
            Event::Lost => self.open_all(),
        }
        // Close the files of exited processes, or a long job would hold one descriptor per process.
        self.read_new();
    }

    fn pids(&self) -> Vec<u32> {
        let entries = fs::read_dir(&self.folder).into_iter().flatten().flatten();
        entries
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .collect()
    }

    fn open_all(&mut self) {
        for pid in self.pids() {
            self.open_file(pid);
        }
    }

    /// Remembers the files of processes that ended before the watch. What they named is no business of this job.
    fn set_stale_aside(&mut self) {
        for pid in self.pids() {
            if ProcessOwner::of_process(pid, &self.job) == ProcessOwner::Exited {
                self.stale
                    .extend(open_roots(&self.folder.join(pid.to_string())));
                // One that cannot be opened is known by its number alone.
                self.known.insert(pid);
            }
        }
    }

    fn open_file(&mut self, pid: u32) {
        let file = open_roots(&self.folder.join(pid.to_string()));
        let known = |roots: &RootsFile, file: &File| same_file(&roots.file, file);
        if let (Some(roots), Ok(file)) = (self.open.get(&pid), &file)
            && known(roots, file)
        {
            // This file is open already. Another file under the same number would mean that the process
            // id was reused.
            return;
        }
        let owner = ProcessOwner::of_process(pid, &self.job);
        // The arguments are readable only while the process lives, so look now.
        if owner == ProcessOwner::ThisJob && self.impurity.is_none() {
            self.impurity = impurity_of(pid);
        }
        match (file, owner) {
            (_, ProcessOwner::OtherJob) => _ = self.known.insert(pid),
            (Ok(file), ProcessOwner::Exited) if self.is_stale(&file) => (),
            (Ok(file), owner) => {
                // The names of a process that has ended stay readable.
                if owner == ProcessOwner::Exited {
                    self.ownerless.insert(pid);
                }
                self.known.insert(pid);
                self.close(pid);
                self.open.insert(
                    pid,
                    RootsFile {
                        file,
                        ours: owner == ProcessOwner::ThisJob,
                        unparsed: Vec::new(),
                    },
                );
            }
            // A file that cannot be opened names nothing: its paths are judged by the other evidence.
            (Err(_), ProcessOwner::Unattributed) => _ = self.known.insert(pid),
            (Err(_), ProcessOwner::Exited | ProcessOwner::ThisJob) => {
                if !self.known.contains(&pid) {
                    self.unread.insert(pid);
                }
            }
        }
    }

    fn is_stale(&self, file: &File) -> bool {
        self.stale.iter().any(|stale| same_file(stale, file))
    }

    /// Reads what the processes have written since the last call, and closes the files of those
    /// that have exited.
    fn read_new(&mut self) {
        let pids: Vec<u32> = self.open.keys().copied().collect();
        for pid in pids {
            self.read(pid);
            let ended = self
                .open
                .get(&pid)
                // Nix removes the file when its process exits; the open descriptor then has no link
                // left.
                .is_none_or(|roots| roots.file.metadata().is_ok_and(|file| file.nlink() == 0));
            // Read once more before closing: the process may have written between the read and its
            // exit.
            if ended {
                self.close(pid);
            }
        }
    }

    fn close(&mut self, pid: u32) {
        self.read(pid);
        self.open.remove(&pid);
    }

    fn read(&mut self, pid: u32) {
        let Some(roots) = self.open.get_mut(&pid) else {
            return;
        };
        match roots.read() {
            None => (),
            Some(paths) if roots.ours => {
                let new: Vec<StorePath> = paths
                    .into_iter()
                    .filter(|path| !self.ours.contains(path))
                    .collect();
                if let Some(on_expected) = self.on_expected.as_mut().filter(|_| !new.is_empty()) {
                    on_expected(&new);
                }
                self.ours.extend(new);
            }
            Some(paths) => self.unattributed.extend(paths),
        }
    }
}

fn same_file(one: &File, other: &File) -> bool {
    match (one.metadata(), other.metadata()) {
        (Ok(one), Ok(other)) => (one.dev(), one.ino()) == (other.dev(), other.ino()),
        _ => false,
    }
}

/// Opens a process's temporary roots. A pipe in their place, which this user's other processes can make, is not waited for.
fn open_roots(file: &Path) -> Result<File, FileError> {
    untrusted_file::open(file, Owner::Any, u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATH: &str = "/nix/store/fvchbymk0m4jvldpb9m5hy0bjy2lf30k-hello";

    fn path() -> StorePath {
        PATH.parse().expect("valid")
    }

    fn state_dir() -> tempfile::TempDir {
        let folder = tempfile::tempdir().expect("temporary folder");
        fs::create_dir(folder.path().join("temproots")).expect("made");
        folder
    }

    fn write(folder: &Path, pid: u32, text: &str) {
        fs::write(folder.join("temproots").join(pid.to_string()), text).expect("written");
    }

    #[test]
    fn a_path_of_our_own_process_is_ours_even_after_its_file_is_gone() {
        let folder = state_dir();
        let watcher = TempRootWatcher::start(folder.path(), JobScope::Descendants);
        write(folder.path(), std::process::id(), &format!("{PATH}\0"));
        assert!(watcher.named().contains(&path()));
        fs::remove_file(
            folder
                .path()
                .join(format!("temproots/{}", std::process::id())),
        )
        .expect("removed");
        assert!(watcher.named().contains(&path()));
    }

    #[test]
    fn a_pipe_in_place_of_a_file_is_not_waited_for() {
        use rustix::fs::{CWD, Mode, mkfifoat};
        let folder = state_dir();
        for pid in [std::process::id(), 1, u32::MAX] {
            let file = folder.path().join("temproots").join(pid.to_string());
            mkfifoat(CWD, file, Mode::from(0o600)).expect("made");
        }
        // On a thread of its own, so that waiting would be seen.
        let (done, ended) = std::sync::mpsc::channel();
        let watched = folder.path().to_owned();
        std::thread::spawn(move || {
            let watcher = TempRootWatcher::start(&watched, JobScope::Descendants);
            let _ = done.send(watcher.named().is_empty());
        });
        let named_nothing = ended.recv_timeout(Duration::from_secs(10));
        assert_eq!(named_nothing, Ok(true));
    }

    #[test]
    fn what_another_process_names_is_not_named_by_the_job() {
        let folder = state_dir();
        let watcher = TempRootWatcher::start(folder.path(), JobScope::Descendants);
        write(folder.path(), 1, &format!("{PATH}\0/nix/store/half-writ"));
        assert!(watcher.named().is_empty() && watcher.unattributed().is_empty());
        write(folder.path(), std::process::id(), &format!("{PATH}\0"));
        assert!(watcher.named().contains(&path()), "both want it");
    }

    #[test]
    fn what_a_process_named_is_read_after_its_end_unless_it_ended_before_the_watch() {
        let folder = state_dir();
        let (gone, second) = (u32::MAX, PATH.replace("hello", "world"));
        write(folder.path(), gone - 1, &format!("{PATH}\0"));
        let watcher = TempRootWatcher::start(folder.path(), JobScope::Descendants);
        write(folder.path(), gone, &format!("{second}\0"));
        assert!(watcher.named().is_empty(), "whose it is, nobody knows");
        let second: StorePath = second.parse().expect("valid");
        assert_eq!(watcher.unattributed(), HashSet::from([second]));
        assert_eq!((watcher.ownerless(), watcher.unread()), (1, 0));
    }

    #[test]
    fn a_process_whose_file_was_gone_too_soon_is_counted_once() {
        let folder = state_dir();
        let watcher = TempRootWatcher::start(folder.path(), JobScope::Descendants);
        let mut state = lock(&watcher.state);
        state.on_event(&Event::Entry(&u32::MAX.to_string()));
        state.on_event(&Event::Entry(&u32::MAX.to_string()));
        drop(state);
        assert_eq!((watcher.ownerless(), watcher.unread()), (0, 1));
    }

    #[test]
    fn a_file_that_is_gone_is_let_go_and_a_new_one_of_that_number_is_read() {
        let folder = state_dir();
        let watcher = TempRootWatcher::start(folder.path(), JobScope::Descendants);
        let (us, second) = (std::process::id(), PATH.replace("hello", "world"));
        write(folder.path(), us, &format!("{PATH}\0"));
        assert!(watcher.named().contains(&path()));
        assert_eq!(lock(&watcher.state).open.len(), 1);
        fs::remove_file(folder.path().join(format!("temproots/{us}"))).expect("removed");
        write(folder.path(), us, &format!("{second}\0"));
        let mut state = lock(&watcher.state);
        state.on_event(&Event::Entry(&us.to_string()));
        assert!(state.open.keys().eq(&[us]));
        assert!(state.ours.contains(&second.parse().expect("valid")));
    }

    #[test]
    fn what_is_meant_to_be_added_is_told_before_it_is_valid() {
        let folder = state_dir();
        let watcher = TempRootWatcher::start(folder.path(), JobScope::Descendants);
        write(folder.path(), std::process::id(), &format!("{PATH}\0"));
        assert!(watcher.named().contains(&path()));
        let (send, receive) = std::sync::mpsc::channel();
        watcher.subscribe(move |paths| send.send(paths.to_vec()).expect("the test listens"));
        let deadline = Duration::from_secs(10);
        assert_eq!(
            receive
                .recv_timeout(deadline)
                .expect("shared_state of what was before"),
            [path()]
        );
        let second: StorePath = PATH.replace("hello", "world").parse().expect("valid");
        write(
            folder.path(),
            std::process::id(),
            &format!("{PATH}\0{second}\0"),
        );
        assert_eq!(
            receive.recv_timeout(deadline).expect("shared_state"),
            [second]
        );
    }
}
