//! What every verb takes that runs a job or a part of one, checked before anything is touched.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use crate::command::inputs::{CacheInputs, GateInputs, Text, switch};
use crate::command::job::destination::{DestinationInputs, Way};
use crate::command::job::policy::{Kept, PolicyInputs};
use crate::command::job::source::Source;
use crate::command::units;
use crate::exit::UsageError;
use crate::nix::key::PublicKey;
use crate::nix::settings::check_extra;
use crate::policy::Impurity;
use crate::runner::env::Env;
use crate::text::one_line;
use crate::trust::Request;

/// How long publishing and verifying may take at the end, if nobody says otherwise.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(300);
/// No publication that takes longer than a day is waited for; GitHub ends jobs after six hours.
const DRAIN_LIMIT: Duration = Duration::from_secs(24 * 60 * 60);

/// The inputs of a job.
#[derive(Args, Clone, Debug, Default)]
pub struct JobInputs {
    /// Lines to add to Nix's settings for the job alone, such as `max-jobs = 4` (default: none).
    #[arg(
        long,
        value_name = "LINES",
        default_value = "",
        hide_default_value = true
    )]
    pub extra_nix_config: Text,

    /// How long publishing and verifying may take at the end, such as `10m`; a bare number counts
    /// seconds (default: `300`).
    #[arg(
        long,
        value_name = "TIME",
        default_value = "",
        hide_default_value = true
    )]
    pub drain_timeout: Text,

    /// A folder for the embedded cache, used where no server is named, such as `/var/cache/flywheel`
    /// (default on a laptop: `~/.local/share/flywheel/cache`; in a job: none).
    #[arg(
        long,
        value_name = "DIR",
        default_value = "",
        hide_default_value = true
    )]
    pub embedded_cache: Text,

    /// The folder of the journal, from which the next job on this disk takes up what a killed one
    /// left, such as `/var/lib/flywheel/journal`; `off` keeps none (default:
    /// `~/.local/state/flywheel/journal`).
    #[arg(
        long,
        value_name = "DIR",
        default_value = "",
        hide_default_value = true
    )]
    pub journal: Text,

    #[command(flatten)]
    pub(crate) cache: CacheInputs,

    #[command(flatten)]
    pub(crate) destination: DestinationInputs,

    #[command(flatten)]
    pub(crate) gate: GateInputs,

    #[command(flatten)]
    pub(crate) policy: PolicyInputs,

    /// Whether nothing is published before `nix flake check` has passed in the job's folder; Flywheel runs it
    /// after the job's own work. `true` or `false`, the default.
    #[arg(
        long,
        value_name = "BOOL",
        default_value = "",
        hide_default_value = true,
        help_heading = "Policy"
    )]
    pub require_flake_check: Text,
}

/// Checked inputs of a job.
#[derive(Clone, Debug)]
pub struct Plan {
    /// What is asked of the trust gate.
    pub request: Request,
    /// Lines for Nix's settings.
    pub extra_nix_config: String,
    /// How long publishing and verifying may take.
    pub drain_timeout: Duration,
    /// Whether a loss fails the step.
    pub require_publish: bool,
    /// Which cache is used.
    pub source: Source,
    /// By whose hand paths get there.
    pub way: Way,
    /// The key by which it is trusted.
    pub public_key: Option<PublicKey>,
    /// The folder of the journal, if one is kept.
    pub journal: Option<PathBuf>,
    /// The publication policy.
    pub policy: Kept,
    /// Whether `nix flake check` has to pass before anything is published.
    pub require_flake_check: bool,
    /// What the command's own text asks impure evaluation with.
    pub impurity: Option<Impurity>,
    /// How many paths are published at once at most, if that is asked for.
    pub publish_workers: Option<usize>,
    /// Hints of the environment that are malformed and therefore not used.
    pub bad_hints: Vec<String>,
}

impl Plan {
    /// Checks everything.
    ///
    /// # Errors
    /// For the first input that is wrong; nothing has been touched then.
    pub fn read(inputs: &JobInputs, env: &Env) -> Result<Self, UsageError> {
        let named = inputs.cache.named(env)?;
        let way = inputs.destination.read()?;
        let other = way
            .store
            .clone()
            .filter(|_| named.enabled)
            .map(Source::Store);
        if other.is_some() && named.given.is_some() {
            return Err(
                UsageError::new("cache", "and `attic-server` are both given")
                    .with_hint("Give the one that the job is to use."),
            );
        }
        let extra = inputs.extra_nix_config.get().unwrap_or_default();
        check_extra(extra)?;
        Ok(Self {
            request: inputs.gate.request()?,
            extra_nix_config: extra.to_owned(),
            drain_timeout: drain_timeout(&inputs.drain_timeout)?,
            require_publish: inputs.gate.must_publish()?,
            source: other.unwrap_or_else(|| Source::find(&named, &inputs.embedded_cache, env)),
            way,
            public_key: named.key,
            journal: journal(&inputs.journal, env)?,
            policy: inputs.policy.read()?,
            require_flake_check: switch("require-flake-check", &inputs.require_flake_check, false)?,
            impurity: None,
            publish_workers: None,
            bad_hints: named.bad_hints,
        })
    }
}

fn drain_timeout(input: &Text) -> Result<Duration, UsageError> {
    let Some(text) = input.get() else {
        return Ok(DRAIN_TIMEOUT);
    };
    let time = units::duration("drain-timeout", text)?;
    if (Duration::from_secs(1)..=DRAIN_LIMIT).contains(&time) {
        return Ok(time);
    }
    let problem = format!(
        "must be from one second to one day, not `{}`",
        one_line(text, 40)
    );
    Err(UsageError::new("drain-timeout", problem)
        .with_hint("Give seconds, or a time such as `10m`."))
}

/// Where state of a user lies that outlives a job (`XDG_STATE_HOME`, freedesktop.org's base directory
/// specification).
fn journal(input: &Text, env: &Env) -> Result<Option<PathBuf>, UsageError> {
    match input.get() {
        Some("off") => return Ok(None),
        Some(folder) if PathBuf::from(folder).is_absolute() => return Ok(Some(folder.into())),
        Some(folder) => {
            let problem = format!(
                "must be a whole path or `off`, not `{}`",
                one_line(folder, 100)
            );
            return Err(
                UsageError::new("journal", problem).with_hint("Begin the folder's path with `/`.")
            );
        }
        None => (),
    }
    let state = env
        .path("XDG_STATE_HOME")
        .or_else(|| env.path("HOME").map(|home| home.join(".local/state")));
    Ok(state
        .filter(|state| state.is_absolute())
        .map(|state| state.join("flywheel/journal")))
}
