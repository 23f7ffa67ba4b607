//! `flywheel setup`: puts the program on `PATH` and the runtime contract into the job's environment,
//! each variable only if it is valid and what it names can be reached. Never exports a token.

mod plan;

use std::error::Error as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use thiserror::Error;

use crate::inputs::nix::NixInputs;
use crate::inputs::{
    Address, BY_HAND, BazelCacheInput, Hints, ServerInputs, TrustInputs, address, http_address,
    or_hint, public_key,
};
use flywheel_core::exit::{Exit, Explain, UsageError, VerbError};
use flywheel_core::trust::{Decision, decide};
use flywheel_nix::bootstrap;
use flywheel_nix::cache_name::CacheName;
use flywheel_nix::key::PublicKey;
use flywheel_sys::http::{Names, reach, redact};
use flywheel_sys::runner::context;
use flywheel_sys::runner::env::{Env, program_folder};
use flywheel_sys::runner::files::Files;
use flywheel_sys::runner::workflow::{Level, Workflow, data};

/// A cache that is no farther than a job's runner answers long before this.
const REACH_TIMEOUT: Duration = Duration::from_secs(2);

/// Put `flywheel` on `PATH` and the caches of this job into its environment.
///
/// Exports `ATTIC_SERVER`, `ATTIC_CACHE`, `ATTIC_PUBLIC_KEY`, `BAZEL_REMOTE_CACHE` and
/// `GF_BAZEL_SUBSTRATE_MODE` to the job's later steps, each only if it is valid and what it names
/// answers within two seconds. An input goes before the runner's hint of the same name. A hint that
/// is malformed is a warning and is not used; a malformed input is an error. No token is exported.
/// Nothing is published: `--push-cache` and `--trusted-refs` only decide the outputs `trust`,
/// `publishes` and `reason`.
///
/// Outside of a job it prints the exports for a shell. With `--plan` it prints which machine this is and how Nix would be made
/// ready on it.
#[derive(Args, Debug)]
#[command(
    after_help = "Examples:\n  eval \"$(flywheel setup --attic-server https://attic.example.org/)\"\n  flywheel setup --plan"
)]
pub(crate) struct Inputs {
    #[command(flatten)]
    server: ServerInputs,

    #[command(flatten)]
    bazel: BazelCacheInput,

    #[command(flatten)]
    trust: TrustInputs,

    /// Print which machine this is, and how a job on it gets a working Nix, and do nothing else, as in `flywheel setup --plan`
    /// (default: set the job up).
    #[arg(long, help_heading = BY_HAND)]
    plan: bool,

    /// Take back the Nix that Flywheel has installed on this machine, and do nothing else, as in `flywheel setup --undo`
    /// (default: set the job up).
    #[arg(long, help_heading = BY_HAND)]
    undo: bool,

    #[command(flatten, next_help_heading = BY_HAND)]
    nix: NixInputs,
}

impl Inputs {
    /// Whether this is about the machine and its Nix, and not about the job's environment.
    pub(crate) fn is_of_machine(&self) -> bool {
        self.plan || self.undo
    }
}

/// Why the job's environment was not set up.
#[derive(Debug, Error)]
pub(crate) enum Error {
    #[error("the runner's file `{file}` cannot be written")]
    Write {
        /// The variable that names the file.
        file: &'static str,
        #[source]
        source: std::io::Error,
    },
}

impl Explain for Error {
    fn exit(&self) -> Exit {
        Exit::Host
    }

    fn hint(&self) -> Option<String> {
        let Self::Write { file, .. } = self;
        Some(format!(
            "Have the step run as the user that the runner made `{file}` for, with space left on its disk."
        ))
    }
}

