//! The evaluation's workers. A worker is one `nix eval` over many attributes that says of each when it begins and
//! what it is, so nothing is lost when it ends early: what it has not said goes to the next.
//!
//! Three things end a worker early: an attribute that fails, memory, and another worker that has nothing left to do
//! and took over the end of its list.

use std::collections::{HashMap, VecDeque};
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::host::memory::{self, Cgroup};
use crate::nix::flake::Source;
use crate::nix::flake::evaluate::{Event, Failure, QUIET};
use crate::nix::flake::expression::{AttributePath, Expressions, Seen};
use crate::nix::flake::worker::{Ended, Heard, Said, Worker, follow, is_for_memory, keep};
use crate::nix::tool::Nix;
use crate::sizing::{self, Room};

/// How often the workers' memory is looked at.
const LOOK: Duration = Duration::from_millis(50);
/// What others hold of the memory changes slowly.
const OTHERS: u32 = 10;
/// The text of one argument; the kernel takes 128 KiB (`execve(2)`, `MAX_ARG_STRLEN`).
const ARGUMENT: usize = 96 * 1024;
/// Nix begins with a heap of up to 384 MB, whatever it is to evaluate; touching that much memory costs more time than
/// collecting a smaller heap now and then, and in a pod it is not there. Marking by several threads at once is
/// of no use to workers that have a core each. Both are variables of the collector (`GC_INITIAL_HEAP_SIZE`,
/// `GC_NPROCS`; Boehm and Weiser's `README.environment`), and whoever has set them keeps them.
const COLLECTOR: [(&str, &str); 2] = [("GC_INITIAL_HEAP_SIZE", "16000000"), ("GC_NPROCS", "1")];
/// When so many attributes have turned out to depend on the commit, and no more have not, the rest is not tried.
const DEPENDENT: usize = 8;

/// An attribute to evaluate.
#[derive(Clone, Debug)]
pub struct Task {
    /// The caller's number for it.
    pub id: usize,
    /// Its path below the selected attribute.
    pub path: AttributePath,
    /// How the flake sees itself meanwhile.
    pub seen: Arc<Seen>,
    /// Whether its derivations have to be written, although the others' are not.
    pub written: bool,
}

/// What a pool needs.
pub struct Pool {
    /// Nix.
    pub nix: Nix,
    /// The flake.
    pub source: Source,
    /// Its expressions.
    pub expressions: Expressions,
    /// More words for Nix.
    pub arguments: Vec<String>,
    /// How many workers at once, if that is asked for.
    pub workers: Option<usize>,
    /// How many attributes a worker takes, if that is asked for.
    pub per_worker: Option<usize>,
    /// Whether derivations are only computed, and not written to the store.
    pub read_only: bool,
    /// What takes the place of poisoned ones when most depend on the commit.
    pub instead: Option<Arc<Seen>>,
}

/// The state of a running pool.
struct Running<'a> {
    pool: &'a Pool,
    width: usize,
    waiting: VecDeque<Task>,
    /// They were too large beside others.
    alone: VecDeque<Task>,
    workers: HashMap<usize, Worker>,
    next: usize,
    heard: mpsc::Sender<(usize, Heard)>,
    following: JoinSet<()>,
    events: mpsc::Sender<Event>,
    cgroup: Option<Cgroup>,
    others: u64,
    looks: u32,
    /// What one worker may hold between two attributes.
    share: u64,
    /// What starting a worker costs, in seconds, as seen last.
    start: f64,
    dependent: usize,
    independent: usize,
}

impl Pool {
    /// How many workers fit this machine now, and what each may hold, in bytes; `asked`: how many were asked for.
    pub fn fitted(asked: Option<usize>) -> (usize, u64) {
        let limit = Cgroup::current().and_then(|cgroup| cgroup.read().limit);
        let others = memory::of_descendants();
        let room = Room {
            limit,
            others,
            available: memory::available(),
            workers: 0,
        }
        .for_workers();
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let workers = sizing::workers(asked, cores, room);
        (workers, sizing::share(room, workers))
    }

