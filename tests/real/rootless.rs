//! A user who can have no store at `/nix`, in a root of his own with each version of Nix: his job sees a folder of his as
//! `/nix`, or ends at once with what an administrator has to do.

use std::time::Duration;

use crate::world::versions::{self, Ran};

/// A flake whose outputs are a plain one, and a program with a loader and libraries of its own in the store.
const FLAKE: &str = r#"
{
  outputs = { self }:
    let
      build = name: script: derivation {
        inherit name;
        system = "x86_64-linux";
        builder = "/bin/sh";
        args = [ "-ec" script ];
      };
      dependency = build "dependency" "echo one > $out";
      libraries = builtins.path { path = ./libraries; name = "libraries"; };
    in {
      packages.x86_64-linux = {
        # The job's folder is not in sight where the sandbox is on.
        plain = build "plain" "test ! -e /area; read line < ${dependency}; echo $line two > $out";
        program = build "program" ''
          /bin/busybox mkdir -p $out/bin
          echo '#!/bin/bash' > $out/bin/program
          echo 'exec ${libraries}/loader --library-path ${libraries} ${libraries}/env echo dynamic' >> $out/bin/program
          /bin/busybox chmod +x $out/bin/program
        '';
      };
    };
}
"#;

/// Functions for the scripts below. Nothing of Nix is at `/nix`, and alice may not make it.
const GUEST: &str = r#"
unset NIX_CONFIG
rmdir /nix
cat >/etc/nix/nix.conf <<END
experimental-features = nix-command flakes
substituters =
sandbox = true
sandbox-fallback = false
sandbox-paths = /bin/sh=/usr/bin/busybox /bin/busybox=/usr/bin/busybox
END
mkdir /area/checkout /area/temp /area/tools
cat >/area/checkout/flake.nix <<'END'
FLAKE
END
mkdir /area/checkout/libraries
cp /usr/bin/env /area/checkout/libraries/
cp /lib64/ld-linux-x86-64.so.2 /area/checkout/libraries/loader
cp "$(find /usr/lib -name libc.so.6)" /area/checkout/libraries/
printf '%s' '{"ref":"refs/heads/main","before":"2222222222222222222222222222222222222222",' \
  '"after":"1111111111111111111111111111111111111111","created":false,"deleted":false,"forced":false,' \
  '"repository":{"full_name":"octo-org/octo-repo","default_branch":"main","fork":false}}' >/area/push.json
chown -R 1000:1000 /area
cd /area/checkout
store=/area/tools/flywheel-1000/rootless

# A step of a push to main, as alice.
step() {
  setpriv --reuid 1000 --regid 1000 --clear-groups --inh-caps=-all --ambient-caps=-all env -i \
    HOME=/home/alice USER=alice PATH=/usr/bin:/bin LANG=C.UTF-8 CI=true GITHUB_ACTIONS=true GITHUB_EVENT_NAME=push \
    GITHUB_REF=refs/heads/main GITHUB_REF_TYPE=branch GITHUB_REF_NAME=main GITHUB_REF_PROTECTED=true \
    GITHUB_REPOSITORY=octo-org/octo-repo GITHUB_JOB=job GITHUB_RUN_ID=1 GITHUB_RUN_ATTEMPT=1 \
    GITHUB_SHA=1111111111111111111111111111111111111111 GITHUB_EVENT_PATH=/area/push.json GITHUB_WORKSPACE=/area/checkout \
    GITHUB_OUTPUT=/area/output GITHUB_STEP_SUMMARY=/area/summary RUNNER_TEMP=/area/temp RUNNER_TOOL_CACHE=/area/tools \
    RUNNER_ENVIRONMENT=self-hosted FLYWHEEL_PUSH_CACHE=true "$@"
}
nix_job() {
  step /fly/flywheel nix-job --embedded-cache /area/cache --command "$1"
}
# The next command has to hold.
must() {
  "$@" && return
  echo "NOT SO: $*"
  exit 70
}
# The last output of this name, as the runner reads it.
outcome() { grep -A1 '^outcome<<' /area/output | tail -n 1; }
mounts() { sort /proc/self/mounts; }
mounts >/out/mounts-before
"#;

fn run(version: &str, script: &str) -> Ran {
    let guest = GUEST.replace("FLAKE\n", FLAKE.trim_start());
    versions::run(version, &format!("{guest}\n{script}\nexit 0"))
}

#[track_caller]
fn passed(version: &str, script: &str) -> Ran {
    let ran = run(version, script);
    assert_eq!(ran.code, 0, "{version}: {}", ran.log);
    ran
}

