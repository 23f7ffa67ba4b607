//! The publication policy of a job: its inputs, what the job itself breaks, and who inspects its paths.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::{Args, ValueEnum};

use crate::cache::inspect::Inspector;
use crate::command::value::{path, value, variant};
use crate::exit::UsageError;
use crate::nix::scan::{Scanner, is_secret_name, is_secret_value};
use crate::nix::store::Store;
use crate::policy::{Allowed, Impurity, Mode, Policy, Rule, of_settings};
use crate::runner::env::Env;
use crate::secret::Secret;
use crate::text::one_line;

/// No list of exceptions is longer.
const LIST_LIMIT: u64 = 1 << 20;

/// The inputs of the policy.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Policy")]
pub struct PolicyInputs {
    /// How strictly the rules `impure`, `unchecked`, `dangling`, `machine-path` and `secret` hold, a line
    /// each, such as `machine-path = warn`: `enforce`, `warn` or `off` (default: `enforce` for each).
    #[arg(long, value_name = "LINES", value_parser = value(Policy::read))]
    policy: Option<Policy>,

    /// Exceptions from the policy, a line each: rule, name of the store path (`*` stands for any text),
    /// reason; such as `secret openssl-*-doc the keys of its examples` (default: none).
    #[arg(long, value_name = "LINES", value_parser = value(Allowed::read_all))]
    policy_allow: Option<Exceptions>,

    /// A file with more exceptions in the same form, such as `.github/flywheel-allow.txt` (default: none).
    #[arg(long, value_name = "FILE", value_parser = path())]
    policy_allow_file: Option<PathBuf>,

    /// What a path that the policy withholds does to the step.
    #[arg(
        long,
        value_name = "WHAT",
        value_parser = variant::<OnFinding>(),
        default_value = "continue"
    )]
    on_finding: OnFinding,
}

/// For clap a `Vec` would be an input that may be given several times.
type Exceptions = Vec<Allowed>;

/// The input `on-finding`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum OnFinding {
    /// A warning names the path, and the step goes on.
    Continue,
    /// The step fails.
    Fail,
}

/// The policy as a job keeps it.
#[derive(Clone, Debug, Default)]
pub struct Kept {
    /// The rules.
    pub policy: Policy,
    /// Whether a path that is withheld fails the step.
    pub fails: bool,
}

impl PolicyInputs {
    /// The policy, with the exceptions of the file read.
    ///
    /// # Errors
    /// For a file that cannot be read, or whose exceptions are malformed.
    pub fn read(&self) -> Result<Kept, UsageError> {
        let mut allowed = self.policy_allow.clone().unwrap_or_default();
        if let Some(file) = &self.policy_allow_file {
            let text = read_list(file).map_err(|problem| {
                let file = one_line(&file.to_string_lossy(), 200);
                UsageError::new(
                    "policy-allow-file",
                    format!("names `{file}`, which {problem}"),
                )
                .with_hint("Check the repository out in an earlier step.")
            })?;
            let more = Allowed::read_all(&text)
                .map_err(|problem| UsageError::new("policy-allow-file", problem))?;
            allowed.extend(more);
        }
        Ok(Kept {
            policy: self
                .policy
                .clone()
                .unwrap_or_default()
                .with_allowed(allowed),
            fails: self.on_finding == OnFinding::Fail,
        })
    }
}

fn read_list(file: &Path) -> Result<String, String> {
    let about = std::fs::metadata(file).map_err(|error| format!("cannot be read ({error})"))?;
    if about.len() > LIST_LIMIT {
        return Err(format!("is longer than {LIST_LIMIT} bytes"));
    }
    std::fs::read_to_string(file).map_err(|error| format!("cannot be read ({error})"))
}

impl Kept {
    /// Who inspects the job's paths: knows the secrets and places of this environment, `more` secrets by name, and
    /// the purity that `settings` ask for.
    pub fn inspector(
        &self,
        env: &Env,
        more: &[(&str, Option<&Secret>)],
        settings: &[&str],
        store: Option<Arc<Store>>,
    ) -> Arc<Inspector> {
        let inspector = Inspector::new(scanner(env, more), self.policy.clone(), store);
        for text in settings {
            if let Some(found) = of_settings(text) {
                accuse(&inspector, &found, "Nix's settings");
            }
        }
        Arc::new(inspector)
    }

    /// Whether a rule is looked at.
    pub fn looks_at(&self, rule: Rule) -> bool {
        self.policy.mode(rule) != Mode::Off
    }
}

/// Withholds, or names, everything of a job that evaluates impurely.
pub fn accuse(inspector: &Inspector, found: &Impurity, whose: &str) {
    inspector.accuse(
        Rule::Impure,
        format!("`{}` in {whose}", one_line(&found.0, 60)),
    );
}

/// One that knows the secrets and places of this environment.
pub fn scanner(env: &Env, more: &[(&str, Option<&Secret>)]) -> Scanner {
    let of_env = env.all().filter(|(name, _)| is_secret_name(name));
    let of_env = of_env.filter_map(|(name, value)| Some((name, Secret::new(value.to_str()?)?)));
    let given = more
        .iter()
        .filter_map(|(name, secret)| Some((*name, (*secret)?.clone())));
    let mut secrets: Vec<(String, Secret)> = Vec::new();
    for (name, secret) in given.chain(of_env) {
        if is_secret_value(secret.expose()) && !secrets.iter().any(|(_, known)| *known == secret) {
            secrets.push((name.to_owned(), secret));
        }
    }
    let places = [
        ("the workspace", "GITHUB_WORKSPACE"),
        ("the workspace", "CI_PROJECT_DIR"),
        ("the runner's temporary folder", "RUNNER_TEMP"),
        ("the home folder", "HOME"),
    ];
    let places: Vec<(&str, PathBuf)> = places
        .iter()
        .filter_map(|(what, variable)| Some((*what, env.path(variable)?)))
        .collect();
    let places: Vec<(&str, &Path)> = places
        .iter()
        .map(|(what, folder)| (*what, folder.as_path()))
        .collect();
    Scanner::new(&secrets, &places)
}
