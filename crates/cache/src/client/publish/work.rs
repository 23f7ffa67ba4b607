//! The publisher's one task: makes events of what comes, and jobs of what the plan allows.

mod answers;

use std::collections::{BTreeSet, HashSet};
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use crate::client::attic::{BATCH, CacheConfig, Error, Meter, Uploaded};
use crate::client::destination::Target;
use crate::client::publish::concurrency::Pace;
use crate::client::publish::outcome::{Final, Outcome, Settled, Skip};
use crate::client::publish::plan::{Id, Plan};
use crate::client::publish::{Command, Options};
use flywheel_core::progress::{Progress, Sink};
use flywheel_nix::nar::NarSource;
use flywheel_nix::path_info::PathInfo;
use flywheel_nix::scan::Finding;
use flywheel_nix::store_path::StorePath;

/// Paths in one question while the build runs; more do not wait for quiet.
const ENOUGH: usize = 500;
/// Events of progress are this far apart at least.
const TICK: Duration = Duration::from_millis(100);

/// What the cache does not have.
type Missing = HashSet<StorePath>;

/// What a job came back with.
enum Done {
    Preflight {
        config: Result<Option<CacheConfig>, Error>,
        may_push: Result<(), Error>,
    },
    Visited(Result<(), Error>),
    Asked {
        ids: Vec<(Id, StorePath)>,
        answer: Result<Missing, Error>,
    },
    Sent {
        id: Id,
        size: u64,
        took: Duration,
        answer: Result<Uploaded, Error>,
    },
    /// The policy keeps it back.
    Kept {
        id: Id,
        size: u64,
        findings: Vec<Finding>,
    },
}

/// How the server is.
enum Health {
    Well,
    /// Away, or doubtful: it is left alone until then, and looked at again.
    Away {
        visits: u32,
        next: Instant,
        refused: u32,
    },
    /// Publishing is given up, and why.
    Stopped(String),
}

pub(super) struct Work {
    to: Target,
    options: Options,
    sink: Sink,
    plan: Plan,
    /// Offered before the cache has told which keys are upstream.
    early: Vec<PathInfo>,
    /// Whether the cache has answered a first time.
    greeted: bool,
    health: Health,
    away_since: Option<Instant>,
    pace: Pace,
    jobs: JoinSet<Done>,
    /// A preflight, visit or question is under way.
    asking: bool,
    sending: usize,
    sending_large: usize,
    batch: usize,
    /// When the first and the last of the unasked came.
    came: Option<(Instant, Instant)>,
    /// Among the unasked is one that has waited already.
    urgent: bool,
    /// Until when, and whether one asks before sending.
    resting: BTreeSet<(Instant, Id, bool)>,
    /// The server asked to be left alone until then.
    hold: Option<Instant>,
    streak: u32,
    /// Questions that failed in a row.
    unanswered: u32,
    refusals: u32,
    any_sent: bool,
    draining: Option<(Instant, CancellationToken)>,
    drain_began: Option<Instant>,
    meter: Meter,
    retries: u64,
    began: Instant,
    /// When progress was told last, and whether something has moved since.
    told: Option<Instant>,
    untold: bool,
}

impl Work {
    pub(super) fn new(to: Target, options: Options, sink: Sink) -> Self {
        let mut plan = Plan::default();
        if to.leaves_upstream_out() {
            plan.trust_upstream(options.upstream_keys.iter().cloned());
        }
        let width = to.width();
        Self {
            to,
            sink,
            plan,
            early: Vec::new(),
            greeted: false,
            health: Health::Well,
            away_since: None,
            pace: width.map_or(Pace::new(options.uploads, options.most_uploads), |width| {
                Pace::new(width, width)
            }),
            options,
            jobs: JoinSet::new(),
            asking: false,
            sending: 0,
            sending_large: 0,
            batch: BATCH,
            came: None,
            urgent: false,
            resting: BTreeSet::new(),
            hold: None,
            streak: 0,
            unanswered: 0,
            refusals: 0,
            any_sent: false,
            draining: None,
            drain_began: None,
            meter: Meter::default(),
            retries: 0,
            began: Instant::now(),
            told: None,
            untold: false,
        }
    }

