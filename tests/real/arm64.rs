//! The committed binary for arm64, in qemu-user: alone, beside the x86_64 one, and under a job with an arm64 Nix.
//! What qemu-user cannot do stands in `docs/measured.md`.

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::Value;
use tempfile::TempDir;

use crate::nix_job::{Job, left_nothing, output};
use crate::world::cache::Cache;
use crate::world::{PATH, act, arm64, folders, must, root, versions};

/// Events of one kind: `pull_request` alone was recorded 29 times, and qemu takes its time to start.
const OF_EACH_KIND: usize = 2;

/// Explains each event's job to publish with a token, with the binary that is named first.
const EXPLAIN: &str = r#"
for event in */; do
    echo "$event"
    GITHUB_EVENT_NAME=$(cat "$event/name") GITHUB_EVENT_PATH=$event/payload "$0" explain
done
"#;

#[test]
fn recorded_events_of_every_kind_are_explained_as_on_x86_64() {
    let events = TempDir::new().unwrap();
    let recorded = fs::read_to_string(root().join("tests/fixtures/events/examples.jsonl")).unwrap();
    let mut of_kind = HashMap::<String, usize>::new();
    for (number, line) in recorded.lines().enumerate() {
        let event: Value = serde_json::from_str(line).unwrap();
        let kind = event["event"].as_str().unwrap();
        let before = of_kind.entry(kind.to_owned()).or_default();
        *before += 1;
        if *before <= OF_EACH_KIND {
            let folder = events.path().join(format!("event-{number}"));
            fs::create_dir(&folder).unwrap();
            fs::write(folder.join("name"), kind).unwrap();
            fs::write(folder.join("payload"), event["payload"].to_string()).unwrap();
        }
    }
    let explained = |mut shell: Command, binary: &Path| {
        let own = TempDir::new().unwrap();
        folders::isolate(&mut shell, own.path())
            .args(["-euc", EXPLAIN])
            .arg(binary)
            .current_dir(events.path())
            .env("PATH", PATH)
            .env("GITHUB_ACTIONS", "true")
            .env("GITHUB_REF", "refs/heads/main")
            .env("GITHUB_REPOSITORY", "octo-org/octo-repo")
            .env("ATTIC_TOKEN", "a-token")
            .env("FLYWHEEL_PUSH_CACHE", "true");
        must(&mut shell)
    };
    let sh = Path::new("/bin/sh");
    let here = explained(Command::new(sh), &root().join("dist").join(act::BINARY));
    let there = explained(arm64::command(sh), &arm64::binary());
    assert_eq!(here, there);
    assert!(
        here.lines()
            .filter(|line| line.starts_with("event-"))
            .count()
            > 100
    );
    for verdict in ["may-publish", "read-only"] {
        assert!(here.contains(verdict), "{here}");
    }
}

#[test]
fn its_cache_takes_paths_of_an_x86_64_client_and_serves_them() {
    let cache = Cache::start_on_arm64();
    let job = || Job::new(&cache, "nix build --no-link path:.#default");
    let counts = |job: &Job| {
        let report = job.step.run();
        left_nothing(&report);
        let counts = ["built", "published", "verified", "lost"].map(|name| output(&report, name));
        assert_eq!(report.code, 0, "{}", report.log);
        (
            counts.map(|count| count.parse::<u32>().unwrap()),
            report.log,
        )
    };
    let ([built, published, verified, lost], log) = counts(&job());
    assert_eq!((built, verified, lost), (3, published, 0), "{log}");
    assert!(published >= 4, "three outputs and their source: {log}");
    let (again, log) = counts(&job());
    assert_eq!(again[0], 0, "a new machine substitutes all of it:\n{log}");
}

#[test]
fn the_demo_loses_nothing_with_an_arm64_nix() {
    let flake = fs::read_to_string(root().join("examples/hello/flake.nix")).unwrap();
    let ran = versions::run_on_arm64(&format!(
        "cat >flake.nix <<'END'\n{flake}END\nuname -m\n\
         /fly/flywheel nix-job --publish --extra-nix-config 'sandbox = false' --command 'nix build path:.' && cat result"
    ));
    assert_eq!(ran.code, 0, "{}", ran.log);
    for words in [
        "aarch64\n",
        "3 built, 4 published, 4 verified, 0 lost",
        "Hello from Flywheel, with /nix/store/",
    ] {
        assert!(ran.log.contains(words), "no `{words}` in:\n{}", ran.log);
    }
}
