//! What is remembered of an evaluation is what Nix itself would evaluate to.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::Value;
use sha2::{Digest as _, Sha256};

use super::by_hand::{forge, hexadecimal};
use super::{TOKEN, job};
use crate::nix_job::{Job, output};
use crate::world::cache::Cache;
use crate::world::github::GitHub;
use crate::world::{PATH, flywheel, folders, must, need, with_private_nix};

/// A repository whose outputs depend on each kind of thing that an evaluation can depend on.
const DEPENDING: &str = r#"{
  inputs.other = { url = "path:OTHER"; flake = false; };
  outputs = { self, other }: let
    make = name: text: derivation { inherit name text; system = "x86_64-linux"; builder = "/bin/sh"; };
  in {
    checks.x86_64-linux = {
      of-nothing = make "of-nothing" "";
      of-file = make "of-file" (builtins.readFile ./file);
      of-folder = make "of-folder" (toString (builtins.attrNames (builtins.readDir ./.)));
      of-tree = make "of-tree" "${self}";
      of-input = make "of-input" (builtins.readFile "${other}/file");
      of-rev = make "of-rev" (self.rev or "changed");
      of-short = make "of-short" (self.sourceInfo.shortRev or "changed");
      of-date = make "of-date" (toString self.lastModified);
      of-guarded = make "of-guarded" (toString (builtins.tryEval (self.rev or "changed")).value);
      of-presence = make "of-presence" (if self ? rev then "clean" else "changed");
      of-output = make "of-output" self.checks.x86_64-linux.of-rev.drvPath;
    };
  };
}
"#;

struct Repository {
    folder: tempfile::TempDir,
}

impl Repository {
    fn new() -> Self {
        let repository = Self {
            folder: tempfile::tempdir().unwrap(),
        };
        for name in ["app", "other", "home", "nix"] {
            fs::create_dir(repository.path(name)).unwrap();
        }
        fs::write(repository.path("other/file"), "other").unwrap();
        fs::write(repository.path("app/file"), "0").unwrap();
        let other = repository.path("other");
        fs::write(
            repository.path("app/flake.nix"),
            DEPENDING.replace("OTHER", other.to_str().unwrap()),
        )
        .unwrap();
        repository.git(&["init", "--quiet", "--initial-branch=main"]);
        repository.git(&["add", "--all"]);
        repository.nix(&["flake", "lock"]);
        repository.commit();
        repository
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.folder.path().join(name)
    }

    fn run(&self, program: &Path, arguments: &[&str]) -> Command {
        let mut command = with_private_nix(&self.path("nix"), program);
        folders::isolate(&mut command, self.folder.path())
            .args(arguments)
            .current_dir(self.path("app"))
            .env("PATH", PATH);
        let config =
            "experimental-features = nix-command flakes\nbuild-users-group =\nsubstituters =";
        command.env("NIX_CONFIG", config);
        command
    }

    fn nix(&self, arguments: &[&str]) -> String {
        must(&mut self.run(&need("nix", "apt-get install nix-bin"), arguments))
    }

    fn git(&self, arguments: &[&str]) {
        let mut command = Command::new(need("git", "apt-get install git"));
        command
            .args([
                "-c",
                "user.name=octocat",
                "-c",
                "user.email=octocat@example.org",
            ])
            .args(arguments);
        must(
            command
                .current_dir(self.path("app"))
                .env("HOME", self.path("home")),
        );
    }

    fn commit(&self) {
        self.git(&["add", "--all"]);
        self.git(&["commit", "--quiet", "--allow-empty", "--message=x"]);
    }

    /// The derivations by Nix itself.
    fn truth(&self) -> BTreeMap<String, String> {
        let list = "c: builtins.mapAttrs (n: d: d.drvPath) c.x86_64-linux";
        let text = self.nix(&[
            "eval",
            "--json",
            "--option",
            "eval-cache",
            "false",
            ".#checks",
            "--apply",
            list,
        ]);
        serde_json::from_str(&text).unwrap()
    }

    /// The derivations by `flake-checks`, and how many of them were remembered.
    fn checked(&self, more: &[&str]) -> (BTreeMap<String, String>, usize) {
        let lines = self.path("lines");
        let outputs = self.path("outputs");
        fs::write(&outputs, "").unwrap();
        let memory = self.path("memory");
        let arguments = [
            "flake-checks",
            "--build",
            "false",
            "--json-lines",
            lines.to_str().unwrap(),
        ];
        let memory = ["--evaluation-memory-folder", memory.to_str().unwrap()];
        let arguments = [&arguments[..], &memory, more].concat();
        let mut command = self.run(&flywheel(), &arguments);
        must(
            command
                .env("GITHUB_OUTPUT", &outputs)
                .env("GITHUB_ACTIONS", "true"),
        );
        let lines = fs::read_to_string(lines).unwrap();
        let lines = lines
            .lines()
            .map(|line| serde_json::from_str::<Value>(line).unwrap());
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        let derivations = lines.map(|line| {
            (
                text(&line["label"])
                    .trim_start_matches("x86_64-linux.")
                    .to_owned(),
                text(&line["derivation"]),
            )
        });
        let derivations = derivations.collect();
        let outputs = fs::read_to_string(outputs).unwrap();
        let remembered = outputs
            .lines()
            .skip_while(|line| !line.starts_with("remembered<<"))
            .nth(1)
            .unwrap();
        (derivations, remembered.parse().unwrap())
    }
}

