//! The gate, row by row. The same over GitHub's published payloads is in `tests/it/gate.rs`.

use super::*;
use crate::trust::facts::FactName;

/// A job and what is asked for it: a push to the default branch with everything in place, unless a case changes it.
#[derive(Clone)]
struct Case {
    facts: Facts,
    request: Request,
    token: bool,
}

fn on(event: &str, git_ref: &str) -> Case {
    let job = Job {
        event: Ok(Event::from_name(event)),
        repository: Ok("octo/repo".into()),
        default_branch: Ok("main".into()),
        git_ref: Ok(git_ref.into()),
        ref_protected: false,
        removes_ref: Ok(false),
    };
    let request = Request {
        push_cache: PushCache::Always,
        ..Request::default()
    };
    Case {
        facts: Facts::Job(Box::new(job)),
        request,
        token: true,
    }
}

fn push(git_ref: &str) -> Case {
    on("push", git_ref)
}

fn laptop() -> Case {
    Case {
        facts: Facts::Local,
        ..push("")
    }
}

impl Case {
    fn with(mut self, change: impl FnOnce(&mut Job)) -> Self {
        let Facts::Job(job) = &mut self.facts else {
            panic!("a laptop has no job")
        };
        change(job);
        self
    }

    fn protected(self) -> Self {
        self.with(|job| job.ref_protected = true)
    }

    fn trusting(mut self, patterns: &str) -> Self {
        self.request.trusted_refs = TrustedRefs::parse(patterns).expect("good patterns");
        self
    }

    fn push_cache(mut self, push_cache: PushCache) -> Self {
        self.request.push_cache = push_cache;
        self
    }

    fn by_hand(mut self) -> Self {
        self.request.by_hand = true;
        self
    }

    fn without_token(mut self) -> Self {
        self.token = false;
        self
    }
}

/// Decides, and holds what the gate promises of every decision.
fn decided(case: &Case) -> Decision {
    let decision = decide(&case.facts, &case.request, case.token);
    assert_eq!(decision.permit().is_some(), decision.publishes());
    assert_eq!(decision.plan().attic == ToAttic::All, decision.publishes());
    assert_eq!(decision.remedy().is_none(), decision.publishes());
    if decision.publishes() {
        assert!(
            case.token
                && matches!(decision.verdict(), Verdict::MayPublish(_))
                && !decision.is_refused()
        );
    }
    decision
}

/// Publishes or not; a token is there and `push-cache: true` unless the case has another value.
fn check(case: &Case, publishes: bool) -> Decision {
    let decision = decided(case);
    assert_eq!(
        decision.publishes(),
        publishes,
        "{case:?}: {}",
        decision.reason()
    );
    decision
}

impl std::fmt::Debug for Case {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{:?} with {:?}, token: {}",
            self.facts, self.request, self.token
        )
    }
}

fn refusal(case: &Case) -> Refusal {
    match check(case, false).verdict() {
        Verdict::ReadOnly(refusal) => refusal.clone(),
        Verdict::MayPublish(grounds) => panic!("{case:?} may publish: {grounds}"),
    }
}

/// The widest that `trusted-refs` can be.
const WIDEST: &str = "refs/heads/** refs/tags/** refs/**";

#[test]
fn the_default_branch_publishes_for_three_events() {
    for event in ["push", "schedule", "workflow_dispatch"] {
        check(&on(event, "refs/heads/main"), true);
    }
}

#[test]
fn what_looks_like_the_default_branch_is_not_it() {
    for git_ref in [
        "refs/heads/Main",
        "refs/heads/main2",
        "refs/heads/mai",
        "refs/heads/main/x",
        "refs/heads/x/main",
        "refs/heads/refs/heads/main",
        "refs/tags/main",
        "refs/pull/1/merge",
        "refs/heads/",
        "main",
        "",
    ] {
        for event in ["push", "schedule", "workflow_dispatch"] {
            refusal(&on(event, git_ref).protected());
        }
    }
}

