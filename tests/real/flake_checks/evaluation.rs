//! How the attributes of a flake are shared out among workers, and what one of them may need.

use std::fs;

use serde_json::Value;

use super::{TOKEN, job};
use crate::nix_job::{MemoryGroup, left_nothing, output};
use crate::world::cache::Cache;
use crate::world::github::GitHub;

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

/// Of a hundred and twenty outputs six throw, six depend on the commit, and some take longer than others.
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
        // All except those that depend on the date, which differs between the folders.
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
