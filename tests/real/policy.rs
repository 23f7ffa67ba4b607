//! The publication policy on real derivations: for every rule one that breaks it, and one that refers to that.

use std::fs;

use super::nix_job::{Job, left_nothing, output};
use crate::world::cache::Cache;
use crate::world::runner::Report;

/// A secret of the job, in a variable that is named like one.
const SECRET: &str = "x7Rk2Lm9Qs4Tv6Wz-planted";
/// What has the shape of a token, its checksum included, in two parts: this file holds none.
const TOKEN: [&str; 2] = ["ghp_Zk4Tq9Wm2Lx7", "Vb1Nc6Hd8Js3Fg5Rp0"];

fn token() -> String {
    let random = TOKEN.concat();
    let sum = random[4..].bytes().fold(u32::MAX, |sum, byte| {
        (0..8).fold(sum ^ u32::from(byte), |sum, _| {
            (sum >> 1) ^ (0xEDB8_8320 & (sum & 1).wrapping_neg())
        })
    });
    let mut number = !sum;
    let mut digits = Vec::new();
    for _ in 0..6 {
        digits.push(
            b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
                [(number % 62) as usize],
        );
        number /= 62;
    }
    digits.reverse();
    format!("{random}{}", String::from_utf8(digits).unwrap())
}

/// `all`: a clean output and, for each rule about content, one that breaks it and one that refers to that one.
/// What they hold comes from files beside the flake.
const FLAKE: &str = r#"{
  outputs = { self }: let
    system = "x86_64-linux";
    bin = builtins.path { path = ./bin; name = "bin"; };
    held = name: builtins.readFile (./held + "/${name}");
    run = name: script: derivation {
      inherit name system script;
      builder = "${bin}/busybox";
      args = [ "sh" "-euc" "${bin}/busybox mkdir -p $out/etc; eval \"$script\"" ];
    };
    clean = run "clean" "echo clean > $out/etc/config";
    breaks = name: text: run name "echo 'first line' > $out/etc/config; echo '${text}' >> $out/etc/config";
    user = name: of: run name "echo ${of} > $out/etc/config";
    secret = breaks "leaks-secret" (held "secret");
    shape = breaks "leaks-token" (held "token");
    machine = breaks "names-machine" "${held "place"}/src/main.c";
    dangling = breaks "dangles" (builtins.unsafeDiscardStringContext "${other}");
    other = run "other" "echo other > $out/etc/config";
  in {
    packages.${system} = rec {
      inherit clean secret shape machine dangling other;
      default = all;
      all = run "all" "echo ${toString (map (of: user "uses-${of.name}" of) [ clean secret shape machine dangling ])} ${other} > $out/etc/config";
    };
    checks.${system} = if builtins.pathExists ./bad then { bad = run "bad" "exit 1"; } else { good = clean; };
  };
}
"#;

fn job(cache: &Cache, command: &str) -> Job {
    let job = Job::new(cache, command).with_env("DEPLOY_TOKEN", SECRET);
    let workspace = job.step.workspace();
    fs::write(workspace.join("flake.nix"), FLAKE).unwrap();
    fs::create_dir_all(workspace.join("held")).unwrap();
    let place = workspace.to_str().unwrap();
    for (name, text) in [("secret", SECRET), ("token", &token()), ("place", place)] {
        fs::write(workspace.join("held").join(name), text).unwrap();
    }
    job.with_env("GITHUB_WORKSPACE", place)
}

fn printed(report: &Report) -> String {
    format!(
        "{}\n{}\n{}",
        report.log, report.files["GITHUB_STEP_SUMMARY"], report.files["GITHUB_OUTPUT"]
    )
}

/// Names in the cache, less those that every flake brings.
fn names(cache: &Cache) -> Vec<String> {
    cache
        .names()
        .into_iter()
        .filter(|name| name != "bin" && name != "source")
        .collect()
}

#[test]
fn what_breaks_a_rule_stays_and_what_refers_to_it_and_all_else_goes() {
    let cache = Cache::start(&[]);
    let job = job(&cache, "nix build --no-link path:.#all");
    let report = job.step.run();
    assert_eq!(report.code, 0, "{}", report.log);
    left_nothing(&report);
    assert_eq!(
        names(&cache),
        ["clean", "other", "uses-clean"],
        "{}",
        report.log
    );
    let log = printed(&report);
    for (path, reason) in [
        (
            "leaks-secret",
            "secret: the value of `DEPLOY_TOKEN` as it is in `etc/config`, at byte 11",
        ),
        (
            "leaks-token",
            "secret: something shaped like a GitHub token in `etc/config`, at byte 11",
        ),
        (
            "names-machine",
            "machine-path: the workspace of this machine in `etc/config`, at byte 11",
        ),
        (
            "dangles",
            "-other`, which is not in its closure in `etc/config`, at byte 11",
        ),
        ("uses-leaks-secret", "which is withheld"),
        ("-all", "which is withheld"),
    ] {
        let named = log
            .lines()
            .any(|line| line.contains("::warning") && line.contains(path) && line.contains(reason));
        assert!(named, "no annotation of `{path}` with `{reason}`:\n{log}");
    }
    assert!(!log.contains(SECRET) && !log.contains(&token()), "{log}");
    assert_eq!(
        (output(&report, "lost"), output(&report, "outcome")),
        ("0".into(), "success".into()),
        "{log}"
    );
    // Four and what refers to them, all that uses them, and the flake's own tree, where it all stands.
    assert!(
        output(&report, "withheld").parse::<u32>().unwrap() >= 9,
        "{log}"
    );
}

