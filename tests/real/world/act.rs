//! Whole workflows under real act, in host mode and offline, with the actions of this checkout and a
//! repository that plays the caller. Here act's mistakes about the facts of a job are corrected.
//! Act cannot cancel as GitHub does: for that there is `runner`.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tempfile::TempDir;

use super::{PATH, flywheel, folders, must, need, processes, root, with_private_nix};

/// The name that a workflow calls the actions of this checkout by.
pub const ACTIONS: &str = "octo-org/flywheel";
/// The repository that plays the caller.
pub const CALLER: &str = "octo-org/app";
/// The binary's name in `dist/`.
pub const BINARY: &str = "flywheel-x86_64-linux";
/// The `bash` and the `sh` that act finds. In a mount namespace of the step's own it gives back the terminals that were
/// taken from act, because Nix needs them to build, and then becomes the real shell. A step may have put folders before
/// theirs on `PATH`.
const SHELL: &str = r#"#!/bin/sh
own=${0%/*}
PATH=${PATH%%"$own":*}${PATH#*"$own":}
exec unshare --mount --propagation private sh -c 'umount /dev/ptmx && exec "$0" "$@"' "${0##*/}" "$@"
"#;

/// Stands in for the checkout of another repository.
const CHECKOUT: &str = r#"
name: checkout
description: Copies the actions under test.
inputs:
  repository: { description: which, required: true }
  ref: { description: what, required: true }
  path: { description: where, required: true }
  persist-credentials: { description: no, required: false }
runs:
  using: composite
  steps:
    - shell: bash
      env: { WHICH: "${{ inputs.repository }}@${{ inputs.ref }}", WHERE: "${{ inputs.path }}" }
      run: |
        [ "$WHICH" = octo-org/flywheel@main ]
        cp -r "$FLYWHEEL_CHECKOUT" "$GITHUB_WORKSPACE/$WHERE"
"#;

/// Stand-ins for the halves of `actions/cache`: a folder is carried from run to run.
const RESTORE: &str = r#"
name: restore
description: Brings the folder back.
inputs: { path: { description: where }, key: { description: which }, restore-keys: { description: or which } }
runs:
  using: composite
  steps:
    - shell: sh
      env: { FOLDER: "${{ inputs.path }}" }
      run: if [ -d "$CARRIED/folder" ]; then mkdir -p "$FOLDER" && cp -a "$CARRIED/folder/." "$FOLDER/"; fi
"#;
const SAVE: &str = r#"
name: save
description: Takes the folder along.
inputs: { path: { description: where }, key: { description: which } }
runs:
  using: composite
  steps:
    - shell: sh
      env: { FOLDER: "${{ inputs.path }}" }
      run: rm -rf "$CARRIED/folder" && cp -a "$FOLDER" "$CARRIED/folder"
"#;

/// A repository with a workflow, and a runner host of its own around it.
pub struct Caller {
    folder: TempDir,
    secrets: BTreeMap<String, String>,
    /// The variables of the repository, `vars`.
    variables: BTreeMap<String, String>,
    environment: BTreeMap<String, String>,
    /// Other repositories, by `owner/name@ref`, and where they lie.
    repositories: BTreeMap<String, PathBuf>,
    limit: Duration,
    store: u32,
}

/// What starts a workflow: the event's name, its payload, and the ref that GitHub would give the job.
#[derive(Clone, Debug)]
pub struct Event {
    /// `push`, `pull_request`, …
    pub name: String,
    /// What stands in the file at `GITHUB_EVENT_PATH`.
    pub payload: Value,
    /// `GITHUB_REF`.
    pub git_ref: String,
    /// `GITHUB_REF_PROTECTED`.
    pub protected: bool,
}

/// The result of one step. Keys of `Ran::steps` are `job/step`, by their ids in the workflow.
#[derive(Clone, Debug, Default)]
pub struct Step {
    /// `success`, `failure` or `skipped`; empty if it never began.
    pub result: String,
    pub outputs: BTreeMap<String, String>,
    /// What it added to the job summary.
    pub summary: String,
    /// What it printed, masks applied.
    pub log: String,
}

