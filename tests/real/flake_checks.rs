//! `flake-checks` with real Nix: each kind of verdict, a cancel, memory, and what is remembered of an evaluation.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use super::nix_job::{Job, MemoryGroup, left_nothing, output};
use crate::world::act::Caller;
use crate::world::cache::Cache;
use crate::world::github::{GitHub, Manners};
use crate::world::{flywheel, must, need, with_private_nix};

const TOKEN: &str = "planted-checks-token-8d2e";

/// One of each kind. `cached` is a package too, so that a job before can publish it alone.
const DOZEN: &str = r#"{
  outputs = { self }: let
    system = "x86_64-linux";
    bin = builtins.path { path = ./bin; name = "bin"; };
    run = name: script: derivation {
      inherit name system;
      builder = "${bin}/busybox";
      args = [ "sh" "-euc" script ];
    };
    shared = run "shared" "echo the shared one; exit 3";
    cached = run "cached" "echo cached > $out";
    good = run "good" "echo good > $out";
    fetched = derivation {
      name = "fetched"; inherit system;
      builder = "${bin}/busybox"; args = [ "sh" "-euc" "echo hello > $out" ];
      outputHashMode = "flat"; outputHashAlgo = "sha256";
      outputHash = "sha256-AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=";
    };
  in {
    packages.${system} = { inherit cached; };
    checks.aarch64-darwin.foreign = derivation { name = "foreign"; system = "aarch64-darwin"; builder = "/x"; };
    checks.${system} = {
      inherit cached good;
      uses-good = run "uses-good" "echo ${good} > $out";
      slow = run "slow" "${bin}/busybox sleep 2; echo slow > $out";
      "with.dot" = run "dotted" "echo dotted > $out";
      of-commit = run "of-commit" "echo ${self.rev or "none"} > $out";
      bad = run "bad" "echo oops; echo '::error::from the build'; exit 1";
      uses-shared-1 = run "uses-shared-1" "echo ${shared} > $out";
      uses-shared-2 = run "uses-shared-2" "echo ${shared} > $out";
      wrong-hash = run "wrong-hash" "echo ${fetched} > $out";
      throws = throw "no way";
      missing = self.nothing.of.the.kind;
    };
  };
}
"#;

const WORKFLOW: &str = r"
on: [push, pull_request]
jobs:
  checks:
    runs-on: ubuntu-latest
    permissions: { contents: read, checks: write }
    steps:
      - uses: actions/checkout@v4
      - id: checks
        uses: octo-org/flywheel/actions/flake-checks@main
        env:
          GITHUB_TOKEN: ${{ secrets.CHECKS_TOKEN }}
          ATTIC_TOKEN: ${{ secrets.ATTIC_TOKEN || '' }}
        with:
          push-cache: auto
          flake-attr: ATTRIBUTE
          junit: ${{ env.FILES }}/checks.xml
          json-lines: ${{ env.FILES }}/checks.jsonl
";

fn caller(attribute: &str, cache: &Cache, github: &GitHub) -> Caller {
    let caller = Caller::new(&WORKFLOW.replace("ATTRIBUTE", attribute)).with_flake(DOZEN);
    let files = caller.folder().to_str().unwrap().to_owned();
    caller
        .with_env("FILES", &files)
        .with_secret("ATTIC_TOKEN", &cache.token)
        .with_secret("CHECKS_TOKEN", TOKEN)
        .with_env("ATTIC_SERVER", &cache.url)
        .with_env("ATTIC_PUBLIC_KEY", &cache.key)
        .with_env("GITHUB_API_URL", &github.url)
}

