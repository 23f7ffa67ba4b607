//! `nix-job` as one step under the rules of GitHub's own runner: cancelled, killed, out of memory,
//! its secrets looked for everywhere while it runs.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::process::Signal;
use serde_json::json;

use crate::world::cache::Cache;
use crate::world::runner::{Report, Step};
use crate::world::{flake, flywheel, need, processes};

/// A step that runs `command` by `nix-job` on a push to the default branch, beside the flake of `flake`.
pub struct Job {
    pub step: Step,
    pub nix: PathBuf,
}

impl Job {
    pub fn new(cache: &Cache, command: &str) -> Self {
        Self::of(cache, "nix-job").with_env("FLYWHEEL_COMMAND", command)
    }

    /// The same for another verb that runs a job.
    pub fn of(cache: &Cache, verb: &str) -> Self {
        need("nix", "apt-get install nix-bin");
        let step = Step::new(&format!("exec '{}' {verb}", flywheel().display()));
        flake::write(&step.workspace());
        let nix = step.folder().join("nix");
        let after = "1".repeat(40);
        let repository = json!({ "full_name": "octo-org/app", "default_branch": "main" });
        let payload = json!({ "ref": "refs/heads/main", "after": after, "deleted": false, "repository": repository });
        let event = step.folder().join("event.json");
        fs::write(&event, payload.to_string()).unwrap();
        let step = step
            .with_nix(&nix)
            .with_env("GITHUB_EVENT_NAME", "push")
            .with_env("GITHUB_REF", "refs/heads/main")
            .with_env("GITHUB_REPOSITORY", "octo-org/app")
            .with_env("GITHUB_EVENT_PATH", event.to_str().unwrap())
            .with_env("ATTIC_SERVER", &cache.url)
            .with_env("ATTIC_PUBLIC_KEY", &cache.key)
            .with_env("ATTIC_TOKEN", &cache.token)
            .with_env("FLYWHEEL_PUSH_CACHE", "true");
        Self { step, nix }
    }

    pub fn with_env(self, name: &str, value: &str) -> Self {
        Self {
            step: self.step.with_env(name, value),
            nix: self.nix,
        }
    }
}

pub fn output(report: &Report, name: &str) -> String {
    let text = &report.files["GITHUB_OUTPUT"];
    let mut lines = text.lines();
    let value = lines
        .find(|line| line.starts_with(&format!("{name}<<")))
        .and_then(|_| lines.next());
    value
        .unwrap_or_else(|| panic!("no output `{name}` in:\n{text}\n{}", report.log))
        .to_owned()
}

/// What must hold however a job ends.
pub fn left_nothing(report: &Report) {
    assert_eq!(report.orphans, Vec::<String>::new(), "{}", report.log);
    assert!(!report.streams_held, "{}", report.log);
    let left: Vec<&String> = report
        .left_in_temp
        .iter()
        .filter(|name| name.contains("run-"))
        .collect();
    assert!(left.is_empty(), "{left:?}\n{}", report.log);
}

#[test]
fn a_cancelled_job_leaves_nothing_and_loses_nothing() {
    let cache = Cache::start(&["--private"]);
    let job = Job::new(&cache, "nix build --no-link -L path:.#slow");
    let report = job.step.cancel_when(|log| log.contains("slow has begun"));
    left_nothing(&report);
    assert_eq!(
        report.signals.len(),
        1,
        "the first signal was enough: {:?}",
        report.signals
    );
    assert!(
        report.to_end.unwrap() < Duration::from_secs(6),
        "{:?}",
        report.to_end
    );
    assert_ne!(report.code, 0);
    assert_eq!(output(&report, "outcome"), "cancelled");
    assert_eq!(output(&report, "lost"), "0", "{}", report.log);
    assert!(
        cache.names().contains(&"quick".to_owned()),
        "{:?}\n{}",
        cache.names(),
        report.log
    );
}

