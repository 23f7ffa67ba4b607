//! `flywheel cache token` beside a server: what it makes is let in, what it revokes is not.

use super::*;

/// Runs `cache token` on the file of a server.
fn token(served: &Served, arguments: &[&str]) -> crate::world::Ran {
    let file = served.tokens_file();
    let file = ["--tokens", file.to_str().unwrap()];
    Flywheel::new(&[&["cache", "token"], arguments, &file].concat()).run()
}

/// Waits until a question with this token is answered with this status.
async fn answered(served: &Served, token: &str, status: u16) {
    let url = format!("{}/main/nix-cache-info", served.url);
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let request = served.client().get(&url).bearer_auth(token);
        let found = request.send().await.unwrap().status().as_u16();
        if found == status {
            return;
        }
        assert!(Instant::now() < deadline, "{found} instead of {status}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn a_token_is_let_in_until_it_is_revoked_without_a_restart() {
    let served = Served::start(&["--private"]);
    let made = token(&served, &["new", "--cache", "main", "--expires", "1h"]);
    assert_eq!(made.code, 0, "{}", made.stderr);
    let secret = made.stdout.trim();
    assert_eq!(secret.len(), 64, "{secret}");
    assert!(
        made.stderr.contains("read  cache main  until 2"),
        "{}",
        made.stderr
    );
    answered(&served, secret, 200).await;

    let listed = token(&served, &["list"]).stdout;
    let lines: Vec<&str> = listed.lines().collect();
    assert_eq!(lines.len(), 4, "{listed}");
    assert!(lines[0].ends_with("write  all caches  no end, in the file as it is"));
    assert!(!listed.contains(secret));
    let name = lines[3].split_whitespace().next().unwrap();
    let revoked = token(&served, &["revoke", name]);
    assert_eq!(revoked.code, 0, "{}", revoked.stderr);
    answered(&served, secret, 401).await;
    let again = token(&served, &["revoke", name]);
    assert_eq!(again.code, 1, "{}", again.stderr);
    assert!(again.stderr.contains(&format!("has no token `{name}`")));
}

#[tokio::test]
async fn a_token_ends_while_the_server_runs() {
    let served = Served::start(&["--private"]);
    let made = token(&served, &["new", "--expires", "4s"]);
    let secret = made.stdout.trim();
    answered(&served, secret, 200).await;
    answered(&served, secret, 401).await;
}

#[test]
fn a_folder_that_is_no_caches_is_named() {
    let ran = Flywheel::new(&["cache", "token", "list", "--dir", "nothing"]).run();
    assert_eq!(ran.code, 64, "{}", ran.stderr);
    assert!(
        ran.stderr.contains("`--dir` names `nothing/tokens`"),
        "{}",
        ran.stderr
    );
    let ran = Flywheel::new(&["cache", "token", "list"]).run();
    assert_eq!(ran.code, 64, "{}", ran.stderr);
}
