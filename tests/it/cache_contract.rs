//! `flywheel cache-contract` through the front door, against endpoints that answer and endpoints that do not.

use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;

use serde_json::Value;

use crate::world::bazel::{Answer, Server};
use crate::world::{Flywheel, PLANTED_TOKEN, Ran, folders};

fn contract(arguments: &[&str], environment: &[(&str, &str)]) -> Ran {
    let arguments = [&["cache-contract"], arguments].concat();
    environment
        .iter()
        .fold(Flywheel::in_job(&arguments), |run, (name, value)| {
            run.env(name, value)
        })
        .run()
}

#[track_caller]
fn check(arguments: &[&str], environment: &[(&str, &str)], code: i32, message: &str) {
    let ran = contract(arguments, environment);
    let printed = format!("{}{}", ran.stdout, ran.stderr);
    assert_eq!(ran.code, code, "{arguments:?} {environment:?}\n{printed}");
    assert!(
        printed.contains(message),
        "{arguments:?} {environment:?}: no `{message}` in\n{printed}"
    );
}

#[test]
fn every_endpoint_is_asked_in_its_own_language() {
    for (answer, scheme, code, message) in [
        (
            Answer::Grpc { execution: false },
            "grpc",
            0,
            "the shared-cache contract holds, strict",
        ),
        (Answer::Http(404, ""), "http", 0, "answers in"),
        (Answer::Http(200, ""), "http", 0, "answers in"),
        (Answer::Http(200, "<html>"), "http", 1, "no Bazel cache"),
        (Answer::Http(403, ""), "http", 1, "403 (authorisation)"),
        (Answer::Http(500, ""), "http", 1, "500 (answer)"),
        (
            Answer::GrpcGarbage,
            "grpc",
            1,
            "no message of the remote execution protocol",
        ),
        (
            Answer::GrpcWithoutBlobs,
            "grpc",
            1,
            "its content-addressed store: the call failed with gRPC status 14",
        ),
        (Answer::GrpcStatus("12"), "grpc", 1, "no Bazel remote cache"),
        (Answer::GrpcStatus("16"), "grpc", 1, "(authorisation)"),
        (Answer::GrpcStatus("14"), "grpc", 1, "gRPC status 14"),
        (Answer::Http(200, ""), "grpc", 1, "(answer)"),
        (
            Answer::Grpc { execution: false },
            "grpcs",
            1,
            "error      cache:",
        ),
    ] {
        let url = Server::start(answer).url(scheme);
        check(
            &["--strict", "--class", "general", "--allow-localhost"],
            &[("BAZEL_REMOTE_CACHE", &url)],
            code,
            message,
        );
    }
}

#[test]
fn an_endpoint_that_does_not_answer_breaks_only_the_strict_contract() {
    let url = Server::start(Answer::Silent).url("grpc");
    let bounded = ["--allow-localhost", "--timeout", "1"];
    check(
        &bounded,
        &[("BAZEL_REMOTE_CACHE", &url)],
        0,
        "warning    cache:",
    );
    let strict = [&bounded[..], &["--strict", "--class", "general"]].concat();
    check(
        &strict,
        &[("BAZEL_REMOTE_CACHE", &url)],
        1,
        "no answer within 1",
    );
    check(&["--timeout", "soon"], &[], 64, "timeout");
}

/// A process that holds the job's token leaves no core dump, and no other process of its user can read its memory or its
/// environment.
#[test]
fn a_process_with_a_token_is_closed_to_others_of_its_user() {
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};
    use std::os::unix::process::CommandExt as _;

    let url = Server::start(Answer::Silent).url("grpc");
    let bounded = ["cache-contract", "--allow-localhost", "--timeout", "20"];
    let run = Flywheel::new(&bounded).env("BAZEL_REMOTE_CACHE", &url);
    let mut command = run.command();
    let is_root = rustix::process::geteuid().is_root();
    let program = run.path("flywheel");
    if is_root {
        // Root may read everything; the files of the test are another user's then.
        std::fs::copy(command.get_program(), &program).unwrap();
        std::fs::set_permissions(run.folder.path(), std::fs::Permissions::from_mode(0o755))
            .unwrap();
        chown(run.folder.path(), Some(65534), Some(65534)).unwrap();
        let mut other = std::process::Command::new(&program);
        other.args(command.get_args()).uid(65534).gid(65534);
        crate::world::folders::isolate(&mut other, run.folder.path());
        other
            .current_dir(run.folder.path())
            .env("BAZEL_REMOTE_CACHE", &url);
        command = other;
    }
    let mut child = command.stdin(std::process::Stdio::null()).spawn().unwrap();
    let proc = std::path::PathBuf::from(format!("/proc/{}", child.id()));
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    let closed = loop {
        let limits = std::fs::read_to_string(proc.join("limits")).unwrap_or_default();
        let limit = limits
            .lines()
            .find(|line| line.starts_with("Max core file size"));
        let soft = limit.and_then(|line| line.split_whitespace().nth(4));
        // The system gives the files of a process that must not be traced to root.
        let owner = std::fs::metadata(proc.join("environ")).unwrap().uid();
        if soft == Some("0") && owner == 0 {
            break true;
        }
        if std::time::Instant::now() > deadline {
            break false;
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    };
    let can_read = !is_root && std::fs::read(proc.join("environ")).is_ok();
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(closed && !can_read);
}

