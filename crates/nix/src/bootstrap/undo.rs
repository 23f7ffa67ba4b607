//! Takes back what an installation has put on this machine: exactly what its manifest lists, and `/nix` itself where `sudo`
//! made it. Refuses where something has come into the store since, because that needs what would go. What an
//! interrupted installation has left is removed as well. No installation can begin while this runs.

use std::collections::BTreeSet;
use std::error::Error as _;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::time::Instant;

use super::build_users;
use super::closure::{Manifest, Staging, StagingError};
use super::install::sudo_call;
use super::plan::Impossible;
use super::rootless;
use super::{Error, Host};
use crate::db::Db;
use crate::nar::unpack::remove_tree;
use flywheel_core::progress::Sink;
use flywheel_core::text::{count, one_line};
use flywheel_sys::runner::env::Env;
use flywheel_sys::untrusted_file::{self, Owner};

/// The file in a folder that `sudo` made, or gave to this user; it holds what was there before.
const MARK: &str = ".flywheel-has-this-folder-by-sudo";
/// What it holds where there was no folder.
const NO_FOLDER: &str = "none";
const MARK_LIMIT: u64 = 100;
/// As for making it.
const SUDO_LIMIT: Duration = Duration::from_secs(5);
/// How long to wait for an installation that is under way. Short, because nothing is printed while it waits.
const LOCK_LIMIT: Duration = Duration::from_secs(10);

/// Notes in a folder that `sudo` made it, and who had it before, if it was there.
pub(super) fn mark(nix: &Path, owner_before: Option<u32>) -> io::Result<()> {
    let text = owner_before.map_or(NO_FOLDER.to_owned(), |owner| owner.to_string());
    fs::write(nix.join(MARK), text)
}

/// Takes back what was installed below `/nix`; returns a sentence for people.
///
/// # Errors
/// When something has come into the store that needs it, an installation is under way, or a file cannot be removed.
pub async fn undo(env: &Env) -> Result<String, Error> {
    let host = Host::current();
    let text = remove_alone(&host.nix, &host.etc).await?;
    let folder = give_back(&host, env).await?;
    let mut rest = Vec::new();
    for folder in rootless::half_removed(env) {
        remove_tree(&folder).map_err(|error| stuck(&folder, &error.to_string()))?;
        rest.push(format!(
            "removed what was left of a store in `{}`",
            folder.display()
        ));
    }
    let own = match rootless::own_store(env) {
        Some(place) => Some(remove_own_store(&place).await?),
        None => None,
    };
    let parts: Vec<String> = text
        .into_iter()
        .chain(folder)
        .chain(rest)
        .chain(own)
        .collect();
    if parts.is_empty() {
        return Ok(format!(
            "nothing to take back: Flywheel has installed no Nix at `{}`",
            host.nix.display()
        ));
    }
    Ok(parts.join("; "))
}

/// Removes the store of this user's own, which only his jobs see, as a whole.
async fn remove_own_store(place: &Path) -> Result<String, Impossible> {
    let nix = place.join("nix");
    let failed = |problem: String| stuck(&nix, &problem);
    let manifest = Manifest::read(&nix).map_err(|error| failed(error.to_string()))?;
    if Manifest::is_held(&nix) {
        return Err(in_use());
    }
    let deadline = Instant::now() + LOCK_LIMIT;
    let lock = Staging::lock(&nix, &mut Vec::new(), &Sink::silent(), deadline).await;
    let _lock = lock.map_err(|error| not_alone(&nix, &error))?;
    let ours = manifest.into_iter().flat_map(|manifest| manifest.paths);
    let ours: BTreeSet<String> = ours.map(|path| path.to_string()).collect();
    let valid = registered(&nix.join("var/nix")).map_err(|error| failed(error.to_string()))?;
    let others: Vec<&String> = valid.iter().filter(|path| !ours.contains(*path)).collect();
    if let Some(other) = others.first() {
        let number = count(others.len() as u64, "store path");
        let place = place.display();
        return Err(Impossible {
            obstacle: format!(
                "the store in `{place}` is not taken back: jobs have put {number} there, such as `{other}`"
            ),
            remedy: format!(
                "If nothing of it is wanted, and no job runs: `chmod -R u+w {place} && rm -rf {place}`."
            ),
        });
    }
    // At once: a store of which a part is gone would be taken for one.
    let aside = rootless::gone(place);
    let removed = remove_tree(&aside)
        .and_then(|()| fs::rename(place, &aside))
        .and_then(|()| remove_tree(&aside));
    removed.map_err(|error| failed(error.to_string()))?;
    Ok(format!("removed the store in `{}`", place.display()))
}

/// All paths that a store's database has, those with unusable metadata included.
fn registered(state: &Path) -> Result<Vec<String>, crate::db::Error> {
    let file = Db::file(state);
    if !file.exists() {
        return Ok(Vec::new());
    }
    let added = Db::open(&file)?.added_after(0)?;
    let readable = added
        .rows
        .into_iter()
        .map(|(_, info)| info.path.to_string());
    let unreadable = added.unreadable.into_iter().map(|one| one.path);
    Ok(readable.chain(unreadable).collect())
}