    pub(super) async fn run(mut self, mut commands: mpsc::Receiver<Command>) -> Outcome {
        let reason = loop {
            let next = self.advance();
            let wake = [next, self.due_to_tell()].into_iter().flatten().min();
            if self.draining.is_some() && self.is_idle() {
                break None;
            }
            let (deadline, cancel) = match &self.draining {
                Some((deadline, cancel)) => (Some(*deadline), cancel.clone()),
                None => (None, CancellationToken::new()),
            };
            tokio::select! {
                biased;
                () = cancel.cancelled() => break Some("publishing was cancelled"),
                () = sleep_until(deadline.unwrap_or(self.began)), if deadline.is_some() => {
                    break Some("the time for publishing was over");
                }
                command = commands.recv(), if self.draining.is_none() => match command {
                    Some(Command::Offer(infos)) => self.offered(infos),
                    Some(Command::Drain { deadline, cancel }) => {
                        self.draining = Some((deadline, cancel));
                        self.drain_began = Some(Instant::now());
                    }
                    None => break Some("publishing was cancelled"),
                },
                Some(done) = self.jobs.join_next(), if !self.jobs.is_empty() => {
                    // A job that panicked has said so; its path stays undecided and is listed.
                    if let Ok(done) = done {
                        self.done(done);
                    }
                }
                () = sleep_until(wake.unwrap_or(self.began)), if wake.is_some() => {
                    if self.due_to_tell().is_some_and(|due| due <= Instant::now()) {
                        self.tell(false);
                    }
                }
            }
        };
        self.jobs.shutdown().await;
        self.finish(reason)
    }

    fn is_idle(&self) -> bool {
        let nothing = self.jobs.is_empty() && self.resting.is_empty() && self.early.is_empty();
        let settled = self.plan.unasked() == 0 && self.plan.ready_sizes() == (false, false);
        matches!(self.health, Health::Stopped(_)) || (nothing && settled && self.greeted)
    }

    fn offered(&mut self, infos: Vec<PathInfo>) {
        if self.greeted {
            self.take_in(infos);
        } else {
            self.early.extend(infos);
            self.tell(false);
        }
    }

    fn take_in(&mut self, infos: Vec<PathInfo>) {
        for info in infos {
            self.plan.offer(info);
        }
        self.came_now();
        self.tell(false);
    }

    fn came_now(&mut self) {
        if self.plan.unasked() > 0 {
            let now = Instant::now();
            self.came = Some((self.came.map_or(now, |(first, _)| first), now));
        }
    }

    /// Starts every job that may start now, and says when to look again if nothing happens.
    fn advance(&mut self) -> Option<Instant> {
        let now = Instant::now();
        match self.health {
            Health::Stopped(_) => None,
            Health::Away { next, .. } if now < next => Some(next).filter(|_| !self.asking),
            _ if !self.greeted => {
                self.preflight();
                None
            }
            Health::Away { .. } => {
                self.visit();
                None
            }
            Health::Well => {
                self.wake_rested(now);
                let asked = self.ask(now);
                let sent = self.send(now);
                let rested = self.resting.first().map(|(until, ..)| *until);
                [asked, sent, rested].into_iter().flatten().min()
            }
        }
    }