#[test]
fn a_cancelled_job_lists_what_a_silent_cache_did_not_take() {
    let mut cache = Cache::start(&[]);
    let through = crate::world::broken::forward(&cache.url);
    // Nix itself would wait a minute for the silent cache before it builds.
    let command = "nix build --no-link -L --option substitute false path:.#slow";
    let job = Job::new(&cache, command).with_env("ATTIC_SERVER", &through.url);
    let report = job.step.cancel_when(|log| {
        // From the moment the command runs nothing reaches the cache any more.
        if log.contains("attached") {
            through.cut();
        }
        log.contains("slow has begun")
    });
    left_nothing(&report);
    assert!(
        report.to_end.unwrap() < Duration::from_millis(7500),
        "{:?}",
        report.to_end
    );
    assert_eq!(output(&report, "outcome"), "cancelled");
    let lost: u32 = output(&report, "lost").parse().unwrap();
    let published: u32 = output(&report, "published").parse().unwrap();
    assert!(lost + published >= 1, "{}", report.log);
    if lost > 0 {
        let summary = &report.files["GITHUB_STEP_SUMMARY"];
        assert!(summary.contains("-quick") || published > 0, "{summary}");
    }
    cache.kill();
}

/// The signal comes while `nix flake check` runs for `require-flake-check`, and the cache is silent: the job ends as soon
/// as if the command had been stopped.
#[test]
fn a_job_that_is_cancelled_during_the_required_check_ends_soon() {
    let mut cache = Cache::start(&[]);
    let through = crate::world::broken::forward(&cache.url);
    let command = "nix build --no-link --option substitute false path:.#app";
    let job = Job::new(&cache, command)
        .with_env("ATTIC_SERVER", &through.url)
        .with_env("FLYWHEEL_REQUIRE_FLAKE_CHECK", "true");
    flake::write_slow_check(&job.step.workspace());
    let report = job.step.cancel_when(|log| {
        if log.contains("attached") {
            through.cut();
        }
        log.contains("`nix flake check` (`require-flake-check`)")
    });
    left_nothing(&report);
    assert_eq!(
        report.signals.len(),
        1,
        "{:?}\n{}",
        report.to_end,
        report.log
    );
    assert!(
        report.to_end.unwrap() < Duration::from_secs(6),
        "{:?}",
        report.to_end
    );
    assert!(
        report.log.contains("did not pass: it was cancelled"),
        "{}",
        report.log
    );
    cache.kill();
}

#[test]
fn a_killed_job_is_swept_by_the_next() {
    let cache = Cache::start(&["--private"]);
    let job = Job::new(&cache, "nix build --no-link -L path:.#slow");
    let mut killed = false;
    let report = job.step.run_and(|log, pid| {
        if !killed && log.contains("slow has begun") {
            killed = true;
            // The entry process is the namespace's shell until it has become the binary.
            processes::signal(i32::try_from(pid).unwrap(), Signal::KILL);
        }
        false
    });
    assert!(killed && report.code == 137, "{report:?}");
    let dead: Vec<&String> = report
        .left_in_temp
        .iter()
        .filter(|name| name.contains("run-"))
        .collect();
    assert!(
        !dead.is_empty(),
        "it was killed before it could remove anything: {report:?}"
    );

    let next = job.with_env("FLYWHEEL_COMMAND", "true");
    let report = next.step.run();
    assert_eq!(report.code, 0, "{}", report.log);
    left_nothing(&report);
}

