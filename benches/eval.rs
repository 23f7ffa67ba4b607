//! `just bench eval`: the evaluation of `flake-checks` beside one `nix flake check --no-build`, beside `nix eval` one by
//! one, and beside chunks of four attributes over two workers; the second run, with evaluation memory; and the time to
//! the first Check Run.
//!
//! As root, with real Nix; the binary is that of the release profile, or `FLYWHEEL_BIN`. Prints a table of medians and
//! writes `target/bench/eval.json`. `FLYWHEEL_BENCH_RUNS` (3) is the number of runs, `FLYWHEEL_BENCH_WORK` (20000) how
//! many numbers an attribute adds up, which takes about 2.3 ms. What would take minutes is done for a part, and
//! multiplied: the rows say so.
#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a bench that fails says why by panicking"
)]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

#[path = "../tests/it/world/folders.rs"]
#[expect(dead_code, reason = "the tests use more of it")]
mod folders;
#[path = "../tests/it/world/github.rs"]
#[expect(dead_code, reason = "the tests use more of it")]
mod github;
#[path = "shared/table.rs"]
mod table;

use github::GitHub;
use table::Table;

const TOKEN: &str = "bench-token";
/// So many attributes are evaluated of what is multiplied.
const PART: usize = 40;

fn main() {
    let number = |name: &str, default: usize| {
        std::env::var(name)
            .ok()
            .and_then(|text| text.parse().ok())
            .unwrap_or(default)
    };
    let mut table = Table::default();
    for count in [500, 2000] {
        let bench = Bench::new(count, number("FLYWHEEL_BENCH_WORK", 20_000));
        for run in 0..number("FLYWHEEL_BENCH_RUNS", 3) {
            println!("{count} attributes, run {}", run + 1);
            let mut add = |name: &str, wall: f64| {
                table.add(
                    &format!("{count}: {name}"),
                    BTreeMap::from([("wall s", wall)]),
                );
            };
            add("nix flake check --no-build", bench.flake_check());
            add("flywheel, cold", bench.flywheel("off"));
            bench.forget();
            add("flywheel, cold, remembering", bench.flywheel("on"));
            add("flywheel, warm", bench.flywheel("on"));
            add("flywheel, to the first Check Run", bench.first_check_run());
            add("nix eval one by one (of 40, times)", bench.in_chunks(1, 1));
            add(
                "chunks of 4, two workers (of 40, times)",
                bench.in_chunks(4, 2),
            );
        }
    }
    table.print("eval");
    println!("\nratios (goal)");
    for count in [500, 2000] {
        let wall = |name: &str| table.median(&format!("{count}: {name}"), "wall s");
        let cold = wall("flywheel, cold");
        for (name, goal) in [
            ("nix flake check --no-build", "at least 1.8"),
            ("nix eval one by one (of 40, times)", "none"),
            ("chunks of 4, two workers (of 40, times)", "none"),
        ] {
            println!(
                "{count}: as fast as `{name}` times {:.2} ({goal})",
                wall(name) / cold
            );
        }
        println!(
            "{count}: warm {:.2} s (2,000 under 0.5 s)",
            wall("flywheel, warm")
        );
        println!(
            "{count}: first Check Run after {:.2} s (under 2 s)",
            wall("flywheel, to the first Check Run")
        );
    }
}

/// A repository with a flake of so many outputs.
struct Bench {
    folder: tempfile::TempDir,
    flywheel: PathBuf,
    count: usize,
}

