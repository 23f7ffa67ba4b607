//! Reports each path that becomes valid while a job runs. inotify signals a change of Nix's
//! database, from which the new paths are then read; polling covers lost events. What happens to a
//! path is not decided here.

use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::db::Db;
use crate::path_info::PathInfo;
use flywheel_sys::host::notify::{Event, Notify, WatchFlags};
use flywheel_sys::host::priority;

/// Interval for polling the database when no event arrives. A query takes 4 to 9 µs (`nix-notes`).
const POLL_INTERVAL: Duration = Duration::from_millis(250);
/// Minimum time between two queries while paths keep arriving. A build of many quick derivations
/// needs the processor for itself, and each batch less saves some milliseconds of publishing.
const COALESCE_WINDOW: Duration = Duration::from_millis(300);
/// Poll this long after inotify is re-armed, for writes that fell into the gap.
const REARM_MARGIN: Duration = Duration::from_millis(20);
/// Pause after an event. Nix registers a path with a burst of writes, which one query then covers.
const DEBOUNCE: Duration = Duration::from_millis(5);

/// Watches one store. Dropping it ends the watch and joins its threads.
#[derive(Debug)]
pub struct StoreWatcher {
    stop: Option<SyncSender<Wake>>,
    thread: Option<JoinHandle<()>>,
    _notify: Option<Notify>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wake {
    Changed,
    Stop,
}

impl StoreWatcher {
    /// Starts watching the database `file`. `on_added` receives every path registered after `id`,
    /// in order of registration, each once. Returns `None` when the database cannot be read; a
    /// single query at the end then finds the same paths.
    pub(crate) fn start(
        file: &Path,
        id: i64,
        on_added: impl FnMut(Vec<PathInfo>) + Send + 'static,
    ) -> Option<Self> {
        let db = Db::open(file).ok()?;
        // One queued wake-up is enough: a single query finds everything added so far.
        let (send, receive) = sync_channel(1);
        let wake = send.clone();
        let folder = file.parent()?.to_owned();
        let notify = Notify::watch(&folder, WatchFlags::MODIFY, COALESCE_WINDOW, move |event| {
            // SQLite also writes `db.sqlite-wal` and `db.sqlite-shm`; other files in the folder do
            // not matter.
            let is_database = matches!(event, Event::Lost)
                || matches!(event, Event::Entry(name) if name.starts_with("db.sqlite"));
            if is_database && let Err(TrySendError::Disconnected(_)) = wake.try_send(Wake::Changed)
            {
                // The watch is ending.
            }
        })
        .ok();
        let thread = std::thread::Builder::new()
            .name("watch".into())
            .spawn(move || {
                // The job's own builds come first; paths can wait a moment.
                priority::lower_priority();
                follow(&db, id, &receive, on_added);
            })
            .ok()?;
        Some(Self {
            stop: Some(send),
            thread: Some(thread),
            _notify: notify,
        })
    }
}

impl Drop for StoreWatcher {
    fn drop(&mut self) {
        if let Some(stop) = self.stop.take() {
            // Sending fails only if the thread has already ended.
            let _ = stop.send(Wake::Stop);
        }
        if let Some(thread) = self.thread.take() {
            // The thread panics only if `on_added` does, and then nothing is left to report.
            let _ = thread.join();
        }
    }
}

fn follow(db: &Db, mut last: i64, wakes: &Receiver<Wake>, mut on_added: impl FnMut(Vec<PathInfo>)) {
    let mut wait = POLL_INTERVAL;
    loop {
        // If the database cannot be read now, the next poll tries again with the same id.
        if let Ok(added) = db.added_after(last)
            && added.last_id > last
        {
            last = added.last_id;
            on_added(added.rows.into_iter().map(|(_, info)| info).collect());
        }
        // The query above runs before the first wait, for paths added before the watch began.
        match wakes.recv_timeout(wait) {
            Ok(Wake::Stop) | Err(RecvTimeoutError::Disconnected) => return,
            Ok(Wake::Changed) => {
                std::thread::sleep(DEBOUNCE);
                // inotify reports nothing during the coalescing window. While a build goes on, the
                // next event arrives before this timeout.
                wait = COALESCE_WINDOW + REARM_MARGIN;
            }
            Err(RecvTimeoutError::Timeout) => wait = POLL_INTERVAL,
        }
    }
}