#[test]
fn a_named_tag_publishes_without_protection() {
    check(&push("refs/tags/v1.0"), true);
    check(&on("workflow_dispatch", "refs/tags/v1.0"), true);
    check(&push("refs/tags/release-1"), false);
    check(
        &push("refs/tags/release-1").trusting("refs/tags/release-*"),
        true,
    );
    check(
        &push("refs/tags/v1.0").trusting("refs/tags/release-*"),
        false,
    );
    refusal(&on("schedule", "refs/tags/v1.0"));
}

#[test]
fn a_named_branch_must_be_protected() {
    let release = push("refs/heads/release/1").trusting("refs/heads/release/*");
    assert!(matches!(refusal(&release), Refusal::Unprotected { .. }));
    check(&release.protected(), true);
    assert!(matches!(
        refusal(&push("refs/heads/other").protected()),
        Refusal::OtherRef { .. }
    ));
    refusal(
        &on("schedule", "refs/heads/release/1")
            .trusting("refs/heads/release/*")
            .protected(),
    );
}

#[test]
fn a_push_that_removes_its_ref_never_publishes() {
    for git_ref in ["refs/heads/main", "refs/tags/v1"] {
        let gone = push(git_ref)
            .with(|job| job.removes_ref = Ok(true))
            .trusting(WIDEST)
            .protected();
        assert!(matches!(refusal(&gone), Refusal::RefRemoved { .. }));
    }
}

#[test]
fn a_merge_queue_publishes_only_by_name() {
    let queue = on("merge_group", "refs/heads/gh-readonly-queue/main/pr-1-0a");
    assert!(matches!(
        refusal(&queue.clone().protected()),
        Refusal::MergeGroup { .. }
    ));
    check(&queue.trusting("refs/heads/gh-readonly-queue/main/*"), true);
    assert!(matches!(
        refusal(
            &on("merge_group", "refs/heads/main")
                .trusting(WIDEST)
                .protected()
        ),
        Refusal::NotAQueue { .. }
    ));
}

#[test]
fn other_events_never_publish_whatever_is_set() {
    let never = [
        "pull_request",
        "release",
        "repository_dispatch",
        "pull_request_target",
        "workflow_run",
        "issue_comment",
        "pull_request_review",
        "pull_request_review_comment",
        "check_run",
        "check_suite",
        "status",
        "fork",
        "watch",
        "discussion",
        "discussion_comment",
        "create",
        "delete",
        "workflow_call",
        "deployment",
        "Push",
        "PUSH",
        "push ",
        " push",
        "push\n",
        "pushed",
        "",
        "schedule,push",
        "made_up_tomorrow",
    ];
    for event in never {
        for git_ref in ["refs/heads/main", "refs/tags/v1", "refs/pull/1/merge"] {
            refusal(&on(event, git_ref).trusting(WIDEST).protected().by_hand());
        }
    }
}

#[test]
fn a_pull_request_ref_never_publishes_for_any_event() {
    for event in ["push", "workflow_dispatch", "schedule", "merge_group"] {
        refusal(
            &on(event, "refs/pull/1/merge")
                .trusting(WIDEST)
                .protected()
                .by_hand(),
        );
    }
}

#[test]
fn any_fact_in_doubt_makes_it_read_only() {
    let missing = || Doubt::Missing(FactName::Ref);
    let changes: [fn(&mut Job, Doubt); 5] = [
        |job, doubt| job.event = Err(doubt),
        |job, doubt| job.repository = Err(doubt),
        |job, doubt| job.default_branch = Err(doubt),
        |job, doubt| job.git_ref = Err(doubt),
        |job, doubt| job.removes_ref = Err(doubt),
    ];
    for (event, git_ref) in [
        ("push", "refs/heads/main"),
        ("push", "refs/tags/v1"),
        ("schedule", "refs/heads/main"),
        ("workflow_dispatch", "refs/heads/main"),
    ] {
        for change in changes {
            let case = on(event, git_ref).protected().trusting(WIDEST).by_hand();
            check(&case, true);
            assert_eq!(
                refusal(&case.with(|job| change(job, missing()))),
                Refusal::InDoubt(missing())
            );
        }
    }
}

#[test]
fn an_empty_default_branch_matches_nothing() {
    refusal(&push("refs/heads/").with(|job| job.default_branch = Ok(String::new())));
}