    /// Evaluates what comes, until nothing more will come and all is done, or `cancel`; then what is left is not
    /// spoken of any more.
    pub async fn run(
        self,
        mut tasks: mpsc::Receiver<Vec<Task>>,
        events: mpsc::Sender<Event>,
        cancel: CancellationToken,
    ) {
        let (heard, mut hearing) = mpsc::channel(1024);
        let cgroup = Cgroup::current();
        let mut running = Running {
            pool: &self,
            width: 1,
            waiting: VecDeque::new(),
            alone: VecDeque::new(),
            workers: HashMap::new(),
            next: 0,
            heard,
            following: JoinSet::new(),
            events,
            cgroup,
            others: 0,
            looks: 0,
            share: u64::MAX,
            start: 0.1,
            dependent: 0,
            independent: 0,
        };
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let room = running.room();
        running.width = sizing::workers(self.workers, cores, room);
        running.share = sizing::share(room, running.width);
        let mut looking = tokio::time::interval(LOOK);
        looking.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut open = true;
        loop {
            running.fill().await;
            if !open && running.is_idle() {
                break;
            }
            tokio::select! {
                biased;
                () = cancel.cancelled() => break,
                _ = looking.tick(), if !running.workers.is_empty() => running.look(),
                Some((id, heard)) = hearing.recv() => running.hear(id, heard).await,
                more = tasks.recv(), if open => match more {
                    Some(more) => running.waiting.extend(more),
                    None => open = false,
                },
            }
        }
        for worker in running.workers.values() {
            worker.stop.cancel();
        }
        drop(hearing);
        while running.following.join_next().await.is_some() {}
    }
}

