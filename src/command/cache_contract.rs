//! `flywheel cache-contract`: checks that the job's shared caches are those that the repository declares, and that they
//! answer.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::{ArgAction, Args};
use serde_json::{Value, json};

use crate::command::contract::ContractInput;
use crate::inputs::roots::roots;
use crate::inputs::value::{boolean, number, one_of, path, text};
use crate::inputs::{BazelCacheInput, ClassInput, Format, FormatInput, RequestInputs};
use flywheel_cache::client::bazel::BazelProber;
use flywheel_cache::client::endpoint::Endpoint as Cache;
use flywheel_cache::client::probe::probe;
use flywheel_core::contract::shared_cache::{
    Endpoint, Finding, Given, Judgement, Mode, bazelrc, judge, redact,
};
use flywheel_core::contract::{Contract, SharedCache};
use flywheel_core::exit::{Exit, Failure, UsageError, VerbError, named_file_error};
use flywheel_core::secret::Secret;
use flywheel_core::text::{count, duration, nearest, one_line};
use flywheel_core::trust::decide;
use flywheel_nix::cache_name::CacheName;
use flywheel_sys::http::{Names, client};
use flywheel_sys::runner::context;
use flywheel_sys::runner::env::Env;
use flywheel_sys::runner::files::Files;
use flywheel_sys::runner::workflow::{Level, Workflow, data, json_data};

/// Seconds. A cache that is no farther than a job's runner answers long before this.
const TIMEOUT: &str = "5";
/// The cache's name where neither input nor hint gives one.
const DEFAULT_CACHE: &str = "main";

/// Check the shared-cache contract of Bazel: its mode, and that each endpoint is well formed and answers.
///
/// The mode of the build must be the declared one, and Attic's endpoint counts, too. Whether the build may upload
/// results follows from `--push-cache` and the trust gate.
///
/// The mode is declared by `shared-cache: mode:` in `flywheel.yml`, else by `--expected-mode`, else it is
/// `shared-cache-backed`. Reads the runner's hints `BAZEL_REMOTE_CACHE`, `BAZEL_REMOTE_EXECUTOR`,
/// `GF_BAZEL_SUBSTRATE_MODE`, `GF_FLYWHEEL_PROFILE_STATE`, `ATTIC_SERVER` and `ATTIC_CACHE`. Ends with 0 if the
/// contract holds, 1 if it does not, 64 for wrong input.
#[derive(Args, Debug)]
#[command(
    after_help = "Example:\n  flywheel cache-contract --strict --class nix-builder --bazelrc .bazelrc.ci"
)]
pub(crate) struct Inputs {
    /// Whether to fail closed: an unknown class, an empty cache endpoint or an endpoint that does not answer is
    /// then an error, too.
    #[arg(
        long,
        value_name = "BOOL",
        action = ArgAction::Set,
        value_parser = boolean(),
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "true",
        default_value = "false"
    )]
    strict: bool,

    /// The mode to expect where `flywheel.yml` declares none (default: `shared-cache-backed`).
    #[arg(long, alias = "mode", value_name = "MODE", value_parser = one_of(&Mode::ALL))]
    expected_mode: Option<Mode>,

    #[command(flatten)]
    class: ClassInput,

    #[command(flatten)]
    bazel: BazelCacheInput,

    /// The Bazel remote executor, such as `grpcs://bazel.example.org` (default: the runner's hint
    /// `BAZEL_REMOTE_EXECUTOR`).
    #[arg(long, value_name = "URL", value_parser = text())]
    bazel_remote_executor: Option<String>,

    /// Whether endpoints may be on the machine itself, such as `grpc://localhost:9092` (default: as
    /// `flywheel.yml` has it, else `false`).
    #[arg(
        long,
        value_name = "BOOL",
        value_parser = boolean(),
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "true"
    )]
    allow_localhost: Option<bool>,

    /// Whether the executor may be elsewhere than the cache, as `allow-separate-executor` in `flywheel.yml`
    /// does (default: as the file has it, else `false`).
    #[arg(
        long,
        value_name = "BOOL",
        value_parser = boolean(),
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "true"
    )]
    allow_separate_executor: Option<bool>,

    /// How long each endpoint may take to answer, in seconds, such as `20`.
    #[arg(
        long,
        alias = "timeout",
        value_name = "SECONDS",
        value_parser = number(1..=600_u64),
        default_value = TIMEOUT
    )]
    endpoint_timeout: u64,

    /// A file for the lines that a `.bazelrc` needs in this mode, such as `.bazelrc.ci`; written only if
    /// the contract holds, and without credentials (default: none).
    #[arg(long, value_name = "FILE", value_parser = path())]
    bazelrc: Option<PathBuf>,

    #[command(flatten)]
    request: RequestInputs,

    #[command(flatten)]
    format: FormatInput,

    #[command(flatten)]
    contract: ContractInput,
}

