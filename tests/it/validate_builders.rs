//! `flywheel validate-builders` through the front door, for a class that needs no Nix: inputs, what it leaves,
//! the Check Run. What breaks a real builder is in `tests/real`.

use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt as _;

use serde_json::{Value, json};

use crate::world::github::GitHub;
use crate::world::{Flywheel, PLANTED_TOKEN, Ran};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A canary of the class `general`, in a job, with a healthy or a missing `node`.
fn general(arguments: &[&str], healthy: bool) -> Flywheel {
    let run = Flywheel::in_job(
        &[
            &[
                "validate-builders",
                "--class",
                "general",
                "--min-free",
                "1MiB",
            ],
            arguments,
        ]
        .concat(),
    );
    let bin = run.path("bin");
    std::fs::create_dir(&bin).unwrap();
    for (name, version) in [
        ("git", "git version 2.39.5"),
        ("pnpm", "10.1.0"),
        ("node", if healthy { "v22.0.0" } else { "v12.0.0" }),
    ] {
        std::fs::write(bin.join(name), format!("#!/bin/sh\necho {version}\n")).unwrap();
        std::fs::set_permissions(bin.join(name), std::fs::Permissions::from_mode(0o755)).unwrap();
    }
    let path = bin.display().to_string();
    run.env("PATH", &path)
}

fn with_github(run: Flywheel, github: &GitHub) -> Flywheel {
    let run = run
        .env("GITHUB_API_URL", &github.url)
        .env("GITHUB_TOKEN", PLANTED_TOKEN);
    run.env("GITHUB_REPOSITORY", "octo-org/app")
        .env("GITHUB_SHA", COMMIT)
        .env("GITHUB_EVENT_NAME", "push")
}

fn printed(ran: &Ran) -> String {
    format!("{}{}", ran.stdout, ran.stderr)
}

#[test]
fn a_healthy_and_a_broken_builder_leave_their_marks() {
    for (healthy, code, layer) in [(true, 0, ""), (false, 1, "tools")] {
        let run = general(
            &[
                "--report-file",
                "canary.json",
                "--metrics-file",
                "canary.prom",
            ],
            healthy,
        );
        let ran = run.run();
        assert_eq!(ran.code, code, "{}", printed(&ran));
        let outputs = run.read("GITHUB_OUTPUT");
        assert!(
            outputs.contains(&format!("\n{healthy}\n")) && outputs.contains("broken-layer<<"),
            "{outputs}"
        );
        crate::reference::check_outputs("validate-builders", &run);
        let report: Value = serde_json::from_str(&run.read("canary.json")).unwrap();
        assert_eq!(report["healthy"], healthy);
        assert_eq!(report["broken-layer"].as_str().unwrap_or_default(), layer);
        let sample = format!(
            "flywheel_builder_healthy{{class=\"general\",lane=\"general\"}} {}\n",
            i32::from(healthy)
        );
        assert!(
            run.read("canary.prom").contains(&sample),
            "{}",
            run.read("canary.prom")
        );
        let summary = run.read("GITHUB_STEP_SUMMARY");
        assert!(
            summary.starts_with(if healthy {
                "### ✅ Builder health"
            } else {
                "### ❌ Builder health"
            }),
            "{summary}"
        );
        assert_eq!(
            ran.stdout.contains("::error title=tools::it is `v12.0.0`"),
            !healthy,
            "{}",
            ran.stdout
        );
        assert_eq!(
            ran.stdout
                .contains("help     Put node (>=18) into the image of this class."),
            !healthy
        );
    }
}

#[test]
fn json_on_stdout_is_nothing_but_json() {
    let ran = general(&["--format", "json"], false).run();
    let report: Value =
        serde_json::from_str(&ran.stdout).unwrap_or_else(|error| panic!("{error}: {}", ran.stdout));
    assert_eq!(report["broken-layer"], "tools");
    let node = report["checks"]
        .as_array()
        .unwrap()
        .iter()
        .find(|check| check["name"] == "tool-node")
        .unwrap();
    assert_eq!(
        (node["severity"].as_str(), node["limit-seconds"].as_f64()),
        (Some("required"), Some(10.0))
    );
}

