//! Takes back what an installation has put on this machine: exactly what its manifest lists, and `/nix` itself where `sudo`
//! made it. Refuses where something has come into the store since, because that needs what would go.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::build_users;
use super::closure::Manifest;
use super::install::sudo_call;
use super::plan::Impossible;
use super::{Error, Host};
use crate::db::Db;
use crate::nar::unpack::remove_tree;
use crate::store_path::StorePath;
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

/// Notes in a folder that `sudo` made it, and who had it before, if it was there.
pub(super) fn mark(nix: &Path, owner_before: Option<u32>) -> io::Result<()> {
    let text = owner_before.map_or(NO_FOLDER.to_owned(), |owner| owner.to_string());
    fs::write(nix.join(MARK), text)
}

/// Takes back what was installed below `/nix`; returns a sentence for people.
///
/// # Errors
/// When something has come into the store that needs it, or a file cannot be removed.
pub async fn undo(env: &Env) -> Result<String, Error> {
    let host = Host::current();
    let (nix, etc) = (host.nix.clone(), host.etc.clone());
    let removed = tokio::task::spawn_blocking(move || remove(&nix, &etc)).await;
    let text = removed.unwrap_or_else(|panic| Err(stuck(&host.nix, &panic.to_string())))?;
    let folder = give_back(&host, env).await?;
    Ok(match (text, folder) {
        (None, None) => "nothing to take back: Flywheel has installed no Nix here".into(),
        (text, folder) => {
            let parts: Vec<String> = text.into_iter().chain(folder).collect();
            parts.join("; ")
        }
    })
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

/// Removes what the manifest lists. `None` if there is no manifest.
fn remove(nix: &Path, etc: &Path) -> Result<Option<String>, Impossible> {
    let failed = |error: io::Error| stuck(nix, &error.to_string());
    let read = Manifest::read(nix).map_err(|error| failed(error.into()))?;
    let Some(manifest) = read else {
        return Ok(None);
    };
    check_unneeded(nix, &manifest)?;
    for link in manifest.links.iter().filter(|link| link.is_symlink()) {
        fs::remove_file(link).map_err(failed)?;
    }
    let store = nix.join("store");
    for path in &manifest.paths {
        remove_tree(&store.join(path.base_name())).map_err(failed)?;
    }
    let state = nix.join("var/nix");
    if manifest.folders.contains(&state) {
        remove_tree(&state).map_err(failed)?;
    }
    if manifest.folders.contains(&store) {
        // Nix makes it in each store that it opens.
        remove_tree(&store.join(".links")).map_err(failed)?;
    }
    build_users::remove(etc, nix).map_err(failed)?;
    Manifest::remove(nix).map_err(failed)?;
    for folder in manifest.folders.iter().rev() {
        // One that something else came into stays.
        let _ = fs::remove_dir(folder);
    }
    let paths = count(manifest.paths.len() as u64, "store path");
    Ok(Some(format!(
        "took back Nix from {}: {paths}",
        manifest.source
    )))
}

/// Sees that nothing else is in the store, and that the profile is still the installed Nix.
fn check_unneeded(nix: &Path, manifest: &Manifest) -> Result<(), Impossible> {
    let ours: BTreeSet<&StorePath> = manifest.paths.iter().collect();
    let file = Db::file(&nix.join("var/nix"));
    let mut valid = Vec::new();
    if file.exists() {
        let rows = Db::open(&file).and_then(|database| database.added_after(0));
        let rows = rows.map_err(|error| stuck(nix, &error.to_string()))?;
        valid = rows.rows.into_iter().map(|(_, info)| info.path).collect();
    }
    let others: Vec<&StorePath> = valid.iter().filter(|path| !ours.contains(path)).collect();
    if let Some(other) = others.first() {
        let number = count(others.len() as u64, "store path");
        return Err(Impossible {
            obstacle: format!("Nix is not taken back: {number} came into the store since, such as `{other}`"),
            remedy: "Remove the results that are still wanted nowhere, run `nix-collect-garbage`, and try again.".into(),
        });
    }
    let target = manifest
        .nix
        .as_ref()
        .map(|path| nix.join("store").join(path.base_name()));
    let changed = |link: &&PathBuf| fs::read_link(link).is_ok_and(|found| Some(found) != target);
    if let Some(link) = manifest.links.iter().find(changed) {
        return Err(Impossible {
            obstacle: format!(
                "Nix is not taken back: `{}` leads to something else since",
                link.display()
            ),
            remedy: "Remove that profile, run `nix-collect-garbage`, and try again.".into(),
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
    let failed = |problem: &str| {
        let mut impossible = stuck(&host.nix, problem);
        impossible.remedy = format!("Run `rmdir {}` as root.", host.nix.display());
        impossible
    };
    let entries = fs::read_dir(&host.nix).map_err(|error| failed(&error.to_string()))?;
    let others = entries.flatten().filter(|entry| entry.file_name() != MARK);
    if let Some(other) = others.map(|entry| entry.file_name()).next() {
        let other = other.to_string_lossy();
        return Ok(Some(format!(
            "`{}` stays, because `{other}` is in it",
            host.nix.display()
        )));
    }
    let before = String::from_utf8_lossy(&text).trim().to_owned();
    let Some(sudo) = host.program("sudo", env) else {
        return Err(failed("there is no `sudo`").into());
    };
    let folder = host.nix.display().to_string();
    fs::remove_file(&file).map_err(|error| failed(&error.to_string()))?;
    let call = sudo_call(&sudo, env);
    let (call, done) = match before.parse::<u32>() {
        Ok(owner) => (
            call.args(["chown", &owner.to_string(), &folder]),
            format!("`{folder}` belongs to user {owner} again"),
        ),
        Err(_) => (call.args(["rmdir", &folder]), format!("removed `{folder}`")),
    };
    match call.run(SUDO_LIMIT).await {
        Ok(output) if output.status.success() => Ok(Some(done)),
        Ok(output) => Err(failed(&one_line(&output.stderr, 200)).into()),
        Err(error) => Err(failed(&one_line(&error.to_string(), 200)).into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NIX: &str = "3zc6lr3rxv7sljj2gsxigvkpkm3d9dmr-nix-2.99.1";

    /// An installation as its manifest describes it.
    fn installed() -> tempfile::TempDir {
        let folder = tempfile::tempdir().expect("temporary folder");
        let nix = folder.path().join("nix");
        let made = [
            "",
            "var",
            "var/flywheel",
            "var/nix",
            "var/nix/profiles",
            "store",
        ];
        for name in made {
            fs::create_dir(nix.join(name)).expect("made");
        }
        fs::create_dir_all(nix.join("store").join(NIX).join("bin")).expect("made");
        fs::create_dir(nix.join("store/.links")).expect("made");
        let link = nix.join("var/nix/profiles/default");
        std::os::unix::fs::symlink(nix.join("store").join(NIX), &link).expect("linked");
        let folders = ["", "var", "var/flywheel", "var/nix", "store"].map(|name| match name {
            "" => nix.clone(),
            name => nix.join(name),
        });
        let manifest = serde_json::json!({
            "version": 1, "complete": true, "source": "https://cache.example",
            "nix": format!("/nix/store/{NIX}"), "paths": [format!("/nix/store/{NIX}")],
            "folders": folders, "links": [link],
        });
        fs::write(Manifest::file(&nix), manifest.to_string()).expect("written");
        folder
    }

    #[test]
    fn what_was_put_there_goes_and_nothing_is_left() {
        let folder = installed();
        let nix = folder.path().join("nix");
        let text = remove(&nix, folder.path())
            .expect("nothing needs it")
            .expect("installed");
        assert_eq!(
            text,
            "took back Nix from https://cache.example: 1 store path"
        );
        assert!(!nix.exists());
        assert_eq!(remove(&nix, folder.path()).expect("nothing"), None);
    }

    #[test]
    fn what_is_not_in_the_manifest_stays() {
        let folder = installed();
        let nix = folder.path().join("nix");
        fs::write(nix.join("var/own"), "x").expect("written");
        remove(&nix, folder.path()).expect("nothing needs it");
        assert!(nix.join("var/own").exists() && !nix.join("store").exists());
    }

    #[test]
    fn a_profile_that_somebody_changed_is_a_reason_to_refuse() {
        let folder = installed();
        let nix = folder.path().join("nix");
        let link = nix.join("var/nix/profiles/default");
        fs::remove_file(&link).expect("removed");
        std::os::unix::fs::symlink("default-1-link", &link).expect("linked");
        let refused = remove(&nix, folder.path()).expect_err("another generation");
        assert!(
            refused.obstacle.contains("leads to something else"),
            "{}",
            refused.obstacle
        );
        assert!(nix.join("store").join(NIX).exists());
    }
}
