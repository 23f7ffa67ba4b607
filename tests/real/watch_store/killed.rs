//! `finish` where the watch was killed.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use rustix::process::Signal;

use super::{Host, Job, good};
use crate::world::cache::Cache;
use crate::world::{flywheel, processes};

impl Job<'_> {
    /// Kills the watch as the kernel does when memory runs out.
    fn kill_watch(&self) {
        let pid = i32::try_from(self.status()["pid"].as_u64().unwrap()).unwrap();
        processes::signal(pid, Signal::KILL);
        let gone = processes::wait_until(Duration::from_secs(5), || {
            processes::with_variable(&self.mark()).is_empty()
        });
        assert!(gone, "{:?}", processes::with_variable(&self.mark()));
    }
}

/// What lies in the folder for secrets.
fn secrets_left(job: &Job<'_>) -> Vec<PathBuf> {
    let folder = job.folder.join("temp/flywheel-0");
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).collect()
}

#[test]
fn a_finish_after_the_watch_was_killed_publishes_what_is_left_and_sweeps() {
    let (host, cache) = (Host::new(), Cache::start(&["--private"]));
    let job = host.job(&cache);
    job.start();
    good(&job.nix(&["build", "--no-link", "path:.#lib"]));
    job.kill_watch();
    // Nobody watches any more, and the status must not remove what `finish` needs.
    good(&job.nix(&["build", "--no-link", "path:.#app"]));
    assert_eq!(job.status()["state"], "none");
    assert!(!secrets_left(&job).is_empty(), "the netrc of the killed");

    let printed = good(&job.watch(&["finish"]));
    assert!(printed.contains("the watch was killed"), "{printed}");
    assert_eq!(job.output("lost"), "0", "{printed}");
    let names = cache.names();
    for name in ["base", "lib", "app"] {
        assert!(
            names.contains(&name.to_owned()),
            "{name}: {names:?}\n{printed}"
        );
    }
    assert_eq!(secrets_left(&job), Vec::<PathBuf>::new(), "{printed}");
    assert_eq!(host.journals(), 0, "{printed}");
    let given_back = ("NIX_CONFIG".to_owned(), String::new());
    assert_eq!(job.variables().last(), Some(&given_back), "{printed}");
    let again = good(&job.watch(&["finish"]));
    assert!(again.contains("no watch runs in this job"), "{again}");
}

#[test]
fn a_finish_that_may_not_publish_says_what_it_needs_and_sweeps_all_the_same() {
    let (host, cache) = (Host::new(), Cache::start(&["--private"]));
    let job = host.job(&cache);
    job.start();
    job.kill_watch();
    good(&job.nix(&["build", "--no-link", "path:.#app"]));
    // As in a workflow whose last step has `mode: finish` alone.
    let mut finish = job.step(&flywheel(), &["watch-store", "finish"]);
    let printed = good(&finish.output().unwrap());
    assert!(printed.contains("this step may not publish"), "{printed}");
    assert_eq!(secrets_left(&job), Vec::<PathBuf>::new(), "{printed}");
    assert_eq!(host.journals(), 1, "for the next job");
}
