//! Each token differs from a good one in one thing, and is signed by the right key unless the row is about keys. Each is
//! refused for its own reason.

use super::*;

/// What it is, the token, and the words of the reason.
type Row = (&'static str, String, &'static str);

fn forms() -> Vec<Row> {
    let good = Draft::github().token();
    let parts: Vec<&str> = good.split('.').collect();
    let (header, claims, signature) = (parts[0], parts[1], parts[2]);
    let header_text = |text: &str| {
        let draft = Draft {
            header_text: Some(text.to_owned()),
            ..Draft::github()
        };
        draft.token()
    };
    vec![
        ("empty", String::new(), "three parts"),
        ("two parts", format!("{header}.{claims}"), "three parts"),
        ("four parts", format!("{good}.{signature}"), "three parts"),
        (
            "huge claims",
            Draft::github().claim("actor", "x".repeat(20_000)).token(),
            "more than 16384 bytes",
        ),
        (
            "a padded header",
            format!("{header}=.{claims}.{signature}"),
            "header is not in base64url",
        ),
        (
            "other letters",
            format!("{header}.{claims}.+/{signature}"),
            "signature is not in base64url",
        ),
        (
            "a space before it",
            format!(" {good}"),
            "header is not in base64url",
        ),
        (
            "a line's end behind it",
            format!("{good}\n"),
            "signature is not in base64url",
        ),
        (
            "a header that is a list",
            header_text("[]"),
            "header is no JSON object",
        ),
        (
            "a header that is empty",
            header_text(""),
            "header is no JSON object",
        ),
        (
            "a header with a rest",
            header_text(r#"{"alg":"RS256","kid":"key-1"}x"#),
            "header is no JSON object",
        ),
        (
            "`alg` twice",
            header_text(r#"{"alg":"none","alg":"RS256","kid":"key-1"}"#),
            "header has `alg` twice",
        ),
    ]
}

fn algorithms() -> Vec<Row> {
    let github = Draft::github;
    vec![
        (
            "`none`",
            github().header("alg", "none").token(),
            "algorithm (`alg`) is `none`",
        ),
        (
            "`none`, unsigned",
            github().header("alg", "none").sign(Sign::Nothing).token(),
            "algorithm (`alg`) is `none`",
        ),
        (
            "`None`",
            github().header("alg", "None").sign(Sign::Nothing).token(),
            "algorithm (`alg`) is `None`",
        ),
        (
            "the public key as a secret",
            github().header("alg", "HS256").sign(Sign::Hs256).token(),
            "is `HS256`",
        ),
        (
            "the same, named RS256",
            github().sign(Sign::Hs256).token(),
            "signature is not",
        ),
        (
            "RS512",
            github().header("alg", "RS512").sign(Sign::Rs512).token(),
            "is `RS512`",
        ),
        (
            "RS512, named RS256",
            github().sign(Sign::Rs512).token(),
            "signature is not",
        ),
        (
            "PS256",
            github().header("alg", "PS256").sign(Sign::Ps256).token(),
            "is `PS256`",
        ),
        (
            "PS256, named RS256",
            github().sign(Sign::Ps256).token(),
            "signature is not",
        ),
        (
            "small letters",
            github().header("alg", "rs256").token(),
            "is `rs256`",
        ),
        (
            "no algorithm",
            github().header("alg", Value::Null).token(),
            "is `missing`",
        ),
        (
            "a list of algorithms",
            github().header("alg", json!(["RS256"])).token(),
            "is `[\"RS256\"]`",
        ),
    ]
}

fn headers() -> Vec<Row> {
    let github = Draft::github;
    vec![
        (
            "an access token",
            github().header("typ", "at+jwt").token(),
            "type (`typ`) is `at+jwt`",
        ),
        (
            "an extension",
            github().header("crit", json!(["exp"])).token(),
            "extension (`crit`)",
        ),
        (
            "no key",
            github().header("kid", Value::Null).token(),
            "names no key",
        ),
        (
            "an empty key",
            github().header("kid", "").token(),
            "names no key",
        ),
        (
            "a number as key",
            github().header("kid", 1).token(),
            "names no key",
        ),
        (
            "an unknown key",
            github().header("kid", "key-9").token(),
            "`key-9` is none of its issuer's keys",
        ),
        (
            "a key of another kind",
            github().header("kid", "other-kind").token(),
            "`other-kind` is none of",
        ),
        (
            "a key that is too short",
            github().header("kid", "short").token(),
            "signature is not",
        ),
    ]
}

fn signatures() -> Vec<Row> {
    let github = Draft::github;
    let good = github().token();
    let moved = github().claim("repository_id", "1").token();
    let swapped = format!(
        "{}.{}",
        moved.rsplit_once('.').expect("parts").0,
        good.rsplit_once('.').expect("parts").1
    );
    let jwk = published("second", "key-1");
    vec![
        (
            "another key's name",
            github().header("kid", "key-2").token(),
            "signature is not",
        ),
        (
            "another key's signature",
            github().sign(Sign::Rs256("second")).token(),
            "signature is not",
        ),
        (
            "a key of its own",
            github()
                .header("jwk", jwk)
                .sign(Sign::Rs256("second"))
                .token(),
            "signature is not",
        ),
        (
            "a key's address of its own",
            github()
                .header("jku", "https://evil.example/jwks")
                .sign(Sign::Rs256("second"))
                .token(),
            "signature is not",
        ),
        (
            "no signature",
            github().sign(Sign::Nothing).token(),
            "signature is not",
        ),
        ("another token's signature", swapped, "signature is not"),
        (
            "another issuer's key",
            Draft::gitlab().token(),
            "signature is not",
        ),
    ]
}

fn issuers_and_audiences() -> Vec<Row> {
    let github = Draft::github;
    vec![
        ("no issuer", github().without("iss").token(), "issuer (`iss`) is missing"),
        ("a list of issuers", github().claim("iss", json!([GITHUB])).token(), "issuer (`iss`) is missing or no text"),
        ("a slash behind the issuer", github().claim("iss", format!("{GITHUB}/")).token(), "does not know"),
        ("an issuer below it", github().claim("iss", format!("{GITHUB}/evil")).token(), "does not know"),
        ("another issuer", github().claim("iss", "https://evil.example").token(), "`https://evil.example`"),
        ("no audience", github().without("aud").token(), "audience (`aud`) is missing"),
        ("no audience, said so", github().claim("aud", Value::Null).token(), "audience (`aud`) is missing"),
        ("a list with our audience", github().claim("aud", json!([AUDIENCE])).token(), "ask for a token with the audience"),
        ("GitHub's default audience", github().claim("aud", "https://github.com/octo-org").token(), "octo-org"),
        ("a slash behind the audience", github().claim("aud", format!("{AUDIENCE}/")).token(), "(`aud`) is"),
        ("our audience in capitals", github().claim("aud", AUDIENCE.to_uppercase()).token(), "(`aud`) is"),
        // What the runner itself holds is signed by the same key.
        (
            "the runner's own token",
            Draft::new(json!({"iss": GITHUB, "iat": ISSUED, "nbf": ISSUED, "exp": ISSUED + 300, "runner_id": "7"})).token(),
            "audience (`aud`) is missing",
        ),
    ]
}

fn times() -> Vec<Row> {
    let github = Draft::github;
    vec![
        (
            "expired",
            github().claim("exp", NOW - 60).token(),
            "it expired 60 s ago",
        ),
        ("no end", github().without("exp").token(), "it has no `exp`"),
        (
            "an end in a text",
            github().claim("exp", "1787167057").token(),
            "`exp` is not a number of seconds",
        ),
        (
            "an end with a fraction",
            github().claim("exp", 1_787_167_057.5).token(),
            "`exp` is not a number",
        ),
        (
            "an end before 1970",
            github().claim("exp", -1).token(),
            "`exp` is not a number",
        ),
        (
            "an end that no clock shows",
            github().claim("exp", u64::MAX).token(),
            "`exp` is not a number",
        ),
        (
            "no beginning",
            github().without("nbf").token(),
            "it has no `nbf`",
        ),
        (
            "not valid yet",
            github().claim("nbf", NOW + 61).token(),
            "valid only in 61 s",
        ),
        (
            "a beginning in a text",
            github().claim("nbf", "0").token(),
            "`nbf` is not a number",
        ),
        (
            "no time of issue",
            github().without("iat").token(),
            "it has no `iat`",
        ),
        (
            "issued in the future",
            github().claim("iat", NOW + 61).token(),
            "issued 61 s in the future",
        ),
        (
            "a life of an hour",
            github().claim("exp", ISSUED + 3600).token(),
            "lives for 3600 s",
        ),
    ]
}

fn claims() -> Vec<Row> {
    let github = Draft::github;
    let twice = Draft::github().claims.to_string();
    let twice = twice.replace(r#""run_id""#, r#""repository_id":"1","run_id""#);
    vec![
        (
            "claims that are a list",
            Draft {
                claims_text: Some("[]".into()),
                ..github()
            }
            .token(),
            "claims is no JSON object",
        ),
        (
            "a claim twice",
            Draft {
                claims_text: Some(twice),
                ..github()
            }
            .token(),
            "claims has `repository_id` twice",
        ),
        (
            "no name",
            github().without("jti").token(),
            "it has no `jti`",
        ),
        (
            "a number as name",
            github().claim("jti", 7).token(),
            "`jti` is not a text",
        ),
        (
            "no subject",
            github().without("sub").token(),
            "it has no `sub`",
        ),
        (
            "no repository's number",
            github().without("repository_id").token(),
            "it has no `repository_id`",
        ),
        (
            "an empty number",
            github().claim("repository_id", "").token(),
            "it has no `repository_id`",
        ),
        (
            "a number that is none",
            github().claim("repository_id", 456_789).token(),
            "`repository_id` is not a text",
        ),
        (
            "a number with a letter",
            github().claim("repository_id", "456789x").token(),
            "not a number in a text",
        ),
        (
            "no owner's number",
            github().claim("repository_owner_id", Value::Null).token(),
            "no `repository_owner_id`",
        ),
    ]
}

fn claims_of_a_run() -> Vec<Row> {
    let github = Draft::github;
    vec![
        (
            "no event",
            github().without("event_name").token(),
            "it has no `event_name`",
        ),
        (
            "a short ref",
            github().claim("ref", "main").token(),
            "`ref` is not a full ref",
        ),
        (
            "a list of refs",
            github().claim("ref", json!(["refs/heads/main"])).token(),
            "`ref` is not a text",
        ),
        (
            "a protection that is no word",
            github().claim("ref_protected", "yes").token(),
            "not `true` or `false`",
        ),
        (
            "a protection that is no text",
            github().claim("ref_protected", true).token(),
            "`ref_protected` is not a text",
        ),
        (
            "no run",
            github().without("run_id").token(),
            "it has no `run_id`",
        ),
        (
            "no attempt",
            github().without("run_attempt").token(),
            "it has no `run_attempt`",
        ),
        (
            "a workflow without a ref",
            github().claim("job_workflow_ref", "o/r/ci.yaml").token(),
            "not a file at a ref",
        ),
        (
            "GitLab's claims",
            Draft::gitlab()
                .claim("iss", GITHUB)
                .claim("exp", ISSUED + 300)
                .token(),
            "`repository_id`",
        ),
        (
            "GitHub's claims by GitLab's key",
            github()
                .claim("iss", GITLAB)
                .sign(Sign::Rs256("second"))
                .token(),
            "it has no `project_id`",
        ),
    ]
}

#[tokio::test]
async fn each_is_refused_for_its_own_reason() {
    let rows = [
        forms(),
        algorithms(),
        headers(),
        signatures(),
        issuers_and_audiences(),
        times(),
        claims(),
        claims_of_a_run(),
    ]
    .concat();
    assert!(rows.len() >= 80, "{}", rows.len());
    let world = World::new();
    for (what, token, reason) in rows {
        match world.verify(&token).await {
            Ok(identity) => panic!("{what}: taken as {identity:?}"),
            Err(refusal) => {
                let words = refusal.to_string();
                assert!(words.contains(reason), "{what}: {words}");
                assert!(!refusal.is_passing(), "{what}: {words}");
            }
        }
    }
    // None of them has used the name up that the good one has, too.
    world.verify(&Draft::github().token()).await.expect("good");
}

#[tokio::test]
async fn a_token_counts_once_for_as_long_as_it_is_valid() {
    let world = World::new();
    let token = Draft::github().token();
    world.verify(&token).await.expect("good");
    assert_eq!(world.verify(&token).await, Err(Refusal::Used));
    let again = Draft::github().claim("run_attempt", "2").token();
    assert_eq!(world.verify(&again).await, Err(Refusal::Used));
    let last = time(ISSUED + 300 + 59);
    assert_eq!(
        world.verifier.verify(&token, last).await,
        Err(Refusal::Used)
    );
    let over = world.verifier.verify(&token, time(ISSUED + 300 + 60)).await;
    assert!(matches!(over, Err(Refusal::Expired(_))), "{over:?}");
    // Names are an issuer's own.
    let other = Draft::gitlab()
        .claim("jti", "1e41-1")
        .sign(Sign::Rs256("second"));
    world.verify(&other.token()).await.expect("good");
}

#[tokio::test]
async fn of_two_at_once_one_is_taken() {
    let world = World::new();
    let token = Draft::github().token();
    let (one, two) = tokio::join!(world.verify(&token), world.verify(&token));
    assert!(one.is_ok() != two.is_ok());
}
