//! The facts of a GitLab job, from its predefined variables. This module reads and compares them; `trust` decides what
//! follows, as for every other CI.
//!
//! <https://docs.gitlab.com/ci/variables/predefined_variables/>

use crate::runner::env::Env;
use flywheel_core::trust::facts::{Doubt, Event, Fact, FactName, Job, shown};

/// How the variables begin that only a pipeline of a merge request has, from a fork or not.
const OF_A_MERGE_REQUEST: [&str; 2] = ["CI_MERGE_REQUEST_", "CI_EXTERNAL_PULL_REQUEST_"];

/// The facts of the job with these variables.
pub(crate) fn job(env: &Env) -> Job {
    Job {
        event: event(env),
        repository: repository(env),
        default_branch: plain(env, "CI_DEFAULT_BRANCH", FactName::DefaultBranch),
        git_ref: git_ref(env),
        ref_protected: env.get("CI_COMMIT_REF_PROTECTED") == Some("true"),
        removes_ref: removes_ref(env),
    }
}

/// The event that started the pipeline.
fn event(env: &Env) -> Fact<Event> {
    let source = env
        .get("CI_PIPELINE_SOURCE")
        .ok_or(Doubt::Missing(FactName::Event))?;
    let event = Event::from_gitlab_source(source);
    // Only these can publish. A merge request that claims to be one of them gives itself away by its own variables.
    let trusted = matches!(
        event,
        Event::Push | Event::Schedule | Event::WorkflowDispatch
    );
    let mut of_a_merge_request = env.all().filter(|(name, value)| {
        !value.is_empty()
            && OF_A_MERGE_REQUEST
                .iter()
                .any(|prefix| name.starts_with(prefix))
    });
    match of_a_merge_request.next().filter(|_| trusted) {
        None => Ok(event),
        Some((name, _)) => Err(Doubt::Disagree {
            name: FactName::Event,
            one: format!("`CI_PIPELINE_SOURCE` says `{}`", shown(source)),
            other: format!("`{}` is set, which belongs to merge requests", shown(name)),
        }),
    }
}

/// The project's path, which may have nested groups. Where its two halves are given as well, they must agree with it.
fn repository(env: &Env) -> Fact<String> {
    let path = plain(env, "CI_PROJECT_PATH", FactName::Repository)?;
    if path.split('/').count() < 2 || path.split('/').any(str::is_empty) {
        return Err(unreadable(FactName::Repository, &path, "`group/project`"));
    }
    let halves = env
        .get("CI_PROJECT_NAMESPACE")
        .zip(env.get("CI_PROJECT_NAME"));
    match halves.map(|(group, name)| format!("{group}/{name}")) {
        Some(other) if other != path => Err(disagree(
            FactName::Repository,
            "CI_PROJECT_PATH",
            &path,
            "CI_PROJECT_NAMESPACE",
            &other,
        )),
        _ => Ok(path),
    }
}

/// A branch or a tag. Its name comes from two variables, which must agree: its own, and `CI_COMMIT_REF_NAME`. GitLab
/// always sets `CI_COMMIT_REF_PROTECTED`, so an environment without it is not GitLab's.
fn git_ref(env: &Env) -> Fact<String> {
    let name = plain(env, "CI_COMMIT_REF_NAME", FactName::Ref)?;
    // `job` reads the value; here it only has to be one that GitLab sets.
    let protected = env
        .get("CI_COMMIT_REF_PROTECTED")
        .ok_or(Doubt::Missing(FactName::Ref))?;
    if !matches!(protected, "true" | "false") {
        return Err(unreadable(FactName::Ref, protected, "`true` or `false`"));
    }
    let (variable, claimed, folder) = match (env.get("CI_COMMIT_BRANCH"), env.get("CI_COMMIT_TAG"))
    {
        (Some(branch), None) => ("CI_COMMIT_BRANCH", branch, "heads"),
        (None, Some(tag)) => ("CI_COMMIT_TAG", tag, "tags"),
        (Some(branch), Some(tag)) => {
            return Err(disagree(
                FactName::Ref,
                "CI_COMMIT_BRANCH",
                branch,
                "CI_COMMIT_TAG",
                tag,
            ));
        }
        (None, None) => return Err(Doubt::Missing(FactName::Ref)),
    };
    if claimed != name {
        return Err(disagree(
            FactName::Ref,
            variable,
            claimed,
            "CI_COMMIT_REF_NAME",
            &name,
        ));
    }
    Ok(format!("refs/{folder}/{name}"))
}

/// Whether the commit is all zeros, which stands for a removed ref. GitLab runs no pipeline for one.
fn removes_ref(env: &Env) -> Fact<bool> {
    let commit = env
        .get("CI_COMMIT_SHA")
        .ok_or(Doubt::Missing(FactName::After))?;
    let is_id =
        matches!(commit.len(), 40 | 64) && commit.bytes().all(|digit| digit.is_ascii_hexdigit());
    if is_id {
        Ok(commit.bytes().all(|digit| digit == b'0'))
    } else {
        Err(unreadable(FactName::After, commit, "an object id"))
    }
}

/// A variable's value that has only the characters that git allows in a ref, so that it can be shown and compared as it
/// is.
fn plain(env: &Env, variable: &str, name: FactName) -> Fact<String> {
    let claimed = env.get(variable).ok_or(Doubt::Missing(name))?;
    if claimed
        .chars()
        .any(|c| c.is_control() || c.is_whitespace() || "~^:?*[\\`".contains(c))
    {
        return Err(unreadable(name, claimed, "a name"));
    }
    Ok(claimed.to_owned())
}