/// What one endpoint did.
struct Probed {
    about: &'static str,
    shown: String,
    result: Result<Duration, String>,
}

/// Runs the verb.
///
/// # Errors
/// For wrong input.
pub(crate) async fn run(inputs: Inputs, env: &Env) -> Result<Exit, VerbError> {
    let as_json = inputs.format.format == Format::Json;
    let contract = inputs.contract.read()?;
    let given = given(&inputs, env, &contract)?;
    let request = inputs.request.request();
    // No token is needed here: Bazel itself has the credential of its cache.
    let upload = decide(&context::facts(env), &request, true).publishes();
    let timeout = Duration::from_secs(inputs.endpoint_timeout);
    let mut judgement = judge(&declared(&inputs, &contract), &given);
    let workflow = Workflow::new(env.in_github_actions());
    let probed = probe_all(&judgement.endpoints, timeout, env, &workflow).await?;
    for one in &probed {
        let problem = one
            .result
            .as_ref()
            .err()
            .map(|text| format!("{}: {text}", one.shown));
        judgement.add_problem(one.about, problem, given.strict);
    }
    let written = if judgement.holds() {
        write_bazelrc(&inputs, &judgement, &given, upload)?
    } else {
        None
    };
    let report = Report {
        judgement,
        given,
        probed,
        upload,
        written,
    };
    if as_json {
        json_data(&report.json());
    } else {
        data(&report.text());
    }
    report.emit(&workflow, env, as_json);
    Ok(if report.judgement.holds() {
        Exit::Ok
    } else {
        Exit::Failed
    })
}

fn given(inputs: &Inputs, env: &Env, contract: &Contract) -> Result<Given, UsageError> {
    let hint = |name: &str| {
        env.get(name)
            .map(str::trim)
            .filter(|text| !text.is_empty())
            .map(str::to_owned)
    };
    let class = inputs.class.class.clone();
    if let Some(class) = class
        .as_deref()
        .filter(|class| contract.class(class).is_none())
    {
        return Err(unknown_class(class, contract));
    }
    Ok(Given {
        cache: (inputs.bazel.bazel_remote_cache.clone()).or_else(|| hint("BAZEL_REMOTE_CACHE")),
        executor: (inputs.bazel_remote_executor.clone()).or_else(|| hint("BAZEL_REMOTE_EXECUTOR")),
        attic: hint("ATTIC_SERVER"),
        mode: inputs.expected_mode,
        hinted_mode: hint("GF_BAZEL_SUBSTRATE_MODE"),
        state: hint("GF_FLYWHEEL_PROFILE_STATE"),
        class,
        strict: inputs.strict,
    })
}

/// The error for a class that is not in the contract. Its hint names the nearest class that is.
pub(super) fn unknown_class(class: &str, contract: &Contract) -> UsageError {
    let known: Vec<&str> = contract.classes.iter().map(|(name, _)| name).collect();
    let error = UsageError::new(
        "class",
        format!(
            "must be one of {}, not `{}`",
            known.join(", "),
            one_line(class, 80)
        ),
    );
    match nearest(class, known.iter().copied()) {
        Some(name) => error.with_hint(format!("Did you mean `{name}`?")),
        None => error.with_hint("Name it under `classes` in `flywheel.yml`."),
    }
}

