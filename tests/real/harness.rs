//! The two harnesses themselves, mostly tried with steps that need neither Nix nor a cache: they must report
//! what a step really did.

use std::ffi::OsStr;
use std::path::Path;
use std::time::Duration;

use rustix::process::Signal;

use crate::world::act::{CALLER, Caller};
use crate::world::runner::Step;
use crate::world::{PATH, folders};

/// A workflow that asks the binary for its version, and shows what a step is given.
const ASK: &str = r#"
on: [push, pull_request]
jobs:
  one:
    runs-on: ubuntu-latest
    steps:
      - uses: actions/checkout@v4
      - uses: octo-org/flywheel/actions/ask@main
        id: ask
        env:
          ATTIC_TOKEN: ${{ secrets.ATTIC_TOKEN || '' }}
      - id: say
        if: always()
        env:
          VERSION: ${{ steps.ask.outputs.version }}
        run: |
          echo "version: $VERSION, ref: $GITHUB_REF"
          echo "store: $(ls /nix)"
          if test -t 1; then echo "a terminal"; fi
          echo "path: $PATH"
          echo "::warning title=flywheel::look"
          echo "two" >>"$GITHUB_STEP_SUMMARY"
          exit 37
"#;

const ASK_ACTION: &str = r#"
name: ask
description: asks the binary beside it for its version
outputs:
  version:
    description: what it says
    value: ${{ steps.run.outputs.version }}
runs:
  using: composite
  steps:
    - id: run
      shell: bash
      run: |
        echo "version=$("$GITHUB_ACTION_PATH/../../dist/flywheel" --version)" >>"$GITHUB_OUTPUT"
        echo "token of ${#ATTIC_TOKEN} letters: $ATTIC_TOKEN"
        echo "one" >>"$GITHUB_STEP_SUMMARY"
"#;

#[test]
fn act_runs_the_launcher_of_this_checkout() {
    let caller = Caller::new(ASK)
        .with_action("ask", ASK_ACTION)
        .with_secret("ATTIC_TOKEN", "a-secret-of-the-repository");
    std::fs::create_dir_all(caller.nix()).unwrap();
    std::fs::write(caller.nix().join("only-here"), "").unwrap();

    let ran = caller.run(&caller.pull_request("stranger/app"));

    assert_eq!(
        (ran.code, ran.jobs["one"].as_str()),
        (1, "failure"),
        "{}",
        ran.log()
    );
    let ask = ran.step("one", "ask");
    assert_eq!(
        ask.outputs["version"],
        concat!("flywheel ", env!("CARGO_PKG_VERSION"))
    );
    assert_eq!(ask.log, "token of 26 letters: ***\n");
    assert_eq!(ask.summary, "one\n");
    let say = ran.step("one", "say");
    let version = env!("CARGO_PKG_VERSION");
    let log = format!(
        "version: flywheel {version}, ref: refs/pull/7/merge\nstore: only-here\npath: {PATH}\n::warning::look\n"
    );
    assert_eq!(
        (say.log.as_str(), say.result.as_str()),
        (log.as_str(), "failure")
    );
    assert_eq!(say.summary, "two\n");
    assert!(
        !std::path::Path::new("/nix/only-here").exists(),
        "the machine's own /nix was touched"
    );
    assert!(!caller.folder().join("private/secrets").exists());
}

#[test]
fn act_gives_a_job_the_facts_that_github_gives() {
    let caller = Caller::new(
        r#"
on: push
jobs:
  one:
    runs-on: ubuntu-latest
    steps:
      - id: facts
        run: |
          echo "$GITHUB_EVENT_NAME $GITHUB_REF $GITHUB_REF_TYPE $GITHUB_REF_PROTECTED $GITHUB_REPOSITORY"
          grep -c '"default_branch":"main"' "$GITHUB_EVENT_PATH"
"#,
    );
    for (git_ref, kind, protected) in [
        ("refs/heads/main", "branch", true),
        ("refs/heads/Main", "branch", false),
        ("refs/tags/v1", "tag", false),
    ] {
        let ran = caller.run(&caller.push(git_ref));
        assert_eq!(
            ran.step("one", "facts").log,
            format!("push {git_ref} {kind} {protected} {CALLER}\n1\n")
        );
        assert_eq!(ran.code, 0);
    }
}

/// The variables in the output of `env` that name no folder below `top`.
fn shared_in(log: &str, top: &Path) -> Vec<String> {
    let pairs = log.lines().filter_map(|line| line.split_once('='));
    folders::shared(
        pairs.map(|(name, value)| (OsStr::new(name), OsStr::new(value))),
        top,
    )
}

#[test]
fn a_step_is_given_no_folder_of_the_machine() {
    let step = Step::new("env");
    let report = step.run();
    assert_eq!(
        shared_in(&report.log, step.folder()),
        Vec::<String>::new(),
        "{}",
        report.log
    );

    let caller = Caller::new(
        r"
on: push
jobs:
  one:
    runs-on: ubuntu-latest
    steps:
      - id: variables
        run: env
",
    );
    let ran = caller.run(&caller.push("refs/heads/main"));
    let log = &ran.step("one", "variables").log;
    assert_eq!(
        shared_in(log, caller.folder()),
        Vec::<String>::new(),
        "{log}"
    );
}

