//! `nix-job` through the front door, with a scripted Nix of each version and a real cache server.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Child, Output};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::json;

use crate::explain::{events, job_of};
use crate::world::cache_server::Served;
use crate::world::scripted_nix::{ScriptedNix, VERSIONS};
use crate::world::{Flywheel, Ran, no_secret_below};

/// Far longer than a job without a build takes.
const DEADLINE: Duration = Duration::from_secs(20);

/// A job whose command waits for the test, and then ends as the test says.
struct Job {
    run: Flywheel,
    nix: ScriptedNix,
    served: Served,
}

impl Job {
    /// The job of an event with a token that asks to publish.
    fn of(event: &events::Event, version: &str, more: &[&str]) -> Self {
        let served = Served::start(&[]);
        let command =
            "touch began; while [ ! -e ended ]; do sleep 0.01; done; read code <ended; exit $code";
        let arguments = [&["nix-job", "--command", command], more].concat();
        let run = job_of(event, &arguments);
        let nix = ScriptedNix::new(run.folder.path(), version);
        let path = format!("{}:/usr/bin:/bin", nix.bin.display());
        let run = run
            .env("PATH", &path)
            .env("ATTIC_SERVER", &served.url)
            .env(
                "ATTIC_PUBLIC_KEY",
                served.keys[0].trim_start_matches("public-key "),
            )
            .env("FLYWHEEL_SHARED_HOST", "false");
        Self { run, nix, served }
    }

    fn start(&self) -> Child {
        // To files: the command begins only when its own runner has read what was printed before.
        let file = |name: &str| File::create(self.run.path(name)).unwrap();
        let mut command = self.run.command();
        command.stdout(file("stdout")).stderr(file("stderr"));
        let mut child = command.spawn().unwrap();
        let until = Instant::now() + DEADLINE;
        while !self.run.path("began").exists() {
            if Instant::now() > until || child.try_wait().unwrap().is_some() {
                let _ = child.kill();
                let ran = self.ended(child);
                panic!("the command did not begin:\n{}{}", ran.stdout, ran.stderr);
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        child
    }

    /// Lets the command end with this code, and the job with it.
    fn end(&self, child: Child, code: u8) -> Ran {
        let file = self.run.path("ended.partial");
        fs::write(&file, format!("{code}\n")).unwrap();
        fs::rename(file, self.run.path("ended")).unwrap();
        let ran = self.ended(child);
        assert_eq!(self.nix.unknown_calls(), "", "{}", ran.stderr);
        assert_eq!(self.netrcs(), Vec::<PathBuf>::new(), "{}", ran.stderr);
        ran
    }

    fn ended(&self, mut child: Child) -> Ran {
        let status = child.wait().unwrap();
        let printed = |name: &str| {
            let file = self.run.path(name);
            let text = fs::read(&file).unwrap();
            // Its lines that mask hold the secret, and are no file that a run leaves.
            fs::remove_file(file).unwrap();
            text
        };
        let (stdout, stderr) = (printed("stdout"), printed("stderr"));
        self.run.check(&Output {
            status,
            stdout,
            stderr,
        })
    }

    /// The files for Nix with the cache's token in them.
    fn netrcs(&self) -> Vec<PathBuf> {
        let mut found = Vec::new();
        let mut folders = vec![self.run.folder.path().to_owned()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).unwrap().flatten() {
                let kind = entry.file_type().unwrap();
                if kind.is_dir() {
                    folders.push(entry.path());
                } else if entry.file_name().to_string_lossy().contains("netrc") {
                    found.push(entry.path());
                }
            }
        }
        found
    }

    /// Whether the cache serves the path.
    fn serves(&self, path: &str) -> bool {
        let name = &path["/nix/store/".len()..][..32];
        let url = format!("{}/main/{name}.narinfo", self.served.url);
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let asked = async { self.served.client().get(url).send().await.unwrap().status() };
        runtime.block_on(asked).is_success()
    }
}

fn pull_request() -> events::Event {
    let request = json!({ "action": "opened", "number": 7, "pull_request": { "number": 7 } });
    events::event("pull_request", &request).on("refs/pull/7/merge")
}

/// The closing line.
fn closing(ran: &Ran) -> &str {
    let mut lines = ran.stdout.lines().chain(ran.stderr.lines());
    lines
        .find(|line| line.contains(" published, "))
        .unwrap_or_else(|| panic!("no closing line:\n{}{}", ran.stdout, ran.stderr))
}

#[test]
fn what_is_built_is_published_while_the_command_runs_and_nothing_is_left() {
    for version in VERSIONS {
        let job = Job::of(&events::push(), version, &[]);
        let child = job.start();
        let path = job.nix.build('a', "hello", "hello");
        // While the command runs, Nix has the token from a file of this user's alone, and so does nobody else.
        let netrcs = job.netrcs();
        assert_eq!(netrcs.len(), 1, "{version}: {netrcs:?}");
        let until = Instant::now() + DEADLINE;
        while !job.serves(&path) {
            assert!(
                Instant::now() < until,
                "{version}: it is not sent while the command runs"
            );
            std::thread::sleep(Duration::from_millis(10));
        }
        let ran = job.end(child, 0);
        assert_eq!(ran.code, 0, "{version}: {}", ran.stderr);
        let line = closing(&ran);
        assert!(
            line.ends_with("1 built, 1 published, 1 verified, 0 lost"),
            "{version}: {line}"
        );
        no_secret_below(job.run.folder.path());
    }
}

#[test]
fn a_command_that_fails_ends_the_job_with_its_code_and_loses_nothing() {
    let job = Job::of(&events::push(), "2.34.8", &[]);
    let child = job.start();
    let path = job.nix.build('b', "half", "half of the work");
    let ran = job.end(child, 7);
    assert_eq!(ran.code, 7, "{}", ran.stderr);
    assert!(
        closing(&ran).contains("1 published, 1 verified, 0 lost"),
        "{}",
        closing(&ran)
    );
    assert!(job.serves(&path));
    assert!(job.run.read("GITHUB_OUTPUT").contains("command-failed"));
}

#[test]
fn a_pull_request_publishes_nothing_whatever_it_asks() {
    let job = Job::of(&pull_request(), "2.26.3", &[]);
    let child = job.start();
    let path = job.nix.build('c', "theirs", "theirs");
    let ran = job.end(child, 0);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    assert!(closing(&ran).contains(" 0 published"), "{}", closing(&ran));
    assert!(!job.serves(&path));
}

/// A job whose cache takes nothing more once the command runs, and its code.
fn unsent(require_publish: &str) -> i32 {
    let more = ["--require-publish", require_publish, "--drain-timeout", "1"];
    let job = Job::of(&events::push(), "2.8.0", &more);
    let child = job.start();
    job.served.signal(Signal::STOP);
    let path = job.nix.build('d', "unsent", "unsent");
    let ran = job.end(child, 0);
    job.served.signal(Signal::CONT);
    assert!(closing(&ran).contains("1 lost"), "{}", closing(&ran));
    let summary = job.run.read("GITHUB_STEP_SUMMARY");
    assert!(summary.contains(&path), "{summary}");
    ran.code
}

#[test]
fn what_a_cache_does_not_take_is_lost_by_name() {
    assert_eq!(unsent("false"), 0);
}

#[test]
fn what_is_lost_fails_a_job_that_must_publish() {
    assert_eq!(unsent("true"), 1);
}
