//! What `validate-builders` takes, and the plan that follows: everything is checked here, before anything is
//! looked at.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::Args;
use url::Url;

use super::board::Weights;
use crate::cache::endpoint::Endpoint;
use crate::command::Failure;
use crate::command::cache_contract::unknown_class;
use crate::command::contract::ContractInput;
use crate::command::inputs::{CacheInputs, Text, choice, number, push_cache};
use crate::command::job::private_base;
use crate::contract::{Class, Contract, Lane, Requirement, SharedCache, Size};
use crate::exit::UsageError;
use crate::nix::key::PublicKey;
use crate::nix::store_path::StorePath;
use crate::runner::env::Env;
use crate::text::one_line;
use crate::trust::{Request, TrustedRefs};

/// The class that a deployment waits for.
const DEFAULT_CLASS: &str = "nix-builder";
/// A builder that needs longer is broken.
const TIMEOUT: u64 = 120;
/// A closure that is built needs about as much.
const MIN_FREE: &str = "1GiB";

/// Prove that this builder is healthy, and name the layer that is broken.
///
/// Looks at the host (disk, inodes, temporary space, memory, clock, hints), and by class at Nix (toolchain,
/// store, trust, sandbox, evaluation, a build that no cache can have), at tools, at a container endpoint or at
/// a kernel compiler; then at the cache, layer by layer, and at the Bazel cache. Each check has a limit of its
/// own, and all together `--timeout`. Ends with 0 if every required check holds, 1 if one does not, 64 for
/// wrong input.
///
/// The cache's token is taken from `ATTIC_TOKEN`, the Check Run's from `GITHUB_TOKEN`; neither has a flag.
///
/// Examples:
///   flywheel validate-builders --class nix-builder --package .#default
///   flywheel validate-builders --required cache --metrics-file /var/lib/node_exporter/flywheel.prom
#[derive(Args, Debug)]
#[command(verbatim_doc_comment)]
pub struct Inputs {
    /// The class of this builder in the contract, such as `general`, `container` or `kernel`
    /// (default: `nix-builder`).
    #[arg(
        long,
        value_name = "NAME",
        default_value = "",
        hide_default_value = true
    )]
    class: Text,

    /// The label of this builder's lane, such as `nix-builder-heavy`; its memory counts (default: the
    /// first lane of the class).
    #[arg(
        long,
        value_name = "LABEL",
        default_value = "",
        hide_default_value = true
    )]
    lane: Text,

    #[command(flatten)]
    contract: ContractInput,

    /// The flake to evaluate, such as `.` or `path:./ci` (default: `.`, if it has a `flake.nix`).
    #[arg(
        long,
        value_name = "FLAKE",
        default_value = "",
        hide_default_value = true
    )]
    flake: Text,

    /// A package to build besides the canary's own, such as `.#default` (default: none).
    #[arg(
        long,
        value_name = "INSTALLABLE",
        default_value = "",
        hide_default_value = true
    )]
    package: Text,

    /// Layers that must hold, too, separated by white space or commas, such as `cache bazel-cache`; a
    /// family stands for its layers (default: those of the host, of the tools and of Nix).
    #[arg(
        long,
        value_name = "LAYERS",
        default_value = "",
        hide_default_value = true
    )]
    required: Text,

    /// Layers that need not hold, such as `user-trust` (default: those of the caches).
    #[arg(
        long,
        value_name = "LAYERS",
        default_value = "",
        hide_default_value = true
    )]
    advisory: Text,

    /// How long all checks may take together, in seconds, such as `60` (default: `120`).
    #[arg(
        long,
        value_name = "SECONDS",
        default_value = "",
        hide_default_value = true
    )]
    timeout: Text,

    /// Room that must be free where a job writes, such as `20GiB` (default: `1GiB`).
    #[arg(
        long,
        value_name = "SIZE",
        default_value = "",
        hide_default_value = true
    )]
    min_free: Text,

    /// When the runner began to start, in seconds since 1970, such as `1760000000`; the cold start counts
    /// from there (default: the start of the canary).
    #[arg(
        long,
        value_name = "SECONDS",
        default_value = "",
        hide_default_value = true
    )]
    started_at: Text,

    /// The kernel to build modules for, such as `6.12.0-1-amd64` (default: the running one).
    #[arg(
        long,
        value_name = "RELEASE",
        default_value = "",
        hide_default_value = true
    )]
    kernel_release: Text,

    #[command(flatten)]
    cache: CacheInputs,

    /// A store path that the cache should have, such as `/nix/store/…-hello-2.12`: it is read whole, and its
    /// signature checked (default: the first path of this store that the cache turns out to have).
    #[arg(
        long,
        value_name = "PATH",
        default_value = "",
        hide_default_value = true
    )]
    cache_path: Text,

    /// The Bazel remote cache, such as `grpcs://bazel-cache.example.org:9092` (default: the hint
    /// `BAZEL_REMOTE_CACHE`).
    #[arg(
        long,
        value_name = "URL",
        default_value = "",
        hide_default_value = true
    )]
    bazel_remote_cache: Text,

    /// Whether to write to the cache and read back, `true`, `auto` or `false` (the default); the trust gate
    /// decides.
    #[arg(
        long,
        value_name = "WHEN",
        default_value = "",
        hide_default_value = true
    )]
    push_cache: Text,

    /// Refs that may write besides the default branch, such as `refs/tags/v*` (the default).
    #[arg(
        long,
        value_name = "REFS",
        default_value = "",
        hide_default_value = true
    )]
    trusted_refs: Text,

    /// Asks for writing by hand, as in `flywheel validate-builders --publish`; outside of CI nothing else
    /// does. The default is not to ask.
    #[arg(long)]
    publish: bool,

    /// How to report on stdout: `text`, the default, or `json`.
    #[arg(
        long,
        value_name = "FORMAT",
        default_value = "",
        hide_default_value = true
    )]
    format: Text,

    /// A file for the report as JSON, such as `canary.json` (default: none).
    #[arg(
        long,
        value_name = "FILE",
        default_value = "",
        hide_default_value = true
    )]
    report_file: Text,

    /// A file for the metrics in Prometheus's text format, such as `flywheel.prom` (default: none).
    #[arg(
        long,
        value_name = "FILE",
        default_value = "",
        hide_default_value = true
    )]
    metrics_file: Text,

    /// A Pushgateway to send the metrics to, such as `http://pushgateway.example.org:9091/` (default: none).
    #[arg(
        long,
        value_name = "URL",
        default_value = "",
        hide_default_value = true
    )]
    pushgateway: Text,

    /// Whether to leave a Check Run "Builder health: CLASS" on the commit: `true`, `false`, or `auto`, the
    /// default: if `GITHUB_TOKEN` is there.
    #[arg(
        long,
        value_name = "WHEN",
        default_value = "",
        hide_default_value = true
    )]
    check_run: Text,
}

