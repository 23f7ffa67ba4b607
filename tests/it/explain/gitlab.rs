//! GitLab's jobs through the same gate: every source × ref × protection × merge request × token ×
//! `push-cache` × `trusted-refs`, against a second implementation of the table; and the page's table of them.

use std::fmt::Write as _;

use flywheel_core::trust::{Decision, Facts, PushCache, Request, TrustedRefs, Verdict, decide};
use flywheel_sys::runner::context::facts;
use flywheel_sys::runner::env::Env;

use super::events::{Files, event, push};
use super::gate::WIDEST;
use crate::world::{Flywheel, PLANTED_TOKEN};

/// Every source that GitLab documents, two that it has had, one of another CI, and one of tomorrow.
const SOURCES: [&str; 21] = [
    "push",
    "schedule",
    "web",
    "api",
    "trigger",
    "pipeline",
    "parent_pipeline",
    "merge_request_event",
    "external_pull_request_event",
    "external",
    "chat",
    "webide",
    "ondemand_dast_scan",
    "ondemand_dast_validation",
    "security_orchestration_policy",
    "container_registry_push",
    "pipeline_execution_policy_schedule",
    "duo_workflow",
    "workflow_dispatch",
    "Push",
    "made_up_tomorrow",
];

#[derive(Clone, Debug)]
struct Job {
    source: &'static str,
    /// `heads/main`, `tags/v1`; a pipeline of a merge request names none.
    git_ref: &'static str,
    protected: bool,
    merge_request: bool,
}

impl Job {
    fn variables(&self) -> Vec<(&'static str, &'static str)> {
        let (folder, name) = self.git_ref.split_once('/').unwrap_or_default();
        let mut variables = vec![
            ("CI", "true"),
            ("GITLAB_CI", "true"),
            ("CI_PIPELINE_SOURCE", self.source),
            ("CI_PROJECT_PATH", "group/app"),
            ("CI_DEFAULT_BRANCH", "main"),
            ("CI_COMMIT_REF_NAME", name),
            (
                "CI_COMMIT_REF_PROTECTED",
                if self.protected { "true" } else { "false" },
            ),
            ("CI_COMMIT_SHA", "6113728f27ae82c7b1a177c8d03f9e96e0adf246"),
        ];
        match (self.merge_request, folder) {
            (true, _) => variables.push(("CI_MERGE_REQUEST_IID", "7")),
            (false, "tags") => variables.push(("CI_COMMIT_TAG", name)),
            (false, _) => variables.push(("CI_COMMIT_BRANCH", name)),
        }
        variables
    }

    fn facts(&self) -> Facts {
        facts(&Env::from_pairs(self.variables()))
    }
}

fn job(source: &'static str, git_ref: &'static str) -> Job {
    Job {
        source,
        git_ref,
        protected: false,
        merge_request: false,
    }
}

fn answer(job: &Job, trusted: &str, push_cache: PushCache, token: bool) -> Decision {
    let request = Request {
        push_cache,
        by_hand: false,
        trusted_refs: TrustedRefs::parse(trusted).unwrap(),
    };
    decide(&job.facts(), &request, token)
}

/// The table, written a second time and in another way.
fn table_permits(job: &Job, wide: bool) -> bool {
    let on_default = job.git_ref == "heads/main";
    let tag = job
        .git_ref
        .strip_prefix("tags/")
        .is_some_and(|tag| wide || tag.starts_with('v'));
    let branch = wide && job.protected && job.git_ref.starts_with("heads/");
    match job.source {
        _ if job.merge_request => false,
        "push" | "web" => on_default || tag || branch,
        "schedule" => on_default,
        _ => false,
    }
}

#[test]
fn only_the_tables_rows_publish() {
    let mut published_for = Vec::new();
    for source in SOURCES {
        for git_ref in [
            "heads/main",
            "heads/Main",
            "heads/main2",
            "heads/refs/heads/main",
            "tags/main",
            "tags/v1.0",
        ] {
            for (protected, merge_request) in
                [(false, false), (true, false), (false, true), (true, true)]
            {
                let job = Job {
                    source,
                    git_ref,
                    protected,
                    merge_request,
                };
                for (wide, trusted) in [(false, ""), (true, WIDEST)] {
                    for push_cache in [PushCache::Always, PushCache::Auto, PushCache::Never] {
                        for token in [true, false] {
                            let decision = answer(&job, trusted, push_cache, token);
                            let may = table_permits(&job, wide);
                            let publishes = may && token && push_cache != PushCache::Never;
                            let judged = matches!(decision.verdict(), Verdict::MayPublish(_));
                            let permitted = (decision.publishes(), decision.permit().is_some());
                            assert!(
                                judged == may && permitted == (publishes, publishes),
                                "{job:?} {trusted} {push_cache:?} {token}: {}",
                                decision.reason()
                            );
                            if publishes && !published_for.contains(&source) {
                                published_for.push(source);
                            }
                        }
                    }
                }
            }
        }
    }
    assert_eq!(
        published_for,
        ["push", "schedule", "web"],
        "each row was seen to publish, and no other"
    );
}

