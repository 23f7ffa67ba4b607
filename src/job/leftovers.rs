//! What dead jobs left: which of the store's paths are theirs, and not yet in the cache as far as their journals know.
//! The publication offers them beside the job's own. Each carries the evidence by which it is a dead job's, because
//! the rule of ownership trusts one kind of evidence less than the other.

use std::collections::{BTreeMap, BTreeSet};

use super::ownership::Ownership;
use flywheel_cache::client::journal::{Left, Unaccounted};
use flywheel_nix::path_info::PathInfo;
use flywheel_nix::store::{self, Mark, Store};
use flywheel_nix::store_path::StorePath;

/// A valid path of a dead job.
#[derive(Clone, Debug)]
pub(super) struct Leftover {
    pub(crate) info: PathInfo,
    /// Since when it is unsettled (seconds since 1970), if that is known.
    pub(crate) since: Option<u64>,
    pub(crate) evidence: Evidence,
}

/// What was found.
#[derive(Debug)]
pub(super) struct Leftovers {
    pub(super) taken: Vec<Leftover>,
    /// Paths that can be another job's, or forged by it, and are therefore not taken up.
    pub(super) doubtful: Vec<Leftover>,
}

/// Why a path is taken for a dead job's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Evidence {
    /// Its journal names the path.
    Named,
    /// It was registered after that job had begun and before any other job did. Nothing is known of its maker: a process
    /// that is no job of Flywheel's may have added it.
    Unaccounted,
}

/// Finds the valid paths that dead jobs left. What comes after this job's mark is judged as the job's own additions are,
/// the additions of a dead job's processes that live on among them.
///
/// # Errors
/// When the store cannot be read.
pub(super) async fn find(ownership: &Ownership, left: &Left) -> Result<Leftovers, store::Error> {
    let (store, own) = (&ownership.store, &ownership.mark);
    let mut found: BTreeMap<StorePath, (Option<u64>, Evidence)> = left
        .seen
        .iter()
        .map(|(path, since)| (path.clone(), (Some(*since), Evidence::Named)))
        .collect();
    for (mark, expected) in &left.expected {
        // An expected path counts if it was really added, even if another process ended up adding it.
        let added = store.added_since(&Mark::after_id(*mark)).await?;
        let arrived = added
            .infos
            .into_iter()
            .filter(|info| expected.binary_search(&info.path).is_ok());
        for info in arrived {
            found.entry(info.path).or_insert((None, Evidence::Named));
        }
    }
    for job in &left.unaccounted {
        for path in unaccounted(store, job, own).await? {
            let entry = (Some(job.since), Evidence::Unaccounted);
            found.entry(path).or_insert(entry);
        }
    }
    let all: Vec<StorePath> = found.keys().cloned().collect();
    let valid = store.infos(&all).await?;
    let leftovers = valid.infos.into_iter().filter_map(|info| {
        let (since, evidence) = found.get(&info.path).copied()?;
        Some(Leftover {
            info,
            since,
            evidence,
        })
    });
    // On a shared host a path that no journal names may be anybody's, and a named one may be forged.
    let is_shared = ownership.host.neighbours().sharing.is_shared();
    let (taken, doubtful) = leftovers.partition(|leftover| {
        !is_shared
            || (leftover.evidence == Evidence::Named && ownership.is_own_work(&leftover.info))
    });
    Ok(Leftovers { taken, doubtful })
}

/// The paths that were registered from a dead job's beginning to that of the next job, and that it may not have come to
/// record: it was killed first, or what it had started lived on.
async fn unaccounted(
    store: &Store,
    job: &Unaccounted,
    own: &Mark,
) -> Result<Vec<StorePath>, store::Error> {
    // The ids of a store that was made anew in the old one's place, as in a new image, say nothing of the old ones.
    let marked = store.path_at(&Mark::after_id(job.mark)).await?;
    if let (Some(now), Some(then)) = (&marked, &job.marked)
        && now != then
    {
        return Ok(Vec::new());
    }
    let until = job.until.map(|until| until.id);
    let until = until.into_iter().chain(own.id()).min();
    let mut added = store.added_since(&Mark::after_id(job.mark)).await?.infos;
    if let Some(until) = until {
        // A path that was deleted and added again has a new id, and so is among the later ones alone.
        let later = store.added_since(&Mark::after_id(until)).await?.infos;
        let later: BTreeSet<StorePath> = later.into_iter().map(|info| info.path).collect();
        added.retain(|info| !later.contains(&info.path));
    }
    // A derivation's closure is its build-time sources, which nothing substitutes.
    added.retain(|info| !info.path.is_derivation());
    Ok(added.into_iter().map(|info| info.path).collect())
}
