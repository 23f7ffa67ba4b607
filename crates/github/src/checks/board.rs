//! The Check Runs of a run of `flake-checks`. The wanted state of each output is kept here, and one task brings GitHub
//! to it, within GitHub's limits and without ever blocking the run.
//!
//! States are coalesced: an output that was queued, built and ended while GitHub allowed no request costs one request.
//! Up to `Options::alone` outputs have a Check Run each. With more outputs, those that fail have one each, and all are
//! listed in shared ones. The aggregate Check Run is created first and ends last.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use crate::check_run::{self, CheckRun, CheckRuns, Error, Stage};
use crate::checks::options::Options;
use crate::checks::reachability::Reachability;
use crate::checks::runs::{self, Subject};
use crate::checks::{Output, OutputState};
use flywheel_core::progress::Sink;

/// The aggregate ends this long before the deadline, whatever else is still open.
const AGGREGATE_RESERVE: Duration = Duration::from_secs(2);

/// After a request to stop, updating may take this long. GitHub kills after ten seconds, and we promise to be done in
/// six.
const STOP_TIMEOUT: Duration = Duration::from_secs(4);

/// The content of the aggregate Check Run at its end.
#[derive(Clone, Debug)]
pub struct Aggregate {
    pub conclusion: check_run::Conclusion,
    /// One line.
    pub title: String,
    /// Markdown.
    pub summary: String,
}

/// What the reporter achieved.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ReportStats {
    /// How many Check Runs show what they should.
    pub shown: usize,
    /// The names of those that do not.
    pub missing: Vec<String>,
    /// How many requests were sent.
    pub requests: usize,
    /// Whether the log has the reason why some are missing.
    pub is_explained: bool,
}

/// A handle to the task. Every method but `close` returns at once.
#[derive(Debug)]
pub struct CheckRunReporter {
    shared: Arc<Shared>,
    task: JoinHandle<ReportStats>,
}

#[derive(Debug)]
struct Shared {
    wanted: Mutex<Wanted>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct Wanted {
    outputs: Vec<(Output, OutputState)>,
    index: HashMap<String, usize>,
    is_announced: bool,
    aggregate: Option<Aggregate>,
    close: Option<Instant>,
}

impl CheckRunReporter {
    /// Starts the task, which creates the aggregate Check Run at once.
    pub fn start(runs: CheckRuns, options: Options, sink: Sink) -> Self {
        let shared = Arc::new(Shared {
            wanted: Mutex::default(),
            changed: Notify::new(),
        });
        let task = tokio::spawn(Worker::new(Arc::clone(&shared), runs, options, sink).run());
        Self { shared, task }
    }

    /// Takes the list of outputs.
    pub fn announce(&self, outputs: Vec<Output>) {
        let mut wanted = self.shared.wanted();
        wanted.index = outputs
            .iter()
            .enumerate()
            .map(|(n, output)| (output.label.clone(), n))
            .collect();
        wanted.outputs = outputs
            .into_iter()
            .map(|output| (output, OutputState::Queued))
            .collect();
        wanted.is_announced = true;
        drop(wanted);
        self.shared.changed.notify_one();
    }

    /// Takes an output's new state. An output that has ended stays so.
    pub fn update(&self, label: &str, state: OutputState) {
        let mut wanted = self.shared.wanted();
        if let Some(at) = wanted.index.get(label).copied()
            && !matches!(wanted.outputs[at].1, OutputState::Finished(_))
        {
            wanted.outputs[at].1 = state;
        }
        drop(wanted);
        self.shared.changed.notify_one();
    }

    /// Shows what is still to be shown, until `deadline`, or until soon after `stop` is cancelled. An output without a
    /// verdict is shown as cancelled.
    pub async fn close(
        self,
        aggregate: Aggregate,
        deadline: Instant,
        stop: &CancellationToken,
    ) -> ReportStats {
        let Self { shared, mut task } = self;
        let close_at = |deadline: Instant| {
            shared.wanted().close = Some(deadline);
            shared.changed.notify_one();
        };
        shared.wanted().aggregate = Some(aggregate);
        close_at(deadline);
        tokio::select! {
            stats = &mut task => return stats.unwrap_or_default(),
            () = stop.cancelled() => close_at(deadline.min(Instant::now() + STOP_TIMEOUT)),
        }
        task.await.unwrap_or_default()
    }
}

impl Shared {
    fn wanted(&self) -> MutexGuard<'_, Wanted> {
        self.wanted
            .lock()
            .expect("nothing panics while it holds this lock")
    }
}

