//! The folders of its own that a test gives to each process it starts. Nothing that another process does in the
//! machine's temporary folder, or in the home of the user, can then matter to the test.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The variables by which a program finds a place to write to, and the folder of the test that each one names.
/// `RUNNER_TEMP` is not among them: outside of a job there is none, and a harness of jobs sets its own.
const FOLDERS: [(&str, &str); 4] = [
    ("HOME", "home"),
    ("TMPDIR", "tmp"),
    ("XDG_RUNTIME_DIR", "runtime"),
    ("XDG_STATE_HOME", "state"),
];

/// Clears the environment of `command`, and then points it to folders below `top`, which are made.
pub fn isolate<'a>(command: &'a mut Command, top: &Path) -> &'a mut Command {
    command.env_clear().envs(variables(top))
}

/// What `isolate` sets, for a child that another program starts.
pub fn variables(top: &Path) -> [(&'static str, PathBuf); FOLDERS.len()] {
    FOLDERS.map(|(name, below)| {
        let folder = top.join(below);
        std::fs::create_dir_all(&folder).unwrap();
        (name, folder)
    })
}

/// The variables among those of a process that name a folder outside of `top`, and those that are missing.
pub fn shared<'a>(
    variables: impl IntoIterator<Item = (&'a OsStr, &'a OsStr)>,
    top: &Path,
) -> Vec<String> {
    let mut missing: Vec<&str> = FOLDERS.map(|(name, _)| name).to_vec();
    let mut shared = Vec::new();
    for (name, value) in variables {
        let names_folder = name == "RUNNER_TEMP" || FOLDERS.iter().any(|(known, _)| name == *known);
        if names_folder && !Path::new(value).starts_with(top) {
            shared.push(format!("{}={}", name.display(), value.display()));
        }
        missing.retain(|other| name != *other);
    }
    shared.extend(missing.into_iter().map(|name| format!("{name} is not set")));
    shared
}
