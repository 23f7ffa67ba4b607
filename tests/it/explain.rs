//! `explain` through the front door, and the gate behind it over GitHub's own payloads.

pub mod events;
mod gate;
mod gitlab;
mod page;

use std::collections::BTreeSet;

use serde_json::{Value, json};

use self::events::{Event, event, published, push};
use crate::world::{Flywheel, PLANTED_TOKEN, Ran};

/// A run in the job of a push to the default branch that has a token and asks to publish.
pub fn job_of_a_push(arguments: &[&str]) -> Flywheel {
    job_of(&push(), arguments)
}

/// `explain` in a job of this event that has a token and asks to publish.
fn job(event: &Event, arguments: &[&str]) -> Flywheel {
    job_of(event, &[&["explain"], arguments].concat())
}

/// A run in the job of this event that has a token and asks to publish.
pub fn job_of(event: &Event, arguments: &[&str]) -> Flywheel {
    let run = Flywheel::in_job(arguments)
        .env("ATTIC_TOKEN", PLANTED_TOKEN)
        .env("FLYWHEEL_PUSH_CACHE", "true");
    let file = run.path("event.json");
    std::fs::write(&file, event.payload.to_string()).unwrap();
    event
        .variables(&file)
        .into_iter()
        .fold(run, |run, (name, value)| run.env(name, &value))
}

fn explained(run: &Flywheel) -> Value {
    let ran = run.run();
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    serde_json::from_str(&ran.stdout).unwrap()
}

fn json_of(event: &Event) -> Value {
    explained(&job(event, &["--format", "json"]))
}

