//! The disks of a job while it works: warns before one is full, frees room in the store if it may, and sums up at the end.

use std::collections::HashSet;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::{sleep, timeout};

use super::begin::{Session, private_base};
use super::ownership::{Decision, Ownership, Registered};
use super::prepare::Prepared;
use super::reclaim::{Attempted, Reclaimer, sum};
use super::source::Source;
use super::watch::StoreWatch;
use crate::report::disk::DiskReport;
use crate::report::screen::Screen;
use flywheel_core::disk::{DiskUse, OwnPaths, disk_full};
use flywheel_core::progress::Sink;
use flywheel_nix::path_info::PathInfo;
use flywheel_nix::store_location::STATE_DIR;
use flywheel_nix::store_path::STORE_DIR;
use flywheel_sys::host::room_watcher::{Folder, RoomWatcher};
use flywheel_sys::process::signals::Signals;

/// Reports of the watcher that may be queued: it repeats them as long as they hold.
const REPORTS: usize = 8;
/// So many of the job's own paths are named.
const LARGEST: usize = 5;
/// Reading the job's own paths from the database takes milliseconds.
const OWN_LIMIT: Duration = Duration::from_secs(2);
/// Enough for a database that nothing else holds; after a signal there are seconds in all.
const OWN_LIMIT_STOPPED: Duration = Duration::from_millis(100);
/// What is reported when the work ends is handled within this time.
const HANDLING_GRACE: Duration = Duration::from_millis(300);
/// From one attempt to free room to the next, where the last one has freed nothing.
const RECLAIM_INTERVAL: Duration = Duration::from_millis(500);

/// The watch of a job's disks.
pub(crate) struct DiskWatch {
    watcher: Option<RoomWatcher>,
    handling: JoinHandle<()>,
    warner: Warner,
    attempted: Attempted,
}

impl Session<'_> {
    /// Watches the disks that the job writes to until `DiskWatch::end`, which comes before the store's watch ends.
    /// `folder`: the one that the job works in.
    pub(crate) fn watch_disks(
        &self,
        prepared: &Prepared,
        watch: Option<&StoreWatch>,
        folder: &Path,
    ) -> DiskWatch {
        let attempted = Attempted::default();
        let reclaimer = watch
            .filter(|_| self.plan.reclaim)
            .and_then(|watch| self.reclaimer(prepared, watch, &attempted));
        let ownership = watch.map(|watch| Arc::clone(watch.ownership()));
        let (send, reports) = mpsc::channel(REPORTS);
        let watcher = RoomWatcher::start(self.disk_folders(watch, folder), move |disk| {
            // What does not fit is reported again.
            let _ = send.try_send(disk.clone());
        });
        let warner = Warner {
            sink: self.sink.clone(),
            screen: self.screen.clone(),
            ownership,
            may_reclaim: self.plan.reclaim,
            warned: Arc::default(),
        };
        let handler = Handler {
            warner: warner.clone(),
            reclaimer,
            next_reclaim: Instant::now(),
        };
        DiskWatch {
            watcher,
            handling: tokio::spawn(handler.run(reports)),
            warner,
            attempted,
        }
    }

    /// `None` where a path that is wanted in a cache cannot get there: then nothing may be freed.
    fn reclaimer(
        &self,
        prepared: &Prepared,
        watch: &StoreWatch,
        attempted: &Attempted,
    ) -> Option<Reclaimer> {
        if !watch.ownership().host.knows_all_jobs() {
            let text = "it is not known which other jobs need what is in the store, so that nothing is freed (input `reclaim`); \
                        the input `journal` with a folder that lasts shows them, and `shared-host: false` says that there are none";
            self.sink.degraded("disk", text);
            return None;
        }
        let published = match watch.stream() {
            Some(stream) => match stream.published() {
                Some(published) => Some(published),
                None => {
                    let text =
                        "nothing can be published, so that nothing is freed (input `reclaim`)";
                    self.sink.degraded("disk", text);
                    return None;
                }
            },
            None => None,
        };
        Some(Reclaimer::new(
            // Not through the link of the job's commands: what is freed here is named to no proxy.
            prepared.nix(),
            Arc::clone(watch.ownership()),
            published,
            attempted.clone(),
        ))
    }

    /// The folders that the job writes to, the likeliest to be full first.
    fn disk_folders(&self, watch: Option<&StoreWatch>, folder: &Path) -> Vec<Folder> {
        let (store, state) = match watch {
            Some(watch) => (watch.store().folder().to_owned(), watch.store().state()),
            None => (STORE_DIR.into(), STATE_DIR.into()),
        };
        let is_store = |label: &str| label == "the store";
        let embedded = match &self.plan.source {
            Source::Embedded { folder, .. } => Some(folder.clone()),
            _ => None,
        };
        let temp = self.env.path("TMPDIR").unwrap_or_else(|| "/tmp".into());
        let all = [
            ("the store", Some(store)),
            ("the temporary folder", Some(temp)),
            ("the working folder", Some(folder.to_owned())),
            ("Flywheel's own files", Some(private_base(self.env))),
            ("the journal", self.plan.journal.clone()),
            ("the embedded cache", embedded),
            ("Nix's state", Some(state)),
            ("the home folder", self.env.path("HOME")),
        ];
        all.into_iter()
            .filter_map(|(label, path)| {
                Some(Folder {
                    label,
                    path: path?,
                    is_store: is_store(label),
                })
            })
            .collect()
    }
}