/// What every version has to show: the sandbox, the same paths as elsewhere, a program that runs, nothing lost.
fn demo(version: &str) {
    let ran = passed(
        version,
        r#"
nix_job '
  test "$(id -u)" = 1000
  test "$PWD" = /area/checkout
  ! grep -q "CapEff:.*[1-9a-f]" /proc/self/status
  nix build path:.#plain --out-link ../result
  test "$(cat ../result)" = "one two"
  test "$(nix run path:.#program)" = dynamic
  nix-store --query --hash "$(readlink ../result)" >/area/hash
  readlink ../result >/area/path
  ls / >/area/entries
' >/out/said 2>&1
code=$?
cat /out/said
must test $code = 0
must grep -q ', 0 lost$\|, 0 lost ' /out/said
must test "$(outcome)" = success
must grep -q "its files are in .$store/nix., which this job alone sees as ./nix." /area/summary
must test -d "$store/nix/var/nix/db"
must test "$(stat -c %a "$store")" = 700
must test ! -e /nix
must test ! -e /home/alice/.local/share/nix/root
must test -L /area/result
ls / >/out/entries
must test "$(cat /out/entries)" = "$(grep -vx nix /area/entries)"
mounts >/out/mounts-after
must test "$(cat /out/mounts-after)" = "$(cat /out/mounts-before)"

# A later step sees the same store.
step /fly/flywheel nix-job --command 'nix path-info ../result' >/out/said 2>&1 || { cat /out/said; exit 70; }

# What an ordinary machine makes of it, as root with a store at /nix.
mkdir /nix
printf 'build-users-group =\n' >>/etc/nix/nix.conf
nix build path:.#plain --out-link /out/ordinary || exit 70
ordinary=$(readlink /out/ordinary)
must test "$ordinary" = "$(cat /area/path)"
must test "$(nix-store --query --hash "$ordinary")" = "$(cat /area/hash)"
"#,
    );
    assert!(
        ran.log.contains("this user cannot have a store at `/nix`"),
        "{}",
        ran.log
    );
}

#[test]
fn a_job_of_nix_2_8_sees_a_store_of_its_own() {
    demo("2.8.0");
}

#[test]
fn a_job_of_nix_2_26_sees_a_store_of_its_own() {
    demo("2.26.3");
}

#[test]
fn a_job_of_nix_2_34_sees_a_store_of_its_own() {
    demo("2.34.8");
}

#[test]
fn nothing_of_the_hosts_nix_is_seen_and_nothing_is_left_of_a_killed_job() {
    passed(
        "2.34.8",
        r#"
mkdir -p /nix/store/planted
# `sudo` is there, and of no use.
mkdir /area/bin
printf '#!/bin/bash\necho a password is required >&2\nexit 1\n' >/area/bin/sudo
chmod +x /area/bin/sudo
step env PATH=/area/bin:/usr/bin:/bin /fly/flywheel nix-job --command 'test ! -e /nix/store/planted; exit 37' >/out/said 2>&1
must test $? = 37

step timeout --signal=INT --kill-after=20 1 /fly/flywheel nix-job --command 'sleep 600' >/out/said 2>&1
must test $? = 124
must test "$(outcome)" = cancelled

step /fly/flywheel nix-job --command 'echo $PPID >/area/pid; mkfifo /area/fifo; read line </area/fifo' >/out/said 2>&1 &
end=$((SECONDS + 20))
until [ -p /area/fifo ]; do [ $SECONDS -lt $end ] || { cat /out/said; exit 70; }; sleep 0.02; done
must kill -KILL "$(cat /area/pid)"
wait $!
mounts >/out/mounts-after
must test "$(cat /out/mounts-after)" = "$(cat /out/mounts-before)"
must test -d /nix/store/planted
nix_job 'nix build path:.#plain --out-link ../result; cat ../result' >/out/said 2>&1 || { cat /out/said; exit 70; }
"#,
    );
}

#[test]
fn the_store_is_in_the_home_folder_or_where_every_user_can_write() {
    passed(
        "2.8.0",
        r#"
step env -u HOME -u RUNNER_TOOL_CACHE /fly/flywheel nix-job --command 'nix store ping' >/out/said 2>&1
must test $? = 0
must test -d /home/alice/.local/state/flywheel/rootless/nix/var/nix/db

# A home folder that cannot be written to, a tool cache in the checkout, and a name that another user has taken.
rm -rf /home/alice/.local
chown 0:0 /home/alice
mkdir -p /var/tmp
chmod 1777 /var/tmp
mkdir -m 755 /var/tmp/flywheel-1000
step env RUNNER_TOOL_CACHE=/area/checkout/tools /fly/flywheel nix-job --command 'nix store ping' >/out/said 2>&1
must test $? = 0
must test ! -e /area/checkout/tools
must test -n "$(find /var/tmp -path '/var/tmp/flywheel-1000-*/rootless/nix/store')"
"#,
    );
}