fn stuck(nix: &Path, problem: &str) -> Impossible {
    Impossible {
        obstacle: format!(
            "what is below `{}` could not be removed: {problem}",
            nix.display()
        ),
        remedy:
            "Run this as the user that Nix was installed by, and again once the obstacle is gone."
                .into(),
    }
}

/// Why no lock could be had.
fn not_alone(nix: &Path, error: &StagingError) -> Impossible {
    match error {
        StagingError::Busy => Impossible {
            obstacle: "Nix is not taken back: it is being installed on this machine".into(),
            remedy: "Run this again once that installation has ended.".into(),
        },
        error => match error.source() {
            Some(cause) => stuck(nix, &format!("{error}: {cause}")),
            None => stuck(nix, &error.to_string()),
        },
    }
}

/// Removes what was installed, under the lock that keeps installations away. `None` if there was nothing.
async fn remove_alone(nix: &Path, etc: &Path) -> Result<Option<String>, Impossible> {
    let read = Manifest::read(nix).map_err(|error| stuck(nix, &error.to_string()))?;
    // The lock is on a folder that it would make.
    if read.is_none() {
        return Ok(None);
    }
    let mut made = Vec::new();
    let deadline = Instant::now() + LOCK_LIMIT;
    let lock = Staging::lock(nix, &mut made, &Sink::silent(), deadline).await;
    let lock = lock.map_err(|error| not_alone(nix, &error))?;
    let (folder, etc) = (nix.to_owned(), etc.to_owned());
    let removed = tokio::task::spawn_blocking(move || {
        let removed = remove(&folder, &etc);
        // An installation that failed has removed its folders, and waiting for its lock has made them again.
        remove_empty(&made);
        drop(lock);
        removed
    });
    let removed = removed.await;
    removed.unwrap_or_else(|panic| Err(stuck(nix, &panic.to_string())))
}

/// Removes folders, which are given outermost first. One that something else came into stays.
fn remove_empty(folders: &[PathBuf]) {
    for folder in folders.iter().rev() {
        let _ = fs::remove_dir(folder);
    }
}

/// Removes what the manifest lists. `None` if there is no manifest.
fn remove(nix: &Path, etc: &Path) -> Result<Option<String>, Impossible> {
    let failed = |error: io::Error| stuck(nix, &error.to_string());
    // Only under the lock is it what will go.
    let read = Manifest::read(nix).map_err(|error| failed(error.into()))?;
    let Some(manifest) = read else {
        return Ok(None);
    };
    if Manifest::is_held(nix) {
        return Err(in_use());
    }
    check_links(nix, &manifest)?;
    let valid = valid_paths(nix, &manifest)?;
    let ours: BTreeSet<String> = manifest.paths.iter().map(ToString::to_string).collect();
    // A killed installation may have come as far as this. Nothing that is valid needs what never was.
    let is_registered = valid.iter().any(|path| ours.contains(path));
    if manifest.complete || is_registered {
        check_unneeded(nix, &manifest, &valid, &ours)?;
    }
    if !manifest.complete {
        // It knows the folders that paths are in before they get their place, which no manifest lists.
        Staging::take_back(nix, &manifest).map_err(failed)?;
    }
    if manifest.complete || is_registered {
        remove_installed(nix, &manifest).map_err(failed)?;
    }
    build_users::remove(etc, nix).map_err(failed)?;
    Manifest::remove(nix).map_err(failed)?;
    remove_empty(&manifest.folders);
    if !manifest.complete {
        return Ok(Some(
            "removed what an interrupted installation of Nix had left".into(),
        ));
    }
    let paths = count(manifest.paths.len() as u64, "store path");
    Ok(Some(format!(
        "took back Nix from {}: {paths}",
        manifest.source
    )))
}

/// Removes links, paths and the store's state, once nothing needs them. Wherever this is killed, what is left is none that
/// a job could take for a Nix, and goes with the next installation or the next call of this.
fn remove_installed(nix: &Path, manifest: &Manifest) -> io::Result<()> {
    let mut going = manifest.clone();
    going.complete = false;
    going.write(nix)?;
    for link in manifest.links.iter().filter(|link| link.is_symlink()) {
        fs::remove_file(link)?;
    }
    // A path must not be valid any more when only a part of it is there.
    let state = nix.join("var/nix");
    if manifest.folders.contains(&state) && state.exists() {
        fs::rename(&state, Staging::aside(nix))?;
    }
    let store = nix.join("store");
    for path in &manifest.paths {
        remove_tree(&store.join(path.base_name()))?;
    }
    remove_tree(&Staging::aside(nix))?;
    let var = nix.join("var");
    if manifest.folders.contains(&var) {
        // The logs of builds whose results are gone.
        remove_tree(&var.join("log/nix"))?;
        let _ = fs::remove_dir(var.join("log"));
    }
    if manifest.folders.contains(&store) {
        // Nix makes it in each store that it opens.
        remove_tree(&store.join(".links"))?;
    }
    Ok(())
}