/// Whether to leave a Check Run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CheckRun {
    Always,
    IfToken,
    Never,
}

/// Checked inputs.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub class: String,
    pub lane: Option<String>,
    pub memory: Option<Size>,
    pub tools: Vec<(String, Requirement)>,
    pub nix: Option<Requirement>,
    pub shared_cache: SharedCache,
    pub flake: Option<String>,
    pub package: Option<String>,
    pub weights: Weights,
    pub timeout: Duration,
    pub min_free: u64,
    pub head_start: Duration,
    pub kernel_release: Option<String>,
    pub temporary: PathBuf,
    pub cache: Option<Endpoint>,
    pub public_key: Option<PublicKey>,
    pub cache_path: Option<StorePath>,
    pub bazel_cache: Option<String>,
    pub request: Request,
    pub as_json: bool,
    pub report_file: Option<PathBuf>,
    pub metrics_file: Option<PathBuf>,
    pub pushgateway: Option<Url>,
    pub check_run: CheckRun,
}

impl Plan {
    /// Checks everything.
    ///
    /// # Errors
    /// For the first input that is wrong; nothing has been looked at then.
    pub fn read(inputs: &Inputs, env: &Env) -> Result<Self, Failure> {
        let contract = inputs.contract.read()?;
        let name = inputs.class.get().unwrap_or(DEFAULT_CLASS);
        let class = contract
            .class(name)
            .ok_or_else(|| unknown_class(name, &contract))?;
        let lane = lane(inputs, &contract, name, class)?;
        let text = |input: &Text| input.get().map(str::to_owned);
        // A malformed hint is the business of the check `hints`, and names no cache.
        let named = inputs.cache.named(env)?;
        let server = named.given.or(named.hinted).filter(|_| named.enabled);
        let when = [
            ("true", CheckRun::Always),
            ("auto", CheckRun::IfToken),
            ("false", CheckRun::Never),
        ];
        Ok(Self {
            class: name.to_owned(),
            lane: lane.map(|lane| lane.label.clone()),
            memory: class.memory(lane),
            tools: class
                .tools
                .iter()
                .map(|(tool, wanted)| (tool.to_owned(), wanted.clone()))
                .collect(),
            nix: class.tools.get("nix").cloned(),
            shared_cache: contract.shared_cache.clone(),
            flake: text(&inputs.flake)
                .or_else(|| Path::new("flake.nix").is_file().then(|| ".".to_owned())),
            package: text(&inputs.package),
            weights: Weights {
                required: layers("required", &inputs.required)?,
                advisory: layers("advisory", &inputs.advisory)?,
            },
            timeout: Duration::from_secs(
                number("timeout", &inputs.timeout, 1..=3600)?.unwrap_or(TIMEOUT),
            ),
            min_free: size(&inputs.min_free)?,
            head_start: head_start(number("started-at", &inputs.started_at, 0..=u64::MAX)?),
            kernel_release: text(&inputs.kernel_release),
            temporary: private_base(env),
            cache: server.map(|server| Endpoint::new(server, named.name)),
            public_key: named.key,
            cache_path: store_path(&inputs.cache_path)?,
            bazel_cache: text(&inputs.bazel_remote_cache),
            request: Request {
                push_cache: push_cache(&inputs.push_cache)?,
                by_hand: inputs.publish,
                trusted_refs: TrustedRefs::parse(inputs.trusted_refs.get().unwrap_or_default())?,
            },
            as_json: choice("format", &inputs.format, &[("text", false), ("json", true)])?
                .unwrap_or_default(),
            report_file: text(&inputs.report_file).map(PathBuf::from),
            metrics_file: text(&inputs.metrics_file).map(PathBuf::from),
            pushgateway: inputs.pushgateway.get().map(gateway).transpose()?,
            check_run: choice("check-run", &inputs.check_run, &when)?.unwrap_or(CheckRun::IfToken),
        })
    }
}