#[test]
fn what_an_earlier_step_built_is_published_by_a_later_one() {
    passed(
        "2.26.3",
        r#"
nix_job 'nix build path:.#plain --out-link ../result' >/out/said 2>&1 || { cat /out/said; exit 70; }
export log=/out/publish
step /fly/flywheel publish ../result >$log 2>&1
must grep -q 'rootless/nix' $log
step /fly/flywheel publish /nix/store/00000000000000000000000000000000-other >$log 2>&1
must test $? != 0
must test "$(grep -c 'rootless/nix' $log)" = 0
"#,
    );
}

/// An error for an administrator: within five seconds, with these words, and nothing made.
fn refused(version: &str, script: &str, words: &[&str]) {
    let ran = run(
        version,
        &format!(
            "began=$(date +%s%N)\n{script}\ncode=$?\necho $((($(date +%s%N) - began) / 1000000)) >/out/took\n\
             must test $code = 69\nmust test ! -e $store\nmust test ! -e /home/alice/.local/state/flywheel/rootless\n\
             must test \"$(outcome)\" = not-started"
        ),
    );
    assert_eq!(ran.code, 0, "{}", ran.log);
    let took = Duration::from_millis(ran.file("took").trim().parse().unwrap());
    assert!(took < Duration::from_secs(5), "{took:?}");
    for word in words {
        assert!(ran.log.contains(word), "{word}: {}", ran.log);
    }
}

#[test]
fn a_setting_of_the_kernel_that_forbids_it_is_named() {
    // The settings are those of the user namespace that they are written in.
    refused(
        "2.34.8",
        "step unshare --user --map-current-user --keep-caps bash -c 'echo 0 >/proc/sys/user/max_user_namespaces; exec setpriv \
         --ambient-caps=-all --inh-caps=-all \"$@\"' - /fly/flywheel nix-job --command true",
        &[
            "there is no `/nix`",
            "user namespaces are forbidden by `user.max_user_namespaces = 0`",
            "`sysctl -w user.max_user_namespaces=15000`",
            "`install -d -o 1000 -g 1000 -m 755 /nix`",
        ],
    );
    refused(
        "2.8.0",
        "step unshare --user --map-current-user --keep-caps bash -c 'echo 0 >/proc/sys/user/max_mnt_namespaces; exec setpriv \
         --ambient-caps=-all --inh-caps=-all \"$@\"' - /fly/flywheel flake-checks",
        &[
            "`user.max_mnt_namespaces = 0`",
            "`sysctl -w user.max_mnt_namespaces=15000`",
        ],
    );
}

#[test]
fn a_chroot_is_named() {
    refused(
        "2.34.8",
        "mkdir /other && for folder in usr dev proc area home out etc fly; do mkdir /other/$folder; \
         busybox mount -o rbind /$folder /other/$folder; done; for folder in bin lib lib64; do ln -s usr/$folder /other/$folder; \
         done; in=/other/in.sh; declare -f step >$in; echo 'cd /area/checkout; step /fly/flywheel nix-job --command true' >>$in; \
         chroot /other /bin/bash /in.sh",
        &["user namespaces cannot be made inside a `chroot`"],
    );
}

#[test]
fn a_watch_that_later_steps_could_not_see_is_refused() {
    refused(
        "2.34.8",
        "busybox mount --bind /dev/null /usr/bin/nix; step /fly/flywheel watch-store start",
        &[
            "to no others",
            "`flywheel nix-job`",
            "`install -d -o 1000 -g 1000 -m 755 /nix`",
        ],
    );
}

#[test]
fn a_wrong_input_comes_first_and_makes_nothing() {
    passed(
        "2.34.8",
        r#"
step /fly/flywheel nix-job --working-directory /area/nowhere --command true >/out/said 2>&1
must test $? = 64
must test ! -e /area/tools/flywheel-1000
"#,
    );
}

#[test]
fn it_is_taken_back_once_nothing_of_jobs_is_in_it() {
    let ran = passed(
        "2.34.8",
        r#"
nix_job 'echo kept > kept; nix-store --add kept' || exit 71
must test -d $store
step /fly/flywheel setup --undo >/out/refused 2>&1 && exit 72
must grep 'jobs have put 1 store path there' /out/refused
must test -d $store
nix_job 'nix-store --gc' || exit 73
step /fly/flywheel setup --undo || exit 74
must test ! -e $store
step /fly/flywheel setup --undo >/out/again || exit 75
"#,
    );
    assert!(
        ran.file("again").contains("nothing to take back"),
        "{}",
        ran.log
    );
}
