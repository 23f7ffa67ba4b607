//! Decides which Nix processes on this machine belong to the job, and from that which added paths
//! do, so that jobs sharing a store do not publish each other's work. It only reads, and makes no
//! decision about publishing.
//!
//! Before a Nix process adds, builds or fetches a path, it writes the path's name to its own file
//! in `temproots/`, named after its process id, so that the garbage collector spares the path
//! (`LocalStore::addTempRoot`). A daemon worker does this on behalf of its client, and shows the
//! client's process id in its own arguments. This module opens each file when it appears and keeps
//! it open, because the contents stay readable after the process has removed the file.

use std::collections::{BTreeMap, HashSet};
use std::fs::{self, File};
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use rustix::process::geteuid;

use crate::store_path::StorePath;
use flywheel_core::policy::{Impurity, impurity_in_arguments, impurity_in_settings};
use flywheel_sys::host::notify::{Event, Notify, WatchFlags};

/// Ancestors to follow from a process. `/proc` is not read atomically, so a reused process id could
/// otherwise form a loop.
const DEPTH_LIMIT: usize = 4096;

/// The job that added a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// A process of this job added it.
    ThisJob,
    /// A process of another job added it.
    OtherJob,
    /// No process was seen adding it, and processes of another job were running.
    Ambiguous,
    /// No process was seen adding it, and no other job has been seen so far. The path counts as
    /// this job's unless another job shows up.
    Unclaimed,
}

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

/// Watches `temproots/` and remembers which job each path belongs to.
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
    others: HashSet<StorePath>,
    /// Whether any process of another job has been seen. From then on, a process that exited before
    /// it could be inspected may have belonged to that job.
    other_jobs_seen: bool,
    /// Whether a process of another job removed its file before the file could be opened.
    unclear: bool,
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
            others: HashSet::new(),
            other_jobs_seen: false,
            unclear: false,
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

    /// Returns the owner of each path. Call this once the paths are valid: by then the process that
    /// added them has written their names.
    pub fn owners(&self, paths: &[StorePath]) -> Vec<Owner> {
        let mut state = lock(&self.state);
        // The inotify task may not have handled the most recent files yet.
        state.open_all();
        state.read_new();
        paths.iter().map(|path| state.owner_of(path)).collect()
    }
}

fn lock(state: &Mutex<WatcherState>) -> MutexGuard<'_, WatcherState> {
    state
        .lock()
        .expect("nothing panics while it holds this lock")
}

impl WatcherState {
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

    fn open_all(&mut self) {
        for entry in fs::read_dir(&self.folder).into_iter().flatten().flatten() {
            if let Some(pid) = entry
                .file_name()
                .to_str()
                .and_then(|name| name.parse().ok())
            {
                self.open_file(pid);
            }
        }
    }

    fn open_file(&mut self, pid: u32) {
        let file = File::open(self.folder.join(pid.to_string()));
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
        // Remember this even when the file cannot be opened: it makes unclaimed paths ambiguous.
        self.other_jobs_seen |= owner == ProcessOwner::OtherJob;
        match (file, owner) {
            (_, ProcessOwner::Exited) => (),
            (Ok(file), owner) => {
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
            // The names in that file are lost, so any path may be the other job's.
            (Err(_), ProcessOwner::OtherJob) => self.unclear = true,
            // Its paths stay unclaimed, which counts as this job's while no other job is seen.
            (Err(_), ProcessOwner::ThisJob) => (),
        }
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
            None => self.unclear |= !roots.ours,
            // Another job may want the same path; it is enough that this one does.
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
            Some(paths) => self.others.extend(paths),
        }
    }

    fn owner_of(&self, path: &StorePath) -> Owner {
        // This job's claim wins when two jobs want the same path.
        if self.ours.contains(path) {
            Owner::ThisJob
        } else if self.others.contains(path) {
            Owner::OtherJob
        } else if self.unclear || self.other_jobs_seen {
            Owner::Ambiguous
        } else {
            Owner::Unclaimed
        }
    }
}

fn same_file(one: &File, other: &File) -> bool {
    match (one.metadata(), other.metadata()) {
        (Ok(one), Ok(other)) => (one.dev(), one.ino()) == (other.dev(), other.ino()),
        _ => false,
    }
}

