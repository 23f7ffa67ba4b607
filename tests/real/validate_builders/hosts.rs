//! Faults of the host: its tools, its Nix and its store, its flake, its memory and its disk. Each one makes the
//! builder unhealthy.

use std::os::unix::fs::PermissionsExt as _;
use std::time::Duration;

use super::{Builder, FLAKE, NIX_CONFIG, SMALL, broken};
use crate::world::binary;

#[test]
fn a_broken_toolchain_is_named() {
    let missing = || {
        Builder::new()
            .broken_by("for f in /usr/bin/nix /bin/nix; do mount --bind /dev/null $f; done")
    };
    broken(
        "nix missing, and not to be installed",
        &missing().args(&["--nix-installer", "none"]),
        "toolchain",
    );
    repaired(
        "nix missing",
        &missing(),
        "nix-on-path",
        "there is no Nix yet",
    );
    repaired(
        "nix not on PATH",
        &Builder::new().run_by("env PATH=/nonexistent"),
        "nix-on-path",
        "not on `PATH`",
    );
    let old = Builder::new().program("nix", "echo 'nix (Nix) 2.3.16'");
    assert!(
        broken("nix too old", &old, "toolchain")
            .log
            .contains("the class wants >=2.8")
    );
    broken(
        "nix is something else",
        &Builder::new().program("nix", "echo hello"),
        "toolchain",
    );
    broken(
        "nix crashes",
        &Builder::new().program("nix", "kill -SEGV $$"),
        "toolchain",
    );
    let config = |features: &str| format!("build-users-group =\nsubstituters =\n{features}");
    let off = Builder::new().env("NIX_CONFIG", &config(""));
    repaired("features off", &off, "nix-features", "`nix-command` is off");
    let half = Builder::new().env(
        "NIX_CONFIG",
        &config("experimental-features = nix-command\n"),
    );
    repaired("flakes off", &half, "nix-features", "`flakes` is off");
    broken(
        "NIX_CONFIG malformed",
        &Builder::new().env("NIX_CONFIG", "garbage"),
        "hints",
    );
}

/// A lack that a job makes up for by itself: it is named, and the builder is healthy.
#[track_caller]
fn repaired(name: &str, builder: &Builder, check: &str, problem: &str) {
    let canary = builder.run();
    assert_eq!(
        (canary.layer(), canary.code),
        ("", 0),
        "{name}:\n{}",
        canary.log
    );
    let text = canary.check(check)["text"].to_string();
    assert!(
        text.contains(problem) && text.contains("`nix-job` repairs this"),
        "{name}: {text}"
    );
}

#[test]
fn a_check_that_hangs_is_cut_off() {
    let hangs = Builder::new().program("nix", "sleep 600 & sleep 600");
    let canary = broken("nix hangs", &hangs, "toolchain");
    assert!(
        canary.took > Duration::from_secs(9) && canary.took < Duration::from_secs(14),
        "{:?}",
        canary.took
    );
    let canary = broken("the whole", &hangs.args(&["--timeout", "2"]), "toolchain");
    assert!(canary.took < Duration::from_secs(5), "{:?}", canary.took);
}

#[test]
fn a_broken_store_is_named() {
    let socket = "mkdir -p /nix/var/nix/daemon-socket; python3 -c 'import socket; socket.socket(socket.AF_UNIX).bind(\"/nix/var/nix/daemon-socket/socket\")'";
    let listening = "mkdir -p /nix/var/nix/daemon-socket; python3 -c 'import socket, time; s = socket.socket(socket.AF_UNIX); s.bind(\"/nix/var/nix/daemon-socket/socket\"); s.listen(9); print(1, flush=True); time.sleep(40)' | head -n 1 >/dev/null &\nuntil [ -S /nix/var/nix/daemon-socket/socket ]; do :; done";
    let daemon = || Builder::new().env("NIX_REMOTE", "daemon");
    broken("daemon dead", &daemon(), "daemon");
    broken("socket stale", &daemon().broken_by(socket), "daemon");
    broken("daemon silent", &daemon().broken_by(listening), "daemon");
    let stranger = "nix-store --init; chown -R 1:1 \"$D/home\" \"$D/tmp\" \"$D/runtime\" \"$D/state\" \"$D/temp\" \"$D/work\"";
    let nobody = Builder::new()
        .broken_by(stranger)
        .run_by("setpriv --reuid 1 --regid 1 --clear-groups");
    broken(
        "store of another user, no daemon",
        &with_copied_binary(nobody),
        "daemon",
    );
    let read_only = "nix-store --init; mount -o remount,bind,ro /nix";
    broken(
        "store read-only",
        &Builder::new().broken_by(read_only),
        "store",
    );
    let corrupt = "nix-store --init; echo garbage >/nix/var/nix/db/db.sqlite; rm -f /nix/var/nix/db/db.sqlite-*";
    broken(
        "database corrupt",
        &Builder::new().broken_by(corrupt),
        "store",
    );
}

