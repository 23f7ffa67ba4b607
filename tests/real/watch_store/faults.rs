//! A cache that hangs in a job of many steps. What takes half a minute runs in `just faults`.

use std::time::{Duration, Instant};

use super::{Host, good};
use crate::world::broken;
use crate::world::cache::Cache;
use crate::world::flywheel;

#[test]
fn a_cache_that_hangs_costs_all_steps_together_35_s_at_most() {
    let (host, cache) = (Host::new(), Cache::start(&[]));
    let through = broken::forward(&cache.url);
    let job = host.job(&cache);
    let watch = |task: &str| {
        let words = ["watch-store", task, "--attic-server", &through.url];
        let mut step = job.step(&flywheel(), &words);
        step.env("ATTIC_TOKEN", &cache.token)
            .env("FLYWHEEL_PUSH_CACHE", "auto");
        good(&step.output().unwrap())
    };
    let started = watch("start");
    assert!(started.contains("attached"), "{started}");
    through.cut();
    let begun = Instant::now();
    for part in ["lib", "app", "default"] {
        good(&job.nix(&["build", "--no-link", &format!("path:.#{part}")]));
    }
    let finished = watch("finish");
    let took = begun.elapsed();
    // The builds themselves take some seconds.
    assert!(took < Duration::from_secs(38), "{took:?}\n{finished}");
    assert!(
        finished.contains("is given up for the rest of the job"),
        "{finished}"
    );
    assert!(
        job.output("lost").parse::<u32>().unwrap() >= 3,
        "{finished}"
    );
    job.end();
}
