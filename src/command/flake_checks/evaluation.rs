//! Which outputs of a flake have to be evaluated, and which are remembered from an earlier run.

use std::path::PathBuf;
use std::sync::Arc;

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::command::flake_checks::engine::Evaluation;
use crate::command::flake_checks::inputs::{EvaluatorKind, Plan, Remember};
use crate::command::flake_checks::output::OutputProgress;
use crate::job::Session;
use flywheel_core::exit::Failure;
use flywheel_core::policy::impurity_in_settings;
use flywheel_core::progress::Sink;
use flywheel_core::secret::Secret;
use flywheel_core::trust::Verdict;
use flywheel_nix::build::presence::valid;
use flywheel_nix::flake::Source;
use flywheel_nix::flake::evaluate::{
    self, Derivation, Listing, NameList, Names, OutputName, Pool, SelfViews, allows_memory,
    evaluation_settings, views,
};
use flywheel_nix::flake::evaluation_memory::{EvaluationMemory, MemoryKey, Remembered, Seal};
use flywheel_nix::flake::expression::{Expressions, SelfView};
use flywheel_nix::flake::nix_eval_jobs::NixEvalJobs;
use flywheel_nix::kept_paths::KeptPaths;
use flywheel_nix::store::Store;
use flywheel_nix::store_path::StorePath;
use flywheel_nix::tool::{Nix, on_path};
use flywheel_sys::runner::context;
use flywheel_sys::runner::env::Env;

/// How many tasks for the pool, and events from it, may be queued.
const QUEUE: usize = 1024;
/// How often the flake's source is copied to the store again, when a collection was quicker than we.
const SOURCE_TRIES: usize = 3;

/// A flake, and the way it is evaluated.
pub(super) struct FlakeEvaluation {
    pub(crate) source: Source,
    expressions: Expressions,
    /// The systems whose outputs are listed; `None` for all.
    systems: Option<Vec<String>>,
    /// The evaluation memory, if it may be used.
    memory: Option<EvaluationMemory>,
    /// What the memory holds of this flake.
    remembered: Option<Remembered>,
    /// The flake's view of itself; `None` where the memory has everything, or where nothing may be remembered.
    views: Option<SelfViews>,
    /// The program `nix-eval-jobs`, if that is the evaluator.
    jobs: Option<PathBuf>,
}

impl FlakeEvaluation {
    /// Reads what is remembered of a flake. `systems`: those whose outputs are listed, `None` for all.
    pub(crate) async fn open(
        plan: &Plan,
        nix: &Nix,
        source: Source,
        systems: Option<Vec<String>>,
        session: &Session<'_>,
    ) -> Self {
        let sink = &session.sink;
        let nonce = Secret::random();
        let expressions = Expressions::new(&source, &plan.attribute, nonce.expose());
        let jobs = jobs(plan, session.env, sink);
        // The memory relies on our own expressions, which `nix-eval-jobs` does not evaluate.
        let memory = if jobs.is_none() {
            open_memory(plan, nix, &source, systems.as_deref(), session)
        } else {
            None
        };
        let remembered = memory.as_ref().and_then(|memory| match memory.read() {
            Ok(remembered) => remembered,
            Err(error) => {
                sink.note(format!(
                    "flywheel: what is remembered of the evaluation is not believed: {error}"
                ));
                None
            }
        });
        let enough =
            plan.remember == Remember::On && remembered.as_ref().is_some_and(Remembered::is_whole);
        let views = match &memory {
            Some(_) if !enough => views(nix, &source, &expressions).await,
            _ => None,
        };
        if memory.is_some() && views.is_none() && !enough {
            sink.note("flywheel: the evaluation is not remembered: the source has just changed, or Nix does not describe it");
        }
        let memory = memory.filter(|_| views.is_some() || enough);
        let remembered = remembered.filter(|_| memory.is_some());
        Self {
            source,
            expressions,
            systems,
            memory,
            remembered,
            views,
            jobs,
        }
    }

