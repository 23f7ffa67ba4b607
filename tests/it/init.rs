//! `init` through the front door: repositories as they are found, and the workflows that come of them.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_norway::Value;

use crate::world::{Flywheel, Ran, binary, folders};

const WORKFLOW: &str = "repository/.github/workflows/flywheel.yml";
const KEY: &str = "main:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=";

/// A run in a repository whose branch is `trunk` and whose files are these, on a host without Nix.
fn in_repository(files: &[(&str, &str)], arguments: &[&str]) -> Flywheel {
    let run = Flywheel::new(&[&["init", "repository"], arguments].concat());
    let run = run.env("PATH", "/nonexistent");
    let git = [(".git/HEAD", "ref: refs/heads/trunk\n")];
    for (name, text) in git.iter().chain(files) {
        let file = run.path("repository").join(name);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(file, text).unwrap();
    }
    run
}

fn ran(run: &Flywheel, code: i32) -> Ran {
    let ran = run.run();
    assert_eq!(ran.code, code, "{}\n{}", ran.stdout, ran.stderr);
    ran
}

/// The workflow that a run writes.
fn written(run: &Flywheel) -> String {
    ran(run, 0);
    run.read(WORKFLOW)
}

fn yaml(text: &str) -> Value {
    serde_norway::from_str(text).unwrap_or_else(|error| panic!("{error}:\n{text}"))
}

/// The steps of the only job.
fn steps(text: &str) -> Vec<Value> {
    yaml(text)["jobs"]["nix"]["steps"]
        .as_sequence()
        .unwrap()
        .clone()
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).to_owned()
}

/// Every input of every step of ours is one of the action's; returns the action.
fn uses_our_inputs(text: &str) -> String {
    let steps = steps(text);
    let ours = steps.iter().find_map(|step| {
        let uses = step["uses"]
            .as_str()?
            .strip_prefix("octo-org/flywheel/actions/")?;
        Some((
            uses.strip_suffix("@v0")?.to_owned(),
            step["with"].as_mapping()?.clone(),
        ))
    });
    let (action, given) = ours.unwrap_or_else(|| panic!("no step of ours:\n{text}"));
    let file = root().join("actions").join(&action).join("action.yml");
    let declared = yaml(&fs::read_to_string(file).unwrap());
    for (name, _) in given {
        let name = name.as_str().unwrap();
        assert!(
            declared["inputs"].get(name).is_some(),
            "{action} has no `{name}`"
        );
    }
    action
}

