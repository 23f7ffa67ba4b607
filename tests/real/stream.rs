//! Publishing while the build runs, under everything that goes wrong on a real host: another job's flood,
//! servers that fail, stores that change underfoot. Each path ends published and verified, or named.

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::json;

use crate::faults::{Fault, Plan, When};
use crate::world::cache::Cache;
use crate::world::runner::{Report, Step};
use crate::world::{PATH, flywheel, folders, need, processes, with_private_nix};

/// Derivations that take no time, and some that are hard to publish.
const FLAKE: &str = r#"{
  outputs = { self }: let
    system = "x86_64-linux";
    bin = builtins.path { path = ./bin; name = "bin"; };
    more = extra: name: script: derivation ({
      inherit name system;
      builder = "${bin}/busybox";
      args = [ "sh" "-euc" script ];
    } // extra);
    run = more { };
    parts = prefix: count: builtins.genList (n: run "${prefix}-${toString n}" "echo $name > $out") count;
    all = name: paths: run name "echo ${toString paths} > $out";
    chain = prefix: count: builtins.foldl' (last: n: run "${prefix}-${toString n}" "echo ${toString last} > $out") "" (builtins.genList (n: n) count);
    noise = name: run name "${bin}/busybox dd if=/dev/urandom of=$out bs=1M count=3";
    begun = all "begun" (parts "begun" 4);
    long = run "long" "echo ${begun}; echo 'now kill it'; ${bin}/busybox sleep 4; echo long > $out";
    good = run "good" "echo good > $out";
    addressed = { __contentAddressed = true; outputHashMode = "recursive"; outputHashAlgo = "sha256"; };
    floating = more addressed "floating" "echo floating > $out";
  in {
    packages.${system} = {
      many = all "many" (parts "part" 500);
      some = all "some" (parts "some" 12 ++ [ (noise "noise") ]);
      fails = run "fails" "echo ${good}; exit 1";
      inherit long;
      once = run "once" "echo once > $out";
      floating = all "on-floating" [ floating ];
      chain = chain "link" 6;
      sources = all "on-sources" [ (run "source" "echo 1 > $out") (run "mypkg-source" "echo 2 > $out") ];
      unseen = all "unseen" (parts "hidden" 3);
    };
  };
}
"#;

/// A host with a store of its own, whose jobs push to one server.
struct Host {
    folder: tempfile::TempDir,
    token: String,
    key: String,
}

impl Host {
    fn new(cache: &Cache) -> Self {
        need("nix", "apt-get install nix-bin");
        let folder = tempfile::tempdir().unwrap();
        Self {
            folder,
            token: cache.token.clone(),
            key: cache.key.clone(),
        }
    }

    fn nix(&self) -> PathBuf {
        self.folder.path().join("nix")
    }

    /// A job on a push to the default branch.
    fn job(&self, server: &str, command: &str) -> Step {
        let step =
            Step::new(&format!("exec '{}' nix-job", flywheel().display())).with_nix(&self.nix());
        fs::write(step.workspace().join("flake.nix"), FLAKE).unwrap();
        fs::create_dir_all(step.workspace().join("bin")).unwrap();
        let busybox = need("busybox", "apt-get install busybox-static");
        fs::copy(busybox, step.workspace().join("bin/busybox")).unwrap();
        let repository = json!({ "full_name": "octo-org/app", "default_branch": "main" });
        let payload = json!({ "ref": "refs/heads/main", "after": "1".repeat(40), "deleted": false, "repository": repository });
        let event = step.folder().join("event.json");
        fs::write(&event, payload.to_string()).unwrap();
        step.with_env("GITHUB_EVENT_NAME", "push")
            .with_env("GITHUB_REF", "refs/heads/main")
            .with_env("GITHUB_REPOSITORY", "octo-org/app")
            .with_env("GITHUB_EVENT_PATH", event.to_str().unwrap())
            .with_env("ATTIC_SERVER", server)
            .with_env("ATTIC_PUBLIC_KEY", &self.key)
            .with_env("ATTIC_TOKEN", &self.token)
            .with_env("FLYWHEEL_PUSH_CACHE", "true")
            .with_env("NIX_CONFIG", "substituters =")
            .with_env(
                "FLYWHEEL_EXTRA_NIX_CONFIG",
                "sandbox = false\nmax-jobs = 4\nextra-experimental-features = ca-derivations",
            )
            .with_env("FLYWHEEL_COMMAND", command)
    }