/// The result of a workflow.
#[derive(Debug)]
pub struct Ran {
    /// The exit status of act: 0 only if every job succeeded.
    pub code: i32,
    /// `success` or `failure` by job id.
    pub jobs: BTreeMap<String, String>,
    pub steps: BTreeMap<String, Step>,
    /// Everything that act wrote, raw: one JSON object per line.
    pub raw: String,
    pub took: Duration,
    /// The command lines that lived on after the run; they have been killed.
    pub left_processes: Vec<String>,
}

impl Ran {
    pub fn step(&self, job: &str, step: &str) -> &Step {
        let name = format!("{job}/{step}");
        self.steps
            .get(&name)
            .unwrap_or_else(|| panic!("no step `{name}` in:\n{}", self.log()))
    }

    /// What all steps printed, in order of their names.
    pub fn log(&self) -> String {
        let steps = self.steps.iter();
        let mut log: String = steps
            .map(|(name, step)| format!("--- {name}: {}\n{}", step.result, step.log))
            .collect();
        if self.steps.is_empty() {
            log.push_str(&self.raw);
        }
        log
    }
}

impl Caller {
    /// A repository whose only workflow is `workflow`; it calls our actions as
    /// `octo-org/flywheel/actions/…@main`.
    pub fn new(workflow: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        for name in ["home", "state", "cache", "actions-cache", "private"] {
            fs::create_dir(folder.path().join(name)).unwrap();
        }
        export(&folder.path().join("export"));
        fs::create_dir(folder.path().join("shell")).unwrap();
        for name in ["bash", "sh"] {
            let shell = folder.path().join("shell").join(name);
            fs::write(&shell, SHELL).unwrap();
            fs::set_permissions(shell, fs::Permissions::from_mode(0o755)).unwrap();
        }
        let caller = Self {
            folder,
            secrets: BTreeMap::new(),
            variables: BTreeMap::new(),
            environment: BTreeMap::new(),
            repositories: BTreeMap::new(),
            limit: Duration::from_secs(180),
            store: 0,
        };
        caller.with_file(".github/workflows/ci.yml", workflow)
    }

    /// Adds a file to the repository.
    pub fn with_file(self, name: &str, text: &str) -> Self {
        let file = self.repository().join(name);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(file, text).unwrap();
        self
    }

