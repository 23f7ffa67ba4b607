//! What `flake-checks` takes, and the plan that follows: everything is checked here, before anything is touched.

use std::path::{Path, PathBuf};

use clap::{ArgAction, Args, ValueEnum};

use crate::inputs::value::{Invalid, boolean, name, number, number_in, path, text, value, variant};
use crate::inputs::{FlakeInput, HeavyLaneInput};
use crate::job::inputs::{self as job, JobInputs};
use flywheel_core::exit::{UsageError, VerbError};
use flywheel_core::policy::impurity_in_arguments;
use flywheel_core::text::one_line;
use flywheel_nix::command_stores::stores_in_nix_arguments;
use flywheel_nix::flake::expression::{AttributePath, attribute_path, installable};
use flywheel_sys::runner::env::Env;

/// Far more than any machine has cores, so that a slip of the finger is found.
const MOST_WORKERS: usize = 256;

/// Evaluate a flake's outputs in parallel, build them as they appear, and give each a verdict of its own.
///
/// In a job with `checks: write` each output gets a Check Run. Without it the summary and the step's result are
/// the same. Publication is that of `nix-job`.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  flywheel flake-checks
  flywheel flake-checks --flake ./services --flake-attr packages --systems x86_64-linux
  flywheel flake-checks --build false")]
pub(crate) struct Inputs {
    #[command(flatten)]
    flake: FlakeInput,

    /// The attribute with the outputs to check, such as `packages.x86_64-linux`.
    #[arg(long, value_name = "PATH", value_parser = value(attribute), default_value = "checks")]
    flake_attr: AttributePath,

    /// A Nix function from the selected attribute to a list of `{ attr, label }`, such as
    /// `c: [ { attr = "x86_64-linux.a"; label = "a"; } ]` (default: every attribute of every system).
    #[arg(long, value_name = "NIX", value_parser = text())]
    flake_apply: Option<String>,

    /// The systems to check the outputs of, separated by white space or commas, such as `x86_64-linux`;
    /// `all` for every one, `auto` for those that this machine and its builders build. Of others, nothing is
    /// evaluated.
    #[arg(long, value_name = "LIST", value_parser = value(systems), default_value = "auto")]
    systems: Systems,

    /// How many processes evaluate at once, such as `4`; `auto` decides by cores and memory.
    #[arg(long, value_name = "N", value_parser = value(amount), default_value = "auto")]
    evaluation_workers: Amount,

    /// How many derivations one process evaluates before it is replaced, such as `50`; `auto` means as many
    /// as its share of the memory holds.
    #[arg(long, value_name = "N", value_parser = value(amount), default_value = "auto")]
    derivations_per_worker: Amount,

    /// The most paths to publish at the same time, such as `8`; `auto` adapts to how the server answers.
    #[arg(long, value_name = "N", value_parser = value(amount), default_value = "auto")]
    publish_workers: Amount,

    /// More arguments for Nix, written as for a shell, such as `--option cores 4` (default: none).
    #[arg(
        long,
        value_name = "ARGS",
        value_parser = value(arguments),
        allow_hyphen_values = true
    )]
    nix_args: Option<Arguments>,

    /// Which program evaluates.
    #[arg(
        long,
        value_name = "PROGRAM",
        value_parser = variant::<EvaluatorKind>(),
        default_value = "nix"
    )]
    evaluator: EvaluatorKind,

    /// Whether what an unchanged source evaluates to is remembered from run to run. A job that may publish
    /// believes only what its `ATTIC_TOKEN` has sealed.
    #[arg(long, value_name = "HOW", value_parser = variant::<Remember>(), default_value = "on")]
    evaluation_memory: Remember,

    /// The folder of the evaluation memory, to be kept between runs, such as `/var/cache/flywheel/evaluation`;
    /// it must be this user's, and nobody else may write to it (default: `~/.cache/flywheel/evaluation`).
    #[arg(long, value_name = "DIR", value_parser = path())]
    evaluation_memory_folder: Option<PathBuf>,

    /// Whether the store is garbage-collected at the end; the derivations of this run stay.
    #[arg(
        long,
        value_name = "BOOL",
        action = ArgAction::Set,
        value_parser = boolean(),
        default_value = "false"
    )]
    gc: bool,

    /// Whether outputs are built; `false` only evaluates them, such as for a quick look at every system.
    #[arg(
        long,
        value_name = "BOOL",
        action = ArgAction::Set,
        value_parser = boolean(),
        default_value = "true"
    )]
    build: bool,

    /// How many builds run at once, such as `4` (default: Nix's own setting).
    #[arg(long, value_name = "N", value_parser = number(0..=1024_usize))]
    max_jobs: Option<usize>,

    /// Whether the first failure ends the run; the rest is cancelled.
    #[arg(
        long,
        value_name = "BOOL",
        action = ArgAction::Set,
        value_parser = boolean(),
        default_value = "false"
    )]
    fail_fast: bool,

    /// Whether Nix goes on with other builds when one fails (default: `true`, but `false` with
    /// `fail-fast`).
    #[arg(long, value_name = "BOOL", value_parser = boolean())]
    keep_going: Option<bool>,

    /// How often a build is tried again that failed for a reason not its own, such as a server that did not
    /// answer, from `0` to `10`.
    #[arg(long, value_name = "N", value_parser = number(0..=10_u32), default_value = "1")]
    retries: u32,

    /// Whether each output gets a Check Run.
    #[arg(long, value_name = "WHEN", value_parser = variant::<Checks>(), default_value = "auto")]
    checks: Checks,

    /// The name of the Check Run that stands for all outputs, such as `flake`; a branch's protection can
    /// require it.
    #[arg(long, value_name = "NAME", value_parser = name(), default_value = "flake checks")]
    check_name: String,

    /// A file for the verdicts as JUnit XML, such as `checks.xml` (default: none).
    #[arg(long, value_name = "FILE", value_parser = path())]
    junit: Option<PathBuf>,

    /// A file for the verdicts as JSON, a line each, such as `checks.jsonl` (default: none).
    #[arg(long, value_name = "FILE", value_parser = path())]
    json_lines: Option<PathBuf>,

    #[command(flatten)]
    heavy_lane: HeavyLaneInput,

    #[command(flatten)]
    job: JobInputs,
}