    /// Another job's Nix on this host: a script, until it is killed.
    fn stranger(&self, script: &str) -> Stranger {
        let shell = need("sh", "apt-get install dash");
        let mut command: Command = with_private_nix(&self.nix(), &shell);
        let home = self.folder.path().join("stranger");
        fs::create_dir_all(&home).unwrap();
        folders::isolate(&mut command, &home)
            .args(["-euc", script])
            .current_dir(&home)
            .env("PATH", PATH);
        command.env(
            "NIX_CONFIG",
            "build-users-group =\nsubstituters =\nsandbox = false",
        );
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::inherit());
        Stranger {
            child: command.spawn().unwrap(),
        }
    }
}

struct Stranger {
    child: Child,
}

impl Drop for Stranger {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn output(report: &Report, name: &str) -> u64 {
    let text = &report.files["GITHUB_OUTPUT"];
    let mut lines = text.lines();
    let value = lines
        .find(|line| line.starts_with(&format!("{name}<<")))
        .and_then(|_| lines.next());
    value
        .and_then(|value| value.parse().ok())
        .unwrap_or_else(|| panic!("no `{name}` in:\n{text}\n{}", report.log))
}

/// The build's result is its own, and nothing is lost.
fn is_whole(report: &Report, code: i32) {
    assert_eq!(report.code, code, "{}", report.log);
    assert_eq!(output(report, "lost"), 0, "{}", report.log);
    assert!(
        output(report, "verified") >= output(report, "published"),
        "{}",
        report.log
    );
    assert!(!report.log.contains("not verified"), "{}", report.log);
}

const DELETED: &str = "it was deleted from the store before it could be sent";

const UNREALISED: &str = "its content is in the cache and its realisation is not";

/// The same, where the job itself deletes paths, perhaps before they could be sent, or builds content-addressed ones:
/// then each is named.
fn is_whole_but_for_the_named(report: &Report, code: i32) {
    assert_eq!(report.code, code, "{}", report.log);
    let lost = |line: &&str| line.starts_with("::warning title=lost::");
    let deleted = report.log.lines().filter(lost);
    let deleted = deleted.filter(|line| line.ends_with(DELETED) || line.contains(UNREALISED));
    assert_eq!(
        output(report, "lost"),
        deleted.count() as u64,
        "{}",
        report.log
    );
}

fn build(attribute: &str) -> String {
    format!("nix build --no-link path:.#{attribute}")
}

fn runs(name: &str, default: u32) -> u32 {
    std::env::var(name)
        .ok()
        .and_then(|count| count.parse().ok())
        .unwrap_or(default)
}

/// The flood: derivations, texts and files, from processes short and long.
const FLOOD: &str = r#"
    i=0
    while :; do
      i=$((i+1))
      nix-instantiate -E "builtins.genList (n: builtins.toFile \"flood-$i-\${toString n}\" \"$i\") 40" --eval --strict >/dev/null
      echo "$i" >flood-file
      nix-store --add flood-file >/dev/null
      nix-build --no-out-link -E "derivation { name = \"flood-built-$i\"; system = builtins.currentSystem; builder = \"/bin/sh\"; args = [ \"-c\" \"echo $i > \$out\" ]; }" >/dev/null 2>&1
    done
"#;

#[test]
fn five_hundred_paths_in_a_flood_of_others_are_all_published() {
    for run in 1..=runs("FLYWHEEL_RUNS", 2) {
        let cache = Cache::start(&[]);
        let host = Host::new(&cache);
        fs::create_dir_all(host.nix()).unwrap();
        let flood = host.stranger(FLOOD);
        // The flood's jobs do not use Flywheel, so that nothing but the input shows that they are there.
        let job = host.job(&cache.url, &build("many"));
        let report = job.with_env("FLYWHEEL_SHARED_HOST", "true").run();
        drop(flood);
        is_whole(&report, 0);
        assert!(output(&report, "ambiguous") > 50, "{}", report.log);
        assert!(
            !report.log.contains("0 lost"),
            "whose they are is not known"
        );
        let names = cache.names();
        let strangers: Vec<&String> = names
            .iter()
            .filter(|name| name.starts_with("flood"))
            .collect();
        assert_eq!(strangers, Vec::<&String>::new(), "run {run}");
        for part in 0..500 {
            assert!(
                names.contains(&format!("part-{part}")),
                "run {run}: part-{part} is missing\n{}",
                report.log
            );
        }
        assert!(names.contains(&"many".to_owned()), "run {run}");
        assert_eq!(output(&report, "built"), 501, "run {run}: {}", report.log);
        let flooded = fs::read_dir(host.nix().join("store")).unwrap().flatten();
        let flooded = flooded
            .filter(|entry| entry.file_name().to_string_lossy().contains("-flood-"))
            .count();
        println!(
            "run {run}: {} published, {flooded} strangers beside",
            output(&report, "published")
        );
        assert!(flooded > 50, "the flood was none: {flooded}");
    }
}

#[test]
fn a_server_that_fails_costs_time_and_no_path() {
    let cache = Cache::start(&[]);
    let address = cache.url.trim_start_matches("http://").parse().unwrap();
    // Publishing alone: Nix 2.8 ends a build by itself when a substituter answers 500 twice running.
    let faults = [
        (
            "500 to every third",
            Plan::new().fault("P", When::Every(3), Fault::Status(500)),
        ),
        (
            "429",
            Plan::new().fault("PUT", When::First(2), Fault::RetryAfter(1)),
        ),
        (
            "body cut in half",
            Plan::new().fault("PUT", When::Every(3), Fault::CutBody),
        ),
        (
            "answer cut",
            Plan::new().fault("PUT", When::Every(3), Fault::CutAnswer),
        ),
        (
            "slow",
            Plan::new().fault("", When::Always, Fault::Slow(Duration::from_millis(100))),
        ),
        (
            "closed questions",
            Plan::new().fault("POST", When::First(3), Fault::Close),
        ),
    ];
    for (name, plan) in faults {
        let front = plan.before(address);
        let host = Host::new(&cache);
        let begun = Instant::now();
        // Each time other paths, because the cache keeps what it has.
        let seed = format!(
            "sed -i 's/echo \\$/echo {} $/' flake.nix; {}",
            name.replace(' ', "-"),
            build("some")
        );
        let report = host.job(&front.url(), &seed).run();
        println!(
            "{name}: {:?}, {} published, {} requests",
            begun.elapsed(),
            output(&report, "published"),
            front.requests().len()
        );
        is_whole(&report, 0);
        assert!(output(&report, "published") >= 13, "{name}: {}", report.log);
        assert!(
            begun.elapsed() < Duration::from_secs(30),
            "{name}: {:?}",
            begun.elapsed()
        );
    }
}

#[test]
fn a_server_that_never_answers_is_named_in_bounded_time() {
    let cache = Cache::start(&[]);
    let address = cache.url.trim_start_matches("http://").parse().unwrap();
    let front = Plan::new()
        .fault("PUT", When::Always, Fault::Hang)
        .before(address);
    let host = Host::new(&cache);
    let begun = Instant::now();
    let report = host
        .job(&front.url(), &build("some"))
        .with_env("FLYWHEEL_DRAIN_TIMEOUT", "3")
        .run();
    assert_eq!(report.code, 0, "{}", report.log);
    assert!(
        begun.elapsed() < Duration::from_secs(15),
        "{:?}",
        begun.elapsed()
    );
    assert!(output(&report, "lost") >= 13, "{}", report.log);
    assert!(
        report.files["GITHUB_STEP_SUMMARY"].contains("-some-11"),
        "{}",
        report.files["GITHUB_STEP_SUMMARY"]
    );
}

/// In real time: whatever `drain-timeout` allows, a server that hangs after the probe costs 35 s at most.
#[test]
fn a_server_that_hangs_after_the_probe_costs_half_a_minute() {
    let cache = Cache::start(&[]);
    let address = cache.url.trim_start_matches("http://").parse().unwrap();
    // What asks and what sends; Nix itself goes on reading.
    let front = Plan::new()
        .fault("P", When::Always, Fault::Hang)
        .before(address);
    let host = Host::new(&cache);
    let report = host.job(&front.url(), &build("some")).run();
    assert_eq!(report.code, 0, "{}", report.log);
    let text = &report.files["GITHUB_OUTPUT"];
    let mut lines = text.lines();
    let seconds = lines
        .find(|line| line.starts_with("publish-seconds<<"))
        .and_then(|_| lines.next());
    let seconds: f64 = seconds.and_then(|text| text.parse().ok()).expect(text);
    assert!(
        (20.0..35.0).contains(&seconds),
        "{seconds} s\n{}",
        report.log
    );
    assert!(report.log.contains("publishing stalled"), "{}", report.log);
    assert!(output(&report, "lost") >= 13, "{}", report.log);
}

#[test]
fn a_server_killed_and_restarted_in_mid_build_costs_time_and_no_path() {
    let mut cache = Cache::start(&[]);
    let host = Host::new(&cache);
    // In mid-build: Nix 2.8 itself ends when a substituter goes away while it asks it.
    let command = build("long -L");
    let url = cache.url.clone();
    let mut restart = None;
    let report = host.job(&url, &command).run_and(|log, _| {
        match restart {
            None if log.contains("now kill it") => {
                cache.kill();
                restart = Some(Instant::now() + Duration::from_secs(2));
            }
            Some(at) if Instant::now() >= at => {
                cache.restart();
                // Only once: the step ends long before an hour is over.
                restart = Some(at + Duration::from_secs(3600));
            }
            _ => (),
        }
        false
    });
    is_whole(&report, 0);
    assert!(
        cache.names().contains(&"long".to_owned()),
        "{:?}",
        cache.names()
    );
}

/// The cases on which the watch of Attic's own client breaks (`attic-protocol`, 2.1), on a real store.
#[test]
fn what_others_miss_is_published_or_named() {
    let cache = Cache::start(&[]);
    let host = Host::new(&cache);
    let overflow = "kill -STOP $PPID; {build}; cd /nix/var/nix/db; \
                    for i in {1..12000}; do echo >>a; echo >>b; done; rm a b; kill -CONT $PPID";
    let rows: [(&str, String, i32, &[&str]); 6] = [
        (
            "a failed build's stale lock, collected later",
            "nix build --no-link path:.#fails && exit 9; ls /nix/store/*.lock >/dev/null || true; \
             touch /nix/store/00000000000000000000000000000000-stale.lock; nix build --no-link path:.#once; \
             rm -f /nix/store/*.lock; nix-store --gc >/dev/null 2>&1 || true"
                .to_owned(),
            0,
            &[],
        ),
        ("a floating derivation", build("floating"), 0, &["floating", "on-floating"]),
        ("outputs after one another", build("chain"), 0, &["link-0", "link-5"]),
        ("outputs named source", build("sources"), 0, &["source", "mypkg-source", "on-sources"]),
        (
            "an overflow of events",
            overflow.replace("{build}", &build("unseen")),
            0,
            &["unseen", "hidden-0", "hidden-2"],
        ),
        ("a build that fails at its end", build("fails"), 1, &["good"]),
    ];
    for (name, command, code, published) in rows {
        let report = host.job(&cache.url, &command).run();
        is_whole_but_for_the_named(&report, code);
        for path in published {
            assert!(
                cache.names().contains(&(*path).to_owned()),
                "{name}: {path}: {:?}\n{}",
                cache.names(),
                report.log
            );
        }
        println!("{name}: {} published", output(&report, "published"));
    }
}

#[test]
fn a_path_deleted_at_once_is_published_or_left_out_by_name() {
    let cache = Cache::start(&[]);
    let host = Host::new(&cache);
    let command = "path=$(nix build --no-link --print-out-paths path:.#once 2>/dev/null || nix-store -q --outputs \
                   \"$(nix eval --raw path:.#once.drvPath)\"); nix-store --delete \"$path\"; nix build --no-link path:.#chain";
    let report = host.job(&cache.url, command).run();
    is_whole_but_for_the_named(&report, 0);
    assert!(
        cache.names().contains(&"link-5".to_owned()),
        "{}",
        report.log
    );
}

#[test]
fn what_the_job_collects_before_the_upload_is_lost_by_name() {
    let cache = Cache::start(&[]);
    let address = cache.url.trim_start_matches("http://").parse().unwrap();
    // The question which paths are missing is answered long after the garbage has been collected.
    let front = Plan::new()
        .fault("POST", When::Always, Fault::Slow(Duration::from_secs(3)))
        .before(address);
    let host = Host::new(&cache);
    let command = "nix build --no-link path:.#once; nix-store --gc >/dev/null 2>&1";
    let job = host.job(&front.url(), command);
    let report = job.with_env("FLYWHEEL_REQUIRE_PUBLISH", "true").run();
    assert_eq!(report.code, 1, "{}", report.log);
    assert_eq!(output(&report, "lost"), 1, "{}", report.log);
    let summary = &report.files["GITHUB_STEP_SUMMARY"];
    let line = summary.lines().find(|line| line.contains("-once`: "));
    assert!(line.is_some_and(|line| line.contains(DELETED)), "{summary}");
}

#[test]
fn a_signal_right_after_the_build_loses_nothing() {
    let cache = Cache::start(&[]);
    let host = Host::new(&cache);
    let command = format!("{}; echo 'built it'; sleep 60", build("chain"));
    let mut sent = false;
    let report = host.job(&cache.url, &command).run_and(|log, pid| {
        if !sent && log.contains("built it") {
            sent = true;
            processes::signal(i32::try_from(pid).unwrap(), Signal::TERM);
        }
        false
    });
    assert!(sent && report.code != 0, "{}", report.log);
    assert_eq!(output(&report, "lost"), 0, "{}", report.log);
    assert!(
        cache.names().contains(&"link-5".to_owned()),
        "{:?}\n{}",
        cache.names(),
        report.log
    );
}