#[test]
fn each_of_a_dozen_outputs_has_its_verdict() {
    let (cache, github) = (Cache::start(&["--private"]), GitHub::start(TOKEN, false));
    let before = caller("packages", &cache, &github);
    let ran = before.run(&before.push("refs/heads/main"));
    assert_eq!(ran.code, 0, "{}", ran.log());
    assert_eq!(github.run("x86_64-linux.cached")["conclusion"], "success");

    let (github, caller) = (
        GitHub::start(TOKEN, false),
        caller("checks", &cache, &github),
    );
    let caller = caller.with_env("GITHUB_API_URL", &github.url);
    let ran = caller.run(&caller.push("refs/heads/main"));
    assert_ne!(ran.code, 0, "failures fail the step");
    assert_eq!(ran.left_processes, Vec::<String>::new(), "{}", ran.log());
    let step = ran.step("checks", "checks");
    let said = |name: &str| {
        let run = github.run(&format!("x86_64-linux.{name}"));
        let text = format!(
            "{}\n{}",
            run["output"]["title"].as_str().unwrap(),
            run["output"]["summary"].as_str().unwrap()
        );
        (
            run["conclusion"].as_str().unwrap_or("none").to_owned(),
            text,
        )
    };
    for (name, conclusion, words) in [
        ("cached", "neutral", "Already in the cache"),
        ("good", "success", "Built in"),
        (
            "uses-good",
            "success",
            "nix build '.#checks.x86_64-linux.uses-good'",
        ),
        ("slow", "success", "Built in"),
        ("with.dot", "success", "checks.x86_64-linux.\"with.dot\""),
        ("of-commit", "success", "Built in"),
        ("bad", "failure", "oops"),
        ("uses-shared-1", "failure", "the shared one"),
        ("uses-shared-2", "failure", "A dependency failed: shared"),
        (
            "wrong-hash",
            "failure",
            "sha256-WJG1tSLV3whtD/CxEPvZ0hu0/HFjrzTQgoai6Eb2vgM=",
        ),
        ("throws", "failure", "no way"),
        ("missing", "failure", "attribute 'nothing' missing"),
    ] {
        let (ended, text) = said(name);
        assert_eq!(ended, conclusion, "{name}: {text}\n{}", ran.log());
        assert!(text.contains(words), "{name}: {text}");
    }
    let line = |text: &str| DOZEN.lines().position(|line| line.contains(text)).unwrap() as u64 + 1;
    for (name, text) in [("wrong-hash", "outputHash = "), ("missing", "missing = ")] {
        let mark = github.run(&format!("x86_64-linux.{name}"))["output"]["annotations"][0].clone();
        assert_eq!(
            (mark["path"].as_str(), mark["start_line"].as_u64()),
            (Some("flake.nix"), Some(line(text))),
            "{mark}"
        );
    }
    assert_eq!(github.names().len(), 13, "{:?}", github.names());
    assert_eq!(github.run("flake checks")["conclusion"], "failure");
    assert_eq!(github.open(), Vec::<String>::new());
    assert!(
        github
            .log()
            .iter()
            .all(|(_, status)| (200..300).contains(status)),
        "{:?}",
        github.log()
    );

    for (name, value) in [
        ("outputs", "12"),
        ("failed", "6"),
        ("succeeded", "5"),
        ("cached", "1"),
        ("lost", "0"),
    ] {
        assert_eq!(step.outputs[name], value, "{name}\n{}", step.log);
    }
    let names = cache.names();
    for name in ["good", "uses-good", "slow", "dotted", "of-commit"] {
        assert!(names.contains(&name.to_owned()), "{name}: {names:?}");
    }
    assert!(
        !ran.nix_has(&caller, "cached"),
        "what the cache has is not downloaded"
    );
    for words in [
        "❌ 12 outputs: 6 failure, 5 success, 1 already there",
        "```mermaid",
        "x86\\_64-linux.throws",
    ] {
        assert!(step.summary.contains(words), "{words}: {}", step.summary);
    }
    for token in [TOKEN, cache.token.as_str()] {
        assert!(!ran.log().contains(token), "{}", ran.log());
    }
    let xml = fs::read_to_string(caller.folder().join("checks.xml")).unwrap();
    assert!(xml.contains("tests=\"12\" failures=\"6\""), "{xml}");
    let lines = fs::read_to_string(caller.folder().join("checks.jsonl")).unwrap();
    assert_eq!(lines.lines().count(), 12);
}

