//! `just bench publish`: publishing beside `nix copy`, to the same embedded cache over HTTP and to `file://`,
//! in one run; the lag from valid to servable and the overhead on a real build; 50 ms more per request; and what it
//! costs when the cache has everything already (`publish/nothing.rs`).
//! Small paths are measured with the caches on the disk that the store is on, and in memory, for a cache's disk is
//! seldom the build's. The overhead is what a build pays for watcher, publisher and a server on its own machine,
//! measured from build to build and, sharper, within builds (`publish/phases.rs`); `TMPDIR` is the disk of all.
//!
//! As root, with real Nix; client and server are the binary of the release profile, or `FLYWHEEL_BIN`.
//! Prints a table of medians and writes `target/bench/publish.json`. `FLYWHEEL_BENCH_RUNS` (3) is the
//! number of runs, `FLYWHEEL_BENCH_MIB` (200) the size of a big path, `FLYWHEEL_BENCH_PAIRS` (5, at least 2) and
//! `FLYWHEEL_BENCH_PHASED` (15, at least 2) the numbers of builds with and without publication in a run.
#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a bench that fails says why by panicking"
)]

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::fs::{IFlags, ioctl_getflags, ioctl_setflags};
use sha2::Digest as _;

#[path = "../tests/it/world/folders.rs"]
#[expect(dead_code, reason = "the tests use more of it")]
mod folders;
#[path = "publish/nothing.rs"]
mod nothing;
#[path = "publish/phases.rs"]
mod phases;
#[path = "shared/table.rs"]
mod table;

use table::{Figures, Table, median};

const SMALL: usize = 500;
const BIG: usize = 5;
/// zstd's level, the same everywhere: Nix's default for zstd and the server's are both 3.
const LEVEL: i32 = 3;
/// The rows of the builds.
const QUIET: &str = "build: without";
const LOUD: &str = "build: publishing";
/// The rows of those that are measured within.
const PHASED_QUIET: &str = "build in phases: without";
const PHASED_LOUD: &str = "build in phases: publishing";
const RTT: Duration = Duration::from_millis(50);
/// A folder in memory.
const MEMORY: &str = "/dev/shm";

/// Where caches lie.
#[derive(Clone, Copy)]
enum Place {
    Disk,
    Memory,
}

fn main() {
    let runs = number("FLYWHEEL_BENCH_RUNS", 3);
    let bench = Bench::new();
    let mut table = Table::default();
    println!("preparing {SMALL} small and {BIG} big paths");
    let small = bench.add("small", SMALL, 8 * 1024);
    let big = bench.add("big", BIG, number("FLYWHEEL_BENCH_MIB", 200) * 1024 * 1024);
    for run in 0..runs {
        println!("run {} of {runs}", run + 1);
        // First, while nothing of the others is still on its way to the disk.
        for pair in 0..number("FLYWHEEL_BENCH_PAIRS", 5).max(2) {
            // In this order or the other: the machine is not the same throughout.
            for publishes in [(run + pair) % 2 == 0, (run + pair) % 2 == 1] {
                table.add(if publishes { LOUD } else { QUIET }, bench.build(publishes));
            }
        }
        for pair in 0..number("FLYWHEEL_BENCH_PHASED", 15).max(2) {
            let works_first = (run + pair) % 2 == 0;
            table.add(PHASED_LOUD, bench.build_in_phases(true, works_first));
            table.add(PHASED_QUIET, bench.build_in_phases(false, works_first));
        }
        for (name, paths) in [("small", &small), ("big", &big)] {
            table.add(
                &format!("{name}: flywheel publish"),
                bench.publish(paths, Duration::ZERO, Place::Disk),
            );
            if name == "big" {
                table.add("big: read, hash, compress once", bench.once(paths));
            }
            table.add(&format!("{name}: nix copy http"), bench.copy_http(paths));
            table.add(
                &format!("{name}: nix copy file"),
                bench.copy_file(paths, Place::Disk),
            );
        }
        table.add(
            "small in memory: flywheel publish",
            bench.publish(&small, Duration::ZERO, Place::Memory),
        );
        table.add(
            "small in memory: nix copy file",
            bench.copy_file(&small, Place::Memory),
        );
        table.add(
            "small: flywheel publish, 50 ms",
            bench.publish(&small, RTT, Place::Disk),
        );
        nothing::measure(
            &bench,
            &mut table,
            &small[..nothing::PATHS.min(small.len())],
        );
    }
    table.print("publish");
    ratios(&table);
}

fn number(name: &str, default: usize) -> usize {
    std::env::var(name)
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(default)
}

