//! `docs/trust.md`: the gate's decisions over real payloads are the page that users read.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use flywheel_core::trust::{Decision, PushCache, Request, TrustedRefs, Verdict, decide};
use serde_json::{Value, json};

use super::events::{Event, Files, event, published, push};
use super::gate::WIDEST;
use super::gitlab;

const BEFORE: &str = include_str!("page_before.md");
const AFTER: &str = include_str!("page_after.md");

#[test]
fn the_page_is_what_the_gate_does() {
    let files = &mut Files::new();
    let tables = [
        cases_table(files),
        requests_table(files),
        events_table(files),
        gitlab::table(),
    ]
    .concat();
    let page = format!(
        "{BEFORE}
{tables}
{AFTER}"
    );
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/trust.md");
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(&file, &page).unwrap();
    }
    let written = std::fs::read_to_string(&file).unwrap_or_default();
    assert!(
        written == page,
        "docs/trust.md is out of date: UPDATE_DOCS=1 cargo test --test it page"
    );
}

fn answer(
    files: &mut Files,
    event: &Event,
    trusted: &str,
    push_cache: PushCache,
    token: bool,
) -> Decision {
    let request = Request {
        push_cache,
        by_hand: false,
        trusted_refs: TrustedRefs::parse(trusted).unwrap(),
    };
    decide(&event.facts(files), &request, token)
}

/// What a row shows: a job, what is special about it, its `trusted-refs`.
struct Case {
    event: Event,
    special: &'static str,
    trusted: &'static str,
}

fn case(event: Event, special: &'static str) -> Case {
    Case {
        event,
        special,
        trusted: "",
    }
}

fn cases() -> Vec<Case> {
    let zero = || json!("0".repeat(40));
    let schedule = event("schedule", &json!({ "schedule": "0 4 * * *" }));
    let dispatch = event(
        "workflow_dispatch",
        &json!({ "inputs": {}, "workflow": "ci.yml" }),
    )
    .on("refs/heads/main");
    let queue = "refs/heads/gh-readonly-queue/main/pr-7-0a1b";
    let group = event(
        "merge_group",
        &json!({ "action": "checks_requested", "merge_group": { "head_ref": queue } }),
    )
    .on(queue);
    let own = json!({ "full_name": "octo-org/octo-repo", "fork": false });
    let fork = json!({ "full_name": "stranger/octo-repo", "fork": true });
    let pull = |name: &str, head: &Value| {
        event(
            name,
            &json!({ "action": "opened", "pull_request": { "head": { "repo": head } } }),
        )
    };
    let run = json!({ "event": "pull_request", "head_branch": "main" });
    let named = |event: Event, trusted, special| Case {
        event,
        special,
        trusted,
    };
    vec![
        case(push(), ""),
        case(schedule.clone(), ""),
        case(dispatch.clone(), ""),
        case(push().on("refs/tags/v1.0"), ""),
        case(dispatch.clone().on("refs/tags/v1.0"), ""),
        case(push().on("refs/tags/nightly"), ""),
        case(push().on("refs/heads/feature"), ""),
        case(dispatch.on("refs/heads/feature"), ""),
        case(schedule.on("refs/heads/feature"), ""),
        case(push().on("refs/heads/Main"), "looks like `main`"),
        case(push().on("refs/heads/refs/heads/main"), "looks like `main`"),
        case(push().on("refs/tags/main"), "a tag named `main`"),
        named(
            push().on("refs/heads/release/1").protected(),
            "refs/heads/release/*",
            "a rule protects the branch",
        ),
        named(
            push().on("refs/heads/release/1"),
            "refs/heads/release/*",
            "no rule protects the branch",
        ),
        named(
            push().on("refs/tags/v1.0"),
            "refs/heads/release/*",
            "the default is replaced",
        ),
        case(
            push().change(|payload| payload["deleted"] = json!(true)),
            "`deleted: true`",
        ),
        case(
            push()
                .on("refs/tags/v1.0")
                .change(|payload| payload["after"] = zero()),
            "`after` all zeros",
        ),
        case(group.clone(), ""),
        named(group, "refs/heads/gh-readonly-queue/main/*", ""),
        case(
            pull("pull_request", &own).on("refs/pull/7/merge"),
            "own branch",
        ),
        case(
            pull("pull_request", &fork).on("refs/pull/7/merge"),
            "from a fork",
        ),
        case(
            pull("pull_request", &Value::Null).on("refs/pull/7/merge"),
            "from a fork that is gone",
        ),
        named(
            pull("pull_request_target", &fork).protected(),
            WIDEST,
            "from a fork",
        ),
        named(
            event(
                "workflow_run",
                &json!({ "action": "completed", "workflow_run": run }),
            )
            .protected(),
            WIDEST,
            "of a fork's branch `main`",
        ),
        case(
            event("release", &json!({ "action": "published", "release": {} })).on("refs/tags/v1.0"),
            "",
        ),
        case(
            event(
                "repository_dispatch",
                &json!({ "action": "x", "client_payload": {} }),
            ),
            "",
        ),
        case(
            event(
                "issue_comment",
                &json!({ "action": "created", "issue": {}, "comment": {} }),
            ),
            "",
        ),
        case(
            push().change(|payload| payload["repository"] = json!([])),
            "unreadable payload",
        ),
        case(
            push().change(|payload| payload["ref"] = json!("refs/heads/other")),
            "payload names another ref",
        ),
        case(
            Event {
                repository: "stranger/octo-repo".into(),
                ..push()
            },
            "payload names another repository",
        ),
        case(
            push().change(|payload| payload["pull_request"] = json!({})),
            "payload of another event",
        ),
        case(
            Event {
                git_ref: String::new(),
                ..push()
            },
            "`GITHUB_REF` is missing",
        ),
    ]
}