fn declared(inputs: &Inputs, contract: &Contract) -> SharedCache {
    let mut declared = contract.shared_cache.clone();
    let (localhost, separate) = (
        &mut declared.allow_localhost,
        &mut declared.allow_separate_executor,
    );
    // An input goes before `flywheel.yml`.
    *localhost = Some(inputs.allow_localhost.or(*localhost).unwrap_or_default());
    *separate = Some(
        inputs
            .allow_separate_executor
            .or(*separate)
            .unwrap_or_default(),
    );
    declared
}

async fn probe_all(
    endpoints: &[Endpoint],
    timeout: Duration,
    env: &Env,
    workflow: &Workflow,
) -> Result<Vec<Probed>, Failure> {
    let roots = roots(env);
    let (prober, plain) = (BazelProber::new(&roots)?, client(&roots)?);
    let token = context::cache_token(env);
    token.iter().for_each(|token| workflow.mask(token));
    let probed = endpoints.iter().map(|endpoint| async {
        let begun = Instant::now();
        let result = match endpoint.about {
            "attic" => probe_attic(endpoint, timeout, env, token.as_ref(), &plain).await,
            _ => probe_bazel(endpoint, timeout, &prober).await,
        };
        let result = result.map(|()| begun.elapsed());
        Probed {
            about: endpoint.about,
            shown: redact(endpoint.url.as_str()),
            result,
        }
    });
    Ok(futures_util::future::join_all(probed).await)
}

async fn probe_bazel(
    endpoint: &Endpoint,
    timeout: Duration,
    prober: &BazelProber,
) -> Result<(), String> {
    let can = prober
        .probe(&endpoint.url, timeout)
        .await
        .map_err(|failure| format!("{} ({})", failure.text, failure.layer))?;
    match endpoint.about {
        "cache" if !can.cache => Err("it answers, but offers no cache".to_owned()),
        "executor" if !can.execution => Err("it answers, but executes nothing".to_owned()),
        _ => Ok(()),
    }
}

async fn probe_attic(
    endpoint: &Endpoint,
    timeout: Duration,
    env: &Env,
    token: Option<&Secret>,
    client: &reqwest::Client,
) -> Result<(), String> {
    let name = env.get("ATTIC_CACHE").unwrap_or(DEFAULT_CACHE);
    let name: CacheName = name
        .parse()
        .map_err(|error| format!("`ATTIC_CACHE`: {error}"))?;
    let cache = Cache::new(endpoint.url.clone(), name);
    let probed = probe(&cache, token, client, &Names::default(), timeout).await;
    probed.failed.map_or(Ok(()), |(layer, text)| {
        Err(format!("{text} ({})", layer.as_str()))
    })
}

fn write_bazelrc(
    inputs: &Inputs,
    judgement: &Judgement,
    given: &Given,
    upload: bool,
) -> Result<Option<PathBuf>, VerbError> {
    let (Some(file), Some(mode)) = (&inputs.bazelrc, judgement.actual) else {
        return Ok(None);
    };
    let text = bazelrc(
        mode,
        given.cache.as_deref(),
        given.executor.as_deref(),
        upload,
    );
    std::fs::write(file, text).map_err(|error| {
        let hint = "Name a file in a folder that can be written to.";
        named_file_error("bazelrc", file, "be written", error, hint)
    })?;
    Ok(Some(file.clone()))
}

/// Everything that the outputs, the summary and stdout are made of.
struct Report {
    judgement: Judgement,
    given: Given,
    probed: Vec<Probed>,
    upload: bool,
    written: Option<PathBuf>,
}

impl Report {
    fn modes(&self) -> (&'static str, &'static str) {
        (
            self.judgement.declared.map_or("", Mode::as_str),
            self.judgement.actual.map_or("", Mode::as_str),
        )
    }

