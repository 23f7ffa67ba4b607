//! `flywheel validate-builders` on builders that are really broken, one way at a time, and on healthy ones.

mod caches;
mod classes;
mod daemons;
mod hosts;
mod scripted;
mod workflow;

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

use crate::world::cache::Cache;
use crate::world::{PATH, binary, folders, need, with_private_nix};

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

/// The exit code, the report and the log of a canary.
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
        for name in ["nix", "work", "temp", "bin"] {
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
        folders::isolate(&mut command, self.folder.path())
            .env("RUNNER_TEMP", self.path("temp"))
            .env("XDG_CACHE_HOME", self.path("home/cache"));
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

/// A fault of the caches: the builder is healthy in spite of it, unless the caller requires the cache.
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
        let printed = format!(
            "{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        assert!(output.status.success() && printed.is_empty(), "{printed}");
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
        let printed = format!(
            "{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        assert!(output.status.success(), "{printed}");
    }
}