fn cases_table(files: &mut Files) -> String {
    let mut table = String::from(
        "## Job by job\n\nThe default branch is `main`, `push-cache` is `true`, and a token is there.\n\n\
         | event | ref | special | `trusted-refs` | verdict | Attic | FlakeHub | reason |\n|---|---|---|---|---|---|---|---|\n",
    );
    for Case {
        event,
        special,
        trusted,
    } in cases()
    {
        let decision = answer(files, &event, trusted, PushCache::Always, true);
        let plan = decision.plan();
        let cells = [
            code(&event.name),
            code(&event.git_ref),
            special.to_owned(),
            code(trusted),
            decision.verdict().as_str().to_owned(),
            plan.attic.as_str().to_owned(),
            plan.flakehub.as_str().to_owned(),
            decision.reason(),
        ];
        writeln!(table, "| {} |", cells.join(" | ")).unwrap();
    }
    table
}

fn code(text: &str) -> String {
    if text.is_empty() {
        String::new()
    } else {
        format!("`{text}`")
    }
}

fn requests_table(files: &mut Files) -> String {
    let mut table = String::from(
        "\n## From \"may publish\" to \"publishes\"\n\n| verdict | `push-cache` | token | publishes | otherwise |\n|---|---|---|---|---|\n",
    );
    let pull_request =
        event("pull_request", &json!({ "pull_request": {} })).on("refs/pull/7/merge");
    for (event, verdict) in [(push(), "may-publish"), (pull_request, "read-only")] {
        for (push_cache, word) in [
            (PushCache::Always, "true"),
            (PushCache::Auto, "auto"),
            (PushCache::Never, "false"),
        ] {
            for (token, has) in [(true, "yes"), (false, "no")] {
                let decision = answer(files, &event, "", push_cache, token);
                assert_eq!(decision.verdict().as_str(), verdict);
                let publishes = if decision.publishes() {
                    "**yes**"
                } else {
                    "no"
                };
                let otherwise = if decision.is_refused() {
                    "a notice; a failure with `require-publish: true`"
                } else {
                    ""
                };
                writeln!(
                    table,
                    "| {verdict} | `{word}` | {has} | {publishes} | {otherwise} |"
                )
                .unwrap();
            }
        }
    }
    table
}

/// Each published event with a token, `push-cache: true` and a protected ref: on the default branch,
/// and wherever `trusted-refs` can reach.
fn events_table(files: &mut Files) -> String {
    let mut table = String::from(
        "\n## Every event that GitHub publishes an example of\n\n\
         All examples of each, with a token, `push-cache: true` and a protected ref: on the default branch as it is, and on \
         any branch, tag or pull request with `trusted-refs` as wide as it can be.\n\n\
         | event | examples | default branch | elsewhere, `trusted-refs` at its widest |\n|---|---|---|---|\n",
    );
    let mut events: BTreeMap<String, (usize, bool, bool)> = BTreeMap::new();
    for (name, payload) in published().iter().cloned() {
        let mut may = |git_ref: &str, trusted: &str| {
            let branch = payload["repository"]["default_branch"]
                .as_str()
                .unwrap_or("main");
            let repository = payload["repository"]["full_name"]
                .as_str()
                .unwrap_or("octo-org/octo-repo")
                .into();
            let event = Event {
                name: name.clone(),
                payload: payload.clone(),
                repository,
                ..push()
            }
            .protected();
            let git_ref = git_ref.replace("DEFAULT", branch);
            let decision = answer(files, &event.on(&git_ref), trusted, PushCache::Always, true);
            matches!(decision.verdict(), Verdict::MayPublish(_))
        };
        let queue = payload["merge_group"]["head_ref"]
            .as_str()
            .unwrap_or("refs/heads/gh-readonly-queue/x");
        let elsewhere = ["refs/heads/x", "refs/tags/v1", "refs/pull/7/merge", queue];
        let counted = events.entry(name.clone()).or_default();
        counted.0 += 1;
        counted.1 |= may("refs/heads/DEFAULT", "");
        counted.2 |= elsewhere.into_iter().any(|git_ref| may(git_ref, WIDEST));
    }
    let word = |may| if may { "**may publish**" } else { "read-only" };
    for (name, (examples, on_default, elsewhere)) in events {
        writeln!(
            table,
            "| `{name}` | {examples} | {} | {} |",
            word(on_default),
            word(elsewhere)
        )
        .unwrap();
    }
    table
}
