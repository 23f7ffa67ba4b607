//! The actions as a workflow uses them, under real act with real Nix and a real cache.

use std::path::Path;
use std::time::Duration;

use crate::world::act::{CALLER, Caller, Event, Ran};
use crate::world::cache::Cache;
use crate::world::flake::FLAKE;
use crate::world::port::Port;

/// The usage in the README, except for the command.
fn workflow(command: &str, push_cache: &str, more: &str) -> String {
    format!(
        r#"
on: [push, pull_request]
jobs:
  build:
    runs-on: ubuntu-latest
    steps:
      - uses: actions/checkout@v4
      - uses: octo-org/flywheel/actions/nix-job@main
        id: nix
        env:
          ATTIC_TOKEN: ${{{{ secrets.ATTIC_TOKEN || '' }}}}
        with:
          attic-public-key: ${{{{ vars.ATTIC_PUBLIC_KEY || '' }}}}
          command: {command}
          push-cache: {push_cache}
{more}
"#
    )
}

/// As the README asks for it.
const ON_MAIN: &str = "${{ github.event_name == 'push' && github.ref == 'refs/heads/main' && secrets.ATTIC_TOKEN != '' && 'true' || 'false' }}";

fn caller(cache: &Cache, workflow: &str) -> Caller {
    Caller::new(workflow)
        .with_flake(FLAKE)
        .with_secret("ATTIC_TOKEN", &cache.token)
        .with_env("ATTIC_SERVER", &cache.url)
        .with_env("ATTIC_PUBLIC_KEY", &cache.key)
}

fn run(caller: &Caller, event: &Event) -> Ran {
    let ran = caller.run(event);
    assert_eq!(ran.left_processes, Vec::<String>::new(), "{}", ran.log());
    ran
}

/// Asserts that outputs of the step have these values.
fn outputs(ran: &Ran, wanted: &[(&str, &str)]) {
    let step = ran.step("build", "nix");
    for (name, value) in wanted {
        let found = step.outputs.get(*name).map(String::as_str);
        assert_eq!(
            found,
            Some(*value),
            "output {name} of:\n{}\n{:?}",
            ran.log(),
            step.outputs
        );
    }
}

/// Asserts that the text of `secret` stands in nothing that the run wrote or printed.
fn nothing_holds(secret: &str, ran: &Ran, folder: &Path) {
    // GitHub's runner takes the lines that mask out of the log; act repeats them.
    let shown = ran.raw.lines().filter(|line| !line.contains("add-mask"));
    for line in shown {
        assert!(!line.contains(secret), "the token is in the log: {line}");
    }
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap().flatten() {
            let kind = entry.file_type().unwrap();
            if kind.is_dir() {
                folders.push(entry.path());
            } else if kind.is_file() {
                let bytes = std::fs::read(entry.path()).unwrap();
                let found = bytes
                    .windows(secret.len())
                    .any(|window| window == secret.as_bytes());
                assert!(!found, "the token is in {}", entry.path().display());
            }
        }
    }
}

#[test]
fn a_push_publishes_and_an_empty_runner_then_builds_nothing() {
    let cache = Cache::start(&["--private"]);
    let mut caller = caller(&cache, &workflow("nix build .#default", ON_MAIN, ""));

    let first = run(&caller, &caller.push("refs/heads/main"));
    assert_eq!(first.code, 0, "{}", first.log());
    outputs(
        &first,
        &[
            ("outcome", "success"),
            ("trust", "may-publish"),
            ("cache-state", "attached"),
        ],
    );
    outputs(
        &first,
        &[
            ("built", "3"),
            ("substituted", "0"),
            ("lost", "0"),
            ("exit-code", "0"),
        ],
    );
    let step = first.step("build", "nix");
    assert_eq!(
        step.outputs["published"],
        step.outputs["verified"],
        "{}",
        first.log()
    );
    assert!(
        step.summary.contains("0 lost") && step.summary.contains("3 built"),
        "{}",
        step.summary
    );
    for name in ["app", "lib", "base"] {
        assert!(
            cache.names().contains(&name.to_owned()),
            "{name} is not among {:?}",
            cache.names()
        );
    }
    nothing_holds(&cache.token, &first, caller.folder());

    caller.forget_store();
    let second = run(&caller, &caller.push("refs/heads/main"));
    assert_eq!(second.code, 0, "{}", second.log());
    outputs(
        &second,
        &[
            ("outcome", "success"),
            ("built", "0"),
            ("published", "0"),
            ("lost", "0"),
        ],
    );
    assert!(
        second.step("build", "nix").outputs["substituted"] != "0",
        "{}",
        second.log()
    );
    nothing_holds(&cache.token, &second, caller.folder());
}

