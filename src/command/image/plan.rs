//! `flywheel image plan`: the size of a build's runner and its caches, with the reasons. Changes nothing.

mod context;
mod print;

use std::path::{Path, PathBuf};

use clap::Args;

use self::context::{Context, document};
use super::{HistoryInput, TargetInput, WorkspaceInput};
use crate::inputs::value::{Invalid, one_of, path};
use crate::inputs::{Format, FormatInput, TrustedRefsInput};
use flywheel_core::exit::{Exit, UsageError, VerbError};
use flywheel_core::trust::{Request, decide};
use flywheel_image::directives::{BUILD_DIRECTIVES, Directives, is_workspace};
use flywheel_image::history::{Dependencies, History};
use flywheel_image::language::Language;
use flywheel_image::namespace::{CachePlan, Standing, plan};
use flywheel_image::size::{Architecture, NoSize, SIZES, SizeTable, SizesFile, Target};
use flywheel_image::sizing::{self, Decision, Known, Policy, Source};
use flywheel_sys::runner::context as job_context;
use flywheel_sys::runner::env::Env;
use flywheel_sys::runner::workflow::{Level, Workflow};

/// Show how large a runner a build would get, why, and what each size would have cost on its history; with directives
/// also which caches it may read and write here.
///
/// The first that knows wins: `.build-spec.ncl`, `.json`, `.toml` or `.yml` in the context; the history, once an operator
/// has approved it (`image sizing approve`); the language of the files at the top of the context.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  flywheel image plan
  flywheel image plan services/web --workspace web --target final --policy expected-cost")]
pub(super) struct Plan {
    /// The folder of the build's context (default: `.`).
    #[arg(value_name = "CONTEXT", value_parser = path())]
    context: Option<PathBuf>,

    #[command(flatten)]
    workspace: WorkspaceInput,

    #[command(flatten)]
    target: TargetInput,

    /// The platform of the image: `linux/amd64` or `linux/arm64` (default: this machine's).
    #[arg(long, value_name = "PLATFORM", value_parser = one_of(&Architecture::PLATFORMS))]
    platform: Option<Architecture>,

    /// A platform whose runners may emulate the image's: `linux/amd64` or `linux/arm64` (default: none, since emulated
    /// builds take many times as long).
    #[arg(long, value_name = "PLATFORM", value_parser = one_of(&Architecture::PLATFORMS))]
    emulate: Option<Architecture>,

    /// How history becomes a size. `p95` takes the 95th percentile of what was used and a fifth more; `expected-cost`
    /// the size that would have cost the least, retries included.
    #[arg(long, value_name = "POLICY", value_parser = one_of(&Policy::ALL), default_value = "p95")]
    policy: Policy,

    /// Whether the layer with the dependencies is in the cache: `hit` or `miss`. Either has a history of its own.
    #[arg(long, value_name = "STATE", value_parser = one_of(&Dependencies::ALL), default_value = "miss")]
    dependencies: Dependencies,

    /// A document with the sizes of runners that there are, such as `sizes.toml` (default: four sizes of ARM, `cax11`
    /// to `cax41`).
    #[arg(long, value_name = "FILE", value_parser = path())]
    sizes: Option<PathBuf>,

    /// The directives of the build, such as `directives.yml` (default: none, and no caches are planned).
    #[arg(long, value_name = "FILE", value_parser = path())]
    directives: Option<PathBuf>,

    #[command(flatten)]
    history: HistoryInput,

    #[command(flatten)]
    trusted_refs: TrustedRefsInput,

    #[command(flatten)]
    format: FormatInput,
}

/// What is shown.
struct Planned {
    workspace: String,
    target: String,
    platform: Architecture,
    decision: Decision,
    caches: Option<CachePlan>,
}

