//! The pool of evaluation workers. A worker is one `nix eval` over many attributes that reports
//! when each begins and what it evaluates to. If a worker ends early, nothing is lost: the
//! attributes it has not reported go to the next one.
//!
//! A worker ends early for three reasons: an attribute that fails, memory, or an idle worker that
//! has stolen the end of its list.

use std::collections::{HashMap, VecDeque};
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::flake::Source;
use crate::flake::evaluate::{EvalEvent, EvalFailure, NO_EVAL_CACHE};
use crate::flake::expression::{AttributePath, Expressions, SelfView};
use crate::flake::worker::{
    EndReason, Worker, WorkerEvent, WorkerLine, follow, is_for_memory, keep_tail,
};
use crate::tool::Nix;
use flywheel_core::sizing::{self, MemoryRoom};
use flywheel_sys::host::memory::{self, Cgroup};

/// How often to check the workers' memory.
const MEMORY_POLL_INTERVAL: Duration = Duration::from_millis(50);
/// The memory of other processes changes slowly; read it every so many checks.
const OTHERS_EVERY: u32 = 10;
/// Maximum size of one argument; the kernel allows 128 KiB (`execve(2)`, `MAX_ARG_STRLEN`).
const ARGUMENT_LIMIT: usize = 96 * 1024;
/// Settings for Nix's garbage collector. Nix starts with a heap of up to 384 MB; touching that much
/// memory takes longer than collecting a smaller heap now and then, and a pod may not have it.
/// Marking with several threads does not help workers that have one core each. Variables that the
/// user has set stay as they are (`GC_INITIAL_HEAP_SIZE`, `GC_NPROCS`; Boehm and Weiser's
/// `README.environment`).
const COLLECTOR: [(&str, &str); 2] = [("GC_INITIAL_HEAP_SIZE", "16000000"), ("GC_NPROCS", "1")];
/// After this many attributes have turned out to depend on the commit, and no more to be
/// independent, stop testing the rest.
const DEPENDENT_LIMIT: usize = 8;

/// An attribute to evaluate.
#[derive(Clone, Debug)]
pub struct EvalTask {
    /// The caller's id for it.
    pub id: usize,
    /// Its path below the selected attribute.
    pub path: AttributePath,
    /// How the flake sees itself during this evaluation.
    pub view: Arc<SelfView>,
    /// Whether its derivations must be written to the store even if the pool is read-only.
    pub must_write: bool,
}

pub struct Pool {
    pub nix: Nix,
    pub source: Source,
    pub expressions: Expressions,
    /// Further arguments of Nix.
    pub arguments: Vec<String>,
    /// The requested number of workers, if any.
    pub workers: Option<usize>,
    /// The requested number of attributes per worker, if any.
    pub per_worker: Option<usize>,
    /// Whether derivations are only computed, and not written to the store.
    pub read_only: bool,
    /// The view that replaces `SelfView::AbortOnUse` when most attributes depend on the commit.
    pub fallback_view: Option<Arc<SelfView>>,
}

/// The state of a running pool.
struct PoolState<'a> {
    pool: &'a Pool,
    worker_slots: usize,
    waiting: VecDeque<EvalTask>,
    /// Tasks that ran out of memory beside others and run alone next.
    alone: VecDeque<EvalTask>,
    workers: HashMap<usize, Worker>,
    next: usize,
    to_pool: mpsc::Sender<(usize, WorkerEvent)>,
    following: JoinSet<()>,
    events: mpsc::Sender<EvalEvent>,
    cgroup: Option<Cgroup>,
    others: u64,
    memory_checks: u32,
    /// Memory in bytes above which a worker is replaced between two attributes.
    share: u64,
    /// The time to start a worker in seconds, as last measured.
    start: f64,
    dependent: usize,
    independent: usize,
}