#[test]
fn rules_are_switched_and_findings_can_fail_the_step() {
    let cache = Cache::start(&[]);
    let policy = "secret = off\nmachine-path = warn";
    let job = job(&cache, "nix build --no-link path:.#all").with_env("FLYWHEEL_POLICY", policy);
    let allow = "dangling dangles it brings what it names";
    let job = job
        .with_env("FLYWHEEL_POLICY_ALLOW", allow)
        .with_env("FLYWHEEL_ON_FINDING", "fail");
    let report = job.step.run();
    assert_eq!(
        (report.code, output(&report, "withheld")),
        (0, "0".into()),
        "{}",
        report.log
    );
    assert!(
        names(&cache).contains(&"all".to_owned()),
        "{:?}",
        names(&cache)
    );
    assert!(
        printed(&report).lines().any(|line| line.contains("::warning title=policy::") && line.contains("names-machine"))
    );
    let strict = job.with_env("FLYWHEEL_POLICY_ALLOW", "");
    let cache = Cache::start(&[]);
    let strict = strict
        .with_env("ATTIC_SERVER", &cache.url)
        .with_env("ATTIC_PUBLIC_KEY", &cache.key)
        .with_env("ATTIC_TOKEN", &cache.token);
    let report = strict
        .with_env("FLYWHEEL_COMMAND", "nix build -o result path:.#dangling")
        .step
        .run();
    assert_eq!(
        (report.code, output(&report, "outcome")),
        (1, "withheld".into()),
        "{}",
        report.log
    );
    assert!(!names(&cache).contains(&"dangles".to_owned()));
}

#[test]
fn nothing_of_an_impure_job_goes_however_it_was_asked_for() {
    let script = "echo 'exec nix build --no-link path:.#clean \"$@\"' > build.sh; flag=--im; sh build.sh ${flag}pure";
    for (command, config, whose) in [
        (
            "nix build --no-link --impure path:.#clean",
            "",
            "in the command",
        ),
        (
            "sh -c \"nix build --no-link '--imp'ure path:.#clean\"",
            "",
            "in the command",
        ),
        (
            "nix build --no-link path:.#clean",
            "pure-eval = false",
            "Nix's settings",
        ),
        (script, "", "in a Nix process of the job"),
    ] {
        let cache = Cache::start(&[]);
        let job = job(&cache, command).with_env("FLYWHEEL_EXTRA_NIX_CONFIG", config);
        let report = job.step.run();
        assert_eq!(report.code, 0, "{}", report.log);
        assert_eq!(
            cache.names(),
            Vec::<String>::new(),
            "{command}\n{}",
            report.log
        );
        assert!(
            printed(&report).contains(&format!(
                "impure: `{}",
                if config.is_empty() {
                    "--impure"
                } else {
                    "pure-eval"
                }
            )),
            "{}",
            report.log
        );
        assert!(
            printed(&report).contains(whose),
            "{command}: {}",
            report.log
        );
    }
}

#[test]
fn nothing_goes_before_the_flakes_checks_have_passed() {
    for passes in [true, false] {
        let cache = Cache::start(&[]);
        let job = job(&cache, "nix build --no-link path:.#other")
            .with_env("FLYWHEEL_REQUIRE_FLAKE_CHECK", "true");
        if !passes {
            fs::write(job.step.workspace().join("bad"), "").unwrap();
        }
        let report = job.step.run();
        assert_eq!(report.code, 0, "{}", report.log);
        let (gone, held) = (
            names(&cache),
            printed(&report).contains("unchecked: `nix flake check` has not passed"),
        );
        assert_eq!(
            (gone.contains(&"other".to_owned()), held),
            (passes, !passes),
            "{gone:?}\n{}",
            report.log
        );
        assert!(passes || gone.is_empty(), "{gone:?}");
    }
}

#[test]
fn other_stores_get_no_more_than_the_cache() {
    let cache = Cache::start(&[]);
    let job = job(&cache, "nix build --no-link path:.#all");
    let folder = job.step.folder().join("binary-cache");
    let to = format!("file://{}", folder.display());
    let job = job
        .with_env("ATTIC_SERVER", "")
        .with_env("FLYWHEEL_CACHE", &to);
    let report = job.step.run();
    assert_eq!(report.code, 0, "{}", report.log);
    assert!(folder.is_dir(), "{}", report.log);
    let infos = fs::read_dir(&folder)
        .unwrap()
        .flatten()
        .map(|entry| entry.path());
    let infos = infos.filter(|path| path.extension().is_some_and(|ending| ending == "narinfo"));
    let all: String = infos
        .map(|path| fs::read_to_string(path).unwrap())
        .collect();
    assert!(
        all.contains("-uses-clean\n") && all.contains("-other\n"),
        "{all}\n{}",
        report.log
    );
    for name in [
        "leaks-secret",
        "leaks-token",
        "names-machine",
        "dangles",
        "-all",
    ] {
        assert!(!all.contains(&format!("{name}\n")), "{name}\n{all}");
    }
}