/// What became of it, beside the goals.
fn ratios(table: &Table) {
    println!("\nratios (goal)");
    for (name, other, goal) in [
        ("small", "small: nix copy http", "at least 3"),
        ("small", "small: nix copy file", "at least 1"),
        (
            "small in memory",
            "small in memory: nix copy file",
            "at least 1",
        ),
        ("big", "big: nix copy http", "none"),
        ("big", "big: nix copy file", "none"),
        ("big", "big: read, hash, compress once", "at least 0.83"),
    ] {
        let own = format!("{name}: flywheel publish");
        let [wall, cpu] = ["wall s", "cpu s"].map(|figure| ratio(table, other, &own, figure));
        println!(
            "{name}: as fast as `{other}` times {wall:.2}, with its CPU time divided by {cpu:.2} ({goal})"
        );
    }
    nothing::ratios(table);
    let (percent, error) = overhead(table);
    println!("{LOUD}: {percent:.1} % longer, give or take {error:.1} (none: too coarse for 2 %)");
    let (loud, error) = mean(&table.values(PHASED_LOUD, "longer %"));
    let (quiet, other) = mean(&table.values(PHASED_QUIET, "longer %"));
    println!("{PHASED_LOUD}: {loud:.2} % longer, give or take {error:.2} (under 2 %)");
    println!("{PHASED_QUIET}: {quiet:.2} %, give or take {other:.2}");
}

/// The mean, and its standard error.
fn mean(values: &[f64]) -> (f64, f64) {
    let count = values.len() as f64;
    let mean = values.iter().sum::<f64>() / count;
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    (mean, (squares / (count - 1.0) / count).sqrt())
}

/// The median of what a figure of a row is, divided by that of another row in the same run: a machine that is faster in
/// the next run is so for both.
fn ratio(table: &Table, name: &str, other: &str, figure: &str) -> f64 {
    let pairs = table
        .values(name, figure)
        .into_iter()
        .zip(table.values(other, figure));
    median(pairs.map(|(one, other)| one / other).collect())
}

/// How much longer all builds together take with publication, and the standard error of that, both in percent. The
/// same build differs by a tenth from one time to the next, so that a figure without its error would say nothing.
fn overhead(table: &Table) -> (f64, f64) {
    let [quiet, loud] = [QUIET, LOUD].map(|row| table.values(row, "command s"));
    let (count, whole) = (quiet.len() as f64, quiet.iter().sum::<f64>());
    let ratio = loud.iter().sum::<f64>() / whole;
    let squares: f64 = quiet
        .iter()
        .zip(&loud)
        .map(|(quiet, loud)| (loud - ratio * quiet).powi(2))
        .sum();
    let error = (squares * count / (count - 1.0)).sqrt() / whole;
    (100.0 * (ratio - 1.0), 100.0 * error)
}

struct Bench {
    folder: tempfile::TempDir,
    memory: tempfile::TempDir,
    flywheel: PathBuf,
}