#[test]
fn a_pull_request_reads_and_never_publishes() {
    let cache = Cache::start(&["--private"]);
    let on_main = caller(&cache, &workflow("nix build .#lib", ON_MAIN, ""));
    let pushed = run(&on_main, &on_main.push("refs/heads/main"));
    assert_eq!(pushed.code, 0, "{}", pushed.log());
    let before = cache.names();

    let caller = caller(&cache, &workflow("nix build .#default", "true", ""));
    for head in [CALLER, "stranger/app"] {
        let ran = run(&caller, &caller.pull_request(head));
        assert_eq!(ran.code, 0, "{}", ran.log());
        outputs(
            &ran,
            &[
                ("outcome", "success"),
                ("trust", "read-only"),
                ("published", "0"),
            ],
        );
        assert_eq!(cache.names(), before, "a pull request has published");
        let step = ran.step("build", "nix");
        assert!(
            step.log.contains("::notice::"),
            "the reason is printed:\n{}",
            step.log
        );
        nothing_holds(&cache.token, &ran, caller.folder());
        if head == CALLER {
            outputs(&ran, &[("built", "1")]);
            assert!(
                step.outputs["substituted"] != "0",
                "it reads: {}",
                ran.log()
            );
        }
    }
}

#[test]
fn a_failing_command_keeps_its_code_and_its_work_is_published() {
    let cache = Cache::start(&[]);
    let command = "|\n            nix build .#lib\n            nix build .#fails || exit 37\n            echo not reached";
    let more = "      - id: after\n        if: always()\n        run: |\n          ls -A \"$RUNNER_TEMP\"/flywheel-* \"$TMPDIR\"/flywheel-* \"$XDG_RUNTIME_DIR\"/flywheel-* 2>/dev/null || true";
    let caller = caller(&cache, &workflow(command, "auto", more));
    let ran = run(&caller, &caller.push("refs/heads/main"));
    assert_ne!(ran.code, 0);
    outputs(
        &ran,
        &[
            ("outcome", "command-failed"),
            ("exit-code", "37"),
            ("lost", "0"),
        ],
    );
    assert!(
        !ran.log().contains("not reached"),
        "several lines stop at the first that fails"
    );
    for name in ["lib", "base", "good"] {
        assert!(
            cache.names().contains(&name.to_owned()),
            "{name} is not among {:?}",
            cache.names()
        );
    }
    assert!(!cache.names().contains(&"fails".to_owned()));
    assert!(
        !ran.step("build", "after").log.contains("run-"),
        "{}",
        ran.step("build", "after").log
    );
}

#[test]
fn require_publish_turns_a_loss_into_a_failure_and_only_that() {
    let mut cache = Cache::start(&[]);
    let more = "          require-publish: true";
    let caller = caller(&cache, &workflow("nix build .#lib", "true", more));
    let good = run(&caller, &caller.push("refs/heads/main"));
    assert_eq!(good.code, 0, "{}", good.log());
    let refused = run(&caller, &caller.pull_request(CALLER));
    assert_ne!(refused.code, 0, "a refusal fails, too:\n{}", refused.log());
    outputs(
        &refused,
        &[("outcome", "not-published"), ("exit-code", "1")],
    );
    cache.kill();
    let lost = run(&caller, &caller.push("refs/heads/main"));
    assert_ne!(lost.code, 0, "{}", lost.log());
    outputs(
        &lost,
        &[
            ("outcome", "not-published"),
            ("exit-code", "1"),
            ("cache-state", "left-out-connect"),
        ],
    );
}

#[test]
fn a_dead_cache_costs_seconds_and_is_named() {
    use std::net::TcpListener;
    // Accepts into its backlog and never answers.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let closed = Port::reserve();
    let broken = crate::world::broken::server();
    let cases = [
        (closed.address(), "connect"),
        (silent.local_addr().unwrap().to_string(), "http"),
        (broken, "http"),
    ];
    for (address, layer) in cases {
        let caller = Caller::new(&workflow("nix build .#lib", "true", ""))
            .with_flake(FLAKE)
            .with_secret("ATTIC_TOKEN", "a-token-for-nobody")
            .with_env("ATTIC_SERVER", &format!("http://{address}/"))
            .with_env(
                "ATTIC_PUBLIC_KEY",
                "main:47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=",
            );
        let ran = run(&caller, &caller.push("refs/heads/main"));
        assert_eq!(ran.code, 0, "{}", ran.log());
        outputs(
            &ran,
            &[
                ("outcome", "success"),
                ("built", "2"),
                ("cache-state", &format!("left-out-{layer}")),
            ],
        );
        let step = ran.step("build", "nix");
        assert!(
            step.summary.contains(&format!("layer `{layer}`")),
            "{}",
            step.summary
        );
        let seconds = |name: &str| step.outputs[name].parse::<f64>().unwrap();
        let delay =
            Duration::from_secs_f64(seconds("bootstrap-seconds") + seconds("publish-seconds"));
        // Ample on a machine under load; the probe's own bound is three seconds.
        assert!(
            delay < Duration::from_secs(15),
            "{layer}: {delay:?}\n{}",
            ran.log()
        );
    }
}
