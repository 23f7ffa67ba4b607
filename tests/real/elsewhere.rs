//! Stores whose files are not in `/nix`: what is built there is published, whichever way the store is named, and a store
//! that cannot be watched is never passed over in silence.

use std::fs;

use crate::nix_job::{Job, output};
use crate::world::cache::Cache;
use crate::world::runner::Report;
use crate::world::{flake, need};

/// What building the flake's default output adds.
const ADDED: [&str; 4] = ["app", "base", "bin", "lib"];
const BUILD: &str = "nix build --no-link path:.#default";

/// Sets a variable to a text in which `ROOT` stands for a folder of the step.
fn with(job: Job, name: &str, text: &str) -> Job {
    let root = job.step.folder().join("root");
    job.with_env(name, &text.replace("ROOT", root.to_str().unwrap()))
}

#[track_caller]
fn published(report: &Report, cache: &Cache) {
    let names = cache.names();
    assert_eq!(report.code, 0, "{}", report.log);
    for name in ADDED {
        assert!(
            names.iter().any(|found| found == name),
            "{names:?}\n{}",
            report.log
        );
    }
    for (name, number) in [("lost", "0"), ("not-watched", "0")] {
        assert_eq!(output(report, name), number, "{}", report.log);
    }
}

#[track_caller]
fn not_watched(report: &Report, code: i32, named: &str) {
    assert_eq!(report.code, code, "{}", report.log);
    assert_eq!(output(report, "not-watched"), "1", "{}", report.log);
    let warned = report
        .log
        .lines()
        .any(|line| line.contains("not watched") && line.contains(named));
    assert!(warned, "{}", report.log);
    let summary = &report.files["GITHUB_STEP_SUMMARY"];
    assert!(summary.contains("1 store not watched"), "{summary}");
    let heading = if code == 0 { "### ⚠️" } else { "### ❌" };
    assert!(summary.starts_with(heading), "{summary}");
}

#[test]
fn what_is_built_below_another_root_is_published() {
    for (name, text) in [
        ("NIX_REMOTE", "ROOT"),
        ("NIX_REMOTE", "local?root=ROOT"),
        ("NIX_REMOTE", "local?root=ROOT&state=ROOT/st&real=ROOT/re"),
        ("NIX_REMOTE", "ROOT with a blank"),
        ("NIX_CONFIG", "store = ROOT"),
        ("FLYWHEEL_EXTRA_NIX_CONFIG", "store = ROOT"),
        ("NIX_STATE_DIR", "ROOT/state"),
    ] {
        let cache = Cache::start(&[]);
        let report = with(Job::new(&cache, BUILD), name, text).step.run();
        published(&report, &cache);
    }
}

#[test]
fn every_verb_reads_the_store_where_it_is() {
    let cache = Cache::start(&[]);
    let job = with(Job::of(&cache, "flake-checks"), "NIX_REMOTE", "ROOT")
        .with_env("FLYWHEEL_FLAKE", "path:.")
        .with_env("FLYWHEEL_FLAKE_ATTR", "packages");
    // The other outputs fail, or take long.
    let good = flake::FLAKE.replace("inherit lib app fails slow;", "inherit lib app;");
    fs::write(job.step.workspace().join("flake.nix"), good).unwrap();
    let report = job.step.run();
    published(&report, &cache);

    // By `nix copy`, which has to read the same store.
    let cache = Cache::start(&[]);
    let job = with(Job::new(&cache, BUILD), "NIX_REMOTE", "ROOT");
    let to = job.step.folder().join("copies");
    // The step's folder, and with it the copies, goes with the job.
    let job = job
        .with_env("ATTIC_SERVER", "")
        .with_env("ATTIC_PUBLIC_KEY", "")
        .with_env("FLYWHEEL_CACHE", &format!("file://{}", to.display()));
    let report = job.step.run();
    assert_eq!(report.code, 0, "{}", report.log);
    assert_eq!(output(&report, "lost"), "0", "{}", report.log);
    let infos = fs::read_dir(&to).unwrap().flatten();
    let infos = infos.filter(|entry| entry.path().extension() == Some("narinfo".as_ref()));
    assert!(infos.count() >= ADDED.len(), "{}", report.log);

    // A result that the store had before the job.
    let cache = Cache::start(&[]);
    let job = with(
        Job::new(&cache, "nix build path:.#default"),
        "NIX_REMOTE",
        "ROOT",
    );
    let before = job.step.run();
    assert_eq!(before.code, 0, "{}", before.log);
    let other = Cache::start(&[]);
    let again = job
        .with_env("ATTIC_SERVER", &other.url)
        .with_env("ATTIC_PUBLIC_KEY", &other.key)
        .with_env("ATTIC_TOKEN", &other.token);
    let report = again.step.run();
    assert!(other.names().contains(&"app".to_owned()), "{}", report.log);
}

