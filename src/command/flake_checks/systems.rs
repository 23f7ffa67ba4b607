//! The systems that this machine builds for, and where the flake's files are in the repository.

use std::collections::BTreeSet;
use std::path::Path;

use crate::command::flake_checks::output::Tree;
use flywheel_nix::flake::Source;
use flywheel_nix::flake::system::is_system;
use flywheel_nix::settings::Settings;
use flywheel_sys::runner::env::Env;

/// The systems that this machine and its builders build; `None` where Nix names none.
pub(super) fn native(settings: &Settings) -> Option<BTreeSet<String>> {
    let mut systems: BTreeSet<String> = settings.list("extra-platforms").into_iter().collect();
    systems.insert(settings.text("system")?);
    // `ssh://host x86_64-linux,aarch64-linux key 4 …; …`, or a file of such lines behind `@` (nix.conf(5)).
    let builders = settings.text("builders").unwrap_or_default();
    let text = match builders.strip_prefix('@') {
        Some(file) => std::fs::read_to_string(file.trim()).unwrap_or_default(),
        None => builders,
    };
    let machines = text
        .split([';', '\n'])
        .map(|line| line.split('#').next().unwrap_or_default());
    let listed = machines.filter_map(|machine| machine.split_whitespace().nth(1));
    systems.extend(
        listed
            .flat_map(|list| list.split(','))
            .filter(|word| is_system(word))
            .map(str::to_owned),
    );
    Some(systems)
}

/// Where the flake's files are in the repository. The tree of a `path:` flake begins at its own folder, not at the
/// repository's root.
pub(super) fn tree(source: &Source, env: &Env) -> Tree {
    let is_path = source.locked.get("type").is_some_and(|kind| kind == "path");
    let workspace = env
        .path("GITHUB_WORKSPACE")
        .or_else(|| Path::new(".").canonicalize().ok());
    let prefix = workspace.filter(|_| is_path).and_then(|workspace| {
        let folder = source
            .resolved
            .strip_prefix("path:")?
            .split('?')
            .next()?
            .to_owned();
        let below = Path::new(&folder).canonicalize().ok()?;
        Some(
            below
                .strip_prefix(workspace.canonicalize().ok()?)
                .ok()?
                .to_string_lossy()
                .into_owned(),
        )
    });
    Tree {
        store: source.path.clone(),
        prefix: prefix.unwrap_or_default(),
    }
}
