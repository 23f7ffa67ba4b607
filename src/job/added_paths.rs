//! The paths that a job added to the store: counted, kept apart from those of other jobs, and completed by the
//! closure of the job's results.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::SystemTime;

use super::ownership::{Age, Decision, decide};
use flywheel_nix::path_info::{Origin, PathInfo, Unreadable};
use flywheel_nix::store::{self, Mark, Store};
use flywheel_nix::store_path::StorePath;
use flywheel_nix::temp_roots::TempRootWatcher;

/// What a job added to the store, in numbers and by name.
#[derive(Debug, Default)]
pub(crate) struct AddedPaths {
    /// Everything to be published: the closure of what the job added and of its results.
    pub(crate) wanted: Vec<PathInfo>,
    /// Paths built here.
    pub(crate) built: u64,
    /// Paths substituted from a cache.
    pub(crate) substituted: u64,
    /// Sources and other paths added.
    pub(crate) added: u64,
    /// Paths that were added while the job ran and may be another job's: they are left out, and named.
    pub(crate) ambiguous: Vec<StorePath>,
    /// Valid paths with a registration that cannot be used.
    pub(crate) unreadable: Vec<Unreadable>,
}

impl AddedPaths {
    /// Reads the store after the command has ended: what processes of this job added since `mark`, and the results,
    /// which are the given ones and those that `folder` has links to since `begun`.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub(crate) async fn collect(
        store: &Store,
        temp_roots: &TempRootWatcher,
        mark: &Mark,
        (folder, begun): (&Path, SystemTime),
        results: Vec<StorePath>,
    ) -> Result<Self, store::Error> {
        let found = store.added_since(mark).await?;
        let mut collected = Self {
            unreadable: found.unreadable,
            ..Self::default()
        };
        // A result that was in the store before the job is wanted, too: the cache may not have it.
        let mut roots: BTreeSet<StorePath> = store
            .result_links(folder, begun)
            .await?
            .into_iter()
            .collect();
        let (own, ambiguous) = collected.take(found.infos, temp_roots);
        roots.extend(own);
        roots.extend(results);
        let roots: Vec<StorePath> = roots.into_iter().collect();
        let closure = store.closure(&roots).await?;
        collected.unreadable.extend(closure.unreadable);
        collected.wanted = closure.infos;
        // What a result needs is published whichever job added it, and so counts as this job's.
        let wanted: BTreeSet<&StorePath> = collected.wanted.iter().map(|info| &info.path).collect();
        let (needed, left_out): (Vec<_>, Vec<_>) = ambiguous
            .into_iter()
            .partition(|info| wanted.contains(&info.path));
        for info in &needed {
            collected.count(info);
        }
        collected.ambiguous = left_out.into_iter().map(|info| info.path).collect();
        Ok(collected)
    }

    /// Counts the job's own paths, and divides these into those to publish and those that may be another job's.
    fn take(
        &mut self,
        infos: Vec<PathInfo>,
        temp_roots: &TempRootWatcher,
    ) -> (Vec<StorePath>, Vec<PathInfo>) {
        let (mut publish, mut ambiguous) = (Vec::new(), Vec::new());
        for (info, decision) in decide(infos, Age::Waited, temp_roots) {
            match decision {
                Decision::Publish => {
                    self.count(&info);
                    publish.push(info.path);
                }
                Decision::Ambiguous => ambiguous.push(info),
                Decision::Hold | Decision::LeaveOut => (),
            }
        }
        (publish, ambiguous)
    }

    fn count(&mut self, info: &PathInfo) {
        match info.origin() {
            Origin::Built => self.built += 1,
            Origin::Substituted => self.substituted += 1,
            Origin::Added => self.added += 1,
        }
    }
}
