//! `just bench bootstrap`: Nix installed as a closure from a binary cache on the loopback, beside `nix copy` of the same
//! closure into an empty store, and beside `tar` of a release archive with `nix-store --load-db`; and a job that finds
//! Nix there.
//!
//! As root; the closure is that of `scripts/nix-closure.sh`, the binary that of the release profile, or `FLYWHEEL_BIN`.
//! Prints a table of medians and writes `target/bench/bootstrap.json`. `FLYWHEEL_BENCH_RUNS` (7) is the number of
//! rounds. Everything is written to `target/bench`, which has to be on a disk and not in memory.
#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a bench that fails says why by panicking"
)]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

#[path = "bootstrap/files.rs"]
mod files;
#[path = "../tests/it/world/folders.rs"]
#[expect(dead_code, reason = "the tests use more of it")]
mod folders;
#[path = "shared/table.rs"]
mod table;

use table::Table;

const COLD: &str = "nix-job, cold";
const WARM: &str = "nix-job, warm";
const CALLS: &str = "what of it Nix takes";
const COPY: &str = "nix copy";
const TAR: &str = "tar xJf and nix-store --load-db";

fn main() {
    let rounds = std::env::var("FLYWHEEL_BENCH_RUNS")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(7);
    let bench = Bench::new();
    let mut table = Table::default();
    for round in 0..=rounds {
        println!(
            "round {round} of {rounds}{}",
            if round == 0 {
                ", which does not count"
            } else {
                ""
            }
        );
        let store = bench.fresh("store");
        let figures = [
            (COLD, bench.job(&store)),
            (WARM, bench.job(&store)),
            (CALLS, bench.calls(&store)),
            (COPY, bench.copy()),
            (TAR, bench.tar()),
        ];
        for (name, wall) in figures {
            if round > 0 {
                table.add(name, BTreeMap::from([("wall ms", wall)]));
            }
        }
    }
    table.print("bootstrap");
    let wall = |name: &str| table.median(name, "wall ms");
    // A job with Nix does all that a job without it does, but install it.
    let installation = wall(COLD) - wall(WARM);
    println!("\nratios (goal)");
    println!("installation, a cold job less a warm one: {installation:.0} ms");
    println!(
        "to `nix copy`: {:.2} (at most 1.0)",
        installation / wall(COPY)
    );
    println!("to `tar`: {:.2} (at most 0.5)", installation / wall(TAR));
    println!(
        "our own part of a warm job: {:.0} ms (under 50)",
        wall(WARM) - wall(CALLS)
    );
}

struct Bench {
    folder: PathBuf,
    flywheel: PathBuf,
    closure: PathBuf,
    debian: PathBuf,
    url: String,
    key: String,
    path: String,
}

impl Bench {
    fn new() -> Self {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let closure = root.join("target/tools/nix-closure");
        let made = Command::new(root.join("scripts/nix-closure.sh"))
            .status()
            .unwrap();
        assert!(made.success(), "scripts/nix-closure.sh");
        let folder = root.join("target/bench/bootstrap");
        fs::create_dir_all(&folder).unwrap();
        let named = std::env::var_os("FLYWHEEL_BIN").map(PathBuf::from);
        let text = |name: &str| fs::read_to_string(closure.join(name)).unwrap();
        Self {
            folder,
            flywheel: named.unwrap_or_else(|| env!("CARGO_BIN_EXE_flywheel").into()),
            url: files::serve(closure.join("zstd")),
            key: text("key.pub").trim().to_owned(),
            path: text("path").trim().to_owned(),
            debian: root.join("target/tools/nix-2.34.8/usr"),
            closure,
        }
    }

    /// An empty folder.
    fn fresh(&self, name: &str) -> PathBuf {
        let folder = self.folder.join(name);
        // The first time there is nothing to remove.
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir(&folder).unwrap();
        folder
    }

    /// A job that does nothing, with the Nix of the cache in `store`. The machine's own Nix is hidden.
    fn job(&self, store: &Path) -> f64 {
        let mut command = self.within(store);
        let source = format!("{} {}", self.url, self.key);
        command
            .arg(&self.flywheel)
            .args([
                "nix-job",
                "--nix-installer",
                "closure",
                "--nix-source",
                &source,
            ])
            .args(["--nix-version", &self.path, "--command", "true"]);
        Self::time(&mut command)
    }

    /// The calls of Nix that a job makes when Nix is there: its version beside its settings, and opening the store.
    fn calls(&self, store: &Path) -> f64 {
        let mut command = self.within(store);
        let script = "nix --version & nix show-config --json >/dev/null & wait; nix store ping";
        command.args(["sh", "-c", script]);
        Self::time(&mut command)
    }

    fn within(&self, store: &Path) -> Command {
        fs::create_dir_all("/nix").unwrap();
        let hide = "for nix in /usr/bin/nix /usr/local/bin/nix; do [ ! -e $nix ] || mount --bind /dev/null $nix; done";
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private", "sh", "-c"]);
        folders::isolate(&mut command, &self.folder)
            .arg(format!("{hide}; mount --bind \"$0\" /nix && exec \"$@\""))
            .arg(store)
            .env("PATH", format!("{}/bin:/usr/bin:/bin:/usr/sbin:/sbin", self.path))
            .env("NIX_CONFIG", "build-users-group =\nsubstituters =\nsandbox = false\nextra-experimental-features = nix-command flakes");
        command
    }

    /// Debian's Nix 2.34, through its own loader.
    fn nix(&self, name: &str) -> Command {
        let library = self.debian.join("lib/x86_64-linux-gnu");
        let mut command = Command::new(self.debian.join("lib64/ld-linux-x86-64.so.2"));
        folders::isolate(&mut command, &self.folder)
            .arg("--library-path")
            .arg(library)
            .args(["--argv0", name])
            .arg(self.debian.join("bin/nix"))
            .env("NIX_CONFIG", format!("build-users-group =\nextra-experimental-features = nix-command\ntrusted-public-keys = {}", self.key));
        command
    }

    fn copy(&self) -> f64 {
        // Nix remembers what a cache has.
        let _ = fs::remove_dir_all(self.folder.join("home/.cache"));
        let store = format!("local?root={}", self.fresh("copy").display());
        let mut command = self.nix("nix");
        command.args(["copy", "--from", &self.url, "--to", &store, &self.path]);
        Self::time(&mut command)
    }

    fn tar(&self) -> f64 {
        let root = self.fresh("tar");
        fs::create_dir(root.join("nix")).unwrap();
        let mut unpack = Command::new("tar");
        unpack
            .args(["--strip-components=1", "-xJf"])
            .arg(self.closure.join("nix-2.34.8-x86_64-linux.tar.xz"))
            .arg("-C")
            .arg(root.join("nix"));
        let unpacked = Self::time(&mut unpack);
        let mut load = self.nix("nix-store");
        load.args([
            "--store",
            &format!("local?root={}", root.display()),
            "--load-db",
        ])
        .stdin(fs::File::open(root.join("nix/.reginfo")).unwrap());
        let began = Instant::now();
        assert!(load.status().unwrap().success());
        unpacked + began.elapsed().as_secs_f64() * 1000.0
    }

    /// In milliseconds.
    fn time(command: &mut Command) -> f64 {
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let began = Instant::now();
        let output = command.output().unwrap();
        let wall = began.elapsed().as_secs_f64() * 1000.0;
        assert!(
            output.status.success(),
            "{command:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        wall
    }
}