/// Runs the verb.
///
/// # Errors
/// Bad input, before anything is touched; or one of the runner's files cannot be written.
pub(crate) async fn run(inputs: Inputs, env: &Env) -> Result<Exit, VerbError> {
    let request = inputs.trust.request();
    let workflow = Workflow::new(env.in_github_actions());
    // As a job on this machine has it, its runner's hints included.
    let nix = inputs
        .nix
        .or_hints(&mut Hints::from_env(env))
        .wanted(None)?;
    if inputs.plan && inputs.undo {
        let error = UsageError::new("undo", "cannot go with `--plan`");
        return Err(error.with_hint("Leave one of the two out.").into());
    }
    if inputs.plan {
        return Ok(plan::print(&nix, env).await);
    }
    if inputs.undo {
        data(&bootstrap::undo(env).await?);
        return Ok(Exit::Ok);
    }
    let wanted = Wanted::read(&inputs, env, &workflow)?;
    let decision = decide(&context::facts(env), &request, context::token_present(env));
    let exports = wanted.reachable(&workflow).await;
    let folder = launcher_folder(env);
    if workflow.in_job() {
        export_to_job(&Files::from_env(env), folder.as_deref(), &exports)?;
        set_outputs(&Files::from_env(env), &decision).map_err(write("GITHUB_OUTPUT"))?;
        for (name, value) in &exports {
            workflow.log(&format!("exports {name}={value}"));
        }
    } else {
        data(&shell_exports(folder.as_deref(), &exports));
    }
    if folder.is_none() {
        let text = "there is no folder with `flywheel` in it to put on PATH: later steps must name it in full";
        workflow.annotate(Level::Warning, "flywheel", text);
    }
    workflow.log(&format!(
        "trust: {} ({})",
        decision.verdict().as_str(),
        decision.reason()
    ));
    Ok(Exit::Ok)
}

/// What inputs and hints name: well formed, and not tried yet.
struct Wanted {
    server: Option<Address>,
    /// `None` where only a malformed hint names it.
    cache: Option<CacheName>,
    key: Option<PublicKey>,
    bazel_cache: Option<Address>,
    bazel_executor: Option<Address>,
}

impl Wanted {
    fn read(inputs: &Inputs, env: &Env, workflow: &Workflow) -> Result<Self, UsageError> {
        // Before the hints, so that an error comes before any warning.
        let bazel_cache = inputs
            .bazel
            .bazel_remote_cache
            .as_deref()
            .map(|text| {
                bazel(text).map_err(|problem| or_hint(problem).of_input("bazel-remote-cache"))
            })
            .transpose()?;
        let server = inputs.server.clone();
        let mut hints = Hints::from_env(env);
        hints.get("GF_BAZEL_SUBSTRATE_MODE", mode);
        let wanted = Self {
            server: (server.attic_server).or_else(|| hints.get("ATTIC_SERVER", http_address)),
            cache: server.attic_cache.or_else(|| hints.cache_name()),
            key: (server.attic_public_key).or_else(|| hints.get("ATTIC_PUBLIC_KEY", public_key)),
            bazel_cache: bazel_cache.or_else(|| hints.get("BAZEL_REMOTE_CACHE", bazel)),
            bazel_executor: hints.get("BAZEL_REMOTE_EXECUTOR", bazel),
        };
        for hint in &hints.bad {
            workflow.annotate(Level::Warning, "flywheel", hint);
        }
        Ok(wanted)
    }

    /// The variables to export. Name and key of a cache are of no use without its server, so they are
    /// exported only with it.
    async fn reachable(self, workflow: &Workflow) -> Vec<(&'static str, String)> {
        let names = Names::default();
        let (server, bazel_cache, executor) = tokio::join!(
            answering("ATTIC_SERVER", self.server, &names, workflow),
            answering("BAZEL_REMOTE_CACHE", self.bazel_cache, &names, workflow),
            answering(
                "BAZEL_REMOTE_EXECUTOR",
                self.bazel_executor,
                &names,
                workflow
            ),
        );
        let mode = match (&bazel_cache, &executor) {
            (None, _) => "compatibility-local-only",
            (Some(_), None) => "shared-cache-backed",
            (Some(_), Some(_)) => "executor-backed",
        };
        let mut exports = Vec::new();
        if let (Some(server), Some(cache)) = (server, self.cache) {
            exports.push(("ATTIC_SERVER", server));
            exports.push(("ATTIC_CACHE", cache.to_string()));
            exports.extend(self.key.map(|key| ("ATTIC_PUBLIC_KEY", key.to_string())));
        }
        exports.extend(bazel_cache.map(|text| ("BAZEL_REMOTE_CACHE", text)));
        exports.push(("GF_BAZEL_SUBSTRATE_MODE", mode.to_owned()));
        exports
    }
}

