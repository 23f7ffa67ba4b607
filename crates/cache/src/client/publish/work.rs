//! The publisher's one task: receives offers and the results of its jobs, and starts the jobs that the plan allows.

mod answers;
mod recheck;
mod stall;

use std::collections::{BTreeSet, HashSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use crate::client::attic::BATCH;
use crate::client::destination::{ByteCounter, CacheConfig, Error, Target, Uploaded};
use crate::client::publish::concurrency::ConcurrencyLimit;
use crate::client::publish::outcome::{Final, Outcome, PathOutcome, Skip};
use crate::client::publish::plan::{Id, UploadPlan};
use crate::client::publish::{Command, Options};
use crate::client::verify::check::Activity;
use crate::client::verify::{Key, Verdict};
use flywheel_core::progress::{Progress, Sink};
use flywheel_nix::nar::NarSource;
use flywheel_nix::path_info::PathInfo;
use flywheel_nix::scan::Finding;
use flywheel_nix::store_path::StorePath;

pub use self::recheck::Recheck;

use self::recheck::{Looked, Sample};
use self::stall::StallWatch;

/// This many paths are queried at once, without waiting for a pause in the offers.
const QUERY_AT_ONCE: usize = 500;
/// The shortest time between two progress events.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(100);

/// The paths that the cache lacks.
type Missing = HashSet<StorePath>;

enum JobResult {
    Preflight {
        config: Result<Option<CacheConfig>, Error>,
        may_push: Result<(), Error>,
    },
    ServerChecked(Result<(), Error>),
    Queried {
        ids: Vec<(Id, StorePath)>,
        result: Result<Missing, Error>,
        looked: Looked,
    },
    /// A path that the cache had already was checked.
    Checked {
        id: Id,
        verdict: Verdict,
    },
    /// Whether a server that takes its time answers.
    Liveness(bool),
    Sent {
        id: Id,
        size: u64,
        took: Duration,
        result: Result<Uploaded, Error>,
    },
    /// The policy withholds the path.
    Withheld {
        id: Id,
        size: u64,
        findings: Vec<Finding>,
    },
}

/// The state of the server.
enum Health {
    Available,
    /// The server does not respond, or repeated failures suggest it. Nothing is sent until a check succeeds.
    Unavailable {
        /// Checks that failed so far.
        checks: u32,
        /// The time of the next check.
        next: Instant,
        /// Consecutive checks that were refused.
        refused: u32,
    },
    /// Publishing was given up; holds the message.
    Stopped(String),
}

pub(super) struct PublisherTask {
    to: Target,
    options: Options,
    sink: Sink,
    plan: UploadPlan,
    /// Whether the preflight has had a definite result: success or refusal.
    probed: bool,
    health: Health,
    unavailable_since: Option<Instant>,
    concurrency: ConcurrencyLimit,
    jobs: JoinSet<JobResult>,
    preflighting: bool,
    /// A server check or query is under way: at most one of them runs.
    querying: bool,
    sending: usize,
    sending_large: usize,
    /// Paths in one query, at most.
    batch: usize,
    /// When the first and the last unqueried path was offered.
    arrived: Option<(Instant, Instant)>,
    /// One of the unqueried paths has already backed off, so the next query does not wait for more paths.
    urgent: bool,
    /// The end of the wait, the path, and whether the cache is queried before the path is sent again.
    backing_off: BTreeSet<(Instant, Id, bool)>,
    /// Since when the server answers uploads only by asking for a pause.
    busy_since: Option<Instant>,
    /// From `Retry-After`: no upload starts before.
    hold_until: Option<Instant>,
    /// Consecutive failures, of whatever paths.
    failure_streak: u32,
    /// Consecutive queries that failed.
    failed_queries: u32,
    /// Consecutive uploads that were refused.
    refusals: u32,
    any_sent: bool,
    draining: Option<(Instant, CancellationToken)>,
    drain_began: Option<Instant>,
    counter: ByteCounter,
    stall: StallWatch,
    sample: Sample,
    /// The key that the cache's signatures are checked with.
    key: Key,
    /// What the checks receive.
    activity: Arc<Activity>,
    retries: u64,
    began: Instant,
    /// When the last progress event was sent, and whether the next one is still due.
    progress_sent: Option<Instant>,
    progress_pending: bool,
}

impl PublisherTask {
    pub(super) fn new(to: Target, options: Options, sink: Sink) -> Self {
        let mut plan = UploadPlan::default();
        if to.omits_upstream_paths() {
            plan.omit(options.upstream.clone());
        }
        let width = to.concurrency();
        let given = options
            .recheck
            .as_ref()
            .and_then(|recheck| recheck.key.clone());
        Self {
            to,
            sink,
            plan,
            probed: false,
            health: Health::Available,
            unavailable_since: None,
            concurrency: width.map_or(
                ConcurrencyLimit::new(options.initial_uploads, options.max_uploads),
                |width| ConcurrencyLimit::new(width, width),
            ),
            options,
            jobs: JoinSet::new(),
            preflighting: false,
            querying: false,
            sending: 0,
            sending_large: 0,
            batch: BATCH,
            arrived: None,
            urgent: false,
            backing_off: BTreeSet::new(),
            busy_since: None,
            hold_until: None,
            failure_streak: 0,
            failed_queries: 0,
            refusals: 0,
            any_sent: false,
            draining: None,
            drain_began: None,
            counter: ByteCounter::default(),
            stall: StallWatch::new(),
            sample: Sample::new(),
            key: Key::new(given, None),
            activity: Arc::default(),
            retries: 0,
            began: Instant::now(),
            progress_sent: None,
            progress_pending: false,
        }
    }

    pub(super) async fn run(mut self, mut commands: mpsc::Receiver<Command>) -> Outcome {
        let mut stalled = false;
        let reason = loop {
            let next = self.advance();
            if self.draining.is_some() && self.is_idle() {
                break None;
            }
            if self.has_stalled() {
                stalled = true;
                break Some(self.on_stall());
            }
            let wakes = [next, self.progress_due(), self.stall_check_due()];
            let wake = wakes.into_iter().flatten().min();
            // `select!` evaluates each future even where its condition is false. So before the drain there has to be a
            // token that is never cancelled, and `began` stands in for a time that is never waited for.
            let (deadline, cancel) = match &self.draining {
                Some((deadline, cancel)) => (Some(*deadline), cancel.clone()),
                None => (None, CancellationToken::new()),
            };
            // In this order: a cancellation or the deadline must win even while jobs keep finishing.
            tokio::select! {
                biased;
                () = cancel.cancelled() => break Some("publishing was cancelled".to_owned()),
                () = sleep_until(deadline.unwrap_or(self.began)), if deadline.is_some() => {
                    break Some("the time for publishing was over".to_owned());
                }
                // `drain` consumes the publisher, so no command can follow it.
                command = commands.recv(), if self.draining.is_none() => match command {
                    Some(Command::Offer(infos)) => self.on_offer(infos),
                    Some(Command::StallAfter(idle)) => {
                        self.options.stall.idle = idle;
                        self.options.give_up_after = self.options.give_up_after.min(idle);
                    }
                    // The receiver may be gone by now.
                    Some(Command::Served(answer)) => _ = answer.send(self.plan.served()),
                    Some(Command::Drain { deadline, cancel }) => {
                        self.draining = Some((deadline, cancel));
                        self.drain_began = Some(Instant::now());
                    }
                    // The publisher was dropped.
                    None => break Some("publishing was cancelled".to_owned()),
                },
                Some(result) = self.jobs.join_next(), if !self.jobs.is_empty() => {
                    // A job that panicked leaves its path undecided; the outcome then lists the path as left.
                    if let Ok(result) = result {
                        self.on_result(result);
                    }
                }
                () = sleep_until(wake.unwrap_or(self.began)), if wake.is_some() => {
                    if self.progress_due().is_some_and(|due| due <= Instant::now()) {
                        self.report_progress(false);
                    }
                }
            }
        };
        // Aborts and joins all jobs first: no upload outlives the publisher.
        self.jobs.shutdown().await;
        self.finish(reason.as_deref(), stalled)
    }

    fn is_idle(&self) -> bool {
        let nothing =
            self.jobs.is_empty() && self.backing_off.is_empty() && !self.sample.is_waiting();
        let settled = self.plan.unqueried() == 0 && self.plan.ready_sizes() == (false, false);
        // After publishing was given up, the queued paths are left as they are.
        matches!(self.health, Health::Stopped(_)) || (nothing && settled && self.probed)
    }

    /// The cache is queried for offered paths even before its upstream keys are known: a hash too many in a query costs
    /// less than a round trip more.
    fn on_offer(&mut self, infos: Vec<PathInfo>) {
        // A path that others refer to may have been queried before its offer.
        let there: Vec<Id> = infos
            .into_iter()
            .filter_map(|info| self.plan.offer(info))
            .collect();
        self.draw_checks(&there, Looked::new());
        self.note_arrival();
        self.report_progress(false);
    }

    fn note_arrival(&mut self) {
        if self.plan.unqueried() > 0 {
            let now = Instant::now();
            self.arrived = Some((self.arrived.map_or(now, |(first, _)| first), now));
        }
    }

    /// Starts every job that may start now. Gives the time of the next call if no event comes before.
    fn advance(&mut self) -> Option<Instant> {
        let now = Instant::now();
        match self.health {
            Health::Stopped(_) => None,
            // A check that is under way wakes the task by its result.
            Health::Unavailable { next, .. } if now < next => {
                Some(next).filter(|_| !self.querying && !self.preflighting)
            }
            Health::Unavailable { .. } if !self.probed => {
                self.preflight();
                None
            }
            Health::Unavailable { .. } => {
                self.check_server();
                None
            }
            Health::Available => {
                self.resume_backed_off(now);
                let queried = self.query(now);
                // What is sent depends on the upstream keys and on the right to push, which the preflight finds out, and
                // so does a check on the cache's own key.
                let sent = if self.probed {
                    self.start_checks();
                    self.send(now)
                } else {
                    self.preflight();
                    None
                };
                let resumed = self.backing_off.first().map(|(until, ..)| *until);
                [queried, sent, resumed].into_iter().flatten().min()
            }
        }
    }

    fn preflight(&mut self) {
        if std::mem::replace(&mut self.preflighting, true) {
            return;
        }
        let (to, known) = (self.to.clone(), self.options.config.clone());
        self.jobs.spawn(async move {
            let config = async {
                match known {
                    Some(config) => Ok(Some(config)),
                    None => to.describe().await.map(Some),
                }
            };
            // At the same time, because the first upload waits for both.
            let (config, may_push) = tokio::join!(config, to.missing(&[]));
            JobResult::Preflight {
                config,
                may_push: may_push.map(|_| ()),
            }
        });
    }

    fn check_server(&mut self) {
        if std::mem::replace(&mut self.querying, true) {
            return;
        }
        let to = self.to.clone();
        self.jobs
            .spawn(async move { JobResult::ServerChecked(to.missing(&[]).await.map(|_| ())) });
    }

    fn resume_backed_off(&mut self, now: Instant) {
        while let Some((until, id, recheck)) = self
            .backing_off
            .first()
            .copied()
            .filter(|(until, ..)| *until <= now)
        {
            self.backing_off.remove(&(until, id, recheck));
            if recheck {
                // The cache may have stored the path although the response was lost.
                self.plan.requery(id);
                self.urgent = true;
            } else if self.plan.is_backing_off(id) {
                self.plan.ready(id);
            }
        }
    }

    /// Queries the cache for the paths that were offered. Gives the time to do so if that is later.
    fn query(&mut self, now: Instant) -> Option<Instant> {
        if self.querying || self.plan.unqueried() == 0 {
            return None;
        }
        let (first, last) = self.arrived.unwrap_or((now, now));
        let due = (last + self.options.debounce).min(first + self.options.max_delay);
        let at_once =
            self.urgent || self.draining.is_some() || self.plan.unqueried() >= QUERY_AT_ONCE;
        if !at_once && now < due {
            return Some(due);
        }
        let ids = self.plan.next_query(self.batch);
        // Paths beyond this batch keep their times, so that the next query follows at once.
        self.arrived = (self.plan.unqueried() > 0).then_some((first, last));
        self.urgent = false;
        if ids.is_empty() {
            return None;
        }
        self.querying = true;
        let (to, likely) = (self.to.clone(), self.likely_checks(&ids));
        self.jobs.spawn(async move {
            let paths: Vec<StorePath> = ids.iter().map(|(_, path)| path.clone()).collect();
            let (result, looked) = tokio::join!(to.missing(&paths), recheck::look_up(&to, likely));
            JobResult::Queried {
                ids,
                result,
                looked,
            }
        });
        None
    }

    /// Starts the uploads that may run now. Gives the time to continue if the server asked for a pause.
    fn send(&mut self, now: Instant) -> Option<Instant> {
        if let Some(until) = self.hold_until.filter(|until| *until > now) {
            return Some(until);
        }
        self.hold_until = None;
        while self.sending < self.concurrency.limit() {
            let Some(large) = self.pick() else { break };
            let Some((id, info)) = self.plan.take(large) else {
                break;
            };
            self.sending += 1;
            self.sending_large += usize::from(large);
            let to = self.to.clone();
            let (counter, begun) = self.stall.begin(id, info.nar_size, &self.counter);
            let mut source = NarSource::from(self.options.store.join(info.path.base_name()));
            let inspector = self.options.inspector.clone();
            self.jobs.spawn(async move {
                let size = info.nar_size;
                // Only here, just before a path is sent: what the cache already has need not be scanned.
                let inspected = match inspector {
                    Some(inspector) => inspector.inspect(&info, &mut source).await,
                    None => Ok(Vec::new()),
                };
                begun.store(true, Ordering::Relaxed);
                // The scan does not count: the duration is a measure of the server.
                let began = Instant::now();
                let result = match inspected {
                    Ok(findings) if !findings.is_empty() => {
                        return JobResult::Withheld { id, size, findings };
                    }
                    Ok(_) => to.send(&info, source, &counter).await,
                    Err(error) => Err(error.into()),
                };
                JobResult::Sent {
                    id,
                    size,
                    took: began.elapsed(),
                    result,
                }
            });
        }
        None
    }

    /// Whether the next upload is a large path (`true`) or a small one. While the build runs, one large path is always
    /// being uploaded, because it needs the most time. During the drain small paths go first, because more of them can
    /// be finished before the deadline.
    fn pick(&self) -> Option<bool> {
        let (small, large) = self.plan.ready_sizes();
        let room = large && self.sending_large < self.options.large_uploads;
        let early =
            self.draining.is_none() && self.sending_large == 0 && self.concurrency.limit() > 1;
        match (small, room) {
            (false, false) => None,
            (true, false) => Some(false),
            (false, true) => Some(true),
            (true, true) => Some(early),
        }
    }

    fn report_progress(&mut self, last: bool) {
        let now = Instant::now();
        // The last event ignores the interval, so that the final numbers are right.
        self.progress_pending = !last
            && self
                .progress_sent
                .is_some_and(|progress_sent| now - progress_sent < PROGRESS_INTERVAL);
        if !self.progress_pending {
            self.progress_sent = Some(now);
            let (done, total) = self.plan.progress();
            self.sink.send(Progress::Moved {
                done,
                total,
                bytes: self.counter.total(),
            });
        }
    }

    /// When to send progress that came too soon after the last event. Without this, the last change before a standstill
    /// would never be reported.
    fn progress_due(&self) -> Option<Instant> {
        self.progress_sent
            .filter(|_| self.progress_pending)
            .map(|progress_sent| progress_sent + PROGRESS_INTERVAL)
    }

    fn finish(mut self, reason: Option<&str>, stalled: bool) -> Outcome {
        self.report_progress(true);
        let stopped = match self.health {
            Health::Stopped(text) => Some(text),
            _ => reason.filter(|_| stalled).map(str::to_owned),
        };
        // The message of `stopped` has the details; a hundred paths need not repeat them.
        let left = match &stopped {
            Some(_) if !stalled => Some("publishing was given up"),
            _ => reason,
        };
        let mut paths = self
            .plan
            .finish(left.unwrap_or("publishing has ended"), left.is_none());
        for path in paths.iter_mut().filter(|path| path.end.lost().is_some()) {
            // The cache's own copy stays damaged, whether or not this store still has the path.
            if !matches!(path.checked, Some(Verdict::Bad(_))) {
                mark_if_vanished(path, &self.options);
            }
        }
        Outcome {
            paths,
            stopped,
            stalled,
            key: self.key,
            bytes: self.counter.total(),
            retries: self.retries,
            elapsed: self.began.elapsed(),
        }
    }
}

/// A path that is no longer in the store counts as skipped, not as lost. The garbage collector deletes a path together
/// with everything that refers to it, so this holds for the paths that waited for it, too.
fn mark_if_vanished(path: &mut PathOutcome, options: &Options) {
    let file = options.store.join(path.info.path.base_name());
    let gone = file
        .symlink_metadata()
        .is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound);
    if gone {
        path.end = Final::Skipped(Skip::Vanished);
    }
}