/// Which systems.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Systems {
    /// Those that can be built here.
    Auto,
    /// Every one.
    All,
    /// These.
    These(Vec<String>),
}

/// The input `evaluation-memory`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Remember {
    /// An unchanged source is not evaluated again.
    On,
    /// Everything is evaluated, and nothing is remembered.
    Off,
    /// Everything is evaluated, and the run fails where the memory is wrong.
    Verify,
}

/// The input `evaluator`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum EvaluatorKind {
    /// Nix itself.
    Nix,
    /// `nix-eval-jobs`, where it is on `PATH`; nothing is remembered then.
    NixEvalJobs,
}

/// The input `checks`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Checks {
    /// In a job, if `GITHUB_TOKEN` is in the step's environment.
    Auto,
    /// Always; a warning gives the reason where there can be none.
    #[value(name = "true")]
    Yes,
    /// Never.
    #[value(name = "false")]
    No,
}

/// A number that Flywheel may choose itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Amount {
    Auto,
    Exactly(usize),
}

impl Amount {
    fn exactly(self) -> Option<usize> {
        match self {
            Self::Auto => None,
            Self::Exactly(number) => Some(number),
        }
    }
}

/// For clap a `Vec` would be an input that may be given several times.
type Arguments = Vec<String>;

/// Checked inputs.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub(crate) job: job::Plan,
    pub(crate) flake: String,
    pub(crate) attribute: AttributePath,
    pub(crate) function: Option<String>,
    pub(crate) systems: Systems,
    pub(crate) workers: Option<usize>,
    pub(crate) per_worker: Option<usize>,
    pub(crate) arguments: Vec<String>,
    pub(crate) evaluator: EvaluatorKind,
    pub(crate) remember: Remember,
    pub(crate) memory_folder: Option<PathBuf>,
    pub(crate) gc: bool,
    pub(crate) build: bool,
    pub(crate) max_jobs: Option<usize>,
    pub(crate) fail_fast: bool,
    pub(crate) keep_going: bool,
    pub(crate) retries: u32,
    pub(crate) checks: Checks,
    pub(crate) check_name: String,
    pub(crate) junit: Option<PathBuf>,
    pub(crate) json_lines: Option<PathBuf>,
    pub(crate) heavy_lane: Option<String>,
}

impl Inputs {
    /// Checks everything, and keeps nothing of it.
    ///
    /// # Errors
    /// For the first input that is wrong.
    pub(crate) fn check(&self, env: &Env) -> Result<(), VerbError> {
        Plan::read(self, env).map(drop)
    }
}

