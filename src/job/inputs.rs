//! What every verb takes that runs a job or a part of one, checked before anything is touched.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{ArgAction, Args};

use crate::inputs::nix::NixInputs;
use crate::inputs::value::{Invalid, boolean, path, value, variant};
use crate::inputs::{CacheInputs, DrainInput, GateInputs, Hints, VerifyInput};
use crate::job::destination::{DestinationConfig, DestinationInputs};
use crate::job::policy::{PolicyConfig, PolicyInputs};
use crate::job::source::Source;
use crate::job::store_host::SharedHost;
use flywheel_cache::client::verify::Mode;
use flywheel_core::exit::{UsageError, VerbError};
use flywheel_core::policy::Impurity;
use flywheel_core::text::one_line;
use flywheel_core::trust::Request;
use flywheel_nix::bootstrap::plan::Wanted;
use flywheel_nix::key::PublicKey;
use flywheel_nix::settings::check_extra;
use flywheel_sys::runner::env::Env;

/// The inputs of a job.
#[derive(Args, Clone, Debug)]
pub(crate) struct JobInputs {
    /// Lines to add to Nix's settings for the job alone, such as `max-jobs = 4` (default: none).
    #[arg(long, value_name = "LINES", value_parser = value(extra_nix_config))]
    extra_nix_config: Option<String>,

    #[command(flatten)]
    pub(crate) drain: DrainInput,

    /// A folder for the embedded cache, such as `/var/cache/flywheel`. The input `attic-server` takes
    /// precedence over it; it takes precedence over the hint `ATTIC_SERVER` (default on a laptop: `~/.local/share/flywheel/cache`; in a job: none).
    #[arg(long, value_name = "DIR", value_parser = path())]
    embedded_cache: Option<PathBuf>,

    #[command(flatten)]
    host: HostInputs,

    /// Whether the job frees room in the store before a disk is full: paths that it has added itself, that the cache was
    /// seen to serve if the job publishes, and that Nix calls dead. Nothing of another job's goes, and nothing that was
    /// there before. A result that a later command needs is kept by a link to it (`nix build` makes one).
    #[arg(
        long,
        value_name = "BOOL",
        action = ArgAction::Set,
        value_parser = boolean(),
        default_value = "false"
    )]
    reclaim: bool,

    #[command(flatten, next_help_heading = "Nix")]
    nix: NixInputs,

    #[command(flatten)]
    cache: CacheInputs,

    #[command(flatten)]
    destination: DestinationInputs,

    #[command(flatten)]
    gate: GateInputs,

    #[command(flatten)]
    verify: VerifyInput,

    #[command(flatten)]
    policy: PolicyInputs,

    /// Whether nothing is published before `nix flake check` has passed in the job's folder; Flywheel
    /// runs it after the job's own work.
    #[arg(
        long,
        value_name = "BOOL",
        action = ArgAction::Set,
        value_parser = boolean(),
        default_value = "false",
        help_heading = "Policy"
    )]
    require_flake_check: bool,
}

/// What a job keeps on its host, and what it is told of the other jobs there.
#[derive(Args, Clone, Debug)]
pub(crate) struct HostInputs {
    /// The folder of the journal, from which the next job on this disk takes up what a killed one
    /// left, such as `/var/lib/flywheel/journal`; `off` keeps none (default:
    /// `~/.local/state/flywheel/journal`).
    #[arg(long, value_name = "DIR", value_parser = value(journal))]
    journal: Option<Journal>,

    /// Whether jobs of other repositories, or jobs that may not publish, work on this host's store. Then only those
    /// paths are published that this job named and whose registration vouches for them; the rest is listed as
    /// ambiguous.
    #[arg(
        long,
        value_name = "WHETHER",
        value_parser = variant::<SharedHost>(),
        default_value = "auto"
    )]
    pub(super) shared_host: SharedHost,
}

impl HostInputs {
    /// The folder of the journal, if one is kept.
    fn journal(&self, env: &Env) -> Option<PathBuf> {
        match &self.journal {
            Some(Journal::Off) => None,
            Some(Journal::Folder(folder)) => Some(folder.clone()),
            None => default_journal(env),
        }
    }

    /// The folder of the registry of this host's jobs; `None` without a journal.
    pub(super) fn registry(&self, env: &Env) -> Option<PathBuf> {
        Some(registry(&self.journal(env)?))
    }
}

fn registry(journal: &Path) -> PathBuf {
    journal.join("jobs")
}

/// The input `journal`.
#[derive(Clone, Debug)]
enum Journal {
    Off,
    Folder(PathBuf),
}