#[test]
fn a_laptop_publishes_only_by_hand() {
    let decision = check(&laptop(), false);
    assert_eq!(
        decision.reason(),
        "local: publish only when asked (`--publish`)"
    );
    assert!(
        !decision.is_refused(),
        "push-cache asks nothing on a laptop"
    );
    let decision = check(&laptop().by_hand().push_cache(PushCache::Never), true);
    assert_eq!(
        decision.reason(),
        "local: publish only when asked, and `--publish` asks"
    );
    assert!(check(&laptop().by_hand().without_token(), false).is_refused());
}

#[test]
fn another_ci_is_read_only() {
    let case = Case {
        facts: Facts::OtherCi("GitLab CI".into()),
        ..push("").by_hand()
    };
    assert_eq!(refusal(&case), Refusal::OtherCi("GitLab CI".into()));
}

#[test]
fn may_publish_needs_a_request_and_a_token() {
    let main = push("refs/heads/main");
    for (push_cache, asks) in [
        (PushCache::Always, true),
        (PushCache::Auto, true),
        (PushCache::Never, false),
    ] {
        check(&main.clone().push_cache(push_cache), asks);
        check(&main.clone().push_cache(push_cache).without_token(), false);
    }
    check(&main.clone().push_cache(PushCache::Never).by_hand(), true);
    let unasked = decided(&main.clone().push_cache(PushCache::Never).without_token());
    assert_eq!(
        unasked.reason(),
        "`push` on the default branch `main`, but nobody asks for it: `push-cache` is `false`"
    );
    assert_eq!(
        decided(&main.without_token()).reason(),
        "`push` on the default branch `main`, but there is no token: `ATTIC_TOKEN` is empty"
    );
}

#[test]
fn what_was_asked_for_and_will_not_happen_is_told() {
    let pull_request = on("pull_request", "refs/pull/1/merge");
    let main = push("refs/heads/main");
    for (case, refused) in [
        (pull_request.clone(), true),
        (pull_request.clone().push_cache(PushCache::Auto), false),
        (pull_request.clone().push_cache(PushCache::Never), false),
        (pull_request.push_cache(PushCache::Never).by_hand(), true),
        (main.clone(), false),
        (main.clone().without_token(), true),
        (
            main.clone().push_cache(PushCache::Auto).without_token(),
            true,
        ),
        (main.push_cache(PushCache::Never).without_token(), false),
    ] {
        assert_eq!(decided(&case).is_refused(), refused, "{case:?}");
    }
}

#[test]
fn flakehub_follows_the_publication_policy() {
    let cases = [
        (push("refs/heads/main"), ToFlakeHub::Rolling),
        (
            push("refs/heads/main")
                .push_cache(PushCache::Never)
                .without_token(),
            ToFlakeHub::Rolling,
        ),
        (push("refs/tags/v1.0"), ToFlakeHub::Versioned),
        (
            push("refs/tags/v1.0").with(|job| job.removes_ref = Ok(true)),
            ToFlakeHub::Nothing,
        ),
        (
            push("refs/tags/nightly").trusting("refs/tags/*"),
            ToFlakeHub::Nothing,
        ),
        (
            push("refs/heads/v1").trusting("refs/heads/*").protected(),
            ToFlakeHub::Nothing,
        ),
        (on("schedule", "refs/heads/main"), ToFlakeHub::Nothing),
        (
            on("workflow_dispatch", "refs/tags/v1.0"),
            ToFlakeHub::Nothing,
        ),
        (on("pull_request", "refs/heads/main"), ToFlakeHub::Nothing),
        (laptop().by_hand(), ToFlakeHub::Nothing),
    ];
    for (case, expected) in cases {
        assert_eq!(decided(&case).plan().flakehub, expected, "{case:?}");
    }
}

#[test]
fn a_reason_is_one_line_without_commands_whatever_the_event_is_called() {
    let reason = decided(&on("x\n::error::`y`##[add-path]z", "refs/heads/main")).reason();
    assert!(
        !reason.contains('\n') && !reason.contains("##["),
        "{reason}"
    );
}
