//! What `validate-builders` takes, and the plan that follows: everything is checked here, before anything is
//! looked at.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::{Args, ValueEnum};
use url::Url;

use super::check_list::Weights;
use crate::command::cache_contract::unknown_class;
use crate::command::contract::ContractInput;
use crate::inputs::nix::NixInputs;
use crate::inputs::value::{Invalid, number, path, text, value, variant};
use crate::inputs::{
    BazelCacheInput, CacheInputs, ClassInput, FlakeInput, Format, FormatInput, Hints, RequestInputs,
};
use crate::job::inputs::HostInputs;
use crate::job::private_base;
use flywheel_cache::client::endpoint::Endpoint;
use flywheel_core::contract::{Class, Contract, Lane, Requirement, SharedCache, Size};
use flywheel_core::exit::{UsageError, VerbError};
use flywheel_core::text::one_line;
use flywheel_core::trust::Request;
use flywheel_nix::bootstrap::plan::Wanted;
use flywheel_nix::key::PublicKey;
use flywheel_nix::store_path::StorePath;
use flywheel_sys::runner::env::Env;

/// The class that a deployment waits for.
const DEFAULT_CLASS: &str = "nix-builder";
/// A builder that needs longer is broken.
const TIMEOUT: &str = "120";
/// A closure that is built needs about as much.
const MIN_FREE: &str = "1GiB";

/// Prove that this builder is healthy, and name the layer that is broken.
///
/// Looks at the host (disk, inodes, temporary space, memory, clock, hints), and by class at Nix (toolchain,
/// store, trust, sandbox, evaluation, a build that no cache can have), at tools, at a container endpoint or at
/// a kernel compiler; then at the cache, layer by layer, and at the Bazel cache. With `--push-cache`,
/// and if the trust gate allows it, a path is written to the cache and read back. Each check has a limit of its
/// own, and all together `--timeout`. Ends with 0 if every required check holds, 1 if one does not, 64 for
/// wrong input.
///
/// The cache's token is taken from `ATTIC_TOKEN`, the Check Run's from `GITHUB_TOKEN`; neither has a flag.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  flywheel validate-builders --class nix-builder --package .#default
  flywheel validate-builders --required cache --metrics-file /var/lib/node_exporter/flywheel.prom")]
pub(crate) struct Inputs {
    #[command(flatten)]
    class: ClassInput,

    /// The label of this builder's lane, such as `nix-builder-heavy`; its memory counts (default: the
    /// first lane of the class).
    #[arg(long, value_name = "LABEL", value_parser = text())]
    lane: Option<String>,

    #[command(flatten)]
    contract: ContractInput,

    #[command(flatten)]
    flake: FlakeInput,

    /// A package to build besides the canary's own, such as `.#default` (default: none).
    #[arg(long, value_name = "INSTALLABLE", value_parser = text())]
    package: Option<String>,

    /// Layers that must hold, too, separated by white space or commas, such as `cache bazel-cache`; a
    /// family stands for its layers (default: those of the host, of the tools and of Nix).
    #[arg(long, value_name = "LAYERS", value_parser = value(layers))]
    required: Option<Layers>,

    /// Layers that need not hold, such as `user-trust` (default: those of the caches).
    #[arg(long, value_name = "LAYERS", value_parser = value(layers))]
    advisory: Option<Layers>,

    /// How long all checks may take together, in seconds, such as `60`.
    #[arg(long, value_name = "SECONDS", value_parser = number(1..=3600_u64), default_value = TIMEOUT)]
    timeout: u64,

    /// Room that must be free where a job writes, such as `20GiB`.
    #[arg(long, value_name = "SIZE", value_parser = value(size), default_value = MIN_FREE)]
    min_free: u64,

    /// When the runner began to start, in seconds since 1970, such as `1760000000`; the cold start counts
    /// from there (default: the start of the canary).
    #[arg(long, value_name = "SECONDS", value_parser = number(0..=u64::MAX))]
    started_at: Option<u64>,

    /// The kernel to build modules for, such as `6.12.0-1-amd64` (default: the running one).
    #[arg(long, value_name = "RELEASE", value_parser = text())]
    kernel_release: Option<String>,

    #[command(flatten)]
    host: HostInputs,

    #[command(flatten, next_help_heading = "Nix")]
    install: NixInputs,

    #[command(flatten)]
    cache: CacheInputs,

    /// A store path that the cache should have, such as `/nix/store/…-hello-2.12`: it is read whole, and its
    /// signature checked (default: the first path of this store that the cache turns out to have).
    #[arg(long, value_name = "PATH", value_parser = value(store_path))]
    cache_path: Option<StorePath>,

    #[command(flatten)]
    bazel: BazelCacheInput,

    #[command(flatten)]
    request: RequestInputs,

    #[command(flatten)]
    format: FormatInput,

    /// A file for the report as JSON, such as `canary.json` (default: none).
    #[arg(long, value_name = "FILE", value_parser = path())]
    report_file: Option<PathBuf>,

    /// A file for the metrics in Prometheus's text format, such as `flywheel.prom` (default: none).
    #[arg(long, value_name = "FILE", value_parser = path())]
    metrics_file: Option<PathBuf>,

    /// A Pushgateway to send the metrics to, such as `http://pushgateway.example.org:9091/` (default: none).
    #[arg(long, value_name = "URL", value_parser = value(gateway))]
    pushgateway: Option<Url>,

    /// Whether to leave a Check Run "Builder health: CLASS" on the commit.
    #[arg(long, value_name = "WHEN", value_parser = variant::<CheckRun>(), default_value = "auto")]
    check_run: CheckRun,
}

/// For clap a `Vec` would be an input that may be given several times.
type Layers = Vec<String>;

