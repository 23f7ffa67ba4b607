//! Reports each path that becomes valid while a job runs. inotify signals a change of Nix's
//! database, from which the new paths are then read; polling covers lost events. What happens to a
//! path is not decided here.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
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
    read: Arc<RowsRead>,
    _notify: Option<Notify>,
    _collecting: Option<Notify>,
}

/// How far the watch has read.
#[derive(Debug, Default)]
struct RowsRead {
    last: AtomicI64,
    count: AtomicI64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wake {
    Changed,
    /// Garbage is about to be collected, and with a path its row goes.
    Collecting,
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
        let collecting = notify_of_collection(&folder, send.clone());
        let read = Arc::new(RowsRead {
            last: AtomicI64::new(id),
            count: AtomicI64::new(0),
        });
        let counted = Arc::clone(&read);
        let thread = std::thread::Builder::new()
            .name("watch".into())
            .spawn(move || {
                // The job's own builds come first; paths can wait a moment.
                priority::lower_priority();
                follow(&db, &counted, &receive, on_added);
            })
            .ok()?;
        Some(Self {
            stop: Some(send),
            thread: Some(thread),
            read,
            _notify: notify,
            _collecting: collecting,
        })
    }

    /// The id of the last row that was read, and how many rows were. Both are final once the watch has been ended.
    pub(crate) fn rows_read(&self) -> (i64, i64) {
        let (last, count) = (&self.read.last, &self.read.count);
        (last.load(Ordering::SeqCst), count.load(Ordering::SeqCst))
    }

    /// Reads what has come in the meantime, and ends the watch.
    pub fn end(&mut self) {
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

impl Drop for StoreWatcher {
    fn drop(&mut self) {
        self.end();
    }
}

/// Wakes the watch at the beginning of a garbage collection, which opens a socket for the roots that are added while it
/// runs (`LocalStore::collectGarbage`, since 2.4). `database` is the folder of the database.
fn notify_of_collection(database: &Path, wake: SyncSender<Wake>) -> Option<Notify> {
    let state = database.parent()?;
    let on_event = move |event: Event<'_>| {
        if matches!(event, Event::Lost | Event::Entry("socket" | "gc-socket")) {
            // One that waits already makes the watch read, too.
            let _ = wake.try_send(Wake::Collecting);
        }
    };
    // The first collection in a store makes the folder.
    let folder = state.join("gc-socket");
    let folder = if folder.is_dir() {
        folder
    } else {
        state.to_owned()
    };
    Notify::watch(&folder, WatchFlags::CREATE, Duration::ZERO, on_event).ok()
}

fn follow(
    db: &Db,
    read: &RowsRead,
    wakes: &Receiver<Wake>,
    mut on_added: impl FnMut(Vec<PathInfo>),
) {
    let mut wait = POLL_INTERVAL;
    let mut last = read.last.load(Ordering::SeqCst);
    loop {
        // If the database cannot be read now, the next poll tries again with the same id.
        if let Ok(added) = db.added_after(last)
            && added.last_id > last
        {
            last = added.last_id;
            let rows = added.rows.len() + added.unreadable.len();
            let rows = i64::try_from(rows).unwrap_or(i64::MAX);
            read.last.store(last, Ordering::SeqCst);
            read.count.fetch_add(rows, Ordering::SeqCst);
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
            Ok(Wake::Collecting) => (),
            Err(RecvTimeoutError::Timeout) => wait = POLL_INTERVAL,
        }
    }
}
