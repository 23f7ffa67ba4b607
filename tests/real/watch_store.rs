//! `watch-store` over several steps with real Nix: what it leaves behind, which paths it publishes, and what the
//! next job takes up.

mod background;
mod behind_daemon;
mod killed;
mod laptop;
mod neighbours;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::world::act::Caller;
use crate::world::cache::Cache;
use crate::world::{PATH, flake, flywheel, folders, need, processes, with_private_nix};

/// A runner host: a store and a home that outlive its jobs.
struct Host {
    folder: tempfile::TempDir,
}

/// A job of several steps on a host, on a push to the default branch.
struct Job<'a> {
    host: &'a Host,
    cache: &'a Cache,
    tracking: String,
    folder: PathBuf,
}

impl Host {
    fn new() -> Self {
        need("nix", "apt-get install nix-bin");
        let folder = tempfile::tempdir().unwrap();
        for name in ["home", "nix"] {
            fs::create_dir(folder.path().join(name)).unwrap();
        }
        Self { folder }
    }

    fn job<'a>(&'a self, cache: &'a Cache) -> Job<'a> {
        let tracking = format!("github_{:032x}", fastrand::u128(..));
        let folder = self.folder.path().join(&tracking);
        for name in ["work", "temp"] {
            fs::create_dir_all(folder.join(name)).unwrap();
        }
        flake::write(&folder.join("work"));
        let repository = json!({ "full_name": "octo-org/app", "default_branch": "main" });
        let payload = json!({
            "ref": "refs/heads/main", "after": "1".repeat(40), "deleted": false, "repository": repository
        });
        fs::write(folder.join("event.json"), payload.to_string()).unwrap();
        fs::write(folder.join("env"), "").unwrap();
        Job {
            host: self,
            cache,
            tracking,
            folder,
        }
    }

    fn journals(&self) -> usize {
        let folder = self.folder.path().join("state/flywheel/journal");
        let names = fs::read_dir(folder).into_iter().flatten().flatten();
        names
            .filter(|entry| entry.file_name().to_string_lossy().ends_with(".journal"))
            .count()
    }
}

impl Job<'_> {
    /// A step, with the variables that stand in `GITHUB_ENV` so far.
    fn step(&self, program: &Path, arguments: &[&str]) -> Command {
        let mut command = with_private_nix(&self.host.folder.path().join("nix"), program);
        folders::isolate(&mut command, self.host.folder.path())
            .args(arguments)
            .current_dir(self.folder.join("work"))
            .env("PATH", PATH)
            .env("RUNNER_TEMP", self.folder.join("temp"))
            .env("RUNNER_TRACKING_ID", &self.tracking);
        command
            .env("GITHUB_ACTIONS", "true")
            .env("CI", "true")
            .env("GITHUB_EVENT_NAME", "push");
        command
            .env("GITHUB_REF", "refs/heads/main")
            .env("GITHUB_REPOSITORY", "octo-org/app");
        command.env("GITHUB_EVENT_PATH", self.folder.join("event.json"));
        command
            .env("ATTIC_SERVER", &self.cache.url)
            .env("ATTIC_PUBLIC_KEY", &self.cache.key);
        for name in [
            "GITHUB_ENV",
            "GITHUB_OUTPUT",
            "GITHUB_STEP_SUMMARY",
            "GITHUB_PATH",
        ] {
            let file = name.trim_start_matches("GITHUB_").to_lowercase();
            command.env(name, self.folder.join(file));
        }
        command.envs(self.variables());
        command
    }

    /// The variables in the file behind `GITHUB_ENV`.
    fn variables(&self) -> Vec<(String, String)> {
        let text = fs::read_to_string(self.folder.join("env")).unwrap();
        let mut lines = text.lines();
        let mut found = Vec::new();
        while let Some(line) = lines.next() {
            let (name, delimiter) = line.split_once("<<").unwrap();
            let value: Vec<&str> = lines
                .by_ref()
                .take_while(|line| *line != delimiter)
                .collect();
            found.push((name.to_owned(), value.join("\n")));
        }
        found
    }

    fn watch(&self, words: &[&str]) -> Output {
        let mut command = self.step(&flywheel(), &[&["watch-store"], words].concat());
        command
            .env("ATTIC_TOKEN", &self.cache.token)
            .env("FLYWHEEL_PUSH_CACHE", "auto")
            .output()
            .unwrap()
    }

    fn start(&self) -> String {
        good(&self.watch(&["start"]))
    }

    fn nix(&self, arguments: &[&str]) -> Output {
        self.step(&need("nix", "apt-get install nix-bin"), arguments)
            .output()
            .unwrap()
    }

    fn output(&self, name: &str) -> String {
        let text = fs::read_to_string(self.folder.join("output")).unwrap();
        let mut lines = text.lines();
        let line = lines.find(|line| line.starts_with(&format!("{name}<<")));
        line.and_then(|_| lines.next())
            .unwrap_or_else(|| panic!("no `{name}` in:\n{text}"))
            .to_owned()
    }

    fn status(&self) -> Value {
        serde_json::from_str(&good(&self.watch(&["status", "--format", "json"]))).unwrap()
    }

    fn mark(&self) -> String {
        format!("RUNNER_TRACKING_ID={}", self.tracking)
    }

    /// What the runner does at a job's end.
    fn end(&self) -> usize {
        processes::kill_with_variable(&self.mark()).len()
    }
}

