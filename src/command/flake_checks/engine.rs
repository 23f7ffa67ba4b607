//! Brings the outputs from names to verdicts. One loop owns their state; evaluation, queries of the store and builds
//! are tasks that report to the loop.
//!
//! Until it has its verdict, an output is in exactly one place: with the evaluation, in `arrived`, in a query of the
//! store, in `to_build`, or in a lane.

mod builds;
mod resolved;

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use self::resolved::ResolvedDerivations;
use crate::command::flake_checks::inputs::Plan;
use crate::command::flake_checks::output::{OutputProgress, Tail, Tree, evaluation_cause};
use crate::command::flake_checks::reporter::Reporter;
use flywheel_github::checks::{Cause, Conclusion, OutputState};
use flywheel_nix::build::BuildResult;
use flywheel_nix::build::cache_trust::CacheTrust;
use flywheel_nix::build::log::{BuildEvent, BuildFailure};
use flywheel_nix::build::presence::{Location, Presence, valid};
use flywheel_nix::flake::evaluate::{Derivation, EvalEvent, EvalTask};
use flywheel_nix::flake::expression::SelfView;
use flywheel_nix::kept_paths::KeptPaths;
use flywheel_nix::store::Store;
use flywheel_nix::store_path::StorePath;
use flywheel_nix::tool::Nix;
use flywheel_sys::process::signals::{Signals, Stop};

/// How often the store is queried for outputs that have become valid.
const POLL_INTERVAL: Duration = Duration::from_millis(300);
/// How many events may be queued.
const QUEUE: usize = 4096;
/// What the last query may take in a run that is being ended.
const FINAL_POLL_TIMEOUT: Duration = Duration::from_millis(500);
/// How often an output whose derivation is gone from the store is evaluated again. After that it is built all the
/// same, so that Nix says what is wrong.
const EVALUATIONS: u32 = 3;

/// The channels to the evaluation, and its two views of the flake.
pub(super) struct Evaluation {
    /// Takes what is to be evaluated.
    pub(crate) tasks: mpsc::Sender<Vec<EvalTask>>,
    /// Gives what was evaluated.
    pub(crate) events: mpsc::Receiver<EvalEvent>,
    /// Ends the evaluation.
    pub(crate) cancel: CancellationToken,
    /// The flake's view of itself in the first evaluation of an output.
    pub(crate) first: Arc<SelfView>,
    /// The view with the commit's values, for outputs that depend on the commit.
    pub(crate) real: Arc<SelfView>,
    pub(crate) pool: tokio::task::JoinHandle<()>,
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RunEnd {
    /// Every output has a verdict of its own.
    Complete,
    /// The first failure ended it.
    FailedFast,
    /// This signal ended it, at this time.
    Stopped(Stop, Instant),
}

enum EngineEvent {
    Queried(Vec<usize>, Result<Presence, String>),
    Building(usize, BuildEvent),
    Built(usize, Result<BuildResult, String>),
}

struct Lane {
    ids: Vec<usize>,
    jobs: Option<usize>,
    since: Instant,
    /// Failures that this lane's build has reported.
    failed: Vec<BuildFailure>,
}

/// What the settings in force say about builds and caches.
#[derive(Debug, Default)]
pub(super) struct SettingsFacts {
    /// The systems that this machine and its builders build for, if that is known.
    pub(crate) native: Option<BTreeSet<String>>,
    /// Which caches there are, and what makes them believed.
    pub(crate) caches: CacheTrust,
}

pub(super) struct Engine<'a> {
    pub(crate) plan: &'a Plan,
    pub(crate) nix: Nix,
    pub(crate) store: Arc<Store>,
    /// What no garbage collection may take before it was built and published.
    kept: Arc<KeptPaths>,
    pub(crate) tree: Tree,
    pub(crate) reporter: &'a mut Reporter,
    pub(crate) outs: Vec<OutputProgress>,
    settings: SettingsFacts,
    by_drv: HashMap<StorePath, Vec<usize>>,
    resolved: ResolvedDerivations,
    /// Whether the paths of an output are known only once it is built.
    is_content_addressed: bool,
    evaluating: usize,
    arrived: Vec<usize>,
    is_querying: bool,
    to_build: Vec<usize>,
    lanes: [Option<Lane>; 2],
    logs: HashMap<StorePath, Tail>,
    log_order: VecDeque<StorePath>,
    failures: HashMap<StorePath, BuildFailure>,
    events: mpsc::Sender<EngineEvent>,
    jobs: JoinSet<()>,
    cancel: CancellationToken,
    /// A build failed, and without `keep-going` no other may start.
    is_given_up: bool,
    /// When the evaluation ended.
    pub(crate) evaluated: Option<Instant>,
}

