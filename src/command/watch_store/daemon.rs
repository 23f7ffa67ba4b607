//! The watch itself, in the foreground of `run` or in the background of `start`: prepares, watches and
//! publishes, answers the job's later steps, and drains at the end.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use tokio::io::BufReader;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::ipc::{Finished, Request, Status, receive, send};
use crate::job::stream::Deadline;
use crate::job::{JobReport, Prepared, STOPPED_LIMIT, Watch, Work};
use flywheel_core::exit::Failure;
use flywheel_core::progress::{Progress, Sink};
use flywheel_nix::temp_roots::JobScope;
use flywheel_sys::process::signals::Signals;
use flywheel_sys::runner::workflow::Workflow;

/// A step says what it wants at once.
const REQUEST_LIMIT: Duration = Duration::from_secs(5);

/// What the watch is doing, for whoever asks.
#[derive(Clone)]
pub(super) struct StatusCell(Arc<(Mutex<Status>, Instant)>);

impl StatusCell {
    pub fn new(status: Status) -> Self {
        Self(Arc::new((Mutex::new(status), Instant::now())))
    }

    /// A sink that keeps what matters and hands everything on.
    pub fn sink(&self, next: Sink) -> Sink {
        let status_cell = self.clone();
        Sink::new(move |event| {
            match &event {
                Progress::Moved { done, total, bytes } => {
                    let mut status = status_cell.status();
                    (status.settled, status.known, status.bytes) = (*done, *total, *bytes);
                }
                Progress::Degraded { area, text } => {
                    let line = format!("{area}: {text}");
                    let mut status = status_cell.status();
                    if !status.degraded.contains(&line) {
                        status.degraded.push(line);
                    }
                }
                Progress::Note(_) => (),
            }
            next.send(event);
        })
    }

    pub fn status(&self) -> MutexGuard<'_, Status> {
        self.0
            .0
            .lock()
            .expect("nothing panics while it holds this lock")
    }

    fn shown(&self) -> Status {
        Status {
            seconds: self.0.1.elapsed().as_secs(),
            ..self.status().clone()
        }
    }
}

/// A step that waits for the end.
struct FinishRequest {
    stream: BufReader<UnixStream>,
    drain_timeout: Option<Duration>,
    require_publish: bool,
}

/// One watch.
pub(super) struct Daemon<'a> {
    pub work: Work<'a>,
    pub workflow: Workflow,
    pub status_cell: StatusCell,
    /// Where the job's results are linked from.
    pub folder: PathBuf,
    /// How the job's processes are known.
    pub whose: JobScope,
}

/// Why the watch ends.
enum Shutdown {
    Requested(FinishRequest),
    Signalled,
}

