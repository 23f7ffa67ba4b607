//! The command line: which verbs there are, and what becomes of a wrong one. What each verb takes stands
//! with the verb, and the definition there is the only one: variables, defaults, parsing, the inputs of the
//! actions and `docs/reference.md` follow from it.

pub(crate) mod definitions;
mod help;
mod words;

use std::ffi::OsString;

use clap::error::ErrorKind;
use clap::{Command, CommandFactory as _, FromArgMatches as _, Parser, Subcommand};

use crate::command::{
    cache, cache_contract, completions, contract, daemon_proxy, explain, flake_checks, image, init,
    man, namespace_trial, nix_job, publish, reference, scan, setup, validate_builders, watch_store,
};
use crate::inputs::parse::{PROGRAM, Refusal, matches, refusal};
use crate::inputs::variables::{Blank, attach};
use crate::job::{self, lacking};
use flywheel_core::exit::{Exit, VerbError};
use flywheel_nix::bootstrap::rootless::{self, Viewers};
use flywheel_sys::process::core_dump::Reach;
use flywheel_sys::runner::env::Env;

/// Nix CI for GitHub workflows: every store path is published, or named with the reason why not.
#[derive(Debug, Parser)]
#[command(
    name = PROGRAM,
    version,
    max_term_width = 100,
    disable_help_subcommand = true,
    after_help = "Examples:\n  flywheel help nix-job\n  flywheel version"
)]
pub(crate) struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    NixJob(Box<nix_job::Inputs>),
    FlakeChecks(Box<flake_checks::Inputs>),
    Image(image::Inputs),
    Init(init::Inputs),
    Publish(publish::Inputs),
    WatchStore(Box<watch_store::Inputs>),
    Cache(cache::Inputs),
    Explain(explain::Inputs),
    ValidateBuilders(Box<validate_builders::Inputs>),
    Contract(contract::Inputs),
    CacheContract(cache_contract::Inputs),
    DaemonProxy(daemon_proxy::Inputs),
    NamespaceTrial(namespace_trial::Inputs),
    Reference(reference::Inputs),
    Completions(completions::Inputs),
    Man(man::Inputs),
    Scan(scan::Inputs),
    Setup(setup::Inputs),
}

/// Every verb with its flags, and with the variable that each of them reads.
pub(crate) fn command() -> Command {
    attach(defined(), &Blank::default())
}

/// Every verb as it is defined, without variables.
fn defined() -> Command {
    help::with_exit_codes(Cli::command())
}

/// Has messages name the inputs as they are given where this process runs.
pub(crate) fn name_inputs(arguments: &[OsString], env: &Env) {
    if let Some(names) = words::input_names(&command(), arguments, env) {
        names.use_for_messages();
    }
}

impl Cli {
    /// Reads the arguments behind the program's name, and the variables that flags have.
    ///
    /// # Errors
    /// For the first value that is wrong, or for a wrong command line.
    pub(crate) fn read(arguments: Vec<OsString>, env: &Env) -> Result<Self, Refusal> {
        let arguments = words_as_flags(arguments).map_err(Refusal::Clap)?;
        let matches = matches(defined(), arguments, env)?;
        Self::from_arg_matches(&matches).map_err(refusal)
    }

    /// Whether a process of this verb may be left running when its step ends.
    pub(crate) fn reach(&self) -> Reach {
        match self.verb {
            Verb::WatchStore(_) | Verb::Cache(_) | Verb::DaemonProxy(_) => Reach::Job,
            _ => Reach::Step,
        }
    }

    /// The environment for the verb, with what it lacks for Nix and the journal. The inputs are checked first, since what
    /// is lacking is made.
    ///
    /// # Errors
    /// When an input is wrong, or what is lacking cannot be made up for.
    pub(crate) fn environment(&self, env: Env) -> Result<Env, VerbError> {
        match &self.verb {
            Verb::NixJob(inputs) => inputs.check(&env)?,
            Verb::FlakeChecks(inputs) => inputs.check(&env)?,
            Verb::WatchStore(inputs) if inputs.is_watch() => inputs.check(&env)?,
            _ => {}
        }
        match self.verb {
            Verb::NixJob(_)
            | Verb::FlakeChecks(_)
            | Verb::Publish(_)
            | Verb::WatchStore(_)
            | Verb::ValidateBuilders(_) => Ok(lacking::complete(&env)?),
            // What a job on this machine finds, and what it has left, depends on its home.
            Verb::Setup(ref inputs) if inputs.is_of_machine() => Ok(lacking::complete(&env)?),
            // The others start no Nix and keep no journal.
            _ => Ok(env),
        }
    }

    /// Lets the verb see a store in a folder of this user's, where he can have none at `/nix`. To be called before any
    /// thread is started.
    ///
    /// # Errors
    /// When such a store cannot be had, or is of no use to the verb.
    pub(crate) fn enter_rootless_store(&self, env: &Env) -> Result<(), VerbError> {
        if matches!(self.verb, Verb::NamespaceTrial(_)) {
            namespace_trial::enter(env);
            return Ok(());
        }
        let works_on_store = matches!(
            self.verb,
            Verb::NixJob(_) | Verb::FlakeChecks(_) | Verb::Publish(_) | Verb::WatchStore(_)
        );
        let Some(need) = works_on_store.then(|| rootless::need(env)).flatten() else {
            return Ok(());
        };
        let (viewers, undone) = match &self.verb {
            Verb::NixJob(_) => (Viewers::Children, "the command was not run"),
            Verb::FlakeChecks(_) => (Viewers::Children, "nothing was checked"),
            Verb::Publish(inputs) if inputs.are_in_rootless_store(env) => {
                (Viewers::Children, "nothing was published")
            }
            Verb::WatchStore(inputs) if inputs.is_watch() && !need.is_nix_there => {
                (Viewers::Others, "nothing is watched")
            }
            _ => return Ok(()),
        };
        Ok(job::rootless::enter(env, need, viewers, undone)?)
    }

