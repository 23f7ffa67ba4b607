//! The workflow that `init` writes, under real act: it runs as it is, with a cache that no server keeps.

use std::process::Command;

use crate::world::act::{Caller, Ran};
use crate::world::flake::FLAKE;
use crate::world::{flywheel, folders, must};

fn all_is_well(ran: &Ran) -> String {
    assert_eq!(ran.code, 0, "{}", ran.log());
    assert_eq!(ran.left_processes, Vec::<String>::new(), "{}", ran.log());
    ran.log()
}

#[test]
fn a_workflow_of_init_publishes_and_the_next_runner_builds_nothing() {
    let outputs = "packages.${system} = { inherit lib app fails slow; default = app; };";
    let flake = FLAKE.replace(outputs, "checks.${system} = { inherit lib app; };");
    let caller = Caller::new("").with_flake(&flake);
    let carried = tempfile::tempdir().unwrap();
    let uses = "actions/cache@0057852bfaa89a56745cba8c7296529d2fc39830";
    let mut caller = caller.with_folder_cache(uses, carried.path());
    caller.commit();
    let mut init = Command::new(flywheel());
    folders::isolate(&mut init, caller.folder());
    init.args([
        "init",
        "--yes",
        "--force",
        "--actions",
        "octo-org/flywheel@main",
    ]);
    init.args([
        "--runs-on",
        "ubuntu-latest",
        "--output",
        ".github/workflows/ci.yml",
    ]);
    must(
        init.current_dir(caller.repository())
            .env("PATH", "/usr/bin:/bin"),
    );

    let push = caller.push("refs/heads/main");
    let first = all_is_well(&caller.run(&push));
    assert!(first.contains(" 0 lost"), "{first}");
    assert!(!first.contains(" 0 published"), "{first}");

    caller.forget_store();
    let pull_request = caller.pull_request("somebody/app");
    let second = all_is_well(&caller.run(&pull_request));
    assert!(second.contains("0 built"), "{second}");
}
