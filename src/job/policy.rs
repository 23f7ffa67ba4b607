//! The publication policy of a job: its inputs, the rules that the job itself breaks, and the inspector of its paths.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::{Args, ValueEnum};

use crate::inputs::value::{path, value, variant};
use flywheel_cache::client::inspect::Inspector;
use flywheel_core::exit::{UsageError, VerbError, named_file_error};
use flywheel_core::policy::{Allowed, Impurity, Policy, Rule, RuleMode, impurity_in_settings};
use flywheel_core::secret::Secret;
use flywheel_core::text::one_line;
use flywheel_nix::scan::{Scanner, is_secret_name, is_secret_value};
use flywheel_nix::store::Store;
use flywheel_sys::runner::env::Env;
use flywheel_sys::untrusted_file::{self, Owner};

/// A list of exceptions may be this long, in bytes: no list that a person keeps is longer.
const LIST_LIMIT: u64 = 1 << 20;

/// The inputs of the policy.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Policy")]
pub(crate) struct PolicyInputs {
    /// How strictly the rules `impure`, `unchecked`, `dangling`, `machine-path` and `secret` hold, a line
    /// each, such as `machine-path = warn`: `enforce`, `warn` or `off` (default: `enforce` for each).
    #[arg(long, value_name = "LINES", value_parser = value(Policy::parse))]
    policy: Option<Policy>,

    /// Exceptions from the policy, a line each: rule, name of the store path (`*` stands for any text),
    /// reason; such as `secret openssl-*-doc the keys of its examples` (default: none).
    #[arg(long, value_name = "LINES", value_parser = value(Allowed::parse_all))]
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

/// The checked inputs of the policy.
#[derive(Clone, Debug, Default)]
pub(crate) struct PolicyConfig {
    pub(crate) policy: Policy,
    /// Whether a withheld path fails the step.
    pub(crate) fails: bool,
}

impl PolicyInputs {
    /// The policy, with the exceptions of the file read.
    ///
    /// # Errors
    /// For a file that cannot be read, or whose exceptions are malformed.
    pub(crate) fn read(&self) -> Result<PolicyConfig, VerbError> {
        let mut allowed = self.policy_allow.clone().unwrap_or_default();
        if let Some(file) = &self.policy_allow_file {
            let text =
                untrusted_file::read_text(file, Owner::Any, LIST_LIMIT).map_err(|error| {
                    let hint = "Check the repository out in an earlier step.";
                    named_file_error("policy-allow-file", file, "be read", error, hint)
                })?;
            let more = Allowed::parse_all(&text)
                .map_err(|problem| UsageError::new("policy-allow-file", problem))?;
            allowed.extend(more);
        }
        Ok(PolicyConfig {
            policy: self
                .policy
                .clone()
                .unwrap_or_default()
                .with_allowed(allowed),
            fails: self.on_finding == OnFinding::Fail,
        })
    }
}

impl PolicyConfig {
    /// Makes the inspector of the job's paths. It looks for the secrets and folders of this environment and for `more`
    /// secrets by name, and it knows whether `settings` ask for impure evaluation.
    pub(crate) fn inspector(
        &self,
        env: &Env,
        more: &[(&str, Option<&Secret>)],
        settings: &[&str],
        store: Option<Arc<Store>>,
    ) -> Arc<Inspector> {
        let inspector = Inspector::new(scanner(env, more), self.policy.clone(), store);
        for text in settings {
            if let Some(found) = impurity_in_settings(text) {
                record_impurity(&inspector, &found, "Nix's settings");
            }
        }
        Arc::new(inspector)
    }

    /// Whether the policy applies this rule.
    pub(crate) fn looks_at(&self, rule: Rule) -> bool {
        self.policy.mode(rule) != RuleMode::Off
    }
}

/// Records that the job evaluates impurely, which breaks a rule for each of its paths. `place` is where `found` was
/// found.
pub(crate) fn record_impurity(inspector: &Inspector, found: &Impurity, place: &str) {
    inspector.record_violation(
        Rule::Impure,
        format!("`{}` in {place}", one_line(&found.0, 60)),
    );
}

/// A scanner that looks for the secrets and folders of this environment, and for `more` secrets by name.
pub(crate) fn scanner(env: &Env, more: &[(&str, Option<&Secret>)]) -> Scanner {
    let from_env = env.all().filter(|(name, _)| is_secret_name(name));
    let from_env = from_env.filter_map(|(name, value)| Some((name, Secret::new(value.to_str()?)?)));
    let given = more
        .iter()
        .filter_map(|(name, secret)| Some((*name, (*secret)?.clone())));
    let mut secrets: Vec<(String, Secret)> = Vec::new();
    for (name, secret) in given.chain(from_env) {
        // The same value under two names is one secret, named as it was given first.
        if is_secret_value(secret.expose()) && !secrets.iter().any(|(_, known)| *known == secret) {
            secrets.push((name.to_owned(), secret));
        }
    }
    let folders = [
        ("the workspace", "GITHUB_WORKSPACE"),
        ("the workspace", "CI_PROJECT_DIR"),
        ("the runner's temporary folder", "RUNNER_TEMP"),
        ("the home folder", "HOME"),
    ];
    let folders: Vec<(&str, PathBuf)> = folders
        .iter()
        .filter_map(|(what, variable)| Some((*what, env.path(variable)?)))
        .collect();
    let folders: Vec<(&str, &Path)> = folders
        .iter()
        .map(|(what, folder)| (*what, folder.as_path()))
        .collect();
    Scanner::new(&secrets, &folders)
}
