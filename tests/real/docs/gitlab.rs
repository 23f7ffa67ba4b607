//! `gitlab/greedy.yml` as GitLab runs it: the inputs of `docs/start/gitlab.md` filled in, a clone of this checkout, and a
//! job of a pipeline for a push to the default branch.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;

use serde_norway::Value;

use super::{flake, pages};
use crate::bazel::{Answer, Server};
use crate::world::act::export;
use crate::world::cache::Cache;
use crate::world::{PATH, folders, must, need, root, with_private_nix};

/// The template with these inputs, those of the page, and its own defaults.
fn pipeline(flywheel: &str, inputs: &[(&str, &str)]) -> Value {
    let text = fs::read_to_string(root().join("gitlab/greedy.yml")).unwrap();
    let (head, body) = text.split_once("\n---\n").unwrap();
    let head: Value = serde_norway::from_str(head).unwrap();
    let page = pages()
        .into_iter()
        .find(|(name, _)| name == "docs/start/gitlab.md")
        .unwrap();
    let given = page
        .1
        .iter()
        .filter_map(|fence| serde_norway::from_str::<Value>(&fence.text).ok())
        .find_map(|yaml| yaml.get("include")?.get(0)?.get("inputs").cloned())
        .expect("the page shows the template");
    let mut body = body.to_owned();
    for (name, input) in head["spec"]["inputs"].as_mapping().unwrap() {
        let name = name.as_str().unwrap();
        let own = inputs.iter().find(|(input, _)| *input == name);
        let value = match (name, own) {
            ("flywheel", _) => flywheel.to_owned(),
            (_, Some((_, value))) => (*value).to_owned(),
            _ => text_of(given.get(name).or(input.get("default")).unwrap()),
        };
        body = body.replace(&format!("$[[ inputs.{name} ]]"), &value);
    }
    serde_norway::from_str(&body).unwrap()
}

fn text_of(value: &Value) -> String {
    match value {
        Value::Bool(value) => value.to_string(),
        value => value.as_str().unwrap().to_owned(),
    }
}

/// The variables of a job, those of the job that it extends first.
fn variables(pipeline: &Value, job: &str) -> Vec<(String, String)> {
    let base = pipeline[job]["extends"].as_str().unwrap_or_default();
    let of = |name: &str| pipeline.get(name)?.get("variables")?.as_mapping().cloned();
    let variables = of(base).into_iter().chain(of(job)).flatten();
    variables
        .map(|(name, value)| {
            let value = value.get("value").unwrap_or(&value).clone();
            (text_of(&name), text_of(&value))
        })
        .collect()
}

fn git(folder: &Path, home: &Path, arguments: &[&str]) -> String {
    let mut git = Command::new(need("git", "apt-get install git"));
    let who = [
        "-c",
        "user.name=octocat",
        "-c",
        "user.email=octocat@example.org",
    ];
    must(
        folders::isolate(&mut git, home)
            .env("PATH", PATH)
            .args(who)
            .args(arguments)
            .current_dir(folder),
    )
}

fn commit(folder: &Path, home: &Path) -> String {
    git(folder, home, &["init", "--quiet", "--initial-branch=main"]);
    // The binary of a debug build is large, and is not kept.
    git(folder, home, &["config", "core.compression", "0"]);
    git(folder, home, &["add", "--all", "--force"]);
    git(folder, home, &["commit", "--quiet", "--message=Begin"]);
    git(folder, home, &["rev-parse", "HEAD"]).trim().to_owned()
}

