//! The process that watches the store, in the foreground for `run` or in the background for `start`: prepares,
//! watches and publishes, serves the requests of the job's later steps, and drains at the end.

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
use super::later_steps;
use crate::job::added_paths::AddedPaths;
use crate::job::disk::WorkEnd;
use crate::job::stream::Deadline;
use crate::job::{JobReport, Prepared, STOPPED_LIMIT, Session, StoreWatch};
use crate::report::disk::DiskReport;
use crate::report::job::Work;
use crate::report::publication::Publication;
use flywheel_cache::client::endpoint::Endpoint;
use flywheel_core::exit::Failure;
use flywheel_core::progress::{Progress, Sink};
use flywheel_nix::daemon_proxy::LastingLink;
use flywheel_nix::path_info::PathInfo;
use flywheel_nix::temp_roots::JobScope;
use flywheel_sys::process::signals::Signals;

/// A client sends its request as soon as it has connected.
const REQUEST_LIMIT: Duration = Duration::from_secs(5);

/// The status of the daemon, shared between the watch and the server of requests.
#[derive(Clone)]
pub(super) struct StatusCell(Arc<(Mutex<Status>, Instant)>);

impl StatusCell {
    pub(crate) fn new(status: Status) -> Self {
        Self(Arc::new((Mutex::new(status), Instant::now())))
    }

    /// A sink that keeps what the status shows and passes every event on to `next`.
    pub(crate) fn sink(&self, next: Sink) -> Sink {
        let cell = self.clone();
        Sink::new(move |event| {
            match &event {
                Progress::Moved { done, total, bytes } => {
                    let mut status = cell.status();
                    (status.settled, status.known, status.bytes) = (*done, *total, *bytes);
                }
                Progress::Degraded { area, text } => {
                    let line = format!("{area}: {text}");
                    let mut status = cell.status();
                    if !status.degraded.contains(&line) {
                        status.degraded.push(line);
                    }
                }
                Progress::Note(_) => (),
            }
            next.send(event);
        })
    }

    pub(crate) fn status(&self) -> MutexGuard<'_, Status> {
        self.0
            .0
            .lock()
            .expect("nothing panics while it holds this lock")
    }

    fn snapshot(&self) -> Status {
        Status {
            seconds: self.0.1.elapsed().as_secs(),
            ..self.status().clone()
        }
    }
}

/// A step that has asked for the end and waits for the report.
struct FinishRequest {
    stream: BufReader<UnixStream>,
    drain_timeout: Option<Duration>,
    require_publish: bool,
    /// Whether the step has cancelled the end or is gone. The connection is read once: after its end it would be ready
    /// for ever.
    is_read: bool,
}

impl FinishRequest {
    /// Waits until the step is being cancelled. A step that is merely gone changes nothing: publishing goes on without
    /// it, and this waits for ever.
    async fn cancelled(&mut self) {
        if !self.is_read {
            let message = receive(&mut self.stream).await;
            self.is_read = true;
            if matches!(message, Some(Request::Cancel)) {
                return;
            }
        }
        std::future::pending::<()>().await;
    }
}

pub(super) struct Daemon<'a> {
    pub(crate) session: Session<'a>,
    pub(crate) status_cell: StatusCell,
    /// The folder with the links to the job's results.
    pub(crate) folder: PathBuf,
    /// The Nix processes that count as the job's.
    pub(crate) processes: JobScope,
    /// The link to Nix's daemon, where the later steps are to get one.
    pub(crate) lasting_link: Option<LastingLink>,
}

/// Who stopped the check that was to be made before the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum StopCause {
    Signal,
    /// The step that waits for the end.
    Step,
}

/// Why the watch ends.
enum Shutdown {
    Requested(FinishRequest),
    Signalled,
}

