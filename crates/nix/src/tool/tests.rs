//! Versions as they print themselves, calls with a scripted Nix, and what becomes of its errors.

use flywheel_testing::script;

use super::*;

fn version(line: &str) -> (Flavour, u32, u32) {
    let version = Version::parse(line).expect("a version");
    (version.flavour, version.major, version.minor)
}

#[test]
fn the_format_of_json_is_named_where_it_has_to_be() {
    let names_it = |line: &str| {
        let version = Version::parse(line).expect("a version");
        version.path_info_as_json().contains(&"--json-format")
    };
    for line in [
        "nix (Nix) 2.33.0",
        "nix (Nix) 2.35.1",
        "nix (Determinate Nix 3.15.0) 2.33.0",
    ] {
        assert!(names_it(line), "{line}");
    }
    for line in [
        "nix (Nix) 2.32.4",
        "nix (Determinate Nix 3.6.2) 2.29.0",
        "nix (Lix, like Nix) 2.94.0",
    ] {
        assert!(!names_it(line), "{line}");
    }
}

#[tokio::test]
async fn a_nix_that_does_not_run_is_named_by_its_file() {
    let folder = tempfile::tempdir().expect("temporary folder");
    let program = script(folder.path(), "nix", "echo oops >&2; exit 1").await;
    let failed = Nix::detect(&program, &Env::default()).await;
    let error = failed.expect_err("it fails").to_string();
    let call = format!("`{} --version` failed: ", program.display());
    assert!(error.starts_with(&call), "{error}");
}

#[tokio::test]
async fn a_store_is_opened_by_whichever_name_the_version_knows() {
    let folder = tempfile::tempdir().expect("temporary folder");
    for known in ["ping", "info"] {
        let text = format!(
            "[ \"$1 $2\" = 'store {known}' ] || {{ echo \"error: '$2' is not a recognised command\" >&2; exit 1; }}
            echo \"Store URL: $4\""
        );
        let program = script(folder.path(), known, &text).await;
        let nix = Nix::unversioned(&program, &Env::default());
        let output = nix.ping_store(&["--store", "local"], VERSION_LIMIT).await;
        assert_eq!(output.expect("runs").text(), "Store URL: local\n");
    }
}

#[test]
fn a_version_that_nixpkgs_refuses_is_named() {
    let remark = |line: &str| Version::parse(line).expect("a version").too_old();
    let old = remark("nix (Nix) 2.8.0").expect("it is too old");
    assert!(
        old.starts_with("nix (Nix) 2.8.0 is older than 2.18"),
        "{old}"
    );
    // No input puts another one into the place of the machine's own.
    assert!(
        old.contains("remove it") && !old.contains("nix-version"),
        "{old}"
    );
    for line in [
        "nix (Nix) 2.18.0",
        "nix (Determinate Nix 3.6.2) 2.29.0",
        "nix (Lix, like Nix) 2.90.0",
    ] {
        assert_eq!(remark(line), None);
    }
}

#[test]
fn every_maker_is_known() {
    assert_eq!(version("nix (Nix) 2.8.0\n"), (Flavour::Nix, 2, 8));
    assert_eq!(version("nix (Nix) 2.26.3"), (Flavour::Nix, 2, 26));
    assert_eq!(
        version("nix (Nix) 2.24pre20240723_deadbeef"),
        (Flavour::Nix, 2, 24)
    );
    assert_eq!(
        version("nix (Determinate Nix 3.6.2) 2.29.0"),
        (Flavour::Determinate, 2, 29)
    );
    assert_eq!(
        version("nix (Lix, like Nix) 2.91.1\nSystem type: x86_64-linux"),
        (Flavour::Lix, 2, 91)
    );
    assert_eq!(
        version("nix (Lix, like Nix) 2.93.0-dev-pre20250101-abc"),
        (Flavour::Lix, 2, 93)
    );
    for stranger in ["", "nix", "nix (Nix)", "bash 5.2", "nix (Nix) two"] {
        assert_eq!(Version::parse(stranger), None, "{stranger}");
    }
    assert!(
        Version::parse("nix (Nix) 2.20.1")
            .expect("a version")
            .at_least(2, 20)
    );
}