impl Running<'_> {
    fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.alone.is_empty() && self.workers.is_empty()
    }

    /// What the workers together may hold now.
    fn room(&mut self) -> Option<u64> {
        let workers = self.workers.values().map(|worker| worker.held).sum();
        if self.looks.is_multiple_of(OTHERS) {
            let ours = memory::of_descendants().max(
                self.cgroup
                    .as_ref()
                    .and_then(Cgroup::of_processes)
                    .unwrap_or(0),
            );
            self.others = ours.saturating_sub(workers);
        }
        self.looks += 1;
        let limit = self.cgroup.as_ref().and_then(|cgroup| cgroup.read().limit);
        Room {
            limit,
            others: self.others,
            available: memory::available(),
            workers,
        }
        .for_workers()
    }

    /// Starts workers while there is something to do and a place for one.
    async fn fill(&mut self) {
        while self.workers.values().all(|worker| !worker.alone) {
            if self.workers.len() < self.width && !self.waiting.is_empty() {
                let count = sizing::chunk(
                    self.pool.per_worker,
                    self.waiting.len(),
                    self.width - self.workers.len(),
                );
                let tasks = self.take(count);
                self.start(tasks, false).await;
            } else if self.workers.is_empty()
                && let Some(task) = self.alone.pop_front()
            {
                self.start([task].into(), true).await;
            } else if self.workers.len() < self.width && self.alone.is_empty() {
                let tasks = self.take_over();
                if tasks.is_empty() {
                    return;
                }
                self.start(tasks, false).await;
            } else {
                return;
            }
        }
    }

    /// The next tasks of one kind, as many as one argument can name.
    fn take(&mut self, count: usize) -> VecDeque<Task> {
        let mut taken: VecDeque<Task> = VecDeque::new();
        let mut size = 0;
        while taken.len() < count
            && let Some(task) = self.waiting.front()
        {
            // As JSON in a Nix string: each quote has a backslash.
            size += task.path.iter().map(|name| name.len() + 6).sum::<usize>() + 24;
            let is_like = |first: &Task| {
                Arc::ptr_eq(&first.seen, &task.seen) && first.written == task.written
            };
            let other = taken.front().is_some_and(|first| !is_like(first));
            if other || (size > ARGUMENT && !taken.is_empty()) {
                break;
            }
            taken.extend(self.waiting.pop_front());
        }
        taken
    }

    /// The end of the longest list, if it is worth a worker of its own.
    fn take_over(&mut self) -> VecDeque<Task> {
        if self.pool.per_worker.is_some() {
            return VecDeque::new();
        }
        let start = self.start;
        let longest = self
            .workers
            .values_mut()
            .filter(|worker| worker.ended.is_none() && worker.done > 0);
        let Some(worker) = longest.max_by_key(|worker| worker.left.len()) else {
            return VecDeque::new();
        };
        let each = worker
            .first
            .map_or(0.0, |first| first.elapsed().as_secs_f64())
            / worker.done as f64;
        let count = sizing::take_over(worker.left.len(), each, start);
        worker.left.split_off(worker.left.len() - count)
    }

    async fn start(&mut self, tasks: VecDeque<Task>, alone: bool) {
        let Some(first) = tasks.front() else { return };
        let list: Vec<(usize, &AttributePath)> =
            tasks.iter().map(|task| (task.id, &task.path)).collect();
        let mut words =
            self.pool
                .expressions
                .facts(&first.seen, &list, self.pool.read_only && !first.written);
        words.extend(QUIET.map(str::to_owned));
        words.extend(self.pool.arguments.iter().cloned());
        let id = self.next;
        self.next += 1;
        let unset = COLLECTOR
            .iter()
            .filter(|(name, _)| self.pool.nix.variable(name).is_none());
        let tool = self.pool.nix.tool().args(&words).envs(unset.copied());
        let tool = match tool.stream_stderr() {
            Ok(tool) => tool,
            Err(error) => {
                let text = format!("error: {error}");
                for task in tasks {
                    self.tell(Event::Failed(
                        task.id,
                        Failure::said(&text, &self.pool.source),
                    ))
                    .await;
                }
                return;
            }
        };
        let process = tool.id().unwrap_or_default();
        memory::expendable(process);
        let (stop, kill) = (CancellationToken::new(), CancellationToken::new());
        self.following.spawn(follow(
            tool,
            id,
            self.heard.clone(),
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
            said: String::new(),
            ended: None,
            stop,
            kill,
        };
        self.workers.insert(id, worker);
    }

    async fn hear(&mut self, id: usize, heard: Heard) {
        match heard {
            Heard::Line(line) => self.line(id, line).await,
            Heard::Ended(status) => self.ended(id, status).await,
        }
    }

    async fn line(&mut self, id: usize, line: String) {
        let Some(worker) = self.workers.get_mut(&id) else {
            return;
        };
        let ours = line
            .strip_prefix(&self.pool.expressions.mark())
            .and_then(|json| serde_json::from_str(json).ok());
        match ours {
            None => keep(&mut worker.said, &line),
            Some(Said::Begun { b }) => {
                worker.said.clear();
                if worker.first.is_none() {
                    worker.first = Some(Instant::now());
                    self.start = worker.started.elapsed().as_secs_f64();
                }
                match worker.left.front() {
                    Some(task) if task.id == b => worker.current = worker.left.pop_front(),
                    // What it comes to now is another's already.
                    _ => worker.end(Ended::Overtaken),
                }
                if worker.current.is_some() {
                    self.tell(Event::Begun(b)).await;
                }
            }
            Some(Said::Done { d, f }) => {
                let task = worker.current.take_if(|task| task.id == d);
                worker.done += 1;
                let Some(task) = task else { return };
                let independent = matches!(*task.seen, Seen::Poisoned(_));
                self.independent += usize::from(independent);
                self.tell(Event::Known {
                    id: d,
                    facts: f,
                    independent,
                })
                .await;
                self.retire(id);
            }
        }
    }

    /// Between two attributes a worker that has outgrown its share, when it was last looked at, goes.
    fn retire(&mut self, id: usize) {
        let share = self.share;
        let Some(worker) = self.workers.get_mut(&id) else {
            return;
        };
        if worker.held > share && !worker.left.is_empty() {
            worker.end(Ended::Retired);
        }
    }

    /// Looks at the memory; the largest has to go when there is not enough.
    fn look(&mut self) {
        for worker in self.workers.values_mut() {
            if let Some((held, most)) = memory::of_process(worker.process) {
                (worker.held, worker.most) = (held, most);
            }
        }
        let room = self.room();
        self.share = sizing::share(room, self.width);
        let ids: Vec<usize> = self.workers.keys().copied().collect();
        let held: Vec<u64> = ids.iter().map(|id| self.workers[id].held).collect();
        if let Some(at) = sizing::too_large(&held, room)
            && let Some(worker) = self.workers.get_mut(&ids[at])
        {
            worker.end(Ended::TooLarge);
        }
    }

    async fn ended(&mut self, id: usize, status: Option<ExitStatus>) {
        let Some(mut worker) = self.workers.remove(&id) else {
            return;
        };
        let left = std::mem::take(&mut worker.left);
        let current = worker.current.take();
        match worker.ended {
            Some(Ended::Retired | Ended::Overtaken) => {
                self.put_back(left.into_iter().chain(current));
            }
            Some(Ended::TooLarge) => self.too_large(&worker, left, current).await,
            None if is_for_memory(status, &worker.said) => {
                self.too_large(&worker, left, current).await;
            }
            None if status.is_some_and(|status| status.success())
                && current.is_none()
                && left.is_empty() =>
            {
                // The worker had nothing left to do.
            }
            None => self.failed(&worker, status, left, current).await,
        }
    }

    /// Back to the others, the one that had begun first of all.
    fn put_back(&mut self, tasks: impl DoubleEndedIterator<Item = Task>) {
        for task in tasks.rev() {
            self.waiting.push_front(task);
        }
    }

    /// The worker is dead for its memory. The attribute that it was at is tried once more by itself.
    async fn too_large(&mut self, worker: &Worker, left: VecDeque<Task>, current: Option<Task>) {
        self.put_back(left.into_iter());
        let Some(task) = current.or_else(|| self.waiting.pop_front()) else {
            return;
        };
        if worker.alone {
            let limit = self.room().unwrap_or(worker.most);
            let failure = Failure::OutOfMemory {
                needed: worker.most,
                limit,
            };
            self.tell(Event::Failed(task.id, failure)).await;
        } else if worker.done == 0 {
            self.alone.push_back(task);
        } else {
            // Others before it may have left too much behind: first with a worker that has done nothing yet.
            self.waiting.push_front(task);
        }
    }

    async fn failed(
        &mut self,
        worker: &Worker,
        status: Option<ExitStatus>,
        left: VecDeque<Task>,
        current: Option<Task>,
    ) {
        let dependent = worker.said.contains(&self.pool.expressions.poison());
        let said = if worker.said.trim().is_empty() {
            let how = status.map_or("with no word".to_owned(), |status| status.to_string());
            format!("error: `nix eval` ended: {how}")
        } else {
            worker.said.clone()
        };
        let failure = Failure::said(&said, &self.pool.source);
        // One that fails before it has begun any fails for all of its list.
        let (fail, rest): (Vec<Task>, VecDeque<Task>) = match current {
            Some(task) => ([task].into(), left),
            None => (left.into(), VecDeque::new()),
        };
        for mut task in fail {
            if self.needs_writing(&task, &said) {
                task.written = true;
                self.waiting.push_back(task);
                continue;
            }
            let event = if dependent {
                Event::Dependent(task.id)
            } else {
                Event::Failed(task.id, failure.clone())
            };
            self.dependent += usize::from(dependent);
            self.tell(event).await;
        }
        self.put_back(rest.into_iter());
        self.give_poison_up().await;
    }

    /// A derivation that has another's closure in it, not only its outputs, can be computed only when that one is
    /// in the store.
    fn needs_writing(&self, task: &Task, said: &str) -> bool {
        self.pool.read_only && !task.written && said.contains(".drv' is not valid")
    }

    /// Where nearly everything depends on the commit, each would cost a worker.
    async fn give_poison_up(&mut self) {
        let Some(instead) = self.pool.instead.clone() else {
            return;
        };
        if self.dependent < DEPENDENT || self.dependent <= self.independent {
            return;
        }
        for task in self.waiting.iter_mut().chain(&mut self.alone) {
            if matches!(*task.seen, Seen::Poisoned(_)) {
                task.seen = Arc::clone(&instead);
            }
        }
    }

    async fn tell(&self, event: Event) {
        // The receiver is gone only when nobody wants to know any more.
        let _ = self.events.send(event).await;
    }
}
