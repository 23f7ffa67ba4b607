//! Collects the store's garbage: all of it between runs, while keeping the derivations of the last run, or paths that are
//! named. What is alive is for Nix to judge.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use std::{fs, io};

use crate::path_info::PathInfo;
use crate::store_path::StorePath;
use crate::tool::{Error, Nix, error_summary};
use flywheel_sys::process::capture::Tool;

/// Collecting garbage in a large store takes long.
const LIMIT: Duration = Duration::from_secs(3600);
/// Each call of `nix-store --delete` finds at most one path that is alive.
const DELETE_TRIES: usize = 24;

/// The folder for our garbage collector roots, one that this user may write to: the system's for
/// root, else the user's own (`nix-store(1)`).
fn folder(state: &Path, user: Option<&str>) -> PathBuf {
    let roots = state.join("gcroots");
    match user {
        Some(user) if !rustix::process::geteuid().is_root() => {
            roots.join("per-user").join(user).join("flywheel")
        }
        _ => roots.join("flywheel"),
    }
}

/// Makes `paths` the roots under a name (one per flake and attribute), replacing the previous ones. `state` is the
/// store's state folder. The links have the logical names, which is what Nix looks for in a chroot store, too.
///
/// # Errors
/// When the links cannot be written.
pub fn set_roots(
    state: &Path,
    user: Option<&str>,
    name: &str,
    paths: &[StorePath],
) -> io::Result<()> {
    set_roots_in(&folder(state, user).join(name), paths)
}

fn set_roots_in(folder: &Path, paths: &[StorePath]) -> io::Result<()> {
    fs::create_dir_all(folder)?;
    let wanted: BTreeSet<&str> = paths.iter().map(StorePath::base_name).collect();
    for path in paths {
        match symlink(path.to_path(), folder.join(path.base_name())) {
            // A link that exists already is a root that stays.
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => (),
        }
    }
    // Old links go last: an interrupted call keeps too many roots, never too few.
    for entry in fs::read_dir(folder)?.flatten() {
        if !wanted.contains(entry.file_name().to_string_lossy().as_ref()) {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// Runs the garbage collector and returns the line in which Nix sums up what it freed.
///
/// # Errors
/// When Nix fails.
pub async fn collect(nix: &Nix) -> Result<String, Error> {
    let output = nix.run_checked(&["store", "gc"], LIMIT).await?;
    let printed = format!("{}\n{}", output.text(), output.stderr);
    let summary = printed
        .lines()
        .rev()
        .map(str::trim)
        .find(|line| line.contains("freed"));
    Ok(summary.unwrap_or("done").to_owned())
}

/// Deletes those of these paths that are dead, which Nix judges: no root, no running process and no valid path that is not
/// among them needs one. Gives those that Nix calls alive; the others are gone, as far as time allowed.
///
/// # Errors
/// When Nix fails for another reason.
pub async fn delete_dead(
    nix: &Nix,
    infos: &[PathInfo],
    limit: Duration,
) -> Result<BTreeSet<StorePath>, Error> {
    let mut ahead: BTreeMap<&StorePath, &PathInfo> =
        infos.iter().map(|info| (&info.path, info)).collect();
    let mut alive = BTreeSet::new();
    let deadline = Instant::now() + limit;
    // Nix stops at the first path that is alive, and names it.
    for _ in 0..DELETE_TRIES {
        let left = deadline.saturating_duration_since(Instant::now());
        if ahead.is_empty() || left.is_zero() {
            break;
        }
        let names: Vec<String> = ahead.keys().map(ToString::to_string).collect();
        let call = || "nix-store --delete".to_owned();
        let tool = Tool::new(&nix.folder().join("nix-store")).envs(nix.variables());
        let ran = tool.arg("--delete").args(&names).run(left).await;
        let output = ran.map_err(|source| Error::Run {
            call: call(),
            source,
        })?;
        if output.status.success() {
            break;
        }
        let named = named_in_error(&output.stderr, &ahead);
        if named.is_empty() {
            return Err(Error::Failed {
                call: call(),
                message: error_summary(&output.stderr),
            });
        }
        // With a path, everything that it refers to is alive.
        let mut living = named;
        while let Some(path) = living.pop() {
            if let Some(info) = ahead.remove(&path) {
                living.extend(info.references.iter().cloned());
                alive.insert(path);
            }
        }
    }
    Ok(alive)
}

/// The first of these paths that Nix's error names; the lines before it name what was deleted. "… since it is still
/// alive" (2.8), "… because it's referenced by …", "… because it's in use by …" (2.34): the first is what it is about.
fn named_in_error(stderr: &str, paths: &BTreeMap<&StorePath, &PathInfo>) -> Vec<StorePath> {
    let error = stderr.find("error:").map_or("", |at| &stderr[at..]);
    let places = paths
        .keys()
        .filter_map(|path| Some((error.find(&path.to_string())?, (*path).clone())));
    places
        .min_by_key(|(at, _)| *at)
        .map(|(_, path)| path)
        .into_iter()
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_runs_derivations_are_kept() {
        let world = tempfile::tempdir().expect("temporary folder");
        let folder = world.path().join("name");
        let path = |name: &str| -> StorePath {
            format!("/nix/store/fvchbymk0m4jvldpb9m5hy0bjy2lf30k-{name}.drv")
                .parse()
                .expect("a path")
        };
        let names = || {
            let mut names: Vec<String> = fs::read_dir(&folder)
                .expect("made")
                .flatten()
                .map(|entry| entry.file_name().to_string_lossy()[33..].to_owned())
                .collect();
            names.sort();
            names
        };
        set_roots_in(&folder, &[path("a"), path("b")]).expect("kept");
        assert_eq!(names(), ["a.drv", "b.drv"]);
        set_roots_in(&folder, &[path("b"), path("c")]).expect("kept");
        assert_eq!(names(), ["b.drv", "c.drv"]);
    }
}
