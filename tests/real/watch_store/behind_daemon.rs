//! Jobs of many steps of an ordinary user, whose commands reach Nix's daemon through a socket of the job's own.

use crate::world::versions::{Ran, VERSIONS, run};

/// A daemon of root's, a repository of alice's, and jobs of hers as a self-hosted runner starts them: `job NAME` makes one,
/// and `step NAME COMMAND…` runs a step of it, with the variables that earlier steps have set.
const WORLD: &str = r#"
rm /bin; mkdir /bin; ln -s /usr/bin/* /bin; ln -sf bash /bin/sh
printf '%s\n' 'sandbox = false' 'build-users-group = nixbld' 'substituters =' \
  'experimental-features = nix-command flakes' >/etc/nix/nix.conf
unset NIX_CONFIG
nix-daemon --daemon >/tmp/daemon 2>&1 &
SOCKET=/nix/var/nix/daemon-socket/socket
for _ in $(seq 400); do [ -S $SOCKET ] && break; sleep 0.05; done
cat >/area/store.nix <<'END'
{ name }: derivation {
  inherit name; system = "x86_64-linux"; builder = "/bin/bash";
  args = [ "-euc" "echo ${name} >$out" ];
}
END
job() {
  mkdir -p /area/$1/temp /out/$1
  for file in env outputs summary path; do : >/out/$1/$file; done
  echo '{"ref":"refs/heads/main","after":"1111111111111111111111111111111111111111","deleted":false,'\
'"repository":{"full_name":"octo-org/app","default_branch":"main"}}' >/area/$1/event.json
  chown -R alice: /area/$1 /out/$1
}
step() {
  local job=$1 line name end value variables=()
  shift
  while IFS= read -r line; do
    name=${line%%<<*} end=${line#*<<} value=
    while IFS= read -r line && [ "$line" != "$end" ]; do value+=${value:+$'\n'}$line; done
    variables+=("$name=$value")
  done </out/$job/env
  (cd /area/$job && setpriv --reuid 1000 --regid 1000 --clear-groups --inh-caps=-all \
    env HOME=/home/alice USER=alice CI=true GITHUB_ACTIONS=true GITHUB_EVENT_NAME=push GITHUB_REF=refs/heads/main \
    GITHUB_REPOSITORY=octo-org/app GITHUB_JOB=$job GITHUB_EVENT_PATH=/area/$job/event.json \
    GITHUB_ENV=/out/$job/env GITHUB_OUTPUT=/out/$job/outputs GITHUB_STEP_SUMMARY=/out/$job/summary \
    GITHUB_PATH=/out/$job/path RUNNER_TEMP=/area/$job/temp RUNNER_TRACKING_ID=github_$job RUNNER_ENVIRONMENT=self-hosted \
    FLYWHEEL_PUSH_CACHE=true FLYWHEEL_EMBEDDED_CACHE=/area/$job/cache "${variables[@]}" "$@")
}
build() { step $1 nix-build --no-out-link /area/store.nix --argstr name $2; }
# The names of the paths in a job's cache.
served() { sed -n 's/^StorePath: .nix.store.[^-]*-//p' $(grep -rl '^StorePath: ' /area/$1/cache) | sort | tr '\n' ' '; }
watch_pid() { step $1 /fly/flywheel watch-store status --format json | sed -n 's/^ *"pid": \([0-9]*\),*$/\1/p'; }
# The proxies of which the link begins like this.
proxies() {
  local process words
  for process in /proc/[0-9]*; do
    { mapfile -d '' -t words <$process/cmdline; } 2>/dev/null || continue
    if [ "${words[1]-}" = daemon-proxy ] && [[ ${words[2]-} == $1* ]]; then echo ${process#/proc/}; fi
  done
}
proxy_pid() { proxies /area/$1/; }
link() { echo /area/$1/temp/flywheel-1000/nix-*/nix-daemon; }
# Waits until a job's link leads to the daemon itself.
led_back() {
  for _ in $(seq 400); do [ "$(readlink $(link $1))" = $SOCKET ] && return; sleep 0.02; done
  echo "it leads to $(readlink $(link $1))"; exit 71
}
"#;

#[track_caller]
fn world(version: &str, script: &str) -> Ran {
    let ran = run(version, &format!("{WORLD}\nset -e\n{script}"));
    assert_eq!(ran.code, 0, "{version}\n{}", ran.log);
    ran
}

