//! Variants of good tokens, and what the trust gate makes of them.

use super::*;
use flywheel_core::trust::{Facts, PushCache, Request, TrustedRefs, decide};

fn forms() -> Vec<(&'static str, Draft)> {
    let github = Draft::github;
    vec![
        ("as it is", github()),
        (
            "the second key",
            github().header("kid", "key-2").sign(Sign::Rs256("second")),
        ),
        ("no type", github().header("typ", Value::Null)),
        ("a type in small letters", github().header("typ", "jwt")),
        (
            "a key's address of GitHub's",
            github().header("jku", GITHUB),
        ),
        (
            "expired, within the clocks' difference",
            github().claim("exp", NOW - 59),
        ),
        (
            "issued ahead, within it",
            github().claim("iat", NOW + 60).claim("exp", NOW + 360),
        ),
        ("valid ahead, within it", github().claim("nbf", NOW + 60)),
        (
            "`nbf` as it was in 2024",
            github().claim("nbf", ISSUED - 600),
        ),
        ("`nbf` as `iat`", github().claim("nbf", ISSUED)),
        (
            "a life of fifteen minutes",
            github().claim("exp", ISSUED + 900),
        ),
        (
            "more claims",
            github()
                .claim("repo_property_team", "a,b")
                .claim("enterprise_id", "3"),
        ),
        (
            "a claim of another kind",
            github().claim("labels", json!({"a": ["b"]})),
        ),
        (
            "fewer claims",
            github()
                .without("actor")
                .without("head_ref")
                .without("workflow_ref"),
        ),
    ]
}

fn runs() -> Vec<(&'static str, Draft)> {
    let github = Draft::github;
    vec![
        ("no protection", github().without("ref_protected")),
        ("protection unknown", github().claim("ref_protected", "")),
        ("no rule", github().claim("ref_protected", "false")),
        (
            "an environment",
            github().claim("environment", "production"),
        ),
        ("no reusable workflow", github().without("job_workflow_ref")),
        (
            "a workflow at a commit",
            github().claim("job_workflow_ref", "o/r/.github/workflows/x.yml@0123abcd"),
        ),
        (
            "a workflow's name with @",
            github().claim(
                "job_workflow_ref",
                "o/r/.github/workflows/a@b.yml@refs/heads/x",
            ),
        ),
        (
            "no runner's environment",
            github().claim("runner_environment", Value::Null),
        ),
        (
            "its own runner",
            github().claim("runner_environment", "self-hosted"),
        ),
        (
            "the old subject",
            github().claim("sub", "repo:octo-org/octo-repo:ref:refs/heads/main"),
        ),
        (
            "a subject of the owner's making",
            github().claim("sub", "repository_owner:octo-org:x:private"),
        ),
        (
            "a subject of another repository",
            github().claim("sub", "repo:other/repo:ref:refs/heads/main"),
        ),
        (
            "another name",
            github().claim("repository", "octo-org/renamed"),
        ),
        ("no ref", github().claim("ref", "")),
        (
            "a tag",
            github()
                .claim("ref", "refs/tags/v1")
                .claim("ref_type", "tag"),
        ),
        ("a second attempt", github().claim("run_attempt", "2")),
        (
            "a long number",
            github().claim("run_id", "18446744073709551615"),
        ),
        (
            "a ref in other letters",
            github().claim("ref", "refs/heads/grün"),
        ),
        (
            "another event",
            github().claim("event_name", "deployment_status"),
        ),
    ]
}

fn of_gitlab() -> Vec<(&'static str, Draft)> {
    let gitlab = || Draft::gitlab().sign(Sign::Rs256("second"));
    vec![
        ("GitLab", gitlab()),
        (
            "GitLab, a life of a day",
            gitlab().claim("exp", ISSUED + 86_400),
        ),
        ("GitLab, by hand", gitlab().claim("pipeline_source", "web")),
        ("GitLab, a tag", gitlab().claim("ref_path", "refs/tags/v1")),
        ("GitLab, before `ref_path`", gitlab().without("ref_path")),
        (
            "GitLab, lists",
            gitlab().claim("groups_direct", json!(["a", "b"])),
        ),
        (
            "GitLab, nested groups",
            gitlab().claim("project_path", "a/b/c"),
        ),
        (
            "GitLab, no configuration's address",
            gitlab().without("ci_config_ref_uri"),
        ),
    ]
}