impl Drop for Job<'_> {
    fn drop(&mut self) {
        self.end();
    }
}

fn good(output: &Output) -> String {
    let text = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(output.status.success(), "{text}");
    let shown: Vec<&str> = text
        .lines()
        .filter(|line| !line.starts_with("::add-mask::"))
        .collect();
    shown.join("\n")
}

#[test]
fn a_job_of_several_steps_is_published_and_nothing_is_left() {
    let (host, cache) = (Host::new(), Cache::start(&["--private"]));
    let job = host.job(&cache);
    let began = Instant::now();
    let printed = job.start();
    // A debug build on a busy machine; what is promised is a second.
    assert!(
        began.elapsed() < Duration::from_secs(4),
        "{:?}\n{printed}",
        began.elapsed()
    );
    assert!(printed.contains("trust: may-publish"), "{printed}");
    let status = job.status();
    assert_eq!(
        (&status["state"], &status["publishes"]),
        (&json!("watching"), &json!(true)),
        "{status}"
    );
    job.check_daemon(i32::try_from(status["pid"].as_u64().unwrap()).unwrap());
    let config = job
        .variables()
        .into_iter()
        .find(|(name, _)| name == "NIX_CONFIG")
        .unwrap()
        .1;
    // What is about the cache is in a file that goes with the process.
    let file = config
        .lines()
        .find_map(|line| line.strip_prefix("!include "))
        .filter(|file| file.starts_with("/proc/"))
        .unwrap_or_else(|| panic!("{config}"));
    let of_cache = fs::read_to_string(file).unwrap();
    assert!(of_cache.contains("extra-substituters"), "{of_cache}");
    for text in [&config, &of_cache] {
        assert!(!text.contains(&cache.token), "{text}");
    }
    assert!(!job.watch(&["start"]).status.success(), "one watch a job");

    good(&job.nix(&["build", "--no-link", "path:.#app"]));
    let came = processes::wait_until(Duration::from_secs(20), || {
        cache.names().contains(&"app".to_owned())
    });
    assert!(
        came,
        "it publishes while the job goes on: {:?}",
        job.status()
    );
    assert!(
        !job.nix(&["build", "--no-link", "path:.#fails"])
            .status
            .success()
    );

    let printed = good(&job.watch(&["finish"]));
    job.check_finished(&printed);
    job.check_nothing_is_left();
    assert!(!printed.contains(&cache.token), "the token is shown");
}

impl Job<'_> {
    /// The process in the background is a daemon that the runner can find, and that does not show the token.
    fn check_daemon(&self, pid: i32) {
        let session = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        let fields: Vec<&str> = session
            .rsplit_once(')')
            .unwrap()
            .1
            .split_whitespace()
            .collect();
        assert_eq!(fields[3], pid.to_string(), "it leads a session of its own");
        let environment = fs::read_to_string(format!("/proc/{pid}/environ")).unwrap();
        assert!(
            environment.contains(&self.mark()),
            "it does not hide from the runner"
        );
        assert!(
            !environment.contains(&self.cache.token),
            "the token is in its environment"
        );
    }

    /// All that was built is published and verified, what a failing build needed included.
    fn check_finished(&self, printed: &str) {
        assert!(printed.contains("0 lost"), "{printed}");
        assert_eq!(
            (
                self.output("outcome").as_str(),
                self.output("lost").as_str()
            ),
            ("success", "0"),
            "{printed}"
        );
        assert_eq!(self.output("built"), "4", "{printed}");
        assert_eq!(
            self.output("published"),
            self.output("verified"),
            "{printed}"
        );
        let names = self.cache.names();
        for name in ["base", "lib", "app", "good"] {
            assert!(names.contains(&name.to_owned()), "{name}: {names:?}");
        }
    }

    /// No process, no file, no journal and no variable of the watch is there any more, and no file has the token.
    fn check_nothing_is_left(&self) {
        // The daemon ends by itself once `finish` has its answer.
        let gone = processes::wait_until(Duration::from_secs(5), || {
            processes::with_variable(&self.mark()).is_empty()
        });
        assert!(gone, "{:?}", processes::with_variable(&self.mark()));
        let temp = fs::read_dir(self.folder.join("temp/flywheel-0"))
            .unwrap()
            .flatten();
        let names: Vec<_> = temp.map(|entry| entry.file_name()).collect();
        assert!(names.is_empty(), "{names:?}");
        assert_eq!(self.host.journals(), 0);
        assert_eq!(
            self.variables().last().unwrap(),
            &("NIX_CONFIG".to_owned(), String::new()),
            "given back"
        );
        for file in ["env", "output", "step_summary"] {
            let text = fs::read_to_string(self.folder.join(file)).unwrap();
            assert!(!text.contains(&self.cache.token), "the token is in {file}");
        }
    }
}