#[test]
fn act_says_which_processes_lived_on() {
    let caller = Caller::new(
        r"
on: push
jobs:
  one:
    runs-on: ubuntu-latest
    steps:
      - run: setsid sleep 3141 </dev/null >/dev/null 2>&1 &
",
    );
    let ran = caller.run(&caller.push("refs/heads/main"));
    assert_eq!(ran.left_processes, ["sleep 3141"]);
}

/// What single-user Nix needs where there is neither a network nor a group of build users.
const NIX_CONFIG: &str =
    "experimental-features = nix-command flakes\nsubstituters =\nbuild-users-group =\n";

const FLAKE: &str = r#"
{
  outputs = { self }: {
    packages.x86_64-linux.default = derivation {
      name = "hello";
      system = "x86_64-linux";
      builder = "${builtins.path { path = ./bin; name = "bin"; }}/busybox";
      args = [ "sh" "-c" "echo hello > $out" ];
    };
  };
}
"#;

#[test]
fn act_builds_with_real_nix_in_a_store_that_can_be_forgotten() {
    let workflow = r#"
on: push
jobs:
  one:
    runs-on: ubuntu-latest
    steps:
      - uses: actions/checkout@v4
      - id: build
        run: |
          ls -d /nix/store/*-hello 2>/dev/null || echo "nothing yet"
          nix build && cat result
"#;
    let mut caller = Caller::new(workflow)
        .with_flake(FLAKE)
        .with_env("NIX_CONFIG", NIX_CONFIG);
    caller = caller.with_limit(Duration::from_secs(60));
    let push = caller.push("refs/heads/main");
    let built = |caller: &Caller| {
        let ran = caller.run(&push);
        assert_eq!(ran.code, 0, "{}", ran.log());
        assert!(
            ran.took < Duration::from_secs(60) && ran.step("one", "build").log.ends_with("hello\n"),
            "{}",
            ran.log()
        );
        ran.step("one", "build").log.contains("nothing yet")
    };
    assert!(built(&caller), "the first time");
    assert!(!built(&caller), "the store has it");
    caller.forget_store();
    assert!(built(&caller), "on an emptied store");
}

#[test]
fn the_runner_has_a_nix_of_its_own() {
    let store = tempfile::tempdir().unwrap();
    let step = Step::new(
        "echo text >text; nix-store --add text; ls /nix/store | grep -c text; cp text ../home",
    )
    .with_nix(store.path())
    .with_env("NIX_CONFIG", NIX_CONFIG)
    .with_limit(Duration::from_secs(60));
    let report = step.run();
    assert_eq!(report.code, 0, "{}", report.log);
    assert!(report.log.ends_with("-text\n1\n"), "{}", report.log);
    assert!(store.path().join("store").is_dir() && step.folder().join("home/text").is_file());
}

#[test]
fn the_runner_interrupts_the_entry_process() {
    let step = Step::new(
        "exec bash -c 'trap \"echo bye; exit 9\" INT; echo ready; while :; do read -t 1 <> <(:); done'",
    );
    let report = step.cancel_when(|log| log.contains("ready"));
    assert_eq!((report.code, report.log.as_str()), (9, "ready\nbye\n"));
    assert_eq!(
        report
            .signals
            .iter()
            .map(|(signal, _)| *signal)
            .collect::<Vec<_>>(),
        [Signal::INT]
    );
    assert!(!report.streams_held && report.orphans.is_empty());
    assert!(
        report.to_end.unwrap() < Duration::from_secs(5),
        "{report:?}"
    );
}

#[test]
fn the_runner_kills_what_ignores_it_and_then_its_orphans() {
    let step = Step::new(
        "trap '' INT TERM\n(sleep 2718 >/dev/null 2>&1 &)\ntouch \"$RUNNER_TEMP/left\"\necho ready\nsleep 3142",
    );
    let report = step.cancel_when(|log| log.contains("ready"));
    assert_eq!(report.code, 128 + 9);
    let signals: Vec<_> = report
        .signals
        .iter()
        .map(|(signal, at)| (*signal, at.as_millis() / 100))
        .collect();
    assert!(
        matches!(
            signals[..],
            [
                (Signal::INT, 0),
                (Signal::TERM, 75..80),
                (Signal::KILL, 100..108)
            ]
        ),
        "{signals:?}"
    );
    assert!(report.streams_held, "`sleep` inherited stdout");
    let mut orphans = report.orphans.clone();
    orphans.sort();
    assert_eq!(orphans, ["sleep 2718", "sleep 3142"]);
    assert_eq!(report.left_in_temp, ["left"]);
}

#[test]
fn the_runner_masks_and_reads_command_files() {
    let step = Step::new(
        "echo word1; echo ::add-mask::word1; echo a word1 b; echo k=v >>\"$GITHUB_OUTPUT\"; \
         read -r x || echo no input; test -t 1 || echo no terminal; exit 3",
    );
    let report = step.run();
    assert_eq!(
        (report.code, report.log.as_str()),
        (3, "word1\na *** b\nno input\nno terminal\n")
    );
    assert_eq!(report.files["GITHUB_OUTPUT"], "k=v\n");
    assert!(report.signals.is_empty() && report.left_in_temp.is_empty());
}