impl crate::world::act::Ran {
    /// Whether a store path of this name is in the caller's store.
    fn nix_has(&self, caller: &Caller, name: &str) -> bool {
        let entries = fs::read_dir(caller.nix().join("store")).unwrap().flatten();
        entries
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .any(|entry| entry.get(33..) == Some(name))
    }
}

#[test]
fn a_fork_gets_the_same_result_without_check_runs() {
    let (cache, github) = (
        Cache::start(&[]),
        GitHub::with(Manners {
            token: TOKEN.into(),
            refuses: true,
            ..Manners::default()
        }),
    );
    let caller = caller("packages", &cache, &github);
    let ran = caller.run(&caller.pull_request("someone/app"));
    assert_eq!(ran.code, 0, "{}", ran.log());
    let step = ran.step("checks", "checks");
    assert_eq!(
        (
            step.outputs["succeeded"].as_str(),
            step.outputs["trust"].as_str()
        ),
        ("1", "read-only")
    );
    assert!(
        step.log
            .contains("there are no Check Runs: GitHub answered 403"),
        "{}",
        step.log
    );
    assert!(github.names().is_empty() && cache.names().is_empty());
}

/// A step of `flake-checks` over a flake in its workspace.
fn job(cache: &Cache, github: &GitHub, flake: &str) -> Job {
    let job = Job::of(cache, "flake-checks").with_env("GITHUB_API_URL", &github.url);
    let job = job
        .with_env("GITHUB_TOKEN", TOKEN)
        .with_env("GITHUB_SHA", &"a".repeat(40));
    fs::write(job.step.workspace().join("flake.nix"), flake).unwrap();
    job.with_env("FLYWHEEL_FLAKE", "path:.")
}

const SLOW: &str = r#"{
  outputs = { self }: let
    bin = builtins.path { path = ./bin; name = "bin"; };
    run = name: script: derivation {
      inherit name; system = "x86_64-linux"; builder = "${bin}/busybox"; args = [ "sh" "-euc" script ];
    };
    quick = run "quick" "echo quick > $out";
  in {
    checks.x86_64-linux = {
      inherit quick;
      slow = run "slow" "echo ${quick}; ${bin}/busybox sleep 600; echo slow > $out";
      later = run "later" "echo ${run "before" "${bin}/busybox sleep 600; echo > $out"} > $out";
    };
  };
}
"#;

#[test]
fn a_cancelled_run_leaves_no_check_run_open_and_loses_nothing() {
    let (cache, github) = (Cache::start(&["--private"]), GitHub::start(TOKEN, false));
    let job = job(&cache, &github, SLOW);
    let is = |name: &str, status: &str| {
        github
            .runs()
            .iter()
            .any(|run| run["name"] == format!("x86_64-linux.{name}") && run["status"] == status)
    };
    let report = job
        .step
        .cancel_when(|_| is("slow", "in_progress") && is("quick", "completed"));
    left_nothing(&report);
    assert!(
        report.to_end.unwrap() < Duration::from_secs(6),
        "{:?}\n{}",
        report.to_end,
        report.log
    );
    assert_eq!(output(&report, "outcome"), "cancelled", "{}", report.log);
    assert_eq!(github.open(), Vec::<String>::new(), "{}", report.log);
    let conclusion = |name: &str| github.run(&format!("x86_64-linux.{name}"))["conclusion"].clone();
    assert_eq!(
        [conclusion("quick"), conclusion("slow"), conclusion("later")],
        ["success", "cancelled", "cancelled"]
    );
    assert_eq!(github.run("flake checks")["conclusion"], "cancelled");
    assert!(
        cache.names().contains(&"quick".to_owned()),
        "{:?}\n{}",
        cache.names(),
        report.log
    );
    assert_eq!(output(&report, "lost"), "0", "{}", report.log);
}