impl Pool {
    /// Returns how many workers fit on this machine now and how much memory in bytes each may use.
    /// `requested` is the number the user asked for.
    pub fn fitting_workers(requested: Option<usize>) -> (usize, u64) {
        let limit = Cgroup::current().and_then(|cgroup| cgroup.read().limit);
        let others = memory::of_descendants();
        let room = MemoryRoom {
            limit,
            others,
            available: memory::available(),
            workers: 0,
        }
        .for_workers();
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let workers = sizing::workers(requested, cores, room);
        (workers, sizing::share(room, workers))
    }

    /// Evaluates tasks until the channel is closed and all are done, or `cancel` fires; unfinished
    /// tasks then get no event.
    pub async fn run(
        self,
        mut tasks: mpsc::Receiver<Vec<EvalTask>>,
        events: mpsc::Sender<EvalEvent>,
        cancel: CancellationToken,
    ) {
        let (to_pool, mut worker_events) = mpsc::channel(1024);
        let cgroup = Cgroup::current();
        let mut state = PoolState {
            pool: &self,
            worker_slots: 1,
            waiting: VecDeque::new(),
            alone: VecDeque::new(),
            workers: HashMap::new(),
            next: 0,
            to_pool,
            following: JoinSet::new(),
            events,
            cgroup,
            others: 0,
            memory_checks: 0,
            share: u64::MAX,
            start: 0.1,
            dependent: 0,
            independent: 0,
        };
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let room = state.room();
        state.worker_slots = sizing::workers(self.workers, cores, room);
        state.share = sizing::share(room, state.worker_slots);
        let mut memory_timer = tokio::time::interval(MEMORY_POLL_INTERVAL);
        memory_timer.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut open = true;
        loop {
            // Every event can free a worker or bring tasks, so fill before waiting for the next
            // one.
            state.fill().await;
            if !open && state.is_idle() {
                break;
            }
            tokio::select! {
                // Cancellation comes first, and memory before output: a busy worker must not delay
                // the check.
                biased;
                () = cancel.cancelled() => break,
                _ = memory_timer.tick(), if !state.workers.is_empty() => state.check_memory(),
                Some((id, event)) = worker_events.recv() => state.on_event(id, event).await,
                more = tasks.recv(), if open => match more {
                    Some(more) => state.waiting.extend(more),
                    None => open = false,
                },
            }
        }
        // Whatever still runs is stopped, since its results are no longer wanted.
        for worker in state.workers.values() {
            worker.stop.cancel();
        }
        // Without a receiver, the tasks that follow the workers stop instead of blocking on a full
        // channel.
        drop(worker_events);
        while state.following.join_next().await.is_some() {}
    }
}