#[test]
fn an_executor_must_execute() {
    let mode = [
        "--allow-localhost",
        "--strict",
        "--class",
        "general",
        "--mode",
        "executor-backed",
    ];
    for (execution, code, message) in [
        (true, 0, "mode       executor-backed"),
        (false, 1, "executes nothing"),
    ] {
        let url = Server::start(Answer::Grpc { execution }).url("grpc");
        check(
            &mode,
            &[
                ("BAZEL_REMOTE_CACHE", &url),
                ("BAZEL_REMOTE_EXECUTOR", &url),
            ],
            code,
            message,
        );
    }
}

#[test]
fn wrong_input_is_64() {
    check(
        &["--mode", "shared-cache-baked"],
        &[],
        64,
        "Did you mean `shared-cache-backed`?",
    );
    check(&["--class", "genral"], &[], 64, "Did you mean `general`?");
    check(
        &["--contract-file", "nowhere.yml"],
        &[],
        64,
        "`nowhere.yml`",
    );
    check(&["--push-cache", "maybe"], &[], 64, "push-cache");
}

#[test]
fn attic_is_part_of_the_contract() {
    let mode = [("FLYWHEEL_EXPECTED_MODE", "compatibility-local-only")];
    check(
        &[],
        &[mode[0], ("ATTIC_SERVER", "${ATTIC_SERVER}")],
        1,
        "error      attic: `ATTIC_SERVER` holds a literal",
    );
    check(
        &[],
        &[mode[0], ("ATTIC_SERVER", "http://127.0.0.1:9")],
        1,
        "`allow-localhost`",
    );
    check(
        &["--allow-localhost"],
        &[mode[0], ("ATTIC_SERVER", "http://127.0.0.1:9")],
        0,
        "warning    attic:",
    );
}

#[test]
fn the_repository_declares_the_mode() {
    let run = Flywheel::new(&["cache-contract", "--mode", "compatibility-local-only"]);
    std::fs::write(
        run.path("flywheel.yml"),
        "shared-cache: {mode: executor-backed}\n",
    )
    .unwrap();
    let ran = run.run();
    assert_eq!(ran.code, 1);
    assert!(
        ran.stdout
            .contains("(declared: executor-backed, by flywheel.yml)"),
        "{}",
        ran.stdout
    );
}

#[test]
fn credentials_in_an_address_are_never_printed_or_written() {
    let server = Server::start(Answer::Http(404, ""));
    let url = format!(
        "http://me:{PLANTED_TOKEN}@127.0.0.1:{}/x?key={PLANTED_TOKEN}",
        server.port
    );
    for format in ["text", "json"] {
        let arguments = [
            "cache-contract",
            "--allow-localhost",
            "--format",
            format,
            "--bazelrc",
            "rc",
        ];
        let run = Flywheel::in_job(&arguments).env("BAZEL_REMOTE_CACHE", &url);
        assert_eq!(run.run().code, 0);
        assert_eq!(
            run.read("rc").lines().nth(1),
            Some(format!("build --remote_cache=http://127.0.0.1:{}/x", server.port).as_str())
        );
    }
    let broken = url.replace("http://", "ftp://");
    check(
        &["--allow-localhost"],
        &[("BAZEL_REMOTE_CACHE", &broken)],
        1,
        "its scheme is `ftp`",
    );
    let dead = format!("grpc://me:{PLANTED_TOKEN}@127.0.0.1:9");
    check(
        &["--allow-localhost"],
        &[("BAZEL_REMOTE_CACHE", &dead)],
        0,
        "grpc://127.0.0.1:9",
    );
}

#[test]
fn uploads_are_written_only_where_the_gate_allows_and_the_caller_asks() {
    let url = Server::start(Answer::Grpc { execution: false }).url("grpc");
    for (arguments, uploads) in [
        (&["--publish"][..], true),
        (&[], false),
        (&["--push-cache", "true"], false),
    ] {
        let arguments = [
            &["cache-contract", "--allow-localhost", "--bazelrc", "rc"],
            arguments,
        ]
        .concat();
        let run = Flywheel::new(&arguments).env("BAZEL_REMOTE_CACHE", &url);
        assert_eq!(run.run().code, 0);
        let line = format!(
            "build --remote_upload_local_results={uploads}\nbuild --disk_cache=\n\
             build --experimental_remote_cache_eviction_retries=5\n"
        );
        assert!(
            run.read("rc").contains(&line),
            "{arguments:?}: {}",
            run.read("rc")
        );
    }
}