impl Daemon<'_> {
    /// Watches until a step asks for the end or a signal arrives. Calls `ready` once Nix, the cache and the watch are, with
    /// the link that the later steps are to reach Nix's daemon by.
    ///
    /// # Errors
    /// When there is no usable Nix.
    pub(crate) async fn run(
        self,
        listener: UnixListener,
        signals: &mut Signals,
        ready: impl AsyncFnOnce(&Prepared, Option<&Path>),
    ) -> Result<JobReport, Failure> {
        // One request ends the watch, so there is room for one.
        let (requests, mut requested) = mpsc::channel(1);
        // `status` is served from the beginning, while Nix is still being made ready.
        let _serving = AbortOnDropHandle::new(tokio::spawn(serve(
            listener,
            self.status_cell.clone(),
            requests,
        )));
        let prepared = tokio::select! {
            biased;
            _ = signals.next() => return Ok(JobReport::cancelled()),
            prepared = Box::pin(self.session.make_ready()) => prepared?,
        };
        let watch = self.session.watch(&prepared, self.processes.clone()).await;
        let disks = self
            .session
            .watch_disks(&prepared, watch.as_ref(), &self.folder);
        let cache = prepared.cache.endpoint().map(Endpoint::substituter);
        {
            let mut status = self.status_cell.status();
            status.state = "watching".into();
            status.cache = cache;
        }
        let began = Instant::now();
        let link = watch.as_ref().and_then(StoreWatch::daemon_link);
        let mut before = later_steps::before(&prepared, self.session.env);
        if link.is_some()
            && let Some(lasting) = &self.lasting_link
        {
            before.extend(later_steps::socket_before(lasting, self.session.env));
        }
        ready(&prepared, link).await;
        let shutdown = tokio::select! {
            biased;
            _ = signals.next() => Shutdown::Signalled,
            request = requested.recv() => request.map_or(Shutdown::Signalled, Shutdown::Requested),
        };
        self.status_cell.status().state = "finishing".into();
        let watched = began.elapsed();
        // The steps have commands of their own, of which nothing is known here.
        let is_stopped = matches!(shutdown, Shutdown::Signalled);
        let disk = disks.end(WorkEnd::new(is_stopped, false), signals).await;
        let (report, request) = self
            .finish(&prepared, watch, shutdown, (watched, disk), signals)
            .await;
        prepared.stop().await;
        if let Some(mut request) = request {
            // The step may be gone by now; then there is no reader for the report.
            let _ = send(
                &mut request.stream,
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
        watch: Option<StoreWatch>,
        mut shutdown: Shutdown,
        (watched, (disk, freed)): (Duration, (DiskReport, Vec<PathInfo>)),
        signals: &mut Signals,
    ) -> (JobReport, Option<FinishRequest>) {
        let mut stop = None;
        if let Shutdown::Requested(request) = &mut shutdown {
            let stopping = async {
                tokio::select! {
                    biased;
                    _ = signals.next() => StopCause::Signal,
                    () = request.cancelled() => StopCause::Step,
                }
            };
            let checking =
                self.session
                    .run_flake_check(prepared, watch.as_ref(), &self.folder, stopping);
            stop = checking.await;
        }
        let began = Instant::now();
        let plan = self.session.plan;
        let (limit, mut request) = match shutdown {
            Shutdown::Signalled => (STOPPED_LIMIT, None),
            Shutdown::Requested(request) => (
                request.drain_timeout.unwrap_or(plan.drain_timeout),
                Some(request),
            ),
        };
        let limit = stop.map_or(limit, |_| STOPPED_LIMIT);
        let deadline = Deadline {
            at: (began + limit).into(),
            cancel: CancellationToken::new(),
        };
        // The step gives its report up after `STOPPED_LIMIT`, so nothing may take that long.
        if stop == Some(StopCause::Step) {
            deadline.cancel.cancel();
        }
        let (mut added_paths, publication) = match watch {
            None => Default::default(),
            Some(watch) => {
                self.deliver(watch, prepared, &deadline, request.as_mut(), signals)
                    .await
            }
        };
        added_paths.count_freed(&freed);
        let require = plan.require_publish
            || request
                .as_ref()
                .is_some_and(|request| request.require_publish);
        let mut job = self
            .session
            .result(prepared, &added_paths, publication, require);
        (job.command, job.publish, job.disk) = (watched, began.elapsed(), disk);
        job.work = Work::OtherSteps;
        (JobReport::new(&job), request)
    }

    /// Delivers until the deadline, which a signal or the cancelled step that waits brings forward.
    async fn deliver(
        &self,
        watch: StoreWatch,
        prepared: &Prepared,
        deadline: &Deadline,
        mut request: Option<&mut FinishRequest>,
        signals: &mut Signals,
    ) -> (AddedPaths, Option<Publication>) {
        let delivering = self
            .session
            .deliver(watch, &prepared.cache, &self.folder, deadline);
        let mut delivering = Box::pin(delivering);
        loop {
            let step = async {
                match request.as_deref_mut() {
                    None => std::future::pending().await,
                    Some(request) => request.cancelled().await,
                }
            };
            tokio::select! {
                biased;
                done = &mut delivering => return done,
                _ = signals.next() => deadline.cancel.cancel(),
                () = step => deadline.cancel.cancel(),
            }
        }
    }
}

/// Serves requests, one connection after the other. A request for the end goes to `requests`.
async fn serve(
    listener: UnixListener,
    status_cell: StatusCell,
    requests: mpsc::Sender<FinishRequest>,
) {
    while let Ok((stream, _)) = listener.accept().await {
        let mut stream = BufReader::new(stream);
        match timeout(REQUEST_LIMIT, receive(&mut stream)).await {
            Ok(Some(Request::Status)) => {
                let _ = send(&mut stream, &status_cell.snapshot()).await;
            }
            Ok(Some(Request::Finish {
                drain_timeout,
                require_publish,
            })) => {
                let drain_timeout = drain_timeout.map(Duration::from_secs);
                // A second request finds the channel full or closed, and its connection ends.
                let _ = requests.try_send(FinishRequest {
                    stream,
                    drain_timeout,
                    require_publish,
                    is_read: false,
                });
            }
            _ => (),
        }
    }
}