/// What is known of one of our Check Runs at GitHub.
#[derive(Debug, Default)]
struct Record {
    id: Option<u64>,
    /// The stage that it shows.
    shown: Option<Stage>,
    /// Whether a request for it is under way.
    sending: bool,
    /// Whether GitHub may have it without our knowing: a request to create it had no answer.
    may_exist: bool,
    /// Whether GitHub has rejected it, which no other attempt would change.
    refused: bool,
}

enum Response {
    Listed(Result<Vec<check_run::Listed>, Error>),
    Looked(Subject, Result<Vec<check_run::Listed>, Error>),
    Made(Subject, Stage, Result<u64, Error>),
    Updated(Subject, Stage, Result<(), Error>),
}

struct Worker {
    shared: Arc<Shared>,
    runs: CheckRuns,
    options: Options,
    sink: Sink,
    records: HashMap<Subject, Record>,
    /// GitHub's numbers of Check Runs of an earlier attempt, by our identifiers.
    earlier: HashMap<String, u64>,
    is_listed: bool,
    is_listing: bool,
    writes: VecDeque<Instant>,
    all_writes: usize,
    requests: usize,
    jobs: JoinSet<Response>,
    blocked: Option<Instant>,
    reachability: Reachability,
    /// Whether nothing more is sent: the token has no rights, or GitHub was away at the end.
    stopped: bool,
    /// Whether the log says why Check Runs are missing. It is said once.
    is_explained: bool,
    /// Why the last request had no answer.
    last_error: String,
}

impl Worker {
    fn new(shared: Arc<Shared>, runs: CheckRuns, options: Options, sink: Sink) -> Self {
        let reachability = Reachability::new(options.patience, options.base);
        Self {
            shared,
            runs,
            options,
            sink,
            records: HashMap::new(),
            earlier: HashMap::new(),
            is_listed: false,
            is_listing: false,
            writes: VecDeque::new(),
            all_writes: 0,
            requests: 0,
            jobs: JoinSet::new(),
            blocked: None,
            reachability,
            stopped: false,
            is_explained: false,
            last_error: String::new(),
        }
    }

    async fn run(mut self) -> ReportStats {
        loop {
            let close = self.shared.wanted().close;
            let now = Instant::now();
            if self.reachability.away_at().is_some_and(|at| at <= now) {
                self.give_up(close.is_some()).await;
            }
            let busy = !self.jobs.is_empty();
            if close.is_some_and(|deadline| deadline <= now)
                || self.stopped && close.is_some() && !busy
            {
                break;
            }
            let wake = self.send(now, close);
            // Nothing is left to send, or GitHub wants to be left alone until it is too late.
            let is_too_late = |deadline| {
                let blocked = self.blocked.filter(|_| !self.reachability.is_away());
                wake.is_none() || blocked.is_some_and(|until| until >= deadline)
            };
            if self.jobs.is_empty() && close.is_some_and(is_too_late) {
                break;
            }
            let away = self.reachability.away_at();
            let until = [wake, close, away].into_iter().flatten().min();
            tokio::select! {
                biased;
                Some(answer) = self.jobs.join_next(), if !self.jobs.is_empty() => {
                    // A request that panicked has printed why, and its Check Run counts as missing.
                    if let Ok(answer) = answer {
                        self.on_response(answer, close.is_some());
                    }
                }
                () = self.shared.changed.notified() => (),
                () = sleep_until(until.unwrap_or(now)), if until.is_some() => (),
            }
        }
        // The deadline is reached, or nothing more is to be sent: what is under way is given up.
        self.jobs.shutdown().await;
        self.stats()
    }

