//! `flywheel scan`: looks into store paths, or any files, by hand, as a publication would. Publishes nothing.

use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Args;
use serde::Serialize;
use serde_json::json;
use thiserror::Error;

use crate::command::Failure;
use crate::command::inputs::{Format, FormatInput};
use crate::command::job::policy::{PolicyInputs, scanner};
use crate::exit::{Exit, Explain};
use crate::nix::nar::DumpError;
use crate::nix::scan::{Finding, Looked, Scanner};
use crate::nix::store_path::StorePath;
use crate::policy::Ruling;
use crate::progress::{Progress, Sink};
use crate::report::screen::Screen;
use crate::runner::env::Env;
use crate::runner::workflow::{Level, Workflow, data};
use crate::text::{bytes, count, duration};

/// Look into store paths, or any files and folders, for what the publication policy would keep back.
///
/// Looks for the values of this environment's secrets, for what has the shape of a secret, and for places of this
/// machine, as `nix-job` does before it publishes (`docs/policy.md`). Prints rule, file and offset, never the secret.
/// Looks into no compressed file. Ends with 1 if something would be kept back.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  flywheel scan ./result /nix/store/…-hello-2.12")]
pub struct Inputs {
    /// What to look into, such as `./result`; links are followed.
    #[arg(value_name = "PATH", required = true)]
    paths: Vec<PathBuf>,

    #[command(flatten)]
    format: FormatInput,

    #[command(flatten)]
    policy: PolicyInputs,
}

/// Why a path could not be looked into.
#[derive(Debug, Error)]
enum Error {
    /// It is not there.
    #[error("`{0}` is not there")]
    Missing(String, #[source] std::io::Error),
    /// It cannot be read whole.
    #[error(transparent)]
    Unread(#[from] DumpError),
}

impl Explain for Error {
    fn exit(&self) -> Exit {
        match self {
            Self::Missing(..) => Exit::Usage,
            Self::Unread(_) => Exit::Failed,
        }
    }

    fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Missing(..) => "Name files, folders or store paths that exist.".into(),
            Self::Unread(_) => "Look as the user who may read all of it.".into(),
        })
    }
}

/// A find and what follows.
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
pub async fn run(inputs: Inputs, env: &Env) -> Result<Exit, Failure> {
    let as_json = inputs.format.format == Format::Json;
    let kept = inputs.policy.read()?;
    let mut real = Vec::new();
    for path in &inputs.paths {
        real.push(
            path.canonicalize()
                .map_err(|error| Error::Missing(path.display().to_string(), error))?,
        );
    }
    let workflow = Workflow::new(env.in_github_actions());
    let screen = Screen::new(&workflow);
    let sink = screen.sink();
    let scanner = scanner(env, &[]);
    let (begun, total) = (Instant::now(), real.len() as u64);
    // Reading and scanning whole paths would hold up the runtime's own threads.
    let looking = tokio::task::spawn_blocking(move || look_into_all(&scanner, real, &sink));
    let looked = looking
        .await
        .map_err(|panic| DumpError::Sink(std::io::Error::other(panic)));
    screen.finish();
    let (all, size) = looked.and_then(|looked| looked).map_err(Error::from)?;
    let found = all.into_iter().filter_map(|(path, finding)| {
        let ruling = kept.policy.rule(true, finding.rule, &name(&path), true);
        let withheld = ruling == Ruling::Withhold;
        (ruling != Ruling::Publish).then(|| Found {
            path: path.display().to_string(),
            finding,
            withheld,
        })
    });
    let found: Vec<Found> = found.collect();
    if as_json {
        data(&format!(
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

/// The findings in these paths, each with its path, and how many bytes were read.
fn look_into_all(
    scanner: &Scanner,
    paths: Vec<PathBuf>,
    sink: &Sink,
) -> Result<(Vec<(PathBuf, Finding)>, u64), DumpError> {
    let total = paths.len() as u64;
    let (mut all, mut size) = (Vec::new(), 0);
    for (done, path) in paths.into_iter().enumerate() {
        let looked: Looked = scanner.look_into(&path)?;
        size += looked.bytes;
        sink.send(Progress::Moved {
            done: done as u64 + 1,
            total,
            bytes: size,
        });
        let findings = looked.findings.into_iter();
        all.extend(findings.map(|finding| (path.clone(), finding)));
    }
    Ok((all, size))
}

/// The name by which exceptions know a path.
fn name(path: &Path) -> String {
    let text = path.display().to_string();
    match text.parse::<StorePath>() {
        Ok(path) => path.name().to_owned(),
        Err(_) => path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned(),
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
        workflow.annotate(level, finding.rule.word(), &format!("{path}: {finding}"));
    }
}