const FAILING: &str = r#"{
  outputs = { self }: let
    bin = builtins.path { path = ./bin; name = "bin"; };
    run = name: script: derivation {
      inherit name; system = "x86_64-linux"; builder = "${bin}/busybox"; args = [ "sh" "-euc" script ];
    };
  in {
    packages.x86_64-linux = {
      bad = run "bad" "exit 1";
      slow = run "slow" "${bin}/busybox sleep 600; echo slow > $out";
    };
    checks.x86_64-linux.fetched = derivation {
      name = "fetched"; system = "builtin"; builder = "builtin:fetchurl"; url = "http://127.0.0.1:1/x";
      outputHashMode = "flat"; outputHashAlgo = "sha256";
      outputHash = "sha256-AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=";
    };
    other.x86_64-linux.kept = run "kept" "echo kept > $out";
  };
}
"#;

#[test]
fn the_first_failure_ends_the_run_where_that_is_asked_for() {
    let (cache, github) = (Cache::start(&[]), GitHub::start(TOKEN, false));
    let job = job(&cache, &github, FAILING).with_env("FLYWHEEL_FLAKE_ATTR", "packages");
    let report = job
        .with_env("FLYWHEEL_FAIL_FAST", "true")
        .with_env("FLYWHEEL_MAX_JOBS", "2")
        .step
        .run();
    assert_eq!(report.code, 1, "{}", report.log);
    let conclusion = |name: &str| github.run(&format!("x86_64-linux.{name}"))["conclusion"].clone();
    assert_eq!(
        [conclusion("bad"), conclusion("slow")],
        ["failure", "cancelled"],
        "{}",
        report.log
    );
    assert_eq!(github.run("flake checks")["conclusion"], "failure");
    left_nothing(&report);
}

#[test]
fn a_build_that_failed_for_the_networks_fault_is_tried_again() {
    let (cache, github) = (Cache::start(&[]), GitHub::start(TOKEN, false));
    let job = job(&cache, &github, FAILING).with_env("FLYWHEEL_RETRIES", "2");
    let report = job
        .with_env("FLYWHEEL_EXTRA_NIX_CONFIG", "download-attempts = 1")
        .step
        .run();
    assert_eq!(report.code, 1, "{}", report.log);
    assert_eq!(
        report
            .log
            .matches("tried again: error: unable to download")
            .count(),
        2,
        "{}",
        report.log
    );
    let text = github.run("x86_64-linux.fetched")["output"].to_string();
    assert!(text.contains("unable to download"), "{text}");
}

#[test]
fn the_store_is_collected_and_this_runs_derivations_stay() {
    let (cache, github) = (Cache::start(&[]), GitHub::start(TOKEN, false));
    let job = job(&cache, &github, FAILING)
        .with_env("FLYWHEEL_FLAKE_ATTR", "other")
        .with_env("FLYWHEEL_GC", "true");
    let has = |name: &str| {
        let entries = fs::read_dir(job.nix.join("store")).unwrap().flatten();
        entries
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .any(|entry| entry.get(33..) == Some(name))
    };
    // What somebody has left before.
    let nix = need("nix", "apt-get install nix-bin");
    let mut left = with_private_nix(&job.nix, &nix);
    left.args([
        "--extra-experimental-features",
        "nix-command",
        "store",
        "add-file",
        "flake.nix",
        "--name",
        "left",
    ]);
    must(
        left.current_dir(job.step.workspace())
            .env("HOME", job.step.folder()),
    );
    assert!(has("left"));
    let report = job.step.run();
    assert_eq!(report.code, 0, "{}", report.log);
    assert!(
        report.log.contains("the store was collected"),
        "{}",
        report.log
    );
    assert!(!has("left") && has("kept.drv"), "{}", report.log);
    assert!(cache.names().contains(&"kept".to_owned()));
}

/// `big` doubles a text until it needs several GB; the others are small.
const BIG: &str = r#"{
  outputs = { self }: let
    make = name: text: derivation { inherit name text; system = "x86_64-linux"; builder = "/bin/sh"; };
    double = n: text: if n == 0 then text else double (n - 1) (text + text);
    small = builtins.listToAttrs (map (n: { name = "small-${toString n}"; value = make "small-${toString n}" ""; }) [ 1 2 3 4 5 6 ]);
  in {
    checks.x86_64-linux = small // { big = make "big" (builtins.substring 0 1 (double 33 "x")); };
  };
}
"#;