/// The input `check-run`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum CheckRun {
    /// Always.
    #[value(name = "true")]
    Always,
    /// If `GITHUB_TOKEN` is in the step's environment.
    #[value(name = "auto")]
    IfToken,
    /// Never.
    #[value(name = "false")]
    Never,
}

/// Checked inputs.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub(crate) class: String,
    pub(crate) lane: Option<String>,
    pub(crate) memory: Option<Size>,
    pub(crate) tools: Vec<(String, Requirement)>,
    pub(crate) nix: Option<Requirement>,
    /// How a job would install Nix where there is none.
    pub(crate) install: Wanted,
    pub(crate) shared_cache: SharedCache,
    pub(crate) flake: Option<String>,
    pub(crate) package: Option<String>,
    pub(crate) host: HostInputs,
    pub(crate) weights: Weights,
    pub(crate) timeout: Duration,
    pub(crate) min_free: u64,
    pub(crate) head_start: Duration,
    pub(crate) kernel_release: Option<String>,
    pub(crate) temporary: PathBuf,
    pub(crate) cache: Option<Endpoint>,
    pub(crate) public_key: Option<PublicKey>,
    pub(crate) cache_path: Option<StorePath>,
    pub(crate) bazel_cache: Option<String>,
    pub(crate) request: Request,
    pub(crate) as_json: bool,
    pub(crate) report_file: Option<PathBuf>,
    pub(crate) metrics_file: Option<PathBuf>,
    pub(crate) pushgateway: Option<Url>,
    pub(crate) check_run: CheckRun,
}

impl Plan {
    /// Checks everything.
    ///
    /// # Errors
    /// For the first input that is wrong; nothing has been looked at then.
    pub(crate) fn read(inputs: &Inputs, env: &Env) -> Result<Self, VerbError> {
        let contract = inputs.contract.read()?;
        let name = inputs.class.class.as_deref().unwrap_or(DEFAULT_CLASS);
        let class = contract
            .class(name)
            .ok_or_else(|| unknown_class(name, &contract))?;
        let lane = lane(inputs, &contract, name, class)?;
        // A malformed hint is the business of the check `hints`, and names no cache.
        let named = inputs.cache.resolve(env);
        let server = named.given.or(named.hinted).filter(|_| named.enabled);
        Ok(Self {
            host: inputs.host.clone(),
            class: name.to_owned(),
            lane: lane.map(|lane| lane.label.clone()),
            memory: class.memory(lane),
            tools: class
                .tools
                .iter()
                .map(|(tool, wanted)| (tool.to_owned(), wanted.clone()))
                .collect(),
            nix: class.tools.get("nix").cloned(),
            install: (inputs.install.or_hints(&mut Hints::from_env(env))).wanted(None)?,
            shared_cache: contract.shared_cache.clone(),
            flake: (inputs.flake.flake.clone())
                .or_else(|| Path::new("flake.nix").is_file().then(|| ".".to_owned())),
            package: inputs.package.clone(),
            weights: Weights {
                required: inputs.required.clone().unwrap_or_default(),
                advisory: inputs.advisory.clone().unwrap_or_default(),
            },
            timeout: Duration::from_secs(inputs.timeout),
            min_free: inputs.min_free,
            head_start: head_start(inputs.started_at),
            kernel_release: inputs.kernel_release.clone(),
            temporary: private_base(env),
            cache: server
                .zip(named.name)
                .map(|(server, name)| Endpoint::new(server, name)),
            public_key: named.key,
            cache_path: inputs.cache_path.clone(),
            bazel_cache: inputs.bazel.bazel_remote_cache.clone(),
            request: inputs.request.request(),
            as_json: inputs.format.format == Format::Json,
            report_file: inputs.report_file.clone(),
            metrics_file: inputs.metrics_file.clone(),
            pushgateway: inputs.pushgateway.clone(),
            check_run: inputs.check_run,
        })
    }
}

fn lane<'a>(
    inputs: &Inputs,
    contract: &'a Contract,
    name: &str,
    class: &'a Class,
) -> Result<Option<&'a Lane>, UsageError> {
    let Some(label) = &inputs.lane else {
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

fn layers(text: &str) -> Result<Layers, Invalid> {
    Weights::layers(Some(text)).map_err(|(word, meant)| {
        let error = Invalid::new(format!("names `{word}`, which is no layer"));
        match meant {
            Some(meant) => error.with_hint(format!("Did you mean `{meant}`?")),
            None => error.with_hint(format!(
                "The layers are {}.",
                super::check_list::LAYERS.join(", ")
            )),
        }
    })
}

fn size(text: &str) -> Result<u64, Invalid> {
    Size::parse(text)
        .map(Size::bytes)
        .map_err(|problem| Invalid::new(format!("is wrong: {problem}")))
}

/// How long ago the runner began to start; a time to come is none.
fn head_start(started_at: Option<u64>) -> Duration {
    let started = started_at.map(|seconds| UNIX_EPOCH + Duration::from_secs(seconds));
    started
        .and_then(|started| SystemTime::now().duration_since(started).ok())
        .unwrap_or_default()
}

fn store_path(text: &str) -> Result<StorePath, Invalid> {
    text.parse().map_err(|_| {
        Invalid::new(format!("is no store path: `{}`", one_line(text, 200)))
            .with_hint("Give it whole, such as `/nix/store/…-hello-2.12`.")
    })
}

fn gateway(text: &str) -> Result<Url, Invalid> {
    let mut url = Url::parse(text)
        .ok()
        .filter(|url| matches!(url.scheme(), "http" | "https") && url.host_str().is_some());
    if let Some(url) = &mut url {
        url.set_query(None);
        url.set_fragment(None);
    }
    // A password in it is allowed, so it is not shown.
    url.ok_or_else(|| Invalid::new("must be an http or https URL"))
}
