//! What Nix says of builds, on each version: which one failed, by what, and what became of the others.

use crate::world::versions::{Ran, VERSIONS, run};

/// A flake with these checks, and `flake-checks` on it. `derive` makes a derivation of a name and a script, `addressed`
/// one that is addressed by its content, `fetched` one with a hash.
fn flake_checks(version: &str, settings: &str, checks: &str, arguments: &str) -> Ran {
    flake_checks_beside("", version, settings, checks, arguments)
}

/// The same while lines of bash run beside it. Afterwards `left` has the number of checks whose outputs survive a
/// collection.
fn flake_checks_beside(
    beside: &str,
    version: &str,
    settings: &str,
    checks: &str,
    arguments: &str,
) -> Ran {
    let script = format!(
        r#"
export NIX_CONFIG="$NIX_CONFIG"$'\n'$'{settings}'
cat >flake.nix <<'END'
{{ outputs = {{ self }}: let
  derive = name: script: derivation {{
    inherit name; system = "x86_64-linux"; builder = "/bin/bash"; PATH = "/usr/bin"; args = [ "-euc" script ];
  }};
  addressed = name: script: derivation {{
    inherit name; system = "x86_64-linux"; builder = "/bin/bash"; PATH = "/usr/bin"; args = [ "-euc" script ];
    __contentAddressed = true; outputHashMode = "recursive"; outputHashAlgo = "sha256";
  }};
  fetched = name: script: derivation {{
    inherit name; system = "x86_64-linux"; builder = "/bin/bash"; PATH = "/usr/bin"; args = [ "-euc" script ];
    outputHashMode = "flat"; outputHashAlgo = "sha256";
    outputHash = "sha256-AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=";
  }};
in {{
  checks.x86_64-linux = rec {{
{checks}
  }};
}}; }}
END
{beside}
/fly/flywheel flake-checks --flake path:. --checks false --json-lines /out/lines {arguments}
code=$?
nix-store --gc >/dev/null 2>&1
ls /nix/store | grep -cE -- '-p[0-9]$' >/out/left
exit $code
"#
    );
    run(version, &script)
}

/// The conclusion and the title of an output.
#[track_caller]
fn check(ran: &Ran, version: &str, name: &str, conclusion: &str, title: &str) {
    let line = ran.line(&format!("x86_64-linux.{name}"));
    let found = [&line["conclusion"], &line["title"]].map(|value| value.as_str().unwrap());
    assert!(
        found[0] == conclusion && found[1].contains(title),
        "{version}: {name}: {found:?}\n{}",
        ran.log
    );
}

const ADDRESSED: &str = r#"
    dep = addressed "dep" "echo dep > $out";
    bad = addressed "bad" "echo oops ${dep}; exit 1";
    needs-bad = derive "needs-bad" "echo ${bad} > $out";
    good = addressed "good" "echo good ${dep} > $out";
    needs-good = derive "needs-good" "echo ${good} > $out";
    wrong-hash = fetched "wrong-hash" ": ${dep}; echo hello > $out";
    needs-hash = derive "needs-hash" "echo ${wrong-hash} > $out";
"#;

/// Nix builds, and names, the resolved derivations, which are no output's own.
#[test]
fn each_output_that_is_addressed_by_its_content_has_its_own_verdict() {
    for version in VERSIONS {
        let settings = r"extra-experimental-features = ca-derivations";
        let ran = flake_checks(version, settings, ADDRESSED, "");
        assert_eq!(ran.code, 1, "{version}: {}", ran.log);
        let right =
            "Wrong hash; the right one is sha256-WJG1tSLV3whtD/CxEPvZ0hu0/HFjrzTQgoai6Eb2vgM=";
        for (name, conclusion, title) in [
            ("dep", "success", "Built in"),
            ("bad", "failure", "Build failed"),
            ("needs-bad", "failure", "A dependency failed: bad"),
            ("good", "success", "Built in"),
            ("needs-good", "success", "Built in"),
            ("wrong-hash", "failure", right),
            ("needs-hash", "failure", right),
        ] {
            check(&ran, version, name, conclusion, title);
        }
        for name in ["bad", "needs-bad"] {
            let log = ran.line(&format!("x86_64-linux.{name}"))["logTail"].to_string();
            assert!(log.contains("oops /nix/store/"), "{version}: {name}: {log}");
        }
        for name in ["wrong-hash", "needs-hash"] {
            let place = &ran.line(&format!("x86_64-linux.{name}"))["cause"]["place"];
            assert_eq!(place["file"], "flake.nix", "{version}: {name}: {}", ran.log);
        }
    }
}