#[test]
fn an_attribute_that_needs_more_than_there_is_fails_alone() {
    let (cache, github) = (Cache::start(&[]), GitHub::start(TOKEN, false));
    let group = MemoryGroup::new(2 << 30);
    let job = job(&cache, &github, BIG).with_env("FLYWHEEL_BUILD", "false");
    let report = group.run(&job.step);
    assert_eq!(
        report.code, 1,
        "the job itself is not killed: {}",
        report.log
    );
    assert_eq!(
        (
            output(&report, "succeeded").as_str(),
            output(&report, "failed").as_str()
        ),
        ("6", "1"),
        "{}",
        report.log
    );
    let big = github.run("x86_64-linux.big");
    let title = big["output"]["title"].as_str().unwrap();
    assert!(
        title.starts_with("Evaluation needs more than ") && title.contains("GiB"),
        "{title}"
    );
    assert_eq!(big["conclusion"], "failure");
    left_nothing(&report);
}

/// Of a hundred and twenty outputs six throw, six depend on the commit, and some are dearer than others.
const MANY: &str = r#"{
  outputs = { self }: let
    work = n: builtins.foldl' (a: b: a + b) 0 (builtins.genList (x: x) (if n < 20 then 20000 else 10));
    make = n: derivation { name = "c-${toString n}"; text = toString (work n); system = "x86_64-linux"; builder = "/bin/sh"; };
    one = n: if n - n / 20 * 20 == 7 then throw "the ${toString n}th" else if n - n / 20 * 20 == 9 then make (n + self.lastModified) else make n;
  in { checks.x86_64-linux = builtins.listToAttrs (builtins.genList (n: { name = "c${toString n}"; value = one n; }) 120); };
}
"#;

#[test]
fn every_attribute_is_evaluated_once_however_they_are_shared_out() {
    let (cache, github) = (Cache::start(&[]), GitHub::start(TOKEN, false));
    let mut before: Option<Vec<String>> = None;
    for (workers, each) in [("1", "auto"), ("2", "auto"), ("3", "7"), ("8", "1")] {
        let job = job(&cache, &github, MANY)
            .with_env("FLYWHEEL_BUILD", "false")
            .with_env("FLYWHEEL_CHECKS", "false");
        let lines = job.step.folder().join("lines");
        let job = job.with_env("FLYWHEEL_JSON_LINES", lines.to_str().unwrap());
        let job = job.with_env("FLYWHEEL_EVALUATION_WORKERS", workers);
        let job = job.with_env("FLYWHEEL_DERIVATIONS_PER_WORKER", each);
        let report = job.step.run();
        assert_eq!(report.code, 1, "{workers} {each}: {}", report.log);
        let text = fs::read_to_string(&lines).unwrap();
        let lines: Vec<Value> = text
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        let thrown = lines.iter().filter(|line| {
            line["title"]
                .as_str()
                .unwrap()
                .contains("Does not evaluate: the ")
        });
        assert_eq!((lines.len(), thrown.count()), (120, 6), "{workers} {each}");
        // All but those of the date, which is another in each folder.
        let derivations = lines.iter().filter(|line| {
            line["derivation"]
                .as_str()
                .is_some_and(|drv| drv.len() < 56)
        });
        let derivations: Vec<String> = derivations
            .map(|line| line["derivation"].to_string())
            .collect();
        assert_eq!(derivations.len(), 108, "{workers} {each}");
        assert_eq!(
            before.get_or_insert_with(|| derivations.clone()),
            &derivations,
            "{workers} {each}"
        );
    }
}