/// Checked inputs of a job.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    /// What is asked of the trust gate.
    pub(crate) request: Request,
    /// Lines for Nix's settings.
    pub(crate) extra_nix_config: String,
    /// How long publishing and verifying may take.
    pub(crate) drain_timeout: Duration,
    /// Whether a loss fails the step.
    pub(crate) require_publish: bool,
    /// How far verification goes.
    pub(crate) verify: Mode,
    /// Which cache is used.
    pub(crate) source: Source,
    /// Which client publishes to that cache.
    pub(crate) destination: DestinationConfig,
    /// The key by which Nix trusts that cache.
    pub(crate) public_key: Option<PublicKey>,
    /// How Nix comes to a machine that has none.
    pub(crate) nix: Wanted,
    /// The folder of the journal, if one is kept.
    pub(crate) journal: Option<PathBuf>,
    /// Whether other jobs can have written the store.
    pub(crate) shared_host: SharedHost,
    /// Whether the job frees its own garbage when the store's disk has little room.
    pub(crate) reclaim: bool,
    /// The publication policy.
    pub(crate) policy: PolicyConfig,
    /// Whether `nix flake check` has to pass before anything is published.
    pub(crate) require_flake_check: bool,
    /// Where the text of the command asks for impure evaluation, if it does.
    pub(crate) impurity: Option<Impurity>,
    /// The stores that the text of the command names for itself, as they are written there.
    pub(crate) named_stores: Vec<String>,
    /// The most paths to publish at the same time, if an input limits it.
    pub(crate) publish_workers: Option<usize>,
    /// Hints of the environment that are malformed and therefore not used.
    pub(crate) bad_hints: Vec<String>,
}

impl Plan {
    /// Checks everything.
    ///
    /// # Errors
    /// For the first input that is wrong; nothing has been touched then.
    pub(crate) fn read(inputs: &JobInputs, env: &Env) -> Result<Self, VerbError> {
        let mut named = inputs.cache.resolve(env);
        let mut hints = Hints::from_env(env);
        let nix = inputs.nix.or_hints(&mut hints);
        named.bad_hints.append(&mut hints.bad);
        let destination = inputs.destination.config();
        // With `attic-enabled: false` there is no cache to choose, so that two are no error.
        let other = destination
            .store
            .clone()
            .filter(|_| named.enabled)
            .map(Source::Store);
        if other.is_some() && named.given.is_some() {
            return Err(
                UsageError::new("cache", "and `attic-server` are both given")
                    .with_hint("Give the one that the job is to use.")
                    .into(),
            );
        }
        let embedded = inputs.embedded_cache.as_deref();
        let source = other.unwrap_or_else(|| Source::find(&named, embedded, env));
        Ok(Self {
            nix: nix.wanted(source.as_binary_cache(named.key.as_ref()))?,
            request: inputs.gate.request(),
            extra_nix_config: inputs.extra_nix_config.clone().unwrap_or_default(),
            drain_timeout: inputs.drain.or_default(),
            require_publish: inputs.gate.require_publish,
            verify: inputs.verify.verify,
            source,
            destination,
            public_key: named.key,
            journal: inputs.host.journal(env),
            shared_host: inputs.host.shared_host,
            reclaim: inputs.reclaim,
            policy: inputs.policy.read()?,
            require_flake_check: inputs.require_flake_check,
            impurity: None,
            named_stores: Vec::new(),
            publish_workers: None,
            bad_hints: named.bad_hints,
        })
    }
}

impl Plan {
    /// The folder of the registry of this host's jobs; `None` without a journal.
    pub(crate) fn registry(&self) -> Option<PathBuf> {
        self.journal.as_deref().map(registry)
    }
}

fn extra_nix_config(text: &str) -> Result<String, UsageError> {
    check_extra(text)?;
    Ok(text.to_owned())
}

fn journal(text: &str) -> Result<Journal, Invalid> {
    if text.eq_ignore_ascii_case("off") {
        return Ok(Journal::Off);
    }
    let folder = PathBuf::from(text);
    if folder.is_absolute() {
        return Ok(Journal::Folder(folder));
    }
    let problem = format!(
        "must be an absolute path or `off`, not `{}`",
        one_line(text, 100)
    );
    Err(Invalid::new(problem).with_hint("Begin the folder's path with `/`."))
}

fn default_journal(env: &Env) -> Option<PathBuf> {
    state_folder(env).map(|state| state.join("journal"))
}

/// This program's part of the user's folder for state that outlives a job (`XDG_STATE_HOME`, freedesktop.org's base
/// directory specification).
pub(crate) fn state_folder(env: &Env) -> Option<PathBuf> {
    let state = env
        .path("XDG_STATE_HOME")
        .or_else(|| env.path("HOME").map(|home| home.join(".local/state")));
    // The specification has a relative path ignored.
    state
        .filter(|state| state.is_absolute())
        .map(|state| state.join("flywheel"))
}
