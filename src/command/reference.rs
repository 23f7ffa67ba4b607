//! `flywheel reference`: every verb, flag, variable, default, output and exit code, as the program defines them.

mod files;
mod variables;

use clap::Args;

use crate::cli;
use crate::cli::definitions::{Input, Verb, verbs};
use crate::inputs::{Format, FormatInput};
use flywheel_core::exit::{Exit, VerbError};
use flywheel_sys::runner::workflow::{data, json_data};

/// Print every verb with its flags, variables, defaults and outputs, the exit codes, files and metrics.
///
/// As text it is a page in Markdown, which `docs/reference.md` holds. The JSON is a list of verbs with the same facts.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  flywheel reference --format json")]
pub(crate) struct Inputs {
    #[command(flatten)]
    format: FormatInput,
}

/// Runs the verb.
///
/// # Errors
/// Never; it has the form that all verbs have.
pub(crate) async fn run(inputs: Inputs) -> Result<Exit, VerbError> {
    let verbs = verbs(&cli::command());
    match inputs.format.format {
        Format::Text => data(page(&verbs).trim_end()),
        Format::Json => json_data(&serde_json::json!(verbs).to_string()),
    }
    Ok(Exit::Ok)
}

const BEFORE: &str = "\
# Reference

Every verb with its flags, variables, defaults and outputs, the exit codes, files and metrics. `flywheel reference`
prints this page from the program's own definitions.

Each flag can be given as a variable, too; a flag goes before its variable. An empty value counts as not
given; white space around a value and the case of a word do not matter. Every wrong value is
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
        .chain([exit_codes(), variables::page(), files::page()])
        .collect::<Vec<_>>()
        .join("\n")
}

fn section(verb: &Verb) -> String {
    let is_action = !verb.outputs.is_empty();
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
    if is_action {
        row("\n| output | meaning |\n|---|---|".to_owned());
    }
    for output in &verb.outputs {
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
        "## Exit codes\n\n| code | meaning |\n|---|---|\n{}\n{}\n",
        rows.concat(),
        Exit::OF_A_COMMAND
    )
}