#[test]
fn wrong_input_is_64_and_says_what_was_meant() {
    for (arguments, message) in [
        (["--class", "genral"], "Did you mean `general`?"),
        (["--lane", "elsewhere"], "must be a lane of `nix-builder`"),
        (["--required", "cahce"], "Did you mean `cache`?"),
        (["--min-free", "lots"], "write it as `8GiB`"),
        (["--timeout", "soon"], "must be a number from 1 to 3600"),
        (["--cache-path", "/tmp/x"], "is no store path"),
        (
            ["--pushgateway", "gateway:9091"],
            "must be an http or https URL",
        ),
        (["--check-run", "maybe"], "check-run"),
    ] {
        let ran = Flywheel::new(&["validate-builders", arguments[0], arguments[1]]).run();
        assert!(
            ran.code == 64 && printed(&ran).contains(message),
            "{arguments:?}: {} {}",
            ran.code,
            printed(&ran)
        );
    }
}

#[test]
fn a_check_run_is_left_and_on_a_second_run_brought_up_to_date() {
    let github = GitHub::start(PLANTED_TOKEN, false);
    assert_eq!(with_github(general(&[], false), &github).run().code, 1);
    let runs = github.runs();
    assert_eq!(runs.len(), 1, "{:?}", github.log());
    let expected = [
        ("name", "Builder health: general"),
        ("head_sha", COMMIT),
        ("status", "completed"),
        ("conclusion", "failure"),
        ("external_id", "flywheel/validate-builders/general"),
    ];
    for (key, value) in expected {
        assert_eq!(runs[0][key], value, "{key}");
    }
    assert!(
        runs[0]["output"]["title"]
            .as_str()
            .unwrap()
            .starts_with("general is broken at `tools`"),
        "{}",
        runs[0]
    );
    assert_eq!(with_github(general(&[], true), &github).run().code, 0);
    let runs = github.runs();
    assert_eq!(
        (runs.len(), runs[0]["conclusion"].as_str()),
        (1, Some("success")),
        "{:?}",
        github.log()
    );
    let lines: Vec<(String, u16)> = github
        .log()
        .into_iter()
        .map(|(line, status)| (line.split(' ').next().unwrap().to_owned(), status))
        .collect();
    assert_eq!(
        lines,
        [
            ("GET".into(), 200),
            ("POST".into(), 201),
            ("GET".into(), 200),
            ("PATCH".into(), 200)
        ]
    );
}

#[test]
fn a_pull_request_has_it_on_the_head_of_its_branch() {
    let github = GitHub::start(PLANTED_TOKEN, false);
    let head = "f".repeat(40);
    let run = with_github(general(&[], true), &github);
    let event = run.path("event.json");
    std::fs::write(
        &event,
        json!({ "pull_request": { "head": { "sha": head } } }).to_string(),
    )
    .unwrap();
    let run = run
        .env("GITHUB_EVENT_NAME", "pull_request")
        .env("GITHUB_EVENT_PATH", event.to_str().unwrap());
    assert_eq!(run.run().code, 0);
    assert_eq!(github.runs()[0]["head_sha"], head);
}

#[test]
fn a_payload_that_is_a_pipe_holds_nothing_up() {
    let github = GitHub::start(PLANTED_TOKEN, false);
    let run = with_github(general(&[], true), &github);
    let event = run.path("event.json");
    rustix::fs::mkfifoat(rustix::fs::CWD, &event, rustix::fs::Mode::from(0o600)).unwrap();
    let run = run
        .env("GITHUB_EVENT_NAME", "pull_request")
        .env("GITHUB_EVENT_PATH", event.to_str().unwrap());
    let began = std::time::Instant::now();
    // Not `run`, which would read the file to look for the token.
    let output = run.command().output().unwrap();
    assert!(began.elapsed().as_secs() < 20, "{:?}", began.elapsed());
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert!(github.runs().is_empty(), "the commit is not known");
}