    /// Adds an action beside those of this checkout, as `actions/<name>/action.yml`.
    pub fn with_action(self, name: &str, text: &str) -> Self {
        let folder = self.folder.path().join("export/actions").join(name);
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("action.yml"), text).unwrap();
        self
    }

    /// Has a checkout of another repository, by the action of this name, give the actions of this
    /// checkout: there is no network to fetch them by.
    pub fn with_checkout(mut self, action: &str) -> Self {
        let folder = self.folder.path().join("checkout");
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("action.yml"), CHECKOUT).unwrap();
        self.repositories.insert(action.to_owned(), folder);
        let export = self.folder.path().join("export");
        self.with_env("FLYWHEEL_CHECKOUT", export.to_str().unwrap())
    }

    /// Has another repository, named as in `uses: owner/name/…@ref` without the path, hold these files.
    pub fn with_repository(mut self, name: &str, files: &[(&str, &str)]) -> Self {
        let folder = self.folder.path().join("repositories").join(name);
        for (file, text) in files {
            let file = folder.join(file);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, text).unwrap();
        }
        self.repositories.insert(name.to_owned(), folder);
        self
    }

    /// Has the halves of GitHub's cache, such as `actions/cache@v4`, keep what they are given in this folder.
    pub fn with_folder_cache(self, name: &str, carried: &Path) -> Self {
        let files = [("restore/action.yml", RESTORE), ("save/action.yml", SAVE)];
        let caller = self.with_repository(name, &files);
        caller.with_env("CARRIED", carried.to_str().unwrap())
    }

    /// Adds a variable of the repository, which workflows read as `vars`.
    pub fn with_variable(mut self, name: &str, value: &str) -> Self {
        self.variables.insert(name.to_owned(), value.to_owned());
        self
    }

    /// Adds a flake, and beside it the static busybox that its derivations can build with, as `./bin`.
    pub fn with_flake(self, flake: &str) -> Self {
        let busybox = need("busybox", "apt-get install busybox-static");
        let caller = self.with_file("flake.nix", flake);
        let folder = caller.repository().join("bin");
        fs::create_dir_all(&folder).unwrap();
        fs::copy(busybox, folder.join("busybox")).unwrap();
        caller
    }

    /// Adds a secret of the repository.
    pub fn with_secret(mut self, name: &str, value: &str) -> Self {
        assert!(!value.contains('\''), "the secret file quotes with it");
        self.secrets.insert(name.to_owned(), value.to_owned());
        self
    }

    /// Sets a variable for every step, as the runner's own environment does.
    pub fn with_env(mut self, name: &str, value: &str) -> Self {
        self.environment.insert(name.to_owned(), value.to_owned());
        self
    }

    /// How long a run may take before it is killed and the test fails; three minutes by default.
    pub fn with_limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    pub fn repository(&self) -> PathBuf {
        self.folder.path().join("repository")
    }

    /// The folder that is `/nix` during a run.
    pub fn nix(&self) -> PathBuf {
        self.folder.path().join(format!("nix{}", self.store))
    }

    /// The folder that everything a run may write to lies below; its `private` folder is not the run's.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Gives the next run an empty `/nix` and an empty home, as a new runner has.
    pub fn forget_store(&mut self) {
        self.store += 1;
        for name in ["home", "state", "cache"] {
            fs::remove_dir_all(self.folder.path().join(name)).unwrap();
            fs::create_dir(self.folder.path().join(name)).unwrap();
        }
    }

    /// Commits what is in the repository; the commit's hash.
    pub fn commit(&self) -> String {
        let repository = self.repository();
        let git = |arguments: &[&str]| {
            let mut command = Command::new(need("git", "apt-get install git"));
            command.args([
                "-c",
                "user.name=octocat",
                "-c",
                "user.email=octocat@example.org",
            ]);
            must(
                command
                    .args(arguments)
                    .current_dir(&repository)
                    .env("HOME", self.folder.path().join("home")),
            )
        };
        git(&["init", "--quiet", "--initial-branch=main"]);
        git(&["add", "--all"]);
        git(&["commit", "--quiet", "--allow-empty", "--message=Try it"]);
        git(&["rev-parse", "HEAD"]).trim().to_owned()
    }

    /// A push to `git_ref`, with the head commit as its `after`.
    pub fn push(&self, git_ref: &str) -> Event {
        let after = self.commit();
        let before = "1".repeat(40);
        let payload = json!({ "ref": git_ref, "before": before, "after": after, "created": false, "deleted": false });
        Event::new("push", payload, git_ref)
    }

    /// A pull request from a branch of `head` (`CALLER` itself, or a fork) to the default branch.
    pub fn pull_request(&self, head: &str) -> Event {
        let sha = self.commit();
        let payload = json!({
            "action": "synchronize",
            "number": 7,
            "pull_request": {
                "number": 7,
                "head": { "ref": "topic", "sha": sha, "repo": { "full_name": head, "fork": head != CALLER } },
                "base": { "ref": "main", "sha": "1".repeat(40), "repo": { "full_name": CALLER, "fork": false } },
            },
        });
        Event::new("pull_request", payload, "refs/pull/7/merge")
    }

    pub fn run(&self, event: &Event) -> Ran {
        self.commit();
        let private = self.folder.path().join("private");
        fs::write(private.join("event.json"), event.payload.to_string()).unwrap();
        let secrets: String = self
            .secrets
            .iter()
            .map(|(name, value)| format!("{name}='{value}'\n"))
            .collect();
        fs::write(private.join("secrets"), secrets).unwrap();
        let marker = format!("ACT_TEST_RUN={:032x}", fastrand::u128(..));

        let mut command = self.act(event, &private, &marker);
        let (stdout, stderr) = (private.join("stdout"), private.join("stderr"));
        command.stdin(Stdio::null());
        command
            .stdout(File::create(&stdout).unwrap())
            .stderr(File::create(&stderr).unwrap());
        let started = Instant::now();
        let mut child = command.process_group(0).spawn().unwrap();
        let status = processes::ended(&mut child, self.limit);
        let took = started.elapsed();
        if status.is_none() {
            let _ = kill_process_group(Pid::from_child(&child), Signal::KILL);
            child.wait().unwrap();
        }
        // GitHub ends every process of a job with the job.
        let left = processes::kill_with_variable(&marker);
        let mut raw = fs::read_to_string(stdout).unwrap();
        raw.push_str(&fs::read_to_string(stderr).unwrap());
        for file in ["secrets", "event.json", "stdout", "stderr"] {
            fs::remove_file(private.join(file)).unwrap();
        }
        let status =
            status.unwrap_or_else(|| panic!("act was killed after {:?}:\n{raw}", self.limit));
        let left_processes = left
            .into_iter()
            .map(|process| process.command_line)
            .collect();
        let mut ran = Ran {
            code: status.code().unwrap_or(-1),
            jobs: BTreeMap::new(),
            steps: BTreeMap::new(),
            raw,
            took,
            left_processes,
        };
        read_log(&mut ran);
        ran
    }

    /// The command line. Secrets go by file: an argument could be read by every process.
    fn act(&self, event: &Event, private: &Path, marker: &str) -> Command {
        let below = |name: &str| self.folder.path().join(name);
        let act = need("act", "scripts/bootstrap.sh tools installs it");
        // Where act can open no terminal, it gives its steps plain pipes, as GitHub's runner does. With a terminal
        // it does not wait for the last output of a step that fails.
        let mut command = with_private_nix(&self.nix(), Path::new("/bin/sh"));
        command
            .args([
                "-c",
                "mount --bind /dev/null /dev/ptmx && exec \"$0\" \"$@\"",
            ])
            .arg(act);
        command
            .arg(&event.name)
            .args(["--json", "--action-offline-mode", "--no-cache-server"]);
        for label in ["ubuntu-latest", "self-hosted", "nix"] {
            command.arg("-P").arg(format!("{label}=-self-hosted"));
        }
        command.arg("--workflows").arg(".github/workflows/ci.yml");
        command.arg("--eventpath").arg(private.join("event.json"));
        command.arg("--secret-file").arg(private.join("secrets"));
        command
            .arg("--local-repository")
            .arg(format!("{ACTIONS}@main={}", below("export").display()));
        for (name, folder) in &self.repositories {
            command
                .arg("--local-repository")
                .arg(format!("{name}={}", folder.display()));
        }
        command
            .arg("--action-cache-path")
            .arg(below("actions-cache"));
        command.args(["--actor", "octocat"]);
        for (name, value) in &self.variables {
            command.arg("--var").arg(format!("{name}={value}"));
        }
        for (name, value) in event.facts() {
            command.arg("--env").arg(format!("{name}={value}"));
        }
        command.arg("--env").arg(marker);
        // Act gives its steps an environment of its own making, in which these would be missing.
        for (name, folder) in folders::variables(self.folder.path()) {
            command
                .arg("--env")
                .arg(format!("{name}={}", folder.display()));
        }
        for (name, value) in &self.environment {
            command.arg("--env").arg(format!("{name}={value}"));
        }
        folders::isolate(&mut command, self.folder.path())
            .current_dir(self.repository())
            .env("PATH", format!("{}:{PATH}", below("shell").display()))
            .env("XDG_CACHE_HOME", below("cache"));
        command
    }
}

