//! What a repository shows about the workflow that it needs. Nothing is written, and what cannot be read is left out.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;
use url::Url;

use super::workflow::{Actions, BinaryCache, Runner};
use flywheel_core::exit::UsageError;
use flywheel_core::text::one_line;
use flywheel_nix::tool::{Nix, find};
use flywheel_sys::runner::env::{Env, program_folder};
use flywheel_sys::untrusted_file::{Owner, read_text};

/// A flake is asked for the names of its outputs, for which Nix may have to fetch its inputs.
const EVALUATION_LIMIT: Duration = Duration::from_secs(60);
/// A workflow or a file of git's that is larger is none that a person wrote.
const FILE_LIMIT: u64 = 1 << 20;
/// Workflows of one repository that are read.
const WORKFLOW_LIMIT: usize = 100;
/// The branch where git names none.
const DEFAULT_BRANCH: &str = "main";

/// What was found.
pub(super) struct Found {
    pub(super) outputs: Outputs,
    pub(super) runner: Runner,
    pub(super) cache: BinaryCache,
    pub(super) actions: Option<Actions>,
    pub(super) default_branch: String,
    /// The repository's remote is a GitLab.
    is_on_gitlab: bool,
}

/// What the flake has.
pub(super) enum Outputs {
    /// The names of its outputs, such as `checks`.
    Known(Vec<String>),
    /// There is a flake, and this is why its outputs are not known.
    Unknown(String),
    NoFlake {
        has_default_nix: bool,
    },
}

/// The root of the repository that has this folder.
///
/// # Errors
/// When the folder is not there or in no repository.
pub(super) fn root(folder: &Path) -> Result<PathBuf, UsageError> {
    let shown = one_line(&folder.to_string_lossy(), 200);
    let whole = folder.canonicalize().map_err(|error| {
        UsageError::new(
            "FOLDER",
            format!("names `{shown}`, which cannot be found ({error})"),
        )
        .with_hint("Name a folder of a checkout.")
    })?;
    let root = whole
        .ancestors()
        .find(|folder| folder.join(".git").exists());
    root.map(Path::to_owned).ok_or_else(|| {
        UsageError::new(
            "FOLDER",
            format!("names `{shown}`, which is in no git repository"),
        )
        .with_hint("Call it in a checkout, or run `git init` first.")
    })
}

/// Looks at all that decides.
pub(super) async fn look(root: &Path, env: &Env) -> Found {
    let workflows = workflows(root);
    let lines = || {
        workflows
            .iter()
            .flat_map(|text| text.lines())
            .map(str::trim)
    };
    let runner = lines().find_map(|line| line.strip_prefix("runs-on:").and_then(labels));
    let cache = lines()
        .filter_map(|line| line.strip_prefix("attic-server:"))
        .find_map(|text| BinaryCache::parse(plain(text)).ok());
    let remote = remote(root);
    Found {
        outputs: outputs(root, env).await,
        runner: runner.unwrap_or_else(Runner::hosted),
        cache: cache.unwrap_or(BinaryCache::GitHub),
        actions: lines().find_map(used_actions).or_else(own_actions),
        default_branch: default_branch(root),
        is_on_gitlab: remote.is_some_and(|address| address.contains("gitlab")),
    }
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.outputs {
            Outputs::Known(names) => {
                writeln!(f, "found a flake with the outputs {}", names.join(", "))?;
            }
            Outputs::Unknown(reason) => writeln!(
                f,
                "found a flake; its outputs are not known ({reason}), so that `checks` is taken"
            )?,
            Outputs::NoFlake {
                has_default_nix: true,
            } => writeln!(f, "found no flake, but a `default.nix`")?,
            Outputs::NoFlake {
                has_default_nix: false,
            } => writeln!(
                f,
                "found neither `flake.nix` nor `default.nix`: the workflow builds an example; put your command in its place"
            )?,
        }
        writeln!(f, "found the default branch `{}`", self.default_branch)?;
        if self.is_on_gitlab {
            writeln!(
                f,
                "its remote looks like a GitLab: `gitlab/greedy.yml` is the template for that"
            )?;
        }
        Ok(())
    }
}

/// The texts of the workflows that are there, in the order of their names.
fn workflows(root: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(root.join(".github/workflows")) else {
        return Vec::new();
    };
    let is_yaml = |file: &PathBuf| {
        file.extension()
            .is_some_and(|kind| kind == "yml" || kind == "yaml")
    };
    let mut files: Vec<PathBuf> = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(is_yaml)
        .collect();
    files.sort();
    let files = files.into_iter().take(WORKFLOW_LIMIT);
    files.filter_map(|file| text_of(&file)).collect()
}

fn text_of(file: &Path) -> Option<String> {
    read_text(file, Owner::Any, FILE_LIMIT).ok()
}

/// A value without quotes and without a comment behind it.
fn plain(text: &str) -> &str {
    let text = text.split(" #").next().unwrap_or_default().trim();
    text.trim_matches(['"', '\''])
}

