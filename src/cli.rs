//! The command line: which verbs there are. What each takes stands with the verb; no logic here.

use clap::{Parser, Subcommand};

use crate::command::{
    cache, cache_contract, contract, explain, flake_checks, nix_job, publish, scan, setup,
    validate_builders, watch_store,
};
use flywheel_core::exit::{Exit, Failure};
use flywheel_sys::runner::env::Env;

/// Nix CI for GitHub workflows: nothing is ever lost, and it says so.
#[derive(Debug, Parser)]
#[command(
    name = "flywheel",
    version,
    max_term_width = 100,
    disable_help_subcommand = true
)]
pub struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Runs a command with Nix ready and a cache attached, and publishes what it added.
    NixJob(Box<nix_job::Inputs>),
    /// Evaluates and builds a flake's outputs, with a verdict for each.
    FlakeChecks(Box<flake_checks::Inputs>),
    /// Publishes store paths and their closures by hand.
    Publish(publish::Inputs),
    /// Publishes while a job of many steps goes on.
    WatchStore(Box<watch_store::Inputs>),
    /// The embedded binary cache: one process, one folder.
    Cache(cache::Inputs),
    /// Says whether a job may publish, what it would publish, and why.
    Explain(explain::Inputs),
    /// Proves that a builder is healthy, and names the layer that is broken.
    ValidateBuilders(Box<validate_builders::Inputs>),
    /// Prints the builder contract, and checks a contract file and workflows against it.
    Contract(contract::Inputs),
    /// Checks the shared-cache contract for Bazel: mode, endpoints, answers.
    CacheContract(cache_contract::Inputs),
    /// Looks into store paths by hand for what must not be published.
    Scan(scan::Inputs),
    /// Puts this binary on `PATH` and the cache's settings into the job's environment.
    Setup(setup::Inputs),
}

impl Cli {
    /// Runs the verb that was asked for.
    ///
    /// # Errors
    /// Whatever the verb fails with.
    pub async fn run(self, env: &Env) -> Result<Exit, Failure> {
        match self.verb {
            Verb::NixJob(inputs) => nix_job::run(*inputs, env).await,
            Verb::FlakeChecks(inputs) => flake_checks::run(*inputs, env).await,
            Verb::Publish(inputs) => publish::run(inputs, env).await,
            Verb::WatchStore(inputs) => watch_store::run(*inputs, env).await,
            Verb::Cache(inputs) => cache::run(inputs, env).await,
            Verb::Explain(inputs) => explain::run(inputs, env).await,
            Verb::ValidateBuilders(inputs) => validate_builders::run(*inputs, env).await,
            Verb::Contract(inputs) => contract::run(inputs, env).await,
            Verb::CacheContract(inputs) => cache_contract::run(inputs, env).await,
            Verb::Scan(inputs) => scan::run(inputs, env).await,
            Verb::Setup(inputs) => setup::run(inputs, env).await,
        }
    }
}