#[test]
fn a_store_that_is_not_on_this_machine_is_named_and_counted() {
    for (name, text, named) in [
        ("NIX_REMOTE", "file://ROOT", "file://"),
        ("NIX_STORE_DIR", "ROOT/store", "/root/store"),
    ] {
        let cache = Cache::start(&[]);
        let job = || with(Job::new(&cache, "true"), name, text);
        not_watched(&job().step.run(), 0, named);
        let report = job()
            .with_env("FLYWHEEL_REQUIRE_PUBLISH", "true")
            .step
            .run();
        not_watched(&report, 1, named);
        assert_eq!(output(&report, "outcome"), "not-published");
    }
}

#[test]
fn a_store_that_the_command_names_is_named_and_counted() {
    let cache = Cache::start(&[]);
    let elsewhere = "nix build --no-link --store \"$PWD/other\" path:.#default";
    not_watched(&Job::new(&cache, elsewhere).step.run(), 0, "$PWD/other");
    let job = Job::new(&cache, elsewhere).with_env("FLYWHEEL_REQUIRE_PUBLISH", "true");
    let report = job.step.run();
    not_watched(&report, 1, "$PWD/other");
    assert_eq!(output(&report, "outcome"), "not-published");

    // The job's own store by another name is watched.
    let cache = Cache::start(&[]);
    let job = Job::new(&cache, "nix build --no-link --store ./here path:.#default");
    let here = job.step.workspace().join("here");
    let report = job
        .with_env("NIX_REMOTE", here.to_str().unwrap())
        .step
        .run();
    published(&report, &cache);
}

#[test]
fn a_daemon_of_another_store_is_not_taken_for_the_usual_one() {
    need("nix-daemon", "apt-get install nix-bin");
    // Where its store is may be told; otherwise what it lists is not found in `/nix/store`.
    for is_told in [true, false] {
        let cache = Cache::start(&[]);
        // Nix itself reads a flake's source from where it thinks that the store is.
        let command = if is_told {
            BUILD
        } else {
            "nix-store --add flake.nix"
        };
        let Job { step, nix } = Job::new(&cache, command);
        let (root, socket) = (step.folder().join("root"), step.folder().join("socket"));
        let (root, socket) = (root.display(), socket.display());
        // From a subshell, since Flywheel ends what descends from it when the command has ended.
        let daemon = format!(
            "(NIX_DAEMON_SOCKET_PATH='{socket}' nix-daemon --daemon --store '{root}' >/dev/null 2>&1 &)\n\
             until [ -S '{socket}' ]; do sleep 0.05; done"
        );
        let told = if is_told {
            format!("?root={root}")
        } else {
            String::new()
        };
        fs::create_dir_all(nix.join("store")).unwrap();
        let step = step
            .after(&daemon)
            .with_env("NIX_CONFIG", "sandbox = false\nbuild-users-group =")
            .with_env("NIX_REMOTE", &format!("unix://{socket}{told}"));
        let report = step.run();
        if is_told {
            published(&report, &cache);
        } else {
            not_watched(&report, 0, "/nix/store");
        }
    }
}
