//! The other ways to publish, besides our own client of Attic: `nix copy` into a folder and over HTTP, and Attic's
//! own client, which is scripted here and must never be compiled.

use std::fs;
use std::path::Path;

use crate::nix_job::{Job, left_nothing, output};
use crate::world::cache::Cache;
use crate::world::flake::FLAKE;
use crate::world::runner::Report;
use crate::world::{PATH, flywheel, folders, must, need, with_private_nix};

const BUILD: &str = "nix build --no-link path:.#default";

fn run(job: &Job) -> Report {
    let report = job.step.run();
    assert_eq!(report.code, 0, "{}", report.log);
    left_nothing(&report);
    assert_eq!(
        output(&report, "lost"),
        "0",
        "{}\n{}",
        report.log,
        report.files["GITHUB_STEP_SUMMARY"]
    );
    report
}

/// Publishes into the store of this URL, and has a new machine with the key build nothing.
fn there_and_back(cache: &Cache, url: &str, key: &str) {
    let on = |job: Job| {
        job.with_env("ATTIC_SERVER", "")
            .with_env("FLYWHEEL_CACHE", url)
            .with_env("ATTIC_PUBLIC_KEY", key)
    };
    let report = run(&on(Job::new(cache, BUILD)));
    assert_eq!(
        (output(&report, "built"), output(&report, "cache-state")),
        ("3".into(), "attached".into())
    );
    let published: u32 = output(&report, "published").parse().unwrap();
    assert!(
        published >= 4,
        "three outputs and what they refer to: {}",
        report.log
    );
    assert_eq!(
        output(&report, "verified"),
        published.to_string(),
        "{}",
        report.log
    );
    assert!(!report.log.contains(&cache.token), "{}", report.log);
    let again = run(&on(Job::new(cache, BUILD)));
    assert_eq!(
        output(&again, "built"),
        "0",
        "a new machine substitutes all of it:\n{}",
        again.log
    );
}

#[test]
fn a_folder_takes_paths_by_nix_copy_and_gives_them_back() {
    let cache = Cache::start(&[]);
    let folder = tempfile::tempdir().unwrap();
    let key = folder.path().join("key");
    let generate = [
        "key",
        "generate-secret",
        "--extra-experimental-features",
        "nix-command",
        "--key-name",
        "folder-1",
    ];
    let nix = need("nix", "apt-get install nix-bin");
    let private = folder.path().join("nix");
    let inside = |program: &Path| {
        let mut command = with_private_nix(&private, program);
        folders::isolate(&mut command, folder.path()).env("PATH", PATH);
        command
    };
    fs::write(&key, must(inside(&nix).args(generate))).unwrap();
    let convert =
        "nix key convert-secret-to-public --extra-experimental-features nix-command < \"$0\"";
    let public = must(inside(Path::new("/bin/sh")).args(["-c", convert]).arg(&key));
    let url = format!(
        "file://{}?secret-key={}",
        folder.path().join("store").display(),
        key.display()
    );
    there_and_back(&cache, &url, public.trim());
    let infos = fs::read_dir(folder.path().join("store")).unwrap().flatten();
    let infos = infos.filter(|entry| entry.file_name().to_string_lossy().ends_with(".narinfo"));
    assert!(infos.count() >= 4);
}

#[test]
fn a_plain_http_cache_takes_paths_by_nix_copy_with_the_token_from_the_netrc() {
    let cache = Cache::start(&["--private"]);
    there_and_back(&cache, &format!("{}/main", cache.url), &cache.key);
    assert!(
        cache.names().contains(&"app".to_owned()),
        "{:?}",
        cache.names()
    );
}

#[test]
fn a_store_that_does_not_open_is_left_out_and_named() {
    let cache = Cache::start(&[]);
    let job = Job::new(&cache, BUILD)
        .with_env("ATTIC_SERVER", "")
        .with_env("FLYWHEEL_CACHE", "http://127.0.0.1:9/main");
    let report = job.step.run();
    assert_eq!(
        (report.code, output(&report, "outcome")),
        (0, "success".to_owned()),
        "{}",
        report.log
    );
    assert_eq!(
        output(&report, "cache-state"),
        "left-out-cache",
        "{}",
        report.log
    );
    assert_eq!(output(&report, "built"), "3");
    assert!(
        output(&report, "lost").parse::<u32>().unwrap() >= 3,
        "what could not go is named: {}",
        report.log
    );
}

