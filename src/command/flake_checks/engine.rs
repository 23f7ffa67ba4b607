//! The outputs on their way from names to verdicts. One loop owns their state; evaluation, questions to the store
//! and builds are tasks that report to it.
//!
//! Until it has its verdict an output is in exactly one place: with the evaluation, among those that arrived, with
//! a question to the store, among those to build, or in a lane.

mod builds;

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::command::flake_checks::inputs::Plan;
use crate::command::flake_checks::output::{OutputProgress, Tail, Tree, of_evaluation};
use crate::command::flake_checks::reporter::Reporter;
use flywheel_github::checks::{Cause, Conclusion, State};
use flywheel_nix::build::BuildResult;
use flywheel_nix::build::log::{BuildEvent, BuildFailure};
use flywheel_nix::build::presence::{Presence, valid};
use flywheel_nix::flake::evaluate::{Derivation, EvalEvent, EvalTask};
use flywheel_nix::flake::expression::SelfView;
use flywheel_nix::store::Store;
use flywheel_nix::store_path::StorePath;
use flywheel_nix::tool::Nix;
use flywheel_sys::process::signals::{Signals, Stop};

/// How often it is looked which outputs have become valid.
const POLL_INTERVAL: Duration = Duration::from_millis(300);
/// Events that may wait.
const QUEUE: usize = 4096;
/// Looking at what failed at the end of a run that was cancelled.
const FINAL_POLL_TIMEOUT: Duration = Duration::from_millis(500);

/// How the evaluation is asked for.
pub(super) struct Evaluation {
    /// Takes what is to be evaluated; closed when nothing more will come.
    pub tasks: mpsc::Sender<Vec<EvalTask>>,
    /// What is heard of it.
    pub events: mpsc::Receiver<EvalEvent>,
    /// Ends it.
    pub cancel: CancellationToken,
    /// How the flake sees itself at first.
    pub first: Arc<SelfView>,
    /// With the values that the commit gives, where that is another way.
    pub real: Arc<SelfView>,
    /// The workers.
    pub pool: tokio::task::JoinHandle<()>,
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RunEnd {
    /// Every output has a verdict of its own.
    Complete,
    /// The first failure ended it.
    FailedFast,
    /// The runner asked it to stop, then.
    Stopped(Stop, Instant),
}

enum EngineEvent {
    Looked(Vec<usize>, Result<Presence, String>),
    Building(usize, BuildEvent),
    Built(usize, Result<BuildResult, String>),
}

struct Lane {
    ids: Vec<usize>,
    jobs: Option<usize>,
    since: Instant,
    /// Failures that this lane's build has told of.
    failed: Vec<BuildFailure>,
}

pub(super) struct Engine<'a> {
    pub plan: &'a Plan,
    pub nix: Nix,
    pub store: Arc<Store>,
    pub tree: Tree,
    pub reporter: &'a mut Reporter,
    pub outs: Vec<OutputProgress>,
    /// The systems that are built here, if that is known.
    pub native: Option<BTreeSet<String>>,
    by_drv: HashMap<StorePath, Vec<usize>>,
    evaluating: usize,
    arrived: Vec<usize>,
    looking: bool,
    to_build: Vec<usize>,
    lanes: [Option<Lane>; 2],
    logs: HashMap<StorePath, Tail>,
    log_order: VecDeque<StorePath>,
    failures: HashMap<StorePath, BuildFailure>,
    steps: mpsc::Sender<EngineEvent>,
    jobs: JoinSet<()>,
    cancel: CancellationToken,
    /// A build failed, and no other is to go on.
    is_given_up: bool,
    /// Since when the evaluation has ended.
    pub evaluated: Option<Instant>,
}

impl<'a> Engine<'a> {
    pub fn new(
        plan: &'a Plan,
        nix: Nix,
        store: Arc<Store>,
        tree: Tree,
        reporter: &'a mut Reporter,
        outs: Vec<OutputProgress>,
        native: Option<BTreeSet<String>>,
    ) -> (Self, EngineEvents) {
        let (steps, receiver) = mpsc::channel(QUEUE);
        let engine = Self {
            plan,
            nix,
            store,
            tree,
            reporter,
            outs,
            native,
            by_drv: HashMap::new(),
            evaluating: 0,
            arrived: Vec::new(),
            looking: false,
            to_build: Vec::new(),
            lanes: [None, None],
            logs: HashMap::new(),
            log_order: VecDeque::new(),
            failures: HashMap::new(),
            steps,
            jobs: JoinSet::new(),
            cancel: CancellationToken::new(),
            is_given_up: false,
            evaluated: None,
        };
        (engine, EngineEvents(receiver))
    }

