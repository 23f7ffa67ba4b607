//! Disks that fill up while a job works, on each version of Nix: a small file system in memory stands for the store's disk
//! or the temporary folder's.

use crate::world::versions::{Ran, VERSIONS, run};

/// A cache on a disk with room, and a job's variables; `/nix` is what `STORE` says. `job` runs `nix-job` and leaves its
/// exit code, outputs and summary in `/out`.
const WORLD: &str = r#"
busybox mount -t tmpfs -o mode=755,STORE tmpfs /nix
/fly/flywheel cache serve --quiet --stop-after 5m --listen 127.0.0.1:0 --dir /var/cache >/tmp/serve 2>&1 &
for _ in $(seq 400); do grep -q '^public-key' /tmp/serve && break; sleep 0.05; done
export ATTIC_SERVER=$(head -n 1 /tmp/serve) ATTIC_PUBLIC_KEY=$(sed -n 's/^public-key //p' /tmp/serve)
export ATTIC_TOKEN=$(sed -n 's/^write //p' /var/cache/tokens)
export GITHUB_OUTPUT=/out/outputs GITHUB_STEP_SUMMARY=/out/summary
cat >store.nix <<'END'
let
  run = name: script: derivation {
    inherit name;
    system = "x86_64-linux";
    builder = "/bin/bash";
    PATH = "/usr/bin";
    args = [ "-euc" script ];
  };
  size = name: mib: run name "head -c ${toString mib}M /dev/urandom >$out";
in {
  before = size "before" 1;
  kept = size "kept" 2;
  first = size "first" 15;
  second = size "second" 32;
  third = size "third" 30;
  huge = size "huge" 200;
  many = run "many" "mkdir $out; cd $out; for n in {1..5000}; do : >$n; done";
}
END
build() { nix-build --no-out-link store.nix -A "$1"; }
export -f build
job() {
  : >/out/outputs; : >/out/summary
  /fly/flywheel nix-job "$@"
  echo "$?" >/out/code
}
"#;

/// Waits for a minute until a path of this name is gone from the store.
const UNTIL_FREED: &str =
    "for _ in $(seq 1200); do ls -d /nix/store/*-second >/dev/null 2>&1 || break; sleep 0.05; done";

fn disk(version: &str, store: &str, script: &str) -> Ran {
    run(
        version,
        &format!("{}\n{script}", WORLD.replace("STORE", store)),
    )
}

#[track_caller]
fn output(ran: &Ran, name: &str) -> String {
    let outputs = ran.file("outputs");
    let mut lines = outputs.lines();
    let value = lines
        .find(|line| line.starts_with(&format!("{name}<<")))
        .and_then(|_| lines.next());
    value
        .unwrap_or_else(|| panic!("no output `{name}`\n{}", ran.log))
        .to_owned()
}

#[track_caller]
fn ended(ran: &Ran, outcome: &str, code: &str) {
    assert_eq!(output(ran, "outcome"), outcome, "{}", ran.log);
    assert_eq!(ran.file("code").trim(), code, "{}", ran.log);
    assert_eq!(output(ran, "lost"), "0", "{}", ran.log);
}

#[track_caller]
fn has(text: &str, parts: &[&str], ran: &Ran) {
    for part in parts {
        assert!(text.contains(part), "{part}: {text}\n{}", ran.log);
    }
}

#[test]
fn a_build_that_fills_the_stores_disk_is_named_with_the_jobs_largest_path() {
    for version in VERSIONS {
        let job = "job --publish --command 'build first; build huge || exit 7'";
        let ran = disk(version, "size=64m", job);
        ended(&ran, "disk-full", "7");
        assert_eq!(output(&ran, "published"), "1", "{}", ran.log);
        let named = [
            "> **Disk full:** `/nix (tmpfs)`, with the store",
            "-first (15.0 MiB)",
            "`reclaim: true`",
            "| Lowest free room | ",
        ];
        has(&ran.file("summary"), &named, &ran);
        has(&ran.log, &["error: disk full: `/nix (tmpfs)`"], &ran);
    }
}

#[test]
fn a_job_that_may_reclaim_frees_its_own_published_garbage_and_nothing_else() {
    for version in VERSIONS {
        let job = format!(
            "build before
            job --publish --reclaim true --command 'nix-build -o kept store.nix -A kept; build first; build second
            {UNTIL_FREED}
            build third'
            cat kept >/dev/null && ls -d /nix/store/*-before >/out/there"
        );
        let ran = disk(version, "size=64m", &job);
        ended(&ran, "success", "0");
        for (name, number) in [("published", "4"), ("built", "4")] {
            assert_eq!(output(&ran, name), number, "{name}\n{}", ran.log);
        }
        has(&ran.file("there"), &["-before"], &ran);
        let freed = "| Freed in the store | ";
        has(&ran.file("summary"), &[freed], &ran);
        has(&ran.log, &["flywheel: disk: freed "], &ran);
    }
}

#[test]
fn what_is_in_no_cache_is_not_freed_unless_the_job_publishes_nothing() {
    let job = |arguments: &str| {
        format!(
            "job {arguments} --reclaim true --command 'build first; build second
            {}
            build third || exit 7'",
            UNTIL_FREED.replace("1200", "60")
        )
    };
    let away = format!(
        "export ATTIC_SERVER=http://127.0.0.1:9/\n{}",
        job("--publish")
    );
    let ran = disk(VERSIONS[2], "size=64m", &away);
    assert_eq!(output(&ran, "outcome"), "disk-full", "{}", ran.log);
    assert_eq!(output(&ran, "lost"), "2", "{}", ran.log);
    has(&ran.log, &["so that nothing is freed"], &ran);

    let ran = disk(VERSIONS[2], "size=64m", &job(""));
    ended(&ran, "success", "0");
    assert_eq!(output(&ran, "built"), "3", "{}", ran.log);
}

#[test]
fn inodes_that_end_are_named() {
    let job = "job --publish --command 'build many'";
    for version in VERSIONS {
        let ran = disk(version, "size=64m,nr_inodes=3000", job);
        assert_eq!(output(&ran, "outcome"), "disk-full", "{}", ran.log);
        let named = ["ran out of inodes", " of 3000 inodes"];
        has(&ran.file("summary"), &named, &ran);
    }
}

#[test]
fn a_full_temporary_folder_is_named_and_words_alone_are_not_believed() {
    let temp = "mkdir /area/tmp; busybox mount -t tmpfs -o size=8m tmpfs /area/tmp; export TMPDIR=/area/tmp\n";
    let full = format!("{temp}job --command 'head -c 20M /dev/zero >$TMPDIR/file'");
    let ran = disk(VERSIONS[0], "size=512m", &full);
    ended(&ran, "disk-full", "1");
    let named = ["with the temporary folder `/area/tmp`", "(`TMPDIR`)"];
    has(&ran.file("summary"), &named, &ran);

    let words = format!("{temp}job --command 'echo No space left on device >&2; exit 3'");
    let ran = disk(VERSIONS[0], "size=512m", &words);
    ended(&ran, "command-failed", "3");

    let low = format!("{temp}job --command 'head -c 7500K /dev/zero >$TMPDIR/file'");
    let ran = disk(VERSIONS[0], "size=512m", &low);
    ended(&ran, "success", "0");
    has(&ran.log, &["warning: disk: `/area/tmp (tmpfs)`"], &ran);
}
