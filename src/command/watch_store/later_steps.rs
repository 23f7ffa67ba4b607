//! The settings of a job's later steps, or of the shell that called `start`: handed on by `start`, and taken back by
//! `finish`. They name the cache only for as long as the watch lives.

use std::io::{self, IsTerminal as _};
use std::path::Path;

use super::Error;
use super::runtime_dir::RuntimeDir;
use crate::command::setup::quoted;
use crate::job::Prepared;
use flywheel_core::exit::Failure;
use flywheel_nix::daemon_proxy::LastingLink;
use flywheel_nix::settings::with_cache_in;
use flywheel_sys::runner::env::Env;
use flywheel_sys::runner::files::Files;
use flywheel_sys::runner::workflow::{Level, Workflow, shell_data};

const NIX_CONFIG: &str = "NIX_CONFIG";
const DAEMON_SOCKET: &str = "NIX_DAEMON_SOCKET_PATH";

/// The settings that a watch hands on. What they say of the cache ends with this process, however that ends: the path to
/// it goes through this process's current folder, and Nix ignores a file that is not there. Through its open files the path
/// would be forbidden instead, which Nix does not ignore, while a killed process waits for its parent, as it does for ever
/// in a container whose first process is no `init`.
pub(super) struct Settings {
    runtime_dir: RuntimeDir,
}

impl Settings {
    pub(crate) fn new(runtime_dir: RuntimeDir) -> Self {
        Self { runtime_dir }
    }

    /// The variables that the later steps need. `link` is what they are to reach Nix's daemon by.
    pub(crate) fn variables(
        &self,
        prepared: &Prepared,
        link: Option<&Path>,
        env: &Env,
    ) -> Vec<(String, String)> {
        // On a full disk the steps still get their cache; it is then named after the end, too.
        let config = self
            .config(&prepared.settings.config, env)
            .unwrap_or_else(|_| prepared.settings.config.clone());
        let repairs = prepared.ready.variables().into_iter();
        let repairs = repairs.map(|(name, value)| (name.to_owned(), value.to_owned()));
        let link = link.map(|link| (DAEMON_SOCKET.to_owned(), link.display().to_string()));
        std::iter::once((NIX_CONFIG.to_owned(), config))
            .chain(repairs)
            .chain(link)
            .collect()
    }

    fn config(&self, config: &str, env: &Env) -> io::Result<String> {
        self.runtime_dir.make_current()?;
        let file = format!("/proc/{}/cwd/{}", std::process::id(), RuntimeDir::CACHE);
        let base = env.get(NIX_CONFIG).unwrap_or_default();
        let (config, of_cache) = with_cache_in(&file, config, base);
        self.runtime_dir.write_cache(&of_cache)?;
        Ok(config)
    }
}

/// What the variables were before that `Settings` names; an empty text for one that was not set.
pub(super) fn before(prepared: &Prepared, env: &Env) -> Vec<(String, String)> {
    let repaired = prepared.ready.variables().into_iter();
    std::iter::once(NIX_CONFIG)
        .chain(repaired.map(|(name, _)| name))
        .map(|name| {
            let value = env.get(name).unwrap_or_default();
            (name.to_owned(), value.to_owned())
        })
        .collect()
}

/// The variable for the daemon's socket as it was before `link` took its place. Where it was not set, it gets the path that
/// is its default: a runner cannot unset a variable, and Nix 2.8 aborts on an empty one.
pub(super) fn socket_before(link: &LastingLink, env: &Env) -> Option<(String, String)> {
    let named = env.get(DAEMON_SOCKET).filter(|value| !value.is_empty());
    let own = link.path();
    let before = match named {
        Some(path) if Path::new(path) != own => path.to_owned(),
        _ => link.daemon_socket()?.display().to_string(),
    };
    Some((DAEMON_SOCKET.to_owned(), before))
}

/// The same in the place of a watch that was killed: nothing where the steps have not got the link.
pub(super) fn socket_after_killed(link: &LastingLink, env: &Env) -> Option<(String, String)> {
    let has_link = env
        .path(DAEMON_SOCKET)
        .is_some_and(|path| path == link.path());
    has_link.then(|| socket_before(link, env))?
}

/// Hands the settings on to the later steps of a job, or to the shell that called `start`.
///
/// # Errors
/// When the runner's files cannot be written.
pub(super) fn export(
    env: &Env,
    workflow: &Workflow,
    variables: &[(String, String)],
    folder: Option<&Path>,
) -> Result<(), Failure> {
    let files = Files::from_env(env);
    let broken =
        |error: io::Error| Error::Start(format!("the runner's files cannot be written: {error}"));
    if workflow.in_job() {
        for (name, value) in variables {
            files.set_env(name, value).map_err(broken)?;
        }
        if let Some(folder) = folder {
            files.add_path(folder).map_err(broken)?;
        }
    } else {
        // For `eval "$(flywheel watch-store start)"`.
        let path = folder.map(|folder| {
            let folder = quoted(&folder.display().to_string());
            format!("export PATH={folder}${{PATH:+:\"$PATH\"}}")
        });
        to_shell(variables.iter().map(assignment).chain(path));
    }
    workflow.log("flywheel: watching the store; `flywheel watch-store finish` ends it");
    Ok(())
}

/// Gives later steps the values that variables had before the watch, or prints for the shell what undoes `export`.
pub(super) fn give_back(variables: &[(String, String)], workflow: &Workflow, env: &Env) {
    if !workflow.in_job() {
        // For `eval "$(flywheel watch-store finish)"`.
        return to_shell(variables.iter().map(assignment));
    }
    let files = Files::from_env(env);
    for (name, value) in variables {
        if let Err(error) = files.set_env(name, value) {
            let text = format!("`{name}` could not be reset: {error}");
            workflow.annotate(Level::Warning, "watch-store", &text);
        }
    }
}

/// A line for `eval`; an empty value means that the variable is not set.
fn assignment((name, value): &(String, String)) -> String {
    if value.is_empty() {
        format!("unset {name}")
    } else {
        format!("export {name}={}", quoted(value))
    }
}

fn to_shell(lines: impl Iterator<Item = String>) {
    // On a terminal nothing evaluates them.
    if !io::stdout().is_terminal() {
        shell_data(&lines.collect::<Vec<_>>().join("\n"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shell_gets_back_what_it_had() {
        let line = |value: &str| assignment(&(NIX_CONFIG.into(), value.into()));
        assert_eq!(line(""), "unset NIX_CONFIG");
        assert_eq!(line("cores = 1"), "export NIX_CONFIG='cores = 1'");
    }
}
