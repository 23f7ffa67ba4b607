//! `docs/reference.md`: every verb, flag, variable, default, output and exit code, as the program defines
//! them.

use std::collections::BTreeSet;

use flywheel::exit::Exit;
use flywheel::report::outputs;

use crate::definitions::{Input, Verb, verbs};
use crate::house::source::{file, root};
use crate::setup::entries;
use crate::world::Flywheel;

const BEFORE: &str = "\
# Reference

Every verb with its flags, variables, defaults and outputs, and the exit codes. This page is not written by
hand: a test prints it from the program's own definitions. After a change, print it anew with
`UPDATE_DOCS=1 cargo test --test it reference`.

Each flag can be given as a variable, too; a flag goes before its variable. An empty value counts as not
given, white space around a value means nothing, and neither does the case of a word. Every wrong value is
found before anything is touched: exit code 64, and a message that names the input.

An action has an input for each flag of its verb that is not marked *by hand*, under the same name and with
the same default.

The tokens are no flags: `ATTIC_TOKEN` (for the cache) and `GITHUB_TOKEN` (for Check Runs) are read from the
environment alone.
";

fn page(verbs: &[Verb]) -> String {
    let verbs = verbs.iter().map(section);
    [BEFORE.to_owned()]
        .into_iter()
        .chain(verbs)
        .chain([exit_codes()])
        .collect::<Vec<_>>()
        .join("\n")
}

fn section(verb: &Verb) -> String {
    let outputs = outputs::of_verb(&verb.name);
    let is_action = !outputs.is_empty();
    let mut text = format!("## `flywheel {}`\n\n{}\n", verb.name, prose(&verb.about));
    let mut row = |line: String| {
        text.push_str(&line);
        text.push('\n');
    };
    let (flags, arguments): (Vec<&Input>, Vec<&Input>) =
        verb.inputs.iter().partition(|input| input.is_flag);
    if !arguments.is_empty() {
        row("\n| argument | meaning |\n|---|---|".to_owned());
    }
    for input in arguments {
        row(format!("| `{}` | {} |", input.name, meaning(input).0));
    }
    if !flags.is_empty() {
        row("\n| flag | variable | default | meaning |\n|---|---|---|---|".to_owned());
    }
    for input in flags {
        let (meaning, default) = meaning(input);
        let value = input
            .value_name
            .as_ref()
            .map(|name| format!(" {name}"))
            .unwrap_or_default();
        let by_hand = if is_action && input.is_by_hand {
            " *by hand*"
        } else {
            ""
        };
        row(format!(
            "| `--{}{value}`{by_hand} | `{}` | {default} | {meaning} |",
            input.name,
            input.variable.as_deref().unwrap_or_default(),
        ));
    }
    if !outputs.is_empty() {
        row("\n| output | meaning |\n|---|---|".to_owned());
    }
    for output in outputs {
        row(format!("| `{}` | {} |", output.name, cell(&output.about)));
    }
    text
}

/// What a flag means, and its default.
fn meaning(input: &Input) -> (String, String) {
    let mut help = input.help.clone();
    let mut default = match &input.default {
        Some(value) => format!("`{value}`"),
        None if input.is_required => "required".to_owned(),
        None if input.is_required_in_action => "required in the action".to_owned(),
        None => String::new(),
    };
    // A default that is no fixed value stands in the help, in brackets.
    if let Some(start) = help.find(" (default")
        && let Some(end) = help[start..].find(')')
    {
        let words = &help[start + 2..start + end];
        default = words
            .strip_prefix("default: ")
            .or(words.strip_prefix("default "))
            .unwrap_or(words)
            .to_owned();
        help.replace_range(start..=start + end, "");
    }
    let words = input.allowed.iter();
    let words: Vec<String> = words
        .map(|(word, about)| match about {
            Some(about) => format!("<br>`{word}`: {about}."),
            None => format!("`{word}`"),
        })
        .collect();
    let words = match words.first() {
        Some(first) if first.starts_with('`') => format!("<br>One of {}.", words.join(", ")),
        _ => words.concat(),
    };
    let former = input.former_names.iter();
    let former: String = former
        .map(|name| format!("<br>Formerly `--{name}`, which still works."))
        .collect();
    (cell(&format!("{help}{words}{former}")), cell(&default))
}

fn cell(text: &str) -> String {
    text.replace('|', "\\|").replace('\n', " ")
}

/// Indented lines of a help text are commands.
fn prose(about: &str) -> String {
    let mut text = String::new();
    let mut in_code = false;
    for line in about.trim_end().lines() {
        let is_code = line.starts_with("  ");
        if is_code != in_code {
            if is_code && !text.ends_with("\n\n") {
                text.push('\n');
            }
            text.push_str(if is_code { "```sh\n" } else { "```\n" });
            in_code = is_code;
        }
        text.push_str(if is_code { line.trim() } else { line });
        text.push('\n');
    }
    if in_code {
        text.push_str("```\n");
    }
    text.trim_end().to_owned()
}

fn exit_codes() -> String {
    let rows = Exit::OWN.map(|(exit, meaning)| format!("| {} | {meaning} |\n", exit.code()));
    format!(
        "## Exit codes\n\n| code | meaning |\n|---|---|\n{}\n`nix-job` otherwise ends with the code of its command, \
         whatever it is.\n",
        rows.concat()
    )
}

/// Checks that a run in a job has set the outputs that the reference names, and no other.
#[track_caller]
pub fn check_outputs(verb: &str, run: &Flywheel) {
    let set: BTreeSet<String> = entries(&run.read("GITHUB_OUTPUT")).into_keys().collect();
    let named = outputs::of_verb(verb).into_iter();
    let named: BTreeSet<String> = named.map(|output| output.name.to_owned()).collect();
    assert_eq!(set, named, "{verb}");
}

#[test]
fn the_reference_is_what_the_program_defines() {
    let page = page(&verbs());
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
    let page = page(&verbs());
    for needed in [
        "## `flywheel cache serve`",
        "`--attic-server URL`",
        "`FLYWHEEL_CACHE_DIR`",
        "`not-started`",
        "| 69 |",
    ] {
        assert!(page.contains(needed), "{needed}");
    }
    let mut without = verbs();
    without[0].inputs.pop();
    assert_ne!(
        page,
        self::page(&without),
        "a flag less makes no difference"
    );
}