/// An error that ends all of Nix, or even aborts it, and that no version reports by the derivation's path.
const FATAL: &str = r#"
    fatal = fetched "fatal" "echo ${good-1} > $out";
    good-1 = derive "good-1" "echo 1 > $out";
    good-2 = derive "good-2" "${sleep}; echo 2 > $out";
    good-3 = derive "good-3" "${sleep}; echo 3 > $out";
    good-4 = derive "good-4" "${sleep}; echo 4 > $out";
"#;

#[test]
fn a_failure_that_ends_all_of_nix_is_that_of_its_own_output_alone() {
    for version in VERSIONS {
        let checks = FATAL.replace("${sleep}", "sleep 0.3");
        let ran = flake_checks(version, "", &checks, "");
        assert_eq!(ran.code, 1, "{version}: {}", ran.log);
        check(&ran, version, "fatal", "failure", "Build failed");
        for n in 1..=4 {
            let name = format!("good-{n}");
            check(&ran, version, &name, "success", "Built in");
        }
    }
}

const SLOW: &str = r#"
    slow = derive "slow" "echo slow has begun; while :; do echo x; sleep 0.5; done";
    silent = derive "silent" "echo silent has begun; sleep 60";
    addressed-slow = addressed "addressed-slow" "echo ${good} has begun; sleep 60";
    needs-slow = derive "needs-slow" "echo ${derive "before" "echo before has begun; sleep 60"} > $out";
    good = addressed "good" "echo good > $out";
    bad = derive "bad" "echo oops; sleep 1; exit 1";
"#;

#[test]
fn a_build_that_ran_into_a_limit_says_so_with_its_log() {
    // They wait most of the time.
    std::thread::scope(|scope| {
        for version in VERSIONS {
            scope.spawn(move || check_limit(version, "timeout"));
            scope.spawn(move || check_limit(version, "max-silent-time"));
        }
    });
}

fn check_limit(version: &str, setting: &str) {
    let is_silence = setting == "max-silent-time";
    let settings =
        format!(r"extra-experimental-features = ca-derivations\nmax-jobs = 6\n{setting} = 3");
    // In the other case it never ends by itself.
    let checks = match is_silence {
        true => SLOW.replace(
            "while :; do echo x; sleep 0.5; done",
            "for n in 1 2 3 4 5 6 7 8 9; do echo $n; sleep 0.5; done; echo > $out",
        ),
        false => SLOW.to_owned(),
    };
    let ran = flake_checks(version, &settings, &checks, "");
    assert_eq!(ran.code, 1, "{version}: {}", ran.log);
    check(&ran, version, "good", "success", "Built in");
    check(&ran, version, "bad", "failure", "Build failed");
    check(
        &ran,
        version,
        "needs-slow",
        "failure",
        "A dependency failed: before",
    );
    let (conclusion, title) = match is_silence {
        true => ("success", "Built in"),
        false => ("failure", "Build timed out after 3 s"),
    };
    check(&ran, version, "slow", conclusion, title);
    for name in ["silent", "addressed-slow"] {
        check(&ran, version, name, "failure", "Build timed out after 3 s");
    }
    for name in ["silent", "addressed-slow", "needs-slow"] {
        let log = ran.line(&format!("x86_64-linux.{name}"))["logTail"].to_string();
        let says = log.contains("has begun") && log.contains("timed out after 3 seconds");
        assert!(says, "{version}: {setting}: {name}: {log}");
    }
}

