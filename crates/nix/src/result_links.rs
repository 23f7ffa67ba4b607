//! Finds the job's results: the store paths that links below its folder point to. Blocking.
//!
//! `nix build` registers each `result` link as an indirect root: a link in `gcroots/auto` that
//! points to the link the user sees. The results count even when nothing had to be built.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};
use std::{fs, io};

use crate::store_path::StorePath;

/// File systems round timestamps down, some to whole seconds.
const SLACK: Duration = Duration::from_secs(1);

/// Returns the store paths that links below `folder`, made or changed since `since`, point to. The
/// links are those registered in `gcroots` (`/nix/var/nix/gcroots`) and `result*` in the folder
/// itself. Validity is not checked.
///
/// # Errors
/// When `folder` cannot be read. Unreadable roots are skipped; the folder's own links remain.
pub(crate) fn find(gcroots: &Path, folder: &Path, since: SystemTime) -> io::Result<Vec<StorePath>> {
    let since = since.checked_sub(SLACK).unwrap_or(SystemTime::UNIX_EPOCH);
    // Nix records the link's path as the user typed it, so both spellings of the folder may occur.
    let spellings = [folder.to_owned(), folder.canonicalize()?];
    let registered = registered(&gcroots.join("auto"));
    let below = registered
        .into_iter()
        .filter(|link| spellings.iter().any(|folder| link.starts_with(folder)));
    let links = below.chain(own_results(folder)?);
    // Several links may point into the same store path.
    let found: BTreeSet<StorePath> = links
        .filter_map(|link| fresh_target(&link, since))
        .collect();
    Ok(found.into_iter().collect())
}

fn registered(auto: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(auto) else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|entry| fs::read_link(entry.path()).ok())
        .collect()
}

fn own_results(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder)?.flatten();
    let results = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with("result"));
    Ok(results.map(|entry| entry.path()).collect())
}

/// Returns the store path a link points to, if the link is new enough. A link is never changed in
/// place, so its modification time is its creation time.
fn fresh_target(link: &Path, since: SystemTime) -> Option<StorePath> {
    let facts = fs::symlink_metadata(link).ok()?;
    let made = facts.modified().ok()?;
    if !facts.is_symlink() || made < since {
        return None;
    }
    // A link may point below a store path, such as `result/bin`.
    StorePath::containing(&fs::read_link(link).ok()?).ok()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, utimensat};

    use super::*;

    fn path(name: &str) -> String {
        format!("/nix/store/fvchbymk0m4jvldpb9m5hy0bjy2lf30k-{name}")
    }

    fn age(link: &Path) {
        let old = Timespec {
            tv_sec: 1_000_000_000,
            tv_nsec: 0,
        };
        let times = Timestamps {
            last_access: old,
            last_modification: old,
        };
        utimensat(CWD, link, &times, AtFlags::SYMLINK_NOFOLLOW).expect("set");
    }

    #[test]
    fn links_of_this_job_below_this_folder_are_found() {
        let world = tempfile::tempdir().expect("temporary folder");
        let (job, other, auto) = (
            world.path().join("job"),
            world.path().join("other"),
            world.path().join("roots/auto"),
        );
        for folder in [&job.join("deep"), &other, &auto] {
            fs::create_dir_all(folder).expect("made");
        }
        let started = SystemTime::now();
        let links = [
            (job.join("deep/out"), path("deep")),
            (other.join("result"), path("other")),
            (job.join("deep/old"), path("old")),
            (job.join("deep/elsewhere"), "/tmp".to_owned()),
        ];
        for (number, (link, target)) in links.iter().enumerate() {
            symlink(target, link).expect("linked");
            symlink(link, auto.join(number.to_string())).expect("registered");
        }
        symlink(world.path().join("job/gone"), auto.join("dangling")).expect("registered");
        age(&job.join("deep/old"));
        symlink(path("unregistered"), job.join("result-1")).expect("linked");
        symlink(path("stale"), job.join("result-2")).expect("linked");
        age(&job.join("result-2"));
        fs::write(job.join("result.txt"), "no link").expect("written");
        let found = find(&world.path().join("roots"), &job, started).expect("readable");
        assert_eq!(
            found.iter().map(StorePath::name).collect::<Vec<_>>(),
            ["deep", "unregistered"]
        );
    }

    #[test]
    fn no_roots_are_no_error_and_no_folder_is_one() {
        let world = tempfile::tempdir().expect("temporary folder");
        symlink(path("a"), world.path().join("result")).expect("linked");
        let none = Path::new("/nonexistent");
        assert_eq!(
            find(none, world.path(), SystemTime::UNIX_EPOCH)
                .expect("readable")
                .len(),
            1
        );
        assert!(find(none, none, SystemTime::UNIX_EPOCH).is_err());
    }
}