    /// Keeps the flake's source in the store from being collected as garbage. If it is gone already, Nix copies it again.
    pub(crate) async fn keep_source(
        &self,
        plan: &Plan,
        nix: &Nix,
        store: &Store,
        kept: &KeptPaths,
    ) {
        let Ok(source) = StorePath::containing(&self.source.path) else {
            return;
        };
        let source = [source];
        for _ in 0..SOURCE_TRIES {
            kept.keep(&source).await;
            // A store that cannot be queried counts as having it; without its source the evaluation fails with Nix's words.
            if valid(store, &source)
                .await
                .is_ok_and(|found| found.is_empty())
            {
                let arguments = lock_arguments(&plan.arguments);
                let _ = Source::find(nix, &plan.flake, &arguments).await;
            } else {
                return;
            }
        }
    }

    /// The flake's view of itself, in the first evaluation of an output and in the second, which an output that depends
    /// on the commit needs.
    fn seen(&self, plan: &Plan) -> (SelfView, SelfView) {
        match &self.views {
            // `verify` compares the memory with what Nix itself evaluates, and not with a view that we have composed.
            Some(_) if plan.remember == Remember::Verify && self.remembered.is_some() => {
                (SelfView::Installable, SelfView::Installable)
            }
            Some(views) => (views.abort_on_use.clone(), views.real.clone()),
            None => (SelfView::Installable, SelfView::Installable),
        }
    }

    /// Lists the outputs. If the list depends on the commit, or is not whole, nothing of the flake is remembered.
    pub(crate) async fn names(&mut self, plan: &Plan, nix: &Nix) -> Result<Names, Failure> {
        if let (Some(remembered), Remember::On) = (&self.remembered, plan.remember) {
            return Ok(remembered.names.clone());
        }
        let (first, real) = self.seen(plan);
        for view in [first, real] {
            let listing = Listing {
                nix,
                source: &self.source,
                expressions: &self.expressions,
                view: &view,
                function: plan.function.as_deref(),
                systems: self.systems.as_deref(),
                arguments: &plan.arguments,
            };
            if let NameList::Found(found) = listing.names().await? {
                if found.is_partial {
                    self.memory = None;
                }
                return Ok(found);
            }
            self.memory = None;
        }
        Err(evaluate::Error::List("it depends on itself".to_owned()).into())
    }

    /// The remembered derivations, by index into `names`.
    pub(crate) fn known(&self, plan: &Plan, names: &[OutputName]) -> Vec<(usize, Derivation)> {
        let (Some(remembered), Remember::On) = (&self.remembered, plan.remember) else {
            return Vec::new();
        };
        let known = names.iter().enumerate();
        known
            .filter_map(|(id, name)| Some((id, remembered.facts.get(&name.label)?.clone())))
            .collect()
    }

    /// Starts the workers that evaluate.
    pub(crate) fn start(&self, plan: &Plan, nix: &Nix, cancel: CancellationToken) -> Evaluation {
        let (first, real) = self.seen(plan);
        let (first, real) = (Arc::new(first), Arc::new(real));
        let (tasks, queue) = mpsc::channel(QUEUE);
        let (events, receiver) = mpsc::channel(QUEUE);
        let pool = match &self.jobs {
            Some(program) => {
                let (workers, share) = Pool::fitting_workers(plan.workers);
                let jobs = NixEvalJobs {
                    program: program.clone(),
                    nix: nix.clone(),
                    source: self.source.clone(),
                    attribute: plan.attribute.clone(),
                    systems: self.systems.clone(),
                    arguments: plan.arguments.clone(),
                    workers,
                    share,
                };
                tokio::spawn(jobs.run(queue, events, cancel.clone()))
            }
            None => {
                let pool = Pool {
                    nix: nix.clone(),
                    source: self.source.clone(),
                    expressions: self.expressions.clone(),
                    arguments: plan.arguments.clone(),
                    workers: plan.workers,
                    per_worker: plan.per_worker,
                    read_only: !plan.build,
                    fallback_view: self.views.as_ref().map(|_| Arc::clone(&real)),
                };
                tokio::spawn(pool.run(queue, events, cancel.clone()))
            }
        };
        Evaluation {
            tasks,
            events: receiver,
            cancel,
            first,
            real,
            pool,
        }
    }