struct Server {
    child: Child,
    folder: PathBuf,
    url: String,
    token: String,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Bench {
    fn new() -> Self {
        let named = std::env::var_os("FLYWHEEL_BIN").map(PathBuf::from);
        let flywheel = named.unwrap_or_else(|| env!("CARGO_BIN_EXE_flywheel").into());
        let folder = tempfile::tempdir().unwrap();
        spread(folder.path());
        Self {
            folder,
            memory: tempfile::tempdir_in(MEMORY).unwrap(),
            flywheel,
        }
    }

    /// In a place of its own on the disk, and removed with all the others at the very end (see `spread`).
    fn new_folder(&self) -> PathBuf {
        tempfile::tempdir_in(self.folder.path()).unwrap().keep()
    }

    fn new_cache(&self, place: Place) -> PathBuf {
        match place {
            Place::Disk => self.new_folder(),
            Place::Memory => tempfile::tempdir_in(self.memory.path()).unwrap().keep(),
        }
    }

    fn serve(&self, place: Place) -> Server {
        let folder = self.new_cache(place);
        let mut command = Command::new(&self.flywheel);
        command.args([
            "cache",
            "serve",
            "--quiet",
            "--stop-after",
            "15m",
            "--listen",
            "127.0.0.1:0",
            "--dir",
        ]);
        folders::isolate(&mut command, self.folder.path());
        let mut child = command.arg(&folder).stdout(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap())
            .lines()
            .map_while(Result::ok);
        let url = lines.next().unwrap();
        assert!(lines.any(|line| line.starts_with("tokens-file")));
        let tokens = fs::read_to_string(folder.join("tokens")).unwrap();
        let token = tokens
            .lines()
            .find_map(|line| line.strip_prefix("write "))
            .unwrap()
            .trim()
            .to_owned();
        Server {
            child,
            folder,
            url,
            token,
        }
    }

    /// A command where this folder is `/nix`.
    fn within(&self, nix: &Path, program: &str) -> Command {
        fs::create_dir_all(nix).unwrap();
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
            .arg(nix)
            .arg(program)
            .env("PATH", "/usr/bin:/bin:/usr/sbin:/sbin");
        command.env("TMPDIR", self.new_folder());
        let config = "build-users-group =\nsubstituters =\nsandbox = false\nexperimental-features = nix-command flakes";
        command
            .env("NIX_CONFIG", config)
            .current_dir(self.folder.path());
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        command
    }

    fn nix(&self) -> PathBuf {
        self.folder.path().join("nix")
    }

    /// Adds paths of this size, half noise and half zeros, to the store.
    fn add(&self, name: &str, count: usize, size: usize) -> Vec<String> {
        let mut random = fastrand::Rng::with_seed(7 + size as u64);
        let mut files = Vec::new();
        for n in 0..count {
            let file = self.folder.path().join(format!("{name}-{n}"));
            let mut out = std::io::BufWriter::new(fs::File::create(&file).unwrap());
            for _ in 0..size / 4096 {
                let mut block = [0; 4096];
                random.fill(&mut block[..2048]);
                out.write_all(&block).unwrap();
            }
            out.flush().unwrap();
            files.push(file);
        }
        let output = self
            .within(&self.nix(), "nix-store")
            .arg("--add")
            .args(&files)
            .stdout(Stdio::piped())
            .output();
        let output = output.unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8(output.stdout)
            .unwrap()
            .lines()
            .map(str::to_owned)
            .collect()
    }

    fn publish(&self, paths: &[String], rtt: Duration, place: Place) -> Figures {
        let server = self.serve(place);
        let url = if rtt.is_zero() {
            server.url.clone()
        } else {
            delayed(&server.url, rtt)
        };
        let mut command = self.within(&self.nix(), self.flywheel.to_str().unwrap());
        command
            .env("ATTIC_TOKEN", &server.token)
            .args(["publish", "--attic-server", &url])
            .args(paths);
        let (figures, said) = measure(command, Some(&server), |_| ());
        assert!(
            said.contains(&format!("{} published", paths.len())) || said.contains(", 0 lost"),
            "{said}"
        );
        figures
    }

    fn copy_http(&self, paths: &[String]) -> Figures {
        let server = self.serve(Place::Disk);
        let netrc = self.folder.path().join("netrc");
        fs::write(
            &netrc,
            format!(
                "machine 127.0.0.1 login flywheel password {}\n",
                server.token
            ),
        )
        .unwrap();
        let to = format!("{}/main?compression=zstd", server.url);
        let mut command = self.within(&self.nix(), "nix");
        command
            .args(["copy", "--option", "netrc-file"])
            .arg(&netrc)
            .args(["--to", &to])
            .args(paths);
        measure(command, Some(&server), |_| ()).0
    }

    fn copy_file(&self, paths: &[String], place: Place) -> Figures {
        let to = format!(
            "file://{}?compression=zstd",
            self.new_cache(place).display()
        );
        let mut command = self.within(&self.nix(), "nix");
        command.args(["copy", "--to", &to]).args(paths);
        measure(command, None, |_| ()).0
    }

    /// Reads, hashes and compresses each path once, one after the other.
    fn once(&self, paths: &[String]) -> Figures {
        struct Both<'a>(sha2::Sha256, zstd::Encoder<'a, fs::File>);
        impl std::io::Write for Both<'_> {
            fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
                self.0.update(bytes);
                self.1.write_all(bytes).map(|()| bytes.len())
            }
            fn flush(&mut self) -> std::io::Result<()> {
                Ok(())
            }
        }
        let (began, cpu) = (Instant::now(), cpu_of("self", 13));
        for path in paths {
            let out = tempfile::tempfile_in(self.folder.path()).unwrap();
            let mut both = Both(sha2::Sha256::new(), zstd::Encoder::new(out, LEVEL).unwrap());
            let file = self.nix().join(path.trim_start_matches("/nix/"));
            flywheel_nix::nar::write(&file, &mut both).unwrap();
            both.1.finish().unwrap();
        }
        BTreeMap::from([
            ("wall s", began.elapsed().as_secs_f64()),
            ("cpu s", cpu_of("self", 13) - cpu),
        ])
    }

    /// A build of many quick derivations by `nix-job`, publishing or not.
    fn build(&self, publishes: bool) -> Figures {
        let build = self.start(publishes);
        let (figures, said) = measure(build.command, Some(&build.server), |_| ());
        let ended = now();
        let times = fs::read_to_string(&build.times).unwrap_or_else(|_| panic!("{said}"));
        let times: Vec<f64> = times
            .lines()
            .map(|line| line.parse::<f64>().unwrap() / 1e9)
            .collect();
        let mut found = BTreeMap::from([
            ("command s", times[1] - times[0]),
            ("cpu s", figures["cpu s"]),
        ]);
        if publishes {
            assert!(said.contains(", 0 lost"), "{said}");
            let mut lags = lags(&build.nix, &build.server.folder);
            assert_eq!(lags.len(), SMALL, "{said}");
            lags.sort_by(f64::total_cmp);
            found.extend([
                ("lag p50 ms", lags[SMALL / 2]),
                ("lag p99 ms", lags[SMALL * 99 / 100]),
            ]);
            found.extend([
                ("drain, verify s", ended - times[1]),
                ("peak MiB", figures["peak MiB"]),
            ]);
        }
        found
    }

    /// The same with what publishing costs measured within.
    fn build_in_phases(&self, publishes: bool, works_first: bool) -> Figures {
        let build = self.start(publishes);
        let (state, server) = (build.nix.join("var/nix"), build.server.child.id());
        let mut longer = f64::NAN;
        let (_, said) = measure(build.command, Some(&build.server), |client| {
            longer = phases::overhead(&state, (SMALL, SMALL), &[client, server], works_first);
        });
        assert!(!publishes || said.contains(", 0 lost"), "{said}");
        BTreeMap::from([("longer %", longer)])
    }

    /// A build of many quick derivations in a store of its own, to be begun.
    fn start(&self, publishes: bool) -> Build {
        let (server, folder) = (self.serve(Place::Disk), self.new_folder());
        let (nix, times) = (folder.join("nix"), folder.join("times"));
        let expression = format!(
            "let part = n: derivation {{ name = \"part-${{toString n}}\"; system = builtins.currentSystem; \
             builder = \"/bin/sh\"; args = [ \"-c\" \"echo ${{toString n}} > $out\" ]; }}; \
             in builtins.genList part {SMALL}"
        );
        let file = folder.join("default.nix");
        fs::write(&file, expression).unwrap();
        let script = format!(
            "date +%s%N >{t}; nix-build --no-out-link -j 2 {f} >/dev/null 2>&1; date +%s%N >>{t}",
            t = times.display(),
            f = file.display()
        );
        let mut command = self.within(&nix, self.flywheel.to_str().unwrap());
        command
            .env("ATTIC_TOKEN", &server.token)
            .args(["nix-job", "--attic-server", &server.url]);
        command.args([
            "--extra-nix-config",
            "sandbox = false",
            "--command",
            &script,
        ]);
        if publishes {
            command.arg("--publish");
        }
        Build {
            command,
            server,
            nix,
            times,
        }
    }
}