impl PoolState<'_> {
    fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.alone.is_empty() && self.workers.is_empty()
    }

    /// Memory in bytes that all workers together may use now.
    fn room(&mut self) -> Option<u64> {
        let workers = self.workers.values().map(|worker| worker.held).sum();
        if self.memory_checks.is_multiple_of(OTHERS_EVERY) {
            let ours = memory::of_descendants().max(
                self.cgroup
                    .as_ref()
                    .and_then(Cgroup::of_processes)
                    .unwrap_or(0),
            );
            // The workers are descendants too, but are counted apart.
            self.others = ours.saturating_sub(workers);
        }
        self.memory_checks += 1;
        let limit = self.cgroup.as_ref().and_then(|cgroup| cgroup.read().limit);
        MemoryRoom {
            limit,
            others: self.others,
            available: memory::available(),
            workers,
        }
        .for_workers()
    }

    /// Starts workers while there are tasks and free slots.
    async fn fill(&mut self) {
        // A worker that runs alone gets all the memory, so none may start beside it.
        while self.workers.values().all(|worker| !worker.alone) {
            // Waiting tasks first, then those that must run alone, and stealing only when nothing
            // else is left.
            if self.workers.len() < self.worker_slots && !self.waiting.is_empty() {
                // Divide the waiting tasks among the free slots.
                let count = sizing::chunk(
                    self.pool.per_worker,
                    self.waiting.len(),
                    self.worker_slots - self.workers.len(),
                );
                let tasks = self.take(count);
                self.start(tasks, false).await;
            } else if self.workers.is_empty()
                && let Some(task) = self.alone.pop_front()
            {
                self.start([task].into(), true).await;
            } else if self.workers.len() < self.worker_slots && self.alone.is_empty() {
                let tasks = self.steal();
                if tasks.is_empty() {
                    return;
                }
                self.start(tasks, false).await;
            } else {
                return;
            }
        }
    }

    /// Takes the next tasks of one kind, as many as fit into one argument.
    fn take(&mut self, count: usize) -> VecDeque<EvalTask> {
        // All attributes of one `nix eval` share its view of the flake and `--read-only`.
        let mut taken: VecDeque<EvalTask> = VecDeque::new();
        let mut size = 0;
        while taken.len() < count
            && let Some(task) = self.waiting.front()
        {
            // The size as JSON inside a Nix string, where each quote gets a backslash.
            size += task.path.iter().map(|name| name.len() + 6).sum::<usize>() + 24;
            let is_like = |first: &EvalTask| {
                Arc::ptr_eq(&first.view, &task.view) && first.must_write == task.must_write
            };
            let other = taken.front().is_some_and(|first| !is_like(first));
            if other || (size > ARGUMENT_LIMIT && !taken.is_empty()) {
                break;
            }
            taken.extend(self.waiting.pop_front());
        }
        taken
    }

    /// Steals the end of the longest list, if that is worth starting a worker.
    fn steal(&mut self) -> VecDeque<EvalTask> {
        if self.pool.per_worker.is_some() {
            return VecDeque::new();
        }
        let start = self.start;
        let longest = self
            .workers
            .values_mut()
            // Without a finished attribute, the time per attribute is unknown.
            .filter(|worker| worker.ended.is_none() && worker.done > 0);
        let Some(worker) = longest.max_by_key(|worker| worker.left.len()) else {
            return VecDeque::new();
        };
        // The average time per attribute so far.
        let each = worker
            .first
            .map_or(0.0, |first| first.elapsed().as_secs_f64())
            / worker.done as f64;
        // The end of the list: the worker itself continues from the front.
        let count = sizing::steal(worker.left.len(), each, start);
        worker.left.split_off(worker.left.len() - count)
    }

    async fn start(&mut self, tasks: VecDeque<EvalTask>, alone: bool) {
        let Some(first) = tasks.front() else { return };
        let list: Vec<(usize, &AttributePath)> =
            tasks.iter().map(|task| (task.id, &task.path)).collect();
        let mut args = self.pool.expressions.derivation_args(
            &first.view,
            &list,
            self.pool.read_only && !first.must_write,
        );
        args.extend(NO_EVAL_CACHE.map(str::to_owned));
        args.extend(self.pool.arguments.iter().cloned());
        let id = self.next;
        self.next += 1;
        let unset = COLLECTOR
            .iter()
            .filter(|(name, _)| self.pool.nix.variable(name).is_none());
        let tool = self.pool.nix.tool().args(&args).envs(unset.copied());
        let tool = match tool.stream_stderr() {
            Ok(tool) => tool,
            Err(error) => {
                let text = format!("error: {error}");
                for task in tasks {
                    self.emit(EvalEvent::Failed(
                        task.id,
                        EvalFailure::from_stderr(&text, &self.pool.source),
                    ))
                    .await;
                }
                return;
            }
        };
        let process = tool.id().unwrap_or_default();
        // If the kernel has to kill a process, it should be a worker, which can be replaced.
        memory::expendable(process);
        let (stop, kill) = (CancellationToken::new(), CancellationToken::new());
        self.following.spawn(follow(
            tool,
            id,
            self.to_pool.clone(),
            stop.clone(),
            kill.clone(),
        ));
        let worker = Worker {
            process,
            left: tasks,
            current: None,
            done: 0,
            alone,
            started: Instant::now(),
            first: None,
            held: 0,
            most: 0,
            output: String::new(),
            ended: None,
            stop,
            kill,
        };
        self.workers.insert(id, worker);
    }

    async fn on_event(&mut self, id: usize, event: WorkerEvent) {
        match event {
            WorkerEvent::Line(line) => self.on_line(id, line).await,
            WorkerEvent::Ended(status) => self.on_ended(id, status).await,
        }
    }

    async fn on_line(&mut self, id: usize, line: String) {
        let Some(worker) = self.workers.get_mut(&id) else {
            return;
        };
        let ours = line
            .strip_prefix(&self.pool.expressions.mark())
            .and_then(|json| serde_json::from_str(json).ok());
        match ours {
            None => keep_tail(&mut worker.output, &line),
            Some(WorkerLine::Begun { b }) => {
                // Earlier output belongs to an attribute that has succeeded.
                worker.output.clear();
                // The time to the first attribute is the cost of starting a worker.
                if worker.first.is_none() {
                    worker.first = Some(Instant::now());
                    self.start = worker.started.elapsed().as_secs_f64();
                }
                match worker.left.front() {
                    // The worker goes through its list in order, so the front is what it has begun.
                    Some(task) if task.id == b => worker.current = worker.left.pop_front(),
                    // Another worker has stolen this attribute.
                    _ => worker.end(EndReason::Overtaken),
                }
                if worker.current.is_some() {
                    self.emit(EvalEvent::Begun(b)).await;
                }
            }
            Some(WorkerLine::Done { d, f }) => {
                // A stolen attribute may still be reported; its new worker counts.
                let task = worker.current.take_if(|task| task.id == d);
                worker.done += 1;
                let Some(task) = task else { return };
                let independent = matches!(*task.view, SelfView::AbortOnUse(_));
                // Counted against `dependent`, to decide whether testing is worth it.
                self.independent += usize::from(independent);
                self.emit(EvalEvent::Known {
                    id: d,
                    facts: f,
                    independent,
                })
                .await;
                self.retire(id);
            }
        }
    }

    /// Ends a worker that exceeded its share of memory at the last check. This happens between two
    /// attributes, so no work is lost.
    fn retire(&mut self, id: usize) {
        let share = self.share;
        let Some(worker) = self.workers.get_mut(&id) else {
            return;
        };
        if worker.held > share && !worker.left.is_empty() {
            worker.end(EndReason::Retired);
        }
    }

    /// Checks the workers' memory, and ends the largest worker when memory is short.
    fn check_memory(&mut self) {
        for worker in self.workers.values_mut() {
            if let Some((held, most)) = memory::of_process(worker.process) {
                (worker.held, worker.most) = (held, most);
            }
        }
        let room = self.room();
        self.share = sizing::share(room, self.worker_slots);
        let ids: Vec<usize> = self.workers.keys().copied().collect();
        let held: Vec<u64> = ids.iter().map(|id| self.workers[id].held).collect();
        if let Some(at) = sizing::too_large(&held, room)
            && let Some(worker) = self.workers.get_mut(&ids[at])
        {
            worker.end(EndReason::TooLarge);
        }
    }

    async fn on_ended(&mut self, id: usize, status: Option<ExitStatus>) {
        let Some(mut worker) = self.workers.remove(&id) else {
            return;
        };
        let left = std::mem::take(&mut worker.left);
        let current = worker.current.take();
        match worker.ended {
            Some(EndReason::Retired | EndReason::Overtaken) => {
                self.put_back(left.into_iter().chain(current));
            }
            Some(EndReason::TooLarge) => self.on_too_large(&worker, left, current).await,
            // It ran out of memory before our own check noticed.
            None if is_for_memory(status, &worker.output) => {
                self.on_too_large(&worker, left, current).await;
            }
            None if status.is_some_and(|status| status.success())
                && current.is_none()
                && left.is_empty() =>
            {
                // The worker has finished its list.
            }
            None => self.on_failed(&worker, status, left, current).await,
        }
    }

    /// Puts tasks back at the front of the queue, in their order.
    fn put_back(&mut self, tasks: impl DoubleEndedIterator<Item = EvalTask>) {
        for task in tasks.rev() {
            self.waiting.push_front(task);
        }
    }

    /// Handles a worker that ran out of memory. Its current attribute is tried once more by itself.
    async fn on_too_large(
        &mut self,
        worker: &Worker,
        left: VecDeque<EvalTask>,
        current: Option<EvalTask>,
    ) {
        self.put_back(left.into_iter());
        let Some(task) = current.or_else(|| self.waiting.pop_front()) else {
            return;
        };
        if worker.alone {
            let limit = self.room().unwrap_or(worker.most);
            let failure = EvalFailure::OutOfMemory {
                needed: worker.most,
                limit,
            };
            self.emit(EvalEvent::Failed(task.id, failure)).await;
        } else if worker.done == 0 {
            self.alone.push_back(task);
        } else {
            // Memory left by earlier attributes may be to blame, so try again with a fresh worker
            // first.
            self.waiting.push_front(task);
        }
    }

    async fn on_failed(
        &mut self,
        worker: &Worker,
        status: Option<ExitStatus>,
        left: VecDeque<EvalTask>,
        current: Option<EvalTask>,
    ) {
        // The evaluation was aborted by our own marker, not by an error of the flake.
        let dependent = worker
            .output
            .contains(&self.pool.expressions.abort_marker());
        let stderr = if worker.output.trim().is_empty() {
            let how = status.map_or("without a status".to_owned(), |status| status.to_string());
            format!("error: `nix eval` ended: {how}")
        } else {
            worker.output.clone()
        };
        let failure = EvalFailure::from_stderr(&stderr, &self.pool.source);
        // A worker that fails before its first attribute fails for its whole list.
        let (failed, rest): (Vec<EvalTask>, VecDeque<EvalTask>) = match current {
            Some(task) => ([task].into(), left),
            None => (left.into(), VecDeque::new()),
        };
        for mut task in failed {
            if self.needs_writing(&task, &stderr) {
                // Try again with writing enabled; this is not a failure.
                task.must_write = true;
                self.waiting.push_back(task);
                continue;
            }
            let event = if dependent {
                EvalEvent::Dependent(task.id)
            } else {
                EvalEvent::Failed(task.id, failure.clone())
            };
            self.dependent += usize::from(dependent);
            self.emit(event).await;
        }
        self.put_back(rest.into_iter());
        self.stop_dependency_check().await;
    }

    /// Whether the failure comes from not writing derivations: one that includes another's whole
    /// closure can be computed only when that derivation is in the store.
    fn needs_writing(&self, task: &EvalTask, stderr: &str) -> bool {
        self.pool.read_only && !task.must_write && stderr.contains(".drv' is not valid")
    }

    /// Stops testing for dependence on the commit if most attributes depend on it, since each test
    /// costs a worker.
    async fn stop_dependency_check(&mut self) {
        let Some(fallback) = self.pool.fallback_view.clone() else {
            return;
        };
        if self.dependent < DEPENDENT_LIMIT || self.dependent <= self.independent {
            return;
        }
        for task in self.waiting.iter_mut().chain(&mut self.alone) {
            if matches!(*task.view, SelfView::AbortOnUse(_)) {
                task.view = Arc::clone(&fallback);
            }
        }
    }

    async fn emit(&self, event: EvalEvent) {
        // The receiver is gone only when the results are no longer wanted.
        let _ = self.events.send(event).await;
    }
}