/// How the work ended whose disks were watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WorkEnd {
    Succeeded,
    /// A disk may be the cause.
    Failed,
    /// By a signal: the runner kills the process soon, and what is left of that time belongs to the publication.
    Stopped {
        has_failed: bool,
    },
}

impl WorkEnd {
    pub(crate) fn new(is_stopped: bool, has_failed: bool) -> Self {
        match (is_stopped, has_failed) {
            (true, has_failed) => Self::Stopped { has_failed },
            (false, true) => Self::Failed,
            (false, false) => Self::Succeeded,
        }
    }

    /// How long the database may be read for the job's own paths.
    fn own_limit(self) -> Duration {
        match self {
            Self::Succeeded | Self::Failed => OWN_LIMIT,
            Self::Stopped { .. } => OWN_LIMIT_STOPPED,
        }
    }
}

impl DiskWatch {
    /// Looks once more, and sums up. Gives the paths that were freed, too. `signals` cut short what a busy database would
    /// hold up, and are left for the publication.
    pub(crate) async fn end(
        self,
        end: WorkEnd,
        signals: &mut Signals,
    ) -> (DiskReport, Vec<PathInfo>) {
        let failed = matches!(end, WorkEnd::Failed | WorkEnd::Stopped { has_failed: true });
        let Self {
            watcher,
            mut handling,
            warner,
            attempted,
        } = self;
        let looking = spawn_blocking(move || watcher.map(|watcher| watcher.end(failed)));
        let disks = looking.await.ok().flatten().unwrap_or_default();
        // It ends with the watcher, unless it is freeing room.
        if timeout(HANDLING_GRACE, &mut handling).await.is_err() {
            handling.abort();
            let _ = handling.await;
        }
        let low: Vec<DiskUse> = disks.into_iter().filter(DiskUse::was_low).collect();
        // What has come too fast for the handler. A full disk is reported as the cause.
        let is_cause = disk_full(&low, failed, false).is_some();
        // Read once: where the database is busy, that takes its time, and the job may have been asked to stop.
        let of_store = low.iter().find(|disk| disk.has_store);
        let own = match of_store {
            Some(disk) => tokio::select! {
                own = warner.own_paths(disk, end.own_limit()) => own,
                () = soon_after_signal(signals) => OwnPaths::default(),
            },
            None => OwnPaths::default(),
        };
        for disk in low.iter().filter(|_| !is_cause) {
            warner.warn_with(disk, async || own.clone()).await;
        }
        let ownership = warner.ownership.as_ref();
        let gone = ownership.map(|ownership| attempted.gone(&ownership.store));
        let gone = gone.unwrap_or_default();
        let report = DiskReport {
            low,
            full: None,
            own,
            reclaimed: sum(&gone),
            may_reclaim: warner.may_reclaim,
        };
        (report, gone)
    }
}

async fn soon_after_signal(signals: &mut Signals) {
    signals.heard().await;
    sleep(OWN_LIMIT_STOPPED).await;
}

