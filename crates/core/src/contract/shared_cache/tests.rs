//! The shared-cache contract, rule by rule.

use super::*;

const CACHE: &str = "grpcs://cache.example:9092";

fn backed() -> Given {
    Given {
        cache: Some(CACHE.into()),
        class: Some("general".into()),
        ..Given::default()
    }
}

fn check(declared: &SharedCache, given: &Given, expected: &[&str]) {
    let found: Vec<String> = judge(declared, given)
        .findings
        .into_iter()
        .map(|one| one.text)
        .collect();
    let as_expected = found.len() == expected.len()
        && found
            .iter()
            .zip(expected)
            .all(|(text, part)| text.contains(part));
    assert!(as_expected, "{given:?}: {found:#?}, expected {expected:#?}");
}

#[test]
fn the_mode_follows_from_the_endpoints() {
    let none = SharedCache::default();
    for (cache, executor, mode) in [
        (None, None, Mode::CompatibilityLocalOnly),
        (Some(CACHE), None, Mode::SharedCacheBacked),
        (Some(CACHE), Some(CACHE), Mode::ExecutorBacked),
    ] {
        let given = Given {
            cache: cache.map(Into::into),
            executor: executor.map(Into::into),
            mode: Some(mode),
            ..Given::default()
        };
        let judgement = judge(&none, &given);
        assert_eq!(
            (judgement.actual, judgement.holds()),
            (Some(mode), true),
            "{:?}",
            judgement.findings
        );
    }
    check(
        &none,
        &Given::default(),
        &["declared is `shared-cache-backed` (default)"],
    );
}

#[test]
fn the_repository_declares_before_the_input_does() {
    let declared = SharedCache {
        mode: Some(Mode::ExecutorBacked),
        ..SharedCache::default()
    };
    let given = Given {
        mode: Some(Mode::SharedCacheBacked),
        ..backed()
    };
    check(
        &declared,
        &given,
        &["declared is `executor-backed` (flywheel.yml)"],
    );
    let hinted = Given {
        hinted_mode: Some("executor-backed".into()),
        ..backed()
    };
    check(
        &SharedCache::default(),
        &hinted,
        &["`GF_BAZEL_SUBSTRATE_MODE` is `executor-backed`"],
    );
    let slip = Given {
        hinted_mode: Some("shared-cache-baked".into()),
        ..backed()
    };
    check(
        &SharedCache::default(),
        &slip,
        &["did you mean `shared-cache-backed`"],
    );
}

#[test]
fn a_profile_state_must_be_known_and_fit() {
    let state = |state: &str| Given {
        state: Some(state.into()),
        ..backed()
    };
    check(&SharedCache::default(), &state("shared-cache-backed"), &[]);
    check(
        &SharedCache::default(),
        &state("unattached"),
        &["contradicts"],
    );
    check(
        &SharedCache::default(),
        &state("executor-backed"),
        &["contradicts"],
    );
    check(
        &SharedCache::default(),
        &state("local-proof"),
        &["contradicts"],
    );
    check(
        &SharedCache::default(),
        &state("unatached"),
        &["did you mean `unattached`"],
    );
    let allowed = SharedCache {
        allow_localhost: Some(true),
        ..SharedCache::default()
    };
    let proof = Given {
        cache: Some("grpc://localhost:9092".into()),
        ..state("local-proof")
    };
    check(&allowed, &proof, &[]);
}