/// Which job a process belongs to, as far as it still lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ProcessOwner {
    ThisJob,
    OtherJob,
    Exited,
}

impl ProcessOwner {
    fn of_process(pid: u32, job: &JobScope) -> Self {
        // An exited process, or a zombie, has no command line.
        let Some(arguments) = arguments(pid) else {
            return Self::Exited;
        };
        // A daemon worker belongs to the same job as its client.
        let client = daemon_client(&arguments).unwrap_or(pid);
        let us = std::process::id();
        // Flywheel's own descendants count, with or without the mark.
        let is_ours = match job {
            JobScope::Descendants => with_ancestors(client).any(|pid| pid == us),
            JobScope::Marked(mark) => {
                with_ancestors(client).any(|pid| pid == us || has_variable(pid, mark))
            }
            JobScope::User => fs::metadata(format!("/proc/{client}"))
                .is_ok_and(|found| found.uid() == geteuid().as_raw()),
        };
        if is_ours {
            Self::ThisJob
        } else {
            Self::OtherJob
        }
    }
}

/// How a process, or the client it serves, requests impure evaluation: by its arguments, or by the
/// settings in its environment.
fn impurity_of(pid: u32) -> Option<Impurity> {
    let own = arguments(pid)?;
    let client = daemon_client(&own);
    let words = match client {
        Some(client) => arguments(client)?,
        None => own,
    };
    let environment =
        fs::read(format!("/proc/{}/environ", client.unwrap_or(pid))).unwrap_or_default();
    let config = environment
        .split(|byte| *byte == 0)
        .find_map(|pair| pair.strip_prefix(b"NIX_CONFIG="));
    impurity_in_arguments(&words)
        .or_else(|| impurity_in_settings(&String::from_utf8_lossy(config?)))
}

fn arguments(pid: u32) -> Option<Vec<String>> {
    let bytes = fs::read(format!("/proc/{pid}/cmdline"))
        .ok()
        .filter(|bytes| !bytes.is_empty())?;
    Some(
        bytes
            .split(|byte| *byte == 0)
            .map(|word| String::from_utf8_lossy(word).into_owned())
            .collect(),
    )
}

/// `nix-daemon 1234`: the process that serves client 1234 (`nix/src/nix/daemon.cc`, `daemonLoop`).
fn daemon_client(arguments: &[String]) -> Option<u32> {
    let name = arguments
        .first()
        .and_then(|name| Path::new(name).file_name()?.to_str());
    let daemon = matches!(name, Some("nix-daemon" | "nix"));
    // The daemon writes the number over its own first argument, within that argument's length: a bare
    // `nix-daemon` has no room for it.
    daemon
        .then(|| arguments.get(1)?.trim_end_matches('\0').parse().ok())
        .flatten()
}

/// Whether a process was started with this `NAME=value`. The environment of another user's process
/// cannot be read and counts as empty.
fn has_variable(pid: u32, variable: &str) -> bool {
    let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
    environment
        .split(|byte| *byte == 0)
        .any(|pair| pair == variable.as_bytes())
}

