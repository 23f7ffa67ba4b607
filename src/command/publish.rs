//! `flywheel publish`: store paths and their closures, by hand.

mod output;
mod paths;

use std::collections::BTreeSet;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use clap::{ArgAction, Args};
use thiserror::Error;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use crate::command::cache::login;
use crate::inputs::roots::roots;
use crate::inputs::value::boolean;
use crate::inputs::{CacheInputs, DrainInput, FormatInput, GateInputs, VerifyInput};
use crate::job::policy::PolicyInputs;
use crate::job::publication;
use flywheel_cache::client::attic::Attic;
use flywheel_cache::client::endpoint::Endpoint;
use flywheel_cache::client::probe::{self, Probe, probe};
use flywheel_cache::client::publish::{self, Outcome, Publisher, Recheck, Upstream};
use flywheel_cache::client::verify::{self, Verification, verify};
use flywheel_core::exit::{Exit, Explain, Failure, UsageError, VerbError};
use flywheel_core::progress::Sink;
use flywheel_core::secret::Secret;
use flywheel_core::trust::{Decision, decide};
use flywheel_nix::bootstrap;
use flywheel_nix::bootstrap::plan::{Installer, Wanted};
use flywheel_nix::bootstrap::rootless;
use flywheel_nix::key::PublicKey;
use flywheel_nix::path_info::PathInfos;
use flywheel_nix::store::Store;
use flywheel_nix::store_path::StorePath;
use flywheel_sys::http::{Clients, Names};
use flywheel_sys::process::signals::Signals;
use flywheel_sys::runner::context;
use flywheel_sys::runner::env::Env;
use flywheel_sys::runner::workflow::{Level, Workflow};

/// A machine with store paths has Nix, so nothing is installed; repairing its daemon takes a moment.
const NIX_LIMIT: Duration = Duration::from_secs(60);
/// Looking up what was published may take this long, even if publishing took all of its own time.
const VERIFY_LIMIT: Duration = Duration::from_secs(60);

/// Publish store paths and everything they refer to, and prove that the cache serves them.
///
/// What the cache has already, or an upstream cache has signed (unless `--include-upstream` says so), is not sent again. Each path that was
/// sent is looked up afterwards: hash, signature, and the body itself as far as `--verify` says. The
/// token is read from `ATTIC_TOKEN`; outside of CI, else that of `flywheel cache login`. Calling this is the request to publish, so `--publish` and `--push-cache` change
/// nothing; in a job the trust gate still decides, as it does for `nix-job` (see `flywheel explain`),
/// and a refusal is a notice.
///
/// Paths that the policy withholds are listed and not sent (`docs/policy.md`). Ends with 1 if a path is lost, or, with
/// `--on-finding fail`, withheld.
#[derive(Args, Debug)]
#[command(
    after_help = "Example:\n  ATTIC_TOKEN=… flywheel publish --attic-server https://cache.example.org ./result"
)]
pub(crate) struct Inputs {
    /// Store paths, or links to them such as `./result`.
    #[arg(value_name = "PATH", required = true)]
    paths: Vec<std::path::PathBuf>,

    /// Whether what an upstream cache has signed is sent as well, such as Nix itself to a cache for machines without the
    /// internet.
    #[arg(
        long,
        value_name = "BOOL",
        action = ArgAction::Set,
        value_parser = boolean(),
        default_value = "false"
    )]
    include_upstream: bool,

    #[command(flatten)]
    format: FormatInput,

    #[command(flatten)]
    drain: DrainInput,

    #[command(flatten)]
    policy: PolicyInputs,

    #[command(flatten)]
    cache: CacheInputs,

    #[command(flatten)]
    gate: GateInputs,

    #[command(flatten)]
    verify: VerifyInput,
}

impl Inputs {
    /// Whether what is to be published is in a store that only those see who enter it.
    pub(crate) fn are_in_rootless_store(&self, env: &Env) -> bool {
        rootless::holds(env, &self.paths)
    }
}