#[tokio::test]
async fn path_comes_first_and_what_is_beside_it_is_reported() {
    let folder = tempfile::tempdir().expect("temporary folder");
    let program = script(folder.path(), "nix", "echo").await;
    let place = folder.path().to_str().expect("UTF-8");
    let found = find(&Env::from_pairs([("PATH", place)]), &[]).expect("on PATH");
    assert_eq!(
        found,
        FoundProgram {
            program: program.clone(),
            on_path: true
        }
    );
    let aside = find(
        &Env::from_pairs([("PATH", "/nonexistent")]),
        &[folder.path().into()],
    )
    .expect("aside");
    assert_eq!(
        aside,
        FoundProgram {
            program,
            on_path: false
        }
    );
    assert_eq!(find(&Env::from_pairs([("PATH", "relative:.")]), &[]), None);
}

#[test]
fn a_file_that_does_not_run_is_not_nix() {
    let folder = tempfile::tempdir().expect("temporary folder");
    std::fs::write(folder.path().join("nix"), "").expect("written");
    assert_eq!(find(&Env::default(), &[folder.path().into()]), None);
}

#[tokio::test]
async fn our_calls_hold_no_token_and_the_config_they_are_given() {
    let folder = tempfile::tempdir().expect("temporary folder");
    let program = script(
        folder.path(),
        "nix",
        "[ \"$1\" = --version ] && echo 'nix (Nix) 2.8.0' || env",
    )
    .await;
    let env = Env::from_pairs([
        ("PATH", "/usr/bin:/bin"),
        ("HOME", "/home/x"),
        ("ATTIC_TOKEN", "first-secret"),
        ("FLYWHEEL_COMMAND", "second-secret"),
        ("GITHUB_TOKEN", "third-secret"),
        ("NIX_CONFIG", "cores = 3"),
    ]);
    let nix = Nix::detect(&program, &env)
        .await
        .expect("runs")
        .with_variable("NIX_REMOTE", Some("local"));
    let printed = nix
        .run_checked(&["store", "ping"], VERSION_LIMIT)
        .await
        .expect("runs")
        .text();
    for absent in ["first-secret", "second-secret", "third-secret"] {
        assert!(!printed.contains(absent), "{printed}");
    }
    for present in [
        "HOME=/home/x",
        "NIX_REMOTE=local",
        "NIX_CONFIG=cores = 3\nextra-experimental-features",
    ] {
        assert!(printed.contains(present), "{present} in {printed}");
    }
}

#[tokio::test]
async fn what_nix_complains_about_is_one_plain_line() {
    let folder = tempfile::tempdir().expect("temporary folder");
    let text = "[ \"$1\" = --version ] && echo 'nix (Nix) 2.8.0' && exit
        printf 'warning: x\\n\\033[31;1merror:\\033[0m path\\n  is not valid\\n' >&2; exit 1";
    let program = script(folder.path(), "nix", text).await;
    let nix = Nix::detect(&program, &Env::default()).await.expect("runs");
    let error = nix
        .run_checked(&["path-info", "--json", "/x"], VERSION_LIMIT)
        .await
        .expect_err("fails");
    assert_eq!(
        error.to_string(),
        "`nix path-info` failed: path is not valid"
    );
    // From 2.20 on the trace comes first.
    let traced =
        "error:\n       … while calling the 'throw' builtin\n\n       error: no\n       way\n";
    assert_eq!(
        error_summary(traced),
        "no way … while calling the 'throw' builtin"
    );
}

#[test]
fn a_line_that_nix_cannot_read_is_not_repeated() {
    // 2.8, and 2.26 and later.
    for said in [
        "illegal configuration line",
        "syntax error in configuration line",
    ] {
        assert!(
            !error_summary(&format!(
                "error: {said} 'github.com=s3cr3t' in 'NIX_CONFIG'"
            ))
            .contains("s3cr3t")
        );
    }
}
