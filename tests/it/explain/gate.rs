//! The gate over every event of GitHub's published examples × fork × ref × protection × token ×
//! `push-cache` × `trusted-refs`, against a second implementation of the table.

use std::collections::BTreeSet;
use std::sync::OnceLock;

use flywheel_core::policy::{Policy, Rule, RuleMode, Ruling};
use flywheel_core::trust::{Facts, PushCache, Request, TrustedRefs, Verdict, decide};
use serde_json::{Value, json};

use super::events::{Event, Files, event, published, push};

/// As wide as `trusted-refs` can be.
pub const WIDEST: &str = "refs/heads/** refs/tags/** refs/**";
const QUEUE: &str =
    "refs/heads/gh-readonly-queue/main/pr-104-929f8209d40f77f4abc622a499c93a83babdbe64";

#[test]
fn only_the_tables_rows_publish() {
    let mut names = BTreeSet::new();
    let mut published_for = BTreeSet::new();
    let mut tried = 0;
    let requests = requests();
    for (job, facts) in all_jobs() {
        names.insert(&job.name);
        for (wide, request, token) in &requests {
            let decision = decide(facts, request, *token);
            let may = table_permits(job, *wide);
            let publishes = may && *token && request.push_cache != PushCache::Never;
            let judged = matches!(decision.verdict(), Verdict::MayPublish(_));
            let permitted = (decision.publishes(), decision.permit().is_some());
            assert!(
                judged == may && permitted == (publishes, publishes),
                "{job:?}, {request:?}, token: {token}: {}",
                decision.reason()
            );
            if publishes {
                published_for.insert(job.name.clone());
            }
            tried += 1;
        }
    }
    assert_eq!(names.len(), 59, "58 published events and `schedule`");
    assert!(tried > 50_000, "{tried}");
    let four = ["merge_group", "push", "schedule", "workflow_dispatch"].map(str::to_owned);
    assert_eq!(
        published_for,
        BTreeSet::from(four),
        "each row of the table was seen to publish, and no other"
    );
}

/// The policy's table: what the gate lets through goes unless an enforced rule is broken, and nothing else goes
/// whatever the policy is.
#[test]
fn the_policy_rules_what_the_gate_lets_through_and_nothing_else() {
    let requests = requests();
    let rules: Vec<_> = rules().collect();
    let mut seen = BTreeSet::new();
    let (wide, request, token) = &requests[requests.len() / 2 + 1];
    for (job, facts) in all_jobs() {
        let publishes = decide(facts, request, *token).publishes();
        assert_eq!(publishes, *token && table_permits(job, *wide), "{job:?}");
        for (policy, rule, (word, mode), breaks) in &rules {
            let ruling = policy.decide(publishes, *rule, "hello-2.12", *breaks);
            let expected = match (publishes, mode, breaks) {
                (false, ..) => Ruling::Nothing,
                (true, RuleMode::Enforce, true) => Ruling::Withhold,
                (true, RuleMode::Warn, true) => Ruling::PublishAndWarn,
                (true, ..) => Ruling::Publish,
            };
            assert_eq!(ruling, expected, "{} {rule} {word} {breaks}", job.name);
            seen.insert((publishes, *rule, *word, *breaks));
        }
    }
    assert_eq!(
        seen.len(),
        2 * rules.len(),
        "each row was seen for a job that publishes and one that does not"
    );
}