/// Runs the verb.
///
/// # Errors
/// When an input or a document is wrong.
pub(super) async fn run(inputs: Plan, env: &Env) -> Result<Exit, VerbError> {
    let folder = inputs.context.as_deref().unwrap_or(Path::new("."));
    let context = Context::read(folder, env).await?;
    let directives = directives(inputs.directives.as_deref(), env).await?;
    let platform = inputs.platform.or_else(Architecture::of_this_machine);
    let platform = platform.ok_or_else(|| {
        UsageError::new(
            "platform",
            "is needed: images are not built for this machine's",
        )
    })?;
    let workspace = workspace(&inputs, directives.as_ref(), folder)?;
    let table = sizes(inputs.sizes.as_deref(), env).await?;
    let workflow = Workflow::new(env.in_github_actions());
    let history = history(&inputs, &workspace, env, &workflow)?;
    let named = directives.as_ref();
    let stage = named.and_then(|directives| directives.artifact.target.clone());
    let target = inputs.target.target.clone().or(stage).unwrap_or_default();
    // What the directives ask for goes before the context's file.
    let overriding = named.and_then(|directives| directives.runner_override.as_ref());
    let spec = match (overriding, &context.spec) {
        (Some(spec), _) => Some(("runner_override", spec)),
        (None, Some((file, spec))) => Some((file.as_str(), spec)),
        (None, None) => None,
    };
    let (language, marker) = Language::detect(&context.names());
    let decision = sizing::decide(
        &table,
        Target {
            architecture: platform,
            emulated_on: inputs.emulate,
        },
        inputs.policy,
        &Known {
            spec,
            runs: &history.alike(&target, inputs.dependencies),
            approval: history.approval(&target),
            language,
            marker,
        },
    );
    refuse_bad_name(&decision)?;
    let planned = Planned {
        caches: named.map(|directives| caches(&inputs, directives, &workspace, env)),
        workspace,
        target,
        platform,
        decision,
    };
    match inputs.format.format {
        Format::Text => print::text(&planned),
        Format::Json => print::json(&planned),
    }
    Ok(Exit::Ok)
}

/// A size that somebody named and that cannot be had is an error; one that nobody named is a part of the plan.
fn refuse_bad_name(decision: &Decision) -> Result<(), UsageError> {
    match &decision.size {
        Err(error @ (NoSize::Unknown { .. } | NoSize::Foreign { .. }))
            if decision.source == Source::Explicit =>
        {
            let problem = format!("is wrong, because {}: {error}", decision.reason);
            Err(UsageError::new("runner_type", problem).with_hint(error.remedy()))
        }
        _ => Ok(()),
    }
}

async fn directives(file: Option<&Path>, env: &Env) -> Result<Option<Directives>, VerbError> {
    match file {
        Some(file) => document("directives", file, &BUILD_DIRECTIVES, env)
            .await
            .map(Some),
        None => Ok(None),
    }
}

async fn sizes(file: Option<&Path>, env: &Env) -> Result<SizeTable, VerbError> {
    let Some(file) = file else {
        return Ok(SizeTable::default());
    };
    let read: SizesFile = document("sizes", file, &SIZES, env).await?;
    let table = SizeTable::new(read.sizes);
    Ok(table.map_err(|problem| UsageError::new("sizes", problem))?)
}

fn workspace(
    inputs: &Plan,
    directives: Option<&Directives>,
    folder: &Path,
) -> Result<String, UsageError> {
    let named = directives.map(|directives| &directives.workspace);
    if let Some(named) = inputs.workspace.workspace.as_ref().or(named) {
        return Ok(named.clone());
    }
    let folder = folder.canonicalize().unwrap_or_else(|_| folder.to_owned());
    let name = folder.file_name().and_then(|name| name.to_str());
    let name = name.map(str::to_lowercase);
    name.filter(|name| is_workspace(name)).ok_or_else(|| {
        Invalid::new("is needed: the name of the context's folder cannot be one")
            .with_hint("Give it as `--workspace NAME`.")
            .of_input("workspace")
    })
}

/// The history; an empty one if it cannot be read, since a plan must not fail for what only makes it better.
fn history(
    inputs: &Plan,
    workspace: &str,
    env: &Env,
    workflow: &Workflow,
) -> Result<History, UsageError> {
    let file = match inputs.history.file(workspace, env) {
        Ok(file) => file,
        Err(_) if inputs.history.history.is_none() => return Ok(History::default()),
        Err(error) => return Err(error),
    };
    Ok(file.read().unwrap_or_else(|error| {
        let text = format!("no history is used: {error}: {}", error.source);
        workflow.annotate(Level::Warning, "image plan", &text);
        History::default()
    }))
}

fn caches(inputs: &Plan, directives: &Directives, workspace: &str, env: &Env) -> CachePlan {
    let facts = job_context::facts(env);
    let request = Request {
        trusted_refs: inputs.trusted_refs.trusted_refs.clone(),
        ..Request::default()
    };
    let decision = decide(&facts, &request, false);
    let policy = &directives.cache_policy;
    plan(
        &policy.actor(),
        workspace,
        policy.disposition,
        Standing::of(&facts, decision.verdict()),
    )
}
