//! Pipes, devices, folders, dangling links, huge files and held locks where the files of a job belong. The command runs,
//! its exit code is the step's, and nothing is waited for.

use std::fs;
use std::os::unix::fs::{FileTypeExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use rustix::process::Signal;

use super::{Attack, Trial};
use crate::nix_job::Job;
use crate::world::cache::Cache;
use crate::world::{must, need, processes};

/// A job without work, on a busy machine.
const LIMIT: Duration = Duration::from_secs(30);
/// A file of this size takes no room, and is too large for what it stands for.
const HUGE: u64 = 10 << 30;

const KINDS: [&str; 6] = [
    "pipe",
    "folder",
    "dangling link",
    "device",
    "huge file",
    "locked",
];

/// A process that holds a lock and is frozen. It is killed when this is dropped.
struct Frozen(Child);

impl Drop for Frozen {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn lock(file: &Path) -> Frozen {
    let flock = need("flock", "apt-get install util-linux");
    let marker = file.with_extension("held");
    let script = format!(": > '{}'; exec sleep 300", marker.display());
    let child = Command::new(flock)
        .args(["--exclusive", "--no-fork"])
        .arg(file)
        .args(["sh", "-c", &script])
        .spawn()
        .unwrap();
    let held = Frozen(child);
    assert!(processes::wait_until(LIMIT, || marker.exists()));
    fs::remove_file(marker).unwrap();
    processes::signal(i32::try_from(held.0.id()).unwrap(), Signal::STOP);
    held
}

/// Puts something odd in the place of a file.
fn replace(file: &Path, kind: &str) -> Option<Frozen> {
    if kind == "locked" {
        return Some(lock(file));
    }
    let is_folder = file.is_dir();
    let removed = if is_folder {
        fs::remove_dir_all(file)
    } else {
        fs::remove_file(file)
    };
    drop(removed);
    match kind {
        "pipe" => drop(must(Command::new("mkfifo").arg(file))),
        "folder" => fs::create_dir(file).unwrap(),
        "dangling link" => symlink("/nowhere/at/all", file).unwrap(),
        "device" => symlink("/dev/zero", file).unwrap(),
        "huge file" => fs::File::create(file).unwrap().set_len(HUGE).unwrap(),
        other => panic!("{other}"),
    }
    None
}

/// Every file and folder below this one, with itself.
fn all_below(folder: &Path) -> Vec<PathBuf> {
    let mut found = vec![folder.to_owned()];
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        match entry.file_type().unwrap() {
            kind if kind.is_dir() => found.extend(all_below(&entry.path())),
            kind if kind.is_file() || kind.is_fifo() => found.push(entry.path()),
            _ => (),
        }
    }
    found
}

/// The files that a job leaves on its host, where somebody else could have put something.
fn places(job: &Job) -> Vec<PathBuf> {
    let folder = job.step.folder();
    all_below(&folder.join("state/flywheel"))
}

#[test]
fn nothing_in_the_place_of_a_file_of_ours_holds_a_job_up() {
    let cache = Cache::start(&[]);
    let mut attack = Attack::begin("odd files");
    while let Some(mut trial) = attack.next() {
        let job = Job::new(&cache, "echo the command ran; exit 3");
        // The first job leaves what a host has after one.
        let first = job.step.run();
        assert_eq!(first.code, 3, "{}", first.log);
        // The event is one place among many, and the one that every job reads.
        let event = job.step.folder().join("event.json");
        let place = match trial.random.bool() {
            true => event,
            false => trial.pick(&places(&job)).clone(),
        };
        attack.count(attempt(&mut trial, &job, &place));
    }
    attack.report();
}

fn attempt(trial: &mut Trial, job: &Job, place: &Path) -> String {
    let kind = *trial.pick(&KINDS);
    let held = replace(place, kind);
    let begun = Instant::now();
    let report = job.step.run();
    let shown = place.strip_prefix(job.step.folder()).unwrap();
    let what = format!(
        "{}: {kind} at `{}`\n{}",
        trial.seed,
        shown.display(),
        report.log
    );
    assert!(begun.elapsed() < LIMIT, "{:?}: {what}", begun.elapsed());
    assert!(report.log.contains("the command ran"), "{what}");
    assert_eq!(report.code, 3, "{what}");
    drop(held);
    kind.to_owned()
}