    /// Runs the verb that was asked for.
    ///
    /// # Errors
    /// Whatever the verb fails with.
    pub(crate) async fn run(self, env: &Env) -> Result<Exit, VerbError> {
        match self.verb {
            Verb::NixJob(inputs) => nix_job::run(*inputs, env).await,
            Verb::FlakeChecks(inputs) => Box::pin(flake_checks::run(*inputs, env)).await,
            Verb::Image(inputs) => image::run(inputs, env).await,
            Verb::Init(inputs) => init::run(inputs, env).await,
            Verb::Publish(inputs) => publish::run(inputs, env).await,
            Verb::WatchStore(inputs) => watch_store::run(*inputs, env).await,
            Verb::Cache(inputs) => cache::run(inputs, env).await,
            Verb::Explain(inputs) => explain::run(inputs, env).await,
            Verb::ValidateBuilders(inputs) => validate_builders::run(*inputs, env).await,
            Verb::Contract(inputs) => contract::run(inputs, env).await,
            Verb::CacheContract(inputs) => cache_contract::run(inputs, env).await,
            Verb::DaemonProxy(inputs) => daemon_proxy::run(inputs).await,
            // Done before any thread was started.
            Verb::NamespaceTrial(_) => Ok(Exit::Ok),
            Verb::Reference(inputs) => reference::run(inputs).await,
            Verb::Completions(inputs) => completions::run(inputs).await,
            Verb::Man(inputs) => man::run(inputs, env).await,
            Verb::Scan(inputs) => scan::run(inputs, env).await,
            Verb::Setup(inputs) => setup::run(inputs, env).await,
        }
    }
}

/// `help [VERB]…` and `version` as the flags that they stand for. They are no verbs of clap's, because a verb has inputs
/// and a page in the reference.
fn words_as_flags(arguments: Vec<OsString>) -> Result<Vec<OsString>, clap::Error> {
    match arguments.split_first() {
        Some((word, [])) if word == "version" => Ok(vec!["--version".into()]),
        Some((word, names)) if word == "help" => {
            let mut root = Cli::command();
            let mut verb = &root;
            for name in names {
                let Some(below) = name.to_str().and_then(|name| verb.find_subcommand(name)) else {
                    let name = name.to_string_lossy();
                    let text =
                        format!("there is no verb `{name}`; `flywheel help` lists them all\n");
                    return Err(root.error(ErrorKind::InvalidSubcommand, text));
                };
                verb = below;
            }
            Ok([names, &["--help".into()]].concat())
        }
        _ => Ok(arguments),
    }
}

#[cfg(test)]
mod tests {
    use clap::builder::PossibleValue;

    use super::*;

    #[test]
    fn the_definitions_are_sound() {
        command().debug_assert();
    }

    /// Values of every kind that an input can have.
    const SAMPLES: [&str; 17] = [
        "1",
        "8",
        "true",
        "x",
        "127.0.0.1:1",
        "https://host.example/",
        "main:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY=",
        "/nix/store/fvchs9i3c9f4d6lcsm7q2ybxwpbnz4yc-hello",
        "x86_64-linux",
        "refs/heads/main",
        "cache",
        "secret = warn",
        "1GiB",
        "secret hello-* a reason",
        "2.31.2",
        "https://host.example/ main:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY=",
        "octo-org/flywheel@main",
    ];

    #[test]
    fn each_value_arrives_as_the_type_of_its_field() {
        // clap compares the types only when a value is taken out, and panics then.
        let mut verbs = vec![(Vec::new(), command())];
        while let Some((name, verb)) = verbs.pop() {
            for below in verb.get_subcommands() {
                verbs.push((
                    [&name[..], &[below.get_name().to_owned()]].concat(),
                    below.clone(),
                ));
            }
            let flags = verb.get_arguments().filter(|flag| !flag.is_hide_set());
            for flag in flags.filter(|flag| flag.get_action().takes_values()) {
                let Some(long) = flag.get_long() else {
                    continue;
                };
                let required = match name.first().map(String::as_str) {
                    Some("publish" | "scan") => &["x"][..],
                    Some("cache") if name.ends_with(&["revoke".to_owned()]) => match long {
                        "dir" => &["x"][..],
                        _ => &["x", "--dir=x"],
                    },
                    Some("cache")
                        if name
                            .last()
                            .is_some_and(|name| name == "use" || name == "login") =>
                    {
                        &[]
                    }
                    Some("cache") if long != "dir" => &["--dir=x"],
                    Some("image") if name.last().is_some_and(|last| last == "approve") => {
                        match long {
                            "cpu" => &["--memory-gb=8"][..],
                            "memory-gb" => &["--cpu=8"],
                            _ => &["--cpu=8", "--memory-gb=8"],
                        }
                    }
                    _ => &[],
                };
                let named = flag.get_possible_values();
                let named = named.iter().map(PossibleValue::get_name);
                let read = |value: &str| {
                    let flag = format!("--{long}={value}");
                    let arguments = name
                        .iter()
                        .map(String::as_str)
                        .chain(required.iter().copied());
                    let arguments = arguments.chain([flag.as_str()]).map(OsString::from);
                    Cli::read(arguments.collect(), &Env::default()).is_ok()
                };
                let mut values = named.chain(SAMPLES);
                assert!(values.any(read), "no sample is good for {name:?} --{long}");
            }
        }
    }
}