/// The action as the documentation uses it, under act.
#[test]
fn a_workflow_of_many_steps_publishes_with_start_and_finish() {
    let workflow = r"
on: push
jobs:
  build:
    runs-on: ubuntu-latest
    steps:
      - uses: actions/checkout@v4
      - uses: octo-org/flywheel/actions/watch-store@main
        env:
          ATTIC_TOKEN: ${{ secrets.ATTIC_TOKEN || '' }}
        with:
          mode: start
          push-cache: auto
      - run: nix build .#lib
      - run: nix build .#fails
      - if: always()
        id: watch
        uses: octo-org/flywheel/actions/watch-store@main
        with:
          mode: finish
";
    let cache = Cache::start(&["--private"]);
    let caller = Caller::new(workflow)
        .with_flake(flake::FLAKE)
        .with_secret("ATTIC_TOKEN", &cache.token)
        .with_env("ATTIC_SERVER", &cache.url)
        .with_env("ATTIC_PUBLIC_KEY", &cache.key);
    let ran = caller.run(&caller.push("refs/heads/main"));
    assert_ne!(ran.code, 0, "the failing step fails the job");
    assert_eq!(ran.left_processes, Vec::<String>::new(), "{}", ran.log());
    let step = ran.step("build", "watch");
    assert_eq!(
        step.outputs.get("outcome").map(String::as_str),
        Some("success"),
        "{}",
        ran.log()
    );
    assert_eq!(
        (
            step.outputs["built"].as_str(),
            step.outputs["lost"].as_str()
        ),
        ("3", "0"),
        "{}",
        ran.log()
    );
    for name in ["base", "lib", "good"] {
        assert!(
            cache.names().contains(&name.to_owned()),
            "{name}: {:?}",
            cache.names()
        );
    }
    assert!(!ran.log().contains(&cache.token));
}

#[test]
fn what_is_left_is_no_business_of_readers_and_of_other_caches() {
    let (host, cache) = (Host::new(), Cache::start(&[]));
    // The cache goes away, so that nothing is published; its address is the same for both jobs.
    let through = crate::world::broken::forward(&cache.url);
    let job = host.job(&cache);
    let start = |job: &Job<'_>, url: &str| {
        let mut step = job.step(
            &flywheel(),
            &[
                "watch-store",
                "start",
                "--attic-server",
                url,
                "--push-cache",
                "auto",
            ],
        );
        good(&step.env("ATTIC_TOKEN", &cache.token).output().unwrap())
    };
    start(&job, &through.url);
    through.cut();
    good(&job.nix(&[
        "build",
        "--no-link",
        "path:.#app",
        "--option",
        "substitute",
        "false",
    ]));
    let seen = processes::wait_until(Duration::from_secs(20), || {
        job.status()["known"].as_u64() >= Some(3)
    });
    assert!(seen, "{}", job.status());
    assert!(job.end() >= 1, "the runner ends it");
    assert!(!cache.names().contains(&"app".to_owned()));
    assert_eq!(host.journals(), 1);

    // A job that may not publish lets it be, and so does one of another cache.
    let reader = host.job(&cache);
    let mut step = reader.step(&flywheel(), &["nix-job", "--command", "true"]);
    good(&step.env("ATTIC_TOKEN", &cache.token).output().unwrap());
    assert_eq!(
        (host.journals(), cache.names().contains(&"app".to_owned())),
        (1, false)
    );
    let other = Cache::start(&[]);
    let elsewhere = host.job(&other);
    let mut step = elsewhere.step(
        &flywheel(),
        &["nix-job", "--push-cache", "true", "--command", "true"],
    );
    good(&step.env("ATTIC_TOKEN", &other.token).output().unwrap());
    assert_eq!((host.journals(), other.names()), (1, Vec::<String>::new()));
}

