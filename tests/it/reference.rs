//! `docs/reference.md`: every verb, flag, variable, default, output and exit code, as `flywheel reference` prints them.

use std::collections::BTreeSet;

use crate::definitions;
use crate::house::source::{file, root};
use crate::setup::entries;
use crate::world::Flywheel;

/// Checks that a run in a job has set the outputs that the reference names, and no other.
#[track_caller]
pub fn check_outputs(verb: &str, run: &Flywheel) {
    let set: BTreeSet<String> = entries(&run.read("GITHUB_OUTPUT")).into_keys().collect();
    let named = definitions::verb(verb).outputs.into_iter();
    let named: BTreeSet<String> = named.map(|output| output.name.to_owned()).collect();
    assert_eq!(set, named, "{verb}");
}

fn page() -> String {
    Flywheel::new(&["reference"]).run().stdout
}

#[test]
fn the_reference_is_what_the_program_defines() {
    let page = page();
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(root().join("docs/reference.md"), &page).unwrap();
    }
    assert!(
        file("docs/reference.md").text == page,
        "docs/reference.md is out of date: UPDATE_DOCS=1 cargo test --test it reference"
    );
}

#[test]
fn the_reference_names_everything() {
    let page = page();
    for needed in [
        "## `flywheel cache serve`",
        "`--attic-server URL`",
        "`FLYWHEEL_CACHE_DIR`",
        "`not-started`",
        "| 69 |",
        "## Files",
        "`/nix/var/flywheel/installed.json`",
        "| `flywheel_builder_healthy` |",
    ] {
        assert!(page.contains(needed), "{needed}");
    }
    for verb in definitions::verbs() {
        for input in &verb.inputs {
            assert!(page.contains(&input.name), "{} {}", verb.name, input.name);
        }
        for output in &verb.outputs {
            let row = format!("| `{}` |", output.name);
            assert!(page.contains(&row), "{} {}", verb.name, output.name);
        }
    }
}
