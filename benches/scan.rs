//! `just bench scan`: reading, hashing and looking for what must not leave, beside reading and hashing alone, over
//! real files, in one run.
//!
//! `FLYWHEEL_BENCH_PATH` (`/usr/lib`) is the tree that is read, `FLYWHEEL_BENCH_RUNS` (5) the number of pairs,
//! `FLYWHEEL_BENCH_NEEDLES` (200) how many needles are looked for. Prints medians and writes
//! `target/bench/scan.json`.
#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a bench that fails says why by panicking"
)]

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use flywheel_core::secret::Secret;
use flywheel_nix::nar::{write, write_visited};
use flywheel_nix::scan::Scanner;
use sha2::Digest as _;

/// Hashes and counts what is written.
struct Hashed(sha2::Sha256, u64);

impl Write for Hashed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.update(bytes);
        self.1 += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Seconds of wall and of CPU time.
#[derive(Clone, Copy)]
struct Took {
    wall: f64,
    cpu: f64,
}

fn main() {
    let number = |name: &str, default: usize| {
        std::env::var(name)
            .ok()
            .and_then(|text| text.parse().ok())
            .unwrap_or(default)
    };
    let path = std::env::var_os("FLYWHEEL_BENCH_PATH")
        .map_or_else(|| PathBuf::from("/usr/lib"), PathBuf::from);
    let scanner = scanner(number("FLYWHEEL_BENCH_NEEDLES", 200));
    println!(
        "{} needles; reading {} once, so that all of it is in memory",
        scanner.needles(),
        path.display()
    );
    let (size, _) = without(&path);
    println!("{:.0} MB", size as f64 / 1e6);
    let (mut plain, mut beside) = (Vec::new(), Vec::new());
    let (mut scanned, mut alone) = (Vec::new(), Vec::new());
    for run in 0..number("FLYWHEEL_BENCH_RUNS", 5) {
        plain.push(without(&path).1);
        beside.push(on_two_threads(&path, &scanner));
        scanned.push(with(&path, &scanner));
        alone.push(scan_alone(&path, &scanner));
        let rate = |took: &[Took]| size as f64 / 1e9 / took[run].cpu;
        println!(
            "  run {}: {:.2}, {:.2} and {:.2} GB/s",
            run + 1,
            rate(&plain),
            rate(&scanned),
            rate(&alone)
        );
    }
    let rows = [
        ("read, hash", &plain),
        ("read, hash, scan on one thread", &scanned),
        ("read, hash beside read, scan", &beside),
        ("read, scan", &alone),
    ];
    let mut json = serde_json::Map::new();
    println!("\nmedians");
    for (name, took) in rows {
        let (wall, cpu) = (
            median(took, |took| took.wall),
            median(took, |took| took.cpu),
        );
        println!(
            "{name:<31} wall {wall:.2} s  cpu {cpu:.2} s  {:.2} GB/s of one core",
            size as f64 / 1e9 / cpu
        );
        json.insert(
            name.into(),
            serde_json::json!({ "wall s": wall, "cpu s": cpu, "bytes": size }),
        );
    }
    let of_wall: fn(&Took) -> f64 = |took| took.wall;
    let of_cpu: fn(&Took) -> f64 = |took| took.cpu;
    let wall = 100.0 * (median(&beside, of_wall) / median(&plain, of_wall) - 1.0);
    let rate = size as f64 / 1e9 / (median(&scanned, of_cpu) - median(&plain, of_cpu));
    println!(
        "\nbeside another path's reading and hashing, as the publisher does it: {wall:.1} % of wall time (at most 10)"
    );
    println!("scanning by itself, without the reading: {rate:.2} GB/s of one core (at least 1)");
    json.insert("wall percent".into(), wall.into());
    json.insert("scan GB/s".into(), rate.into());
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/bench");
    fs::create_dir_all(&folder).unwrap();
    fs::write(
        folder.join("scan.json"),
        serde_json::to_string_pretty(&json).unwrap(),
    )
    .unwrap();
}

/// One that looks for as many needles, of random secrets.
fn scanner(needles: usize) -> Scanner {
    let mut random = fastrand::Rng::with_seed(7);
    let mut secrets = Vec::new();
    loop {
        let text: String = (0..32).map(|_| random.alphanumeric()).collect();
        secrets.push((
            format!("SECRET_{}", secrets.len()),
            Secret::new(&text).unwrap(),
        ));
        let scanner = Scanner::new(
            &secrets,
            &[("the workspace", Path::new("/home/runner/work/app"))],
        );
        if scanner.needles() >= needles {
            return scanner;
        }
    }
}

fn measure(work: impl FnOnce()) -> Took {
    let (began, cpu) = (Instant::now(), cpu());
    work();
    Took {
        wall: began.elapsed().as_secs_f64(),
        cpu: self::cpu() - cpu,
    }
}

fn without(path: &Path) -> (u64, Took) {
    let mut hashed = Hashed(sha2::Sha256::new(), 0);
    let took = measure(|| write(path, &mut hashed).unwrap());
    (hashed.1, took)
}

fn with(path: &Path, scanner: &Scanner) -> Took {
    let mut hashed = Hashed(sha2::Sha256::new(), 0);
    let mut look = scanner.begin();
    measure(|| write_visited(path, &mut hashed, &mut look).unwrap())
}

/// As the publisher has it: while one path is read and hashed for its upload, another is looked into.
fn on_two_threads(path: &Path, scanner: &Scanner) -> Took {
    measure(|| {
        std::thread::scope(|scope| {
            let looking = scope.spawn(|| scanner.scan(path).unwrap());
            write(path, &mut Hashed(sha2::Sha256::new(), 0)).unwrap();
            drop(looking.join().unwrap());
        });
    })
}

fn scan_alone(path: &Path, scanner: &Scanner) -> Took {
    measure(|| drop(scanner.scan(path).unwrap()))
}

fn median(took: &[Took], of: impl Fn(&Took) -> f64) -> f64 {
    let mut values: Vec<f64> = took.iter().map(of).collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Seconds of this process's user and system time; `USER_HZ` is 100 on every Linux that Nix runs on.
fn cpu() -> f64 {
    let stat = fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<&str> = stat
        .rsplit_once(')')
        .unwrap()
        .1
        .split_whitespace()
        .collect();
    (fields[11].parse::<f64>().unwrap() + fields[12].parse::<f64>().unwrap()) / 100.0
}