impl<'a> Engine<'a> {
    pub(crate) fn new(
        plan: &'a Plan,
        nix: Nix,
        (store, kept): (Arc<Store>, Arc<KeptPaths>),
        tree: Tree,
        reporter: &'a mut Reporter,
        outs: Vec<OutputProgress>,
        settings: SettingsFacts,
    ) -> (Self, EngineEvents) {
        let (events, receiver) = mpsc::channel(QUEUE);
        let engine = Self {
            plan,
            nix,
            store,
            kept,
            tree,
            reporter,
            outs,
            settings,
            by_drv: HashMap::new(),
            resolved: ResolvedDerivations::default(),
            is_content_addressed: false,
            evaluating: 0,
            arrived: Vec::new(),
            is_querying: false,
            to_build: Vec::new(),
            lanes: [None, None],
            logs: HashMap::new(),
            log_order: VecDeque::new(),
            failures: HashMap::new(),
            events,
            jobs: JoinSet::new(),
            cancel: CancellationToken::new(),
            is_given_up: false,
            evaluated: None,
        };
        (engine, EngineEvents(receiver))
    }

    /// Brings every output to its verdict; `known` are the remembered ones.
    pub(crate) async fn run(
        &mut self,
        known: Vec<(usize, Derivation)>,
        mut evaluation: Evaluation,
        mut events: EngineEvents,
        signals: &mut Signals,
    ) -> RunEnd {
        let remembered: BTreeSet<usize> = known.iter().map(|(id, _)| *id).collect();
        for (id, facts) in known {
            self.outs[id].is_remembered = true;
            self.on_known(id, facts);
        }
        let ids: Vec<usize> = (0..self.outs.len())
            .filter(|id| !remembered.contains(id))
            .collect();
        let first = Arc::clone(&evaluation.first);
        self.evaluate(&evaluation, ids, &first).await;
        let end = self
            .handle_events(&mut evaluation, &mut events, signals)
            .await;
        evaluation.cancel.cancel();
        self.cancel.cancel();
        if end != RunEnd::Complete {
            // An output that became valid since the last query was built, and is not cancelled.
            let _ = tokio::time::timeout(FINAL_POLL_TIMEOUT, self.end_valid_in_lanes()).await;
            for id in 0..self.outs.len() {
                self.end(id, Cause::Cancelled, Vec::new());
            }
        }
        // With the receivers gone, no task can wait for room in a channel that is no longer read.
        let Evaluation {
            tasks,
            events: evaluated,
            pool,
            ..
        } = evaluation;
        drop((tasks, evaluated, events));
        // The pool kills its workers. If it panicked, the panic has been printed.
        let _ = pool.await;
        // Cancelled builds are asked to end, and killed if they do not.
        while self.jobs.join_next().await.is_some() {}
        end
    }

