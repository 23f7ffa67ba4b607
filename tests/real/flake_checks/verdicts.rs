//! The verdict of each output, and the places where it stands: Check Runs, summary, outputs, files.

use std::fs;

use super::TOKEN;
use crate::world::act::{Caller, Ran};
use crate::world::cache::Cache;
use crate::world::github::{GitHub, Manners};

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
    check_conclusions(&github, &ran);
    check_annotations(&github);
    check_runs_are_complete(&github);
    check_results(&caller, &ran);

    let names = cache.names();
    for name in ["good", "uses-good", "slow", "dotted", "of-commit"] {
        assert!(names.contains(&name.to_owned()), "{name}: {names:?}");
    }
    assert!(
        !ran.nix_has(&caller, "cached"),
        "what the cache has is not downloaded"
    );
    for token in [TOKEN, cache.token.as_str()] {
        assert!(!ran.log().contains(token), "{}", ran.log());
    }
}

/// The conclusion of each output's Check Run, and a part of its text.
fn check_conclusions(github: &GitHub, ran: &Ran) {
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
        let run = github.run(&format!("x86_64-linux.{name}"));
        let text = format!(
            "{}\n{}",
            run["output"]["title"].as_str().unwrap(),
            run["output"]["summary"].as_str().unwrap()
        );
        let ended = run["conclusion"].as_str().unwrap_or("none");
        assert_eq!(ended, conclusion, "{name}: {text}\n{}", ran.log());
        assert!(text.contains(words), "{name}: {text}");
    }
}

/// A failure that has a place in the flake is shown at that line.
fn check_annotations(github: &GitHub) {
    let line = |text: &str| DOZEN.lines().position(|line| line.contains(text)).unwrap() as u64 + 1;
    for (name, text) in [("wrong-hash", "outputHash = "), ("missing", "missing = ")] {
        let mark = github.run(&format!("x86_64-linux.{name}"))["output"]["annotations"][0].clone();
        assert_eq!(
            (mark["path"].as_str(), mark["start_line"].as_u64()),
            (Some("flake.nix"), Some(line(text))),
            "{mark}"
        );
    }
}

/// There is a Check Run for each output and one for all, none is left open, and GitHub accepted each request.
fn check_runs_are_complete(github: &GitHub) {
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
}

/// The outputs of the step, its summary, and the files that were asked for.
fn check_results(caller: &Caller, ran: &Ran) {
    let step = ran.step("checks", "checks");
    for (name, value) in [
        ("outputs", "12"),
        ("failed", "6"),
        ("succeeded", "5"),
        ("cached", "1"),
        ("lost", "0"),
    ] {
        assert_eq!(step.outputs[name], value, "{name}\n{}", step.log);
    }
    for words in [
        "❌ 12 outputs: 6 failed, 5 successful, 1 already there",
        "```mermaid",
        "x86\\_64-linux.throws",
    ] {
        assert!(step.summary.contains(words), "{words}: {}", step.summary);
    }
    let xml = fs::read_to_string(caller.folder().join("checks.xml")).unwrap();
    assert!(xml.contains("tests=\"12\" failures=\"6\""), "{xml}");
    let lines = fs::read_to_string(caller.folder().join("checks.jsonl")).unwrap();
    assert_eq!(lines.lines().count(), 12);
}

impl Ran {
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