/// Every rule, every mode, kept and broken; each with a policy that holds this rule alone.
fn rules() -> impl Iterator<Item = (Policy, Rule, (&'static str, RuleMode), bool)> {
    let modes = |rule| {
        RuleMode::ALL
            .into_iter()
            .map(move |mode| (rule, (mode.as_str(), mode)))
    };
    let policy = |rule, word| Policy::parse(&format!("{rule} = {word}")).unwrap();
    let both = move |(rule, mode): (Rule, (&'static str, RuleMode))| {
        [false, true].map(|breaks| (policy(rule, mode.0), rule, mode, breaks))
    };
    Rule::ALL.into_iter().flat_map(modes).flat_map(both)
}

fn schedule() -> (String, Value) {
    let repository = push().payload["repository"].clone();
    (
        "schedule".into(),
        json!({ "schedule": "0 4 * * *", "workflow": "ci.yml", "repository": repository }),
    )
}

/// Whether `trusted-refs` is at its widest, the request, whether there is a token.
fn requests() -> Vec<(bool, Request, bool)> {
    let mut requests = Vec::new();
    for (wide, trusted) in [(false, ""), (true, WIDEST)] {
        for push_cache in [PushCache::Always, PushCache::Auto, PushCache::Never] {
            let trusted_refs = TrustedRefs::parse(trusted).unwrap();
            let request = Request {
                push_cache,
                by_hand: false,
                trusted_refs,
            };
            requests.extend([false, true].map(|token| (wide, request.clone(), token)));
        }
    }
    requests
}

/// Every example as jobs, and the facts of each. Reading the facts takes most of the time of a test, so it is done
/// once for a process.
fn all_jobs() -> &'static [(Event, Facts)] {
    static JOBS: OnceLock<Vec<(Event, Facts)>> = OnceLock::new();
    JOBS.get_or_init(|| {
        let mut files = Files::new();
        let jobs = published()
            .iter()
            .chain([&schedule()])
            .flat_map(|(name, payload)| jobs(name, payload))
            .collect();
        let with_facts = |job: Event| {
            let facts = job.facts(&mut files);
            (job, facts)
        };
        Vec::into_iter(jobs).map(with_facts).collect()
    })
}

/// One example as jobs: on every kind of ref, with the payload agreeing and as it came, protected or
/// not, in a fork or not.
fn jobs(name: &str, payload: &Value) -> Vec<Event> {
    let default = payload["repository"]["default_branch"]
        .as_str()
        .unwrap_or("main")
        .to_owned();
    let repository = payload["repository"]["full_name"]
        .as_str()
        .unwrap_or("octo-org/octo-repo")
        .to_owned();
    let mut refs: BTreeSet<String> = [
        format!("refs/heads/{default}"),
        format!("refs/heads/{}", default.to_uppercase()),
        format!("refs/heads/{default}2"),
        format!("refs/heads/refs/heads/{default}"),
        format!("refs/tags/{default}"),
        "refs/tags/v1.0".into(),
        "refs/pull/7/merge".into(),
        QUEUE.into(),
    ]
    .into();
    refs.extend(payload["ref"].as_str().map(str::to_owned));
    let mut jobs = Vec::new();
    for git_ref in refs {
        for (protected, fork) in [(false, false), (true, false), (true, true)] {
            let mut payload = payload.clone();
            if fork && payload["repository"].is_object() {
                payload["repository"]["fork"] = json!(true);
            }
            let as_it_came = Event {
                name: name.into(),
                payload,
                git_ref: git_ref.clone(),
                protected,
                repository: repository.clone(),
            };
            jobs.push(as_it_came.clone().on(&git_ref));
            jobs.push(as_it_came);
        }
    }
    jobs
}

/// The design's table, written a second time, on the raw payload.
fn table_permits(job: &Event, wide: bool) -> bool {
    let payload = &job.payload;
    let Some(default) = payload["repository"]["default_branch"].as_str() else {
        return false;
    };
    let git_ref = job.git_ref.as_str();
    let removed = payload["deleted"] == true
        || payload["after"]
            .as_str()
            .is_some_and(|id| id.chars().all(|c| c == '0'));
    let on_default = git_ref.strip_prefix("refs/heads/") == Some(default);
    let tag = git_ref
        .strip_prefix("refs/tags/")
        .is_some_and(|tag| wide || (tag.starts_with('v') && !tag.contains('/')));
    let branch = wide && job.protected && git_ref.starts_with("refs/heads/");
    match job.name.as_str() {
        "push" | "workflow_dispatch" => {
            payload["ref"] == git_ref && !removed && (on_default || tag || branch)
        }
        "schedule" => on_default,
        "merge_group" => wide && payload["merge_group"]["head_ref"] == git_ref,
        _ => false,
    }
}

/// A job that asks for everything there is, with a token.
fn check(job: &Event, publishes: bool) -> String {
    let mut files = Files::new();
    let request = Request {
        push_cache: PushCache::Always,
        by_hand: true,
        trusted_refs: TrustedRefs::parse(WIDEST).unwrap(),
    };
    let decision = decide(&job.facts(&mut files), &request, true);
    assert_eq!(
        decision.publishes(),
        publishes,
        "{job:?}: {}",
        decision.reason()
    );
    decision.reason()
}

fn pull_request(name: &str, head_repository: &Value) -> Event {
    let sides =
        json!({ "head": { "ref": "main", "repo": head_repository }, "base": { "ref": "main" } });
    event(
        name,
        &json!({ "action": "synchronize", "pull_request": sides }),
    )
}

#[test]
fn the_base_of_these_cases_publishes() {
    check(&push(), true);
}

#[test]
fn no_pull_request_publishes_from_wherever_it_comes() {
    let own = json!({ "full_name": "octo-org/octo-repo", "fork": false });
    let fork = json!({ "full_name": "stranger/octo-repo", "fork": true });
    for head in [own, fork, Value::Null] {
        for name in [
            "pull_request",
            "pull_request_target",
            "pull_request_review",
            "pull_request_review_comment",
        ] {
            for git_ref in ["refs/pull/7/merge", "refs/heads/main", "refs/tags/v1"] {
                check(&pull_request(name, &head).protected().on(git_ref), false);
            }
            // The event is `push` by the variables, and another one by the payload.
            let lying = pull_request(name, &head).change(|payload| {
                payload["after"] = json!("6113728f27ae82c7b1a177c8d03f9e96e0adf246");
            });
            check(
                &Event {
                    name: "push".into(),
                    ..lying
                }
                .on("refs/heads/main"),
                false,
            );
        }
    }
}

#[test]
fn dependabot_gains_nothing_by_its_name() {
    let by_dependabot = |event: Event| {
        event.change(|payload| payload["sender"] = json!({ "login": "dependabot[bot]" }))
    };
    check(
        &by_dependabot(push().on("refs/heads/dependabot/cargo/x-1")),
        false,
    );
    check(
        &by_dependabot(pull_request("pull_request", &Value::Null)),
        false,
    );
}

#[test]
fn a_workflow_run_of_a_branch_named_main_never_publishes() {
    let run = json!({ "event": "pull_request", "head_branch": "main", "head_repository": { "fork": true } });
    let event = event(
        "workflow_run",
        &json!({ "action": "completed", "workflow_run": run, "workflow": {} }),
    );
    check(&event.clone().on("refs/heads/main").protected(), false);
    check(
        &Event {
            name: "push".into(),
            ..event
        }
        .on("refs/heads/main"),
        false,
    );
}

#[test]
fn a_push_that_removes_or_does_not_say_never_publishes() {
    for git_ref in ["refs/heads/main", "refs/tags/v1"] {
        let on = || push().on(git_ref);
        check(
            &on().change(|payload| payload["deleted"] = json!(true)),
            false,
        );
        check(
            &on().change(|payload| payload["after"] = json!("0".repeat(40))),
            false,
        );
        let silent = on().change(|payload| {
            payload["deleted"] = Value::Null;
            payload["after"] = Value::Null;
        });
        check(&silent, false);
    }
}

#[test]
fn hostile_and_disagreeing_payloads_never_publish() {
    let changes: [fn(&mut Value); 12] = [
        |payload| *payload = json!([]),
        |payload| *payload = Value::Null,
        |payload| payload["repository"] = json!([]),
        |payload| payload["repository"] = json!(["octo-org/octo-repo", "main"]),
        |payload| payload["repository"] = json!(7),
        |payload| payload["repository"] = Value::Null,
        |payload| payload["repository"]["full_name"] = json!("octo-org/Octo-Repo"),
        |payload| payload["repository"]["full_name"] = json!({ "a": 1 }),
        |payload| payload["repository"]["default_branch"] = json!(["main"]),
        |payload| payload["repository"]["default_branch"] = json!("ma*n"),
        |payload| payload["ref"] = json!("refs/heads/other"),
        |payload| payload["deleted"] = json!("no"),
    ];
    for change in changes {
        check(&push().change(change), false);
    }
    check(
        &Event {
            repository: "stranger/octo-repo".into(),
            ..push()
        },
        false,
    );
    check(
        &Event {
            git_ref: "refs/heads/other".into(),
            ..push()
        },
        false,
    );
    check(
        &Event {
            git_ref: String::new(),
            ..push()
        },
        false,
    );
    check(
        &Event {
            repository: String::new(),
            ..push()
        },
        false,
    );
    check(
        &Event {
            name: String::new(),
            ..push()
        },
        false,
    );
}