#[test]
fn run_in_the_foreground_ends_within_six_seconds() {
    let (host, cache) = (Host::new(), Cache::start(&[]));
    let job = host.job(&cache);
    let mut run = job.step(&flywheel(), &["watch-store", "run", "--push-cache", "auto"]);
    let run = run
        .env("ATTIC_TOKEN", &cache.token)
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let mut child = run.spawn().unwrap();
    let watching = || job.status()["state"] == "watching";
    assert!(processes::wait_until(Duration::from_secs(20), watching));
    // What `run` knows of Nix's settings reaches no later step before it ends.
    let mut build = job.step(
        &need("nix", "apt-get install nix-bin"),
        &["build", "--no-link", "path:.#app"],
    );
    let config = "experimental-features = nix-command flakes\nbuild-users-group =\nsubstituters =";
    good(&build.env("NIX_CONFIG", config).output().unwrap());
    let began = Instant::now();
    processes::signal(i32::try_from(child.id()).unwrap(), Signal::TERM);
    let ended = processes::ended(&mut child, Duration::from_secs(7)).expect("it ends");
    assert!(
        ended.success() && began.elapsed() < Duration::from_secs(6),
        "{ended} {:?}",
        began.elapsed()
    );
    assert!(
        cache.names().contains(&"app".to_owned()),
        "{:?}",
        cache.names()
    );
    assert_eq!(job.output("lost"), "0");
}

/// `finish` is cancelled while the background process runs `nix flake check` for `require-flake-check`.
#[test]
fn a_finish_that_is_cancelled_during_the_required_check_ends_soon() {
    let (host, cache) = (Host::new(), Cache::start(&[]));
    let through = crate::world::broken::forward(&cache.url);
    let job = host.job(&cache);
    flake::write_slow_check(&job.folder.join("work"));
    let watch = |words: &[&str]| {
        let mut step = job.step(&flywheel(), &[&["watch-store"], words].concat());
        step.env("ATTIC_TOKEN", &cache.token)
            .env("FLYWHEEL_REQUIRE_FLAKE_CHECK", "true");
        step
    };
    let mut start = watch(&["start", "--push-cache", "auto"]);
    start.env("ATTIC_SERVER", &through.url);
    good(&start.output().unwrap());
    through.cut();
    let build = ["build", "--no-link", "path:.#app"];
    good(&job.nix(&[&build[..], &["--option", "substitute", "false"]].concat()));
    let mut finish = watch(&["finish"]);
    let mut finish = finish.stdout(Stdio::piped()).spawn().unwrap();
    let checks = processes::wait_until(Duration::from_secs(20), || {
        processes::with_variable(&job.mark())
            .iter()
            .any(|process| process.command_line.contains("flake check"))
    });
    assert!(checks, "{}", job.status());
    let began = Instant::now();
    processes::signal(i32::try_from(finish.id()).unwrap(), Signal::INT);
    let ended = processes::ended(&mut finish, Duration::from_secs(7)).expect("it ends");
    let took = began.elapsed();
    let printed = std::io::read_to_string(finish.stdout.take().unwrap()).unwrap();
    assert!(
        ended.success() && took < Duration::from_secs(6),
        "{ended} {took:?}\n{printed}"
    );
    let said = "did not pass: it was cancelled";
    assert!(printed.contains(said), "{printed}");
    assert_eq!(job.output("published"), "0", "{printed}");
}

#[test]
fn a_drain_that_takes_too_long_names_what_is_lost_and_the_next_job_takes_it_up() {
    let (host, cache) = (Host::new(), Cache::start(&[]));
    let through = crate::world::broken::forward(&cache.url);
    let job = host.job(&cache);
    let watch = |job: &Job<'_>, words: &[&str]| {
        let mut step = job.step(&flywheel(), &[&["watch-store"], words].concat());
        step.env("ATTIC_TOKEN", &cache.token).output().unwrap()
    };
    let start = ["start", "--attic-server", &through.url];
    good(&watch(
        &job,
        &[&start[..], &["--push-cache", "auto"]].concat(),
    ));
    through.cut();
    good(&job.nix(&[
        "build",
        "--no-link",
        "path:.#app",
        "--option",
        "substitute",
        "false",
    ]));
    let began = Instant::now();
    let finish = ["finish", "--drain-timeout", "2"];
    let finished = watch(
        &job,
        &[&finish[..], &["--require-publish", "true"]].concat(),
    );
    assert!(
        began.elapsed() < Duration::from_secs(8),
        "{:?}",
        began.elapsed()
    );
    let printed = String::from_utf8_lossy(&finished.stdout).into_owned();
    assert_eq!(finished.status.code(), Some(1), "{printed}");
    assert!(
        printed.contains("title=lost::") && printed.contains("-app"),
        "{printed}"
    );
    assert_eq!(job.output("outcome"), "not-published");
    assert_eq!(
        (host.journals(), cache.names().contains(&"app".to_owned())),
        (1, false)
    );

    // The identity of a cache is its address; the same one, alive again.
    through.mend();
    let next = host.job(&cache);
    let printed = good(&publish_to(&next, &through.url));
    assert!(
        printed.contains("of earlier jobs taken up") && cache.names().contains(&"app".to_owned()),
        "{printed}"
    );
    assert_eq!((host.journals(), next.output("lost")), (0, "0".to_owned()));
}

