//! The overhead of publishing, from within one build: client and server are stopped and continued while it goes
//! on, and the rates at which paths become valid are compared. A whole build differs by a tenth from one time to the
//! next, with the machine's speed, and a second by much less from the seconds around it.
//!
//! What a build publishes is published in half of its time, so that half of the difference is the overhead. It
//! comes out a little small: what a stop has gathered goes in one batch, where it would have gone in two. What
//! the client does beside publishing is in the difference, too; a build without publication shows how much.
//! Never starts or ends a build: that, and what it publishes, is its caller's.

use std::path::Path;
use std::time::{Duration, Instant};

use flywheel_nix::db::Db;
use rustix::process::{Pid, Signal, kill_process};

/// Several batches long, and short beside what makes a machine faster and slower.
const PHASE: Duration = Duration::from_millis(500);
/// How long a build may take.
const LIMIT: Duration = Duration::from_mins(2);
/// Paths left out at each end of the build, where it has not got up its speed or has lost it.
const ENDS: i64 = 20;

/// Stops and continues these processes in turn while a build goes on that registers `inputs` paths and then `outputs`
/// more, and returns by how many percent their work makes it longer. `works` is whether they may work in the first
/// phase: over many builds it should be so in every other one. Panics if the build is too short or does not end.
pub fn overhead(
    state: &Path,
    (inputs, outputs): (usize, usize),
    processes: &[u32],
    mut works: bool,
) -> f64 {
    let processes = Stopped(
        processes
            .iter()
            .map(|id| Pid::from_raw(i32::try_from(*id).unwrap()).unwrap())
            .collect(),
    );
    let (first, last) = (inputs as i64 + ENDS, (inputs + outputs) as i64 - ENDS);
    let limit = Instant::now() + LIMIT;
    let db = loop {
        assert!(Instant::now() < limit, "no build began");
        match Db::open(&Db::file(state)) {
            Ok(db) if db.last_id().unwrap() >= first => break db,
            _ => std::thread::sleep(Duration::from_millis(5)),
        }
    };
    let (mut rates, mut before, mut next) = (Vec::new(), None, Instant::now());
    loop {
        assert!(Instant::now() < limit, "the build did not end");
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
        let (now, id) = (Instant::now(), db.last_id().unwrap());
        if id > last {
            break;
        }
        if let Some((then, old)) = before.replace((now, id)) {
            rates.push((works, ((id - old) as f64 / (now - then).as_secs_f64()).ln()));
            works = !works;
        }
        processes.send(if works { Signal::CONT } else { Signal::STOP });
        next += PHASE;
    }
    drop(processes);
    // Each with the phases around it, which have the other state.
    let difference = |three: &[(bool, f64)]| {
        let slower = (three[0].1 + three[2].1) / 2.0 - three[1].1;
        if three[1].0 { slower } else { -slower }
    };
    let differences: Vec<f64> = rates.windows(3).map(difference).collect();
    assert!(
        !differences.is_empty(),
        "the build was over too soon: {rates:?}"
    );
    100.0 * differences.iter().sum::<f64>() / differences.len() as f64 / 2.0
}

/// Processes that go on in the end, whatever happens.
struct Stopped(Vec<Pid>);

impl Stopped {
    fn send(&self, signal: Signal) {
        for process in &self.0 {
            kill_process(*process, signal).unwrap();
        }
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        for process in &self.0 {
            let _ = kill_process(*process, Signal::CONT);
        }
    }
}