fn lane<'a>(
    inputs: &Inputs,
    contract: &'a Contract,
    name: &str,
    class: &'a Class,
) -> Result<Option<&'a Lane>, UsageError> {
    let Some(label) = inputs.lane.get() else {
        return Ok(class.lanes().first());
    };
    match contract.lane(label) {
        Some((of, _, lane)) if of == name => Ok(Some(lane)),
        _ => {
            let known: Vec<&str> = class
                .lanes()
                .iter()
                .map(|lane| lane.label.as_str())
                .collect();
            let problem = format!(
                "must be a lane of `{name}` ({}), not `{}`",
                known.join(", "),
                one_line(label, 80)
            );
            Err(UsageError::new("lane", problem)
                .with_hint("Name it under `lanes` of the class in `flywheel.yml`."))
        }
    }
}

fn layers(name: &str, input: &Text) -> Result<Vec<String>, UsageError> {
    Weights::words(input.get()).map_err(|(word, meant)| {
        let error = UsageError::new(name, format!("names `{word}`, which is no layer"));
        match meant {
            Some(meant) => error.with_hint(format!("Did you mean `{meant}`?")),
            None => error.with_hint(format!(
                "The layers are {}.",
                super::board::LAYERS.join(", ")
            )),
        }
    })
}

fn size(input: &Text) -> Result<u64, UsageError> {
    let text = input.get().unwrap_or(MIN_FREE);
    Size::parse(text)
        .map(Size::bytes)
        .map_err(|problem| UsageError::new("min-free", format!("is wrong: {problem}")))
}

/// How long ago the runner began to start; a time to come is none.
fn head_start(started_at: Option<u64>) -> Duration {
    let started = started_at.map(|seconds| UNIX_EPOCH + Duration::from_secs(seconds));
    started
        .and_then(|started| SystemTime::now().duration_since(started).ok())
        .unwrap_or_default()
}

fn store_path(input: &Text) -> Result<Option<StorePath>, UsageError> {
    let parsed = input.get().map(|text| {
        text.parse().map_err(|_| {
            UsageError::new(
                "cache-path",
                format!("is no store path: `{}`", one_line(text, 200)),
            )
            .with_hint("Give it whole, such as `/nix/store/…-hello-2.12`.")
        })
    });
    parsed.transpose()
}

fn gateway(text: &str) -> Result<Url, UsageError> {
    let mut url = Url::parse(text)
        .ok()
        .filter(|url| matches!(url.scheme(), "http" | "https") && url.host_str().is_some());
    if let Some(url) = &mut url {
        url.set_query(None);
        url.set_fragment(None);
    }
    // A password in it is allowed, so it is not shown.
    url.ok_or_else(|| UsageError::new("pushgateway", "must be an http or https URL"))
}
