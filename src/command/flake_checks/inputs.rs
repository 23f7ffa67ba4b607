//! What `flake-checks` takes, and the plan that follows: everything is checked here, before anything is touched.

use std::path::{Path, PathBuf};

use clap::Args;

use crate::command::inputs::{Text, choice, number, switch};
use crate::command::job::inputs::{self as job, JobInputs};
use crate::exit::UsageError;
use crate::nix::flake::expression::{AttributePath, attribute_path, installable_name};
use crate::policy::of_arguments;
use crate::runner::env::Env;
use crate::text::one_line;

/// More workers than this help nobody.
const MOST_WORKERS: usize = 256;

/// Evaluates a flake's outputs in parallel, builds them as they appear, and gives each a verdict of its own.
///
/// In a job with `checks: write` each output gets a Check Run. Whatever the token may, the summary says the same
/// and the step's result is the same. Publication is that of `nix-job`.
///
/// Examples:
///   flywheel flake-checks
///   flywheel flake-checks --flake ./services --flake-attr packages --systems x86_64-linux
///   flywheel flake-checks --build false
#[derive(Args, Debug)]
#[command(verbatim_doc_comment)]
pub struct Inputs {
    /// The flake, such as `.`, `./services` or `github:owner/repo` (default: `.`).
    #[arg(
        long,
        value_name = "REF",
        default_value = "",
        hide_default_value = true
    )]
    pub flake: Text,

    /// The attribute whose outputs are checked, such as `packages.x86_64-linux` (default: `checks`).
    #[arg(
        long,
        value_name = "PATH",
        default_value = "",
        hide_default_value = true
    )]
    pub flake_attr: Text,

    /// A Nix function from the selected attribute to a list of `{ attr, label }`, such as
    /// `c: [ { attr = "x86_64-linux.a"; label = "a"; } ]` (default: every attribute of every system).
    #[arg(
        long,
        value_name = "NIX",
        default_value = "",
        hide_default_value = true
    )]
    pub flake_apply: Text,

    /// The systems whose outputs are checked, separated by white space or commas, such as `x86_64-linux`; `all`
    /// for every one (default: `auto`, those that this machine and its builders build).
    #[arg(
        long,
        value_name = "LIST",
        default_value = "",
        hide_default_value = true
    )]
    pub systems: Text,

    /// How many processes evaluate at once, such as `4` (default: `auto`, by cores and memory).
    #[arg(long, value_name = "N", default_value = "", hide_default_value = true)]
    pub evaluation_workers: Text,

    /// How many derivations one process evaluates before it is replaced, such as `50` (default: `auto`, as many
    /// as its share of the memory holds).
    #[arg(long, value_name = "N", default_value = "", hide_default_value = true)]
    pub derivations_per_worker: Text,

    /// How many paths are published at once at most, such as `8` (default: `auto`, by how the server answers).
    #[arg(long, value_name = "N", default_value = "", hide_default_value = true)]
    pub publish_workers: Text,

    /// More words for Nix, written as for a shell, such as `--option cores 4` (default: none).
    #[arg(
        long,
        value_name = "WORDS",
        default_value = "",
        hide_default_value = true,
        allow_hyphen_values = true
    )]
    pub nix_args: Text,

    /// Who evaluates: `nix` itself, the default, or `nix-eval-jobs` where it is on `PATH`.
    #[arg(
        long,
        value_name = "WORD",
        default_value = "",
        hide_default_value = true
    )]
    pub evaluator: Text,

    /// Whether what an unchanged source evaluates to is remembered: `on`, the default, `off`, or `verify`, which
    /// evaluates anyway and fails where the memory is wrong.
    #[arg(
        long,
        value_name = "WORD",
        default_value = "",
        hide_default_value = true
    )]
    pub evaluation_memory: Text,

    /// The folder of the evaluation memory, to be kept between runs, such as `/var/cache/flywheel/evaluation`
    /// (default: `~/.cache/flywheel/evaluation`).
    #[arg(
        long,
        value_name = "DIR",
        default_value = "",
        hide_default_value = true
    )]
    pub evaluation_memory_folder: Text,

    /// Whether the store is collected at the end; the derivations of this run stay. `true` or `false`, the
    /// default.
    #[arg(
        long,
        value_name = "BOOL",
        default_value = "",
        hide_default_value = true
    )]
    pub gc: Text,

    /// Whether outputs are built; `false` only evaluates them, such as for a quick look at every system
    /// (default: `true`).
    #[arg(
        long,
        value_name = "BOOL",
        default_value = "",
        hide_default_value = true
    )]
    pub build: Text,

    /// How many builds run at once, such as `4` (default: Nix's own setting).
    #[arg(long, value_name = "N", default_value = "", hide_default_value = true)]
    pub max_jobs: Text,

    /// Whether the first failure ends the run; the rest is cancelled. `true` or `false`, the default.
    #[arg(
        long,
        value_name = "BOOL",
        default_value = "",
        hide_default_value = true
    )]
    pub fail_fast: Text,

    /// Whether Nix goes on with other builds when one fails, such as `false` (default: `true`).
    #[arg(
        long,
        value_name = "BOOL",
        default_value = "",
        hide_default_value = true
    )]
    pub keep_going: Text,

    /// How often a build is tried again that failed for a reason not its own, such as a server that did not
    /// answer, from `0` to `10` (default: `1`).
    #[arg(long, value_name = "N", default_value = "", hide_default_value = true)]
    pub retries: Text,

    /// Whether each output gets a Check Run: `auto`, the default, in a job with a token; `true`; or `false`.
    #[arg(
        long,
        value_name = "WORD",
        default_value = "",
        hide_default_value = true
    )]
    pub checks: Text,

    /// The name of the Check Run that stands for all, to be required by a branch's protection, such as
    /// `flake checks`, the default.
    #[arg(
        long,
        value_name = "NAME",
        default_value = "",
        hide_default_value = true
    )]
    pub check_name: Text,

    /// A file for the verdicts as JUnit XML, such as `checks.xml` (default: none).
    #[arg(
        long,
        value_name = "FILE",
        default_value = "",
        hide_default_value = true
    )]
    pub junit: Text,

    /// A file for the verdicts as JSON, a line each, such as `checks.jsonl` (default: none).
    #[arg(
        long,
        value_name = "FILE",
        default_value = "",
        hide_default_value = true
    )]
    pub json_lines: Text,

    /// The runner label to name when memory runs out, such as `nix-heavy` (default: none).
    #[arg(
        long,
        value_name = "LABEL",
        default_value = "",
        hide_default_value = true
    )]
    pub heavy_lane: Text,

    #[command(flatten)]
    pub(super) job: JobInputs,
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