/// Where nearly all outputs depend on the commit, none of those is remembered.
#[test]
fn what_depends_on_the_commit_is_not_remembered_however_much_of_it_there_is() {
    let repository = Repository::new();
    let flake = r#"{ outputs = { self }: let
      make = name: text: derivation { inherit name text; system = "x86_64-linux"; builder = "/bin/sh"; };
    in { checks.x86_64-linux = { of-nothing = make "of-nothing" ""; } // builtins.listToAttrs (builtins.genList (n: {
      name = "of-rev-${toString n}"; value = make "of-rev" "${toString n} ${self.rev}"; }) 40); }; }"#;
    fs::write(repository.path("app/flake.nix"), flake).unwrap();
    fs::remove_file(repository.path("app/flake.lock")).unwrap();
    let mut before = None;
    for remembered in [0, 1, 1] {
        repository.commit();
        let truth = repository.truth();
        assert_eq!(repository.checked(&[]), (truth.clone(), remembered));
        assert_ne!(
            before.replace(truth.clone()),
            Some(truth),
            "each commit has derivations of its own"
        );
    }
}

/// Whatever is edited, a remembered derivation is the one that Nix would evaluate.
#[test]
fn the_evaluation_memory_is_never_stale() {
    let repository = Repository::new();
    let seed = fastrand::u64(..);
    let mut random = fastrand::Rng::with_seed(seed);
    let (mut warm, mut most) = (0, 0);
    for step in 0..24 {
        let edit = random.u8(0..8);
        let content = random.u8(0..3).to_string();
        match edit {
            0 => fs::write(repository.path("app/file"), &content).unwrap(),
            1 => fs::write(repository.path("app/untracked"), &content).unwrap(),
            2 => repository.commit(),
            3 => repository.git(&["commit", "--quiet", "--allow-empty", "--message=x"]),
            4 => repository.git(&["add", "--all"]),
            5 => {
                fs::write(repository.path("other/file"), &content).unwrap();
                repository.nix(&["flake", "lock", "--update-input", "other"]);
            }
            6 => repository.git(&["checkout", "--quiet", "--force", "HEAD"]),
            _ => repository.git(&["clean", "--quiet", "--force"]),
        }
        let truth = repository.truth();
        let (checked, remembered) = repository.checked(&[]);
        assert_eq!(
            checked, truth,
            "seed {seed}, step {step}, edit {edit}, {remembered} remembered"
        );
        warm += usize::from(remembered > 0);
        most = most.max(remembered);
    }
    // In a tree with uncommitted changes, only the date comes from the commit.
    assert!(warm > 0 && most <= 10, "seed {seed}: {warm} {most}");
    // Another commit of the same tree. What depends on the commit is never remembered: `of-rev`, `of-short`,
    // `of-date`, `of-guarded`, `of-output`.
    repository.commit();
    repository.checked(&[]);
    repository.commit();
    assert_eq!(repository.checked(&[]), (repository.truth(), 6));
    assert_eq!(
        repository.checked(&["--evaluation-memory", "off"]),
        (repository.truth(), 0)
    );
    assert_eq!(
        repository.checked(&["--evaluation-memory", "verify"]),
        (repository.truth(), 0)
    );
}

/// A job that may publish believes only what carries a seal by its token, which a job of a pull request lacks.
#[test]
fn a_job_that_others_rely_on_believes_only_its_own_seal() {
    let flake = r#"{ outputs = { self }: let
      run = name: script: derivation { inherit name; system = "x86_64-linux"; builder = "/bin/sh"; args = [ "-c" script ]; };
    in { checks.x86_64-linux = { good = run "good" "echo > $out"; bad = run "bad" "exit 1"; }; }; }"#;
    let (cache, github) = (Cache::start(&["--private"]), GitHub::start(TOKEN, false));
    let job = job(&cache, &github, flake)
        .with_env("FLYWHEEL_CHECKS", "false")
        .with_env(
            "NIX_CONFIG",
            "sandbox = false\nbuild-users-group =\nsubstituters =",
        );
    let memory = job.step.folder().join("memory");
    let job = job.with_env(
        "FLYWHEEL_EVALUATION_MEMORY_FOLDER",
        memory.to_str().unwrap(),
    );
    let run = |job: &Job| {
        let report = job.step.run();
        assert_eq!(report.code, 1, "{}", report.log);
        assert_eq!(output(&report, "failed"), "1", "{}", report.log);
        (output(&report, "remembered"), report.log)
    };
    assert_eq!(run(&job).0, "0");
    assert_eq!(run(&job).0, "2", "what it wrote itself is believed");
    let file = fs::read_dir(&memory)
        .unwrap()
        .next()
        .unwrap()
        .unwrap()
        .path();
    forge(&file, &|body| hexadecimal(&Sha256::digest(body)));
    let (remembered, log) = run(&job);
    assert_eq!(remembered, "0", "{log}");
    assert!(
        log.contains("was not written by a job with this job's `ATTIC_TOKEN`"),
        "{log}"
    );
    let (remembered, log) = run(&job.with_env("ATTIC_TOKEN", ""));
    assert_eq!(remembered, "0", "{log}");
    assert!(
        log.contains("believes only what is sealed with its `ATTIC_TOKEN`"),
        "{log}"
    );
}
