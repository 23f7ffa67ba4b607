//! A cache that is slow, dead or flaky while a job's Nix reads from it. What takes half a minute is in `faults`, which
//! `just faults` runs.

use std::fs;
use std::time::{Duration, Instant};

use crate::faults::{Fault, Front, Plan, When};
use crate::nix_job::{Job, output};
use crate::world::cache::Cache;

/// Thirty parts, and what refers to all of them.
const FLAKE: &str = r#"{
  outputs = { self }: let
    system = "x86_64-linux";
    bin = builtins.path { path = ./bin; name = "bin"; };
    run = name: script: derivation {
      inherit name system;
      builder = "${bin}/busybox";
      args = [ "sh" "-euc" script ];
    };
    part = n: run "part-${toString n}" "echo $name > $out";
    parts = builtins.genList part 30;
    named = builtins.listToAttrs (map (part: { name = part.name; value = part; }) parts);
  in {
    packages.${system} = named // { all = run "all" "echo ${toString parts} > $out"; };
    checks.${system} = { inherit (named) part-0 part-1 part-2; };
  };
}
"#;

/// What the names of narinfos begin with, without the letter of `nix-cache-info`.
const DIGITS: &str = "0123456789abcdfghijklmpqrsvwxyz";

/// A job of this verb on a host with an empty store.
fn job(cache: &Cache, server: &str, verb: &str) -> Job {
    let job = Job::of(cache, verb)
        .with_env("ATTIC_SERVER", server)
        .with_env("FLYWHEEL_JOURNAL", "off");
    fs::write(job.step.workspace().join("flake.nix"), FLAKE).unwrap();
    job
}

fn build(parts: &[&str]) -> String {
    let commands = parts
        .iter()
        .map(|part| format!("nix build --no-link path:.#{part}"));
    commands.collect::<Vec<_>>().join(" && ")
}

/// A cache with everything in it.
fn filled() -> Cache {
    let cache = Cache::start(&["--private"]);
    let job = job(&cache, &cache.url, "nix-job").with_env("FLYWHEEL_COMMAND", &build(&["all"]));
    let report = job.step.run();
    assert_eq!(
        (report.code, output(&report, "lost").as_str()),
        (0, "0"),
        "{}",
        report.log
    );
    cache
}

fn before(cache: &Cache, plan: Plan) -> Front {
    plan.before(cache.url.trim_start_matches("http://").parse().unwrap())
}

#[test]
fn what_fails_by_chance_is_read_again_and_not_built() {
    let cache = filled();
    // Of each group of names one read fails; `nix-cache-info` is not among them.
    let faults = [Fault::Status(503), Fault::RetryAfter(1), Fault::Close];
    let groups = DIGITS.chars();
    let plan = groups
        .zip(faults.iter().cycle())
        .fold(Plan::new(), |plan, (digit, fault)| {
            plan.fault(&format!("GET /main/{digit}"), When::First(1), fault.clone())
        });
    let plan = faults.iter().fold(plan, |plan, fault| {
        plan.fault("GET /main/nar/", When::First(1), fault.clone())
    });
    let front = before(&cache, plan);
    let job = job(&cache, &front.url(), "nix-job")
        .with_env("FLYWHEEL_COMMAND", &build(&["all"]))
        .with_env("FLYWHEEL_PUSH_CACHE", "false");
    let report = job.step.run();
    assert_eq!(report.code, 0, "{}", report.log);
    assert!(!report.log.contains("building '"), "{}", report.log);
    assert!(
        report.log.contains("-part-29' from 'http://127.0.0.1:"),
        "{}",
        report.log
    );
    assert!(!report.log.contains("given up"), "{}", report.log);
}

mod faults {
    use super::*;

    /// With these commands one after the other, each of which would wait for the cache.
    const PARTS: [&str; 4] = ["part-0", "part-1", "part-2", "part-3"];
    /// What a hanging cache may cost, and what the job takes without.
    const LIMIT: Duration = Duration::from_secs(35 + 5);

    fn check(verb: &str, plan: Plan) {
        let cache = filled();
        let front = before(&cache, plan);
        let job = job(&cache, &front.url(), verb).with_env("FLYWHEEL_COMMAND", &build(&PARTS));
        let begun = Instant::now();
        let report = job.step.run();
        let took = begun.elapsed();
        assert_eq!(report.code, 0, "{}", report.log);
        assert!(took < LIMIT, "{took:?}\n{}", report.log);
        assert!(
            report.log.contains("is given up for the rest of the job"),
            "{}",
            report.log
        );
    }

    /// All but `nix-cache-info`, which the probe reads.
    fn narinfos_and_uploads() -> Plan {
        let plan = Plan::new().fault("P", When::Always, Fault::Hang);
        DIGITS.chars().fold(plan, |plan, digit| {
            plan.fault(&format!("GET /main/{digit}"), When::Always, Fault::Hang)
        })
    }

    #[test]
    fn nix_job_with_narinfos_that_hang() {
        check("nix-job", narinfos_and_uploads());
    }

    #[test]
    fn nix_job_with_nars_that_hang() {
        check(
            "nix-job",
            Plan::new().fault("GET /main/nar/", When::Always, Fault::Hang),
        );
    }

    #[test]
    fn flake_checks_with_narinfos_that_hang() {
        check("flake-checks", narinfos_and_uploads());
    }
}
