//! Watches the room of the file systems that a job uses, on a thread of its own: often where one could soon be full,
//! once a second elsewhere. What follows from it is not decided here.

use std::path::PathBuf;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::host::disk::FileSystem;
use flywheel_core::disk::{DiskUse, Room};

/// The thread ends within this time. A network's file system that does not answer holds it up for ever: then it is left
/// behind, and what was seen before counts.
const END_LIMIT: Duration = Duration::from_secs(1);
/// The shortest time between two reports of one file system.
const REPORT_INTERVAL: Duration = Duration::from_millis(200);

/// A folder of the job.
#[derive(Clone, Debug)]
pub struct Folder {
    /// What it is: `the store`.
    pub label: &'static str,
    pub path: PathBuf,
    pub is_store: bool,
}

/// A running watch.
#[derive(Debug)]
pub struct RoomWatcher {
    /// Whether the end is that of a command that failed.
    stop: SyncSender<bool>,
    ended: Receiver<()>,
    thread: JoinHandle<()>,
    state: Arc<Mutex<Vec<Watched>>>,
}

#[derive(Debug)]
struct Watched {
    disk: FileSystem,
    seen: DiskUse,
    last_full: Option<Instant>,
    last_report: Option<Instant>,
    is_low: bool,
}

impl RoomWatcher {
    /// Watches the file systems of these folders. `on_short` gets each that has little room, now and then while it has;
    /// it must not wait. `None` where no thread can be had.
    pub fn start(
        folders: Vec<Folder>,
        on_short: impl FnMut(&DiskUse) + Send + 'static,
    ) -> Option<Self> {
        let (stop, stopped) = sync_channel(1);
        let (end, ended) = sync_channel(1);
        let state = Arc::new(Mutex::new(Vec::new()));
        let shared = Arc::clone(&state);
        let thread = std::thread::Builder::new().name("room".into());
        let watch = move || {
            *lock(&shared) = find(folders);
            follow(&shared, &stopped, on_short);
            let _ = end.send(());
        };
        Some(Self {
            stop,
            ended,
            thread: thread.spawn(watch).ok()?,
            state,
        })
    }

    /// Looks once more, and ends the watch. `failed`: whether a command has failed, so that each file system is tried by
    /// a small file, too. Blocking.
    pub fn end(self, failed: bool) -> Vec<DiskUse> {
        // The thread takes it at its next look.
        let _ = self.stop.try_send(failed);
        if self.ended.recv_timeout(END_LIMIT).is_ok() {
            // It is at its end, and a panic of it has been printed.
            let _ = self.thread.join();
        }
        let now = Instant::now();
        let state = lock(&self.state);
        let uses = state.iter().map(|watched| DiskUse {
            full_before_end: watched.last_full.map(|at| now - at),
            ..watched.seen.clone()
        });
        uses.collect()
    }
}

fn lock(state: &Mutex<Vec<Watched>>) -> MutexGuard<'_, Vec<Watched>> {
    state
        .lock()
        .expect("nothing panics while it holds this lock")
}

/// The file systems of these folders, each once.
fn find(folders: Vec<Folder>) -> Vec<Watched> {
    let mut found: Vec<Watched> = Vec::new();
    for folder in folders {
        let Ok(disk) = FileSystem::of(&folder.path) else {
            continue;
        };
        let Ok(room) = disk.room() else { continue };
        let holds = format!("{} `{}`", folder.label, folder.path.display());
        match found.iter_mut().find(|it| it.disk.device == disk.device) {
            Some(known) => {
                known.seen.has_store |= folder.is_store;
                if !known.seen.holds.contains(&holds) {
                    known.seen.holds.push(holds);
                }
            }
            None => found.push(Watched {
                seen: DiskUse {
                    name: disk.name(),
                    holds: vec![holds],
                    has_store: folder.is_store,
                    lowest: room,
                    last: room,
                    ..DiskUse::default()
                },
                disk,
                last_full: None,
                last_report: None,
                is_low: false,
            }),
        }
    }
    found
}

fn follow(
    state: &Mutex<Vec<Watched>>,
    stopped: &Receiver<bool>,
    mut on_short: impl FnMut(&DiskUse),
) {
    loop {
        let next = look(state, &mut on_short);
        match stopped.recv_timeout(next) {
            Err(RecvTimeoutError::Timeout) => (),
            Err(RecvTimeoutError::Disconnected) => return,
            Ok(failed) => {
                look(state, &mut on_short);
                if failed {
                    try_writing(state);
                }
                return;
            }
        }
    }
}

/// Looks at each file system, and gives the time until the next look.
fn look(state: &Mutex<Vec<Watched>>, on_short: &mut impl FnMut(&DiskUse)) -> Duration {
    // Not under the lock: a file system that does not answer must hold up nothing but this thread.
    let disks: Vec<FileSystem> = lock(state).iter().map(|it| it.disk.clone()).collect();
    let rooms: Vec<Option<Room>> = disks.iter().map(|disk| disk.room().ok()).collect();
    let mut next = Duration::from_secs(1);
    let now = Instant::now();
    for (watched, room) in lock(state).iter_mut().zip(rooms) {
        let Some(room) = room else { continue };
        let seen = &mut watched.seen;
        (seen.last, seen.lowest) = (room, seen.lowest.least(room));
        next = next.min(room.next_look());
        if room.is_full() {
            watched.last_full = Some(now);
        }
        let was_low = std::mem::replace(&mut watched.is_low, room.is_low());
        let is_news = room.is_low() && !was_low;
        let last = watched.last_report;
        let is_due = is_news || last.is_none_or(|at| now - at >= REPORT_INTERVAL);
        if room.wants_more() && is_due {
            watched.last_report = Some(now);
            on_short(seen);
        }
    }
    next
}

fn try_writing(state: &Mutex<Vec<Watched>>) {
    let disks: Vec<FileSystem> = lock(state).iter().map(|it| it.disk.clone()).collect();
    let refusals: Vec<bool> = disks.iter().map(FileSystem::refuses_writes).collect();
    for (watched, refuses) in lock(state).iter_mut().zip(refusals) {
        watched.seen.refuses = refuses;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(label: &'static str, path: PathBuf, is_store: bool) -> Folder {
        Folder {
            label,
            path,
            is_store,
        }
    }

    #[test]
    fn folders_on_one_file_system_are_one() {
        let here = tempfile::tempdir().expect("temporary folder");
        let store = folder("the store", here.path().join("not/there/yet"), true);
        let temp = folder("the temporary folder", here.path().to_owned(), false);
        let other = folder("the system", "/proc".into(), false);
        let watcher = RoomWatcher::start(vec![temp, store, other], |_| ()).expect("a thread");
        let uses = watcher.end(true);
        assert_eq!(uses.len(), 2, "{uses:?}");
        assert_eq!(uses[0].holds.len(), 2, "{uses:?}");
        assert!(uses[0].has_store && !uses[1].has_store, "{uses:?}");
        assert!(uses.iter().all(|it| !it.refuses), "{uses:?}");
    }
}