/// A repository whose outputs depend on each kind of thing that an evaluation can depend on.
const DEPENDING: &str = r#"{
  inputs.other = { url = "path:OTHER"; flake = false; };
  outputs = { self, other }: let
    make = name: text: derivation { inherit name text; system = "x86_64-linux"; builder = "/bin/sh"; };
  in {
    checks.x86_64-linux = {
      of-nothing = make "of-nothing" "";
      of-file = make "of-file" (builtins.readFile ./file);
      of-folder = make "of-folder" (toString (builtins.attrNames (builtins.readDir ./.)));
      of-tree = make "of-tree" "${self}";
      of-input = make "of-input" (builtins.readFile "${other}/file");
      of-rev = make "of-rev" (self.rev or "changed");
      of-short = make "of-short" (self.sourceInfo.shortRev or "changed");
      of-date = make "of-date" (toString self.lastModified);
      of-guarded = make "of-guarded" (toString (builtins.tryEval (self.rev or "changed")).value);
      of-presence = make "of-presence" (if self ? rev then "clean" else "changed");
      of-output = make "of-output" self.checks.x86_64-linux.of-rev.drvPath;
    };
  };
}
"#;

struct Repository {
    folder: tempfile::TempDir,
}

impl Repository {
    fn new() -> Self {
        let repository = Self {
            folder: tempfile::tempdir().unwrap(),
        };
        for name in ["app", "other", "home", "nix", "temp"] {
            fs::create_dir(repository.path(name)).unwrap();
        }
        fs::write(repository.path("other/file"), "other").unwrap();
        fs::write(repository.path("app/file"), "0").unwrap();
        let other = repository.path("other");
        fs::write(
            repository.path("app/flake.nix"),
            DEPENDING.replace("OTHER", other.to_str().unwrap()),
        )
        .unwrap();
        repository.git(&["init", "--quiet", "--initial-branch=main"]);
        repository.git(&["add", "--all"]);
        repository.nix(&["flake", "lock"]);
        repository.commit();
        repository
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.folder.path().join(name)
    }

    fn run(&self, program: &Path, arguments: &[&str]) -> Command {
        let mut command = with_private_nix(&self.path("nix"), program);
        command
            .args(arguments)
            .current_dir(self.path("app"))
            .env_clear();
        command
            .env("PATH", crate::world::PATH)
            .env("HOME", self.path("home"))
            .env("TMPDIR", self.path("temp"));
        let config =
            "experimental-features = nix-command flakes\nbuild-users-group =\nsubstituters =";
        command.env("NIX_CONFIG", config);
        command
    }

    fn nix(&self, arguments: &[&str]) -> String {
        must(&mut self.run(&need("nix", "apt-get install nix-bin"), arguments))
    }

    fn git(&self, arguments: &[&str]) {
        let mut command = Command::new(need("git", "apt-get install git"));
        command
            .args([
                "-c",
                "user.name=octocat",
                "-c",
                "user.email=octocat@example.org",
            ])
            .args(arguments);
        must(
            command
                .current_dir(self.path("app"))
                .env("HOME", self.path("home")),
        );
    }

    fn commit(&self) {
        self.git(&["add", "--all"]);
        self.git(&["commit", "--quiet", "--allow-empty", "--message=x"]);
    }

    /// The derivations by Nix itself.
    fn truth(&self) -> BTreeMap<String, String> {
        let list = "c: builtins.mapAttrs (n: d: d.drvPath) c.x86_64-linux";
        let text = self.nix(&[
            "eval",
            "--json",
            "--option",
            "eval-cache",
            "false",
            ".#checks",
            "--apply",
            list,
        ]);
        serde_json::from_str(&text).unwrap()
    }

