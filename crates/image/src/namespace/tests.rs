//! Every actor, disposition and event in one table, judged by the trust gate itself; and the names of namespaces.

use std::collections::BTreeMap;

use super::*;
use flywheel_core::trust::facts::{Doubt, FactName};
use flywheel_core::trust::{Event, Job, PushCache, Request, TrustedRefs, decide};

fn job(event: &str, git_ref: &str) -> Facts {
    Facts::Job(Box::new(Job {
        event: Ok(Event::from_name(event)),
        repository: Ok("octo-org/web".into()),
        default_branch: Ok("main".into()),
        git_ref: Ok(git_ref.into()),
        ref_protected: true,
        removes_ref: Ok(false),
    }))
}

/// Every event, with whether its job may publish (`p`), may not (`r`), or is none (`l`).
fn events() -> Vec<(&'static str, Facts, bool, char)> {
    let main = "refs/heads/main";
    let mut doubtful = job("push", main);
    if let Facts::Job(job) = &mut doubtful {
        job.git_ref = Err(Doubt::Missing(FactName::Ref));
    }
    vec![
        ("local", Facts::Local, false, 'l'),
        ("local with --publish", Facts::Local, true, 'l'),
        ("another CI", Facts::OtherCi("x".into()), false, 'r'),
        ("push to main", job("push", main), false, 'p'),
        ("push of a tag", job("push", "refs/tags/v1"), false, 'p'),
        ("push elsewhere", job("push", "refs/heads/x"), false, 'r'),
        ("push, in doubt", doubtful, false, 'r'),
        ("schedule", job("schedule", main), false, 'p'),
        ("dispatch", job("workflow_dispatch", main), false, 'p'),
        (
            "dispatch elsewhere",
            job("workflow_dispatch", "refs/heads/x"),
            false,
            'r',
        ),
        (
            "merge queue",
            job("merge_group", "refs/heads/gh-readonly-queue/main/pr-7"),
            false,
            'r',
        ),
        (
            "pull request",
            job("pull_request", "refs/pull/7/merge"),
            false,
            'r',
        ),
        (
            "pull request, by a setting",
            job("pull_request", main),
            true,
            'r',
        ),
        (
            "pull_request_target",
            job("pull_request_target", main),
            true,
            'r',
        ),
        ("workflow_run", job("workflow_run", main), false, 'r'),
        ("release", job("release", "refs/tags/v1"), false, 'r'),
        (
            "repository_dispatch",
            job("repository_dispatch", main),
            false,
            'r',
        ),
        ("issue_comment", job("issue_comment", main), false, 'r'),
        ("an unknown event", job("next_year", main), true, 'r'),
    ]
}

fn actors() -> [(&'static str, Actor); 5] {
    [
        ("ci", Actor::Ci),
        ("human", Actor::Human(ActorId::new("ann"))),
        ("agent", Actor::Agent(ActorId::new("bot"))),
        (
            "ci_aux, given",
            Actor::CiAux(vec!["api".into(), "web".into()]),
        ),
        ("ci_aux, not given", Actor::CiAux(vec!["web-2".into()])),
    ]
}

/// What is read and written, by actor and standing; `-` writes nothing. `discard` writes nothing for anybody.
const TABLE: [(&str, char, &str, &str); 15] = [
    ("ci", 'p', "ci/web", "ci/web"),
    ("ci", 'r', "ci/web", "-"),
    ("ci", 'l', "ci/web", "-"),
    ("human", 'p', "ci/web", "-"),
    ("human", 'r', "ci/web", "-"),
    ("human", 'l', "ci/web dev/ann-web", "dev/ann-web"),
    ("agent", 'p', "ci/web", "-"),
    ("agent", 'r', "ci/web", "-"),
    ("agent", 'l', "ci/web dev/bot-web", "dev/bot-web"),
    ("ci_aux, given", 'p', "ci/web", "ci/web"),
    ("ci_aux, given", 'r', "ci/web", "-"),
    ("ci_aux, given", 'l', "ci/web", "-"),
    ("ci_aux, not given", 'p', "ci/web", "-"),
    ("ci_aux, not given", 'r', "ci/web", "-"),
    ("ci_aux, not given", 'l', "ci/web", "-"),
];

#[test]
fn every_actor_disposition_and_event() {
    let mut seen = 0;
    for (event, facts, by_hand, standing) in events() {
        let request = Request {
            push_cache: PushCache::Always,
            by_hand,
            trusted_refs: TrustedRefs::parse("refs/tags/v*").expect("a pattern"),
        };
        let decision = decide(&facts, &request, true);
        for (name, actor) in actors() {
            let mut rows = TABLE.iter();
            let row = rows.find(|row| (row.0, row.1) == (name, standing));
            let (_, _, reads, writes) = row.expect("the table is whole");
            for (word, disposition) in Disposition::ALL {
                let context = format!("{name}, {word}, {event}");
                let plan = plan(
                    &actor,
                    "web",
                    disposition,
                    Standing::of(&facts, decision.verdict()),
                );
                assert_eq!(plan.imports.join(" "), *reads, "{context}");
                let written = plan.export.as_ref();
                let namespace = written.map_or("-", |export| export.namespace.as_str());
                let expected = if word == "discard" { "-" } else { writes };
                assert_eq!(namespace, expected, "{context}: {}", plan.reason);
                let restores = written.is_some_and(|export| export.restores_on_failure);
                assert_eq!(
                    restores,
                    written.is_some() && word == "rollback",
                    "{context}"
                );
                assert!(!plan.reason.is_empty());
                seen += 1;
            }
        }
    }
    assert_eq!(seen, 19 * 5 * 3);
}

#[test]
fn no_two_actors_share_a_namespace() {
    let names = ["a", "b", "a-b", "b-c", "a.b", "a_b", "c", "a-b-c", "a0"];
    let mut owners = BTreeMap::new();
    for actor in names {
        for workspace in names {
            let plan = plan(
                &Actor::Agent(ActorId::new(actor)),
                workspace,
                Disposition::Export,
                Standing::Local,
            );
            let namespace = plan.export.expect("its own").namespace;
            let other = owners.insert(namespace, (actor, workspace));
            assert_eq!(other, None, "{actor} on {workspace}");
        }
    }
    assert_eq!(ActorId::new("octo-cat").to_string(), "octo__cat");
}

#[test]
fn layers_have_their_own_repositories_and_tags() {
    let [base, deps] = LAYERS;
    assert_eq!(repository("ci/web", deps), "ci/web/deps");
    assert_eq!(repository("dev/ann-web", base), "dev/ann-web/base");
    assert_eq!(Export::tag("0a1b"), "sha256-0a1b");
    let export = Export {
        namespace: "ci/web".into(),
        restores_on_failure: false,
    };
    assert_ne!(export.staging_tag("7"), export.staging_tag("8"));
}