fn bazel(text: &str) -> Result<Address, String> {
    address(text, &["grpc", "grpcs", "http", "https"])
}

fn mode(text: &str) -> Result<(), String> {
    let known = [
        "compatibility-local-only",
        "shared-cache-backed",
        "executor-backed",
    ];
    if known.contains(&text) {
        Ok(())
    } else {
        Err(format!("is none of {}", known.join(", ")))
    }
}

/// The endpoint's text, if a server accepts connections there.
async fn answering(
    name: &str,
    endpoint: Option<Address>,
    names: &Names,
    workflow: &Workflow,
) -> Option<String> {
    let Address { text, url } = endpoint?;
    // gRPC has HTTP's ports.
    let by_scheme = if matches!(url.scheme(), "grpcs" | "https") {
        443
    } else {
        80
    };
    let host = url.host_str().unwrap_or_default();
    match reach(names, host, url.port().unwrap_or(by_scheme), REACH_TIMEOUT).await {
        Ok(()) => Some(text),
        Err(error) => {
            let cause = error
                .source()
                .map(|cause| format!(": {cause}"))
                .unwrap_or_default();
            let problem = format!("`{}` cannot be reached: {error}{cause}", redact(&url));
            workflow.annotate(
                Level::Warning,
                "flywheel",
                &format!("`{name}` is not exported: {problem}"),
            );
            None
        }
    }
}

/// The folder of `flywheel`: the action's own `dist`, else the one that this program is in.
fn launcher_folder(env: &Env) -> Option<PathBuf> {
    let action_folder = env
        .path("GITHUB_ACTION_PATH")
        .filter(|path| path.is_absolute())
        .map(|path| path.join("dist"));
    action_folder
        .into_iter()
        .chain(program_folder())
        .find(|folder| folder.join("flywheel").is_file())
}

fn write(file: &'static str) -> impl FnOnce(std::io::Error) -> Error {
    move |source| Error::Write { file, source }
}

fn export_to_job(
    files: &Files,
    folder: Option<&Path>,
    exports: &[(&'static str, String)],
) -> Result<(), Error> {
    if let Some(folder) = folder {
        files.add_path(folder).map_err(write("GITHUB_PATH"))?;
    }
    for (name, value) in exports {
        files.set_env(name, value).map_err(write("GITHUB_ENV"))?;
    }
    Ok(())
}

fn set_outputs(files: &Files, decision: &Decision) -> std::io::Result<()> {
    files.set_output("trust", decision.verdict().as_str())?;
    files.set_output(
        "publishes",
        if decision.publishes() {
            "true"
        } else {
            "false"
        },
    )?;
    files.set_output("reason", &decision.reason())?;
    files.set_output("attic", decision.plan().attic.as_str())?;
    files.set_output("flakehub", decision.plan().flakehub.as_str())?;
    files.set_output("version", env!("CARGO_PKG_VERSION"))
}

/// Lines for `eval` in a POSIX shell.
fn shell_exports(folder: Option<&Path>, exports: &[(&'static str, String)]) -> String {
    let path = folder.map(|folder| {
        format!(
            "export PATH={}${{PATH:+:\"$PATH\"}}",
            quoted(&folder.display().to_string())
        )
    });
    let variables = exports
        .iter()
        .map(|(name, value)| format!("export {name}={}", quoted(value)));
    path.into_iter()
        .chain(variables)
        .collect::<Vec<_>>()
        .join("\n")
}

/// Quotes a text for a POSIX shell: within single quotes everything is literal but the quote itself.
pub(super) fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_path_the_current_folder_is_not_searched() {
        let text = shell_exports(Some(Path::new("/opt/flywheel")), &[]);
        assert_eq!(text, r#"export PATH='/opt/flywheel'${PATH:+:"$PATH"}"#);
    }

    #[test]
    fn a_shell_takes_a_value_literally() {
        assert_eq!(quoted("a'b $(x) `y`"), r"'a'\''b $(x) `y`'");
    }
}