impl Event {
    /// An event of the caller's repository, which is added to the payload, as GitHub adds it.
    pub fn new(name: &str, mut payload: Value, git_ref: &str) -> Self {
        payload["repository"] = json!({ "full_name": CALLER, "name": "app", "default_branch": "main", "owner": { "login": "octo-org" } });
        payload["sender"] = json!({ "login": "octocat" });
        Self {
            name: name.to_owned(),
            payload,
            git_ref: git_ref.to_owned(),
            protected: git_ref == "refs/heads/main",
        }
    }

    /// The facts that GitHub's runner gives and act leaves out or gets wrong.
    fn facts(&self) -> Vec<(&'static str, String)> {
        let kind = if self.git_ref.starts_with("refs/tags/") {
            "tag"
        } else {
            "branch"
        };
        vec![
            ("GITHUB_REF", self.git_ref.clone()),
            ("GITHUB_REF_TYPE", kind.to_owned()),
            ("GITHUB_REF_PROTECTED", self.protected.to_string()),
            ("GITHUB_REPOSITORY", CALLER.to_owned()),
            ("GITHUB_REPOSITORY_OWNER", "octo-org".to_owned()),
            ("GITHUB_TRIGGERING_ACTOR", "octocat".to_owned()),
            (
                "GITHUB_WORKFLOW_REF",
                format!("{CALLER}/.github/workflows/ci.yml@{}", self.git_ref),
            ),
            ("RUNNER_ENVIRONMENT", "self-hosted".to_owned()),
        ]
    }
}

