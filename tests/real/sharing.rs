//! Jobs at once on one host with one embedded cache, and its server is killed while they work. What was published is
//! judged by stock Nix with an empty store.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use tempfile::TempDir;

use crate::nix_job::{Job, left_nothing, output};
use crate::world::cache::Cache;
use crate::world::runner::Report;
use crate::world::{flywheel, folders, need, processes, with_private_nix};

/// Builds per job.
const BUILDS: usize = 6;

/// A job that builds `BUILDS` paths of its own, one after the other, with `folder` as its embedded cache.
fn job(cache: &Cache, folder: &Path, name: &str) -> Job {
    let command = format!(
        "for n in $(seq {BUILDS}); do nix-build many.nix --argstr name {name}-$n -o out-$n >>built.txt; \
         echo \"{name} has built $n\"; done"
    );
    let job =
        Job::new(cache, &command).with_env("FLYWHEEL_EMBEDDED_CACHE", folder.to_str().unwrap());
    let expression = r#"{ name }: let bin = builtins.path { path = ./bin; name = "bin"; }; in derivation {
      inherit name; system = builtins.currentSystem; builder = "${bin}/busybox";
      args = [ "sh" "-euc" "${bin}/busybox head -c 2000000 /dev/urandom > $out; ${bin}/busybox sleep 0.3" ];
    }"#;
    fs::write(job.step.workspace().join("many.nix"), expression).unwrap();
    job
}

fn built(job: &Job) -> Vec<String> {
    let text = fs::read_to_string(job.step.workspace().join("built.txt")).unwrap();
    text.lines().map(str::to_owned).collect()
}

/// Fetches paths into an empty store from the cache alone.
fn an_empty_store_gets(cache: &Cache, paths: &[String]) {
    let machine: TempDir = tempfile::tempdir().unwrap();
    let nix_store = need("nix-store", "apt-get install nix-bin");
    let mut command = with_private_nix(&machine.path().join("nix"), &nix_store);
    folders::isolate(&mut command, machine.path());
    let settings = format!(
        "build-users-group =\nsandbox = false\nfallback = false\nmax-jobs = 0\nsubstituters = {}/main\n\
         trusted-public-keys = {}\n",
        cache.url, cache.key
    );
    let output = command
        .arg("--realise")
        .args(paths)
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .env("NIX_CONFIG", settings)
        .output()
        .unwrap();
    let printed = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{printed}");
}

/// Whether a job uses the folder through another process.
fn is_guest(log: &str) -> bool {
    log.contains("another process serves")
}

/// A job that lost nothing, and took its time for nothing.
fn went_well(report: &Report) {
    assert_eq!(report.code, 0, "{}", report.log);
    assert_eq!(output(report, "lost"), "0", "{}", report.log);
    let published: usize = output(report, "published").parse().unwrap();
    assert!(published >= BUILDS, "{}", report.log);
    left_nothing(report);
}

#[test]
fn three_jobs_and_a_server_on_one_folder_lose_nothing_when_the_server_is_killed() {
    let cache = Cache::start(&[]);
    let folder = cache.dir();
    let jobs = ["a", "b", "c"].map(|name| job(&cache, &folder, name));
    let cache = Mutex::new(cache);
    let killed = AtomicBool::new(false);
    let reports: Vec<Report> = std::thread::scope(|scope| {
        let runs = jobs.each_ref().map(|job| {
            scope.spawn(|| {
                job.step.run_and(|log, _| {
                    if log.contains("has built 3") && !killed.swap(true, Ordering::Relaxed) {
                        cache.lock().unwrap().kill();
                    }
                    false
                })
            })
        });
        runs.map(|run| run.join().unwrap()).into()
    });
    assert!(killed.load(Ordering::Relaxed));
    for report in &reports {
        assert!(is_guest(&report.log), "{}", report.log);
        went_well(report);
    }
    let mut cache = cache.into_inner().unwrap();
    cache.restart();
    let paths: Vec<String> = jobs.iter().flat_map(built).collect();
    assert_eq!(paths.len(), 3 * BUILDS);
    an_empty_store_gets(&cache, &paths);
}