/// What is made of the evaluation memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Remember {
    On,
    Off,
    Verify,
}

/// Who evaluates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum EvaluatorKind {
    Nix,
    NixEvalJobs,
}

/// Whether there are Check Runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Checks {
    Auto,
    Yes,
    No,
}

/// Checked inputs.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub job: job::Plan,
    pub flake: String,
    pub attribute: AttributePath,
    pub function: Option<String>,
    pub systems: Systems,
    pub workers: Option<usize>,
    pub per_worker: Option<usize>,
    pub arguments: Vec<String>,
    pub evaluator: EvaluatorKind,
    pub remember: Remember,
    pub memory_folder: Option<PathBuf>,
    pub gc: bool,
    pub build: bool,
    pub max_jobs: Option<usize>,
    pub fail_fast: bool,
    pub keep_going: bool,
    pub retries: u32,
    pub checks: Checks,
    pub check_name: String,
    pub junit: Option<PathBuf>,
    pub json_lines: Option<PathBuf>,
    pub heavy_lane: Option<String>,
}

impl Plan {
    /// Checks everything.
    ///
    /// # Errors
    /// For the first input that is wrong; nothing has been touched then.
    pub fn read(inputs: &Inputs, env: &Env) -> Result<Self, UsageError> {
        let mut job = job::Plan::read(&inputs.job, env)?;
        let arguments = arguments(&inputs.nix_args)?;
        job.impurity = of_arguments(&arguments);
        job.publish_workers = at_least_one("publish-workers", &inputs.publish_workers)?;
        let fail_fast = switch("fail-fast", &inputs.fail_fast, false)?;
        Ok(Self {
            job,
            flake: flake(&inputs.flake)?,
            attribute: attribute(&inputs.flake_attr)?,
            function: inputs.flake_apply.get().map(str::to_owned),
            systems: systems(&inputs.systems)?,
            workers: at_least_one("evaluation-workers", &inputs.evaluation_workers)?,
            per_worker: at_least_one("derivations-per-worker", &inputs.derivations_per_worker)?,
            arguments,
            evaluator: choice(
                "evaluator",
                &inputs.evaluator,
                &[
                    ("nix", EvaluatorKind::Nix),
                    ("nix-eval-jobs", EvaluatorKind::NixEvalJobs),
                ],
            )?
            .unwrap_or(EvaluatorKind::Nix),
            remember: choice(
                "evaluation-memory",
                &inputs.evaluation_memory,
                &[
                    ("on", Remember::On),
                    ("off", Remember::Off),
                    ("verify", Remember::Verify),
                ],
            )?
            .unwrap_or(Remember::On),
            memory_folder: memory_folder(&inputs.evaluation_memory_folder, env)?,
            gc: switch("gc", &inputs.gc, false)?,
            build: switch("build", &inputs.build, true)?,
            max_jobs: number("max-jobs", &inputs.max_jobs, 0..=1024_usize)?,
            fail_fast,
            keep_going: switch("keep-going", &inputs.keep_going, !fail_fast)?,
            retries: number("retries", &inputs.retries, 0..=10_u32)?.unwrap_or(1),
            checks: choice(
                "checks",
                &inputs.checks,
                &[
                    ("auto", Checks::Auto),
                    ("true", Checks::Yes),
                    ("false", Checks::No),
                ],
            )?
            .unwrap_or(Checks::Auto),
            check_name: one_line(inputs.check_name.get().unwrap_or("flake checks"), 100),
            junit: inputs.junit.get().map(PathBuf::from),
            json_lines: inputs.json_lines.get().map(PathBuf::from),
            heavy_lane: inputs.heavy_lane.get().map(|lane| one_line(lane, 100)),
        })
    }

