//! The logs that Nix keeps of builds. By them a job's failed builds are found once its command has ended: nothing reads
//! what the command prints, so that its streams stay its own.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use crate::store::Store;
use crate::store_path::StorePath;
use crate::tool::Nix;
use flywheel_core::text::{shorten, without_ansi};
use flywheel_sys::process::capture::Tool;

/// How long the folder of the logs is searched. A store of years may have a hundred thousand.
const SEARCH_LIMIT: Duration = Duration::from_secs(2);
/// How many of the newest logs are kept of what is found.
const KEPT: usize = 1000;
/// How long Nix may take to print a log.
const READ_LIMIT: Duration = Duration::from_secs(5);
/// Characters of a line that are kept.
const LINE_LIMIT: usize = 400;

/// Where a store keeps the logs of its builds.
#[derive(Clone, Debug)]
pub struct BuildLogs {
    nix: Nix,
    /// `drvs` in Nix's log folder: the first two characters of a derivation's name are a folder, the rest is a file,
    /// with `.bz2` where `compress-build-log` is on (`local-fs-store.cc`, `build-log.cc`).
    folder: PathBuf,
}

impl BuildLogs {
    /// `nix` has the settings of the job. `None` for a store that is not on this machine.
    pub fn of(nix: Nix, store: &Store) -> Option<Self> {
        store.location().ok()?;
        let named = nix.variable("NIX_LOG_DIR").map(PathBuf::from);
        let beside = || Some(store.state().parent()?.join("log/nix"));
        let folder = named.or_else(beside)?.join("drvs");
        Some(Self { nix, folder })
    }

    /// The derivations whose logs were written since then, the newest first: those that were built, successfully or not.
    pub async fn written_since(&self, begun: SystemTime) -> Vec<StorePath> {
        let folder = self.folder.clone();
        // It fails only with a panic.
        tokio::task::spawn_blocking(move || written_since(&folder, begun))
            .await
            .unwrap_or_default()
    }

    /// The last lines of a derivation's log, without escape sequences; none where it cannot be read.
    pub async fn last_lines(&self, derivation: &StorePath, number: usize) -> Vec<String> {
        let program = self.nix.folder().join("nix-store");
        let tool = Tool::new(&program).envs(self.nix.variables());
        let path = derivation.to_string();
        let arguments = ["--read-log", &path];
        let Ok(output) = tool.args(arguments).run(READ_LIMIT).await else {
            return Vec::new();
        };
        let text = output.text();
        let lines: Vec<&str> = text.lines().collect();
        let from = lines.len().saturating_sub(number);
        lines[from..]
            .iter()
            .map(|line| shorten(without_ansi(line).trim_end(), LINE_LIMIT))
            .collect()
    }
}

fn written_since(folder: &Path, begun: SystemTime) -> Vec<StorePath> {
    let until = Instant::now() + SEARCH_LIMIT;
    let mut found = BinaryHeap::new();
    let entries = |folder: &Path| std::fs::read_dir(folder).into_iter().flatten().flatten();
    'folders: for first in entries(folder) {
        for log in entries(&first.path()) {
            if Instant::now() > until {
                break 'folders;
            }
            // The name first: it costs no call of the system.
            let Some(path) = derivation(&first.file_name(), &log.file_name()) else {
                continue;
            };
            let written = log.metadata().and_then(|facts| facts.modified());
            if let Some(at) = written.ok().filter(|at| *at >= begun) {
                found.push((Reverse(at), path));
            }
            if found.len() > KEPT {
                found.pop();
            }
        }
    }
    let newest_first = found.into_sorted_vec();
    newest_first.into_iter().map(|(_, path)| path).collect()
}

fn derivation(first: &OsStr, rest: &OsStr) -> Option<StorePath> {
    let (first, rest) = (first.to_str()?, rest.to_str()?);
    let rest = rest.strip_suffix(".bz2").unwrap_or(rest);
    let path = StorePath::from_base_name(&format!("{first}{rest}")).ok()?;
    path.is_derivation().then_some(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HASH: &str = "fvchs9i3c9f4d6lcsm7q2ybxwpbnz4yc";

    #[test]
    fn logs_of_this_job_are_found_the_newest_first() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let begun = SystemTime::now() - Duration::from_secs(100);
        let write = |name: &str, age: u64| {
            let full = format!("{HASH}-{name}");
            let file = folder.path().join(&full[..2]).join(&full[2..]);
            std::fs::create_dir_all(file.parent().expect("below")).expect("made");
            let file = std::fs::File::create(file).expect("made");
            let at = SystemTime::now() - Duration::from_secs(age);
            file.set_modified(at).expect("set");
        };
        write("older.drv.bz2", 50);
        write("newer.drv", 10);
        write("before.drv.bz2", 200);
        write("something-else", 10);
        let found = written_since(folder.path(), begun);
        let names: Vec<&str> = found.iter().map(StorePath::name).collect();
        assert_eq!(names, ["newer.drv", "older.drv"]);
    }
}