#[tokio::test]
async fn each_variant_is_taken() {
    let all = [forms(), runs(), of_gitlab()].concat();
    assert!(all.len() >= 40, "{}", all.len());
    for (what, draft) in all {
        let identity = World::new().verify(&draft.token()).await;
        let identity = identity.unwrap_or_else(|refusal| panic!("{what}: {refusal}"));
        assert!(
            ["456789", "22"].contains(&identity.repository_id.as_str()),
            "{what}"
        );
    }
}

#[tokio::test]
async fn a_workflow_is_told_from_its_ref_at_the_last_sign() {
    let name = "o/r/.github/workflows/a@b.yml@refs/heads/x";
    let draft = Draft::github().claim("job_workflow_ref", name);
    let identity = World::new().verify(&draft.token()).await.expect("good");
    let workflow = identity.job_workflow.expect("named");
    assert_eq!(workflow.file, "o/r/.github/workflows/a@b.yml");
    assert_eq!(workflow.git_ref, "refs/heads/x");
}

/// Events and refs come as a pair: the ref alone would let in whatever runs on the default branch for a stranger.
#[tokio::test]
async fn the_gate_judges_a_token_as_it_judges_a_job() {
    let main = "refs/heads/main";
    let rows = [
        ("push", main, "may-publish"),
        ("schedule", main, "may-publish"),
        ("workflow_dispatch", main, "may-publish"),
        ("push", "refs/heads/release/1", "may-publish"),
        ("push", "refs/heads/feature", "read-only"),
        ("push", "refs/heads/main2", "read-only"),
        ("push", "refs/tags/main", "read-only"),
        ("push", "", "read-only"),
        ("pull_request", "refs/pull/7/merge", "read-only"),
        // Closed by merging.
        ("pull_request", main, "read-only"),
        ("pull_request_target", main, "read-only"),
        ("workflow_run", main, "read-only"),
        ("issue_comment", main, "read-only"),
        ("repository_dispatch", main, "read-only"),
        ("release", "refs/tags/v1", "read-only"),
        (
            "merge_group",
            "refs/heads/gh-readonly-queue/main/pr-1-b896",
            "read-only",
        ),
        ("Push", main, "read-only"),
        ("", main, "refused"),
    ];
    let request = Request {
        push_cache: PushCache::Auto,
        by_hand: false,
        trusted_refs: TrustedRefs::parse("refs/heads/release/*").expect("a pattern"),
    };
    for (event, git_ref, expected) in rows {
        let draft = Draft::github()
            .claim("event_name", event)
            .claim("ref", git_ref);
        let verified = World::new().verify(&draft.token()).await;
        let verdict = match verified {
            Err(_) => "refused",
            Ok(identity) => {
                let facts = Facts::Job(Box::new(identity.job(Some("main"))));
                decide(&facts, &request, true).verdict().as_str()
            }
        };
        assert_eq!(verdict, expected, "{event} {git_ref}");
    }
    // Without the server's word for it, no branch is the default one.
    let identity = World::new()
        .verify(&Draft::github().token())
        .await
        .expect("good");
    let facts = Facts::Job(Box::new(identity.job(None)));
    assert_eq!(
        decide(&facts, &request, true).verdict().as_str(),
        "read-only"
    );
}

#[tokio::test]
async fn a_pull_request_is_known_by_its_ref() {
    for (git_ref, number) in [
        ("refs/pull/7/merge", Some(7)),
        ("refs/pull/7/head", None),
        ("refs/pull/+7/merge", None),
        ("refs/pull//merge", None),
        ("refs/heads/refs/pull/7/merge", None),
        ("refs/heads/main", None),
    ] {
        let draft = Draft::github().claim("ref", git_ref);
        let identity = World::new().verify(&draft.token()).await.expect("good");
        assert_eq!(identity.pull_request(), number, "{git_ref}");
    }
}