/// Another user cannot reach the binary where it was built.
fn with_copied_binary(builder: Builder) -> Builder {
    let copy = builder.path("flywheel");
    std::fs::copy(binary(), &copy).unwrap();
    std::fs::set_permissions(&copy, std::fs::Permissions::from_mode(0o755)).unwrap();
    let wrap = format!(
        "{} sh -c 'shift; exec {} \"$@\"' sh",
        builder.wrap,
        copy.display()
    );
    builder.run_by(&wrap)
}

#[test]
fn a_user_whom_the_daemon_does_not_trust_is_named() {
    let setup = "NIX_REMOTE= nix-store --init\nchown -R 1:1 \"$D/home\" \"$D/tmp\" \"$D/runtime\" \"$D/state\" \"$D/temp\" \"$D/work\"\nchmod 755 /nix /nix/var /nix/var/nix\n\
        env -u NIX_REMOTE HOME=\"$D\" NIX_CONFIG='build-users-group =\ntrusted-users = root\nsubstituters =' nix-daemon >/dev/null 2>&1 &\n\
        trap 'kill $!' EXIT\nuntil [ -S /nix/var/nix/daemon-socket/socket ]; do :; done";
    let builder = Builder::new().broken_by(setup).env("NIX_REMOTE", "daemon");
    let builder = with_copied_binary(
        builder.run_by("setpriv --reuid 1 --regid 1 --clear-groups --pdeathsig keep"),
    );
    let canary = builder.run();
    assert_eq!(
        (canary.layer(), canary.code),
        ("user-trust", 1),
        "{}",
        canary.log
    );
    let config = format!("{NIX_CONFIG}trusted-users = root alice\n");
    let told = canary.check("store-writers")["text"].to_string();
    assert!(told.contains("this repository's alone"), "{told}");
    assert!(!told.contains("can write"), "{told}");
    let canary = builder.env("NIX_CONFIG", &config).run();
    let told = canary.check("store-writers")["text"].to_string();
    assert!(told.contains("trusted users (`alice`) can write"), "{told}");
}

#[test]
fn a_sandbox_that_cannot_be_is_named() {
    // The kernel makes no user namespaces for a process in a changed root.
    let setup = "mkdir \"$D/root\"; mount --rbind / \"$D/root\"";
    let builder = || Builder::new().broken_by(setup);
    let wrap = |builder: Builder| {
        let script = format!(
            "chroot {}/root setpriv --bounding-set -sys_admin --inh-caps -sys_admin sh -c 'cd {}/work && exec \"$@\"' sh",
            builder.folder.path().display(),
            builder.folder.path().display()
        );
        builder.run_by(&script)
    };
    let canary = broken(
        "with a fallback nobody notices",
        &wrap(builder()),
        "sandbox",
    );
    assert_eq!(
        canary.check("canary-build")["verdict"],
        "passed",
        "{}",
        canary.log
    );
    let strict = format!("{NIX_CONFIG}sandbox-fallback = false\n");
    broken(
        "without a fallback nothing is built",
        &wrap(builder()).env("NIX_CONFIG", &strict),
        "sandbox",
    );
}

#[test]
fn a_broken_flake_is_named() {
    let flake = |text: &str| Builder::new().file("flake.nix", text);
    broken(
        "no such output",
        &flake("{ outputs = _: { checks = { }; }; }"),
        "evaluation",
    );
    broken(
        "no such system",
        &flake("{ outputs = _: { packages.riscv64-none = { }; }; }"),
        "evaluation",
    );
    broken(
        "evaluation error",
        &flake("{ outputs = _: { packages.x86_64-linux.a = throw \"no\"; }; }"),
        "evaluation",
    );
    broken("syntax error", &flake("{ outputs = _: {"), "evaluation");
    let failing = FLAKE.replace("derivations = \"\"; ", "");
    let builder = flake(&failing).args(&["--package", "path:.#default"]);
    broken("build error", &builder, "package");
    let users = format!("{NIX_CONFIG}build-users-group = nobody-has-it\n");
    repaired(
        "no build users",
        &Builder::new().env("NIX_CONFIG", &users),
        "store-opens",
        "the group `nobody-has-it` does not exist",
    );
}