#[test]
fn a_token_is_seen_nowhere() {
    let cache = Cache::start(&["--private"]);
    let command = r#"
        env >environment.txt
        cat /proc/self/environ >>environment.txt
        nix show-config | sed -n 's/^netrc-file = //p' >netrc-file.txt
        stat -c '%a %U' "$(cat netrc-file.txt)" "$(dirname "$(cat netrc-file.txt)")" >modes.txt
        cut -d' ' -f1-5 "$(cat netrc-file.txt)" >machine.txt
        nix build --no-link -L path:.#app
        nix build --no-link -L path:.#fails || true
    "#;
    let job =
        Job::new(&cache, command).with_env("GITHUB_TOKEN", "ghs_fetcher-credential-0123456789");
    let mut seen = Vec::new();
    let report = job.step.run_and(|_, _| {
        seen.extend(command_lines_with(&cache.token));
        false
    });
    assert_eq!(report.code, 0, "{}", report.log);
    left_nothing(&report);
    assert_eq!(seen, Vec::<String>::new(), "the token was an argument");
    let text = |name: &str| fs::read_to_string(job.step.workspace().join(name)).unwrap();
    assert!(
        !text("environment.txt").contains(&cache.token),
        "the token is in the command's environment"
    );
    assert!(
        !text("environment.txt").contains("FLYWHEEL_"),
        "our inputs are in the command's environment"
    );
    assert!(
        !text("environment.txt").contains("access-tokens = "),
        "a token is in `NIX_CONFIG`"
    );
    assert_eq!(text("modes.txt"), "600 root\n700 root\n");
    assert_eq!(
        text("machine.txt"),
        "machine 127.0.0.1 login attic password\n"
    );
    assert!(!Path::new(text("netrc-file.txt").trim()).exists());
    for (name, text) in &report.files {
        assert!(!text.contains(&cache.token), "the token is in {name}");
    }
    assert!(!report.log.contains(&cache.token));
    assert_eq!(output(&report, "lost"), "0");
    assert_eq!(output(&report, "published"), output(&report, "verified"));
    no_file_holds(
        &cache.token,
        &[
            &job.step.workspace(),
            &job.step.temp(),
            &job.nix,
            &job.step.folder().join("home"),
        ],
    );
}

fn command_lines_with(secret: &str) -> Vec<String> {
    let entries = fs::read_dir("/proc").unwrap().flatten();
    let lines = entries.filter_map(|entry| fs::read(entry.path().join("cmdline")).ok());
    let lines = lines.map(|bytes| String::from_utf8_lossy(&bytes).replace('\0', " "));
    lines.filter(|line| line.contains(secret)).collect()
}

fn no_file_holds(secret: &str, folders: &[&Path]) {
    let mut folders: Vec<PathBuf> = folders.iter().map(|folder| folder.to_path_buf()).collect();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            let kind = entry.file_type().unwrap();
            if kind.is_dir() {
                folders.push(entry.path());
            } else if kind.is_file() {
                let bytes = fs::read(entry.path()).unwrap();
                let found = bytes
                    .windows(secret.len())
                    .any(|window| window == secret.as_bytes());
                assert!(!found, "the token is in {}", entry.path().display());
            }
        }
    }
}

#[test]
fn out_of_memory_is_told_by_the_kernels_counters() {
    let cache = Cache::start(&[]);
    let group = MemoryGroup::new(64 << 20);
    // `tail` holds in memory what it may have to print, and prints nothing that names the cause of its end.
    let job = Job::new(&cache, "head -c 400M /dev/zero | tail -c 300M >/dev/null")
        .with_env("FLYWHEEL_HEAVY_LANE", "nix-heavy");
    let report = group.run(&job.step);
    assert_ne!(report.code, 0, "{}", report.log);
    assert_eq!(
        output(&report, "outcome"),
        "out-of-memory",
        "{}",
        report.log
    );
    assert!(
        report.files["GITHUB_STEP_SUMMARY"].contains("nix-heavy"),
        "{}",
        report.log
    );
    assert!(report.log.contains("64.0 MiB"), "{}", report.log);
    left_nothing(&report);
}

/// A memory control group (version 1, or 2 where that is what the host has) below our own.
pub struct MemoryGroup {
    folder: PathBuf,
}

impl MemoryGroup {
    /// Runs a step in it.
    pub fn run(&self, step: &Step) -> Report {
        let mut entered = false;
        step.run_and(|_, pid| {
            if !entered {
                entered = true;
                fs::write(self.folder.join("cgroup.procs"), pid.to_string()).unwrap();
            }
            false
        })
    }

