//! The watcher: notices each path that becomes valid while a job runs. It is told by the kernel that
//! Nix's database moved, and reads there what is true; a slow tick covers an event that was lost.
//! Owns noticing; what happens to a path is not its business.

use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::host::notify::{Event, Notify, WatchFlags};
use crate::host::priority;
use crate::nix::db::Db;
use crate::nix::path_info::PathInfo;

/// Without any event the database is still asked this often (4 to 9 µs a query, `nix-notes`).
const TICK: Duration = Duration::from_millis(250);
/// While paths keep coming, it is asked about this often: a build of many quick derivations needs its processor, and
/// what comes together is cheaper to publish, by some milliseconds for each batch less.
const PACE: Duration = Duration::from_millis(300);
/// So much later than the next event could have been told of, it is asked whether something came meanwhile.
const REST_OF_IT: Duration = Duration::from_millis(20);
/// A registration comes with a burst of writes; asking once after this pause covers the burst.
const SETTLE: Duration = Duration::from_millis(5);

/// A watch over one store. It ends, and its threads are joined, when it is dropped.
#[derive(Debug)]
pub struct Watcher {
    stop: Option<SyncSender<Woken>>,
    thread: Option<JoinHandle<()>>,
    _notify: Option<Notify>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Woken {
    Moved,
    Stop,
}

impl Watcher {
    /// Begins to watch the database `file`; `tell` gets every path registered after `id`, in the
    /// order of registration, each once. `None` when the database cannot be read: then one look
    /// at the end has to do, which misses nothing either.
    pub fn start(
        file: &Path,
        id: i64,
        tell: impl FnMut(Vec<PathInfo>) + Send + 'static,
    ) -> Option<Self> {
        let db = Db::open(file).ok()?;
        // One waiting wake-up is as good as many.
        let (send, receive) = sync_channel(1);
        let wake = send.clone();
        let folder = file.parent()?.to_owned();
        let notify = Notify::watch(&folder, WatchFlags::MODIFY, PACE, move |event| {
            let ours = matches!(event, Event::Lost)
                || matches!(event, Event::Entry(name) if name.starts_with("db.sqlite"));
            if ours && let Err(TrySendError::Disconnected(_)) = wake.try_send(Woken::Moved) {
                // The watch is being taken down.
            }
        })
        .ok();
        let thread = std::thread::Builder::new()
            .name("watch".into())
            .spawn(move || {
                priority::lower_priority();
                follow(&db, id, &receive, tell);
            })
            .ok()?;
        Some(Self {
            stop: Some(send),
            thread: Some(thread),
            _notify: notify,
        })
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        if let Some(stop) = self.stop.take() {
            // It fails only if the thread is gone already.
            let _ = stop.send(Woken::Stop);
        }
        if let Some(thread) = self.thread.take() {
            // It panics only if `tell` does, and then there is nothing more to tell.
            let _ = thread.join();
        }
    }
}

fn follow(db: &Db, mut last: i64, woken: &Receiver<Woken>, mut tell: impl FnMut(Vec<PathInfo>)) {
    let mut patience = TICK;
    loop {
        // A database that cannot be read just now is asked again at the next tick.
        if let Ok(added) = db.after(last)
            && added.last_id > last
        {
            last = added.last_id;
            tell(added.rows.into_iter().map(|(_, info)| info).collect());
        }
        match woken.recv_timeout(patience) {
            Ok(Woken::Stop) | Err(RecvTimeoutError::Disconnected) => return,
            Ok(Woken::Moved) => {
                std::thread::sleep(SETTLE);
                // Nothing is told of what comes meanwhile; a build that goes on is told of before that.
                patience = PACE + REST_OF_IT;
            }
            Err(RecvTimeoutError::Timeout) => patience = TICK,
        }
    }
}