/// The last value of an output of a job.
#[track_caller]
fn output(ran: &Ran, job: &str, name: &str) -> String {
    let text = ran.file(&format!("{job}/outputs"));
    let mut lines = text.lines();
    let mut found = None;
    while let Some(line) = lines.next() {
        let (is, end) = line.split_once("<<").unwrap();
        let value: Vec<&str> = lines.by_ref().take_while(|line| *line != end).collect();
        if is == name {
            found = Some(value.join("\n"));
        }
    }
    found.unwrap_or_else(|| panic!("no output {name}\n{}", ran.log))
}

#[test]
fn two_jobs_at_once_publish_what_their_own_steps_named_and_miss_nothing() {
    for version in VERSIONS {
        let ran = world(
            version,
            "job early; build early warm
            job one; job two
            step one /fly/flywheel watch-store start >/out/one/start 2>&1
            step two /fly/flywheel watch-store start >/out/two/start 2>&1
            for n in 1 2 3; do build one one-$n & build two two-$n; wait $!; done
            # It was valid before, so that nothing but its name shows that the job needs it.
            build one warm
            build one both; build two both
            step one /fly/flywheel watch-store finish >/out/one/finish 2>&1
            step two /fly/flywheel watch-store finish >/out/two/finish 2>&1
            served one >/out/one/served; served two >/out/two/served
            # What an earlier step has left running has the variables of before, and a later one has others.
            step one env NIX_DAEMON_SOCKET_PATH=$(link one) nix-build --no-out-link /area/store.nix --argstr name late
            step one env | grep '^NIX_DAEMON_SOCKET_PATH=' >/out/one/given-back
            [ -z \"$(proxies /)\" ] || exit 72",
        );
        for (job, names) in [
            ("one", "both one-1 one-2 one-3 warm "),
            ("two", "both two-1 two-2 two-3 "),
        ] {
            let log = ran.file(&format!("{job}/finish"));
            let served: String = ran.file(&format!("{job}/served"));
            let served = served.replace(".drv ", " ");
            assert_eq!(served, names, "{version}, {job}\n{log}");
            assert!(log.contains(", 0 lost"), "{version}, {job}\n{log}");
            assert_eq!(output(&ran, job, "ambiguous"), "0", "{version}\n{log}");
        }
        let socket = "NIX_DAEMON_SOCKET_PATH=/nix/var/nix/daemon-socket/socket\n";
        assert_eq!(ran.file("one/given-back"), socket);
    }
}

#[test]
fn whichever_process_is_killed_the_next_command_reaches_the_daemon() {
    let ran = world(
        VERSIONS[0],
        "job proxy; step proxy /fly/flywheel watch-store start >/out/proxy/start 2>&1
        build proxy proxy-1
        kill -9 $(proxy_pid proxy)
        build proxy proxy-2
        led_back proxy
        step proxy /fly/flywheel watch-store finish >/out/proxy/finish 2>&1

        job watch; step watch /fly/flywheel watch-store start >/out/watch/start 2>&1
        build watch watch-1
        kill -9 $(watch_pid watch)
        build watch watch-2
        led_back watch
        build watch watch-3
        # A second watch in the same job, which has the link of the first as its daemon.
        step watch /fly/flywheel watch-store start >/out/watch/start 2>&1
        build watch watch-4
        step watch /fly/flywheel watch-store finish >/out/watch/finish 2>&1
        served watch >/out/watch/served
        step watch env | grep '^NIX_DAEMON_SOCKET_PATH=' >/out/watch/given-back

        job both; step both /fly/flywheel watch-store start >/out/both/start 2>&1
        build both both-1
        watch=$(watch_pid both); proxy=$(proxy_pid both)
        kill -STOP $watch $proxy; kill -9 $watch $proxy
        step both /fly/flywheel watch-store status >/out/both/status 2>&1
        led_back both
        build both both-2
        step both /fly/flywheel watch-store finish >/out/both/finish 2>&1
        served both >/out/both/served
        step both env | grep '^NIX_DAEMON_SOCKET_PATH=' >/out/both/given-back",
    );
    // What passed after the proxy's end is in the database, but nobody knows what else was named.
    let log = ran.file("proxy/finish");
    assert!(
        log.contains("not watched") && !log.contains(", 0 lost"),
        "{log}"
    );
    assert!(log.contains("the proxy in front of Nix's daemon has ended"));
    for (job, names) in [
        ("watch", "watch-1 watch-2 watch-3 watch-4 "),
        ("both", "both-1 both-2 "),
    ] {
        let log = ran.file(&format!("{job}/finish"));
        assert_eq!(ran.file(&format!("{job}/served")), names, "{log}");
        let socket = "NIX_DAEMON_SOCKET_PATH=/nix/var/nix/daemon-socket/socket\n";
        assert_eq!(ran.file(&format!("{job}/given-back")), socket);
    }
}
