//! `flywheel explain`: what the trust gate says of this job or of a recorded event, and why.
//! Publishes nothing and touches nothing.

use std::path::PathBuf;

use clap::Args;
use serde::Serialize;

use crate::command::Failure;
use crate::command::inputs::{GateInputs, Text, choice, switch};
use crate::exit::{Exit, UsageError};
use crate::runner::context::{self, Recorded};
use crate::runner::env::Env;
use crate::runner::workflow::data;
use crate::trust::{Decision, ToAttic, ToFlakeHub, decide};

/// Say whether this job may publish, what it would publish where, and why.
///
/// Reads the facts of the job that it runs in: `GITHUB_EVENT_NAME`, `GITHUB_REF`,
/// `GITHUB_REF_PROTECTED`, `GITHUB_REPOSITORY`, the payload in the file that `GITHUB_EVENT_PATH`
/// names, and whether `ATTIC_TOKEN` is there. Ends with 0 whatever the verdict.
///
/// To try a recorded event on a laptop, give it by flags; each stands in for the job's own value:
///
///     flywheel explain --event-path push.json --event-name push --ref refs/heads/main --push-cache auto
#[derive(Args, Debug)]
pub struct Inputs {
    /// How to say it: `text`, the default, or `json` (keys `verdict`, `publishes`, `reason`, `plan`).
    #[arg(
        long,
        value_name = "FORMAT",
        default_value = "",
        hide_default_value = true
    )]
    format: Text,

    #[command(flatten)]
    event: EventInputs,

    #[command(flatten)]
    gate: GateInputs,
}

/// The inputs that describe an event from elsewhere.
#[derive(Args, Debug)]
#[command(next_help_heading = "Recorded event")]
struct EventInputs {
    /// A file with the event's payload, such as `event.json` (default: the one that
    /// `GITHUB_EVENT_PATH` names).
    #[arg(
        long,
        value_name = "FILE",
        default_value = "",
        hide_default_value = true
    )]
    event_path: Text,

    /// The event's name, such as `push` (default: `GITHUB_EVENT_NAME`).
    #[arg(
        long,
        value_name = "NAME",
        default_value = "",
        hide_default_value = true
    )]
    event_name: Text,

    /// The full ref, such as `refs/heads/main` (default: `GITHUB_REF`).
    #[arg(
        long,
        value_name = "REF",
        default_value = "",
        hide_default_value = true
    )]
    r#ref: Text,

    /// Whether a rule protects that ref, `true` or `false` (default: `GITHUB_REF_PROTECTED`).
    #[arg(
        long,
        value_name = "BOOL",
        default_value = "",
        hide_default_value = true
    )]
    ref_protected: Text,

    /// The repository, such as `octo-org/octo-repo` (default: `GITHUB_REPOSITORY`; with
    /// `--event-path` and outside of a job the payload's own word).
    #[arg(
        long,
        value_name = "OWNER/NAME",
        default_value = "",
        hide_default_value = true
    )]
    repository: Text,

    /// The default branch, such as `main`, for a payload that does not name it (default: what the
    /// payload says).
    #[arg(
        long,
        value_name = "NAME",
        default_value = "",
        hide_default_value = true
    )]
    default_branch: Text,
}

impl EventInputs {
    fn recorded(&self) -> Result<Recorded, UsageError> {
        let text = |input: &Text| input.get().map(str::to_owned);
        Ok(Recorded {
            event_name: text(&self.event_name),
            event_path: self.event_path.get().map(PathBuf::from),
            git_ref: text(&self.r#ref),
            ref_protected: match self.ref_protected.get() {
                Some(_) => Some(switch("ref-protected", &self.ref_protected, false)?),
                None => None,
            },
            repository: text(&self.repository),
            default_branch: text(&self.default_branch),
        })
    }
}

#[derive(Clone, Copy)]
enum Format {
    Text,
    Json,
}

/// Runs the verb.
///
/// # Errors
/// Bad input only.
pub async fn run(inputs: Inputs, env: &Env) -> Result<Exit, Failure> {
    let format = choice(
        "format",
        &inputs.format,
        &[("text", Format::Text), ("json", Format::Json)],
    )?;
    let request = inputs.gate.request()?;
    let must_publish = inputs.gate.must_publish()?;
    let facts = context::recorded(env, &inputs.event.recorded()?)?;
    let decision = decide(&facts, &request, context::token_present(env));
    match format.unwrap_or(Format::Text) {
        Format::Text => data(&text(&decision, must_publish)),
        Format::Json => data(&json(&decision)),
    }
    Ok(Exit::Ok)
}

/// The stable machine-readable form.
#[derive(Serialize)]
struct Explanation {
    verdict: &'static str,
    publishes: bool,
    reason: String,
    plan: Plan,
}

#[derive(Serialize)]
struct Plan {
    attic: &'static str,
    flakehub: &'static str,
}

fn json(decision: &Decision) -> String {
    let plan = decision.plan();
    let explanation = Explanation {
        verdict: decision.verdict().word(),
        publishes: decision.publishes(),
        reason: decision.reason(),
        plan: Plan {
            attic: plan.attic.word(),
            flakehub: plan.flakehub.word(),
        },
    };
    serde_json::to_string_pretty(&explanation).expect("texts and a boolean are always JSON")
}

/// Every line begins with a word of ours, so that none is a command to the runner.
fn text(decision: &Decision, must_publish: bool) -> String {
    let attic = match decision.plan().attic {
        ToAttic::All => "everything that the job builds",
        ToAttic::Nothing => "nothing",
    };
    let flakehub = match decision.plan().flakehub {
        ToFlakeHub::Rolling => "a rolling release, if a workflow with FlakeHub's action asks",
        ToFlakeHub::Versioned => "the tag's version, if a workflow with FlakeHub's action asks",
        ToFlakeHub::Nothing => "nothing",
    };
    let mut lines = vec![
        format!("verdict    {}", decision.verdict().word()),
        format!(
            "publishes  {}",
            if decision.publishes() { "yes" } else { "no" }
        ),
        format!("reason     {}", decision.reason()),
        format!("attic      {attic}"),
        format!("flakehub   {flakehub}"),
    ];
    if let Some(remedy) = decision.remedy() {
        lines.push(format!(
            "to publish {}{}",
            remedy[..1].to_lowercase(),
            &remedy[1..].trim_end_matches('.')
        ));
    }
    if decision.is_refused() {
        let what = if must_publish {
            "fail: `require-publish` is `true`"
        } else {
            "go on with a notice"
        };
        lines.push(format!("the job would {what}"));
    }
    lines.join("\n")
}