#[test]
fn a_host_without_room_is_named() {
    let nix = |options: &str| format!("mount -t tmpfs -o {options} tmpfs /nix");
    broken(
        "disk full",
        &Builder::new().broken_by(&nix("size=64m")),
        "disk",
    );
    let filled = format!(
        "{}; nix-store --init; cat /dev/zero >/nix/fill 2>/dev/null || :",
        nix("size=24m")
    );
    broken(
        "disk full to the last byte",
        &Builder::new().broken_by(&filled).args(&[
            "--advisory",
            "disk",
            "--min-free",
            "1MiB",
            "--required",
            "disk",
        ]),
        "disk",
    );
    broken(
        "inodes used up",
        &Builder::new().broken_by(&nix("size=2g,nr_inodes=5000")),
        "inodes",
    );
    let temporary = "mount -t tmpfs -o ro tmpfs \"$D/temp\"";
    broken(
        "temporary folder read-only",
        &Builder::new().broken_by(temporary),
        "temporary-space",
    );
    // The shell leaves the group in the end, so that the group can be removed from the machine.
    let few = "cd /sys/fs/cgroup/memory; mkdir flywheel-canary-$$; echo 48M >flywheel-canary-$$/memory.limit_in_bytes\n\
        trap 'cd /sys/fs/cgroup/memory; echo $$ >cgroup.procs; rmdir flywheel-canary-$$' EXIT; echo $$ >flywheel-canary-$$/cgroup.procs";
    let canary = broken(
        "memory below the class",
        &Builder::new().broken_by(few),
        "memory",
    );
    assert!(canary.log.contains("a limit of 48.0 MiB"), "{}", canary.log);
    let much = Builder::new().file("flywheel.yml", &SMALL.replace("64MiB", "900TiB"));
    broken("a machine too small", &much, "memory");
}

#[test]
fn the_other_classes_are_looked_at_too() {
    let class = |class: &str| Builder::new().args(&["--class", class]);
    let tools = || {
        class("general")
            .program("git", "echo git version 2.39.5")
            .program("pnpm", "echo 10.1.0")
    };
    let healthy = tools().program("node", "echo v22.1.0").run();
    assert_eq!((healthy.code, healthy.layer()), (0, ""), "{}", healthy.log);
    assert_eq!(healthy.check("tool-node")["text"], "v22.1.0");
    broken(
        "tool too old",
        &tools().program("node", "echo v12.22.0"),
        "tools",
    );
    broken(
        "tool crashes",
        &tools().program("node", "echo missing libatomic >&2; exit 127"),
        "tools",
    );
    broken(
        "tool missing",
        &tools().run_by("env PATH=/nonexistent"),
        "tools",
    );
    let container = || class("container").env("DOCKER_HOST", "unix:///nonexistent/docker.sock");
    broken(
        "no endpoint",
        &container().program(
            "docker",
            "echo Cannot connect to the Docker daemon >&2; exit 1",
        ),
        "docker",
    );
    let builds = r#"case $1 in version) echo 26.1.5 ;; build) echo "no space" >&2; exit 1 ;; esac"#;
    broken(
        "no image",
        &container().program("docker", builds),
        "image-build",
    );
    let kernel = || class("kernel").program("gcc", "echo gcc 14.2.0");
    broken(
        "no headers",
        &kernel()
            .program("make", "echo GNU Make 4.4")
            .args(&["--kernel-release", "0.0.1-none"]),
        "headers",
    );
    let headers = "mkdir -p \"$D/modules/9.9.9/build\"; touch \"$D/modules/9.9.9/build/Makefile\"; mkdir -p /lib/modules; mount --bind \"$D/modules\" /lib/modules";
    let make = "case \"$*\" in --version) echo GNU Make 4.4 ;; *) echo 'gcc: error: unrecognized option' >&2; exit 2 ;; esac";
    let failing = kernel()
        .broken_by(headers)
        .program("make", make)
        .args(&["--kernel-release", "9.9.9"]);
    broken("no module", &failing, "module");
}
