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

use super::talk::{Ask, Finished, Status, hear, say};
use crate::command::Failure;
use crate::command::job::stream::Bound;
use crate::command::job::{Prepared, STOPPED_LIMIT, Told, Watch, Work};
use crate::nix::temp_roots::JobScope;
use crate::process::signals::Signals;
use crate::progress::{Progress, Sink};
use crate::runner::workflow::Workflow;

/// A step says what it wants at once.
const ASK_LIMIT: Duration = Duration::from_secs(5);

/// What the watch is doing, for whoever asks.
#[derive(Clone)]
pub(super) struct Board(Arc<(Mutex<Status>, Instant)>);

impl Board {
    pub fn new(status: Status) -> Self {
        Self(Arc::new((Mutex::new(status), Instant::now())))
    }

    /// A sink that keeps what matters and hands everything on.
    pub fn sink(&self, next: Sink) -> Sink {
        let board = self.clone();
        Sink::new(move |event| {
            match &event {
                Progress::Moved { done, total, bytes } => {
                    let mut status = board.status();
                    (status.settled, status.known, status.bytes) = (*done, *total, *bytes);
                }
                Progress::Degraded { area, text } => {
                    let line = format!("{area}: {text}");
                    let mut status = board.status();
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
struct Waiting {
    stream: BufReader<UnixStream>,
    drain_timeout: Option<Duration>,
    require_publish: bool,
}

/// One watch.
pub(super) struct Keeper<'a> {
    pub work: Work<'a>,
    pub workflow: Workflow,
    pub board: Board,
    /// Where the job's results are linked from.
    pub folder: PathBuf,
    /// How the job's processes are known.
    pub whose: JobScope,
}

/// Why the watch ends.
enum End {
    Asked(Waiting),
    Stopped,
}

impl Keeper<'_> {
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
    ) -> Result<Told, Failure> {
        let (asked, mut asking) = mpsc::channel(1);
        let _answering =
            AbortOnDropHandle::new(tokio::spawn(answer(listener, self.board.clone(), asked)));
        let prepared = tokio::select! {
            biased;
            _ = signals.next() => return Ok(Told::cancelled()),
            prepared = Box::pin(self.work.make_ready(&self.workflow)) => prepared?,
        };
        let watch = self.work.watch(&prepared, self.whose.clone()).await;
        let cache = prepared
            .cache
            .endpoint
            .as_ref()
            .map(crate::cache::endpoint::Endpoint::substituter);
        {
            let mut status = self.board.status();
            status.state = "watching".into();
            status.cache = cache;
        }
        let began = Instant::now();
        ready(&prepared).await;
        let end = tokio::select! {
            biased;
            _ = signals.next() => End::Stopped,
            waiting = asking.recv() => waiting.map_or(End::Stopped, End::Asked),
        };
        self.board.status().state = "finishing".into();
        let watched = began.elapsed();
        let (told, waiting) = self.finish(&prepared, watch, end, watched, signals).await;
        prepared.stop().await;
        if let Some(mut waiting) = waiting {
            // A step that has gone meanwhile is told nothing.
            let _ = say(
                &mut waiting.stream,
                &Finished {
                    told: told.clone(),
                    variables: before,
                },
            )
            .await;
        }
        Ok(told)
    }

    async fn finish(
        &self,
        prepared: &Prepared,
        watch: Option<Watch>,
        end: End,
        watched: Duration,
        signals: &mut Signals,
    ) -> (Told, Option<Waiting>) {
        if matches!(end, End::Asked(_)) {
            self.work
                .check(prepared, watch.as_ref(), &self.folder, signals)
                .await;
        }
        let began = Instant::now();
        let (limit, mut waiting) = match end {
            End::Stopped => (STOPPED_LIMIT, None),
            End::Asked(waiting) => (
                waiting
                    .drain_timeout
                    .unwrap_or(self.work.plan.drain_timeout),
                Some(waiting),
            ),
        };
        let bound = Bound {
            deadline: (began + limit).into(),
            cancel: CancellationToken::new(),
        };
        let (harvest, publication) = match watch {
            None => Default::default(),
            Some(watch) => {
                let mut delivering =
                    Box::pin(
                        self.work
                            .deliver(watch, &prepared.cache, &self.folder, &bound),
                    );
                let mut hurried = false;
                loop {
                    tokio::select! {
                        biased;
                        done = &mut delivering => break done,
                        _ = signals.next() => bound.cancel.cancel(),
                        hurry = hurry(waiting.as_mut()), if !hurried => {
                            hurried = true;
                            if hurry {
                                bound.cancel.cancel();
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
        let mut job = self.work.told(prepared, &harvest, publication, require);
        (job.command, job.publish) = (watched, began.elapsed());
        (Told::of(&job), waiting)
    }
}

/// Whether the step that waits is being cancelled; false when it has gone.
async fn hurry(waiting: Option<&mut Waiting>) -> bool {
    match waiting {
        None => std::future::pending().await,
        Some(waiting) => matches!(hear(&mut waiting.stream).await, Some(Ask::Hurry)),
    }
}

/// Answers those who ask, one after the other; who wants the end is handed on.
async fn answer(listener: UnixListener, board: Board, asked: mpsc::Sender<Waiting>) {
    while let Ok((stream, _)) = listener.accept().await {
        let mut stream = BufReader::new(stream);
        match timeout(ASK_LIMIT, hear(&mut stream)).await {
            Ok(Some(Ask::Status)) => {
                let _ = say(&mut stream, &board.shown()).await;
            }
            Ok(Some(Ask::Finish {
                drain_timeout,
                require_publish,
            })) => {
                let drain_timeout = drain_timeout.map(Duration::from_secs);
                // A second one finds the channel full or closed, and its connection ends.
                let _ = asked.try_send(Waiting {
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
    std::iter::once(("NIX_CONFIG".to_owned(), prepared.settled.config.clone()))
        .chain(repairs)
        .collect()
}

/// The folder of Nix, where it is not on `PATH` yet.
pub(super) fn nix_folder(prepared: &Prepared) -> Option<&Path> {
    prepared.ready.folder.as_deref()
}