impl Bench {
    fn new(count: usize, work: usize) -> Self {
        let named = std::env::var_os("FLYWHEEL_BIN").map(PathBuf::from);
        let flywheel = named.unwrap_or_else(|| env!("CARGO_BIN_EXE_flywheel").into());
        let bench = Self {
            folder: tempfile::tempdir().unwrap(),
            flywheel,
            count,
        };
        for name in ["nix", "home", "app"] {
            fs::create_dir(bench.path(name)).unwrap();
        }
        let flake = format!(
            r#"{{ outputs = {{ self }}: let
  work = n: builtins.foldl' (a: b: a + b * n) 0 (builtins.genList (x: x) {work});
  make = n: derivation {{ name = "c-${{toString n}}"; system = "x86_64-linux"; builder = "/bin/sh"; text = toString (work n); }};
in {{ checks.x86_64-linux = builtins.listToAttrs (builtins.genList (n: {{ name = "c${{toString n}}"; value = make n; }}) {count}); }}; }}"#
        );
        fs::write(bench.path("app/flake.nix"), flake).unwrap();
        for words in [
            &["init", "--quiet"][..],
            &["add", "--all"],
            &["commit", "--quiet", "--message=x"],
        ] {
            let mut git = Command::new("git");
            git.args(["-c", "user.name=x", "-c", "user.email=x@example.org"])
                .args(words);
            assert!(
                git.current_dir(bench.path("app"))
                    .env("HOME", bench.path("home"))
                    .status()
                    .unwrap()
                    .success()
            );
        }
        bench.time(&mut bench.within("nix", &["flake", "metadata"]));
        bench
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A command in the repository, where a folder of ours is `/nix`.
    fn within(&self, program: impl AsRef<Path>, arguments: &[&str]) -> Command {
        fs::create_dir_all("/nix").unwrap();
        let mut command = Command::new("unshare");
        command.args([
            "--mount",
            "--propagation",
            "private",
            "sh",
            "-c",
            "mount --bind \"$0\" /nix && exec \"$@\"",
        ]);
        folders::isolate(&mut command, self.folder.path())
            .arg(self.path("nix"))
            .arg(program.as_ref())
            .args(arguments)
            .env("PATH", "/usr/bin:/bin:/usr/sbin:/sbin");
        let config = "build-users-group =\nsubstituters =\nsandbox = false\nexperimental-features = nix-command flakes";
        command
            .env("NIX_CONFIG", config)
            .current_dir(self.path("app"));
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        command
    }

    fn time(&self, command: &mut Command) -> f64 {
        let began = Instant::now();
        let output = command.output().unwrap();
        let wall = began.elapsed().as_secs_f64();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        wall
    }

    fn flake_check(&self) -> f64 {
        self.time(&mut self.within("nix", &["flake", "check", "--no-build"]))
    }

    fn checks(&self, memory: &str) -> Command {
        self.within(
            &self.flywheel,
            &[
                "flake-checks",
                "--build",
                "false",
                "--evaluation-memory",
                memory,
            ],
        )
    }

    fn flywheel(&self, memory: &str) -> f64 {
        self.time(&mut self.checks(memory))
    }

    fn forget(&self) {
        // The first time there is nothing to forget.
        let _ = fs::remove_dir_all(self.path("home/.cache/flywheel"));
    }

    fn first_check_run(&self) -> f64 {
        let github = GitHub::start(TOKEN, false);
        let mut command = self.checks("off");
        command
            .env("GITHUB_ACTIONS", "true")
            .env("GITHUB_API_URL", &github.url)
            .env("GITHUB_TOKEN", TOKEN);
        command
            .env("GITHUB_REPOSITORY", "octo-org/app")
            .env("GITHUB_SHA", "a".repeat(40));
        let began = Instant::now();
        let child = Stopped(command.stderr(Stdio::null()).spawn().unwrap());
        let of_output = || github.names().iter().any(|name| name != "flake checks");
        while !of_output() {
            assert!(began.elapsed() < Duration::from_secs(60));
            std::thread::sleep(Duration::from_millis(2));
        }
        drop(child);
        began.elapsed().as_secs_f64()
    }

    /// `PART` attributes in processes of `size` attributes each, so many at once; as long as all would take.
    fn in_chunks(&self, size: usize, at_once: usize) -> f64 {
        let began = Instant::now();
        let chunks: Vec<usize> = (0..PART).step_by(size).collect();
        std::thread::scope(|scope| {
            for worker in 0..at_once {
                let chunks = &chunks;
                scope.spawn(move || {
                    for first in chunks.iter().skip(worker).step_by(at_once) {
                        let names: Vec<String> = (*first..first + size)
                            .map(|n| format!("c.x86_64-linux.c{n}.drvPath"))
                            .collect();
                        let function = format!("c: [ {} ]", names.join(" "));
                        let mut command = self
                            .within("nix", &["eval", "--json", ".#checks", "--apply", &function]);
                        self.time(
                            command.env("XDG_CACHE_HOME", self.path(&format!("cache-{worker}"))),
                        );
                    }
                });
            }
        });
        began.elapsed().as_secs_f64() * self.count as f64 / PART as f64
    }
}

/// A child that ends with this value.
struct Stopped(Child);

impl Drop for Stopped {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