/// Has an ext4 put each folder that is made in this one somewhere else on the disk, as it does at its top. Without a
/// journal it makes files slowly for up to six minutes near where many were removed, be it by the compiler or by a
/// build's temporary folders, and most slowly for the server, so that it would seem dear (`recently_deleted` in
/// Linux's `fs/ext4/ialloc.c`).
fn spread(folder: &Path) {
    let folder = fs::File::open(folder).unwrap();
    // Others know no such flag, and need none.
    let _ =
        ioctl_getflags(&folder).and_then(|flags| ioctl_setflags(&folder, flags | IFlags::TOPDIR));
}

/// A build that has not begun.
struct Build {
    command: Command,
    server: Server,
    /// Where its `/nix` is.
    nix: PathBuf,
    /// The file that says when it began and ended, in nanoseconds since 1970.
    times: PathBuf,
}

/// Milliseconds from each path's last change by Nix, which is just before it becomes valid, to the
/// moment when its narinfo became visible.
fn lags(nix: &Path, cache: &Path) -> Vec<f64> {
    let changed = |path: &Path| {
        let about = fs::symlink_metadata(path).unwrap();
        about.ctime() as f64 * 1e3 + about.ctime_nsec() as f64 / 1e6
    };
    let infos = fs::read_dir(cache.join("caches/main"))
        .unwrap()
        .flatten()
        .map(|entry| entry.path());
    let infos = infos.filter(|path| path.extension().is_some_and(|ending| ending == "narinfo"));
    let lag = |info: PathBuf| {
        let text = fs::read_to_string(&info).unwrap();
        let path = text
            .lines()
            .find_map(|line| line.strip_prefix("StorePath: /nix/"))
            .unwrap()
            .to_owned();
        path.contains("-part-")
            .then(|| changed(&info) - changed(&nix.join(path)))
    };
    infos.filter_map(lag).collect()
}

