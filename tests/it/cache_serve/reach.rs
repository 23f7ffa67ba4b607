//! Who can reach the folder and the server, and who makes caches.

use super::*;

#[test]
fn a_folder_that_everyone_can_write_is_refused() {
    for (folder, mode) in [("c", 0o777), ("c/nars", 0o757), ("c/keys", 0o1777)] {
        let run = served_once();
        std::fs::create_dir_all(run.path(folder)).unwrap();
        let open = std::fs::Permissions::from_mode(mode);
        std::fs::set_permissions(run.path(folder), open).unwrap();
        let ran = run.run();
        assert_eq!(ran.code, 69, "{folder}: {}", ran.stderr);
        assert!(
            ran.stderr
                .contains(&format!("`{folder}` can be written by every user"))
                && ran.stderr.contains("chmod 700"),
            "{folder}: {}",
            ran.stderr
        );
        assert!(!run.path("c/tokens").exists(), "{folder}");
    }
}

#[test]
fn what_other_machines_can_do_is_said_at_the_start() {
    for (more, public) in [(&[] as &[&str], true), (&["--private"], false)] {
        let mut arguments = vec!["cache", "serve", "--dir", "c", "--listen", "0.0.0.0:0"];
        arguments.extend(["--allow-remote", "--quiet", "--stop-after", "0s"]);
        arguments.extend(more);
        let ran = Flywheel::new(&arguments).run();
        assert_eq!(ran.code, 0, "{}", ran.stderr);
        let open = "can read every path of this cache without a token; add `--private`";
        assert_eq!(ran.stderr.contains(open), public, "{}", ran.stderr);
        assert!(ran.stderr.contains("is not encrypted"), "{}", ran.stderr);
    }
    let ran = served_once().run();
    assert!(!ran.stderr.contains("remote"), "{}", ran.stderr);
}

#[tokio::test]
async fn a_client_that_would_make_a_cache_learns_how_it_is_made() {
    let served = Served::start(&[]);
    let ask = |method: reqwest::Method, cache: &str| {
        let url = format!("{}/_api/v1/cache-config/{cache}", served.url);
        let request = served.client().request(method, url);
        answer(request.bearer_auth(PLANTED_TOKEN).json(&json!({})))
    };
    for (method, cache, status, text) in [
        (
            reqwest::Method::POST,
            "new",
            405,
            "`flywheel cache serve --cache NAME`",
        ),
        (
            reqwest::Method::PATCH,
            "main",
            405,
            "`flywheel cache serve --cache NAME`",
        ),
        (
            reqwest::Method::DELETE,
            "main",
            405,
            "`flywheel cache serve --cache NAME`",
        ),
        (
            reqwest::Method::POST,
            "main",
            400,
            "the cache `main` is there already",
        ),
    ] {
        let (code, json) = ask(method, cache).await;
        assert_eq!(code, status, "{json}");
        assert!(json["message"].as_str().unwrap().contains(text), "{json}");
    }
}

#[tokio::test]
async fn an_address_without_the_caches_name_is_answered_with_the_whole_one() {
    let served = Served::start(&[]);
    let narinfo = format!("/{}.narinfo", "a".repeat(32));
    for (file, status) in [("/nix-cache-info", 400), (&narinfo, 400), ("/x", 404)] {
        let request = served.client().get(format!("{}{file}", served.url));
        let (code, json) = answer(request).await;
        assert_eq!(code, status, "{file}");
        let whole = format!("behind it: {}/main", served.url);
        let message = json["message"].as_str().unwrap();
        assert_eq!(message.ends_with(&whole), status == 400, "{message}");
    }
    let strange = served
        .client()
        .get(format!("{}/nix-cache-info", served.url))
        .header("Host", "<b>x");
    let (_, json) = answer(strange).await;
    assert!(
        json["message"]
            .as_str()
            .unwrap()
            .ends_with("http://HOST/main")
    );
    let private = Served::start(&["--private"]);
    let request = private
        .client()
        .get(format!("{}/nix-cache-info", private.url));
    let (_, json) = answer(request).await;
    assert!(json["message"].as_str().unwrap().ends_with("/NAME"));
}
