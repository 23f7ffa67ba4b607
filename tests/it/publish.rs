//! `flywheel publish` through the front door: what is refused before anything is touched.

use crate::world::{Flywheel, PLANTED_TOKEN};

fn publish(arguments: &[&str]) -> Flywheel {
    Flywheel::new(&[&["publish"], arguments].concat())
}

#[test]
fn a_missing_server_is_named() {
    let ran = publish(&["/nix/store/x"])
        .env("ATTIC_TOKEN", PLANTED_TOKEN)
        .run();
    assert_eq!(ran.code, 64, "{}", ran.stderr);
    assert!(
        ran.stderr.contains("`--attic-server` is not given"),
        "{}",
        ran.stderr
    );
}

#[test]
fn a_path_outside_of_the_store_is_named() {
    let ran = publish(&["--attic-server", "http://127.0.0.1:1", "/etc"])
        .env("ATTIC_TOKEN", PLANTED_TOKEN)
        .run();
    assert_eq!(ran.code, 64, "{}", ran.stderr);
    assert!(
        ran.stderr.contains("which `/etc` does not"),
        "{}",
        ran.stderr
    );
    assert!(
        ran.stderr.contains("help: Give a path below `/nix/store`"),
        "{}",
        ran.stderr
    );
}

#[test]
fn without_a_token_nothing_is_tried() {
    let ran = publish(&["--attic-server", "http://127.0.0.1:1", "/etc"]).run();
    assert_eq!(ran.code, 1, "{}", ran.stderr);
    assert!(
        ran.stderr.contains("`ATTIC_TOKEN` is empty"),
        "{}",
        ran.stderr
    );
}

#[test]
fn a_pull_request_publishes_nothing_and_goes_on() {
    let arguments = [
        "publish",
        "--attic-server",
        "http://127.0.0.1:1",
        "--push-cache",
        "true",
        "/etc",
    ];
    let run = |more: &[&str]| {
        let run = Flywheel::in_job(&[&arguments[..], more].concat());
        run.env("GITHUB_EVENT_NAME", "pull_request")
            .env("ATTIC_TOKEN", PLANTED_TOKEN)
            .run()
    };
    let ran = run(&[]);
    assert_eq!(ran.code, 0, "{}", ran.stdout);
    assert!(
        ran.stdout
            .contains("::notice title=publication::nothing is published: a pull request"),
        "{}",
        ran.stdout
    );
    assert_eq!(run(&["--require-publish", "true"]).code, 1);
}

#[test]
fn bad_words_are_refused_with_the_good_ones() {
    for (flag, value, words) in [
        ("--format", "jsn", "Did you mean `json`?"),
        (
            "--drain-timeout",
            "soon",
            "`--drain-timeout` must be a time",
        ),
        (
            "--attic-cache",
            "a/b",
            "`--attic-cache` must be the name of a cache",
        ),
        (
            "--attic-public-key",
            "main",
            "`--attic-public-key` is no public key",
        ),
    ] {
        let ran = publish(&[
            "--attic-server",
            "http://127.0.0.1:1",
            flag,
            value,
            "/nix/store/x",
        ])
        .run();
        assert_eq!(ran.code, 64, "{}", ran.stderr);
        assert!(ran.stderr.contains(words), "{}", ran.stderr);
    }
}
