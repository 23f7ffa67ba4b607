//! The environment, read once at the start. No other module reads it, so tests can pass any environment.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::path::PathBuf;

/// The environment of this process at its start.
#[derive(Clone, Default)]
pub struct Env(BTreeMap<String, OsString>);

impl Env {
    /// Reads the environment of this process. Names that are not UTF-8 are left out: no variable that is read has one.
    pub fn from_process() -> Self {
        Self(
            std::env::vars_os()
                .filter_map(|(name, value)| Some((name.into_string().ok()?, value)))
                .collect(),
        )
    }

    /// For tests and recorded events.
    pub fn from_pairs<'a>(pairs: impl IntoIterator<Item = (&'a str, &'a str)>) -> Self {
        Self(
            pairs
                .into_iter()
                .map(|(name, value)| (name.to_owned(), value.into()))
                .collect(),
        )
    }

    /// A variable's value; `None` if it is unset, empty, or not UTF-8. GitHub sets unknown values to the empty text, so
    /// an empty value counts as absent.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name)?.to_str().filter(|value| !value.is_empty())
    }

    /// A variable's value as a path; `None` if it is unset or empty.
    pub fn path(&self, name: &str) -> Option<PathBuf> {
        self.0
            .get(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    }

    /// All variables, empty ones included.
    pub fn all(&self) -> impl Iterator<Item = (&str, &OsString)> {
        self.0.iter().map(|(name, value)| (name.as_str(), value))
    }

    /// The same environment with other values of these variables.
    #[must_use]
    pub fn with(&self, variables: impl IntoIterator<Item = (&'static str, OsString)>) -> Self {
        let variables = variables.into_iter();
        let mut all = self.0.clone();
        all.extend(variables.map(|(name, value)| (name.to_owned(), value)));
        Self(all)
    }

    pub fn in_github_actions(&self) -> bool {
        self.get("GITHUB_ACTIONS") == Some("true")
    }
}

/// The folder of this program's file, if the system knows it.
pub fn program_folder() -> Option<PathBuf> {
    Some(std::env::current_exe().ok()?.parent()?.to_owned())
}

/// This program's own file, and its arguments.
///
/// # Errors
/// When the system does not know the file.
pub fn program_and_arguments() -> std::io::Result<(PathBuf, Vec<OsString>)> {
    Ok((std::env::current_exe()?, arguments()))
}

/// The arguments that this program was started with.
pub fn arguments() -> Vec<OsString> {
    std::env::args_os().skip(1).collect()
}

/// # Errors
/// When the folder no longer exists.
pub fn current_folder() -> std::io::Result<PathBuf> {
    std::env::current_dir()
}

/// The folders of a `PATH`, in order.
pub fn split_path(path: &OsStr) -> Vec<PathBuf> {
    std::env::split_paths(path).collect()
}

/// A `PATH` of these folders; `None` if a folder has a colon in its name.
pub fn join_path(folders: impl IntoIterator<Item = PathBuf>) -> Option<OsString> {
    std::env::join_paths(folders).ok()
}

/// Shows the names only: values may be secrets.
impl std::fmt::Debug for Env {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}