    /// GitHub is away. Until the run ends it is asked no more, and then once: it may be back, and Check Runs that it
    /// shows as open would stay so for ever.
    async fn give_up(&mut self, is_closing: bool) {
        self.reachability.set_away();
        self.stopped |= is_closing;
        self.jobs.shutdown().await;
        self.is_listing = false;
        for record in self.records.values_mut().filter(|record| record.sending) {
            record.sending = false;
            record.may_exist |= record.id.is_none();
        }
        let text = format!(
            "GitHub has not answered for {} s, so Check Runs are late or missing. The summary has every verdict. {}",
            self.options.patience.as_secs(),
            self.last_error
        );
        self.explain(text);
    }

    fn explain(&mut self, text: String) {
        if !std::mem::replace(&mut self.is_explained, true) {
            self.sink.degraded("check runs", text);
        }
    }

    fn stats(&self) -> ReportStats {
        let mut stats = ReportStats {
            requests: self.requests,
            is_explained: self.is_explained,
            ..ReportStats::default()
        };
        for (subject, stage) in self.stages(true) {
            let shown = self.records.get(&subject).and_then(|record| record.shown);
            // A Check Run that was left at an earlier stage counts as missing, too.
            if shown == Some(stage) {
                stats.shown += 1;
            } else {
                stats.missing.push(runs::name(
                    subject,
                    &self.shared.wanted().outputs,
                    &self.options,
                ));
            }
        }
        stats
    }

    /// Lists the Check Runs of an earlier attempt, which are updated: new ones beside them would leave them open.
    fn list(&mut self, now: Instant) {
        let (runs, limit) = (self.runs.clone(), self.options.request);
        self.is_listing = true;
        self.requests += 1;
        self.reachability.on_request(now);
        self.jobs
            .spawn(async move { Response::Listed(bounded(limit, runs.list(None)).await) });
    }

    /// The stage that each Check Run should show now, the most urgent first.
    fn stages(&self, closing: bool) -> Vec<(Subject, Stage)> {
        let wanted = self.shared.wanted();
        runs::stages(
            &wanted.outputs,
            wanted.is_announced,
            wanted.aggregate.as_ref(),
            &self.options,
            closing,
        )
    }

    /// The same in the order of sending. While closing, Check Runs that GitHub shows as open come before those that it
    /// does not have, because an open one would stay so for ever.
    fn in_order(&self, closing: bool) -> Vec<(Subject, Stage)> {
        let mut stages = self.stages(closing);
        if closing {
            let is_open = |subject: &Subject| {
                let shown = self.records.get(subject).and_then(|record| record.shown);
                shown.is_some_and(|shown| !shown.is_completed())
            };
            stages.sort_by_key(|(subject, _)| (*subject == Subject::Aggregate, !is_open(subject)));
        }
        stages
    }

    /// Starts the requests that may be sent now. Returns when to call this again; `None` when nothing is left to send.
    fn send(&mut self, now: Instant, close: Option<Instant>) -> Option<Instant> {
        let is_away = self.reachability.is_away();
        if self.stopped || is_away && (close.is_none() || !self.jobs.is_empty()) {
            return None;
        }
        // Nothing is created before the Check Runs of an earlier attempt are known.
        if !self.is_listed {
            let blocked = self.blocked.filter(|until| *until > now && !is_away);
            if blocked.is_none() && !self.is_listing {
                self.list(now);
            }
            return blocked;
        }
        while self
            .writes
            .front()
            .is_some_and(|at| *at + self.options.minute <= now)
        {
            self.writes.pop_front();
        }
        let closing = close.is_some();
        let mut next = None;
        let mut open = false;
        for (subject, stage) in self.in_order(closing) {
            let record = self.records.get(&subject);
            let shown = record.and_then(|record| record.shown);
            if record.is_some_and(|record| record.refused)
                || shown.is_some_and(|shown| shown >= stage)
            {
                continue;
            }
            if record.is_some_and(|record| record.sending) {
                open = true;
                continue;
            }
            // The aggregate must end last, because it stands for all others, and must end in any case.
            let aggregate_due = close.map(|deadline| deadline - AGGREGATE_RESERVE);
            let is_last = subject == Subject::Aggregate
                && stage.is_completed()
                && (open || !self.jobs.is_empty());
            if let Some(at) = aggregate_due.filter(|at| is_last && *at > now) {
                open = true;
                next = Some(next.map_or(at, |next: Instant| next.min(at)));
                continue;
            }
            if !self.is_affordable(subject, stage, shown, closing) {
                continue;
            }
            open = true;
            // One request is enough to find out whether GitHub is back.
            let is_failing = self.reachability.is_failing();
            let at_once = if is_failing { 1 } else { self.options.at_once };
            if self.jobs.len() >= at_once {
                // This is called again when a request has ended.
                continue;
            }
            if let Some(until) = self.blocked_until(now, close) {
                next = Some(next.map_or(until, |next: Instant| next.min(until)));
                continue;
            }
            self.start(subject, closing, now);
        }
        // Nothing is under way that could end, and no time is known: look again soon, or this would wait for ever.
        next.or_else(|| (open && self.jobs.is_empty()).then(|| now + self.options.base))
    }