    /// Writes to the memory what does not depend on the commit. Gives the labels for which it held something else.
    pub(crate) fn remember(
        &self,
        outs: &[OutputProgress],
        names: Names,
        sink: &Sink,
    ) -> Vec<String> {
        let Some(memory) = &self.memory else {
            return Vec::new();
        };
        let old = self.remembered.clone().unwrap_or_default();
        let mut facts = old.facts.clone();
        let mut wrong = Vec::new();
        for out in outs {
            let label = &out.name.label;
            match (&out.facts, old.facts.get(label)) {
                (Some(found), None) if out.is_remembered => {
                    facts.insert(label.clone(), found.clone());
                }
                (Some(found), Some(old)) if found != old => {
                    wrong.push(label.clone());
                    facts.remove(label);
                }
                _ => (),
            }
        }
        let new = Remembered { names, facts };
        if new != old
            && let Err(error) = memory.write(&new)
        {
            sink.note(format!(
                "flywheel: the evaluation is not remembered: {error}"
            ));
        }
        wrong
    }
}

/// Finds `nix-eval-jobs`, if it was asked for.
fn jobs(plan: &Plan, env: &Env, sink: &Sink) -> Option<PathBuf> {
    if plan.evaluator != EvaluatorKind::NixEvalJobs {
        return None;
    }
    let found = on_path(env, "nix-eval-jobs");
    sink.note(match &found {
        Some(program) => format!(
            "flywheel: {} evaluates, and nothing is remembered",
            program.display()
        ),
        None => "flywheel: `nix-eval-jobs` is not on `PATH`, so Nix itself evaluates".to_owned(),
    });
    found
}

/// The arguments that may change the inputs, for a call that only fetches the source.
pub(super) fn lock_arguments(arguments: &[String]) -> Vec<String> {
    if allows_memory(arguments) {
        Vec::new()
    } else {
        arguments.to_vec()
    }
}

/// The evaluation memory. Where it must not be used, the log gets the reason.
fn open_memory(
    plan: &Plan,
    nix: &Nix,
    source: &Source,
    systems: Option<&[String]>,
    session: &Session<'_>,
) -> Option<EvaluationMemory> {
    if plan.remember == Remember::Off {
        return None;
    }
    let seal = seal(session);
    let why = if !allows_memory(&plan.arguments) {
        Some("`nix-args` may change what the inputs are".to_owned())
    } else if let Some(impurity) = impurity_in_settings(nix.config()) {
        Some(format!("the settings have `{}`", impurity.0))
    } else if seal.is_none() {
        Some("a job that may publish believes only what is sealed with its `ATTIC_TOKEN`, and it has none".to_owned())
    } else {
        source.memory_obstacle().map(str::to_owned)
    };
    if let Some(why) = why {
        session
            .sink
            .note(format!("flywheel: the evaluation is not remembered: {why}"));
        return None;
    }
    let settings = evaluation_settings(nix.config());
    let key = MemoryKey {
        nix: &nix.version.line,
        attribute: &plan.attribute,
        function: plan.function.as_deref(),
        systems,
        arguments: &plan.arguments,
        settings: &settings,
    };
    Some(EvaluationMemory::new(
        plan.memory_folder.as_deref()?,
        source,
        &key,
        seal?,
    ))
}

/// What makes the evaluation memory believed in this job; `None` if nothing does. Others rely on a job that may publish,
/// and another job, of a pull request for example, can have written the folder as the same user. What both cannot have is
/// the token to publish with; who has that can make a check look passed without any memory, by publishing its result.
fn seal(session: &Session<'_>) -> Option<Seal> {
    let is_relied_on =
        context::in_ci(session.env) && matches!(session.decision.verdict(), Verdict::MayPublish(_));
    if is_relied_on {
        session.secrets.attic.clone().map(Seal::Secret)
    } else {
        Some(Seal::Owner)
    }
}