fn unreadable(name: FactName, claimed: &str, expected: &str) -> Doubt {
    Doubt::Unreadable {
        name,
        why: format!("`{}` is not {expected}", shown(claimed)),
    }
}

fn disagree(name: FactName, one: &str, claimed: &str, other: &str, instead: &str) -> Doubt {
    Doubt::Disagree {
        name,
        one: format!("`{one}` says `{}`", shown(claimed)),
        other: format!("`{other}` says `{}`", shown(instead)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PUSH: [(&str, &str); 7] = [
        ("CI_PIPELINE_SOURCE", "push"),
        ("CI_PROJECT_PATH", "group/sub/app"),
        ("CI_DEFAULT_BRANCH", "main"),
        ("CI_COMMIT_REF_NAME", "main"),
        ("CI_COMMIT_BRANCH", "main"),
        ("CI_COMMIT_REF_PROTECTED", "true"),
        ("CI_COMMIT_SHA", "6113728f27ae82c7b1a177c8d03f9e96e0adf246"),
    ];

    fn with(changes: &[(&str, &str)]) -> Job {
        let kept = PUSH
            .iter()
            .filter(|(name, _)| !changes.iter().any(|(changed, _)| changed == name));
        job(&Env::from_pairs(kept.chain(changes).copied()))
    }

    #[test]
    fn a_push_is_read_whole() {
        let expected = Job {
            event: Ok(Event::Push),
            repository: Ok("group/sub/app".into()),
            default_branch: Ok("main".into()),
            git_ref: Ok("refs/heads/main".into()),
            ref_protected: true,
            removes_ref: Ok(false),
        };
        assert_eq!(with(&[]), expected);
        let tag = with(&[
            ("CI_COMMIT_BRANCH", ""),
            ("CI_COMMIT_TAG", "v1"),
            ("CI_COMMIT_REF_NAME", "v1"),
        ]);
        assert_eq!(tag.git_ref, Ok("refs/tags/v1".into()));
    }

    #[test]
    fn each_variable_that_is_missing_leaves_its_fact_in_doubt() {
        for (name, _) in PUSH {
            let job = with(&[(name, "")]);
            let facts = [
                job.event.is_err(),
                job.repository.is_err(),
                job.default_branch.is_err(),
                job.git_ref.is_err(),
                job.removes_ref.is_err(),
            ];
            assert_eq!(
                facts.iter().filter(|doubtful| **doubtful).count(),
                1,
                "{name}: {job:?}"
            );
        }
    }

    #[test]
    fn a_fact_with_two_values_is_in_doubt() {
        assert!(with(&[("CI_COMMIT_TAG", "main")]).git_ref.is_err());
        assert!(with(&[("CI_COMMIT_REF_NAME", "other")]).git_ref.is_err());
        assert!(with(&[("CI_COMMIT_REF_PROTECTED", "yes")]).git_ref.is_err());
        assert!(
            with(&[("CI_PROJECT_NAMESPACE", "x"), ("CI_PROJECT_NAME", "app")])
                .repository
                .is_err()
        );
        assert!(
            with(&[
                ("CI_PROJECT_NAMESPACE", "group/sub"),
                ("CI_PROJECT_NAME", "app")
            ])
            .repository
            .is_ok()
        );
        assert!(with(&[("CI_PROJECT_PATH", "app")]).repository.is_err());
        assert!(with(&[("CI_COMMIT_SHA", "main")]).removes_ref.is_err());
        assert_eq!(
            with(&[("CI_COMMIT_SHA", &"0".repeat(40))]).removes_ref,
            Ok(true)
        );
    }

    #[test]
    fn any_variable_of_a_merge_request_gives_it_away() {
        let names = [
            "CI_MERGE_REQUEST_IID",
            "CI_MERGE_REQUEST_SOURCE_PROJECT_ID",
            "CI_MERGE_REQUEST_DIFF_ID",
            "CI_MERGE_REQUEST_EVENT_TYPE",
            "CI_MERGE_REQUEST_SOURCE_BRANCH_SHA",
            "CI_EXTERNAL_PULL_REQUEST_IID",
            "CI_EXTERNAL_PULL_REQUEST_SOURCE_REPOSITORY",
            "CI_EXTERNAL_PULL_REQUEST_TARGET_BRANCH_SHA",
        ];
        for name in names {
            let event = with(&[(name, "7")]).event.expect_err(name);
            assert!(event.to_string().contains(name), "{event}");
            assert!(with(&[(name, "")]).event.is_ok(), "{name}");
        }
        // GitLab sets this one for every pipeline.
        assert!(
            with(&[("CI_OPEN_MERGE_REQUESTS", "group/app!7")])
                .event
                .is_ok()
        );
    }

    #[test]
    fn no_source_of_gitlabs_becomes_another_cis_event_by_chance() {
        for source in [
            "workflow_dispatch",
            "merge_group",
            "release",
            "pull_request",
            "Push",
            "push ",
        ] {
            let event = with(&[("CI_PIPELINE_SOURCE", source)]).event;
            assert!(matches!(event, Ok(Event::Other(_))), "{event:?}");
        }
    }
}