/// The labels of `runs-on:`, as far as they stand there themselves.
fn labels(text: &str) -> Option<Runner> {
    let text = plain(text);
    let list = text
        .strip_prefix('[')
        .and_then(|text| text.strip_suffix(']'));
    Runner::parse(list.unwrap_or(text)).ok()
}

/// The repository of a step that uses one of our actions.
fn used_actions(line: &str) -> Option<Actions> {
    let line = line.strip_prefix("- ").unwrap_or(line);
    let uses = plain(line.strip_prefix("uses:")?);
    let (path, reference) = uses.split_once('@')?;
    let (repository, action) = path.split_once("/actions/")?;
    let is_ours = [
        "nix-job",
        "flake-checks",
        "watch-store",
        "validate-builders",
    ]
    .contains(&action);
    is_ours.then(|| Actions::parse(&format!("{repository}@{reference}")).ok())?
}

/// The repository of the checkout that this program lies in, as `dist/flywheel-…`.
fn own_actions() -> Option<Actions> {
    let folder = program_folder()?;
    let root = folder
        .parent()
        .filter(|root| root.join("actions/nix-job/action.yml").is_file())?;
    let address = remote(root)?;
    let name = address.trim_end_matches('/').trim_end_matches(".git");
    let mut parts = name.rsplit(['/', ':']);
    let (name, owner) = (parts.next()?, parts.next()?);
    Actions::parse(&format!("{owner}/{name}@{DEFAULT_BRANCH}")).ok()
}

/// The folder with a repository's own files. In a work tree, `.git` is a file that names another folder.
fn git_folder(root: &Path) -> Option<PathBuf> {
    let git = root.join(".git");
    if git.is_dir() {
        return Some(git);
    }
    let own = root.join(text_of(&git)?.strip_prefix("gitdir:")?.trim());
    match text_of(&own.join("commondir")) {
        Some(common) => Some(own.join(common.trim())),
        None => Some(own),
    }
}

/// The address of the remote `origin`.
fn remote(root: &Path) -> Option<String> {
    let config = text_of(&git_folder(root)?.join("config"))?;
    let mut lines = config.lines().map(str::trim);
    lines.find(|line| *line == r#"[remote "origin"]"#)?;
    let section = lines.take_while(|line| !line.starts_with('['));
    section
        .filter_map(|line| line.split_once('='))
        .find(|(name, _)| name.trim() == "url")
        .map(|(_, address)| address.trim().to_owned())
}

/// What the remote calls its default branch, else the one that is checked out.
fn default_branch(root: &Path) -> String {
    let branch = |file: &str, before: &str| {
        let text = text_of(&git_folder(root)?.join(file))?;
        let name = text.trim().strip_prefix("ref: ")?.strip_prefix(before)?;
        is_branch(name).then(|| name.to_owned())
    };
    branch("refs/remotes/origin/HEAD", "refs/remotes/origin/")
        .or_else(|| branch("HEAD", "refs/heads/"))
        .unwrap_or_else(|| DEFAULT_BRANCH.to_owned())
}

/// A name that stands in YAML as it is, and as a pattern of GitHub's means itself alone.
fn is_branch(name: &str) -> bool {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "/._-".contains(c);
    name.starts_with(|c: char| c.is_ascii_alphabetic()) && name.chars().all(is_plain)
}

async fn outputs(root: &Path, env: &Env) -> Outputs {
    if !root.join("flake.nix").is_file() {
        let has_default_nix = root.join("default.nix").is_file();
        return Outputs::NoFlake { has_default_nix };
    }
    let Some(found) = find(env, &[]) else {
        return Outputs::Unknown("there is no Nix here".into());
    };
    match output_names(&found.program, root, env).await {
        Ok(names) => Outputs::Known(names),
        Err(reason) => Outputs::Unknown(one_line(&reason, 200)),
    }
}

/// Asks Nix for the names alone: no output is evaluated.
async fn output_names(program: &Path, root: &Path, env: &Env) -> Result<Vec<String>, String> {
    let nix = Nix::detect(program, env)
        .await
        .map_err(|error| error.to_string())?;
    // A folder's name becomes a URL, in which nothing means something to Nix.
    let address =
        Url::from_directory_path(root).map_err(|()| "its folder has no address".to_owned())?;
    let expression = format!(
        r#"builtins.attrNames (builtins.getFlake "git+{}").outputs"#,
        address.as_str().trim_end_matches('/')
    );
    let arguments = [
        "eval",
        "--json",
        "--impure",
        "--no-write-lock-file",
        "--expr",
        &expression,
    ];
    let output = nix
        .run(&arguments, EVALUATION_LIMIT)
        .await
        .map_err(|error| error.to_string())?;
    if !output.status.success() {
        return Err(flywheel_nix::tool::error_summary(&output.stderr));
    }
    let value: Value = serde_json::from_slice(&output.stdout).map_err(|error| error.to_string())?;
    let names = value
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_str);
    Ok(names.map(str::to_owned).collect())
}