#[test]
fn json_has_the_stable_keys() {
    insta::assert_snapshot!(job(&push(), &["--format", "json"]).run().stdout, @r#"
    {
      "verdict": "may-publish",
      "publishes": true,
      "reason": "`push` on the default branch `main`",
      "plan": {
        "attic": "all",
        "flakehub": "rolling"
      },
      "host": "this repository's alone (no job of another repository or of lower trust was seen on this host)"
    }
    "#);
}

#[test]
fn the_host_is_judged_by_the_jobs_that_were_seen_on_it() {
    let host = |record: Option<&str>, shared: &str| {
        let run = job(&push(), &["--format", "json", "--shared-host", shared]);
        let journal = run.path("journal");
        let jobs = std::path::Path::new(&journal).join("jobs");
        std::fs::create_dir_all(&jobs).unwrap();
        if let Some(record) = record {
            std::fs::write(jobs.join("1-1.job"), format!("{record}\n")).unwrap();
        }
        let found = explained(&run.env("FLYWHEEL_JOURNAL", &journal.display().to_string()));
        found["host"].as_str().unwrap().to_owned()
    };
    let other = r#"{"repository":"o/other","trusted":true,"store":"/nix/var/nix"}"#;
    assert!(host(None, "auto").starts_with("this repository's alone"));
    let found = host(Some(other), "auto");
    assert!(
        found.starts_with("shared with other jobs (a job of o/other"),
        "{found}"
    );
    assert!(host(Some(other), "false").contains("`shared-host: false`"));
}

#[test]
fn text_says_what_would_change_it() {
    insta::assert_snapshot!(job(&push().on("refs/heads/feature"), &[]).run().stdout, @"
    verdict    read-only
    publishes  no
    reason     `refs/heads/feature` is neither the default branch nor named by `trusted-refs`
    attic      nothing
    flakehub   nothing
    host       this repository's alone (no job of another repository or of lower trust was seen on this host)
    to publish name the branch in `trusted-refs`, and have a rule protect it
    the job would go on with a notice
    ");
}

#[test]
fn every_published_event_gets_a_verdict() {
    let mut seen = BTreeSet::new();
    for (name, payload) in published().iter().cloned() {
        if !seen.insert(name.clone()) {
            continue;
        }
        let branch = payload["repository"]["default_branch"]
            .as_str()
            .unwrap_or("main")
            .to_owned();
        let repository = payload["repository"]["full_name"]
            .as_str()
            .unwrap_or("octo-org/octo-repo")
            .to_owned();
        let event = Event {
            name,
            payload,
            repository,
            ..push()
        }
        .on(&format!("refs/heads/{branch}"));
        let publishes = matches!(event.name.as_str(), "push" | "workflow_dispatch");
        assert_eq!(json_of(&event)["publishes"], publishes, "{event:?}");
    }
    assert_eq!(seen.len(), 58);
}

#[test]
fn a_token_and_a_request_are_both_needed() {
    let json = ["--format", "json"];
    assert_eq!(
        explained(&job(&push(), &json).env("ATTIC_TOKEN", ""))["publishes"],
        false
    );
    assert_eq!(
        explained(&job(&push(), &json).env("FLYWHEEL_PUSH_CACHE", "false"))["publishes"],
        false
    );
    assert_eq!(
        explained(&job(&push(), &json).env("FLYWHEEL_PUSH_CACHE", ""))["publishes"],
        false
    );
    assert_eq!(
        explained(&job(&push(), &json).env("FLYWHEEL_PUSH_CACHE", "Auto"))["publishes"],
        true
    );
}

/// An earlier step can write the payload, but not what the runner puts into the action's variable.
#[test]
fn a_forged_default_branch_contradicts_the_event_of_the_server() {
    let forged = push()
        .change(|payload| payload["repository"]["default_branch"] = json!("feature"))
        .on("refs/heads/feature");
    let json = ["--format", "json"];
    let judged =
        |branch: &str| explained(&job(&forged, &json).env("FLYWHEEL_EVENT_DEFAULT_BRANCH", branch));
    let judgement = judged("main");
    assert_eq!(judgement["publishes"], false, "{judgement}");
    let reason = judgement["reason"].as_str().unwrap();
    assert!(
        reason.contains("the default branch is in doubt") && reason.contains("`main`"),
        "{reason}"
    );
    // Where the binary is called by hand there is no such variable, as `docs/trust.md` states.
    assert_eq!(judged("")["publishes"], true);
    let honest = explained(&job(&push(), &json).env("FLYWHEEL_EVENT_DEFAULT_BRANCH", "main"));
    assert_eq!(honest["publishes"], true, "{honest}");
}

#[test]
fn a_trusted_ref_that_no_ref_matches_is_64() {
    for pattern in [
        "refs/heads/release/",
        "/refs/heads/main",
        "refs/heads//x",
        "refs/heads/***",
    ] {
        let ran = job(&push(), &["--trusted-refs", pattern]).run();
        assert_eq!(ran.code, 64, "{pattern}: {}", ran.stdout);
        let printed = format!("{}{}", ran.stdout, ran.stderr);
        assert!(printed.contains("`trusted-refs`"), "{pattern}: {printed}");
    }
}

/// git allows these characters in the name of a branch.
#[test]
fn a_ref_that_turns_the_direction_of_writing_is_shown() {
    let event = push().on("refs/heads/a\u{202e}b\u{200b}");
    let text = job(&event, &[]).run().stdout;
    assert!(text.contains(r"refs/heads/a\u{202e}b\u{200b}"), "{text}");
    let json = job(&event, &["--format", "json"]).run().stdout;
    assert!(
        json.contains(r"a\u202eb\u200b") || json.contains(r"a\\u{202e}b"),
        "{json}"
    );
    for printed in [text, json] {
        assert!(!printed.contains(['\u{202e}', '\u{200b}']), "{printed}");
    }
}

#[test]
fn a_payload_that_is_a_pipe_or_huge_is_refused_at_once() {
    for kind in ["pipe", "large"] {
        let run = job(&push(), &["--format", "json"]);
        let file = run.path("event.json");
        std::fs::remove_file(&file).unwrap();
        if kind == "pipe" {
            rustix::fs::mkfifoat(rustix::fs::CWD, &file, rustix::fs::Mode::from(0o600)).unwrap();
        } else {
            let sparse = std::fs::File::create(&file).unwrap();
            sparse.set_len(3_000_000_000).unwrap();
        }
        let began = std::time::Instant::now();
        // Not `check`, which would read the file to look for the token.
        let output = run.command().output().unwrap();
        assert!(
            began.elapsed().as_secs() < 5,
            "{kind}: {:?}",
            began.elapsed()
        );
        let judgement: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(judgement["publishes"], false, "{kind}: {judgement}");
    }
}

#[test]
fn the_jobs_protection_and_trusted_refs_count() {
    let release = push().on("refs/heads/release/1");
    let json = ["--format", "json", "--trusted-refs", "refs/heads/release/*"];
    let unprotected = explained(&job(&release, &json));
    assert!(
        unprotected["reason"]
            .as_str()
            .unwrap()
            .contains("no rule protects"),
        "{unprotected}"
    );
    assert_eq!(
        explained(&job(&release.protected(), &json))["publishes"],
        true
    );
}

#[test]
fn a_broken_payload_is_read_only_and_no_failure() {
    let whole = push().payload.to_string();
    let half = &whole[..whole.len() / 2];
    let deep = "[".repeat(200_000);
    for text in [
        "",
        "{",
        "null",
        half,
        &deep,
        "{\"repository\":[]}",
        "\u{0}",
        "{}{}",
    ] {
        let run = job(&push(), &["--format", "json"]);
        std::fs::write(run.path("event.json"), text).unwrap();
        let explanation = explained(&run);
        assert_eq!(
            (&explanation["verdict"], &explanation["publishes"]),
            (&json!("read-only"), &json!(false))
        );
    }
    let run = job(&push(), &["--format", "json"]);
    std::fs::remove_file(run.path("event.json")).unwrap();
    assert_eq!(explained(&run)["verdict"], "read-only");
}

#[test]
fn no_line_is_a_command_whatever_the_payload_says() {
    let hostile = event(
        "push",
        &json!({ "after": "x\n::add-path::/evil\n##[add-path]/evil" }),
    );
    for event in [
        hostile.on("refs/heads/main"),
        Event {
            name: "x##[add-path]/evil".into(),
            ..push()
        },
    ] {
        let stdout = job(&event, &[]).run().stdout;
        assert!(
            !stdout
                .lines()
                .any(|line| line.trim_start().starts_with("::") || line.contains("##[")),
            "{stdout}"
        );
    }
}

/// A recorded event, on a laptop.
fn recorded(payload: &str, arguments: &[&str]) -> (Flywheel, Ran) {
    let arguments = [
        &["explain", "--format", "json", "--event-path", "event.json"],
        arguments,
    ]
    .concat();
    let run = Flywheel::new(&arguments).env("ATTIC_TOKEN", PLANTED_TOKEN);
    std::fs::write(run.path("event.json"), payload).unwrap();
    let ran = run.run();
    (run, ran)
}

fn replayed(arguments: &[&str]) -> Value {
    let (_run, ran) = recorded(&push().payload.to_string(), arguments);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    serde_json::from_str(&ran.stdout).unwrap()
}

#[test]
fn a_recorded_event_can_be_tried_on_a_laptop() {
    let main = [
        "--event-name",
        "push",
        "--ref",
        "refs/heads/main",
        "--push-cache",
        "auto",
    ];
    assert_eq!(replayed(&main)["publishes"], true);
    assert_eq!(
        replayed(&[&main[..], &["--repository", "octo-org/octo-repo"]].concat())["publishes"],
        true
    );
    assert_eq!(
        replayed(&[&main[..], &["--repository", "stranger/octo-repo"]].concat())["publishes"],
        false
    );
    assert_eq!(
        replayed(&["--event-name", "pull_request", "--ref", "refs/heads/main"])["verdict"],
        "read-only"
    );
    let no_ref = replayed(&["--event-name", "push"]);
    assert!(
        no_ref["reason"].as_str().unwrap().contains("`--ref`"),
        "{no_ref}"
    );
    let no_name = replayed(&["--ref", "refs/heads/main"]);
    assert!(
        no_name["reason"]
            .as_str()
            .unwrap()
            .contains("`--event-name`"),
        "{no_name}"
    );
}

#[test]
fn a_recorded_payload_that_is_broken_is_read_only() {
    let (_run, ran) = recorded(
        "{\"ref\":",
        &["--event-name", "push", "--ref", "refs/heads/main"],
    );
    assert_eq!(ran.code, 0);
    assert!(ran.stdout.contains("cut short"), "{}", ran.stdout);
}

#[test]
fn a_laptop_publishes_only_when_asked() {
    let laptop = |arguments: &[&str]| {
        let all = [&["explain", "--format", "json"], arguments].concat();
        explained(&Flywheel::new(&all).env("ATTIC_TOKEN", PLANTED_TOKEN))
    };
    let silent = laptop(&["--push-cache", "true"]);
    assert_eq!(silent["publishes"], false);
    assert!(
        silent["reason"]
            .as_str()
            .unwrap()
            .starts_with("local: publish only when asked"),
        "{silent}"
    );
    assert_eq!(laptop(&["--publish"])["publishes"], true);
}

#[test]
fn bad_input_is_64_and_names_it() {
    for (arguments, named) in [
        (
            &["--event-path", "/nowhere/event.json"][..],
            "/nowhere/event.json",
        ),
        (&["--event-path", "/"], "event-path"),
        (&["--trusted-refs", "main"], "trusted-refs"),
        (&["--trusted-refs", "refs/pull/**"], "trusted-refs"),
        (&["--push-cache", "yes"], "push-cache"),
        (&["--require-publish", "maybe"], "require-publish"),
        (&["--ref-protected", "maybe"], "ref-protected"),
        (&["--format", "yaml"], "format"),
    ] {
        let ran = Flywheel::new(&[&["explain"], arguments].concat()).run();
        assert_eq!((ran.code, ran.stdout.as_str()), (64, ""), "{arguments:?}");
        assert!(ran.stderr.contains(named), "{}", ran.stderr);
    }
}
