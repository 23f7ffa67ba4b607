//! `flywheel watch-store` through the front door: its messages, also where no watch runs.

use crate::world::{Flywheel, PLANTED_TOKEN};

fn watch_store(arguments: &[&str]) -> Flywheel {
    Flywheel::in_job(&[&["watch-store"], arguments].concat())
        .env("RUNNER_TRACKING_ID", "github_of_this_test")
}

#[test]
fn a_word_is_needed_and_a_wrong_one_is_named() {
    let ran = watch_store(&[]).run();
    assert_eq!(ran.code, 64, "{}", ran.stdout);
    assert!(
        ran.stdout.contains("input `mode` is not given"),
        "{}",
        ran.stdout
    );
    let ran = watch_store(&["finsh"]).run();
    assert_eq!(ran.code, 64, "{}", ran.stdout);
    assert!(
        ran.stdout.contains("Did you mean `finish`?"),
        "{}",
        ran.stdout
    );
    let ran = watch_store(&[]).env("FLYWHEEL_MODE", "strat").run();
    assert!(
        ran.code == 64 && ran.stdout.contains("Did you mean `start`?"),
        "{}",
        ran.stdout
    );
}

#[test]
fn a_task_as_argument_makes_the_mode_irrelevant() {
    let ran = watch_store(&["status"]).env("FLYWHEEL_MODE", "strat").run();
    assert_ne!(ran.code, 64, "{}", ran.stdout);
    // An empty argument is one that was not given.
    let named = watch_store(&[""]).env("FLYWHEEL_MODE", "status").run();
    assert_eq!((ran.code, ran.stdout), (named.code, named.stdout));
}

#[test]
fn wrong_input_is_found_before_anything_is_touched() {
    for (flag, value, words) in [
        (
            "--journal",
            "relative",
            "input `journal` must be an absolute path or `off`",
        ),
        (
            "--drain-timeout",
            "0",
            "input `drain-timeout` must be from one second to one day",
        ),
        (
            "--extra-nix-config",
            "nonsense",
            "input `extra-nix-config` has no `name = value`",
        ),
        (
            "--attic-cache",
            "a/b",
            "input `attic-cache` must be the name of a cache",
        ),
    ] {
        let run = watch_store(&["start", flag, value]).env("ATTIC_TOKEN", PLANTED_TOKEN);
        let ran = run.run();
        assert_eq!(ran.code, 64, "{}", ran.stdout);
        assert!(ran.stdout.contains(words), "{}", ran.stdout);
        assert_eq!(
            std::fs::read_dir(run.path("runner-temp")).unwrap().count(),
            0,
            "{flag}"
        );
    }
}

#[test]
fn where_nothing_runs_it_is_said() {
    let ran = watch_store(&["status"]).run();
    assert_eq!(
        (ran.code, ran.stdout.trim()),
        (0, "no watch runs in this job"),
        "{}",
        ran.stderr
    );
    let ran = watch_store(&["status", "--format", "json"]).run();
    let status: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!(status["state"], "none");
    let ran = watch_store(&["finish"]).run();
    assert_eq!(ran.code, 0, "{}", ran.stdout);
    assert!(
        ran.stdout
            .contains("::warning title=watch-store::no watch runs in this job"),
        "{}",
        ran.stdout
    );
    assert_eq!(
        watch_store(&["finish", "--require-publish", "true"])
            .run()
            .code,
        1
    );
}

#[test]
fn json_stays_json_where_the_home_is_made_up_for() {
    let run = Flywheel::in_job(&["watch-store", "status", "--format", "json"]);
    let mut command = run.command();
    command.env_remove("HOME").env_remove("XDG_STATE_HOME");
    let output = command.output().unwrap();
    let status: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(status["state"], "none");
    let log = String::from_utf8_lossy(&output.stderr);
    assert!(log.contains("`HOME` is not set"), "{log}");
}
