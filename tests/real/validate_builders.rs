//! `flywheel validate-builders` on builders that are really broken, one way at a time, and on healthy ones.

mod classes;
mod scripted;
mod workflow;

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

use self::scripted::{Nar, Scripted};
use crate::bazel::{Answer, Server};
use crate::faults::{Fault, Plan, When};
use crate::world::cache::Cache;
use crate::world::{PATH, binary, need, with_private_nix};

/// What a builder's Nix needs here: root without build users, and no cache but the one under test.
const NIX_CONFIG: &str =
    "experimental-features = nix-command flakes\nbuild-users-group =\nsubstituters =\n";
const SMALL: &str = "classes: {nix-builder: {lanes: [{label: small, memory: 64MiB}]}}\n";
const FLAKE: &str = r#"{ outputs = _: { packages.x86_64-linux.default = derivation { name = "d"; system = "builtin"; builder = "builtin:buildenv"; derivations = ""; manifest = "/x"; }; }; }"#;

/// A builder: a folder with a `/nix`, a home, a workspace and a temporary folder of its own.
struct Builder {
    folder: TempDir,
    setup: String,
    wrap: String,
    environment: Vec<(String, String)>,
    arguments: Vec<String>,
}

/// What the canary said.
struct Canary {
    code: i32,
    report: Value,
    log: String,
    took: Duration,
}

impl Canary {
    fn layer(&self) -> &str {
        self.report["broken-layer"].as_str().unwrap_or_default()
    }

    fn check(&self, name: &str) -> &Value {
        let checks = self.report["checks"]
            .as_array()
            .unwrap_or_else(|| panic!("no report:\n{}", self.log));
        checks
            .iter()
            .find(|check| check["name"] == name)
            .unwrap_or_else(|| panic!("no check `{name}`:\n{}", self.log))
    }
}

impl Builder {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        for name in ["nix", "home", "work", "temp", "bin"] {
            std::fs::create_dir(folder.path().join(name)).unwrap();
        }
        // Another user is let in, as far as a test needs it.
        std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        std::fs::write(folder.path().join("work/flake.nix"), FLAKE).unwrap();
        std::fs::write(folder.path().join("work/flywheel.yml"), SMALL).unwrap();
        let builder = Self {
            folder,
            setup: String::new(),
            wrap: String::new(),
            environment: Vec::new(),
            arguments: Vec::new(),
        };
        builder
            .args(&["--flake", "path:."])
            .env("NIX_CONFIG", NIX_CONFIG)
            .env("PATH", PATH)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn args(mut self, arguments: &[&str]) -> Self {
        self.arguments
            .extend(arguments.iter().map(|argument| (*argument).to_owned()));
        self
    }

    fn env(mut self, name: &str, value: &str) -> Self {
        self.environment.retain(|(known, _)| known != name);
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Shell lines that break it, run as root where its `/nix` is; `$D` is its folder.
    fn broken_by(mut self, setup: &str) -> Self {
        self.setup.push_str(setup);
        self.setup.push('\n');
        self
    }

    /// A command that the canary is run by.
    fn run_by(mut self, wrap: &str) -> Self {
        self.wrap = wrap.to_owned();
        self
    }

    /// A file of the workspace.
    fn file(self, name: &str, text: &str) -> Self {
        std::fs::write(self.path("work").join(name), text).unwrap();
        self
    }

    /// A program in front of the host's.
    fn program(self, name: &str, script: &str) -> Self {
        let file = self.path("bin").join(name);
        std::fs::write(&file, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o755)).unwrap();
        let path = format!("{}:{PATH}", self.path("bin").display());
        self.env("PATH", &path)
    }

    fn cache(self, url: &str) -> Self {
        self.env("ATTIC_SERVER", url)
    }