/// Another process collects all the time, as Nix itself does at `min-free`: it deletes whatever no root holds.
#[test]
fn a_collection_takes_nothing_that_is_yet_to_be_built_or_published() {
    let checks: String = (0..8)
        .map(|n| format!("p{n} = derive \"p{n}\" \"sleep 0.2; echo {n} > $out\";\n"))
        .collect();
    let collecting =
        "while :; do nix-store --gc >>/out/collected 2>&1; sleep 0.02; done & trap 'kill $!' EXIT";
    for version in VERSIONS {
        let ran = flake_checks_beside(collecting, version, "", &checks, "");
        assert_eq!(ran.code, 0, "{version}: {}", ran.log);
        assert!(ran.log.contains("8 successful"), "{version}: {}", ran.log);
        // The roots are gone with the job.
        assert_eq!(ran.file("left").trim(), "0", "{version}: {}", ran.log);
        assert!(ran.file("collected").contains("deleted"), "{version}");
    }
}

/// The same for an ordinary user, whose roots are those of the daemon's processes.
const BEHIND_A_DAEMON: &str = r#"
printf 'sandbox = false\nbuild-users-group = nixbld\nsubstituters =\nexperimental-features = nix-command flakes\n' >/etc/nix/nix.conf
unset NIX_CONFIG
nix-store --gc >/dev/null 2>&1
nix-daemon >/out/daemon 2>&1 &
for n in $(seq 200); do [ -S /nix/var/nix/daemon-socket/socket ] && break; sleep 0.05; done
mkdir ~alice/checkout
cat >~alice/checkout/flake.nix <<'END'
{ outputs = { self }: {
  checks.x86_64-linux = builtins.listToAttrs (map (name: { inherit name; value = derivation {
    inherit name; system = "x86_64-linux"; builder = "/bin/bash"; PATH = "/usr/bin"; args = [ "-euc" "sleep 0.2; echo > $out" ];
  }; }) [ "p0" "p1" "p2" "p3" "p4" "p5" ]);
}; }
END
chown -R alice ~alice/checkout
while :; do NIX_REMOTE=local nix-store --gc >>/out/collected 2>&1; sleep 0.05; done & trap 'kill $!' EXIT
busybox su -s /bin/bash alice -c 'export HOME=~alice NIX_REMOTE=daemon; cd ~/checkout && /fly/flywheel flake-checks --flake path:. --checks false'
code=$?
NIX_REMOTE=local nix-store --gc >/dev/null 2>&1
ls /nix/store | grep -cE -- '-p[0-9]$' >/out/left
exit $code
"#;

#[test]
fn a_collection_takes_nothing_from_an_ordinary_user_behind_a_daemon() {
    for version in VERSIONS {
        let ran = run(version, BEHIND_A_DAEMON);
        assert_eq!(ran.code, 0, "{version}: {}", ran.log);
        assert!(ran.log.contains("6 successful"), "{version}: {}", ran.log);
        assert_eq!(ran.file("left").trim(), "0", "{version}: {}", ran.log);
        assert!(ran.file("collected").contains("deleted"), "{version}");
    }
}

/// What a process of some milliseconds names cannot always be read. It is no result of this verb, which knows its own.
#[test]
fn short_calls_of_nix_beside_it_leave_no_doubt_about_the_results() {
    let adding =
        "while :; do nix-store --add flake.nix >>/out/added 2>&1; done & trap 'kill $!' EXIT";
    let checks = r#"p = derive "p" "sleep 2; echo > $out";"#;
    for version in VERSIONS {
        let arguments = "--publish --embedded-cache /out/cache";
        let ran = flake_checks_beside(adding, version, "", checks, arguments);
        assert_eq!(ran.code, 0, "{version}: {}", ran.log);
        assert!(ran.log.contains(" 0 lost"), "{version}: {}", ran.log);
        let added = ran.file("added");
        assert!(added.lines().count() > 20, "{version}: {added}");
    }
}
