//! `docs/reference.md`: every verb, flag, variable, default, output and exit code, as `flywheel reference` prints them.

use std::collections::BTreeSet;

use crate::definitions;
use crate::house::hold;
use crate::house::source::{Source, file, files, root};
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

/// The names of variables that a source file has as literal texts, outside of its tests.
fn variables(source: &Source) -> Vec<String> {
    if source.name.contains("/tests") {
        return Vec::new();
    }
    let end = source.text.find("#[cfg(test)]\nmod ");
    let text = &source.text[..end.unwrap_or(source.text.len())];
    let is_name = |word: &&str| {
        let begins = [
            "ATTIC_", "GITHUB_", "RUNNER_", "CI_", "NIX_", "XDG_", "BAZEL_", "GF_",
        ];
        let is_letter = |c: char| c.is_ascii_uppercase() || c == '_';
        begins.iter().any(|begin| word.starts_with(begin)) && word.chars().all(is_letter)
    };
    let literals = text.split('"').filter(is_name);
    literals.map(str::to_owned).collect()
}

#[test]
fn every_variable_that_is_read_is_in_the_reference() {
    let page = page();
    let (_, table) = page.split_once("## Variables").unwrap();
    let named: Vec<&str> = table.split('`').skip(1).step_by(2).collect();
    let is_named = |variable: &str| {
        named.iter().any(|name| match name.strip_suffix('…') {
            Some(begin) => variable.starts_with(begin),
            None => *name == variable,
        })
    };
    let rule = |sources: &[Source]| {
        let mut missing = BTreeSet::new();
        for source in sources {
            let variables = variables(source).into_iter();
            missing.extend(variables.filter(|variable| !is_named(variable)));
        }
        missing.into_iter().collect()
    };
    let real = [files("src", ".rs"), files("crates", ".rs")].concat();
    let number: usize = real.iter().map(|source| variables(source).len()).sum();
    assert!(number > 60, "only {number} names were found");
    let planted = [Source::planted(
        "src/x.rs",
        "env.get(\"GITHUB_UNHEARD_OF\")",
    )];
    hold(rule, real, &planted);
}