#[test]
fn of_three_jobs_on_one_folder_the_one_that_serves_it_can_be_killed() {
    // Only its folder is used until the end.
    let mut cache = Cache::start(&[]);
    cache.kill();
    let folder = cache.dir();
    let jobs = ["a", "b", "c"].map(|name| job(&cache, &folder, name));
    // What the killed job had built by then. Its command goes on for a moment, seen by no one.
    let by_then = Mutex::new(Vec::new());
    let reports: Vec<Report> = std::thread::scope(|scope| {
        let runs = jobs.each_ref().map(|job| {
            scope.spawn(|| {
                job.step.run_and(|log, pid| {
                    let mut by_then = by_then.lock().unwrap();
                    if !is_guest(log) && log.contains("has built 3") && by_then.is_empty() {
                        *by_then = built(job);
                        processes::signal(i32::try_from(pid).unwrap(), Signal::KILL);
                    }
                    false
                })
            })
        });
        runs.map(|run| run.join().unwrap()).into()
    });
    let of_killed: Vec<usize> = (0..3).filter(|&n| reports[n].code == 137).collect();
    let [owner] = of_killed[..] else {
        panic!("{reports:#?}")
    };
    for (n, report) in reports.iter().enumerate().filter(|(n, _)| *n != owner) {
        assert!(is_guest(&report.log), "{n}: {}", report.log);
        went_well(report);
    }
    let others = jobs
        .iter()
        .enumerate()
        .filter(|(n, _)| *n != owner)
        .flat_map(|(_, job)| built(job));
    let paths: Vec<String> = others.chain(by_then.into_inner().unwrap()).collect();
    assert!(paths.len() >= 2 * BUILDS + 3, "{paths:?}");
    // The next job on that disk takes up what the killed one had not sent.
    let killed = jobs.into_iter().nth(owner).unwrap();
    let next = killed.with_env("FLYWHEEL_COMMAND", "true").step.run();
    assert_eq!(next.code, 0, "{}", next.log);
    assert_eq!(output(&next, "lost"), "0", "{}", next.log);
    cache.restart();
    an_empty_store_gets(&cache, &paths);
}

#[test]
fn a_folder_of_another_user_is_refused() {
    // An ordinary user takes no folder of another, however open it is.
    let open = tempfile::tempdir().unwrap();
    fs::set_permissions(open.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let (code, printed) = serve_as(65534, open.path());
    assert_eq!(code, Some(69), "{printed}");
    assert!(
        printed.contains("belongs to another user (uid 0)"),
        "{printed}"
    );
    fs::set_permissions(open.path(), fs::Permissions::from_mode(0o700)).unwrap();
    std::os::unix::fs::chown(open.path(), Some(65534), Some(65534)).unwrap();
    // Root takes an ordinary user's folder, but not a process of that user that claims to serve it.
    let lock = fs::File::create(open.path().join("lock")).unwrap();
    lock.lock().unwrap();
    let socket = open.path().join("socket");
    let mut impostor = std::process::Command::new(need("setpriv", "apt-get install util-linux"))
        .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
        .arg(need("python3", "apt-get install python3"))
        .args(["-c", IMPOSTOR])
        .arg(&socket)
        .spawn()
        .unwrap();
    let begun = Instant::now();
    while !socket.exists() {
        assert!(begun.elapsed().as_secs() < 20);
        std::thread::park_timeout(Duration::from_millis(5));
    }
    let (code, printed) = serve_as(0, open.path());
    impostor.kill().unwrap();
    impostor.wait().unwrap();
    assert_eq!(code, Some(69), "{printed}");
    assert!(
        printed.contains("which runs as another user (uid 65534)"),
        "{printed}"
    );
}

/// Listens and answers nothing.
const IMPOSTOR: &str = "import socket, sys, time\nlistener = socket.socket(socket.AF_UNIX)\n\
                        listener.bind(sys.argv[1] + '.new'); listener.listen()\n\
                        import os; os.rename(sys.argv[1] + '.new', sys.argv[1])\ntime.sleep(60)";

/// Serves a folder for a moment as some user; exit code and stderr.
fn serve_as(uid: u32, dir: &Path) -> (Option<i32>, String) {
    let home = tempfile::tempdir().unwrap();
    let mut command = std::process::Command::new(flywheel());
    folders::isolate(&mut command, home.path());
    let output = command
        .args(["cache", "serve", "--listen", "127.0.0.1:0"])
        .args(["--stop-after", "0s", "--dir"])
        .arg(dir)
        .uid(uid)
        .output()
        .unwrap();
    (
        output.status.code(),
        String::from_utf8_lossy(&output.stderr).into_owned(),
    )
}