    fn run(&self) -> Canary {
        let script = format!(
            "set -eu\nD='{}'\n{}\ncd \"$D/work\"\n{} \"$@\"\n",
            self.folder.path().display(),
            self.setup,
            self.wrap
        );
        let mut command: Command = with_private_nix(&self.path("nix"), Path::new("/bin/sh"));
        command
            .args(["-c", &script, "sh"])
            .arg(binary())
            .arg("validate-builders")
            .args(&self.arguments);
        command.args([
            "--report-file",
            self.path("temp/report.json").to_str().unwrap(),
        ]);
        command
            .env_clear()
            .env("HOME", self.path("home"))
            .env("RUNNER_TEMP", self.path("temp"));
        command.env("XDG_CACHE_HOME", self.path("home/cache"));
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        let report = self.path("temp/report.json");
        let _ = std::fs::remove_file(&report);
        let begun = Instant::now();
        let output = command.output().unwrap();
        let took = begun.elapsed();
        let log = format!(
            "{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        let report = std::fs::read_to_string(report)
            .ok()
            .and_then(|text| serde_json::from_str(&text).ok());
        // Where there is no room for the report, the log has it.
        let from_log = || {
            let line = log
                .lines()
                .find_map(|line| line.split_once("is broken at `"))?
                .1;
            Some(serde_json::json!({ "broken-layer": line.split('`').next()?, "healthy": false }))
        };
        let report = report.or_else(from_log).unwrap_or(Value::Null);
        Canary {
            code: output.status.code().unwrap_or(-1),
            report,
            log,
            took,
        }
    }
}

#[track_caller]
fn broken(name: &str, builder: &Builder, layer: &str) -> Canary {
    let canary = builder.run();
    assert_eq!(
        (canary.layer(), canary.code),
        (layer, 1),
        "{name}:\n{}",
        canary.log
    );
    canary
}

/// A fault of the caches: the builder is healthy in spite of it, unless the caller says otherwise.
#[track_caller]
fn degraded(name: &str, builder: Builder, layer: &str) {
    let canary = builder.run();
    assert_eq!(
        (canary.layer(), canary.code),
        (layer, 0),
        "{name}:\n{}",
        canary.log
    );
    let family = layer.split('-').next().unwrap();
    let required = if family == "bazel" { layer } else { family };
    broken(name, &builder.args(&["--required", required]), layer);
}

#[test]
fn a_healthy_builder_takes_less_than_five_seconds() {
    let builder = Builder::new().args(&[
        "--package",
        "path:.#default",
        "--metrics-file",
        "metrics.prom",
    ]);
    for _ in 0..2 {
        let canary = builder.run();
        assert_eq!((canary.code, canary.layer()), (0, ""), "{}", canary.log);
        assert!(
            canary.took < Duration::from_secs(5),
            "{:?}\n{}",
            canary.took,
            canary.log
        );
        for check in [
            "nix-features",
            "store-takes-files",
            "user-trusted",
            "sandbox",
            "evaluation",
            "canary-build",
            "package",
        ] {
            assert_eq!(
                canary.check(check)["verdict"],
                "passed",
                "{check}\n{}",
                canary.log
            );
        }
        assert!(canary.report["cold-start-seconds"].as_f64().unwrap() > 0.0);
    }
    let built = std::fs::read_dir(builder.path("nix/store"))
        .unwrap()
        .flatten();
    let outputs = built.filter(|entry| {
        entry
            .file_name()
            .to_string_lossy()
            .contains("-flywheel-canary-")
            && entry.path().is_dir()
    });
    assert_eq!(
        outputs.count(),
        4,
        "each run builds anew: once as a job does, once in the sandbox"
    );
}

#[test]
fn a_cache_that_works_is_written_and_read_back() {
    let cache = Cache::start(&[]);
    let builder = Builder::new()
        .cache(&cache.url)
        .env("ATTIC_TOKEN", &cache.token)
        .env("ATTIC_PUBLIC_KEY", &cache.key);
    let builder = builder.args(&["--publish"]);
    let canary = builder.run();
    assert_eq!((canary.code, canary.layer()), (0, ""), "{}", canary.log);
    for check in [
        "cache-name",
        "cache-connect",
        "cache-answer",
        "cache-authorised",
        "cache-exists",
        "cache-write",
        "cache-read-back",
    ] {
        assert_eq!(
            canary.check(check)["verdict"],
            "passed",
            "{check}\n{}",
            canary.log
        );
    }
    assert!(!canary.log.contains(&cache.token));
    assert_eq!(cache.names().len(), 1, "{:?}", cache.names());
    assert_eq!(
        canary.check("cache-nar")["verdict"],
        "skipped",
        "nothing of the store was there\n{}",
        canary.log
    );
    // The next canary finds what this one wrote, and reads it, although it may not write.
    let reader = Builder {
        arguments: vec!["--flake".into(), "path:.".into()],
        ..builder
    };
    let canary = reader.run();
    assert_eq!((canary.code, canary.layer()), (0, ""), "{}", canary.log);
    for check in ["cache-narinfo", "cache-nar", "cache-signature"] {
        assert_eq!(
            canary.check(check)["verdict"],
            "passed",
            "{check}\n{}",
            canary.log
        );
    }
}

#[test]
fn a_pull_request_writes_nothing() {
    let cache = Cache::start(&[]);
    let builder = Builder::new()
        .cache(&cache.url)
        .env("ATTIC_TOKEN", &cache.token)
        .env("GITHUB_ACTIONS", "true");
    let canary = builder
        .env("GITHUB_EVENT_NAME", "pull_request")
        .args(&["--push-cache", "true"])
        .run();
    assert_eq!(
        (canary.code, canary.check("cache-write")["verdict"].as_str()),
        (0, Some("skipped")),
        "{}",
        canary.log
    );
    assert!(cache.names().is_empty());
}

#[test]
fn a_broken_toolchain_is_named() {
    let hidden = "for f in /usr/bin/nix /bin/nix; do mount --bind /dev/null $f; done";
    broken(
        "nix missing",
        &Builder::new().broken_by(hidden),
        "toolchain",
    );
    broken(
        "nix not on PATH",
        &Builder::new().run_by("env PATH=/nonexistent"),
        "toolchain",
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
    assert!(
        broken("features off", &off, "toolchain")
            .log
            .contains("`nix-command` is off")
    );
    let half = Builder::new().env(
        "NIX_CONFIG",
        &config("experimental-features = nix-command\n"),
    );
    assert!(
        broken("flakes off", &half, "toolchain")
            .log
            .contains("`flakes` is off")
    );
    broken(
        "NIX_CONFIG malformed",
        &Builder::new().env("NIX_CONFIG", "garbage"),
        "hints",
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
    let stranger = "nix-store --init; chown -R 1:1 \"$D/home\" \"$D/temp\" \"$D/work\"";
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
    let setup = "NIX_REMOTE= nix-store --init\nchown -R 1:1 \"$D/home\" \"$D/temp\" \"$D/work\"\nchmod 755 /nix /nix/var /nix/var/nix\n\
        env -u NIX_REMOTE HOME=/root NIX_CONFIG='build-users-group =\ntrusted-users = root\nsubstituters =' nix-daemon >/dev/null 2>&1 &\n\
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
}

#[test]
fn a_sandbox_that_cannot_be_is_named() {
    // Nobody in a changed root may make user namespaces.
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
    broken(
        "no build users",
        &Builder::new().env("NIX_CONFIG", &users),
        "build",
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
    let few = "mkdir /sys/fs/cgroup/memory/flywheel-canary-$$ && echo 48M >/sys/fs/cgroup/memory/flywheel-canary-$$/memory.limit_in_bytes && echo $$ >/sys/fs/cgroup/memory/flywheel-canary-$$/cgroup.procs";
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
fn a_broken_hint_is_named() {
    let hint = |name: &str, value: &str| {
        let canary = Builder::new().env(name, value).run();
        assert_eq!(
            (canary.layer(), canary.code),
            ("hints", 0),
            "{}",
            canary.log
        );
        assert!(
            canary.check("hints")["text"]
                .as_str()
                .unwrap()
                .contains(name),
            "{}",
            canary.log
        );
    };
    hint("ATTIC_SERVER", "${ATTIC_SERVER}");
    hint("ATTIC_CACHE", "a/b");
    hint("ATTIC_PUBLIC_KEY", "main:short");
    degraded(
        "hints",
        Builder::new().env("ATTIC_SERVER", "attic.example"),
        "hints",
    );
}

#[test]
fn a_cache_that_cannot_be_reached_is_named_by_its_layer() {
    let closed = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    degraded(
        "name unknown",
        Builder::new().cache("http://cache.flywheel.invalid"),
        "cache-name",
    );
    degraded(
        "port closed",
        Builder::new().cache(&format!("http://127.0.0.1:{closed}")),
        "cache-connect",
    );
    let front = |fault: Fault| Plan::new().fault("", When::Always, fault).alone();
    degraded(
        "port silent",
        Builder::new().cache(&front(Fault::Hang).url()),
        "cache-answer",
    );
    degraded(
        "500",
        Builder::new().cache(&front(Fault::Status(500)).url()),
        "cache-answer",
    );
    degraded(
        "a proxy's page",
        Builder::new().cache(&front(Fault::Html(200)).url()),
        "cache-answer",
    );
    degraded(
        "403",
        Builder::new().cache(&front(Fault::Status(403)).url()),
        "cache-authorised",
    );
    let private = Cache::start(&["--private"]);
    degraded(
        "401",
        Builder::new().cache(&private.url),
        "cache-authorised",
    );
    let cache = Cache::start(&[]);
    degraded(
        "no such cache",
        Builder::new().cache(&cache.url).env("ATTIC_CACHE", "other"),
        "cache-exists",
    );
    degraded(
        "no TLS",
        Builder::new().cache(&cache.url.replace("http", "https")),
        "cache-tls",
    );
    let stranger = scripted::Tls::start();
    degraded(
        "a certificate of nobody's",
        Builder::new().cache(&stranger.url),
        "cache-tls",
    );
}

#[test]
fn a_clock_that_is_wrong_is_named() {
    let server = Scripted::start(|_, _| {
        scripted::answer(
            200,
            &[("Date", "Thu, 01 Jan 2015 00:00:00 GMT")],
            b"StoreDir: /nix/store\n",
        )
    });
    broken("clock", &Builder::new().cache(&server.url), "clock");
}

#[test]
fn a_cache_that_serves_what_it_should_not_is_named() {
    let nar = Nar::new();
    let check = |name: &str, server: &Scripted, layer: &str| {
        let builder = Builder::new()
            .cache(&server.url)
            .env("ATTIC_PUBLIC_KEY", &nar.key)
            .args(&["--cache-path", &nar.path]);
        degraded(name, builder, layer);
    };
    let good = nar.clone();
    let server = Scripted::start(move |_, path| good.serve(path));
    let builder = Builder::new()
        .cache(&server.url)
        .env("ATTIC_PUBLIC_KEY", &nar.key)
        .args(&["--cache-path", &nar.path]);
    let canary = builder.run();
    assert_eq!(
        (
            canary.layer(),
            canary.check("cache-nar")["verdict"].as_str()
        ),
        ("", Some("passed")),
        "{}",
        canary.log
    );
    assert_eq!(
        canary.check("cache-signature")["verdict"],
        "passed",
        "{}",
        canary.log
    );
    for (name, layer, broken) in [
        ("no narinfo", "cache-narinfo", "narinfo 404"),
        ("narinfo without NAR", "cache-nar", "nar 404"),
        ("empty NAR", "cache-nar", "nar empty"),
        ("another NAR", "cache-nar", "nar other"),
        ("bad signature", "cache-signature", "signature"),
    ] {
        let nar = nar.clone();
        check(
            name,
            &Scripted::start(move |_, path| nar.serve_broken(path, broken)),
            layer,
        );
    }
}

#[test]
fn a_cache_that_cannot_be_written_is_named() {
    let tokens = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(tokens.path(), "write the-writer\nread the-reader\n").unwrap();
    let cache = Cache::start_with_tokens(tokens.path());
    let builder = Builder::new()
        .cache(&cache.url)
        .env("ATTIC_TOKEN", "the-reader")
        .args(&["--publish"]);
    degraded("write refused", builder, "cache-write");
    let forgetful = Scripted::start(|method, path| match (method, path) {
        ("PUT", _) => scripted::answer(200, &[], br#"{"kind":"uploaded"}"#),
        (_, path) if path.ends_with("nix-cache-info") => {
            scripted::answer(200, &[], b"StoreDir: /nix/store\n")
        }
        _ => scripted::answer(404, &[], b""),
    });
    let builder = Builder::new()
        .cache(&forgetful.url)
        .env("ATTIC_TOKEN", "x")
        .args(&["--publish"]);
    degraded("written and not there", builder, "cache-read-back");
}

#[test]
fn a_bazel_cache_that_does_not_answer_is_named() {
    let allowed = || {
        Builder::new().file(
            "flywheel.yml",
            &format!("{SMALL}shared-cache: {{allow-localhost: true}}\n"),
        )
    };
    let closed = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let bazel = |url: &str| allowed().env("BAZEL_REMOTE_CACHE", url);
    degraded(
        "dead",
        bazel(&format!("grpc://127.0.0.1:{closed}")),
        "bazel-cache",
    );
    degraded(
        "garbage",
        bazel(&Server::start(Answer::GrpcGarbage).url("grpc")),
        "bazel-cache",
    );
    degraded(
        "gRPC of another kind",
        bazel(&Server::start(Answer::GrpcStatus("12")).url("grpc")),
        "bazel-cache",
    );
    degraded(
        "silent",
        bazel(&Server::start(Answer::Silent).url("grpc")),
        "bazel-cache",
    );
    degraded(
        "a web page",
        bazel(&Server::start(Answer::Http(200, "<html>")).url("http")),
        "bazel-cache",
    );
    degraded("malformed", bazel("grpc:/cache"), "bazel-cache");
    let cacheless = Server::start(Answer::Grpc { execution: false }).url("grpc");
    degraded(
        "executes nothing",
        bazel(&cacheless).env("BAZEL_REMOTE_EXECUTOR", &cacheless),
        "bazel-executor",
    );
    for (answer, scheme) in [
        (Answer::Grpc { execution: true }, "grpc"),
        (Answer::Http(404, ""), "http"),
    ] {
        let canary = bazel(&Server::start(answer).url(scheme)).run();
        assert_eq!(
            (
                canary.layer(),
                canary.check("bazel-cache")["verdict"].as_str()
            ),
            ("", Some("passed")),
            "{}",
            canary.log
        );
    }
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

#[test]
fn metrics_are_what_prometheus_reads() {
    let promtool = need("promtool", "scripts/bootstrap.sh tools installs it");
    let builder = Builder::new()
        .cache("http://127.0.0.1:9")
        .args(&["--metrics-file", "metrics.prom"]);
    for builder in [
        Builder::new().args(&["--metrics-file", "metrics.prom"]),
        builder,
    ] {
        builder.run();
        let metrics = std::fs::File::open(builder.path("work/metrics.prom")).unwrap();
        let output = Command::new(&promtool)
            .args(["check", "metrics"])
            .stdin(metrics)
            .output()
            .unwrap();
        let said = format!(
            "{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        assert!(output.status.success() && said.is_empty(), "{said}");
    }
    let alerts = crate::world::root().join("alerts");
    for arguments in [
        ["check", "rules", "flywheel.rules.yml"],
        ["test", "rules", "flywheel.rules.test.yml"],
    ] {
        let output = Command::new(&promtool)
            .args(arguments)
            .current_dir(&alerts)
            .output()
            .unwrap();
        let said = format!(
            "{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        assert!(output.status.success(), "{said}");
    }
}
