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
in rec {
  before = size "before" 1;
  kept = size "kept" 2;
  first = size "first" 30;
  # So large that what is left beside both is short, also while Nix does without the 8 MiB that it keeps in reserve: a
  # collection takes them away, and the next `nix` puts them back.
  second = size "second" 75;
  third = size "third" 32;
  # After the first, so that both are tried one after the other.
  huge = run "huge" "head -c 1 ${first} >/dev/null; head -c 200M /dev/urandom >$out";
  lots = builtins.genList (n: run "lot${toString n}" "echo ${toString n} >$out") 40;
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

/// Waits for a minute until there is room for `third`.
const UNTIL_FREED: &str = "for _ in $(seq 1200); do
    [ \"$(df --output=avail -k /nix | tail -n 1)\" -lt 34000 ] || break
    sleep 0.05
done";

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
        let ran = disk(version, "size=128m", job);
        ended(&ran, "disk-full", "7");
        assert_eq!(output(&ran, "published"), "1", "{}", ran.log);
        let named = [
            "**Disk full:** `/nix (tmpfs)`, with the store",
            "-first (30.0 MiB)",
            "`reclaim: true`",
            "**Lowest free room:**",
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
        let ran = disk(version, "size=128m", &job);
        ended(&ran, "success", "0");
        for (name, number) in [("published", "4"), ("built", "4")] {
            assert_eq!(output(&ran, name), number, "{name}\n{}", ran.log);
        }
        has(&ran.file("there"), &["-before"], &ran);
        has(&ran.file("summary"), &["**Freed in the store:**"], &ran);
        has(&ran.log, &["flywheel: disk: freed "], &ran);
    }
}

#[test]
fn an_ordinary_user_of_a_daemon_frees_what_is_his_own() {
    let job = format!(
        r#"
printf '%s\n' 'sandbox = false' 'build-users-group = nixbld' 'substituters =' >/etc/nix/nix.conf
unset NIX_CONFIG
nix-daemon --daemon >/tmp/daemon 2>&1 &
for _ in $(seq 400); do [ -S /nix/var/nix/daemon-socket/socket ] && break; sleep 0.05; done
: >/out/outputs; : >/out/summary
chmod 666 /out/outputs /out/summary; cp store.nix /area/; chown -R alice: /area; cd /area
cat >script <<'END'
build first; build second
{UNTIL_FREED}
build third
END
setpriv --reuid 1000 --regid 1000 --clear-groups --inh-caps=-all \
  env HOME=/home/alice USER=alice NIX_REMOTE=daemon \
  /fly/flywheel nix-job --publish --reclaim true -- bash -e script
echo "$?" >/out/code"#
    );
    let ran = disk(VERSIONS[0], "size=128m", &job);
    ended(&ran, "success", "0");
    assert_eq!(output(&ran, "published"), "3", "{}", ran.log);
}

#[test]
fn a_job_of_many_steps_frees_its_own_garbage_and_reports_it() {
    // The packages of the guest have no `sh`, by which the background process is started.
    let job = format!(
        "rm /bin; mkdir /bin; ln -s /usr/bin/* /bin; ln -sf bash /bin/sh
        eval \"$(/fly/flywheel watch-store start --publish --reclaim true)\"
        build first; build second
        {UNTIL_FREED}
        build third && echo built >/out/built
        : >/out/outputs; : >/out/summary
        /fly/flywheel watch-store finish; echo $? >/out/code"
    );
    let ran = disk(VERSIONS[1], "size=128m", &job);
    assert_eq!(ran.file("built"), "built\n", "{}", ran.log);
    ended(&ran, "success", "0");
    assert_eq!(output(&ran, "published"), "3", "{}", ran.log);
    has(&ran.file("summary"), &["**Freed in the store:**"], &ran);
}

#[test]
fn a_check_that_fills_the_disk_gives_the_run_its_outcome() {
    let job = r#"
: >/out/outputs; : >/out/summary
cat >flake.nix <<'END'
{ outputs = { self }: { checks.x86_64-linux = { inherit (import ./store.nix) first huge; }; }; }
END
/fly/flywheel flake-checks --publish --flake path:.
echo "$?" >/out/code"#;
    let ran = disk(VERSIONS[2], "size=128m", job);
    ended(&ran, "disk-full", "1");
    let named = ["**Disk full:** `/nix (tmpfs)`", "-first (30.0 MiB)"];
    has(&ran.file("summary"), &named, &ran);
}

#[test]
fn a_journal_without_room_is_a_warning_that_names_the_disk_and_costs_no_path() {
    let job = "mkdir /area/state; busybox mount -t tmpfs -o size=64k tmpfs /area/state
        export XDG_STATE_HOME=/area/state
        job --publish --command 'head -c 1M /dev/zero >/area/state/file || true; build lots'";
    let ran = disk(VERSIONS[2], "size=128m", job);
    ended(&ran, "success", "0");
    assert_eq!(output(&ran, "published"), "40", "{}", ran.log);
    let named = [
        "warning: journal: it could not be written",
        "no room on `/area/state (tmpfs)`",
        "warning: disk: `/area/state (tmpfs)`, with the journal",
    ];
    has(&ran.log, &named, &ran);
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
    let ran = disk(VERSIONS[2], "size=128m", &away);
    assert_eq!(output(&ran, "outcome"), "disk-full", "{}", ran.log);
    assert_eq!(output(&ran, "lost"), "2", "{}", ran.log);
    has(&ran.log, &["so that nothing is freed"], &ran);

    let ran = disk(VERSIONS[2], "size=128m", &job(""));
    ended(&ran, "success", "0");
    assert_eq!(output(&ran, "built"), "3", "{}", ran.log);
}

#[test]
fn inodes_that_end_are_named() {
    let job = "job --publish --command 'build many'";
    for version in VERSIONS {
        let ran = disk(version, "size=128m,nr_inodes=3000", job);
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
    let named = ["with the temporary folder `/area/tmp`", "(`TMPDIR`, "];
    has(&ran.file("summary"), &named, &ran);

    let words = format!("{temp}job --command 'echo No space left on device >&2; exit 3'");
    let ran = disk(VERSIONS[0], "size=512m", &words);
    ended(&ran, "command-failed", "3");

    let low = format!("{temp}job --command 'head -c 7500K /dev/zero >$TMPDIR/file'");
    let ran = disk(VERSIONS[0], "size=512m", &low);
    ended(&ran, "success", "0");
    has(&ran.log, &["warning: disk: `/area/tmp (tmpfs)`"], &ran);
}
