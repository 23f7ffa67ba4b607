//! `flake-checks` with real Nix: each kind of verdict, a cancel, memory, and what is remembered of an evaluation.

mod builds;
mod by_hand;
mod evaluation;
mod memory;
mod verdicts;

use std::fs;
use std::time::Duration;

use super::nix_job::{Job, left_nothing, output};
use crate::world::cache::Cache;
use crate::world::github::GitHub;
use crate::world::{PATH, folders, must, need, with_private_nix};

const TOKEN: &str = "planted-checks-token-8d2e";

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
    // A path of an earlier job, which no root keeps.
    let nix = need("nix", "apt-get install nix-bin");
    let mut left = with_private_nix(&job.nix, &nix);
    folders::isolate(&mut left, job.step.folder())
        .env("PATH", PATH)
        .current_dir(job.step.workspace());
    left.args([
        "--extra-experimental-features",
        "nix-command",
        "store",
        "add-file",
        "flake.nix",
        "--name",
        "left",
    ]);
    must(&mut left);
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
