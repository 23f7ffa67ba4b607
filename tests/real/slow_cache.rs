//! A cache that is slow, dead or flaky while a job's Nix reads from it. What takes half a minute is in `faults`, which
//! `just faults` runs.

use std::fs;
use std::time::{Duration, Instant};

use crate::faults::{Fault, Front, Plan, When};
use crate::nix_job::{Job, output};
use crate::world::cache::Cache;
use crate::world::need;

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

/// Whether a daemon comes to the proxy is tried, since it may not trust this user.
#[test]
fn a_daemon_reads_through_the_proxy_if_it_takes_the_jobs_settings() {
    need("nix-daemon", "apt-get install nix-bin");
    let cache = filled();
    let notice = "Nix's daemon reads the cache itself";
    for (trusted, is_read) in [("root", true), ("nobody", false)] {
        let Job { step, nix } = job(&cache, &cache.url, "nix-job");
        let socket = step.folder().join("socket");
        let socket = socket.display();
        fs::create_dir_all(nix.join("store")).unwrap();
        let settings = format!(
            "sandbox = false\nbuild-users-group =\nsubstituters =\ntrusted-users = {trusted}"
        );
        // The daemon opens the store itself, or it would ask itself. From a subshell, since Flywheel ends what descends
        // from it when the command has ended.
        let daemon = format!(
            "(NIX_REMOTE=local NIX_CONFIG='{settings}' NIX_DAEMON_SOCKET_PATH='{socket}' nix-daemon --daemon >/dev/null 2>&1 &)\n\
             until [ -S '{socket}' ]; do sleep 0.05; done"
        );
        let report = step
            .after(&daemon)
            .with_env("NIX_CONFIG", &settings)
            .with_env("NIX_REMOTE", &format!("unix://{socket}"))
            .with_env("FLYWHEEL_PUSH_CACHE", "false")
            .with_env("FLYWHEEL_COMMAND", &build(&["part-0"]))
            .run();
        assert_eq!(report.code, 0, "{}", report.log);
        assert_eq!(
            report.log.contains("-part-0' from 'http://"),
            is_read,
            "{}",
            report.log
        );
        assert_eq!(report.log.contains(notice), !is_read, "{}", report.log);
    }
}

/// By `nix copy`: one 429 is no reason to wait for a minute, and a refusal for good is none to try again.
#[test]
fn a_store_that_refuses_is_tried_again_only_where_that_may_help() {
    for (fault, when, lost) in [
        (Fault::RetryAfter(1), When::First(1), false),
        (Fault::Status(405), When::Always, true),
    ] {
        let cache = Cache::start(&[]);
        let front = before(&cache, Plan::new().fault("PUT", when, fault));
        let job = job(&cache, "", "nix-job")
            .with_env("FLYWHEEL_CACHE", &format!("{}/main", front.url()))
            .with_env("FLYWHEEL_COMMAND", &build(&["part-0"]));
        let begun = Instant::now();
        let report = job.step.run();
        let took = begun.elapsed();
        assert!(took < Duration::from_secs(20), "{took:?}\n{}", report.log);
        assert_eq!(output(&report, "lost") != "0", lost, "{}", report.log);
        let reason = "the server answered 405";
        assert_eq!(report.log.contains(reason), lost, "{}", report.log);
    }
}

/// The name is in `/etc/hosts`, and no DNS server answers.
#[test]
fn a_name_that_the_hosts_file_has_is_asked_for_nowhere_else() {
    let cache = Cache::start(&[]);
    let port = cache.url.rsplit(':').next().unwrap().trim_end_matches('/');
    let job = job(
        &cache,
        &format!("http://cache.offline.test:{port}"),
        "nix-job",
    );
    let step = job.step.with_env("FLYWHEEL_COMMAND", "true").after(
        "cp /etc/hosts hosts; echo '127.0.0.1 cache.offline.test' >>hosts; echo 'nameserver 192.0.2.1' >resolv\n\
         bin/busybox mount -o bind hosts /etc/hosts; bin/busybox mount -o bind resolv /etc/resolv.conf",
    );
    let report = step.run();
    assert_eq!(report.code, 0, "{}", report.log);
    assert!(report.log.contains("attached"), "{}", report.log);
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