    /// Whether the budget of writes has one left for this. What is open must be closed, and failures must be seen; the
    /// rest gets what remains.
    fn is_affordable(
        &self,
        subject: Subject,
        stage: Stage,
        shown: Option<Stage>,
        closing: bool,
    ) -> bool {
        let left = self.options.in_all.saturating_sub(self.all_writes);
        let open = self
            .records
            .values()
            .filter(|record| record.shown.is_some_and(|shown| !shown.is_completed()))
            .count();
        let closes = stage.is_completed() && (shown.is_some() || subject == Subject::Aggregate);
        let fails = stage == Stage::Completed(check_run::Conclusion::Failure);
        match (closes || fails, stage) {
            (true, _) => left > 0,
            // What begins now has to end as well, which is another write.
            (false, Stage::Queued | Stage::InProgress) if shown.is_none() => {
                !closing && left > open + 2
            }
            // Showing progress is a luxury, for when there are plenty of writes left.
            (false, Stage::InProgress) => !closing && left > 3 * (open + 1),
            (false, _) => left > open + 1,
        }
    }

    /// Until when nothing may be sent, if so.
    fn blocked_until(&self, now: Instant, close: Option<Instant>) -> Option<Instant> {
        // Where GitHub is away, the one request at the end waits for nothing.
        let blocked = self.blocked.filter(|_| !self.reachability.is_away());
        if let Some(until) = blocked.filter(|until| *until > now) {
            return Some(until);
        }
        let full = self.writes.len() >= self.options.per_minute;
        // Close to the deadline there is no minute left to wait. GitHub refuses what is too much.
        let is_closing_soon = close.is_some_and(|deadline| deadline < now + self.options.minute);
        (full && !is_closing_soon).then(|| self.writes[0] + self.options.minute)
    }

    fn start(&mut self, subject: Subject, closing: bool, now: Instant) {
        let wanted = self.shared.wanted();
        let run: CheckRun = runs::render(
            subject,
            &wanted.outputs,
            wanted.aggregate.as_ref(),
            &self.options,
            closing,
        );
        drop(wanted);
        let record = self.records.entry(subject).or_default();
        record.sending = true;
        if record.id.is_none() {
            record.id = self.earlier.get(&run.external_id).copied();
        }
        let (runs, limit, stage) = (self.runs.clone(), self.options.request, run.stage);
        self.requests += 1;
        self.reachability.on_request(now);
        // The request without a response may have succeeded. Creating another Check Run would leave two, so look first.
        if record.id.is_none() && record.may_exist {
            self.jobs.spawn(async move {
                Response::Looked(subject, bounded(limit, runs.list(Some(&run.name))).await)
            });
            return;
        }
        self.writes.push_back(now);
        self.all_writes += 1;
        match record.id {
            Some(id) => {
                self.jobs.spawn(async move {
                    Response::Updated(subject, stage, bounded(limit, runs.update(id, &run)).await)
                });
            }
            None => {
                self.jobs.spawn(async move {
                    Response::Made(subject, stage, bounded(limit, runs.create(&run)).await)
                });
            }
        }
    }