fn now() -> f64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap()
        .as_secs_f64()
}

/// Seconds of user and system time: field 13 on for the process, 15 on for its children that ended.
fn cpu_of(process: &str, field: usize) -> f64 {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).unwrap();
    let fields: Vec<&str> = stat
        .rsplit_once(')')
        .unwrap()
        .1
        .split_whitespace()
        .collect();
    let ticks = |at: usize| fields[at - 2].parse::<f64>().unwrap();
    // `USER_HZ` is 100 on every Linux that Nix runs on.
    (ticks(field) + ticks(field + 1)) / 100.0
}

/// Runs it: wall and CPU time (the server's included), its peak memory, and what it said. `meanwhile` is given its id.
fn measure(
    mut command: Command,
    server: Option<&Server>,
    meanwhile: impl FnOnce(u32),
) -> (Figures, String) {
    let of_server = |server: &Server| cpu_of(&server.child.id().to_string(), 13);
    let cpu = cpu_of("self", 15) + server.map_or(0.0, of_server);
    let began = Instant::now();
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let read = |stream: Box<dyn std::io::Read + Send>| {
        std::thread::spawn(move || {
            let (mut stream, mut text) = (stream, Vec::new());
            stream.read_to_end(&mut text).unwrap();
            String::from_utf8_lossy(&text).into_owned()
        })
    };
    let streams = [
        read(Box::new(child.stdout.take().unwrap())),
        read(Box::new(child.stderr.take().unwrap())),
    ];
    let (ended, status) = (
        Arc::new(AtomicBool::new(false)),
        format!("/proc/{}/status", child.id()),
    );
    let watching = Arc::clone(&ended);
    let watch = std::thread::spawn(move || {
        let mut peak: f64 = 0.0;
        while !watching.load(Ordering::Relaxed) {
            let text = fs::read_to_string(&status).unwrap_or_default();
            let line = text.lines().find_map(|line| {
                line.strip_prefix("VmHWM:")?
                    .trim()
                    .strip_suffix(" kB")?
                    .parse()
                    .ok()
            });
            peak = peak.max(line.unwrap_or(0.0) / 1024.0);
            std::thread::sleep(Duration::from_millis(5));
        }
        peak
    });
    meanwhile(child.id());
    let success = child.wait().unwrap().success();
    let wall = began.elapsed().as_secs_f64();
    ended.store(true, Ordering::Relaxed);
    let said: String = streams
        .into_iter()
        .map(|stream| stream.join().unwrap())
        .collect();
    assert!(success, "{command:?}: {said}");
    let cpu = cpu_of("self", 15) + server.map_or(0.0, of_server) - cpu;
    (
        BTreeMap::from([
            ("wall s", wall),
            ("cpu s", cpu),
            ("peak MiB", watch.join().unwrap()),
        ]),
        said,
    )
}

/// A way to the server on which whatever the client says after an answer takes this much longer.
fn delayed(url: &str, rtt: Duration) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let own = format!("http://{}", listener.local_addr().unwrap());
    let target = url.trim_start_matches("http://").to_owned();
    std::thread::spawn(move || {
        for client in listener.incoming().flatten() {
            let server = TcpStream::connect(&target).unwrap();
            let answered = Arc::new(AtomicBool::new(true));
            for (stream, from_client) in [(&client, true), (&server, false)] {
                let other = if from_client { &server } else { &client };
                let (from, to) = (stream.try_clone().unwrap(), other.try_clone().unwrap());
                to.set_nodelay(true).unwrap();
                let answered = Arc::clone(&answered);
                std::thread::spawn(move || pump(from, to, &answered, from_client.then_some(rtt)));
            }
        }
    });
    own
}

fn pump(mut from: TcpStream, mut to: TcpStream, answered: &AtomicBool, rtt: Option<Duration>) {
    let mut space = vec![0; 64 * 1024];
    while let Ok(read @ 1..) = from.read(&mut space) {
        match rtt {
            Some(rtt) if answered.swap(false, Ordering::SeqCst) => std::thread::sleep(rtt),
            Some(_) => (),
            None => answered.store(true, Ordering::SeqCst),
        }
        if to.write_all(&space[..read]).is_err() {
            break;
        }
    }
    // The other side may have ended first.
    let _ = to.shutdown(Shutdown::Write);
}