    /// Every line begins with a fixed word, so that text from outside cannot be a workflow command.
    fn text(&self) -> String {
        let (declared, actual) = self.modes();
        let mut lines = vec![format!(
            "mode       {actual} (declared: {declared}, by {})",
            self.judgement.declared_by
        )];
        for (about, text) in [
            ("cache", &self.given.cache),
            ("executor", &self.given.executor),
            ("attic", &self.given.attic),
        ] {
            lines.push(format!(
                "{about:<10} {}",
                self.endpoint(about, text.as_deref())
            ));
        }
        lines.push(format!(
            "class      {}",
            self.given.class.as_deref().unwrap_or("unknown")
        ));
        lines.push(format!(
            "uploads    {}",
            if self.upload { "yes" } else { "no" }
        ));
        lines.extend(
            self.written
                .iter()
                .map(|file| format!("bazelrc    {}", file.display())),
        );
        for Finding { error, about, text } in &self.judgement.findings {
            lines.push(format!(
                "{}    {about}: {text}",
                if *error { "error  " } else { "warning" }
            ));
        }
        lines.push(self.closing());
        lines.join("\n")
    }

    fn endpoint(&self, about: &str, text: Option<&str>) -> String {
        let Some(text) = text else {
            return "none".to_owned();
        };
        match self
            .probed
            .iter()
            .find(|one| one.about == about)
            .map(|one| &one.result)
        {
            Some(Ok(took)) => format!("{}, answers in {}", redact(text), duration(*took)),
            Some(Err(_)) => format!("{}, does not answer as it should", redact(text)),
            None => format!("{}, not asked", redact(text)),
        }
    }

    fn closing(&self) -> String {
        let errors = self
            .judgement
            .findings
            .iter()
            .filter(|finding| finding.error)
            .count();
        let strict = if self.given.strict { ", strict" } else { "" };
        if errors == 0 {
            format!("the shared-cache contract holds{strict}")
        } else {
            format!(
                "the shared-cache contract does not hold: {}{strict}",
                count(errors as u64, "error")
            )
        }
    }

    fn json(&self) -> String {
        let (declared, actual) = self.modes();
        let endpoints = self.probed.iter().map(|one| {
            let (seconds, problem) = match &one.result {
                Ok(took) => (Some(took.as_secs_f64()), None),
                Err(text) => (None, Some(text)),
            };
            (
                one.about.to_owned(),
                json!({ "url": one.shown, "answers": problem.is_none(), "seconds": seconds, "problem": problem }),
            )
        });
        let endpoints: serde_json::Map<String, Value> = endpoints.collect();
        let report = json!({
            "holds": self.judgement.holds(),
            "strict": self.given.strict,
            "declared": declared,
            "declared-by": self.judgement.declared_by,
            "actual": actual,
            "class": self.given.class,
            "uploads": self.upload,
            "endpoints": endpoints,
            "findings": self.judgement.findings,
        });
        format!("{report:#}")
    }

    /// Whoever reads JSON from stdout finds nothing else there.
    fn emit(&self, workflow: &Workflow, env: &Env, as_json: bool) {
        if !workflow.in_job() {
            return;
        }
        for Finding { error, about, text } in self.judgement.findings.iter().filter(|_| !as_json) {
            workflow.annotate(
                if *error { Level::Error } else { Level::Warning },
                about,
                text,
            );
        }
        let files = Files::from_env(env);
        let bazelrc = self
            .written
            .as_ref()
            .map(|file| file.display().to_string())
            .unwrap_or_default();
        let outputs = [
            ("holds", self.judgement.holds().to_string()),
            ("mode", self.modes().1.to_owned()),
            ("uploads", self.upload.to_string()),
            ("bazelrc", bazelrc),
        ];
        let sign = if self.judgement.holds() { "✅" } else { "❌" };
        // A fence within the text would end the block.
        let summary = format!(
            "### {sign} {}\n\n```text\n{}\n```\n",
            self.closing(),
            self.text().replace("```", "'''")
        );
        let written = outputs
            .iter()
            .try_for_each(|(name, value)| files.set_output(name, value));
        if let Err(error) = written.and_then(|()| files.add_summary(&summary)) {
            workflow.annotate(
                Level::Warning,
                "report",
                &format!("the runner's files cannot be written: {error}"),
            );
        }
    }
}