    fn preflight(&mut self) {
        if std::mem::replace(&mut self.asking, true) {
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
            let (config, may_push) = tokio::join!(config, to.missing(&[]));
            Done::Preflight {
                config,
                may_push: may_push.map(|_| ()),
            }
        });
    }

    fn visit(&mut self) {
        if std::mem::replace(&mut self.asking, true) {
            return;
        }
        let to = self.to.clone();
        self.jobs
            .spawn(async move { Done::Visited(to.missing(&[]).await.map(|_| ())) });
    }

    fn wake_rested(&mut self, now: Instant) {
        while let Some((until, id, ask)) = self
            .resting
            .first()
            .copied()
            .filter(|(until, ..)| *until <= now)
        {
            self.resting.remove(&(until, id, ask));
            if ask {
                self.plan.ask_again(id);
                self.urgent = true;
            } else if self.plan.is_resting(id) {
                self.plan.ready(id);
            }
        }
    }

    /// Asks the cache about the paths that came, if it is time; else says when it will be.
    fn ask(&mut self, now: Instant) -> Option<Instant> {
        if self.asking || self.plan.unasked() == 0 {
            return None;
        }
        let (first, last) = self.came.unwrap_or((now, now));
        let due = (last + self.options.quiet).min(first + self.options.longest);
        let at_once = self.urgent || self.draining.is_some() || self.plan.unasked() >= ENOUGH;
        if !at_once && now < due {
            return Some(due);
        }
        let ids = self.plan.ask(self.batch);
        self.came = (self.plan.unasked() > 0).then_some((first, last));
        self.urgent = false;
        if ids.is_empty() {
            return None;
        }
        self.asking = true;
        let to = self.to.clone();
        self.jobs.spawn(async move {
            let paths: Vec<StorePath> = ids.iter().map(|(_, path)| path.clone()).collect();
            let answer = to.missing(&paths).await;
            Done::Asked { ids, answer }
        });
        None
    }

    /// Sends what may be sent now; else says when.
    fn send(&mut self, now: Instant) -> Option<Instant> {
        if let Some(until) = self.hold.filter(|until| *until > now) {
            return Some(until);
        }
        self.hold = None;
        while self.sending < self.pace.limit() {
            let Some(large) = self.pick() else { break };
            let Some((id, info)) = self.plan.take(large) else {
                break;
            };
            self.sending += 1;
            self.sending_large += usize::from(large);
            let (to, meter) = (self.to.clone(), self.meter.next());
            let mut source = NarSource::from(self.options.store.join(info.path.base_name()));
            let inspector = self.options.inspector.clone();
            self.jobs.spawn(async move {
                let size = info.nar_size;
                let inspected = match inspector {
                    Some(inspector) => inspector.inspect(&info, &mut source).await,
                    None => Ok(Vec::new()),
                };
                let began = Instant::now();
                let answer = match inspected {
                    Ok(findings) if !findings.is_empty() => {
                        return Done::Kept { id, size, findings };
                    }
                    Ok(_) => to.send(&info, source, &meter).await,
                    Err(error) => Err(error.into()),
                };
                Done::Sent {
                    id,
                    size,
                    took: began.elapsed(),
                    answer,
                }
            });
        }
        None
    }

    /// Whether a large or a small path is next. While the build runs one large path is always on
    /// its way, so that it has the most time; when time runs short the small ones go first.
    fn pick(&self) -> Option<bool> {
        let (small, large) = self.plan.ready_sizes();
        let room = large && self.sending_large < self.options.large_uploads;
        let early = self.draining.is_none() && self.sending_large == 0 && self.pace.limit() > 1;
        match (small, room) {
            (false, false) => None,
            (true, false) => Some(false),
            (false, true) => Some(true),
            (true, true) => Some(early),
        }
    }

    fn tell(&mut self, last: bool) {
        let now = Instant::now();
        self.untold = !last && self.told.is_some_and(|told| now - told < TICK);
        if !self.untold {
            self.told = Some(now);
            let (done, total) = self.plan.progress();
            let total = total + self.early.len() as u64;
            self.sink.send(Progress::Moved {
                done,
                total,
                bytes: self.meter.all(),
            });
        }
    }

    /// When to tell what came too soon after the last word. A publication that stands still is up
    /// to date too.
    fn due_to_tell(&self) -> Option<Instant> {
        self.told.filter(|_| self.untold).map(|told| told + TICK)
    }

    fn finish(mut self, reason: Option<&str>) -> Outcome {
        for info in std::mem::take(&mut self.early) {
            self.plan.offer(info);
        }
        self.tell(true);
        let stopped = match self.health {
            Health::Stopped(text) => Some(text),
            _ => None,
        };
        // The one message says why; a hundred paths need not repeat it.
        let left = stopped
            .as_ref()
            .map(|_| "publishing was given up")
            .or(reason);
        let mut paths = self
            .plan
            .finish(left.unwrap_or("publishing has ended"), left.is_none());
        for path in paths.iter_mut().filter(|path| path.end.lost().is_some()) {
            vanished(path, &self.options);
        }
        Outcome {
            paths,
            stopped,
            bytes: self.meter.all(),
            retries: self.retries,
            elapsed: self.began.elapsed(),
        }
    }
}

/// A collected path takes what refers to it along: those are not lost either.
fn vanished(path: &mut Settled, options: &Options) {
    let file = options.store.join(path.info.path.base_name());
    let gone = file
        .symlink_metadata()
        .is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound);
    if gone {
        path.end = Final::Skipped(Skip::Vanished);
    }
}
