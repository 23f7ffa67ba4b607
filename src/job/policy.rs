//! The publication policy of a job: its inputs, the rules that the job itself breaks, and the inspector of its paths.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;

use crate::command::inputs::{Text, choice};
use flywheel_cache::client::inspect::Inspector;
use flywheel_core::exit::UsageError;
use flywheel_core::policy::{Allowed, Impurity, Policy, Rule, RuleMode, impurity_in_settings};
use flywheel_core::secret::Secret;
use flywheel_core::text::one_line;
use flywheel_nix::scan::{Scanner, is_secret_name, is_secret_value};
use flywheel_nix::store::Store;
use flywheel_sys::runner::env::Env;

/// A list of exceptions may be this long, in bytes: no list that a person keeps is longer.
const LIST_LIMIT: u64 = 1 << 20;

/// The inputs of the policy.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Policy")]
pub struct PolicyInputs {
    /// How strictly the rules `impure`, `unchecked`, `dangling`, `machine-path` and `secret` hold, a line
    /// each, such as `machine-path = warn`; `enforce` (the default), `warn` or `off`.
    #[arg(
        long,
        env = "FLYWHEEL_POLICY",
        value_name = "LINES",
        default_value = "",
        hide_default_value = true
    )]
    policy: Text,

    /// Exceptions, a line each: rule, name of the store path (`*` stands for any text), reason; such as
    /// `secret openssl-*-doc the keys of its examples` (default: none).
    #[arg(
        long,
        env = "FLYWHEEL_POLICY_ALLOW",
        value_name = "LINES",
        default_value = "",
        hide_default_value = true
    )]
    policy_allow: Text,

    /// A file with more of them, such as `.github/flywheel-allow.txt` (default: none).
    #[arg(
        long,
        env = "FLYWHEEL_POLICY_ALLOW_FILE",
        value_name = "FILE",
        default_value = "",
        hide_default_value = true
    )]
    policy_allow_file: Text,

    /// What a path that the policy withholds does to the step: `continue` with a warning, the default, or
    /// `fail`.
    #[arg(
        long,
        env = "FLYWHEEL_ON_FINDING",
        value_name = "WHAT",
        default_value = "",
        hide_default_value = true
    )]
    on_finding: Text,
}

/// The checked inputs of the policy.
#[derive(Clone, Debug, Default)]
pub struct PolicyConfig {
    pub policy: Policy,
    /// Whether a withheld path fails the step.
    pub fails: bool,
}

impl PolicyInputs {
    /// Checks the inputs.
    ///
    /// # Errors
    /// For the first input that is wrong.
    pub fn read(&self) -> Result<PolicyConfig, UsageError> {
        let wrong = |name: &str| {
            let name = name.to_owned();
            move |problem: String| UsageError::new(&name, problem)
        };
        let policy =
            Policy::parse(self.policy.get().unwrap_or_default()).map_err(wrong("policy"))?;
        let mut allowed = Allowed::parse_all(self.policy_allow.get().unwrap_or_default())
            .map_err(wrong("policy-allow"))?;
        if let Some(file) = self.policy_allow_file.get() {
            let text = read_list(Path::new(file)).map_err(|problem| {
                let problem = format!("names `{}`, which {problem}", one_line(file, 200));
                UsageError::new("policy-allow-file", problem)
                    .with_hint("Check the repository out in an earlier step.")
            })?;
            allowed.extend(Allowed::parse_all(&text).map_err(wrong("policy-allow-file"))?);
        }
        let words = [("continue", false), ("fail", true)];
        let fails = choice("on-finding", &self.on_finding, &words)?.unwrap_or_default();
        Ok(PolicyConfig {
            policy: policy.with_allowed(allowed),
            fails,
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

impl PolicyConfig {
    /// Makes the inspector of the job's paths. It looks for the secrets and folders of this environment and for `more`
    /// secrets by name, and it knows whether `settings` ask for impure evaluation.
    pub fn inspector(
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
    pub fn looks_at(&self, rule: Rule) -> bool {
        self.policy.mode(rule) != RuleMode::Off
    }
}

/// Records that the job evaluates impurely, which breaks a rule for each of its paths. `place` is where `found` was
/// found.
pub fn record_impurity(inspector: &Inspector, found: &Impurity, place: &str) {
    inspector.record_violation(
        Rule::Impure,
        format!("`{}` in {place}", one_line(&found.0, 60)),
    );
}

/// A scanner that looks for the secrets and folders of this environment, and for `more` secrets by name.
pub fn scanner(env: &Env, more: &[(&str, Option<&Secret>)]) -> Scanner {
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