/// Why nothing was published.
#[derive(Debug, Error)]
pub(crate) enum Error {
    /// The trust gate does not allow it.
    #[error("nothing is published: {reason}")]
    Refused {
        reason: String,
        /// What would have to change for the gate to allow it.
        remedy: Option<String>,
    },
    /// The cache does not work.
    #[error("the cache fails at layer `{layer}`: {text}")]
    Cache {
        layer: &'static str,
        /// What was seen, and what to do.
        text: String,
    },
    #[error("the signal handlers cannot be installed")]
    Signals(#[source] std::io::Error),
    #[error("`{0}` is not valid in the store")]
    Invalid(StorePath),
}

impl Explain for Error {
    fn hint(&self) -> Option<String> {
        match self {
            Self::Refused { remedy, .. } => remedy.clone(),
            Self::Cache { .. } | Self::Signals(_) => None,
            Self::Invalid(_) => Some(
                "Build it first; a folder in the store without registration is not a path.".into(),
            ),
        }
    }
}

/// Runs the verb.
///
/// # Errors
/// Bad input; a verdict, a cache or a path that forbids publishing.
pub(crate) async fn run(inputs: Inputs, env: &Env) -> Result<Exit, VerbError> {
    let workflow = Workflow::new(env.in_github_actions());
    let (format, limit) = (inputs.format.format, inputs.drain.or_default());
    let (endpoint, key) = cache(&inputs.cache, env, &workflow)?;
    let token = context::cache_token(env).or_else(|| login::token_for(env, &endpoint));
    if let Some(token) = &token {
        workflow.mask(token);
    }
    let policy = inputs.policy.read()?;
    let decision = judge(&inputs.gate, env, token.is_some());
    let Some(permit) = decision.permit() else {
        return Ok(refused(&decision, &workflow, inputs.gate.require_publish)?);
    };
    let wanted = paths::resolve(&inputs.paths)?;
    let sink = output::sink(&workflow);
    let clients = Clients::new(&roots(env))?;
    let probing = start_probe(&endpoint, token.as_ref(), &clients);
    let (store, found) = Box::pin(closure(env, &sink, &wanted)).await?;
    let secrets = [("ATTIC_TOKEN", token.as_ref())];
    let folder = store.folder().to_owned();
    let inspector = policy.inspector(env, &secrets, &[], Some(Arc::new(store)));
    let attic = Attic::new(endpoint, token, clients);
    let verify = verify::Options {
        mode: inputs.verify.verify,
        ..verify::Options::default()
    };
    let options = publish::Options {
        inspector: Some(Arc::clone(&inspector)),
        recheck: Some(Recheck {
            key,
            mode: verify.mode,
            seed: verify.seed,
            policy: verify.policy,
        }),
        store: folder,
        upstream: if inputs.include_upstream {
            Upstream::none()
        } else {
            Upstream::default()
        },
        ..publish::Options::default()
    };
    let publisher = Publisher::start(&permit, attic.clone(), options, sink.clone());
    let delivering = deliver(publisher, &attic, verify, &found, limit);
    let (outcome, verification) = Box::pin(unless_unusable(delivering, probing)).await?;
    let publication = publication::summarize(
        &outcome,
        &verification,
        &found.unreadable,
        &inspector.warned(),
        &publication::StoreAtEnd::default(),
    );
    let offered = (outcome.paths.len() + found.unreadable.len()) as u64;
    let lost = output::report(&workflow, format, &publication, offered, outcome.elapsed);
    if publication.skipped > 0 {
        workflow.log(
            "what is skipped is signed by an upstream cache, which serves it: `--include-upstream true` sends it, too",
        );
    }
    let withheld = policy.fails && !publication.withheld.is_empty();
    Ok(if lost || withheld {
        Exit::Failed
    } else {
        Exit::Ok
    })
}

/// Probes the cache beside everything else: its layers name what is wrong with a cache that fails, and one that works is
/// not kept waiting for that.
fn start_probe(
    endpoint: &Endpoint,
    token: Option<&Secret>,
    clients: &Clients,
) -> AbortOnDropHandle<Probe> {
    let (endpoint, token, client) = (endpoint.clone(), token.cloned(), clients.api.clone());
    AbortOnDropHandle::new(tokio::spawn(async move {
        let names = Names::default();
        probe(&endpoint, token.as_ref(), &client, &names, probe::DEADLINE).await
    }))
}

/// What comes of the delivery, unless the probe finds that the cache cannot be used. A cache that answers may be written
/// to even if Nix could not read from it.
async fn unless_unusable<T>(
    delivering: impl Future<Output = Result<T, Failure>>,
    mut probing: AbortOnDropHandle<Probe>,
) -> Result<T, Failure> {
    let mut delivering = pin!(delivering);
    let probe = tokio::select! {
        biased;
        delivered = &mut delivering => return delivered,
        probe = &mut probing => probe,
    };
    // A probe that panicked has found nothing.
    if let Ok(probe) = probe
        && let Some((layer, text)) = probe.failed.filter(|_| !probe.answers)
    {
        let layer = layer.as_str();
        return Err(Error::Cache { layer, text }.into());
    }
    delivering.await
}

/// The cache that inputs or hints name, and its public key.
fn cache(
    inputs: &CacheInputs,
    env: &Env,
    workflow: &Workflow,
) -> Result<(Endpoint, Option<PublicKey>), UsageError> {
    let named = inputs.resolve(env);
    for hint in &named.bad_hints {
        workflow.annotate(Level::Warning, "hint", hint);
    }
    let name = named.name.ok_or_else(|| {
        UsageError::new(
            "attic-cache",
            "is not given, and the hint `ATTIC_CACHE` is malformed",
        )
        .with_hint("Give the cache's name, such as `--attic-cache main`.")
    })?;
    let server = named
        .given
        .or(named.hinted)
        .filter(|_| named.enabled)
        .ok_or_else(|| {
            UsageError::new(
                "attic-server",
                "is not given, and neither is the hint `ATTIC_SERVER`",
            )
            .with_hint(
                "Give the server's address, such as `--attic-server https://cache.example.org/`.",
            )
        })?;
    Ok((Endpoint::new(server, name), named.key))
}

/// Lets the trust gate decide. Calling this verb is the request to publish.
fn judge(gate: &GateInputs, env: &Env, has_token: bool) -> Decision {
    let mut request = gate.request();
    request.by_hand = true;
    decide(&context::facts(env), &request, has_token)
}

fn refused(decision: &Decision, workflow: &Workflow, must_publish: bool) -> Result<Exit, Failure> {
    let (reason, remedy) = (decision.reason(), decision.remedy());
    if must_publish || !workflow.in_job() {
        return Err(Error::Refused { reason, remedy }.into());
    }
    workflow.annotate(
        Level::Notice,
        "publication",
        &format!("nothing is published: {reason}"),
    );
    Ok(Exit::Ok)
}

/// Opens the store, and reads the closure of what is to be published.
async fn closure(
    env: &Env,
    sink: &Sink,
    wanted: &[StorePath],
) -> Result<(Store, PathInfos), Failure> {
    // Reading the database directly is fast. Only if that does not answer the question is Nix called.
    if let Some(store) = bootstrap::local_store(env).await
        && let Ok(found) = store.closure(wanted).await
        && unknown(&found, wanted).is_none()
    {
        return Ok((store, found));
    }
    let (store, found) = closure_after_repair(env, sink, wanted).await?;
    match unknown(&found, wanted) {
        Some(path) => Err(Error::Invalid(path.clone()).into()),
        None => Ok((store, found)),
    }
}

/// The first of these paths that was not found.
fn unknown<'a>(found: &PathInfos, wanted: &'a [StorePath]) -> Option<&'a StorePath> {
    let known: BTreeSet<&StorePath> = found.infos.iter().map(|info| &info.path).collect();
    let unreadable = |path: &StorePath| {
        found
            .unreadable
            .iter()
            .any(|other| other.path == path.to_string())
    };
    wanted
        .iter()
        .find(|path| !known.contains(path) && !unreadable(path))
}