    /// The installable of an output, as one would write it in a shell.
    pub fn installable(&self, attr: &[String]) -> String {
        let names = self
            .attribute
            .iter()
            .chain(attr)
            .map(|name| installable_name(name))
            .collect::<Vec<_>>();
        format!("{}#{}", self.flake, names.join("."))
    }
}

fn flake(input: &Text) -> Result<String, UsageError> {
    let text = input.get().unwrap_or(".");
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
    if text.starts_with('-') || text.contains(char::is_whitespace) {
        return error(
            "is no flake reference",
            "Give one such as `.`, `./services` or `github:owner/repo`.",
        );
    }
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

fn attribute(input: &Text) -> Result<AttributePath, UsageError> {
    let text = input.get().unwrap_or("checks");
    attribute_path(text).ok_or_else(|| {
        UsageError::new(
            "flake-attr",
            format!("is no attribute path: `{}`", one_line(text, 100)),
        )
        .with_hint("Give names with dots between them, such as `checks.x86_64-linux`.")
    })
}

fn systems(input: &Text) -> Result<Systems, UsageError> {
    let text = input.get().unwrap_or("auto");
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
        Some(word) => Err(UsageError::new(
            "systems",
            format!("is no system: `{}`", one_line(word, 60)),
        )
        .with_hint("Give systems such as `x86_64-linux`, or `all`, or `auto`.")),
    }
}

fn at_least_one(name: &str, input: &Text) -> Result<Option<usize>, UsageError> {
    if input.get() == Some("auto") {
        return Ok(None);
    }
    number(name, input, 1..=MOST_WORKERS)
}

fn arguments(input: &Text) -> Result<Vec<String>, UsageError> {
    let text = input.get().unwrap_or_default();
    shlex::split(text).ok_or_else(|| {
        UsageError::new("nix-args", "has a quote that does not end")
            .with_hint("Write the words as for a shell.")
    })
}

fn memory_folder(input: &Text, env: &Env) -> Result<Option<PathBuf>, UsageError> {
    if let Some(text) = input.get() {
        let folder = PathBuf::from(text);
        if folder.is_file() {
            let problem = format!("is a file, not a folder: `{}`", one_line(text, 200));
            return Err(UsageError::new("evaluation-memory-folder", problem)
                .with_hint("Name a folder; it is made."));
        }
        return Ok(Some(folder));
    }
    let cache = env
        .path("XDG_CACHE_HOME")
        .or_else(|| env.path("HOME").map(|home| home.join(".cache")));
    Ok(cache
        .filter(|cache| cache.is_absolute())
        .map(|cache| cache.join("flywheel/evaluation")))
}
