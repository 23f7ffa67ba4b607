//! `flake-checks` through the front door: the inputs that it accepts, and its messages where there is no Nix.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;

use serde_json::Value;

use crate::world::github::GitHub;
use crate::world::{Flywheel, PLANTED_TOKEN, Ran};

/// Answers what a run asks that builds nothing. `NAMES` is the list of outputs.
const NIX: &str = r#"case "$*" in
  --version) echo 'nix (Nix) 2.8.0' ;;
  'store ping'*) echo 'Store URL: elsewhere' >&2 ;;
  'show-config --json') echo '{"system":{"value":"x86_64-linux"}}' ;;
  'flake metadata'*) echo '{"path":"/nonexistent","locked":{"narHash":"sha256-x","type":"git"},"resolvedUrl":"git+file:///x"}' ;;
  'path-info --all --json'*) echo '[]' ;;
  eval*--json*) NAMES ;;
  *) echo "error: nobody expects $*" >&2; exit 1 ;;
esac"#;
const LIST: &str = r#"echo '[{"attr":"x86_64-linux.good","label":"good"},{"attr":["x86_64-linux","bad"],"label":"bad"},{"attr":"x86_64-linux.silent","label":"silent"},{"attr":"riscv64-linux.other","label":"other"}]'"#;
/// Three outputs, and one that was not asked for; one prints nothing.
const JOBS: &str = r#"[ "$1 $2" = "--flake .#checks.x86_64-linux" ] || exit 2
echo 'warning: dirty' >&2
echo '{"attr":"x","attrPath":["good"],"drvPath":"/nix/store/fvchbymk0m4jvldpb9m5hy0bjy2lf30k-good.drv","outputs":{"out":"/nix/store/fvchbymk0m4jvldpb9m5hy0bjy2lf30k-good"},"system":"x86_64-linux"}'
echo '{"attr":"x","attrPath":["bad"],"error":"error: no way"}'
echo '{"attr":"x","attrPath":["unasked"],"error":"error: no way"}'"#;
const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A job on a push, with programs of these names and texts, and nothing else, on its `PATH`.
fn job(arguments: &[&str], programs: &[(&str, &str)]) -> Flywheel {
    let run = Flywheel::in_job(&[&["flake-checks"], arguments].concat());
    fs::write(run.path("flake.nix"), "{ }").unwrap();
    let bin = run.path("bin");
    fs::create_dir(&bin).unwrap();
    for (name, text) in programs {
        fs::write(bin.join(name), format!("#!/bin/sh\n{text}\n")).unwrap();
        fs::set_permissions(bin.join(name), fs::Permissions::from_mode(0o755)).unwrap();
    }
    let path = bin.display().to_string();
    run.env("PATH", &path).env("GITHUB_TOKEN", PLANTED_TOKEN)
}

fn with_github(run: Flywheel, github: &GitHub) -> Flywheel {
    let run = run
        .env("GITHUB_API_URL", &github.url)
        .env("GITHUB_REPOSITORY", "octo-org/app");
    run.env("GITHUB_SHA", COMMIT)
        .env("GITHUB_EVENT_NAME", "push")
}

fn output(run: &Flywheel, name: &str) -> String {
    let text = run.read("GITHUB_OUTPUT");
    let value = text
        .lines()
        .skip_while(|line| !line.starts_with(&format!("{name}<<")))
        .nth(1);
    value
        .unwrap_or_else(|| panic!("no output `{name}` in {text}"))
        .to_owned()
}

#[track_caller]
fn check(ran: &Ran, code: i32, words: &[&str]) {
    let printed = format!("{}{}", ran.stdout, ran.stderr);
    assert_eq!(ran.code, code, "{printed}");
    for word in words {
        assert!(printed.contains(word), "`{word}` is not in:\n{printed}");
    }
}

#[test]
fn wrong_input_is_named_before_anything_is_touched() {
    for (arguments, words) in [
        (["--flake", ".#checks"], ["`.#checks`", "flake-attr"]),
        (
            ["--flake", "/nonexistent"],
            ["has no `flake.nix`", "earlier step"],
        ),
        (
            ["--flake", "--impure"],
            ["flake", "is not a flake reference"],
        ),
        (
            ["--flake-attr", "checks..x"],
            ["`checks..x`", "dots between them"],
        ),
        (
            ["--systems", "x86_64-linux linux"],
            ["is no system: `linux`", "`all`"],
        ),
        (
            ["--evaluation-workers", "0"],
            ["evaluation-workers", "from 1 to 256"],
        ),
        (
            ["--derivations-per-worker", "some"],
            ["derivations-per-worker", "not `some`"],
        ),
        (
            ["--publish-workers", "-1"],
            ["publish-workers", "from 1 to 256"],
        ),
        (
            ["--nix-args", "--option 'x"],
            ["nix-args", "a quote that does not end"],
        ),
        (["--evaluator", "hydra"], ["evaluator", "`nix-eval-jobs`"]),
        (
            ["--evaluation-memory", "verfy"],
            ["evaluation-memory", "Did you mean `verify`?"],
        ),
        (["--retries", "11"], ["retries", "from 0 to 10"]),
        (
            ["--checks", "maybe"],
            ["checks", "`auto`, `true` or `false`"],
        ),
        (["--build", "no"], ["build", "`true` or `false`"]),
    ] {
        let arguments = [arguments[0], &format!("{}={}", arguments[0], arguments[1])];
        let run = job(&arguments[1..], &[("nix", "touch \"$HOME/touched\"")]);
        check(&run.run(), 64, &words);
        assert!(!run.path("home/touched").exists(), "{arguments:?}");
    }
}