    /// Handles events until every output has its verdict, or the run ends before that.
    async fn handle_events(
        &mut self,
        evaluation: &mut Evaluation,
        events: &mut EngineEvents,
        signals: &mut Signals,
    ) -> RunEnd {
        let mut poll = tokio::time::interval(POLL_INTERVAL);
        // After a slow query, the next one waits a whole interval instead of following at once.
        poll.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            if self.evaluating == 0 {
                self.evaluated.get_or_insert_with(Instant::now);
            }
            if self.is_given_up || self.plan.fail_fast && self.has_failed() {
                return RunEnd::FailedFast;
            }
            self.query_arrived();
            self.start_lanes();
            if self.outs.iter().all(|out| out.verdict.is_some()) {
                return RunEnd::Complete;
            }
            tokio::select! {
                biased;
                // First in the biased order: a steady stream of events must not keep a cancelled job alive.
                stop = signals.next() => return RunEnd::Stopped(stop, Instant::now()),
                event = evaluation.events.recv(), if self.evaluating > 0 => match event {
                    Some(event) => self.on_evaluation(event, evaluation).await,
                    None => self.evaluation_is_gone(),
                },
                Some(event) = events.0.recv() => self.on_event(event, evaluation).await,
                _ = poll.tick() => self.end_valid_in_lanes().await,
            }
        }
    }

    fn has_failed(&self) -> bool {
        let failed = |out: &OutputProgress| {
            out.verdict
                .as_ref()
                .is_some_and(|verdict| verdict.conclusion() == Conclusion::Failure)
        };
        self.outs.iter().any(failed)
    }

    async fn evaluate(&mut self, evaluation: &Evaluation, ids: Vec<usize>, seen: &Arc<SelfView>) {
        if ids.is_empty() {
            return;
        }
        self.evaluating += ids.len();
        let tasks = ids.iter().map(|id| EvalTask {
            id: *id,
            path: self.outs[*id].name.attr.clone(),
            view: Arc::clone(seen),
            must_write: false,
        });
        let tasks = tasks.collect();
        if evaluation.tasks.send(tasks).await.is_err() {
            self.evaluation_is_gone();
        }
    }

    /// Fails what waits for the evaluation, when its pool has ended too early.
    fn evaluation_is_gone(&mut self) {
        self.evaluating = 0;
        for id in 0..self.outs.len() {
            if self.outs[id].facts.is_none() {
                let text = "error: the evaluation has ended without an answer".to_owned();
                self.end(
                    id,
                    Cause::Evaluation {
                        text,
                        location: None,
                    },
                    Vec::new(),
                );
            }
        }
    }

    async fn on_evaluation(&mut self, event: EvalEvent, evaluation: &Evaluation) {
        match event {
            EvalEvent::Begun(id) => {
                self.outs[id].begin();
                self.reporter
                    .state(&self.outs[id].output, &OutputState::Evaluating);
            }
            EvalEvent::Known {
                id,
                facts,
                independent,
            } => {
                self.evaluating -= 1;
                self.outs[id].is_remembered = independent;
                self.on_known(id, facts);
            }
            EvalEvent::Dependent(id) => {
                self.evaluating -= 1;
                // The first view hides the commit's values. An output that needs one is evaluated again, with the real
                // view.
                let real = Arc::clone(&evaluation.real);
                self.evaluate(evaluation, vec![id], &real).await;
            }
            EvalEvent::Failed(id, failure) => {
                self.evaluating -= 1;
                let cause = evaluation_cause(&failure, &self.tree);
                self.end(id, cause, Vec::new());
            }
        }
    }

    fn on_known(&mut self, id: usize, facts: Derivation) {
        let drv: Option<StorePath> = facts.drv.parse().ok();
        self.is_content_addressed |= facts.paths().is_none();
        let out = &mut self.outs[id];
        out.facts = Some(facts);
        out.drv.clone_from(&drv);
        match drv {
            None => {
                let text = "error: its derivation is no store path".to_owned();
                self.end(
                    id,
                    Cause::Evaluation {
                        text,
                        location: None,
                    },
                    Vec::new(),
                );
            }
            Some(_) if !self.plan.build => self.end(id, Cause::Evaluated, Vec::new()),
            Some(drv) => {
                self.by_drv.entry(drv).or_default().push(id);
                self.arrived.push(id);
            }
        }
    }

    /// Keeps the outputs that have arrived, and their derivations, from being collected as garbage, and queries the store
    /// for them, unless a query is under way.
    fn query_arrived(&mut self) {
        if self.is_querying || self.arrived.is_empty() {
            return;
        }
        self.is_querying = true;
        let ids = std::mem::take(&mut self.arrived);
        let outs = ids.iter().map(|id| &self.outs[*id]);
        let paths = outs.flat_map(|out| {
            // The derivation may have been collected since it was evaluated, in this run or in an earlier one.
            let drv = out.drv.clone();
            out.paths().unwrap_or_default().into_iter().chain(drv)
        });
        let paths: Vec<StorePath> = paths.collect::<BTreeSet<_>>().into_iter().collect();
        let (nix, store, events) = (
            self.nix.clone(),
            Arc::clone(&self.store),
            self.events.clone(),
        );
        let (caches, cancel) = (self.settings.caches.clone(), self.cancel.clone());
        let kept = Arc::clone(&self.kept);
        self.jobs.spawn(async move {
            let query = async {
                // Before the query: what it finds then stays.
                kept.keep(&paths).await;
                Presence::find(&nix, &store, &caches, &paths).await
            };
            let present = tokio::select! {
                biased;
                // A cache that hangs must not hold up a run that is being ended.
                () = cancel.cancelled() => return,
                present = query => present,
            };
            let present = present.map_err(|error| error.to_string());
            // The receiver is gone only once the run has ended.
            let _ = events.send(EngineEvent::Queried(ids, present)).await;
        });
    }

    async fn on_event(&mut self, event: EngineEvent, evaluation: &Evaluation) {
        match event {
            EngineEvent::Queried(ids, present) => {
                self.is_querying = false;
                // If the store cannot be queried, no output counts as present; building then shows Nix's own error.
                let is_unknown = present.is_err();
                let present = present.unwrap_or_default();
                let (mut again, mut doubted) = (Vec::new(), Vec::new());
                for id in ids {
                    let out = &self.outs[id];
                    let paths = out.paths().unwrap_or_default();
                    if present.is_doubted(&paths) {
                        doubted.push(out.output.label.clone());
                    }
                    if let Some(at) = present.of_all(&paths) {
                        let cause = match at {
                            Location::Store => Cause::AlreadyInStore,
                            Location::Cache => Cause::AlreadyCached,
                            Location::UnsignedCache => Cause::AlreadyCachedUnsigned,
                        };
                        self.end(id, cause, Vec::new());
                    } else if is_unknown
                        || out.evaluated_again >= EVALUATIONS
                        || out.drv.as_ref().is_some_and(|drv| present.has(drv))
                    {
                        self.to_build.push(id);
                    } else {
                        again.push(id);
                    }
                }
                self.reporter.doubted(&doubted);
                for id in &again {
                    self.forget(*id);
                }
                // If a derivation is gone from the store, the output is evaluated again.
                let first = Arc::clone(&evaluation.first);
                self.evaluate(evaluation, again, &first).await;
            }
            EngineEvent::Building(lane, event) => self.on_build_event(lane, event),
            EngineEvent::Built(lane, ended) => self.on_built(lane, ended).await,
        }
    }

    fn forget(&mut self, id: usize) {
        let out = &mut self.outs[id];
        out.evaluated_again += 1;
        out.facts = None;
        if let Some(drv) = out.drv.take()
            && let Some(ids) = self.by_drv.get_mut(&drv)
        {
            ids.retain(|other| *other != id);
        }
    }

    /// Ends the outputs in the lanes that have become valid.
    async fn end_valid_in_lanes(&mut self) {
        self.reporter.progress(&self.outs);
        let ids: Vec<usize> = self
            .lanes
            .iter()
            .flatten()
            .flat_map(|lane| lane.ids.clone())
            .collect();
        self.end_valid(&ids).await;
    }

    async fn end_valid(&mut self, ids: &[usize]) {
        let open: Vec<(usize, Vec<StorePath>)> = ids
            .iter()
            .filter(|id| self.outs[**id].verdict.is_none())
            .filter_map(|id| {
                Some((
                    *id,
                    self.outs[*id].paths().filter(|paths| !paths.is_empty())?,
                ))
            })
            .collect();
        let paths: Vec<StorePath> = open.iter().flat_map(|(_, paths)| paths.clone()).collect();
        // A query that fails is repeated at the next tick.
        let Ok(there) = valid(&self.store, &paths).await else {
            return;
        };
        for (id, paths) in open {
            if paths.iter().all(|path| there.contains(path)) {
                self.end(id, Cause::Built, Vec::new());
            }
        }
    }

    /// Gives an output its verdict, unless it has one.
    fn end(&mut self, id: usize, cause: Cause, log_tail: Vec<String>) {
        let out = &mut self.outs[id];
        if out.verdict.is_some() {
            return;
        }
        let verdict = out.end(cause, log_tail).clone();
        // Only failures show a log.
        if verdict.conclusion() != Conclusion::Failure
            && let Some(drv) = &out.drv
        {
            self.logs.remove(drv);
        }
        self.reporter.state(
            &self.outs[id].output,
            &OutputState::Finished(Box::new(verdict)),
        );
    }
}

/// The events that the engine's tasks send.
pub(super) struct EngineEvents(mpsc::Receiver<EngineEvent>);
