//! Facts from environments and payload files, good and bad.

use serde_json::{Value, json};
use tempfile::TempDir;

use super::*;
use flywheel_core::exit::Exit;

/// A job of GitHub's: a push to `main`, with all its facts.
struct World {
    folder: TempDir,
    variables: Vec<(&'static str, String)>,
}

fn payload_of_push() -> Value {
    json!({
        "ref": "refs/heads/main",
        "after": "6113728f27ae82c7b1a177c8d03f9e96e0adf246",
        "deleted": false,
        "repository": { "full_name": "octo/repo", "default_branch": "main" },
    })
}

fn job() -> World {
    let world = World {
        folder: tempfile::tempdir().expect("temporary folder"),
        variables: Vec::new(),
    };
    world
        .set("GITHUB_ACTIONS", "true")
        .set("GITHUB_EVENT_NAME", "push")
        .set("GITHUB_REF", "refs/heads/main")
        .set("GITHUB_REF_TYPE", "branch")
        .set("GITHUB_REPOSITORY", "octo/repo")
        .payload(&payload_of_push())
}

impl World {
    fn set(mut self, name: &'static str, value: &str) -> Self {
        self.variables.retain(|(known, _)| *known != name);
        self.variables.push((name, value.to_owned()));
        self
    }

    fn payload(self, payload: &Value) -> Self {
        self.payload_text(payload.to_string().as_bytes())
    }

    fn payload_text(self, text: &[u8]) -> Self {
        let file = self.folder.path().join("event.json");
        std::fs::write(&file, text).expect("written");
        let name = file.to_str().expect("UTF-8").to_owned();
        self.set("GITHUB_EVENT_PATH", &name)
    }

    fn env(&self) -> Env {
        Env::from_pairs(
            self.variables
                .iter()
                .map(|(name, value)| (*name, value.as_str())),
        )
    }

