//! What a job brought into the store: counted, told from other jobs' work, and completed by the
//! closure of its results.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::SystemTime;

use flywheel_nix::path_info::{Origin, PathInfo, Unreadable};
use flywheel_nix::store::{self, Mark, Store};
use flywheel_nix::store_path::StorePath;
use flywheel_nix::temp_roots::{Owner, TempRootWatcher};

/// What a job brought into the store.
#[derive(Debug, Default)]
pub struct AddedPaths {
    /// Everything to be published: what the job added, and the closure of that and of its results.
    pub wanted: Vec<PathInfo>,
    /// Paths built here.
    pub built: u64,
    /// Paths fetched from a cache.
    pub substituted: u64,
    /// Sources and other paths added.
    pub added: u64,
    /// Paths that were added meanwhile and may be another job's: they are left out, by name.
    pub unclear: Vec<StorePath>,
    /// Valid paths whose registration cannot be used.
    pub unreadable: Vec<Unreadable>,
}

impl AddedPaths {
    /// Looks the store through after the command has ended: what was added since `mark` by processes
    /// of this job, and the results: those given, and those that `folder` links to since `begun`.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn collect(
        store: &Store,
        clients: &TempRootWatcher,
        mark: &Mark,
        (folder, begun): (&Path, SystemTime),
        results: Vec<StorePath>,
    ) -> Result<Self, store::Error> {
        let found = store.added_since(mark).await?;
        let mut added_paths = Self {
            unreadable: found.unreadable,
            ..Self::default()
        };
        let mut roots: BTreeSet<StorePath> = store
            .result_links(folder, begun)
            .await?
            .into_iter()
            .collect();
        let (ours, unclear) = added_paths.take(found.infos, clients);
        roots.extend(ours);
        roots.extend(results);
        let roots: Vec<StorePath> = roots.into_iter().collect();
        let closure = store.closure(&roots).await?;
        added_paths.unreadable.extend(closure.unreadable);
        added_paths.wanted = closure.infos;
        // What a result needs is published, whoever added it, and then it is the job's.
        let wanted: BTreeSet<&StorePath> =
            added_paths.wanted.iter().map(|info| &info.path).collect();
        let (needed, left_out): (Vec<_>, Vec<_>) = unclear
            .into_iter()
            .partition(|info| wanted.contains(&info.path));
        for info in &needed {
            added_paths.count(info);
        }
        added_paths.unclear = left_out.into_iter().map(|info| info.path).collect();
        Ok(added_paths)
    }

    /// Counts the job's own paths; gives those to publish, and those of which it is unclear whose they are.
    fn take(
        &mut self,
        infos: Vec<PathInfo>,
        clients: &TempRootWatcher,
    ) -> (Vec<StorePath>, Vec<PathInfo>) {
        // A derivation's closure is its build-time sources: nobody substitutes those.
        let infos: Vec<PathInfo> = infos
            .into_iter()
            .filter(|info| !info.path.is_derivation())
            .collect();
        let paths: Vec<StorePath> = infos.iter().map(|info| info.path.clone()).collect();
        let (mut ours, mut unclear) = (Vec::new(), Vec::new());
        for (info, whose) in infos.into_iter().zip(clients.owners(&paths)) {
            match whose {
                Owner::OtherJob => (),
                Owner::Ambiguous => unclear.push(info),
                // Nobody else has come to light in all the job's time.
                Owner::ThisJob | Owner::Unclaimed => {
                    self.count(&info);
                    ours.push(info.path);
                }
            }
        }
        (ours, unclear)
    }

    fn count(&mut self, info: &PathInfo) {
        match info.origin() {
            Origin::Built => self.built += 1,
            Origin::Substituted => self.substituted += 1,
            Origin::Added => self.added += 1,
        }
    }
}