#[test]
fn the_report_has_a_form_for_machines_and_the_step_has_outputs() {
    let url = Server::start(Answer::Grpc { execution: false }).url("grpc");
    let run = Flywheel::in_job(&[
        "cache-contract",
        "--allow-localhost",
        "--format",
        "json",
        "--strict",
        "--class",
        "kernel",
    ]);
    let run = run.env("BAZEL_REMOTE_CACHE", &url);
    let ran = run.run();
    let report: Value =
        serde_json::from_str(&ran.stdout).unwrap_or_else(|error| panic!("{error}: {}", ran.stdout));
    assert_eq!(report["holds"], true);
    assert_eq!(report["actual"], "shared-cache-backed");
    assert_eq!(report["endpoints"]["cache"]["url"], url);
    let outputs = run.read("GITHUB_OUTPUT");
    assert!(
        outputs.contains("holds<<")
            && outputs.contains("\ntrue\n")
            && outputs.contains("\nshared-cache-backed\n"),
        "{outputs}"
    );
    crate::reference::check_outputs("cache-contract", &run);
    assert!(
        run.read("GITHUB_STEP_SUMMARY")
            .starts_with("### ✅ the shared-cache contract holds, strict")
    );
}

/// The lines of a recipe of `examples/justfile`, with its variables and these parameters filled in. Tried with `just` by hand.
fn recipe(name: &str, parameters: &[(&str, &str)]) -> String {
    let text = include_str!("../../examples/justfile");
    let variables = text.lines().filter_map(|line| line.split_once(" := "));
    let variables = variables.map(|(name, value)| (name, value.trim_matches('"')));
    let lines = text.lines();
    let body = lines
        .skip_while(|line| !line.starts_with(&format!("{name} ")))
        .skip(1)
        .take_while(|line| line.starts_with("    "));
    let body: String = body.map(|line| format!("{}\n", line.trim())).collect();
    variables
        .chain(parameters.iter().copied())
        .fold(body, |body, (name, value)| {
            body.replace(&format!("{{{{ {name} }}}}"), value)
        })
}

/// Runs both recipes as `just bazel-build-cached` does, with a Bazel that writes down what it is called with; the exit code,
/// and what Bazel was called with, the lines of `--bazelrc` among it.
fn build_cached(push: &str, cache: Option<&str>) -> (i32, String) {
    let top = tempfile::tempdir().unwrap();
    let (bin, work) = (top.path().join("bin"), top.path().join("work"));
    for folder in [&bin, &work] {
        std::fs::create_dir(folder).unwrap();
    }
    std::os::unix::fs::symlink(crate::world::binary(), bin.join("flywheel")).unwrap();
    let bazel = "#!/bin/sh\n{ echo \"$*\"; cat \"${1#--bazelrc=}\"; } >called\n";
    std::fs::write(bin.join("bazel"), bazel).unwrap();
    std::fs::set_permissions(bin.join("bazel"), std::fs::Permissions::from_mode(0o755)).unwrap();
    let contract = "version: 1\nshared-cache:\n  allow-localhost: true\n";
    std::fs::write(work.join("flywheel.yml"), contract).unwrap();

    let check = recipe("cache-contract-strict", &[("push", push)]);
    let build = recipe("bazel-build-cached", &[("targets", "//...")]);
    assert!(check.starts_with("flywheel ") && build.starts_with("bazel "));
    let output = folders::isolate(&mut Command::new("/bin/sh"), top.path())
        .args(["-ec", &format!("{check}{build}")])
        .env("PATH", format!("{}:/usr/bin:/bin", bin.display()))
        .env("BAZEL_REMOTE_CACHE", cache.unwrap_or_default())
        .current_dir(&work)
        .output()
        .unwrap();
    let called = std::fs::read_to_string(work.join("called")).unwrap_or_default();
    (output.status.code().unwrap(), called)
}

#[test]
fn the_recipes_build_against_the_cache_and_never_without_it() {
    let cache = Server::start(Answer::Http(404, "")).url("http");
    let (code, called) = build_cached("false", Some(&cache));
    assert_eq!(code, 0, "{called}");
    for part in [
        "--bazelrc=.bazelrc.flywheel build //...\n",
        &format!("build --remote_cache={cache}\n"),
        "build --remote_upload_local_results=false\n",
        "build --disk_cache=\n",
    ] {
        assert!(called.contains(part), "no {part} in\n{called}");
    }
    let broken = Server::start(Answer::Http(500, "")).url("http");
    for cache in [None, Some(broken.as_str())] {
        assert_eq!(build_cached("false", cache), (1, String::new()));
    }
    // Asking is not enough: on a laptop the trust gate does not let it.
    let (code, called) = build_cached("auto", Some(&cache));
    assert!(
        code == 0 && called.contains("local_results=false"),
        "{called}"
    );
}