/// All paths that the store's database has.
fn valid_paths(nix: &Path, manifest: &Manifest) -> Result<Vec<String>, Impossible> {
    let state = nix.join("var/nix");
    match registered(&state) {
        Ok(paths) => Ok(paths),
        // A killed Nix leaves a new one without tables.
        Err(_) if !manifest.complete && manifest.folders.contains(&state) => Ok(Vec::new()),
        Err(error) => Err(stuck(nix, &error.to_string())),
    }
}

/// The command by which a person collects garbage: this Nix is not on everybody's `PATH`.
fn collect(nix: &Path) -> String {
    nix.join("var/nix/profiles/flywheel/bin/nix-collect-garbage")
        .display()
        .to_string()
}

fn in_use() -> Impossible {
    Impossible {
        obstacle: "Nix is not taken back: a job is at work with it".into(),
        remedy: "Run this again once that job has ended.".into(),
    }
}

/// Sees that the profiles are still the installed Nix.
fn check_links(nix: &Path, manifest: &Manifest) -> Result<(), Impossible> {
    let target = manifest
        .nix
        .as_ref()
        .map(|path| nix.join("store").join(path.base_name()));
    let changed = |link: &&PathBuf| fs::read_link(link).is_ok_and(|found| Some(found) != target);
    let Some(link) = manifest.links.iter().find(changed) else {
        return Ok(());
    };
    Err(Impossible {
        obstacle: format!(
            "Nix is not taken back: `{}` leads to something else since",
            link.display()
        ),
        remedy: format!(
            "Remove that profile, run `{}`, and try again.",
            collect(nix)
        ),
    })
}

/// Sees that nothing else is in the store, and that no database is left that knows what goes.
fn check_unneeded(
    nix: &Path,
    manifest: &Manifest,
    valid: &[String],
    ours: &BTreeSet<String>,
) -> Result<(), Impossible> {
    let others: Vec<&String> = valid.iter().filter(|path| !ours.contains(*path)).collect();
    if let Some(other) = others.first() {
        let number = count(others.len() as u64, "store path");
        return Err(Impossible {
            obstacle: format!(
                "Nix is not taken back: {number} came into the store since, such as `{other}`"
            ),
            remedy: format!(
                "Remove the results that are still wanted nowhere, run `{}`, and try again.",
                collect(nix)
            ),
        });
    }
    if !manifest.folders.contains(&nix.join("var/nix"))
        && valid.iter().any(|path| ours.contains(path))
    {
        return Err(Impossible {
            obstacle: "Nix is not taken back: it came into a store that was there before, whose database knows its paths".into(),
            remedy: "Remove `/nix` as a whole if nothing in it is needed.".into(),
        });
    }
    Ok(())
}

/// Has `sudo` take the folder back that it made, once nothing else is in it.
async fn give_back(host: &Host, env: &Env) -> Result<Option<String>, Error> {
    let file = host.nix.join(MARK);
    let Ok(text) = untrusted_file::read(&file, Owner::Own, MARK_LIMIT) else {
        return Ok(None);
    };
    let folder = host.nix.display().to_string();
    let before = String::from_utf8_lossy(&text).trim().parse::<u32>().ok();
    let (command, done) = match before {
        Some(owner) => (
            vec!["chown".to_owned(), owner.to_string(), folder.clone()],
            format!("`{folder}` belongs to user {owner} again"),
        ),
        None => (
            vec!["rmdir".to_owned(), folder.clone()],
            format!("removed `{folder}`"),
        ),
    };
    let failed = |problem: &str| {
        let mut impossible = stuck(&host.nix, problem);
        impossible.remedy = format!(
            "Run `rm -f {} && {}` as root, or this again once `sudo` works.",
            file.display(),
            command.join(" ")
        );
        impossible
    };
    let entries = fs::read_dir(&host.nix).map_err(|error| failed(&error.to_string()))?;
    let others = entries.flatten().filter(|entry| entry.file_name() != MARK);
    if let Some(other) = others.map(|entry| entry.file_name()).next() {
        let other = other.to_string_lossy();
        return Ok(Some(format!(
            "`{folder}` stays, because `{other}` is in it"
        )));
    }
    let Some(sudo) = host.program("sudo", env) else {
        return Err(failed("there is no `sudo`").into());
    };
    // A folder with the mark in it cannot be removed, and one of another user keeps it.
    fs::remove_file(&file).map_err(|error| failed(&error.to_string()))?;
    let ran = sudo_call(&sudo).args(&command).run(SUDO_LIMIT).await;
    let problem = match ran {
        Ok(output) if output.status.success() => return Ok(Some(done)),
        Ok(output) => one_line(&output.stderr, 200),
        Err(error) => one_line(&error.to_string(), 200),
    };
    // So that a second try finds it. Where this fails as well, the folder is no longer this user's.
    let _ = mark(&host.nix, before);
    Err(failed(&problem).into())
}

#[cfg(test)]
mod tests;