/// Does the same where Nix has to be made ready first.
async fn closure_after_repair(
    env: &Env,
    sink: &Sink,
    wanted: &[StorePath],
) -> Result<(Store, PathInfos), Failure> {
    let wanted_nix = Wanted {
        installer: Installer::None,
        ..Wanted::default()
    };
    let ready = bootstrap::ready(env, &wanted_nix, &roots(env), sink, NIX_LIMIT).await?;
    let found = async {
        let store = match (&ready.opened, &ready.settings_before) {
            (Some(opened), Some(settings)) => {
                Store::from_opened(&ready.nix, opened, settings).await?
            }
            _ => Store::open(&ready.nix).await?,
        };
        // A closure that Nix lists is of no use without its files.
        store.location().map_err(Clone::clone)?;
        let found = store.closure(wanted).await?;
        Ok::<_, flywheel_nix::store::Error>((store, found))
    };
    let found = found.await;
    ready.stop().await;
    Ok(found?)
}

async fn deliver(
    publisher: Publisher,
    attic: &Attic,
    options: verify::Options,
    found: &PathInfos,
    limit: Duration,
) -> Result<(Outcome, Verification), Failure> {
    let (cancel, _listening) = until_signalled()?;
    publisher.offer(found.infos.clone()).await;
    let deadline = Instant::now() + limit;
    let outcome = publisher.drain(deadline, cancel.clone()).await;
    let sent = outcome.sent().cloned().collect();
    let options = options.following(outcome.key.clone(), outcome.stalled);
    let until = deadline.max(Instant::now() + VERIFY_LIMIT);
    let verification = verify(attic.clone(), sent, &options, until, &cancel).await;
    Ok((outcome, verification))
}

/// A token that a request to stop cancels. The task that listens for them ends when the handle is dropped.
fn until_signalled() -> Result<(CancellationToken, AbortOnDropHandle<()>), Error> {
    let mut signals = Signals::listen().map_err(Error::Signals)?;
    let cancel = CancellationToken::new();
    let cancelled = cancel.clone();
    let listening = tokio::spawn(async move {
        signals.next().await;
        cancelled.cancel();
    });
    Ok((cancel, AbortOnDropHandle::new(listening)))
}