/// A `PATH` on which `attic` is a script that sends paths by our own client, and records how it was called.
fn scripted_client(folder: &Path) -> String {
    let at = folder.display();
    let text = format!(
        r#"#!/bin/sh
set -e
echo "$*" >> {at}/calls
config=$XDG_CONFIG_HOME/attic/config.toml
[ "$(stat -c %a "$config")" = 600 ] && [ "$HOME" = "$XDG_CONFIG_HOME" ]
server=$(sed -n 's/^endpoint = "\(.*\)"/\1/p' "$config")
ATTIC_TOKEN=$(sed -n 's/^token = "\(.*\)"/\1/p' "$config")
export ATTIC_TOKEN
shift 4
env -u GITHUB_ACTIONS -u GITHUB_EVENT_NAME -u GITHUB_EVENT_PATH -u GITHUB_REF -u CI \
  {} publish --attic-server "$server" "$@" >> {at}/log 2>&1
"#,
        flywheel().display()
    );
    fs::write(folder.join("attic"), text).unwrap();
    must(
        std::process::Command::new("chmod")
            .arg("755")
            .arg(folder.join("attic")),
    );
    format!("{at}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
}

#[test]
fn the_stock_client_is_fed_and_what_it_did_is_verified() {
    let cache = Cache::start(&["--private"]);
    let folder = tempfile::tempdir().unwrap();
    let job = Job::new(&cache, BUILD)
        .with_env("FLYWHEEL_PUBLISHER", "attic-client")
        .with_env("PATH", &scripted_client(folder.path()));
    let report = run(&job);
    let calls = fs::read_to_string(folder.path().join("calls")).unwrap_or_default();
    let log = fs::read_to_string(folder.path().join("log")).unwrap_or_default();
    assert!(
        calls.starts_with(
            "push --no-closure --ignore-upstream-cache-filter flywheel:main /nix/store/"
        ),
        "{calls}"
    );
    assert!(
        !calls.contains(&cache.token) && report.log.contains("publishing with"),
        "{}",
        report.log
    );
    let published: u32 = output(&report, "published").parse().unwrap();
    assert!(published >= 4, "{}\n{calls}\n{log}", report.log);
    assert_eq!(
        output(&report, "verified"),
        published.to_string(),
        "{}",
        report.log
    );
    assert!(
        cache.names().contains(&"app".to_owned()),
        "{:?}",
        cache.names()
    );
}

#[test]
fn a_client_that_would_have_to_be_compiled_is_not() {
    let cache = Cache::start(&[]);
    let job = Job::new(&cache, BUILD)
        .with_env("FLYWHEEL_PUBLISHER", "attic-client")
        .with_env("FLYWHEEL_ATTIC_CLIENT", "path:.#slow");
    let flake = FLAKE.replace(
        "default = app;",
        "default = app; attic-client = run \"client\" \"mkdir $out\";",
    );
    fs::write(job.step.workspace().join("flake.nix"), flake).unwrap();
    let report = job.step.run();
    assert_eq!(
        (report.code, output(&report, "outcome")),
        (0, "success".to_owned()),
        "{}",
        report.log
    );
    assert!(
        report.log.contains("::notice") && report.log.contains("never compiled"),
        "{}",
        report.log
    );
    assert_eq!(
        (output(&report, "built"), output(&report, "published")),
        ("3".into(), "0".into()),
        "{}",
        report.log
    );
    let names = fs::read_dir(job.nix.join("store"))
        .unwrap()
        .flatten()
        .map(|entry| entry.file_name());
    let built = names
        .filter(|name| name.to_string_lossy().ends_with("-client"))
        .count();
    assert_eq!(built, 0, "nothing was compiled for it");
}
