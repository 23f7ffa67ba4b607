//! The matrix: versions of Nix × kinds of stores × shapes of jobs, each run in a root of its own with an empty `/nix`,
//! and judged by stock Nix alone. What the job's results need and an empty store cannot have from the cache must have
//! been reported as lost, withheld, ambiguous or not watched; any other path that is missing fails the run. Besides, each
//! version reads back from the embedded cache what it has written to it.
//!
//! `just matrix` makes all 1000 runs, `just matrix --sample` those in which each pair of values meets. As root, with
//! what `scripts/nix-versions.sh` unpacks. Without an option it only prints its usage, so that a plain `cargo test`
//! does not start it.
#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a run that cannot be made says why by panicking"
)]

mod cells;
#[path = "../guest/host.rs"]
mod host;
mod report;
mod run;
mod verdict;

use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use clap::{CommandFactory as _, Parser};

use cells::Cell;
use host::{binary, repository};
use report::Table;
use run::{Rig, Run};
use verdict::Verdict;

#[derive(Parser)]
#[command(
    about = "Runs jobs on every kind of store, and has stock Nix judge what their cache is worth"
)]
struct Options {
    /// Make the runs of the whole matrix, as many as `--runs` says.
    #[arg(long)]
    all: bool,
    /// Make one run for each cell of a sample in which each pair of values meets.
    #[arg(long)]
    sample: bool,
    /// Make runs of the cells that this matches, such as `2.34.8/bare/twelve` or `*/rootless/*`.
    #[arg(long, value_name = "VERSION/KIND/SHAPE")]
    cell: Vec<String>,
    /// How many runs are made (default: 1000 with `--all`, else one for each cell).
    #[arg(long, value_name = "N")]
    runs: Option<usize>,
    /// The seed of the first run; each run has the next one.
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// How many runs are made at once (default: as many as there are cores).
    #[arg(long, value_name = "N")]
    jobs: Option<usize>,
    /// Keep the logs of runs that hold, too; those of the others are always kept.
    #[arg(long)]
    keep: bool,
    /// List the cells, and run none.
    #[arg(long)]
    list: bool,
}

impl Options {
    fn cells(&self) -> Vec<Cell> {
        let mut cells = if self.sample {
            cells::sample()
        } else {
            cells::all()
        };
        if !self.cell.is_empty() {
            cells = cells::all();
            cells.retain(|cell| self.cell.iter().any(|pattern| cell.matches(pattern)));
        }
        cells
    }

    fn runs(&self) -> Vec<Run> {
        let cells = self.cells();
        let default = if self.all { 1000 } else { cells.len() };
        let seeds = self.seed..;
        let runs = cells.into_iter().cycle().zip(seeds);
        runs.take(self.runs.unwrap_or(default))
            .map(|(cell, seed)| Run { cell, seed })
            .collect()
    }
}

fn main() -> ExitCode {
    let options = Options::parse();
    if !(options.all || options.sample || !options.cell.is_empty() || options.list) {
        println!("{}", Options::command().render_long_help());
        return ExitCode::SUCCESS;
    }
    let runs = options.runs();
    if options.list {
        for run in &runs {
            println!("{}", run.cell);
        }
        return ExitCode::SUCCESS;
    }
    assert!(!runs.is_empty(), "no cell is called {:?}", options.cell);
    let rig = Rig::new(repository(), &binary(), options.keep);
    let jobs = options
        .jobs
        .unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
    let started = Instant::now();
    let read_back = options.cell.is_empty();
    let unread: Vec<&str> = cells::VERSIONS
        .into_iter()
        .filter(|_| read_back)
        .filter(|version| {
            let ended = rig.read_back(version);
            println!(
                "{version}/read-back: {}",
                ended.as_ref().err().map_or("holds", |_| "FAILS")
            );
            ended.inspect_err(|error| println!("{error}")).is_err()
        })
        .collect();
    let table = make(&rig, &runs, jobs);
    println!("\n{table}");
    println!("{} runs in {} s", runs.len(), started.elapsed().as_secs());
    table.write(&repository().join("target/matrix/results.jsonl"));
    if table.holds() && unread.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// Makes the runs, `jobs` at a time.
fn make(rig: &Rig, runs: &[Run], jobs: usize) -> Table {
    let next = AtomicUsize::new(0);
    let table = Mutex::new(Table::default());
    std::thread::scope(|scope| {
        for _ in 0..jobs.max(1) {
            scope.spawn(|| {
                while let Some(run) = runs.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let (folder, seconds, finished) = rig.make(run);
                    let verdict = Verdict::read(&folder, finished);
                    rig.clean(&folder, verdict.holds());
                    let mut table = table.lock().unwrap();
                    println!("{}", report::line(run, &verdict, seconds));
                    table.add(run.clone(), verdict, seconds);
                }
            });
        }
    });
    table.into_inner().unwrap()
}
