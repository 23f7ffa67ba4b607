//! The paths that a job added to the store: counted, kept apart from those of other jobs, and completed by the
//! closure of the job's results.

use std::collections::{BTreeSet, HashSet};
use std::path::Path;
use std::time::SystemTime;

use tokio::time::sleep;

use super::daemon_names::CLAIM_LATENCY;
use super::ownership::{Decision, Doubt, Ownership, Registered};
use super::store_host::written_by;
use flywheel_nix::path_info::{Origin, PathInfo, Unreadable};
use flywheel_nix::store;
use flywheel_nix::store_path::StorePath;

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
    /// Paths that may be forged or another repository's: they are not published, and named with the reason.
    pub(crate) ambiguous: Vec<(StorePath, Doubt)>,
    /// Who else can have written the store, in one line; `None` if it could not be read.
    pub(crate) store: Option<String>,
    /// Whether jobs of other repositories or of lower trust can have written the store.
    pub(crate) is_shared: bool,
    /// Nix processes of which it is not known what they named. A result that was valid before may be missing.
    pub(crate) unread_processes: usize,
    /// Valid paths with a registration that cannot be used.
    pub(crate) unreadable: Vec<Unreadable>,
}

impl AddedPaths {
    /// Reads the store after the command has ended: what was added since the mark, what the job named, and the results,
    /// which are the given ones and those that `folder` has links to since `begun`.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub(super) async fn collect(
        ownership: &Ownership,
        (folder, begun): (&Path, SystemTime),
        mut results: Vec<StorePath>,
    ) -> Result<Self, store::Error> {
        let store = &ownership.store;
        let found = store.added_since(&ownership.mark).await?;
        results.extend(store.result_links(folder, begun).await?);
        // After the paths were read: a job that added one of them has entered the registry by now.
        let mut evidence = ownership.evidence(&results).await?;
        if evidence.awaits_claims(&found.infos) {
            sleep(CLAIM_LATENCY).await;
            evidence = ownership.evidence(&results).await?;
        }
        let mut collected = Self {
            unreadable: found.unreadable,
            store: Some(format!(
                "{}{}",
                evidence.sharing,
                written_by(ownership.writers.as_deref())
            )),
            is_shared: evidence.is_shared(),
            unread_processes: evidence.unread_processes,
            ..Self::default()
        };
        // What the job named was perhaps valid before it, and the cache may lack it all the same. So its derivations
        // are no reason to publish.
        let named = evidence.named.iter().filter(|path| !path.is_derivation());
        let mut roots: BTreeSet<StorePath> = named.cloned().collect();
        let mut doubtful = Vec::new();
        for info in &found.infos {
            match evidence.decide(info, Registered::AfterMark) {
                Decision::Publish => _ = roots.insert(info.path.clone()),
                Decision::Ambiguous(doubt) => doubtful.push((info.path.clone(), doubt)),
                Decision::OtherJob | Decision::Derivation => (),
            }
        }
        let roots: Vec<StorePath> = roots.into_iter().collect();
        let closure = store.closure(&roots).await?;
        collected.unreadable.extend(closure.unreadable);
        let new: HashSet<&StorePath> = found.infos.iter().map(|info| &info.path).collect();
        let registered = |path: &StorePath| match new.contains(path) {
            true => Registered::AfterMark,
            false => Registered::BeforeMark,
        };
        let (wanted, refused) = evidence.divide(closure.infos, registered, |_| false);
        collected.publish(wanted, refused, doubtful);
        // What a result needs is published whichever job added it, and so counts as this job's.
        let wanted: BTreeSet<&StorePath> = collected.wanted.iter().map(|info| &info.path).collect();
        let counted: Vec<Origin> = found
            .infos
            .iter()
            .filter(|info| {
                wanted.contains(&info.path)
                    || evidence.decide(info, Registered::AfterMark) == Decision::Publish
            })
            .map(PathInfo::origin)
            .collect();
        for origin in counted {
            collected.count(origin);
        }
        Ok(collected)
    }

    /// Takes over what is to be published, and completes the list of what is in doubt.
    fn publish(
        &mut self,
        wanted: Vec<PathInfo>,
        refused: Vec<(PathInfo, Decision)>,
        mut doubtful: Vec<(StorePath, Doubt)>,
    ) {
        doubtful.extend(
            refused
                .into_iter()
                .filter_map(|(info, decision)| match decision {
                    Decision::Ambiguous(doubt) => Some((info.path, doubt)),
                    Decision::Publish | Decision::OtherJob | Decision::Derivation => None,
                }),
        );
        doubtful.sort_by(|a, b| a.0.cmp(&b.0));
        doubtful.dedup_by(|a, b| a.0 == b.0);
        self.wanted = wanted;
        self.ambiguous = doubtful;
    }

    /// Counts paths that the job has added and freed again.
    pub(crate) fn count_freed(&mut self, infos: &[PathInfo]) {
        for info in infos {
            self.count(info.origin());
        }
    }

    fn count(&mut self, origin: Origin) {
        match origin {
            Origin::Built => self.built += 1,
            Origin::Substituted => self.substituted += 1,
            Origin::Added => self.added += 1,
        }
    }
}
