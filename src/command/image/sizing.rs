//! `flywheel image sizing`: what the history of a workspace says, and the most that an operator lets it ask for.

use std::time::{SystemTime, UNIX_EPOCH};

use clap::{Args, Subcommand};
use serde_json::json;

use super::{HistoryInput, TargetInput, WorkspaceInput, unusable};
use crate::inputs::value::number;
use crate::inputs::{Format, FormatInput};
use flywheel_core::exit::{Exit, UsageError, VerbError};
use flywheel_core::text::count;
use flywheel_image::history::{Approval, Dependencies, History, Line};
use flywheel_image::sizing::{FLOOR, LEAST_SAMPLES, by_percentile};
use flywheel_sys::runner::env::Env;
use flywheel_sys::runner::workflow::{data, json_data};

/// What earlier builds used, and what of it may be asked for.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  flywheel image sizing show --workspace web")]
pub(super) struct Sizing {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    Show(Show),
    Approve(Approve),
}

/// Show what the history of a workspace says, for each stage and state of the dependencies, and what is approved.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  flywheel image sizing show --workspace web")]
struct Show {
    #[command(flatten)]
    workspace: WorkspaceInput,

    #[command(flatten)]
    history: HistoryInput,

    #[command(flatten)]
    format: FormatInput,
}

/// Let the history of a stage decide the size of its builds, up to a size.
///
/// Until then history is advice, and `image plan` shows it as such. The last approval holds.
#[derive(Args, Debug)]
#[command(
    after_help = "Example:\n  flywheel image sizing approve --workspace web --cpu 8 --memory-gb 16"
)]
struct Approve {
    #[command(flatten)]
    workspace: WorkspaceInput,

    #[command(flatten)]
    target: TargetInput,

    #[command(flatten)]
    history: HistoryInput,

    /// The most processors that history may ask for, 2 to 1024. Required. Example: `--cpu 8`.
    #[arg(long, value_name = "NUMBER", value_parser = number(FLOOR.cpu..=1024))]
    cpu: u32,

    /// The most memory in GB that history may ask for, 4 to 65536. Required. Example: `--memory-gb 16`.
    #[arg(long, value_name = "NUMBER", value_parser = number(FLOOR.memory_gb..=65_536))]
    memory_gb: u32,
}

/// Runs one of the two.
///
/// # Errors
/// When no workspace is named, or its history cannot be used.
pub(super) fn run(inputs: Sizing, env: &Env) -> Result<Exit, VerbError> {
    match inputs.task {
        Task::Show(show) => self::show(&show, env),
        Task::Approve(approve) => self::approve(&approve, env),
    }
}

fn named(input: &WorkspaceInput) -> Result<&str, UsageError> {
    let named = input.workspace.as_deref();
    named.ok_or_else(|| {
        UsageError::new("workspace", "is needed").with_hint("Give it as `--workspace NAME`.")
    })
}

fn show(inputs: &Show, env: &Env) -> Result<Exit, VerbError> {
    let workspace = named(&inputs.workspace)?;
    let file = inputs.history.file(workspace, env)?;
    let history = file.read().map_err(unusable)?;
    let mut targets: Vec<&str> = history.runs.iter().map(|run| &*run.target).collect();
    targets.extend(history.approvals.iter().map(|approval| &*approval.target));
    targets.sort_unstable();
    targets.dedup();
    if inputs.format.format == Format::Json {
        let rows: Vec<_> = targets.iter().map(|target| row(&history, target)).collect();
        let whole =
            json!({ "workspace": workspace, "targets": rows, "unreadable": history.unreadable });
        json_data(&format!("{whole:#}"));
        return Ok(Exit::Ok);
    }
    if targets.is_empty() {
        data(&format!("{workspace}: no build has a history yet"));
    }
    for target in targets {
        data(&format!("{workspace}, {}", stage(target)));
        for (word, dependencies) in Dependencies::ALL {
            let runs = history.alike(target, dependencies);
            let said = if runs.len() < LEAST_SAMPLES {
                format!(
                    "{}, and {LEAST_SAMPLES} are needed",
                    count(runs.len() as u64, "run")
                )
            } else {
                by_percentile(&runs).1
            };
            data(&format!("  dependencies {word}: {said}"));
        }
        data(&match history.approval(target) {
            Some(approval) => format!("  approved: at most {}", approval.need()),
            None => "  approved: nothing; what history says is advice".into(),
        });
    }
    if history.unreadable > 0 {
        let lines = count(history.unreadable as u64, "line");
        data(&format!(
            "{lines} of `{}` could not be read",
            file.path().display()
        ));
    }
    Ok(Exit::Ok)
}

fn row(history: &History, target: &str) -> serde_json::Value {
    let of = |dependencies| {
        let runs = history.alike(target, dependencies);
        let need = (runs.len() >= LEAST_SAMPLES).then(|| by_percentile(&runs).0);
        json!({ "runs": runs.len(), "need": need })
    };
    json!({
        "target": target,
        "hit": of(Dependencies::Hit),
        "miss": of(Dependencies::Miss),
        "approved": history.approval(target).map(Approval::need),
    })
}

/// A stage as messages name it.
pub(super) fn stage(target: &str) -> String {
    if target.is_empty() {
        "the last stage".into()
    } else {
        format!("stage `{target}`")
    }
}

fn approve(inputs: &Approve, env: &Env) -> Result<Exit, VerbError> {
    let workspace = named(&inputs.workspace)?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let approval = Approval {
        at: now.map_or(0, |now| now.as_secs()),
        target: inputs.target.target.clone().unwrap_or_default(),
        cpu: inputs.cpu,
        memory_gb: inputs.memory_gb,
    };
    let file = inputs.history.file(workspace, env)?;
    let said = format!(
        "{workspace}, {}: history may ask for at most {}",
        stage(&approval.target),
        approval.need()
    );
    file.append(&Line::Approved(approval)).map_err(unusable)?;
    data(&said);
    Ok(Exit::Ok)
}
