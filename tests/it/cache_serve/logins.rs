//! `flywheel cache login`: where the token is kept, and who finds it.

use super::*;

#[test]
fn a_login_is_private_and_found_by_use_and_by_publish() {
    let served = Served::start(&[]);
    let address = format!("{}/main", served.url);
    let login = Flywheel::new(&["cache", "login", &address]).env("ATTIC_TOKEN", "reader-token");
    let ran = login.run();
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    assert!(!ran.stderr.contains("reader-token"), "{}", ran.stderr);
    let config = login.path("home").join(".config");
    let netrc = config.join("flywheel/login/netrc");
    let mode =
        |path: &std::path::Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(
        (mode(&netrc), mode(netrc.parent().unwrap())),
        (0o600, 0o700)
    );

    let here = |arguments: &[&str]| {
        let run = Flywheel::new(arguments).env("XDG_CONFIG_HOME", config.to_str().unwrap());
        let ran = run.run();
        (ran.code, format!("{}{}", ran.stdout, ran.stderr))
    };
    let (code, lines) = here(&["cache", "use", &address]);
    assert_eq!(code, 0, "{lines}");
    let line = format!("netrc-file = {}", netrc.display());
    assert!(lines.contains(&line), "{lines}");

    // Nothing is tried without a token, so that the wrong path is seen only with one.
    let publish = ["publish", "--attic-server", &served.url, "/etc"];
    let (code, text) = here(&publish);
    assert_eq!(code, 64, "{text}");
    assert!(text.contains("which `/etc` does not"), "{text}");

    let undone = here(&["cache", "login", &address, "--undo"]);
    assert_eq!(undone.0, 0, "{}", undone.1);
    assert_eq!(std::fs::read_to_string(&netrc).unwrap(), "");
    assert_eq!(here(&publish).0, 1, "without a token");
    let (_, lines) = here(&["cache", "use", &address]);
    assert!(!lines.contains("netrc-file"), "{lines}");
}

#[test]
fn a_login_without_a_token_says_how_to_give_one() {
    let ran = Flywheel::new(&["cache", "login", "https://attic.example.org/main"]).run();
    assert_eq!(ran.code, 64, "{}", ran.stderr);
    assert!(
        ran.stderr.contains("cache login ADDRESS < FILE"),
        "{}",
        ran.stderr
    );
}
