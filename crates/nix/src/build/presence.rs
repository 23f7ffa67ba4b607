//! Finds the store paths that need no build: those in the store, and those that a substituter
//! can be believed to serve. Fetches nothing.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use crate::build::cache_trust::{Believed, CacheTrust};
use crate::store::{self, Store};
use crate::store_path::StorePath;
use crate::tool::{Nix, strip_ansi};

/// Querying caches about many paths may take a while.
const QUERY_LIMIT: Duration = Duration::from_secs(300);
/// Paths per call; the length of a command line is limited.
const BATCH: usize = 2000;

#[derive(Debug, Default)]
pub struct Presence {
    /// Paths in the store.
    pub(crate) valid: BTreeSet<StorePath>,
    /// Paths that a cache says it serves, and which of these it can be believed to serve.
    offered: BTreeSet<StorePath>,
    believed: Believed,
}

/// Where the paths of an output are, so that it needs no build.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Location {
    /// All of them are in the store. A cache may lack them.
    Store,
    /// Those that the store lacks are in a cache, each with a valid signature of a trusted key.
    Cache,
    /// Those that the store lacks are in a cache, and the settings take them without a signature.
    UnsignedCache,
}

impl Presence {
    /// Looks for `paths`. A cache that does not respond counts as having none of them.
    ///
    /// # Errors
    /// When the store itself cannot be read.
    pub async fn find(
        nix: &Nix,
        store: &Store,
        trust: &CacheTrust,
        paths: &[StorePath],
    ) -> Result<Self, store::Error> {
        let valid = valid(store, paths).await?;
        // Caches hold no derivations.
        let is_missing = |path: &&StorePath| !valid.contains(path) && !path.is_derivation();
        let missing: Vec<&StorePath> = paths.iter().filter(is_missing).collect();
        let mut offered = BTreeSet::new();
        for batch in missing.chunks(BATCH) {
            let names: Vec<String> = batch.iter().map(ToString::to_string).collect();
            let mut args = vec!["build", "--dry-run", "--no-link"];
            args.extend(names.iter().map(String::as_str));
            // Errors of caches are ignored here: a path that none reports is built.
            if let Ok(output) = nix.run(&args, QUERY_LIMIT).await {
                offered.extend(fetched(&output.stderr));
            }
        }
        // Nix also lists the dependencies that it would fetch.
        offered.retain(|path| missing.contains(&path));
        let believed = trust.believed(nix, &offered).await;
        Ok(Self {
            valid,
            offered,
            believed,
        })
    }

    /// Where all of `paths` are; `None` if one of them is neither in the store nor in a cache that can be believed, or if
    /// there are none.
    pub fn of_all(&self, paths: &[StorePath]) -> Option<Location> {
        let is_signed = |path: &StorePath| self.has(path) || self.believed.signed.contains(path);
        let is_there = |path: &StorePath| is_signed(path) || self.believed.unsigned.contains(path);
        if paths.is_empty() || !paths.iter().all(is_there) {
            None
        } else if paths.iter().all(|path| self.has(path)) {
            Some(Location::Store)
        } else if paths.iter().all(is_signed) {
            Some(Location::Cache)
        } else {
            Some(Location::UnsignedCache)
        }
    }

    /// Whether the store has this path.
    pub fn has(&self, path: &StorePath) -> bool {
        self.valid.contains(path)
    }

    /// Whether a cache says that it has one of `paths`, and cannot be believed.
    pub fn is_doubted(&self, paths: &[StorePath]) -> bool {
        let Believed { signed, unsigned } = &self.believed;
        paths.iter().any(|path| {
            self.offered.contains(path) && !signed.contains(path) && !unsigned.contains(path)
        })
    }
}

/// Returns those of `paths` that are in the store.
///
/// # Errors
/// When the store gives no answer.
pub async fn valid(
    store: &Store,
    paths: &[StorePath],
) -> Result<BTreeSet<StorePath>, store::Error> {
    if paths.is_empty() {
        return Ok(BTreeSet::new());
    }
    // The database is exact and quick; looking at the folder is the fallback, where there is a folder.
    let found = if store.database_error().is_none() {
        store
            .valid_by_hash(paths.iter().map(StorePath::hash).collect())
            .await?
    } else if store.location().is_err() {
        let infos = store.infos(paths).await?.infos;
        infos.into_iter().map(|info| info.path).collect()
    } else {
        // Nix keeps a lock file beside a path while it is being built.
        paths
            .iter()
            .filter(|path| is_there(&store.file_of(path)))
            .cloned()
            .collect()
    };
    let wanted: BTreeSet<&StorePath> = paths.iter().collect();
    Ok(found
        .into_iter()
        .filter(|path| wanted.contains(path))
        .collect())
}

fn is_there(file: &Path) -> bool {
    let mut lock = file.as_os_str().to_owned();
    lock.push(".lock");
    file.symlink_metadata().is_ok() && std::fs::symlink_metadata(lock).is_err()
}

/// Parses the output of `--dry-run`: the paths listed as those that "will be fetched".
fn fetched(stderr: &str) -> Vec<StorePath> {
    let (mut paths, mut below) = (Vec::new(), false);
    for line in strip_ansi(stderr).lines() {
        match line.strip_prefix("  ") {
            Some(path) if below => paths.extend(path.trim().parse().ok()),
            Some(_) => (),
            None => below = line.contains("will be fetched"),
        }
    }
    paths
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_a_cache_serves_is_fetched() {
        let hash = "k3ncy4z5yb0jw4z7xsz96l0vkv25blcx";
        let said = format!(
            "these 2 derivations will be built:\n  /nix/store/{hash}-a.drv\nthis path will be fetched (0.00 MiB download, 0.01 MiB unpacked):\n  /nix/store/{hash}-b\ndon't know how to build these paths:\n  /nix/store/{hash}-c\n"
        );
        let paths: Vec<String> = fetched(&said).iter().map(ToString::to_string).collect();
        assert_eq!(paths, [format!("/nix/store/{hash}-b")]);
    }

    #[test]
    fn what_the_store_alone_has_is_not_in_a_cache() {
        let path = |letter: &str| -> StorePath {
            let text = format!("/nix/store/{}-x", letter.repeat(32));
            text.parse().expect("valid")
        };
        let set = |letters: &[&str]| letters.iter().map(|letter| path(letter)).collect();
        let present = Presence {
            valid: set(&["a", "b"]),
            offered: set(&["c", "d", "f"]),
            believed: Believed {
                signed: set(&["c"]),
                unsigned: set(&["d"]),
            },
        };
        let paths = |letters: &[&str]| {
            letters
                .iter()
                .map(|letter| path(letter))
                .collect::<Vec<_>>()
        };
        let of = |letters: &[&str]| present.of_all(&paths(letters));
        assert_eq!(of(&["a", "b"]), Some(Location::Store));
        assert_eq!(of(&["a", "c"]), Some(Location::Cache));
        assert_eq!(of(&["a", "c", "d"]), Some(Location::UnsignedCache));
        assert_eq!(
            (of(&["a", "f"]), of(&["a", "g"]), of(&[])),
            (None, None, None)
        );
        assert!(present.is_doubted(&paths(&["a", "f"])));
        assert!(!present.is_doubted(&paths(&["a", "c", "d", "g"])));
    }
}