    /// The derivations by `flake-checks`, and how many of them were remembered.
    fn checked(&self, more: &[&str]) -> (BTreeMap<String, String>, usize) {
        let lines = self.path("lines");
        let outputs = self.path("outputs");
        fs::write(&outputs, "").unwrap();
        let memory = self.path("memory");
        let arguments = [
            "flake-checks",
            "--build",
            "false",
            "--json-lines",
            lines.to_str().unwrap(),
        ];
        let memory = ["--evaluation-memory-folder", memory.to_str().unwrap()];
        let arguments = [&arguments[..], &memory, more].concat();
        let mut command = self.run(&flywheel(), &arguments);
        must(
            command
                .env("GITHUB_OUTPUT", &outputs)
                .env("GITHUB_ACTIONS", "true"),
        );
        let lines = fs::read_to_string(lines).unwrap();
        let lines = lines
            .lines()
            .map(|line| serde_json::from_str::<Value>(line).unwrap());
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        let derivations = lines.map(|line| {
            (
                text(&line["label"])
                    .trim_start_matches("x86_64-linux.")
                    .to_owned(),
                text(&line["derivation"]),
            )
        });
        let derivations = derivations.collect();
        let outputs = fs::read_to_string(outputs).unwrap();
        let remembered = outputs
            .lines()
            .skip_while(|line| !line.starts_with("remembered<<"))
            .nth(1)
            .unwrap();
        (derivations, remembered.parse().unwrap())
    }
}

/// Where nearly all depends on the commit it is not tried for each, and none of them is remembered.
#[test]
fn what_depends_on_the_commit_is_not_remembered_however_much_of_it_there_is() {
    let repository = Repository::new();
    let flake = r#"{ outputs = { self }: let
      make = name: text: derivation { inherit name text; system = "x86_64-linux"; builder = "/bin/sh"; };
    in { checks.x86_64-linux = { of-nothing = make "of-nothing" ""; } // builtins.listToAttrs (builtins.genList (n: {
      name = "of-rev-${toString n}"; value = make "of-rev" "${toString n} ${self.rev}"; }) 40); }; }"#;
    fs::write(repository.path("app/flake.nix"), flake).unwrap();
    fs::remove_file(repository.path("app/flake.lock")).unwrap();
    let mut before = None;
    for remembered in [0, 1, 1] {
        repository.commit();
        let truth = repository.truth();
        assert_eq!(repository.checked(&[]), (truth.clone(), remembered));
        assert_ne!(
            before.replace(truth.clone()),
            Some(truth),
            "each commit has derivations of its own"
        );
    }
}

/// Whatever is edited, what is remembered is what Nix itself would evaluate to.
#[test]
fn the_evaluation_memory_is_never_stale() {
    let repository = Repository::new();
    let seed = fastrand::u64(..);
    let mut random = fastrand::Rng::with_seed(seed);
    let (mut warm, mut most) = (0, 0);
    for step in 0..24 {
        let edit = random.u8(0..8);
        let content = random.u8(0..3).to_string();
        match edit {
            0 => fs::write(repository.path("app/file"), &content).unwrap(),
            1 => fs::write(repository.path("app/untracked"), &content).unwrap(),
            2 => repository.commit(),
            3 => repository.git(&["commit", "--quiet", "--allow-empty", "--message=x"]),
            4 => repository.git(&["add", "--all"]),
            5 => {
                fs::write(repository.path("other/file"), &content).unwrap();
                repository.nix(&["flake", "lock", "--update-input", "other"]);
            }
            6 => repository.git(&["checkout", "--quiet", "--force", "HEAD"]),
            _ => repository.git(&["clean", "--quiet", "--force"]),
        }
        let truth = repository.truth();
        let (checked, remembered) = repository.checked(&[]);
        assert_eq!(
            checked, truth,
            "seed {seed}, step {step}, edit {edit}, {remembered} remembered"
        );
        warm += usize::from(remembered > 0);
        most = most.max(remembered);
    }
    // Of a tree with changes only the date comes with the commit.
    assert!(warm > 0 && most <= 10, "seed {seed}: {warm} {most}");
    // Another commit of the same tree. What depends on the commit is never remembered: `of-rev`, `of-short`,
    // `of-date`, `of-guarded`, `of-output`.
    repository.commit();
    repository.checked(&[]);
    repository.commit();
    assert_eq!(repository.checked(&[]), (repository.truth(), 6));
    assert_eq!(
        repository.checked(&["--evaluation-memory", "off"]),
        (repository.truth(), 0)
    );
    assert_eq!(
        repository.checked(&["--evaluation-memory", "verify"]),
        (repository.truth(), 0)
    );
}
