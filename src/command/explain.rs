//! `flywheel explain`: the verdict of the trust gate on this job or on a recorded event, and why.
//! Publishes nothing and touches nothing.

use std::path::PathBuf;

use clap::Args;
use serde::Serialize;

use crate::inputs::value::{boolean, path, text};
use crate::inputs::{Format, FormatInput, GateInputs};
use crate::job::inputs::HostInputs;
use crate::job::store_host::survey_host;
use flywheel_core::exit::{Exit, VerbError};
use flywheel_core::trust::{Decision, ToAttic, ToFlakeHub, Verdict, decide};
use flywheel_sys::runner::context::{self, Recorded};
use flywheel_sys::runner::env::Env;
use flywheel_sys::runner::workflow::{data, json_data};

/// Explain whether this job may publish, what it would publish where, and why.
///
/// Reads the facts of the job that it runs in: `GITHUB_EVENT_NAME`, `GITHUB_REF`,
/// `GITHUB_REF_PROTECTED`, `GITHUB_REPOSITORY`, the payload in the file that `GITHUB_EVENT_PATH`
/// names, and whether `ATTIC_TOKEN` is there. Ends with 0 whatever the verdict. The JSON has the keys
/// `verdict`, `publishes`, `reason`, `plan` and `host`: whether jobs of another repository, or of lower
/// trust, work on this host, as far as the registry of its jobs shows.
///
/// To try a recorded event on a laptop, give it by flags; each stands in for the job's own value.
#[derive(Args, Debug)]
#[command(
    after_help = "Example:\n  flywheel explain --event-path push.json --event-name push --ref refs/heads/main"
)]
pub(crate) struct Inputs {
    #[command(flatten)]
    format: FormatInput,

    #[command(flatten)]
    event: EventInputs,

    #[command(flatten)]
    gate: GateInputs,

    #[command(flatten)]
    host: HostInputs,
}

/// The inputs that describe an event from elsewhere.
#[derive(Args, Debug)]
#[command(next_help_heading = "Recorded event")]
struct EventInputs {
    /// A file with the event's payload, such as `event.json` (default: the one that
    /// `GITHUB_EVENT_PATH` names).
    #[arg(long, value_name = "FILE", value_parser = path())]
    event_path: Option<PathBuf>,

    /// The event's name, such as `push` (default: `GITHUB_EVENT_NAME`).
    #[arg(long, value_name = "NAME", value_parser = text())]
    event_name: Option<String>,

    /// The full ref, such as `refs/heads/main` (default: `GITHUB_REF`).
    #[arg(long, value_name = "REF", value_parser = text())]
    r#ref: Option<String>,

    /// Whether a rule protects that ref (default: `GITHUB_REF_PROTECTED`).
    #[arg(long, value_name = "BOOL", value_parser = boolean())]
    ref_protected: Option<bool>,

    /// The repository, such as `octo-org/octo-repo` (default: `GITHUB_REPOSITORY`; with
    /// `--event-path` and outside of a job the payload's own).
    #[arg(long, value_name = "OWNER/NAME", value_parser = text())]
    repository: Option<String>,

    /// The default branch, such as `main`, for a payload that does not name it (default: the
    /// payload's own).
    #[arg(long, value_name = "NAME", value_parser = text())]
    default_branch: Option<String>,
}

impl EventInputs {
    fn recorded(self) -> Recorded {
        Recorded {
            event_name: self.event_name,
            event_path: self.event_path,
            git_ref: self.r#ref,
            ref_protected: self.ref_protected,
            repository: self.repository,
            default_branch: self.default_branch,
        }
    }
}

/// Runs the verb.
///
/// # Errors
/// For wrong input only.
pub(crate) async fn run(inputs: Inputs, env: &Env) -> Result<Exit, VerbError> {
    let facts = context::recorded(env, &inputs.event.recorded())?;
    let request = inputs.gate.request();
    let decision = decide(&facts, &request, context::token_present(env));
    let trusted = matches!(decision.verdict(), Verdict::MayPublish(_));
    let host = survey_host(&inputs.host, trusted, env);
    match inputs.format.format {
        Format::Text => data(&in_words(&decision, inputs.gate.require_publish, &host)),
        Format::Json => json_data(&json(&decision, host)),
    }
    Ok(Exit::Ok)
}

/// The JSON form. Its keys are kept stable.
#[derive(Serialize)]
struct Explanation {
    verdict: &'static str,
    publishes: bool,
    reason: String,
    plan: Plan,
    host: String,
}

#[derive(Serialize)]
struct Plan {
    attic: &'static str,
    flakehub: &'static str,
}

fn json(decision: &Decision, host: String) -> String {
    let plan = decision.plan();
    let explanation = Explanation {
        verdict: decision.verdict().as_str(),
        publishes: decision.publishes(),
        reason: decision.reason(),
        plan: Plan {
            attic: plan.attic.as_str(),
            flakehub: plan.flakehub.as_str(),
        },
        host,
    };
    serde_json::to_string_pretty(&explanation).expect("texts and a boolean are always JSON")
}

/// Every line begins with one of our own words, so that the runner takes none for a workflow command.
fn in_words(decision: &Decision, must_publish: bool, host: &str) -> String {
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
        format!("verdict    {}", decision.verdict().as_str()),
        format!(
            "publishes  {}",
            if decision.publishes() { "yes" } else { "no" }
        ),
        format!("reason     {}", decision.reason()),
        format!("attic      {attic}"),
        format!("flakehub   {flakehub}"),
        format!("host       {host}"),
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