impl Plan {
    /// Checks everything.
    ///
    /// # Errors
    /// For the first input that is wrong; nothing has been touched then.
    pub(crate) fn read(inputs: &Inputs, env: &Env) -> Result<Self, VerbError> {
        let mut job = job::Plan::read(&inputs.job, env)?;
        let arguments = inputs.nix_args.clone().unwrap_or_default();
        job.impurity = impurity_in_arguments(&arguments);
        job.named_stores = stores_in_nix_arguments(&arguments);
        job.publish_workers = inputs.publish_workers.exactly();
        Ok(Self {
            job,
            flake: flake(inputs.flake.flake.as_deref().unwrap_or("."))?,
            attribute: inputs.flake_attr.clone(),
            function: inputs.flake_apply.clone(),
            systems: inputs.systems.clone(),
            workers: inputs.evaluation_workers.exactly(),
            per_worker: inputs.derivations_per_worker.exactly(),
            arguments,
            evaluator: inputs.evaluator,
            remember: inputs.evaluation_memory,
            memory_folder: memory_folder(inputs.evaluation_memory_folder.as_deref(), env)?,
            gc: inputs.gc,
            build: inputs.build,
            max_jobs: inputs.max_jobs,
            fail_fast: inputs.fail_fast,
            keep_going: inputs.keep_going.unwrap_or(!inputs.fail_fast),
            retries: inputs.retries,
            checks: inputs.checks,
            check_name: inputs.check_name.clone(),
            junit: inputs.junit.clone(),
            json_lines: inputs.json_lines.clone(),
            heavy_lane: inputs.heavy_lane.heavy_lane.clone(),
        })
    }

    /// The installable of the selected attribute.
    pub(crate) fn installable(&self) -> String {
        installable(&self.flake, &self.attribute).expect("`attribute_path` gives no other names")
    }
}

fn flake(text: &str) -> Result<String, UsageError> {
    let error = |problem: &str, hint: &str| {
        Err(
            UsageError::new("flake", format!("{problem}: `{}`", one_line(text, 200)))
                .with_hint(hint),
        )
    };
    if text.contains('#') {
        return error(
            "names an attribute too",
            "Give the flake alone, and the attribute in `flake-attr`.",
        );
    }
    // Nix would take it for an option.
    if text.starts_with('-') || text.contains(char::is_whitespace) {
        return error(
            "is not a flake reference",
            "Give one such as `.`, `./services` or `github:owner/repo`.",
        );
    }
    // What a registry or a URL names, only Nix can find out.
    let is_folder = text.starts_with(['.', '/']);
    let path = Path::new(text.split('?').next().unwrap_or(text));
    if is_folder && !path.join("flake.nix").is_file() && !in_a_flake(path) {
        return error(
            "has no `flake.nix`",
            "Check the repository out in an earlier step, and name the flake's folder.",
        );
    }
    Ok(text.to_owned())
}

/// Nix looks for `flake.nix` in the folders above too.
fn in_a_flake(path: &Path) -> bool {
    path.canonicalize().is_ok_and(|path| {
        path.ancestors()
            .any(|folder| folder.join("flake.nix").is_file())
    })
}

fn attribute(text: &str) -> Result<AttributePath, Invalid> {
    attribute_path(text).ok_or_else(|| {
        Invalid::new(format!("is no attribute path: `{}`", one_line(text, 100)))
            .with_hint("Give names with dots between them, such as `checks.x86_64-linux`.")
    })
}

fn systems(text: &str) -> Result<Systems, Invalid> {
    let words: Vec<String> = text
        .split([' ', ',', '\n', '\t'])
        .filter(|word| !word.is_empty())
        .map(str::to_owned)
        .collect();
    match words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["auto"] => return Ok(Systems::Auto),
        ["all"] => return Ok(Systems::All),
        _ => (),
    }
    let odd = |word: &&String| {
        !word.contains('-')
            || !word
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-')
    };
    match words.iter().find(odd) {
        None => Ok(Systems::These(words)),
        Some(word) => Err(
            Invalid::new(format!("is no system: `{}`", one_line(word, 60)))
                .with_hint("Give systems such as `x86_64-linux`, or `all`, or `auto`."),
        ),
    }
}

fn amount(text: &str) -> Result<Amount, Invalid> {
    if text.eq_ignore_ascii_case("auto") {
        return Ok(Amount::Auto);
    }
    number_in(text, &(1..=MOST_WORKERS)).map(Amount::Exactly)
}

fn arguments(text: &str) -> Result<Arguments, Invalid> {
    shlex::split(text).ok_or_else(|| {
        Invalid::new("has a quote that does not end").with_hint("Write the words as for a shell.")
    })
}

fn memory_folder(given: Option<&Path>, env: &Env) -> Result<Option<PathBuf>, UsageError> {
    if let Some(folder) = given {
        if folder.is_file() {
            let folder = one_line(&folder.to_string_lossy(), 200);
            let problem = format!("is a file, not a folder: `{folder}`");
            return Err(UsageError::new("evaluation-memory-folder", problem)
                .with_hint("Name a folder; it is made."));
        }
        return Ok(Some(folder.to_owned()));
    }
    let cache = env
        .path("XDG_CACHE_HOME")
        .or_else(|| env.path("HOME").map(|home| home.join(".cache")));
    Ok(cache
        .filter(|cache| cache.is_absolute())
        .map(|cache| cache.join("flywheel/evaluation")))
}
