//! `flywheel contract`: prints the builder contract, and checks a contract file and workflows against it.

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand, ValueEnum};

use crate::inputs::value::{one_of, path, variant};
use flywheel_core::contract::print::Section;
use flywheel_core::contract::workflow::{Finding, Weight};
use flywheel_core::contract::{Contract, FILE, print, read, workflow};
use flywheel_core::exit::{Exit, UsageError, VerbError, named_file_error};
use flywheel_core::text::count;
use flywheel_sys::runner::env::Env;
use flywheel_sys::runner::workflow::{data, json_data};
use flywheel_sys::untrusted_file::{self, Owner};

/// A contract or a workflow that a person keeps is shorter, in bytes.
const FILE_LIMIT: u64 = 16 << 20;

/// Print the builder contract, or check a contract file and workflows against it.
///
/// The contract names classes of builders, caches, what goes where, who may reach what, and what is published when.
/// It is built in with neutral defaults; a `flywheel.yml` in the repository overrides it.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  flywheel contract --section classes
  flywheel contract check flywheel.yml --workflows .github/workflows/*.yml")]
pub(crate) struct Inputs {
    #[command(subcommand)]
    task: Option<Task>,

    /// How to print the contract, or what was found.
    // The verbs that are actions know no Markdown, so that their variable is another one.
    #[arg(
        long,
        env = "FLYWHEEL_CONTRACT_FORMAT",
        value_name = "FORMAT",
        value_parser = variant::<Format>(),
        default_value = "text",
        global = true
    )]
    format: Format,

    #[command(flatten)]
    file: ContractInput,

    /// The part to print, such as `classes` (default: all of it).
    #[arg(long, value_name = "NAME", value_parser = one_of(&Section::ALL))]
    section: Option<Section>,
}

/// Where the contract of this repository is; shared by every verb that needs it.
#[derive(Args, Clone, Debug)]
pub(crate) struct ContractInput {
    /// The repository's contract, such as `ci/flywheel.yml` (default: `flywheel.yml` in the current
    /// folder, if it is there, else the built-in contract).
    #[arg(long, value_name = "FILE", value_parser = path(), global = true)]
    contract_file: Option<PathBuf>,
}

impl ContractInput {
    /// Reads the contract of this folder.
    ///
    /// # Errors
    /// When the named file cannot be read, or is no contract.
    pub(crate) fn read(&self) -> Result<Contract, VerbError> {
        match &self.contract_file {
            Some(file) => contract(file),
            None if Path::new(FILE).is_file() => contract(Path::new(FILE)),
            None => Ok(Contract::built_in()),
        }
    }
}

#[derive(Debug, Subcommand)]
enum Task {
    Check(Check),
}

/// Check a contract file, and workflows against it: each `runs-on` names a lane that exists, and the lane
/// offers what the job uses.
///
/// A label that only the run decides is a note. Ends with 0 if all is well, 1 if a workflow breaks the
/// contract, 64 if a file cannot be read.
#[derive(Args, Debug)]
#[command(
    after_help = "Example:\n  flywheel contract check flywheel.yml --workflows .github/workflows/*.yml"
)]
struct Check {
    /// Contract files to check; workflows are held against the last one (default: `flywheel.yml`, if it
    /// is there).
    files: Vec<PathBuf>,

    /// Workflows to check, such as `.github/workflows/ci.yml` (default: none).
    #[arg(long, value_name = "FILE", num_args = 1.., value_delimiter = ',')]
    workflows: Vec<PathBuf>,
}

/// The input `format`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    /// Lines for people.
    Text,
    /// One JSON document for programs.
    Json,
    /// A page; only of the contract itself.
    Markdown,
}

/// Runs the verb.
///
/// # Errors
/// When an input or a file is wrong.
pub(crate) async fn run(inputs: Inputs, _env: &Env) -> Result<Exit, VerbError> {
    match &inputs.task {
        Some(Task::Check(check)) => self::check(&inputs, check),
        None => print_contract(&inputs),
    }
}

fn print_contract(inputs: &Inputs) -> Result<Exit, VerbError> {
    let (section, format) = (inputs.section, inputs.format);
    let contract = inputs.file.read()?;
    match format {
        Format::Text => data(&print::text(&contract, section)),
        Format::Markdown => data(&print::markdown(&contract, section)),
        Format::Json => json_data(json(&contract, section).trim_end()),
    }
    Ok(Exit::Ok)
}

/// The whole as an object; of a section what it is made of.
fn json(contract: &Contract, section: Option<Section>) -> String {
    let whole = serde_json::to_value(contract).expect("a contract is made of texts and numbers");
    let part = match section {
        None => whole,
        Some(Section::Classes) => whole["classes"].clone(),
        // What happens on a miss is a part of each cache.
        Some(Section::Caches | Section::OnMiss) => whole["caches"].clone(),
        Some(Section::Placement) => whole["placement"].clone(),
        Some(Section::Exposure) => whole["exposure"].clone(),
        Some(Section::Publication) => whole["publication"].clone(),
        Some(Section::SharedCache) => whole["shared-cache"].clone(),
    };
    format!("{part:#}\n")
}

fn contract(file: &Path) -> Result<Contract, VerbError> {
    Ok(read::contract(
        &file.display().to_string(),
        &text("contract-file", file)?,
    )?)
}

fn text(input: &str, file: &Path) -> Result<String, VerbError> {
    untrusted_file::read_text(file, Owner::Any, FILE_LIMIT).map_err(|error| {
        let hint = "Give a file of the checkout, and check the repository out in an earlier step.";
        named_file_error(input, file, "be read", error, hint)
    })
}

fn check(inputs: &Inputs, check: &Check) -> Result<Exit, VerbError> {
    let format = inputs.format;
    if format == Format::Markdown {
        return Err(UsageError::new("format", "must be `text` or `json` for `check`").into());
    }
    let mut holds = inputs.file.read()?;
    for file in &check.files {
        holds = contract(file)?;
    }
    let mut findings = Vec::new();
    for file in &check.workflows {
        let name = file.display().to_string();
        let text = text("workflows", file)?;
        findings.extend(workflow::check(
            &holds,
            &name,
            &text,
            &read::document(&name, &text)?,
        ));
    }
    let errors = findings
        .iter()
        .filter(|finding| finding.weight == Weight::Error)
        .count();
    match format {
        Format::Json => json_data(&format!(
            "{:#}",
            serde_json::json!({ "holds": errors == 0, "findings": findings })
        )),
        Format::Text | Format::Markdown => data(&report(check, &findings, errors)),
    }
    Ok(if errors == 0 { Exit::Ok } else { Exit::Failed })
}

fn report(check: &Check, findings: &[Finding], errors: usize) -> String {
    let mut text = String::new();
    for Finding {
        weight,
        file,
        line,
        job,
        text: what,
    } in findings
    {
        let line = line.map(|line| format!(":{line}")).unwrap_or_default();
        let weight = if *weight == Weight::Error {
            "error"
        } else {
            "note"
        };
        text.push_str(&format!("{file}{line}: {weight}: job `{job}`: {what}\n"));
    }
    let workflows = count(check.workflows.len() as u64, "workflow");
    let notes = findings.len() - errors;
    text.push_str(&format!(
        "{workflows}, {}, {}\n",
        count(errors as u64, "error"),
        count(notes as u64, "note")
    ));
    text
}