/// The same event of the other CI gets the same verdict: there is one table.
#[test]
fn both_cis_are_judged_by_one_table() {
    let mut files = Files::new();
    let github = [
        ("push", "push"),
        ("schedule", "schedule"),
        ("web", "workflow_dispatch"),
    ];
    for (source, name) in github {
        for git_ref in ["heads/main", "heads/feature", "tags/v1.0", "tags/nightly"] {
            for protected in [false, true] {
                let there = job(source, git_ref);
                let base = if name == "push" {
                    push()
                } else {
                    event(name, &serde_json::json!({}))
                };
                let mut here = base.on(&format!("refs/{git_ref}"));
                here.protected = protected;
                let request = Request {
                    push_cache: PushCache::Always,
                    by_hand: false,
                    trusted_refs: TrustedRefs::parse("refs/tags/v* refs/heads/f*").unwrap(),
                };
                let theirs = decide(&Job { protected, ..there }.facts(), &request, true);
                let ours = decide(&here.facts(&mut files), &request, true);
                assert_eq!(
                    theirs, ours,
                    "{source} on {git_ref}, protected: {protected}"
                );
            }
        }
    }
}

#[test]
fn every_variable_is_needed() {
    let whole = job("push", "heads/main");
    assert!(answer(&whole, "", PushCache::Always, true).publishes());
    for (missing, _) in whole
        .variables()
        .into_iter()
        .filter(|(name, _)| !matches!(*name, "CI" | "GITLAB_CI"))
    {
        let rest = whole
            .variables()
            .into_iter()
            .filter(|(name, _)| *name != missing);
        let request = Request {
            push_cache: PushCache::Always,
            ..Request::default()
        };
        let decision = decide(&facts(&Env::from_pairs(rest)), &request, true);
        assert!(!decision.publishes(), "{missing}");
        assert!(
            decision.remedy().unwrap().contains("Supply that fact"),
            "{missing}"
        );
    }
}

#[test]
fn explain_shows_it() {
    let run = |job: &Job| {
        let run = Flywheel::new(&["explain"])
            .env("ATTIC_TOKEN", PLANTED_TOKEN)
            .env("FLYWHEEL_PUSH_CACHE", "true");
        job.variables()
            .into_iter()
            .fold(run, |run, (name, value)| run.env(name, value))
            .run()
            .stdout
    };
    insta::assert_snapshot!(run(&job("push", "heads/main")), @"
    verdict    may-publish
    publishes  yes
    reason     `push` on the default branch `main`
    attic      everything that the job builds
    flakehub   a rolling release, if a workflow with FlakeHub's action asks
    host       this repository's alone (no job of another repository or of lower trust was seen on this host)
    ");
    let merge_request = run(&Job {
        merge_request: true,
        ..job("merge_request_event", "heads/main")
    });
    assert!(
        merge_request.contains("publishes  no\nreason     a pull request reads"),
        "{merge_request}"
    );
}

/// The page's table.
pub fn table() -> String {
    let mut table = String::from(
        "\n## GitLab\n\nThe same gate reads a GitLab job's predefined variables. `push-cache` is `true`, a token is \
         there, the default branch is `main`.\n\n\
         | `CI_PIPELINE_SOURCE` | ref | special | verdict | reason |\n|---|---|---|---|---|\n",
    );
    let rows = [
        (job("push", "heads/main"), "", ""),
        (job("push", "tags/v1.0"), "", ""),
        (job("push", "heads/feature"), "", ""),
        (
            Job {
                protected: true,
                ..job("push", "heads/release/1")
            },
            "refs/heads/release/*",
            "named, and protected",
        ),
        (
            job("push", "heads/release/1"),
            "refs/heads/release/*",
            "named, not protected",
        ),
        (
            Job {
                merge_request: true,
                ..job("push", "heads/main")
            },
            "",
            "`CI_MERGE_REQUEST_IID` is set",
        ),
    ];
    let others = SOURCES[1..SOURCES.len() - 4].iter().map(|source| {
        let merge_request = *source == "merge_request_event";
        (
            Job {
                merge_request,
                protected: true,
                ..job(source, "heads/main")
            },
            "",
            "",
        )
    });
    for (job, trusted, special) in rows.into_iter().chain(others) {
        let decision = answer(&job, trusted, PushCache::Always, true);
        let (verdict, reason) = (decision.verdict().as_str(), decision.reason());
        writeln!(
            table,
            "| `{}` | `refs/{}` | {special} | {verdict} | {reason} |",
            job.source, job.git_ref
        )
        .unwrap();
    }
    table.push_str(
        "\nGitLab lets whoever starts a pipeline set variables, and those go before its own: these facts are as good as \
         the people who may push to the project. So make `ATTIC_TOKEN` a *protected* variable there. Then GitLab itself \
         hands it to pipelines of protected branches and tags alone, whatever a pipeline says of itself.\n",
    );
    table
}
