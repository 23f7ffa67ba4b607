//! Which outputs of a flake have to be evaluated, and which are remembered from an earlier run.

use std::path::PathBuf;
use std::sync::Arc;

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::command::flake_checks::engine::Evaluation;
use crate::command::flake_checks::inputs::{EvaluatorKind, Plan, Remember};
use crate::command::flake_checks::output::OutputProgress;
use flywheel_core::exit::Failure;
use flywheel_core::policy::impurity_in_settings;
use flywheel_core::progress::Sink;
use flywheel_core::secret::Secret;
use flywheel_nix::build::presence::valid;
use flywheel_nix::flake::Source;
use flywheel_nix::flake::evaluate::{
    self, Derivation, NameList, OutputName, Pool, SelfViews, allows_memory, evaluation_settings,
    names, views,
};
use flywheel_nix::flake::evaluation_memory::{EvaluationMemory, MemoryKey, Remembered};
use flywheel_nix::flake::expression::{Expressions, SelfView};
use flywheel_nix::flake::nix_eval_jobs::NixEvalJobs;
use flywheel_nix::kept_paths::KeptPaths;
use flywheel_nix::store::Store;
use flywheel_nix::store_path::StorePath;
use flywheel_nix::tool::{Nix, on_path};
use flywheel_sys::runner::env::Env;

/// How many tasks for the pool, and events from it, may be queued.
const QUEUE: usize = 1024;
/// How often the flake's source is copied to the store again, when a collection was quicker than we.
const SOURCE_TRIES: usize = 3;

/// A flake, and the way it is evaluated.
pub(super) struct FlakeEvaluation {
    pub(crate) source: Source,
    expressions: Expressions,
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
    /// Fetches the flake's source, and reads what is remembered of it.
    pub(crate) async fn open(
        plan: &Plan,
        nix: &Nix,
        env: &Env,
        sink: &Sink,
    ) -> Result<Self, Failure> {
        let source = Source::find(nix, &plan.flake, &lock_arguments(&plan.arguments)).await?;
        let nonce = Secret::random();
        let expressions = Expressions::new(&source, &plan.attribute, nonce.expose());
        let jobs = jobs(plan, env, sink);
        // The memory relies on our own expressions, which `nix-eval-jobs` does not evaluate.
        let memory = if jobs.is_none() {
            open_memory(plan, nix, &source, sink)
        } else {
            None
        };
        let remembered = memory.as_ref().and_then(EvaluationMemory::read);
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
        Ok(Self {
            source,
            expressions,
            memory,
            remembered,
            views,
            jobs,
        })
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

    /// Lists the outputs of every system. If the list depends on the commit, nothing of the flake is remembered.
    pub(crate) async fn names(
        &mut self,
        plan: &Plan,
        nix: &Nix,
    ) -> Result<Vec<OutputName>, Failure> {
        if let (Some(remembered), Remember::On) = (&self.remembered, plan.remember) {
            return Ok(remembered.names.clone());
        }
        let (first, real) = self.seen(plan);
        for seen in [first, real] {
            let found = names(
                nix,
                &self.source,
                &self.expressions,
                &seen,
                plan.function.as_deref(),
                &plan.arguments,
            )
            .await?;
            if let NameList::Found(found) = found {
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
        names: Vec<OutputName>,
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
fn lock_arguments(arguments: &[String]) -> Vec<String> {
    if allows_memory(arguments) {
        Vec::new()
    } else {
        arguments.to_vec()
    }
}

/// The evaluation memory. Where it must not be used, the log gets the reason.
fn open_memory(plan: &Plan, nix: &Nix, source: &Source, sink: &Sink) -> Option<EvaluationMemory> {
    if plan.remember == Remember::Off {
        return None;
    }
    let why = if !allows_memory(&plan.arguments) {
        Some("`nix-args` may change what the inputs are".to_owned())
    } else if let Some(impurity) = impurity_in_settings(nix.config()) {
        Some(format!("the settings have `{}`", impurity.0))
    } else {
        source.memory_obstacle().map(str::to_owned)
    };
    if let Some(why) = why {
        sink.note(format!("flywheel: the evaluation is not remembered: {why}"));
        return None;
    }
    let settings = evaluation_settings(nix.config());
    let key = MemoryKey {
        nix: &nix.version.line,
        attribute: &plan.attribute,
        function: plan.function.as_deref(),
        arguments: &plan.arguments,
        settings: &settings,
    };
    Some(EvaluationMemory::new(
        plan.memory_folder.as_deref()?,
        source,
        &key,
    ))
}