    /// Brings every output to its verdict; `known` are those whose derivations are remembered.
    pub async fn run(
        &mut self,
        known: Vec<(usize, Derivation)>,
        mut evaluation: Evaluation,
        mut steps: EngineEvents,
        signals: &mut Signals,
    ) -> RunEnd {
        let remembered: BTreeSet<usize> = known.iter().map(|(id, _)| *id).collect();
        for (id, facts) in known {
            self.outs[id].is_remembered = true;
            self.known(id, facts);
        }
        let ids: Vec<usize> = (0..self.outs.len())
            .filter(|id| !remembered.contains(id))
            .collect();
        let first = Arc::clone(&evaluation.first);
        self.evaluate(&evaluation, ids, &first).await;
        let mut look = tokio::time::interval(POLL_INTERVAL);
        look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let end = loop {
            if self.evaluating == 0 {
                self.evaluated.get_or_insert_with(Instant::now);
            }
            if self.is_given_up || self.plan.fail_fast && self.has_failed() {
                break RunEnd::FailedFast;
            }
            self.query_arrived();
            self.start_lanes();
            if self.outs.iter().all(|out| out.verdict.is_some()) {
                break RunEnd::Complete;
            }
            tokio::select! {
                biased;
                stop = signals.next() => break RunEnd::Stopped(stop, Instant::now()),
                event = evaluation.events.recv(), if self.evaluating > 0 => match event {
                    Some(event) => self.on_evaluation(event, &evaluation).await,
                    None => self.evaluation_is_gone(),
                },
                Some(step) = steps.0.recv() => self.on_event(step, &evaluation).await,
                _ = look.tick() => self.end_valid_in_lanes().await,
            }
        };
        evaluation.cancel.cancel();
        self.cancel.cancel();
        if end != RunEnd::Complete {
            // What was finished in the last moment is finished.
            let _ = tokio::time::timeout(FINAL_POLL_TIMEOUT, self.end_valid_in_lanes()).await;
            for id in 0..self.outs.len() {
                self.end(id, Cause::Cancelled, Vec::new());
            }
        }
        // Nobody listens any more, so that nobody waits to be heard.
        let Evaluation {
            tasks,
            events,
            pool,
            ..
        } = evaluation;
        drop((tasks, events, steps));
        // It kills what it started, and a pool that panicked has said so.
        let _ = pool.await;
        // Builds are asked to end, and killed when they do not.
        while self.jobs.join_next().await.is_some() {}
        end
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

    /// The pool has ended before its time; nothing may wait for it.
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
                    .state(&self.outs[id].output, &State::Evaluating);
            }
            EvalEvent::Known {
                id,
                facts,
                independent,
            } => {
                self.evaluating -= 1;
                self.outs[id].is_written = self.plan.build;
                self.outs[id].is_remembered = independent;
                self.known(id, facts);
            }
            EvalEvent::Dependent(id) => {
                self.evaluating -= 1;
                let real = Arc::clone(&evaluation.real);
                self.evaluate(evaluation, vec![id], &real).await;
            }
            EvalEvent::Failed(id, failure) => {
                self.evaluating -= 1;
                let cause = of_evaluation(&failure, &self.tree);
                self.end(id, cause, Vec::new());
            }
        }
    }

    fn known(&mut self, id: usize, facts: Derivation) {
        let drv: Option<StorePath> = facts.drv.parse().ok();
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

    /// Asks where the outputs are that have arrived, unless that is being asked already.
    fn query_arrived(&mut self) {
        if self.looking || self.arrived.is_empty() {
            return;
        }
        self.looking = true;
        let ids = std::mem::take(&mut self.arrived);
        let outs = ids.iter().map(|id| &self.outs[*id]);
        let paths = outs.flat_map(|out| {
            let drv = out.drv.clone().filter(|_| !out.is_written);
            out.paths().unwrap_or_default().into_iter().chain(drv)
        });
        let paths: Vec<StorePath> = paths.collect::<BTreeSet<_>>().into_iter().collect();
        let (nix, store, steps) = (
            self.nix.clone(),
            Arc::clone(&self.store),
            self.steps.clone(),
        );
        self.jobs.spawn(async move {
            let present = Presence::find(&nix, &store, &paths)
                .await
                .map_err(|error| error.to_string());
            // The engine is gone only when nobody wants to know any more.
            let _ = steps.send(EngineEvent::Looked(ids, present)).await;
        });
    }

    async fn on_event(&mut self, step: EngineEvent, evaluation: &Evaluation) {
        match step {
            EngineEvent::Looked(ids, present) => {
                self.looking = false;
                // A store that gives no answer is Nix's to complain about, when it builds.
                let present = present.unwrap_or_default();
                let mut again = Vec::new();
                for id in ids {
                    let out = &self.outs[id];
                    let paths = out.paths().filter(|paths| !paths.is_empty());
                    if paths.is_some_and(|paths| paths.iter().all(|path| present.has(path))) {
                        self.end(id, Cause::AlreadyCached, Vec::new());
                    } else if out.is_written || out.drv.as_ref().is_some_and(|drv| present.has(drv))
                    {
                        self.to_build.push(id);
                    } else {
                        again.push(id);
                    }
                }
                for id in &again {
                    self.forget(*id);
                }
                // It is remembered, but its derivation is not there any more.
                let first = Arc::clone(&evaluation.first);
                self.evaluate(evaluation, again, &first).await;
            }
            EngineEvent::Building(lane, event) => self.on_build_event(lane, event),
            EngineEvent::Built(lane, ended) => self.on_built(lane, ended).await,
        }
    }

    fn forget(&mut self, id: usize) {
        let out = &mut self.outs[id];
        out.facts = None;
        if let Some(drv) = out.drv.take()
            && let Some(ids) = self.by_drv.get_mut(&drv)
        {
            ids.retain(|other| *other != id);
        }
    }

    /// Outputs in the lanes whose paths have become valid are built.
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
        // A store that gives no answer now is asked again.
        let Ok(there) = valid(&self.store, &paths).await else {
            return;
        };
        for (id, paths) in open {
            if paths.iter().all(|path| there.contains(path)) {
                self.end(id, Cause::Built, Vec::new());
            }
        }
    }

    /// Ends an output that has not ended yet.
    fn end(&mut self, id: usize, cause: Cause, log_tail: Vec<String>) {
        let out = &mut self.outs[id];
        if out.verdict.is_some() {
            return;
        }
        let verdict = out.end(cause, log_tail).clone();
        if verdict.conclusion() != Conclusion::Failure
            && let Some(drv) = &out.drv
        {
            self.logs.remove(drv);
        }
        self.reporter
            .state(&self.outs[id].output, &State::Finished(Box::new(verdict)));
    }
}

/// What the engine's tasks report.
pub(super) struct EngineEvents(mpsc::Receiver<EngineEvent>);
