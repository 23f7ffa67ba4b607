//! `flywheel cache use` beside a server: the lines for Nix and for a workflow, and their block in a `nix.conf`.

use super::*;

#[test]
fn the_lines_for_nix_and_a_workflow_are_printed_with_the_servers_key() {
    let served = Served::start(&[]);
    let address = format!("{}/team", served.url);
    let key = served.keys.iter().find(|key| key.starts_with("team:"));
    let (url, key) = (&served.url, key.unwrap());
    let ran = Flywheel::new(&["cache", "use", &address]).run();
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    assert_eq!(
        ran.stdout,
        format!(
            "# nix.conf\nextra-substituters = {address}\nextra-trusted-public-keys = {key}\n\n# a workflow: `with:` of \
             nix-job, flake-checks or watch-store\nattic-server: {url}\nattic-cache: team\nattic-public-key: {key}\n"
        )
    );
}

#[test]
fn the_block_in_the_settings_is_written_once_and_taken_back() {
    let served = Served::start(&[]);
    let address = format!("{}/main", served.url);
    let run = Flywheel::new(&["cache", "use", &address, "--write"]);
    let conf = run.path("home").join(".config/nix/nix.conf");
    let ran = run.run();
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let written = std::fs::read_to_string(&conf).unwrap();
    assert!(
        written.contains(&format!(
            "\nextra-substituters = {address}\nextra-trusted-public-keys = main:"
        )),
        "{written}"
    );

    let mine = run.path("mine.conf");
    std::fs::write(&mine, "cores = 2\n").unwrap();
    let mode = std::fs::Permissions::from_mode(0o640);
    std::fs::set_permissions(&mine, mode).unwrap();
    let link = run.path("link.conf");
    std::os::unix::fs::symlink(&mine, &link).unwrap();
    let on_link = |flag: &str| {
        let file = link.to_str().unwrap();
        let ran = Flywheel::new(&["cache", "use", &address, flag, "--file", file]).run();
        assert_eq!(ran.code, 0, "{}", ran.stderr);
        std::fs::read_to_string(&mine).unwrap()
    };
    let once = on_link("--write");
    assert_eq!(once, format!("cores = 2\n{written}"));
    assert_eq!(on_link("--write"), once);
    let about = std::fs::symlink_metadata(&mine).unwrap();
    assert_eq!(about.permissions().mode() & 0o777, 0o640);
    drop(served);
    assert_eq!(on_link("--undo"), "cores = 2\n", "without the server");
    assert_eq!(on_link("--undo"), "cores = 2\n");
    assert!(std::fs::symlink_metadata(&link).unwrap().is_symlink());
}

#[test]
fn a_wrong_address_and_a_silent_server_are_named() {
    for (address, code, text) in [
        (
            "http://127.0.0.1:8484",
            64,
            "argument `ADDRESS` lacks the cache's name",
        ),
        (
            "http://127.0.0.1:8484/",
            64,
            "argument `ADDRESS` lacks the cache's name",
        ),
        ("127.0.0.1:8484/main", 64, "argument `ADDRESS` "),
        (
            "http://127.0.0.1:1/main",
            1,
            "Give the key with `--public-key`",
        ),
    ] {
        let ran = Flywheel::new(&["cache", "use", address, "--write"]).run();
        assert_eq!(ran.code, code, "{address}: {}", ran.stderr);
        assert!(ran.stderr.contains(text), "{address}: {}", ran.stderr);
    }
}