    fn on_response(&mut self, response: Response, is_closing: bool) {
        let is_read = matches!(response, Response::Listed(_) | Response::Looked(..));
        let (subject, result) = match response {
            Response::Listed(found) => {
                self.is_listing = false;
                (None, self.on_listed(found))
            }
            Response::Looked(subject, found) => {
                let found = found.map(|found| self.on_found(subject, found));
                (Some(subject), found)
            }
            Response::Made(subject, stage, made) => {
                let made = made.map(|id| self.on_shown(subject, stage, Some(id)));
                if let (Err(Error::Request(_)), Some(record)) =
                    (&made, self.records.get_mut(&subject))
                {
                    record.may_exist = true;
                }
                (Some(subject), made)
            }
            Response::Updated(subject, stage, updated) => {
                let updated = updated.map(|()| self.on_shown(subject, stage, None));
                (Some(subject), updated)
            }
        };
        if let Some(record) = subject.and_then(|subject| self.records.get_mut(&subject)) {
            record.sending = false;
        }
        if !matches!(result, Err(Error::Request(_))) {
            let is_waiting = !self.jobs.is_empty();
            self.reachability
                .on_answer(Instant::now(), is_read, is_waiting);
        }
        if let Err(error) = result {
            self.on_failure(subject, &error, is_closing);
        }
    }

    fn on_listed(&mut self, found: Result<Vec<check_run::Listed>, Error>) -> Result<(), Error> {
        let found = match found {
            Ok(found) => found,
            // A token that may write but not read creates new Check Runs, which is better than none.
            Err(Error::Refused { .. } | Error::Invalid { .. }) => Vec::new(),
            Err(error) => return Err(error),
        };
        self.is_listed = true;
        self.earlier = found
            .into_iter()
            .filter_map(|run| Some((run.external_id?, run.id)))
            .collect();
        Ok(())
    }

    /// Takes what GitHub has after a request to create a Check Run that had no answer.
    fn on_found(&mut self, subject: Subject, found: Vec<check_run::Listed>) {
        let name = runs::external_id(subject, &self.shared.wanted().outputs, &self.options);
        if let Some(record) = self.records.get_mut(&subject) {
            let ours = found
                .into_iter()
                .find(|run| run.external_id.as_deref() == Some(name.as_str()));
            record.id = ours.map(|run| run.id);
            record.may_exist = false;
        }
    }

    fn on_shown(&mut self, subject: Subject, stage: Stage, id: Option<u64>) {
        if let Some(record) = self.records.get_mut(&subject) {
            record.shown = Some(stage);
            record.id = id.or(record.id);
        }
    }

    fn on_failure(&mut self, subject: Option<Subject>, error: &Error, is_closing: bool) {
        let now = Instant::now();
        match error {
            Error::Refused { .. } => {
                self.stopped = true;
                let hint = flywheel_core::exit::Explain::hint(error).unwrap_or_default();
                let text = format!(
                    "there are no Check Runs: {error}. {hint} The summary has every verdict."
                );
                self.explain(text);
            }
            Error::Invalid { .. } => {
                if let Some(record) = subject.and_then(|subject| self.records.get_mut(&subject)) {
                    record.refused = true;
                }
                self.explain(format!("GitHub does not take a Check Run: {error}"));
            }
            Error::Limited { wait, .. } => self.wait(now, (*wait).max(self.options.base)),
            Error::Request(_) => {
                // It was away before, and this was the one request at the end.
                self.stopped |= self.reachability.is_away() && is_closing;
                let wait = self.reachability.on_failure();
                self.last_error = error.to_string();
                self.wait(now, wait);
            }
        }
    }

    /// Sends nothing for as long as GitHub asks, and a random bit longer, so that not all jobs return at the same
    /// moment.
    fn wait(&mut self, now: Instant, wait: Duration) {
        let until = now + wait + wait.mul_f64(fastrand::f64() * 0.1);
        self.blocked = Some(self.blocked.map_or(until, |blocked| blocked.max(until)));
    }
}

async fn bounded<T>(
    limit: Duration,
    request: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    let late = || Error::Request(format!("no answer within {} s", limit.as_secs()));
    tokio::time::timeout(limit, request)
        .await
        .unwrap_or_else(|_| Err(late()))
}