    pub fn new(limit: u64) -> Self {
        let name = format!("flywheel-test-{}-{limit}", std::process::id());
        let (root, file) = match Path::new("/sys/fs/cgroup/memory").is_dir() {
            true => ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
            false => ("/sys/fs/cgroup", "memory.max"),
        };
        let folder = Path::new(root).join(name);
        fs::create_dir(&folder).expect(
            "the real suite runs as root, with a memory control group that it may write to",
        );
        fs::write(folder.join(file), limit.to_string()).unwrap();
        Self { folder }
    }
}

impl Drop for MemoryGroup {
    fn drop(&mut self) {
        // Its processes have ended; should one linger, the next boot takes care of it.
        let _ = fs::remove_dir(&self.folder);
    }
}

#[test]
fn two_jobs_on_one_host_do_not_publish_each_others_work() {
    let (mine, theirs) = (Cache::start(&[]), Cache::start(&[]));
    let job = Job::new(&mine, "nix build --no-link -L path:.#app");
    let other = Job::new(&theirs, "nix build --no-link -L path:.#slow");
    // One user for both, whose folder has the journals and the registry of jobs.
    let user = tempfile::tempdir().unwrap();
    let journal = user.path().join("journal");
    let journal = journal.to_str().unwrap();
    let job = job.with_env("FLYWHEEL_JOURNAL", journal);
    let other = other.with_env("FLYWHEEL_JOURNAL", journal);
    // One store for both; the other one's build goes on while this one's job begins and ends.
    fs::create_dir_all(&job.nix).unwrap();
    let step = other.step.with_nix(&job.nix);
    let report = step.cancel_when(|log| {
        log.contains("slow has begun") && {
            let report = job.step.run();
            assert_eq!(report.code, 0, "{}", report.log);
            assert_eq!(output(&report, "built"), "3", "{}", report.log);
            true
        }
    });
    assert_eq!(output(&report, "outcome"), "cancelled");
    assert!(
        theirs.names().contains(&"quick".to_owned()),
        "{:?}\n{}",
        theirs.names(),
        report.log
    );
    assert!(mine.names().contains(&"app".to_owned()));
    for (cache, strangers) in [(&mine, ["quick", "slow"]), (&theirs, ["app", "lib"])] {
        for stranger in strangers {
            assert!(
                !cache.names().contains(&stranger.to_owned()),
                "{stranger} in {:?}",
                cache.names()
            );
        }
    }
}

#[test]
fn the_runners_own_settings_and_folder_are_kept() {
    let cache = Cache::start(&[]);
    let job = Job::new(
        &cache,
        "pwd\nnix show-config | grep -E '^(cores|max-jobs|substituters) '",
    )
    .with_env("NIX_CONFIG", "cores = 3\nmax-jobs = 2")
    .with_env("FLYWHEEL_EXTRA_NIX_CONFIG", "max-jobs = 5")
    .with_env("FLYWHEEL_WORKING_DIRECTORY", "bin");
    let report = job.step.run();
    assert_eq!(report.code, 0, "{}", report.log);
    let log = &report.log;
    assert!(
        log.contains("cores = 3") && log.contains("max-jobs = 5"),
        "{log}"
    );
    assert!(log.contains(&format!("{}/main", cache.url)), "{log}");
    assert!(log.lines().any(|line| line.ends_with("/work/bin")), "{log}");
}

#[test]
fn several_lines_run_in_one_shell() {
    let cache = Cache::start(&[]);
    let job = Job::new(
        &cache,
        "set -u\nfor n in 1 2; do\n  echo \"line $n\"\ndone\nexit 5",
    );
    let report = job.step.run();
    assert_eq!(report.code, 5, "{}", report.log);
    assert!(report.log.contains("line 1\nline 2\n"), "{}", report.log);
}