/// A `nix-job` that builds nothing itself, with a permit for the cache at `url`.
fn publish_to(job: &Job<'_>, url: &str) -> Output {
    let words = [
        "nix-job",
        "--attic-server",
        url,
        "--push-cache",
        "true",
        "--command",
        "true",
    ];
    job.step(&flywheel(), &words)
        .env("ATTIC_TOKEN", &job.cache.token)
        .output()
        .unwrap()
}

/// Fifty quick outputs, one after the other, so that a kill hits in the middle.
fn chain(seed: u64) -> String {
    format!(
        r#"let
  path = n: derivation {{
    name = "kill-{seed}-${{toString n}}"; system = builtins.currentSystem; builder = "/bin/sh";
    args = [ "-c" "echo ${{if n == 0 then "" else path (n - 1)}} > $out" ];
  }};
in path 50"#
    )
}

/// The watch is killed with `kill -9` at a random moment of a build, the build with it; the next job,
/// which builds nothing, publishes all that was valid by then.
#[test]
fn killed_at_any_moment_the_next_job_loses_nothing() {
    let kills: u64 =
        std::env::var("FLYWHEEL_KILLS").map_or(25, |text| text.parse().expect("a number"));
    let (host, cache) = (Host::new(), Cache::start(&[]));
    let nix = need("nix-build", "apt-get install nix-bin");
    let (mut published_early, mut taken_up) = (0, 0);
    for seed in 0..kills {
        let job = host.job(&cache);
        job.start();
        let pid = i32::try_from(job.status()["pid"].as_u64().unwrap()).unwrap();
        let chain = chain(seed);
        let mut build = job.step(
            &nix,
            &[
                "--no-out-link",
                "--option",
                "sandbox",
                "false",
                "-E",
                &chain,
            ],
        );
        let mut build = build
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let moment = Duration::from_millis(fastrand::u64(100..1500));
        let over = Instant::now() + moment;
        processes::wait_until(moment, || Instant::now() >= over);
        processes::signal(pid, Signal::KILL);
        job.end();
        let _ = build.wait();
        let before = cache.names();
        let valid = names_in_store(&host, seed);

        let next = host.job(&cache);
        let mut step = next.step(
            &flywheel(),
            &["nix-job", "--push-cache", "true", "--command", "true"],
        );
        let printed = good(&step.env("ATTIC_TOKEN", &cache.token).output().unwrap());
        let served = cache.names();
        for name in &valid {
            assert!(
                served.contains(name),
                "kill {seed} after {moment:?}: {name} is lost\n{printed}"
            );
        }
        assert_eq!(next.output("lost"), "0", "{printed}");
        published_early += valid.iter().filter(|name| before.contains(name)).count();
        taken_up += valid.iter().filter(|name| !before.contains(name)).count();
        assert_eq!(host.journals(), 0, "kill {seed}");
    }
    println!(
        "{kills} kills: {published_early} paths published before, {taken_up} taken up, none lost"
    );
    assert!(
        published_early + taken_up > 0,
        "every kill came before the first path"
    );
}

/// The valid paths of one build, by name, as Nix's database has them.
fn names_in_store(host: &Host, seed: u64) -> Vec<String> {
    let file = host.folder.path().join("nix/var/nix/db/db.sqlite");
    let db =
        rusqlite::Connection::open_with_flags(file, rusqlite::OpenFlags::SQLITE_OPEN_READ_ONLY)
            .unwrap();
    let mut rows = db
        .prepare("select path from ValidPaths where path like ?1 and path not like '%.drv'")
        .unwrap();
    let names = rows
        .query_map([format!("%-kill-{seed}-%")], |row| row.get::<_, String>(0))
        .unwrap();
    names
        .map(|path| path.unwrap()["/nix/store/".len() + 33..].to_owned())
        .collect()
}
