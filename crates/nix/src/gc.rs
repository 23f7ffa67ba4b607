//! Collects the store's garbage between runs while keeping the derivations of the last run.

use std::collections::BTreeSet;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::Duration;
use std::{fs, io};

use crate::store_path::StorePath;
use crate::tool::{Error, Nix};

/// Collecting garbage in a large store takes long.
const LIMIT: Duration = Duration::from_secs(3600);

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