#[test]
fn what_the_repository_has_is_taken() {
    let there = "jobs:\n  a:\n    runs-on: [self-hosted, nix] # ours\n    steps:\n      - uses: octo-org/flywheel/actions/nix-job@v0\n        with:\n          attic-server: https://cache.example.org/team\n";
    let files = [("flake.nix", "{ }"), (".github/workflows/old.yml", there)];
    let run = in_repository(&files, &["--yes", "--public-key", KEY]);
    let told = ran(&run, 0);
    insta::assert_snapshot!(told.stderr, @r"
    found a flake; its outputs are not known (there is no Nix here), so that `checks` is taken
    found the default branch `trunk`
    next:
    1. Put the cache's token into the repository's secret `ATTIC_TOKEN` (Settings, Secrets and variables, Actions).
    2. Commit the file and open a pull request: that job reads. Merged, the job of the default branch publishes.
    ");
    let text = run.read(WORKFLOW);
    assert_eq!(uses_our_inputs(&text), "flake-checks");
    let whole = yaml(&text);
    assert_eq!(whole["jobs"]["nix"]["runs-on"], yaml("[self-hosted, nix]"));
    assert_eq!(whole["on"]["push"]["branches"], yaml("[trunk]"));
    let step = steps(&text).pop().unwrap();
    assert_eq!(
        step["with"]["attic-server"],
        yaml("https://cache.example.org/")
    );
    assert_eq!(step["with"]["attic-cache"], yaml("team"));
    assert_eq!(step["with"]["attic-public-key"], yaml(KEY));
    assert_eq!(
        step["env"]["ATTIC_TOKEN"],
        yaml("${{ secrets.ATTIC_TOKEN || '' }}")
    );
}

#[test]
fn every_kind_of_work_and_cache_is_a_workflow_with_inputs_that_exist() {
    let caches: [&[&str]; 3] = [
        &["--binary-cache", "github"],
        &["--binary-cache", "none"],
        &["--binary-cache", "http://[::1]:8080/main"],
    ];
    for (file, action) in [
        ("flake.nix", "flake-checks"),
        ("default.nix", "nix-job"),
        ("README", "nix-job"),
    ] {
        for cache in caches {
            let more = [&["--yes", "--actions", "octo-org/flywheel@v0"], cache].concat();
            let text = written(&in_repository(&[(file, "{ }")], &more));
            assert_eq!(uses_our_inputs(&text), action, "{text}");
            let published = text.contains("push-cache: auto");
            assert_eq!(published, cache != ["--binary-cache", "none"], "{text}");
            assert_eq!(
                text.contains("ATTIC_TOKEN"),
                text.contains("attic-server:"),
                "{text}"
            );
        }
    }
}

#[test]
fn actions_of_others_are_pinned_as_in_our_own_workflows() {
    let flags = [
        "--yes",
        "--actions",
        "octo-org/flywheel@v0",
        "--binary-cache",
        "github",
    ];
    let text = written(&in_repository(&[("flake.nix", "{ }")], &flags));
    let pins = |text: &str| {
        let lines = text
            .lines()
            .filter_map(|line| line.trim().strip_prefix("- uses: "));
        let others = lines.filter(|uses| uses.starts_with("actions/"));
        others.map(str::to_owned).collect::<BTreeSet<_>>()
    };
    let found = pins(&text);
    assert_eq!(found.len(), 3, "{text}");
    for pin in &found {
        let commit = pin.split(['@', ' ']).nth(1).unwrap();
        assert_eq!(commit.len(), 40, "{pin}");
    }
    let own = fs::read_to_string(root().join(".github/workflows/ci.yml")).unwrap();
    let checkout = |pins: &BTreeSet<String>| {
        pins.iter()
            .find(|pin| pin.starts_with("actions/checkout"))
            .cloned()
    };
    assert_eq!(checkout(&found), checkout(&pins(&own)));
}

#[test]
fn a_file_that_is_there_stays_unless_it_is_to_be_replaced() {
    let flags = ["--yes", "--actions", "octo-org/flywheel@v0"];
    let run = in_repository(&[(".github/workflows/flywheel.yml", "mine\n")], &flags);
    let refused = ran(&run, 64);
    assert!(
        refused.stderr.contains("`--output` is"),
        "{}",
        refused.stderr
    );
    assert!(refused.stderr.contains("`--force`"), "{}", refused.stderr);
    assert_eq!(run.read(WORKFLOW), "mine\n");
    let forced = [&flags[..], &["--force"]].concat();
    let run = in_repository(&[(".github/workflows/flywheel.yml", "mine\n")], &forced);
    assert!(written(&run).starts_with("# Written by `flywheel init`"));
}

#[test]
fn the_standard_output_is_the_workflow_alone() {
    let flags = [
        "--yes",
        "--actions",
        "octo-org/flywheel@v0",
        "--output",
        "-",
    ];
    let run = in_repository(&[("flake.nix", "{ }")], &flags);
    let printed = ran(&run, 0).stdout;
    assert_eq!(uses_our_inputs(&printed), "flake-checks");
    assert!(!run.path("repository/.github").exists());
}

#[test]
fn what_is_wrong_or_missing_is_named_and_nothing_is_written() {
    let wrong: [(&[&str], &str); 8] = [
        (&[], "`--actions` is needed"),
        (
            &["--actions", "flywheel@main"],
            "`--actions` must be OWNER/NAME@REF",
        ),
        (&["--actions", "a/b@main # x"], "`--actions` must be"),
        (&["--runs-on", "${{ x }}"], "`--runs-on` must be labels"),
        (
            &["--binary-cache", "https://cache.example.org/#a"],
            "`--binary-cache` has characters",
        ),
        (
            &["--binary-cache", "https://cache.example.org/a.b"],
            "`--binary-cache` must be the name of a cache",
        ),
        (&["--public-key", "key"], "`--public-key` is no public key"),
        (
            &["--actions", "a/b@c", "--public-key", KEY],
            "`--public-key` is the key of a cache with an address",
        ),
    ];
    for (flags, message) in wrong {
        let run = in_repository(&[], &[&["--yes"], flags].concat());
        let refused = ran(&run, 64);
        assert!(
            refused.stderr.contains(message),
            "{flags:?}: {}",
            refused.stderr
        );
        assert!(!run.path("repository/.github").exists(), "{flags:?}");
    }
    let outside = Flywheel::new(&["init", "--yes", "--output", "-"]);
    assert!(ran(&outside, 64).stderr.contains("in no git repository"));
}

#[test]
fn a_work_tree_has_the_branch_of_its_repository() {
    let flags = ["--yes", "--actions", "octo-org/flywheel@v0"];
    let files = [
        (
            ".git/refs/remotes/origin/HEAD",
            "ref: refs/remotes/origin/develop\n",
        ),
        (".git/worktrees/tree/HEAD", "ref: refs/heads/topic\n"),
        (".git/worktrees/tree/commondir", "../..\n"),
    ];
    let run = in_repository(&files, &[&flags[..], &["--output", "-"]].concat());
    let tree = run.path("tree");
    fs::create_dir(&tree).unwrap();
    let own = run.path("repository/.git/worktrees/tree");
    fs::write(tree.join(".git"), format!("gitdir: {}\n", own.display())).unwrap();
    let mut command = run.command();
    command.current_dir(&tree);
    let output = run.check(&command.output().unwrap());
    // The folder that the command line names is not there, seen from the work tree.
    assert_eq!(output.code, 64, "{}", output.stderr);
    let mut command = Command::new(binary());
    folders::isolate(&mut command, run.folder.path());
    command.args([&["init"], &flags[..], &["--output", "-"]].concat());
    command
        .env("PATH", "/nonexistent")
        .current_dir(&tree)
        .stdin(Stdio::null());
    let output = run.check(&command.output().unwrap());
    assert_eq!(output.code, 0, "{}", output.stderr);
    assert_eq!(
        yaml(&output.stdout)["on"]["push"]["branches"],
        yaml("[develop]")
    );
}

#[test]
fn somebody_at_a_terminal_is_asked_and_may_err() {
    let run = in_repository(&[("flake.nix", "{ }")], &[]);
    let mut command = Command::new("script");
    folders::isolate(&mut command, run.folder.path());
    let call = format!("{} init repository", binary().display());
    command.args(["--quiet", "--return", "--command", &call, "/dev/null"]);
    command.env("PATH", "/usr/bin:/bin").env("SHELL", "/bin/sh");
    command.current_dir(run.folder.path());
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    // The actions, once wrongly; the labels; Enter for the cache.
    let answers = "nonsense\nocto-org/flywheel@v0\nself-hosted\n\n";
    std::io::Write::write_all(child.stdin.as_mut().unwrap(), answers.as_bytes()).unwrap();
    let output = run.check(&child.wait_with_output().unwrap());
    assert_eq!(output.code, 0, "{}", output.stdout);
    assert!(
        output.stdout.contains("must be OWNER/NAME@REF"),
        "{}",
        output.stdout
    );
    assert!(
        output
            .stdout
            .contains("the runner's labels [ubuntu-24.04]: "),
        "{}",
        output.stdout
    );
    let text = run.read(WORKFLOW);
    assert_eq!(yaml(&text)["jobs"]["nix"]["runs-on"], yaml("self-hosted"));
    assert!(text.contains("embedded-cache:"), "{text}");
}
