//! The demo on every kind of machine that people run it on: each is a root of its own, entered with its own user, mounts,
//! network and `/nix`. A job there ends with "0 lost", and an empty store of stock Nix has its outputs from the cache as an
//! ordinary machine builds them; or it ends within five seconds with the obstacle, the remedy and exit code 69.
//!
//! `just machines`, as root. Without an option it only prints its usage, so that a plain `cargo test` does not start it.
#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a machine that cannot be made says why by panicking"
)]

#[path = "../guest/host.rs"]
mod host;
mod machines;
mod run;
mod verdict;

use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use clap::{CommandFactory as _, Parser};

use host::{binary, repository};
use machines::{MACHINES, Machine};
use run::Rig;
use verdict::Verdict;

#[derive(Parser)]
#[command(about = "Runs the demo on every kind of machine, each a root of its own")]
struct Options {
    /// Run all machines.
    #[arg(long)]
    all: bool,
    /// Run these machines; a name ends in `*` for all that begin so.
    #[arg(value_name = "NAME")]
    names: Vec<String>,
    /// How many machines run at once (default: one and a half for each core).
    #[arg(long, value_name = "N")]
    jobs: Option<usize>,
    /// Keep the logs of machines that hold, too; those of the others are always kept.
    #[arg(long)]
    keep: bool,
    /// List the machines, and run none.
    #[arg(long)]
    list: bool,
}

impl Options {
    fn machines(&self) -> Vec<&'static Machine> {
        let is_named = |machine: &Machine| {
            self.names.iter().any(|name| match name.strip_suffix('*') {
                Some(beginning) => machine.name.starts_with(beginning),
                None => machine.name == name,
            })
        };
        let machines = MACHINES.iter();
        machines
            .filter(|machine| self.names.is_empty() || is_named(machine))
            .collect()
    }
}

fn main() -> ExitCode {
    let options = Options::parse();
    if !(options.all || options.list) && options.names.is_empty() {
        println!("{}", Options::command().render_long_help());
        return ExitCode::SUCCESS;
    }
    let machines = options.machines();
    if options.list {
        for machine in &machines {
            println!("{:<34} {}", machine.name, machine.story.as_str());
        }
        return ExitCode::SUCCESS;
    }
    assert!(
        !machines.is_empty(),
        "no machine is called {:?}",
        options.names
    );
    let started = Instant::now();
    let rig = Rig::new(repository(), &binary());
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let verdicts = run_all(
        &rig,
        &machines,
        options.jobs.unwrap_or(cores * 3 / 2),
        options.keep,
    );
    let failed = verdicts.iter().filter(|verdict| !verdict.holds()).count();
    println!("\nWhat became of a job on each machine\n");
    for verdict in &verdicts {
        println!("{verdict}");
    }
    println!(
        "\n{failed} of {} machines fail, {} s",
        verdicts.len(),
        started.elapsed().as_secs()
    );
    match failed {
        0 => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    }
}

/// Runs the machines, `jobs` at a time; the verdicts in the order of the machines.
fn run_all(rig: &Rig, machines: &[&'static Machine], jobs: usize, keep: bool) -> Vec<Verdict> {
    let next = AtomicUsize::new(0);
    let verdicts = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..jobs.max(1) {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    let Some(machine) = machines.get(number) else {
                        return;
                    };
                    let (folder, left) = rig.tell(machine.name, machine.story);
                    let verdict = Verdict::new(machine, &left);
                    if verdict.holds() && !keep {
                        std::fs::remove_dir_all(folder).unwrap();
                    }
                    verdicts.lock().unwrap().push((number, verdict));
                }
            });
        }
    });
    let mut verdicts = verdicts.into_inner().unwrap();
    verdicts.sort_by_key(|(number, _)| *number);
    verdicts.into_iter().map(|(_, verdict)| verdict).collect()
}