#[test]
fn the_template_of_gitlab_builds_publishes_and_loses_nothing() {
    let cache = Cache::start(&[]);
    let top = tempfile::tempdir().unwrap();
    let (source, project) = (top.path().join("flywheel"), top.path().join("builds/app"));
    export(&source);
    commit(&source, top.path());
    fs::create_dir_all(project.join("bin")).unwrap();
    fs::write(project.join("flake.nix"), flake()).unwrap();
    let busybox = need("busybox", "apt-get install busybox-static");
    fs::copy(busybox, project.join("bin/busybox")).unwrap();
    let commit = commit(&project, top.path());

    let pipeline = pipeline(&format!("file://{}", source.display()), &[]);
    let script = pipeline[".flywheel-job"]["script"].as_sequence().unwrap();
    let script: Vec<String> = script.iter().map(text_of).collect();
    let mut job = with_private_nix(&top.path().join("nix"), Path::new("/bin/sh"));
    folders::isolate(&mut job, top.path())
        .env("PATH", PATH)
        .args(["-e", "-c", &script.join("\n")])
        .envs(variables(&pipeline, "flywheel-build"))
        .envs([
            ("CI", "true"),
            ("GITLAB_CI", "true"),
            ("CI_PIPELINE_SOURCE", "push"),
            ("CI_PROJECT_PATH", "octo-group/app"),
            ("CI_DEFAULT_BRANCH", "main"),
            ("CI_COMMIT_BRANCH", "main"),
            ("CI_COMMIT_REF_NAME", "main"),
            ("CI_COMMIT_REF_PROTECTED", "true"),
            ("CI_COMMIT_SHA", &commit),
            ("CI_JOB_ID", "1"),
            ("CI_PROJECT_DIR", project.to_str().unwrap()),
            ("ATTIC_SERVER", &cache.url),
            ("ATTIC_PUBLIC_KEY", &cache.key),
            ("ATTIC_TOKEN", &cache.token),
        ])
        .current_dir(&project);
    let output = job.output().unwrap();
    let log = String::from_utf8_lossy(&output.stderr).into_owned()
        + &String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{log}");
    assert!(
        log.contains("3 built, 5 published, 5 verified, 0 lost"),
        "{log}"
    );
}

#[test]
fn an_image_without_git_is_named() {
    let pipeline = pipeline("https://gitlab.example.org/group/flywheel.git", &[]);
    let script = pipeline[".flywheel-job"]["script"].as_sequence().unwrap();
    let empty = tempfile::tempdir().unwrap();
    let output = folders::isolate(&mut Command::new("/bin/sh"), empty.path())
        .args(["-e", "-c", &text_of(&script[0])])
        .env("PATH", empty.path())
        .output()
        .unwrap();
    let log = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(69), "{log}");
    assert!(
        log.contains("has no `git`") && log.contains("`image`"),
        "{log}"
    );
}

/// Runs the job `flywheel-bazel` with a clone of `source` and a Bazel that writes down what it is called with; the exit code,
/// and that.
fn bazel_job(source: &Path, endpoint: &str) -> (Option<i32>, String) {
    let top = tempfile::tempdir().unwrap();
    let project = top.path().join("builds/app");
    fs::create_dir_all(top.path().join("bin")).unwrap();
    fs::create_dir_all(&project).unwrap();
    let contract = "version: 1\nshared-cache:\n  allow-localhost: true\n";
    fs::write(project.join("flywheel.yml"), contract).unwrap();
    let bazel = top.path().join("bin/bazel");
    let text = "#!/bin/sh\n{ echo \"$*\"; cat \"${1#--bazelrc=}\"; } >called\n";
    fs::write(&bazel, text).unwrap();
    fs::set_permissions(&bazel, fs::Permissions::from_mode(0o755)).unwrap();

    let inputs = [("bazel-targets", "//... -//slow/...")];
    let pipeline = pipeline(&format!("file://{}", source.display()), &inputs);
    let script = pipeline["flywheel-bazel"]["script"].as_sequence().unwrap();
    let script: Vec<String> = script.iter().map(text_of).collect();
    let output = folders::isolate(&mut Command::new("/bin/sh"), top.path())
        .args(["-e", "-c", &script.join("\n")])
        .env(
            "PATH",
            format!("{}:{PATH}", top.path().join("bin").display()),
        )
        .envs(variables(&pipeline, "flywheel-bazel"))
        .envs([("CI", "true"), ("GITLAB_CI", "true")])
        .env("CI_PROJECT_DIR", &project)
        .env("BAZEL_REMOTE_CACHE", endpoint)
        .current_dir(&project)
        .output()
        .unwrap();
    let called = fs::read_to_string(project.join("called")).unwrap_or_default();
    (output.status.code(), called)
}

#[test]
fn bazel_on_gitlab_reads_the_shared_cache_and_does_not_begin_without() {
    let top = tempfile::tempdir().unwrap();
    let source = top.path().join("flywheel");
    export(&source);
    commit(&source, top.path());
    let endpoint = Server::start(Answer::Http(404, "")).url("http");
    let (code, called) = bazel_job(&source, &endpoint);
    assert_eq!(code, Some(0), "{called}");
    assert!(
        called.contains(" build -- //... -//slow/...\n")
            && called.contains("local_results=false\n"),
        "{called}"
    );
    let broken = Server::start(Answer::Http(500, "")).url("http");
    assert_eq!(bazel_job(&source, &broken), (Some(1), String::new()));
}
