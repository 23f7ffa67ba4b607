//! Collects the store paths that the Nix processes of the job have named. It only reads. That a path was named by the
//! job is evidence for it; that a path was not named, or was named by another process, is no evidence against it: a
//! process can be gone before it is looked at, and the processes of a daemon are not the job's.
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
    /// Processes that ended before their job, or the paths that they named, could be read.
    missed: HashSet<u32>,
    /// Processes that cannot be missed any more: their files were opened, are another job's, or were there before the
    /// watch, left by processes long gone.
    known: HashSet<u32>,
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
            missed: HashSet::new(),
            known: HashSet::new(),
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
        let stale = std::mem::take(&mut begun.missed);
        begun.known.extend(stale);
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

    /// How many processes, of this job or of others, have ended before what they named could be read.
    pub fn missed(&self) -> usize {
        lock(&self.state).missed.len()
    }

    /// The paths that daemon workers have named for clients that they do not show: the job's own where no other job
    /// uses the daemon.
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
        let is_missed =
            owner == ProcessOwner::Exited || (owner == ProcessOwner::ThisJob && file.is_err());
        if !is_missed {
            self.known.insert(pid);
        } else if !self.known.contains(&pid) {
            self.missed.insert(pid);
        }
        match (file, owner) {
            // A file that cannot be opened names nothing: its paths are judged by the other evidence.
            (_, ProcessOwner::Exited | ProcessOwner::OtherJob) | (Err(_), _) => (),
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

/// Which job a process belongs to, as far as it still lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ProcessOwner {
    ThisJob,
    OtherJob,
    /// A daemon worker that does not show its client.
    Unattributed,
    Exited,
}

impl ProcessOwner {
    fn of_process(pid: u32, job: &JobScope) -> Self {
        // An exited process, or a zombie, has no command line.
        let Some(arguments) = arguments(pid) else {
            return Self::Exited;
        };
        // A daemon worker belongs to the same job as its client.
        let client = match daemon_client(&arguments) {
            DaemonClient::NotADaemon => pid,
            DaemonClient::Shown(client) => client,
            DaemonClient::NotShown => return Self::Unattributed,
        };
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
    let client = match daemon_client(&own) {
        DaemonClient::Shown(client) => Some(client),
        DaemonClient::NotShown | DaemonClient::NotADaemon => None,
    };
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

/// What a process shows of the client that it serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum DaemonClient {
    NotADaemon,
    /// The client's process id.
    Shown(u32),
    NotShown,
}

/// `nix-daemon 1234` is the process that serves client 1234 (`nix/src/nix/daemon.cc`, `daemonLoop`).
fn daemon_client(arguments: &[String]) -> DaemonClient {
    let name = arguments
        .first()
        .and_then(|name| Path::new(name).file_name()?.to_str());
    let argument = arguments
        .get(1)
        .map_or("", |argument| argument.trim_end_matches('\0'));
    let shown = match argument.parse() {
        // The client is in another process namespace, where the daemon sees no id.
        Ok(0) | Err(_) => DaemonClient::NotShown,
        Ok(client) => DaemonClient::Shown(client),
    };
    // The daemon writes the number over its own first argument, within that argument's length: a bare
    // `nix-daemon` has no room for it.
    match name {
        Some("nix-daemon") => shown,
        Some("nix") if argument == "daemon" || shown != DaemonClient::NotShown => shown,
        _ => DaemonClient::NotADaemon,
    }
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
    fn what_another_process_names_is_not_named_by_the_job() {
        let folder = state_dir();
        let watcher = TempRootWatcher::start(folder.path(), JobScope::Descendants);
        write(folder.path(), 1, &format!("{PATH}\0/nix/store/half-writ"));
        // The file of a process that is gone.
        write(folder.path(), u32::MAX, &format!("{PATH}\0"));
        assert!(watcher.named().is_empty() && watcher.unattributed().is_empty());
        write(folder.path(), std::process::id(), &format!("{PATH}\0"));
        assert!(watcher.named().contains(&path()), "both want it");
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
    fn a_daemons_process_names_its_client() {
        let words = |words: &[&str]| {
            words
                .iter()
                .map(|word| (*word).to_owned())
                .collect::<Vec<_>>()
        };
        for (arguments, shown) in [
            (&["nix-daemon", "4242", ""][..], DaemonClient::Shown(4242)),
            (&["nix-daemon", "--daemon", ""], DaemonClient::NotShown),
            (
                &["nix-daemon", "0\0\0\0\0\0\0\0", ""],
                DaemonClient::NotShown,
            ),
            (&["nix-daemon", ""], DaemonClient::NotShown),
            (&["nix", "daemon", ""], DaemonClient::NotShown),
            (&["nix", "1234", ""], DaemonClient::Shown(1234)),
            (&["nix", "build", ""], DaemonClient::NotADaemon),
        ] {
            assert_eq!(daemon_client(&words(arguments)), shown, "{arguments:?}");
        }
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