/// This checkout as GitHub would hand it to a job: what Git tracks, with the binary under test in `dist/`.
pub fn export(folder: &Path) {
    fs::create_dir(folder).unwrap();
    let git = need("git", "apt-get install git");
    let mut list = Command::new(git);
    list.args(["ls-files", "--cached", "--others", "--exclude-standard"])
        .current_dir(root());
    for name in must(&mut list).lines() {
        let (from, to) = (root().join(name), folder.join(name));
        // A file that was deleted and is not yet committed is still listed.
        if from.is_file() && !name.starts_with("dist/flywheel-") {
            fs::create_dir_all(to.parent().unwrap()).unwrap();
            fs::copy(from, to).unwrap();
        }
    }
    let binary = flywheel();
    if fs::read(&binary).unwrap().starts_with(b"#!") {
        // A script is the launcher, so the committed binary itself is under test, with the committed sum.
        fs::copy(
            binary.with_file_name(BINARY),
            folder.join("dist").join(BINARY),
        )
        .unwrap();
    } else {
        put_binary(&binary, &folder.join("dist"));
    }
}

/// Puts a binary where the launcher looks for it, with its sum.
pub fn put_binary(binary: &Path, dist: &Path) {
    let bytes = fs::read(binary).unwrap();
    let sum: String = Sha256::digest(&bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    fs::write(dist.join(BINARY), bytes).unwrap();
    fs::set_permissions(dist.join(BINARY), fs::Permissions::from_mode(0o755)).unwrap();
    fs::write(dist.join("SHA256SUMS"), format!("{sum}  {BINARY}\n")).unwrap();
}

/// Sorts act's JSON lines by step. A composite's inner step counts as the step that uses it.
fn read_log(ran: &mut Ran) {
    for line in ran.raw.lines() {
        let Ok(line) = serde_json::from_str::<Value>(line) else {
            continue;
        };
        let text = |key: &str| line[key].as_str().unwrap_or_default();
        let job = text("jobID").to_owned();
        if !text("jobResult").is_empty() {
            ran.jobs.insert(job.clone(), text("jobResult").to_owned());
        }
        let Some(ids) = line["stepID"].as_array() else {
            continue;
        };
        let Some(step) = ids.first().and_then(Value::as_str) else {
            continue;
        };
        if text("stage") != "Main" {
            continue;
        }
        let step = ran.steps.entry(format!("{job}/{step}")).or_default();
        match text("command") {
            // Act repeats a composite's results for the step that uses it: those are the step's own.
            "set-output" if ids.len() == 1 => {
                step.outputs
                    .insert(text("name").to_owned(), text("arg").to_owned());
            }
            "summary" if ids.len() == 1 => step.summary = text("content").to_owned(),
            "" if line["raw_output"] == true => step.log.push_str(text("msg")),
            "notice" | "warning" | "error" | "group" | "endgroup" => {
                step.log
                    .push_str(&format!("::{}::{}\n", text("command"), text("arg")));
            }
            _ => {}
        }
        if ids.len() == 1 && !text("stepResult").is_empty() {
            step.result = text("stepResult").to_owned();
        }
    }
}