#[test]
fn endpoints_are_checked_for_form() {
    let cache = |text: &str| Given {
        cache: Some(text.into()),
        ..backed()
    };
    for (text, problem) in [
        ("${BAZEL_REMOTE_CACHE}", "literal `${…}`"),
        ("grpc://${HOST}:9092", "literal `${…}`"),
        ("cache.example:9092", "its scheme is none"),
        ("ftp://cache.example", "its scheme is `ftp`"),
        ("unix:///run/cache.sock", "its scheme is `unix`"),
        ("grpc://", "names no host"),
        ("grpc://localhost:9092", "`allow-localhost`"),
        ("grpc://LOCALHOST.:9092", "`allow-localhost`"),
        ("http://127.0.0.1:8080", "`allow-localhost`"),
        ("grpc://127.0.0.2:8080", "`allow-localhost`"),
        ("http://2130706433/", "`allow-localhost`"),
        ("grpc://[::1]:9092", "`allow-localhost`"),
        ("grpc://[::ffff:127.0.0.1]:9092", "`allow-localhost`"),
        ("grpc://0.0.0.0:9092", "`allow-localhost`"),
        ("grpc://cache.example:99999", "is no address"),
    ] {
        check(&SharedCache::default(), &cache(text), &[problem]);
    }
}

#[test]
fn an_executor_needs_a_cache_and_its_place() {
    let executor = |cache: Option<&str>| Given {
        cache: cache.map(Into::into),
        executor: Some("grpcs://executor.example".into()),
        mode: Some(Mode::ExecutorBacked),
        ..Given::default()
    };
    let none = SharedCache::default();
    check(
        &none,
        &executor(None),
        &[
            "make it `compatibility-local-only`",
            "without `BAZEL_REMOTE_CACHE`",
        ],
    );
    check(
        &none,
        &executor(Some(CACHE)),
        &["`allow-separate-executor`"],
    );
    let allowed = SharedCache {
        allow_separate_executor: Some(true),
        ..none
    };
    check(&allowed, &executor(Some(CACHE)), &[]);
}

#[test]
fn strict_fails_closed() {
    let local = Given {
        mode: Some(Mode::CompatibilityLocalOnly),
        ..Given::default()
    };
    check(&SharedCache::default(), &local, &[]);
    let strict = Given {
        strict: true,
        ..local
    };
    check(
        &SharedCache::default(),
        &strict,
        &["no capability class", "`BAZEL_REMOTE_CACHE` is empty"],
    );
    let mut judgement = judge(&SharedCache::default(), &backed());
    judgement.add_problem("cache", Some("no answer".into()), false);
    assert!(judgement.holds());
    judgement.add_problem("cache", Some("no answer".into()), true);
    assert!(!judgement.holds());
}

#[test]
fn no_message_shows_a_credential() {
    let secret = "hunter22";
    for text in [
        "grpcs://user:hunter22@cache.example/x?token=hunter22#hunter22",
        "ftp://user:hunter22@x",
        "hunter22@x",
    ] {
        let given = Given {
            cache: Some(text.into()),
            executor: Some(text.into()),
            state: Some(text.into()),
            hinted_mode: Some(text.into()),
            ..Given::default()
        };
        let judgement = judge(&SharedCache::default(), &given);
        assert!(
            !format!("{:?}", judgement.findings).contains(secret),
            "{:?}",
            judgement.findings
        );
        assert!(!redact(text).contains(secret), "{}", redact(text));
    }
}

#[test]
fn uploads_are_off_unless_allowed() {
    let rc = bazelrc(Mode::SharedCacheBacked, Some(CACHE), None, false);
    assert!(
        rc.contains("--remote_upload_local_results=false") && rc.contains("--disk_cache=\n"),
        "{rc}"
    );
    assert!(
        bazelrc(Mode::ExecutorBacked, Some(CACHE), Some(CACHE), true)
            .contains("--remote_executor=")
    );
    assert!(!bazelrc(Mode::CompatibilityLocalOnly, None, None, true).contains("upload"));
}

#[test]
fn a_build_that_meets_an_evicted_output_begins_again() {
    let retries = "--experimental_remote_cache_eviction_retries=5\n";
    assert!(bazelrc(Mode::SharedCacheBacked, Some(CACHE), None, false).contains(retries));
    assert!(!bazelrc(Mode::CompatibilityLocalOnly, None, None, true).contains(retries));
}
