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

/// Each with four commands one after the other, every one of which would wait for the cache.
mod faults {
    use super::*;
    use crate::world::versions::{VERSIONS, run_beside};

    /// What a hanging cache may cost a job in seconds, and what the job takes without.
    const LIMIT: u64 = 35 + 5;

    /// The environment of a push, and four parts that any version builds alike.
    fn prelude(server: &str, cache: &Cache) -> String {
        let Cache { key, token, .. } = cache;
        format!(
            r#"
cat >flake.nix <<'X'
{{
  outputs = {{ self }}: let
    system = "x86_64-linux";
    part = n: derivation {{
      name = "part-${{toString n}}";
      inherit system;
      builder = "/bin/bash";
      args = [ "-c" "echo $name > $out" ];
    }};
    parts = builtins.listToAttrs (map (n: {{ name = "part-${{toString n}}"; value = part n; }}) [ 0 1 2 3 ]);
  in {{ packages.${{system}} = parts; checks.${{system}} = parts; }};
}}
X
printf '%s' '{{"ref":"refs/heads/main","deleted":false,"repository":{{"full_name":"octo-org/app","default_branch":"main"}}}}' >/root/event
export GITHUB_ACTIONS=true GITHUB_EVENT_NAME=push GITHUB_REF=refs/heads/main GITHUB_REPOSITORY=octo-org/app
export GITHUB_EVENT_PATH=/root/event GITHUB_OUTPUT=/out/outputs GITHUB_STEP_SUMMARY=/out/summary
export ATTIC_SERVER={server} ATTIC_CACHE=main ATTIC_PUBLIC_KEY={key} ATTIC_TOKEN={token}
export FLYWHEEL_PUSH_CACHE=true FLYWHEEL_JOURNAL=off
build() {{ for n in 0 1 2 3; do nix build --no-link path:.#part-$n || return; done; }}
export -f build
SECONDS=0
"#
        )
    }

    /// The lines that run each verb.
    fn lines(verb: &str) -> &'static str {
        match verb {
            "nix-job" => "/fly/flywheel nix-job --command build; code=$?",
            "flake-checks" => "/fly/flywheel flake-checks --flake path:.; code=$?",
            "watch-store" => {
                // As a runner does between two steps; the value has several lines.
                "export GITHUB_ENV=/root/env\n: >/root/env\n/fly/flywheel watch-store start\n\
                 delimiter=$(sed -n 's/^NIX_CONFIG<<//p' /root/env)\n\
                 NIX_CONFIG=$(sed -n \"/^NIX_CONFIG<</,/^$delimiter\\$/p\" /root/env | sed '1d;$d')\nexport NIX_CONFIG\n\
                 build; code=$?\n/fly/flywheel watch-store finish || code=$?"
            }
            other => panic!("{other}"),
        }
    }

    fn check(verb: &str, versions: &[&str], plan: fn() -> Plan) {
        let cache = Cache::start(&["--private"]);
        let filling = format!("{}{}", prelude(&cache.url, &cache), lines("nix-job"));
        let filled = run_beside(VERSIONS[0], &filling);
        assert!(
            cache.names().contains(&"part-3".to_owned()),
            "{}",
            filled.log
        );
        for version in versions {
            let front = before(&cache, plan());
            let prelude = prelude(&front.url(), &cache);
            let script = format!(
                "{prelude}{}\necho \"code $code after $SECONDS s\"",
                lines(verb)
            );
            let ran = run_beside(version, &script);
            let last = ran
                .log
                .lines()
                .rev()
                .find_map(|line| line.strip_prefix("code 0 after "));
            let took = last.and_then(|last| last.strip_suffix(" s")?.parse::<u64>().ok());
            let took = took.unwrap_or_else(|| panic!("{version}\n{}", ran.log));
            assert!(took < LIMIT, "{version}: {took} s\n{}", ran.log);
            println!("{verb} on {version}: {took} s");
            let told = ran
                .log
                .matches("is given up for the rest of the job")
                .count();
            assert_eq!(told, 1, "{version}\n{}", ran.log);
        }
    }

    /// All but `nix-cache-info`, which the probe reads.
    fn narinfos_and_uploads() -> Plan {
        let plan = Plan::new().fault("P", When::Always, Fault::Hang);
        DIGITS.chars().fold(plan, |plan, digit| {
            plan.fault(&format!("GET /main/{digit}"), When::Always, Fault::Hang)
        })
    }

    fn nars() -> Plan {
        Plan::new().fault("GET /main/nar/", When::Always, Fault::Hang)
    }

    #[test]
    fn nix_job_with_narinfos_that_hang() {
        check("nix-job", &VERSIONS, narinfos_and_uploads);
    }

    /// The one that CI runs.
    #[test]
    fn nix_job_with_nars_that_hang() {
        check("nix-job", &VERSIONS[2..], nars);
    }

    #[test]
    fn nix_job_of_old_versions_with_nars_that_hang() {
        check("nix-job", &VERSIONS[..2], nars);
    }

    #[test]
    fn flake_checks_with_narinfos_that_hang() {
        check("flake-checks", &VERSIONS, narinfos_and_uploads);
    }

    /// Nix before 2.26 reads the cache itself there, since it would not survive a proxy that a killed watch takes along.
    #[test]
    fn watch_store_with_narinfos_that_hang() {
        check("watch-store", &VERSIONS[1..], narinfos_and_uploads);
    }

    #[test]
    fn watch_store_with_nars_that_hang() {
        check("watch-store", &VERSIONS[1..], nars);
    }
}