#[test]
fn a_flake_that_does_not_evaluate_fails_the_one_check_that_is_required() {
    let github = GitHub::start(PLANTED_TOKEN, false);
    let names = "echo 'error: syntax error, unexpected end of file' >&2; exit 1";
    let run = with_github(
        job(
            &["--build", "false"],
            &[("nix", &NIX.replace("NAMES", names))],
        ),
        &github,
    );
    let ran = run.run();
    check(
        &ran,
        1,
        &[
            "the outputs cannot be listed",
            "syntax error",
            "nix flake show",
        ],
    );
    let all = github.run("flake checks");
    assert_eq!(
        (all["conclusion"].as_str(), all["status"].as_str()),
        (Some("failure"), Some("completed")),
        "{all}"
    );
    assert!(
        all["output"]["title"]
            .as_str()
            .unwrap()
            .contains("syntax error"),
        "{all}"
    );
}

#[test]
fn nix_eval_jobs_evaluates_where_it_is_asked_for_and_there() {
    let github = GitHub::start(PLANTED_TOKEN, false);
    let programs = [
        ("nix", NIX.replace("NAMES", LIST)),
        ("nix-eval-jobs", JOBS.to_owned()),
    ];
    let programs = programs
        .each_ref()
        .map(|(name, text)| (*name, text.as_str()));
    let arguments = [
        "--build",
        "false",
        "--evaluator",
        "nix-eval-jobs",
        "--junit",
        "x.xml",
        "--json-lines",
        "x.jsonl",
    ];
    let run = with_github(job(&arguments, &programs), &github);
    check(
        &run.run(),
        1,
        &[
            "nix-eval-jobs evaluates",
            "3 outputs: 2 failed, 1 successful",
        ],
    );
    for (name, conclusion) in [
        ("good", "success"),
        ("bad", "failure"),
        ("silent", "failure"),
        ("flake checks", "failure"),
    ] {
        assert_eq!(github.run(name)["conclusion"], conclusion, "{name}");
    }
    assert_eq!(
        github.names().len(),
        4,
        "the other system is left out: {:?}",
        github.names()
    );
    let values = ["outputs", "succeeded", "failed", "exit-code"].map(|name| output(&run, name));
    assert_eq!(values, ["3", "1", "2", "1"]);
    let lines = run.read("x.jsonl");
    let first: Value = serde_json::from_str(lines.lines().next().unwrap()).unwrap();
    assert_eq!(
        (first["label"].as_str(), first["cause"]["kind"].as_str()),
        (Some("good"), Some("evaluated"))
    );
    assert!(run.read("x.xml").contains("tests=\"3\" failures=\"2\""));
    assert!(
        run.read("GITHUB_STEP_SUMMARY")
            .contains("| ❌ | bad | Does not evaluate: no way |")
    );
}

#[test]
fn without_nix_eval_jobs_nix_itself_is_asked() {
    let run = job(
        &["--build", "false", "--evaluator", "nix-eval-jobs"],
        &[("nix", &NIX.replace("NAMES", "echo '[]'"))],
    );
    check(
        &run.run(),
        0,
        &[
            "`nix-eval-jobs` is not on `PATH`, so Nix itself evaluates",
            "nothing to check",
        ],
    );
}

#[test]
fn check_runs_that_were_asked_for_and_cannot_be_are_said() {
    let run = job(
        &["--build", "false", "--checks", "true"],
        &[("nix", &NIX.replace("NAMES", "echo '[]'"))],
    );
    check(
        &run.run(),
        0,
        &["there are no Check Runs: the job has no commit"],
    );
    let github = GitHub::start(PLANTED_TOKEN, false);
    let run = job(
        &["--build", "false", "--checks", "false"],
        &[("nix", &NIX.replace("NAMES", "echo '[]'"))],
    );
    check(&with_github(run, &github).run(), 0, &[]);
    assert!(github.log().is_empty(), "nobody asked for any");
    // Also where none were asked for: this token must not go to another API.
    let run = job(
        &["--build", "false"],
        &[("nix", &NIX.replace("NAMES", "echo '[]'"))],
    );
    let ran = with_github(run, &github).env("GITHUB_API_URL", "github.example.org/api/v3");
    check(
        &ran.run(),
        0,
        &["there are no Check Runs: `GITHUB_API_URL` is not the address of an API"],
    );
}
