//! `flywheel scan`: looks into store paths, or any files, by hand, as a publication would. Publishes nothing.

use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Args;
use serde::Serialize;
use serde_json::json;
use thiserror::Error;

use crate::inputs::{Format, FormatInput};
use crate::job::policy::{PolicyInputs, scanner};
use crate::report::screen::Screen;
use flywheel_core::exit::{Exit, Explain, VerbError, named_file_error};
use flywheel_core::policy::Ruling;
use flywheel_core::progress::{Progress, Sink};
use flywheel_core::text::{bytes, count, duration};
use flywheel_nix::nar::DumpError;
use flywheel_nix::scan::{Finding, ScanResult, Scanner};
use flywheel_nix::store_path::StorePath;
use flywheel_sys::runner::env::Env;
use flywheel_sys::runner::workflow::{Level, Workflow, data, json_data};

/// Look into store paths, or any files and folders, for what the publication policy would keep back.
///
/// Looks for the values of this environment's secrets, for something shaped like a secret, and for places of this
/// machine, as `nix-job` does before it publishes (`docs/policy.md`). Prints rule, file and offset, never the secret.
/// Looks into no compressed file. Ends with 1 if something would be kept back.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  flywheel scan ./result /nix/store/…-hello-2.12")]
pub(crate) struct Inputs {
    /// What to look into, such as `./result`; links are followed.
    #[arg(value_name = "PATH", required = true)]
    paths: Vec<PathBuf>,

    #[command(flatten)]
    format: FormatInput,

    #[command(flatten)]
    policy: PolicyInputs,
}

/// A path could not be looked into.
#[derive(Debug, Error)]
#[error(transparent)]
struct Unread(#[from] DumpError);

impl Explain for Unread {
    fn hint(&self) -> Option<String> {
        Some("Look as the user who may read all of it.".into())
    }
}

/// A finding, and what the policy makes of it.
#[derive(Serialize)]
struct Found {
    path: String,
    #[serde(flatten)]
    finding: Finding,
    withheld: bool,
}

/// Runs the verb.
///
/// # Errors
/// For wrong input, and for a path that cannot be read.
pub(crate) async fn run(inputs: Inputs, env: &Env) -> Result<Exit, VerbError> {
    let as_json = inputs.format.format == Format::Json;
    let config = inputs.policy.read()?;
    let mut paths = Vec::new();
    // All paths are resolved before the first is scanned, so that a mistyped one is found at once.
    for path in &inputs.paths {
        paths.push(path.canonicalize().map_err(|error| {
            let hint = "Name files, folders or store paths that exist.";
            named_file_error("PATH", path, "be found", error, hint)
        })?);
    }
    let workflow = Workflow::new(env.in_github_actions());
    let screen = Screen::new(&workflow);
    let (begun, total) = (Instant::now(), paths.len() as u64);
    let scanned = scan(scanner(env, &[]), paths, screen.sink()).await;
    screen.finish();
    let (findings, size) = scanned.map_err(Unread::from)?;
    let found = findings.into_iter().filter_map(|(path, finding)| {
        let ruling = config.policy.decide(true, finding.rule, &name(&path), true);
        let withheld = ruling == Ruling::Withhold;
        (ruling != Ruling::Publish).then(|| Found {
            path: path.display().to_string(),
            finding,
            withheld,
        })
    });
    let found: Vec<Found> = found.collect();
    if as_json {
        json_data(&format!(
            "{:#}",
            json!({ "paths": total, "bytes": size, "findings": found })
        ));
    } else {
        annotate(&found, &workflow);
        let (what, took) = (
            count(found.len() as u64, "finding"),
            duration(begun.elapsed()),
        );
        data(&format!(
            "{what} in {} ({} in {took})",
            count(total, "path"),
            bytes(size)
        ));
    }
    Ok(if found.iter().any(|one| one.withheld) {
        Exit::Failed
    } else {
        Exit::Ok
    })
}

/// Looks into the paths one after the other. Gives the findings, and the size of everything in bytes.
async fn scan(
    scanner: Scanner,
    paths: Vec<PathBuf>,
    sink: Sink,
) -> Result<(Vec<(PathBuf, Finding)>, u64), DumpError> {
    let (total, mut size) = (paths.len() as u64, 0);
    // Reading files blocks, so it has a thread of its own.
    let looking = tokio::task::spawn_blocking(move || {
        let mut findings = Vec::new();
        for (done, path) in paths.into_iter().enumerate() {
            let looked: ScanResult = scanner.scan(&path)?;
            size += looked.bytes;
            sink.send(Progress::Moved {
                done: done as u64 + 1,
                total,
                bytes: size,
            });
            let of_path = looked.findings.into_iter();
            findings.extend(of_path.map(|finding| (path.clone(), finding)));
        }
        Ok((findings, size))
    });
    looking
        .await
        .unwrap_or_else(|panic| Err(DumpError::Sink(std::io::Error::other(panic))))
}

/// The name that exceptions of the policy match.
fn name(path: &Path) -> String {
    let text = path.display().to_string();
    match text.parse::<StorePath>() {
        Ok(path) => path.name().to_owned(),
        Err(_) => {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            // Below another root, a store path is known by its last part alone.
            StorePath::from_base_name(&name)
                .map_or_else(|_| name.into_owned(), |path| path.name().to_owned())
        }
    }
}

fn annotate(found: &[Found], workflow: &Workflow) {
    for Found {
        path,
        finding,
        withheld,
    } in found
    {
        let level = if *withheld {
            Level::Error
        } else {
            Level::Warning
        };
        workflow.annotate(level, finding.rule.as_str(), &format!("{path}: {finding}"));
    }
}