fn with_ancestors(pid: u32) -> impl Iterator<Item = u32> {
    let parent = |pid: &u32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The command name in parentheses may itself contain spaces and parentheses (`proc(5)`).
        stat.rsplit_once(')')?
            .1
            .split_whitespace()
            .nth(1)?
            .parse::<u32>()
            .ok()
            .filter(|parent| *parent > 0)
    };
    std::iter::successors(Some(pid), parent).take(DEPTH_LIMIT)
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
        assert_eq!(watcher.owners(&[path()]), [Owner::ThisJob]);
        fs::remove_file(
            folder
                .path()
                .join(format!("temproots/{}", std::process::id())),
        )
        .expect("removed");
        assert_eq!(watcher.owners(&[path()]), [Owner::ThisJob]);
    }

    #[test]
    fn a_path_of_another_process_is_not() {
        let folder = state_dir();
        let watcher = TempRootWatcher::start(folder.path(), JobScope::Descendants);
        write(folder.path(), 1, &format!("{PATH}\0/nix/store/half-writ"));
        assert_eq!(watcher.owners(&[path()]), [Owner::OtherJob]);
        write(folder.path(), std::process::id(), &format!("{PATH}\0"));
        assert_eq!(watcher.owners(&[path()]), [Owner::ThisJob], "both want it");
    }

    #[test]
    fn what_nobody_was_seen_to_add_is_unclaimed() {
        let folder = state_dir();
        write(folder.path(), u32::MAX, &format!("{PATH}\0"));
        let watcher = TempRootWatcher::start(folder.path(), JobScope::Descendants);
        assert_eq!(
            watcher.owners(&[path()]),
            [Owner::Unclaimed],
            "a dead process's file tells nothing"
        );
    }

    #[test]
    fn what_a_process_added_that_was_gone_too_soon_is_unclear_where_others_work() {
        let folder = state_dir();
        let watcher = TempRootWatcher::start(folder.path(), JobScope::Descendants);
        let gone = u32::MAX - 1;
        write(folder.path(), gone, &format!("{PATH}\0"));
        lock(&watcher.state).on_event(&Event::Entry(&gone.to_string()));
        assert_eq!(watcher.owners(&[path()]), [Owner::Unclaimed]);
        write(folder.path(), 1, "");
        assert_eq!(watcher.owners(&[path()]), [Owner::Ambiguous]);
        write(folder.path(), std::process::id(), &format!("{PATH}\0"));
        assert_eq!(
            watcher.owners(&[path()]),
            [Owner::ThisJob],
            "ours want it too"
        );
    }

    #[test]
    fn a_file_that_is_gone_is_let_go_and_a_new_one_of_that_number_is_read() {
        let folder = state_dir();
        let watcher = TempRootWatcher::start(folder.path(), JobScope::Descendants);
        let (us, second) = (std::process::id(), PATH.replace("hello", "world"));
        write(folder.path(), us, &format!("{PATH}\0"));
        write(folder.path(), 1, "");
        assert_eq!(watcher.owners(&[path()]), [Owner::ThisJob]);
        assert_eq!(lock(&watcher.state).open.len(), 2);
        for pid in [us, 1] {
            fs::remove_file(folder.path().join(format!("temproots/{pid}"))).expect("removed");
        }
        write(folder.path(), us, &format!("{second}\0"));
        let mut state = lock(&watcher.state);
        state.on_event(&Event::Entry(&us.to_string()));
        assert!(state.open.keys().eq(&[us]));
        assert_eq!(
            state.owner_of(&second.parse().expect("valid")),
            Owner::ThisJob
        );
    }

    #[test]
    fn a_daemons_process_names_its_client() {
        let words = |words: &[&str]| {
            words
                .iter()
                .map(|word| (*word).to_owned())
                .collect::<Vec<_>>()
        };
        assert_eq!(
            daemon_client(&words(&["nix-daemon", "4242", ""])),
            Some(4242)
        );
        assert_eq!(daemon_client(&words(&["nix-daemon", "--daemon", ""])), None);
        assert_eq!(daemon_client(&words(&["nix", "build", ""])), None);
        let us = std::process::id();
        assert!(with_ancestors(us).any(|pid| pid == us));
        assert!(!with_ancestors(1).any(|pid| pid == us));
    }

    #[test]
    fn a_mark_is_found_on_a_process_or_above_it() {
        let inherited = fs::read("/proc/self/environ").expect("our own");
        let variable = inherited
            .split(|byte| *byte == 0)
            .next()
            .expect("one at least");
        let variable = String::from_utf8_lossy(variable).into_owned();
        // Pid 1 cannot have the mark that follows.
        assert!(has_variable(std::process::id(), &variable), "{variable}");
        assert!(!has_variable(1, "RUNNER_TRACKING_ID=github_of_nobody"));
        assert_eq!(
            ProcessOwner::of_process(
                1,
                &JobScope::Marked("RUNNER_TRACKING_ID=github_of_nobody".into())
            ),
            ProcessOwner::OtherJob
        );
        assert_eq!(
            ProcessOwner::of_process(std::process::id(), &JobScope::User),
            ProcessOwner::ThisJob
        );
    }

    #[test]
    fn what_is_meant_to_be_added_is_told_before_it_is_valid() {
        let folder = state_dir();
        let watcher = TempRootWatcher::start(folder.path(), JobScope::Descendants);
        write(folder.path(), std::process::id(), &format!("{PATH}\0"));
        assert_eq!(watcher.owners(&[path()]), [Owner::ThisJob]);
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