impl Daemon<'_> {
    /// Watches until it is asked to finish or to stop. `ready` is told once Nix, the cache and the watch
    /// are. `before` are the variables that the end gives back to the job.
    ///
    /// # Errors
    /// When there is no Nix to be had.
    pub async fn keep(
        self,
        listener: UnixListener,
        signals: &mut Signals,
        before: Vec<(String, String)>,
        ready: impl AsyncFnOnce(&Prepared),
    ) -> Result<JobReport, Failure> {
        let (asked, mut asking) = mpsc::channel(1);
        let _answering = AbortOnDropHandle::new(tokio::spawn(serve(
            listener,
            self.status_cell.clone(),
            asked,
        )));
        let prepared = tokio::select! {
            biased;
            _ = signals.next() => return Ok(JobReport::cancelled()),
            prepared = Box::pin(self.work.make_ready(&self.workflow)) => prepared?,
        };
        let watch = self.work.watch(&prepared, self.whose.clone()).await;
        let cache = prepared
            .cache
            .endpoint
            .as_ref()
            .map(flywheel_cache::client::endpoint::Endpoint::substituter);
        {
            let mut status = self.status_cell.status();
            status.state = "watching".into();
            status.cache = cache;
        }
        let began = Instant::now();
        ready(&prepared).await;
        let end = tokio::select! {
            biased;
            _ = signals.next() => Shutdown::Signalled,
            waiting = asking.recv() => waiting.map_or(Shutdown::Signalled, Shutdown::Requested),
        };
        self.status_cell.status().state = "finishing".into();
        let watched = began.elapsed();
        let (report, waiting) = self.finish(&prepared, watch, end, watched, signals).await;
        prepared.stop().await;
        if let Some(mut waiting) = waiting {
            // A step that has gone meanwhile is told nothing.
            let _ = send(
                &mut waiting.stream,
                &Finished {
                    report: report.clone(),
                    variables: before,
                },
            )
            .await;
        }
        Ok(report)
    }

    async fn finish(
        &self,
        prepared: &Prepared,
        watch: Option<Watch>,
        end: Shutdown,
        watched: Duration,
        signals: &mut Signals,
    ) -> (JobReport, Option<FinishRequest>) {
        if matches!(end, Shutdown::Requested(_)) {
            self.work
                .check(prepared, watch.as_ref(), &self.folder, signals)
                .await;
        }
        let began = Instant::now();
        let (limit, mut waiting) = match end {
            Shutdown::Signalled => (STOPPED_LIMIT, None),
            Shutdown::Requested(waiting) => (
                waiting
                    .drain_timeout
                    .unwrap_or(self.work.plan.drain_timeout),
                Some(waiting),
            ),
        };
        let deadline = Deadline {
            at: (began + limit).into(),
            cancel: CancellationToken::new(),
        };
        let (added_paths, publication) = match watch {
            None => Default::default(),
            Some(watch) => {
                let mut delivering =
                    Box::pin(
                        self.work
                            .deliver(watch, &prepared.cache, &self.folder, &deadline),
                    );
                let mut hurried = false;
                loop {
                    tokio::select! {
                        biased;
                        done = &mut delivering => break done,
                        _ = signals.next() => deadline.cancel.cancel(),
                        hurry = cancelled(waiting.as_mut()), if !hurried => {
                            hurried = true;
                            if hurry {
                                deadline.cancel.cancel();
                            }
                        }
                    }
                }
            }
        };
        let require = self.work.plan.require_publish
            || waiting
                .as_ref()
                .is_some_and(|waiting| waiting.require_publish);
        let mut job = self
            .work
            .result(prepared, &added_paths, publication, require);
        (job.command, job.publish) = (watched, began.elapsed());
        (JobReport::new(&job), waiting)
    }
}

/// Whether the step that waits is being cancelled; false when it has gone.
async fn cancelled(waiting: Option<&mut FinishRequest>) -> bool {
    match waiting {
        None => std::future::pending().await,
        Some(waiting) => matches!(receive(&mut waiting.stream).await, Some(Request::Cancel)),
    }
}

/// Answers those who ask, one after the other; who wants the end is handed on.
async fn serve(
    listener: UnixListener,
    status_cell: StatusCell,
    asked: mpsc::Sender<FinishRequest>,
) {
    while let Ok((stream, _)) = listener.accept().await {
        let mut stream = BufReader::new(stream);
        match timeout(REQUEST_LIMIT, receive(&mut stream)).await {
            Ok(Some(Request::Status)) => {
                let _ = send(&mut stream, &status_cell.shown()).await;
            }
            Ok(Some(Request::Finish {
                drain_timeout,
                require_publish,
            })) => {
                let drain_timeout = drain_timeout.map(Duration::from_secs);
                // A second one finds the channel full or closed, and its connection ends.
                let _ = asked.try_send(FinishRequest {
                    stream,
                    drain_timeout,
                    require_publish,
                });
            }
            _ => (),
        }
    }
}

/// The variables that the later steps need, and their values so far.
pub(super) fn variables(prepared: &Prepared) -> Vec<(String, String)> {
    let repairs = prepared
        .ready
        .variables()
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value.to_owned()));
    std::iter::once(("NIX_CONFIG".to_owned(), prepared.settings.config.clone()))
        .chain(repairs)
        .collect()
}

/// The folder of Nix, where it is not on `PATH` yet.
pub(super) fn nix_folder(prepared: &Prepared) -> Option<&Path> {
    prepared.ready.folder.as_deref()
}