#[test]
fn a_token_that_may_not_is_a_warning_and_the_verdict_stands() {
    let github = GitHub::start(PLANTED_TOKEN, true);
    for (healthy, code) in [(true, 0), (false, 1)] {
        let ran = with_github(general(&[], healthy), &github).run();
        assert_eq!(ran.code, code);
        assert!(
            ran.stdout.contains("::warning title=check run::")
                && ran.stdout.contains("`checks: write`"),
            "{}",
            ran.stdout
        );
    }
    let dead = with_github(general(&[], true), &github).env("GITHUB_API_URL", "http://127.0.0.1:9");
    let ran = dead.run();
    assert!(
        ran.code == 0 && ran.stdout.contains("no Check Run is left"),
        "{}",
        ran.stdout
    );
    let asked = general(&["--check-run", "true"], true).run();
    assert!(
        asked.code == 0 && asked.stdout.contains("there is no `GITHUB_TOKEN`"),
        "{}",
        asked.stdout
    );
    let silent = with_github(general(&["--check-run", "false"], true), &github).run();
    assert!(!silent.stdout.contains("Check Run"), "{}", silent.stdout);
}

#[test]
fn an_enterprise_server_gets_the_check_run_and_nobody_else_the_token() {
    let github = GitHub::start(PLANTED_TOKEN, false);
    let enterprise = |api: &str| {
        with_github(general(&[], true), &github)
            .env("GITHUB_API_URL", api)
            .env("GITHUB_SERVER_URL", "https://github.example.org")
            .run()
    };
    let ran = enterprise(&format!("{}/api/v3", github.url));
    assert_eq!(ran.code, 0, "{}", printed(&ran));
    assert_eq!(github.names(), ["Builder health: general"]);
    let log = github.log();
    let is_enterprise = |line: &str| line.contains(" /api/v3/repos/octo-org/app/");
    assert!(
        log.iter()
            .all(|(line, status)| is_enterprise(line) && *status < 300),
        "{log:?}"
    );
    // Without a scheme it is no address. The public API would be the wrong place for this token.
    for broken in [
        "github.example.org/api/v3",
        "github.example.org:8443/api/v3",
    ] {
        let ran = enterprise(broken);
        assert_eq!(ran.code, 0, "{}", printed(&ran));
        assert!(
            ran.stdout
                .contains("no Check Run is left: `GITHUB_API_URL` is not the address of an API"),
            "{}",
            printed(&ran)
        );
    }
    assert_eq!(github.log(), log);
}

#[test]
fn metrics_are_pushed_to_a_gateway() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/prefix/", listener.local_addr().unwrap());
    let gateway = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut request = String::new();
        let mut buffer = [0; 4096];
        while !request.contains("flywheel_builder_last_run_timestamp_seconds{") {
            let read = stream.read(&mut buffer).unwrap();
            assert!(read > 0, "{request}");
            request.push_str(&String::from_utf8_lossy(&buffer[..read]));
        }
        stream
            .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            .unwrap();
        request
    });
    let ran = general(&["--pushgateway", &url], true).run();
    assert!(
        ran.code == 0 && !ran.stdout.contains("::warning"),
        "{}",
        ran.stdout
    );
    let request = gateway.join().unwrap();
    assert!(
        request.starts_with(
            "PUT /prefix/metrics/job/flywheel_canary/class/general/lane/general HTTP/1.1"
        ),
        "{request}"
    );
    let ran = general(&["--pushgateway", "http://127.0.0.1:9/"], true).run();
    assert!(
        ran.code == 0 && ran.stdout.contains("::warning title=metrics::"),
        "{}",
        ran.stdout
    );
}