    fn job(&self) -> Job {
        match facts(&self.env()) {
            Facts::Job(job) => *job,
            other => panic!("no job: {other:?}"),
        }
    }
}

fn changed(change: impl FnOnce(&mut Value)) -> Job {
    let mut payload = payload_of_push();
    change(&mut payload);
    job().payload(&payload).job()
}

fn in_doubt<T: std::fmt::Debug>(fact: &Fact<T>) -> String {
    fact.as_ref().expect_err("in doubt").to_string()
}

#[test]
fn a_whole_job_has_no_doubts() {
    let expected = Job {
        event: Ok(Event::Push),
        repository: Ok("octo/repo".into()),
        default_branch: Ok("main".into()),
        git_ref: Ok("refs/heads/main".into()),
        ref_protected: false,
        removes_ref: Ok(false),
    };
    assert_eq!(job().job(), expected);
    assert!(
        job()
            .set("GITHUB_REF_PROTECTED", "true")
            .job()
            .ref_protected
    );
    assert!(
        !job()
            .set("GITHUB_REF_PROTECTED", "True")
            .job()
            .ref_protected
    );
}

#[test]
fn only_who_is_surely_no_ci_is_local() {
    let place = |pairs: &[(&str, &str)]| facts(&Env::from_pairs(pairs.iter().copied()));
    assert_eq!(place(&[]), Facts::Local);
    assert_eq!(place(&[("CI", ""), ("GITHUB_TOKEN", "x")]), Facts::Local);
    assert_eq!(place(&[("CI", "false")]), Facts::Local);
    assert_eq!(place(&[("CI", "true")]), Facts::Local);
    assert!(matches!(
        place(&[("CI", "true"), ("JENKINS_URL", "https://x/")]),
        Facts::OtherCi(_)
    ));
    assert!(matches!(
        place(&[("GITLAB_CI", "true"), ("GITHUB_EVENT_NAME", "push")]),
        Facts::OtherCi(_)
    ));
    for name in [
        "GITHUB_ACTIONS",
        "GITHUB_EVENT_NAME",
        "GITHUB_EVENT_PATH",
        "GITHUB_REF",
    ] {
        assert!(matches!(place(&[(name, "x")]), Facts::Job(_)), "{name}");
    }
}

#[test]
fn a_fact_without_a_source_is_missing() {
    assert_eq!(
        job().set("GITHUB_EVENT_NAME", "").job().event,
        Err(Doubt::Missing(FactName::Event))
    );
    assert_eq!(
        job().set("GITHUB_REF", "").job().git_ref,
        Err(Doubt::Missing(FactName::Ref))
    );
    assert_eq!(
        job().set("GITHUB_REPOSITORY", "").job().repository,
        Err(Doubt::Missing(FactName::Repository))
    );
    let no_payload = job().set("GITHUB_EVENT_PATH", "").job();
    assert_eq!(no_payload.event, Ok(Event::Push));
    assert_eq!(
        no_payload.repository,
        Err(Doubt::Missing(FactName::Payload))
    );
    assert_eq!(
        no_payload.default_branch,
        Err(Doubt::Missing(FactName::Payload))
    );
    assert_eq!(
        no_payload.removes_ref,
        Err(Doubt::Missing(FactName::Payload))
    );
    assert_eq!(
        changed(|payload| payload["repository"] = json!({})).repository,
        Err(Doubt::Missing(FactName::Repository))
    );
    let nameless = changed(|payload| payload["repository"]["default_branch"] = json!(""));
    assert_eq!(
        nameless.default_branch,
        Err(Doubt::Missing(FactName::DefaultBranch))
    );
    assert_eq!(
        changed(|payload| payload["ref"] = Value::Null).git_ref,
        Err(Doubt::Missing(FactName::Ref))
    );
}

#[test]
fn an_unreadable_payload_puts_every_fact_of_it_in_doubt() {
    for text in [
        &b""[..],
        b"{",
        b"[]",
        b"\xff",
        b"{\"repository\":[]}",
        b"{\"ref\":1,\"ref\":2}",
    ] {
        let job = job().payload_text(text).job();
        for doubt in [
            in_doubt(&job.repository),
            in_doubt(&job.default_branch),
            in_doubt(&job.git_ref),
        ] {
            assert!(
                doubt.starts_with("the event payload is unreadable: "),
                "{doubt}"
            );
        }
        in_doubt(&job.removes_ref);
    }
    let missing = job().set("GITHUB_EVENT_PATH", "/nowhere/event.json").job();
    assert!(in_doubt(&missing.repository).contains("cannot be opened"));
}

#[test]
fn payload_and_environment_must_agree() {
    let other = changed(|payload| payload["repository"]["full_name"] = json!("Octo/repo"));
    assert_eq!(
        in_doubt(&other.repository),
        "the repository is in doubt: the environment says `octo/repo`, but the payload says `Octo/repo`"
    );
    in_doubt(&changed(|payload| payload["ref"] = json!("refs/heads/other")).git_ref);
    in_doubt(&job().set("GITHUB_REF_TYPE", "tag").job().git_ref);
    in_doubt(&job().set("GITHUB_REF_TYPE", "thing").job().git_ref);
    in_doubt(&job().set("GITHUB_REF", "main").job().git_ref);
    in_doubt(&job().set("GITHUB_REF", "refs/heads/ma in").job().git_ref);
}

#[test]
fn a_payload_of_another_event_puts_the_event_in_doubt() {
    for mark in [
        "pull_request",
        "action",
        "workflow_run",
        "issue",
        "release",
        "client_payload",
        "merge_group",
    ] {
        let payload = if mark == "merge_group" {
            Value::Null
        } else {
            json!({})
        };
        let job = changed(|whole| whole[mark] = payload);
        assert!(in_doubt(&job.event).contains(mark), "{mark}");
    }
    let queue = json!({
        "action": "checks_requested",
        "merge_group": { "head_ref": "refs/heads/gh-readonly-queue/main/pr-1-0a" },
        "repository": { "full_name": "octo/repo", "default_branch": "main" },
    });
    let queue = job()
        .set("GITHUB_EVENT_NAME", "merge_group")
        .payload(&queue);
    assert_eq!(queue.job().event, Ok(Event::MergeGroup));
    in_doubt(&queue.job().git_ref);
    let queue = queue.set("GITHUB_REF", "refs/heads/gh-readonly-queue/main/pr-1-0a");
    assert_eq!(
        queue.job().git_ref.as_deref(),
        Ok("refs/heads/gh-readonly-queue/main/pr-1-0a")
    );
}

#[test]
fn a_push_must_show_what_it_left_behind() {
    let zeros = json!("0".repeat(40));
    let removes = |deleted: Value, after: Value| {
        changed(|payload| {
            payload["deleted"] = deleted;
            payload["after"] = after;
        })
        .removes_ref
    };
    let good = json!("6113728f27ae82c7b1a177c8d03f9e96e0adf246");
    assert_eq!(removes(json!(true), good.clone()), Ok(true));
    assert_eq!(removes(json!(false), zeros.clone()), Ok(true));
    assert_eq!(removes(Value::Null, zeros), Ok(true));
    assert_eq!(removes(Value::Null, json!("0".repeat(64))), Ok(true));
    assert_eq!(removes(Value::Null, good), Ok(false));
    assert_eq!(removes(json!(false), Value::Null), Ok(false));
    assert_eq!(
        removes(Value::Null, Value::Null),
        Err(Doubt::Missing(FactName::After))
    );
    in_doubt(&removes(json!(false), json!("0000")));
    in_doubt(&removes(json!(false), json!("")));
}

#[test]
fn a_schedule_needs_no_ref_in_its_payload() {
    let payload = json!({ "schedule": "0 4 * * *", "repository": payload_of_push()["repository"] });
    let job = job()
        .set("GITHUB_EVENT_NAME", "schedule")
        .payload(&payload)
        .job();
    assert_eq!(
        (job.git_ref.as_deref(), job.removes_ref),
        (Ok("refs/heads/main"), Ok(false))
    );
}

#[test]
fn a_recorded_event_stands_in_for_the_job() {
    let world = job();
    let file = world.folder.path().join("event.json");
    let record = Recorded {
        event_name: Some("push".into()),
        event_path: Some(file),
        git_ref: Some("refs/heads/main".into()),
        ..Recorded::default()
    };
    let read = |env: &Env, record: &Recorded| match recorded(env, record).expect("readable") {
        Facts::Job(job) => *job,
        other => panic!("no job: {other:?}"),
    };
    // Outside of a job the payload's repository is used as it is …
    let outside = Env::default();
    assert_eq!(
        read(&outside, &record).repository.as_deref(),
        Ok("octo/repo")
    );
    // … but in one it has to agree, and so has a flag.
    let other = Env::from_pairs([("GITHUB_REPOSITORY", "other/repo")]);
    in_doubt(&read(&other, &record).repository);
    let flag = Recorded {
        repository: Some("octo/repo".into()),
        ..record.clone()
    };
    assert_eq!(read(&other, &flag).repository.as_deref(), Ok("octo/repo"));
    // The environment's facts about its own ref do not apply to another ref.
    let protected = Env::from_pairs([("GITHUB_REF_PROTECTED", "true"), ("GITHUB_REF_TYPE", "tag")]);
    let job = read(&protected, &record);
    assert_eq!(
        (job.ref_protected, job.git_ref.as_deref()),
        (false, Ok("refs/heads/main"))
    );
    let no_ref = Recorded {
        git_ref: None,
        ..record
    };
    assert!(in_doubt(&read(&outside, &no_ref).git_ref).contains("`--ref`"));
}

#[test]
fn a_recorded_file_that_cannot_be_read_is_bad_input() {
    let folder = tempfile::tempdir().expect("temporary folder");
    for file in [folder.path().join("none"), folder.path().to_owned()] {
        let record = Recorded {
            event_path: Some(file.clone()),
            ..Recorded::default()
        };
        let error = recorded(&Env::default(), &record).expect_err("no file");
        assert_eq!(error.exit(), Exit::Usage);
        assert!(
            error.to_string().contains(file.to_str().expect("UTF-8")),
            "{error}"
        );
    }
}

#[test]
fn a_token_is_only_ever_there_or_not() {
    assert!(token_present(&Env::from_pairs([("ATTIC_TOKEN", "x")])));
    assert!(!token_present(&Env::from_pairs([("ATTIC_TOKEN", " \n")])));
    assert!(!token_present(&Env::default()));
}

#[test]
fn a_token_is_found_in_the_text_of_a_tokens_file() {
    let found = |text: &str| cache_token(&Env::from_pairs([("ATTIC_TOKEN", text)]));
    let exposed = |text: &str| found(text).map(|token| token.expose().to_owned());
    for text in [
        "abc123",
        " abc123\n",
        "write abc123",
        "write abc123 main # the publisher's",
        "# Tokens of this cache: one `<scope> <token> [<cache>]` a line, scope `read` or `write`\n\
         # (which includes reading).\nread other\nwrite abc123\n",
        "write sha256:00ff\nread abc123",
    ] {
        assert_eq!(exposed(text).as_deref(), Some("abc123"), "{text}");
    }
    // What is no such file stays as it is, and is refused where it is used.
    for text in ["two words", "write", "write sha256:00ff"] {
        assert_eq!(exposed(text).as_deref(), Some(text));
    }
    assert_eq!(exposed(" \n"), None);
}