/// Warns of each disk once.
#[derive(Clone)]
struct Warner {
    sink: Sink,
    screen: Screen,
    ownership: Option<Arc<Ownership>>,
    may_reclaim: bool,
    /// The names of the disks of which it has warned.
    warned: Arc<Mutex<HashSet<String>>>,
}

impl Warner {
    fn warned(&self) -> MutexGuard<'_, HashSet<String>> {
        self.warned
            .lock()
            .expect("nothing panics while it holds this lock")
    }

    async fn warn(&self, disk: &DiskUse) {
        self.warn_with(disk, async || self.own_paths(disk, OWN_LIMIT).await)
            .await;
    }

    /// `own` gives the job's own paths, and is called only for a disk of which it has not warned.
    async fn warn_with(&self, disk: &DiskUse, own: impl AsyncFnOnce() -> OwnPaths) {
        if !self.warned().insert(disk.name.clone()) {
            return;
        }
        let own = own().await;
        let text = disk.warning(&own, self.may_reclaim);
        // It is an annotation once the command has ended. If the disk is the runner's own, that may be too late.
        self.screen
            .log_if_held(&format!("flywheel: warning: disk: {text}"));
        self.sink.degraded("disk", text);
    }

    /// The job's own paths, if they are on this disk.
    async fn own_paths(&self, disk: &DiskUse, limit: Duration) -> OwnPaths {
        match &self.ownership {
            Some(ownership) if disk.has_store => own_paths(ownership, limit).await,
            _ => OwnPaths::default(),
        }
    }
}

/// Handles what the watcher reports.
struct Handler {
    warner: Warner,
    reclaimer: Option<Reclaimer>,
    next_reclaim: Instant,
}

impl Handler {
    async fn run(mut self, mut reports: mpsc::Receiver<DiskUse>) {
        while let Some(disk) = reports.recv().await {
            if disk.last.is_low() {
                self.warner.warn(&disk).await;
            }
            if disk.has_store && Instant::now() >= self.next_reclaim {
                self.reclaim(&disk).await;
            }
        }
    }

    async fn reclaim(&mut self, disk: &DiskUse) {
        let Some(reclaimer) = &mut self.reclaimer else {
            return;
        };
        let Warner { sink, screen, .. } = &self.warner;
        match reclaimer.free(disk.last.shortfall()).await {
            Ok(freed) if freed.paths > 0 => {
                let text = format!("flywheel: disk: freed {} on `{}`", freed.text(), disk.name);
                if !screen.log_if_held(&text) {
                    sink.note(text);
                }
            }
            Ok(_) => self.next_reclaim = Instant::now() + RECLAIM_INTERVAL,
            Err(problem) => {
                self.next_reclaim = Instant::now() + RECLAIM_INTERVAL;
                sink.degraded("disk", format!("no room could be freed: {problem}"));
            }
        }
    }
}

/// The paths that the job itself has added, as far as the store can be read now.
async fn own_paths(ownership: &Ownership, limit: Duration) -> OwnPaths {
    let reading = async {
        let found = ownership.store.added_since(&ownership.mark).await.ok()?;
        let evidence = ownership.evidence(&[]).await.ok()?;
        let mut own = found.infos;
        own.retain(|info| evidence.decide(info, Registered::AfterMark) == Decision::Publish);
        Some(own)
    };
    let mut own: Vec<PathInfo> = timeout(limit, reading)
        .await
        .ok()
        .flatten()
        .unwrap_or_default();
    own.sort_by_key(|info| std::cmp::Reverse(info.nar_size));
    OwnPaths {
        number: own.len() as u64,
        size: own.iter().map(|info| info.nar_size).sum(),
        largest: own
            .iter()
            .take(LARGEST)
            .map(|info| (info.path.to_string(), info.nar_size))
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn after_a_signal_a_busy_database_is_not_waited_for() {
        // A command that a signal ends has failed, too.
        for has_failed in [false, true] {
            let end = WorkEnd::new(true, has_failed);
            assert_eq!(end, WorkEnd::Stopped { has_failed });
            assert!(end.own_limit() < Duration::from_millis(200));
        }
        assert_eq!(WorkEnd::new(false, true), WorkEnd::Failed);
        assert_eq!(WorkEnd::new(false, true).own_limit(), OWN_LIMIT);
    }
}
